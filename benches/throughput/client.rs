//! The HTTP client: keep-alive connections on two threads, with as little parsing as possible.

use std::{
    convert::Infallible,
    io::{Read, Write},
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use http_body_util::Full;
use hyper::{Response, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::{self, Runtime},
    time::timeout_at,
};

use crate::{
    Result,
    interrupt::{check, sleep_until},
    usage::{Cpu, CpuSampler},
    work::Rng,
};

/// The same number as pgbench's `-j`.
const LOAD_THREADS: usize = 2;
const WARM_UP: Duration = Duration::from_millis(500);
/// How long the response to a single request may take, and the last ones after the end of a load.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Writes the next request of a connection and returns the status that it should get.
pub(crate) type Writer<'a> = dyn Fn(&mut Rng, &mut Vec<u8>) -> u16 + Sync + 'a;

/// The results of a load after its warm-up.
#[derive(Default)]
pub(crate) struct Load {
    seconds: f64,
    /// Latencies of the responses with the expected status, sorted, in microseconds.
    latencies: Vec<u32>,
    /// The number of other responses.
    pub(crate) failed: u64,
    /// Whether the tasks ran out before the end of the measurement.
    pub(crate) ran_out: bool,
    pub(crate) cpu: Cpu,
}

impl Load {
    fn add(&mut self, mut part: Load) {
        self.latencies.append(&mut part.latencies);
        self.failed += part.failed;
        self.ran_out |= part.ran_out;
    }

    pub(crate) fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let index =
            (self.latencies.len() * percent / 100).min(self.latencies.len().saturating_sub(1));
        self.latencies
            .get(index)
            .map_or(0.0, |&latency| f64::from(latency) / 1e3)
    }

    /// Returns the CPU time per response, in microseconds.
    pub(crate) fn cost(&self, cpu: Option<Duration>) -> Option<f64> {
        Some(cpu?.as_secs_f64() * 1e6 / self.latencies.len() as f64)
    }
}

/// Loads a server for the given time and measures the CPU time of the `watched` processes.
pub(crate) fn load(
    address: SocketAddr,
    connections: usize,
    length: Duration,
    share: u64,
    watched: &CpuSampler,
    writer: &Writer,
) -> Result<Load> {
    let begin = Instant::now() + WARM_UP;
    let end = begin + length;
    let run = |thread: usize| -> Result<Load> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mine = (thread..connections).step_by(LOAD_THREADS);
        let tallies = mine.map(|connection| {
            run_connection(address, connection as u64, share, begin, end, writer)
        });
        let tallies = runtime.block_on(async {
            timeout_at((end + RESPONSE_TIMEOUT).into(), try_join_all(tallies)).await
        });
        let mut all = Load::default();
        for tally in tallies.map_err(|_| "the server does not respond")?? {
            all.add(tally);
        }
        Ok(all)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..LOAD_THREADS)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        sleep_until(begin)?;
        let (before, from) = (watched.cpu(), Instant::now());
        sleep_until(end)?;
        let mut all = Load {
            seconds: from.elapsed().as_secs_f64(),
            cpu: watched.cpu().since(&before),
            ..Load::default()
        };
        for thread in threads {
            all.add(thread.join().map_err(|_| "a client thread panicked")??);
        }
        all.latencies.sort_unstable();
        Ok(all)
    })
}

/// Sends requests on one connection, each after the response to the previous one.
pub(crate) async fn run_connection(
    address: SocketAddr,
    connection: u64,
    share: u64,
    begin: Instant,
    end: Instant,
    writer: &Writer<'_>,
) -> Result<Load> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut rng = Rng {
        connection,
        share,
        count: 0,
        state: (connection + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15),
    };
    let (mut request, mut response) = (Vec::with_capacity(2048), Vec::with_capacity(16 << 10));
    let mut tally = Load::default();
    loop {
        let started = Instant::now();
        if started >= end || tally.ran_out {
            return Ok(tally);
        }
        check()?;
        request.clear();
        let expected = writer(&mut rng, &mut request);
        tally.ran_out = rng.count > rng.share;
        stream.write_all(&request).await?;
        let status = read_response(&mut stream, &mut response).await?;
        // The time of the response decides: a login can wait in the queue for longer than the warm-up.
        let finished = Instant::now();
        if !(begin..end).contains(&finished) {
            continue;
        }
        if status == expected {
            tally
                .latencies
                .push((finished - started).as_micros() as u32);
        } else {
            tally.failed += 1;
        }
    }
}

/// What a response in chunks ends with. Nothing else ends so, because the chunks are JSON in one line.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// Reads one complete response into `response` and returns its status.
pub(crate) async fn read_response(stream: &mut TcpStream, response: &mut Vec<u8>) -> Result<u16> {
    response.clear();
    let mut whole = None;
    while whole.is_none_or(|length| response.len() < length && !response.ends_with(LAST_CHUNK)) {
        if stream.read_buf(response).await? == 0 {
            return Err("the server closed a connection".into());
        }
        if whole.is_none()
            && let Some(end) = response.windows(4).position(|bytes| bytes == b"\r\n\r\n")
        {
            let head = std::str::from_utf8(&response[..end])?;
            whole = Some(match header(head, "content-length") {
                Some(length) => end + 4 + length.parse::<usize>()?,
                None if header(head, "transfer-encoding").is_some() => usize::MAX,
                None => end + 4,
            });
        }
    }
    let status = response.get(9..12).ok_or("a response without a status")?;
    Ok(std::str::from_utf8(status)?.parse()?)
}

pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// Sends one request on a new connection and returns the status and the whole response.
pub(crate) fn fetch(address: SocketAddr, request: &[u8]) -> Result<(u16, String)> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    let (first, rest) =
        request.split_at(request.windows(2).position(|b| b == b"\r\n").unwrap_or(0));
    stream.write_all(&[first, b"\r\nConnection: close", rest].concat())?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    let response = String::from_utf8(response)?;
    let status = response
        .get(9..12)
        .ok_or("a response without a status")?
        .parse()?;
    Ok((status, response))
}

/// A hyper server with a constant response. It shows the cost of HTTP alone, and that the client is
/// not the bottleneck.
pub(crate) fn serve_constant(address: SocketAddr) -> Result<()> {
    pub(crate) const TASK: &str = r#"{"id":"01900000-0000-7000-8000-000000012345","user_id":"01900000-0000-7000-8000-000000000345","title":"Task 12345","description":"Something that is to be done before long","completed":false,"created_at":"2026-02-05T09:30:00.123456Z","updated_at":"2026-02-05T09:30:00.123456Z"}"#;
    Runtime::new()?.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let response = service_fn(|_| async {
                let mut response = Response::new(Full::new(Bytes::from_static(TASK.as_bytes())));
                let json = hyper::header::HeaderValue::from_static("application/json");
                response
                    .headers_mut()
                    .insert(hyper::header::CONTENT_TYPE, json);
                Ok::<_, Infallible>(response)
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), response));
        }
    })
}
