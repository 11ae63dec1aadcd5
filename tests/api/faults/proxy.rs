//! A TCP proxy between the service and its database that simulates network faults.

use std::{
    future::pending,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

/// The simulated condition of the network, which affects all packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NetworkCondition {
    /// Delivers packets immediately.
    Normal,
    /// Delivers packets after this delay, in each direction.
    Slow(Duration),
    /// Delays packets until the condition changes.
    Blackhole,
    /// Delivers half of a response, then resets the connection.
    Reset,
    /// Closes the connections. Accepts new ones, but forwards nothing until this time has passed or the
    /// condition changes, like a database that is suspended when idle.
    Suspended(Duration),
}

/// A TCP proxy in front of a PostgreSQL on a Unix socket.
pub(super) struct Proxy {
    address: SocketAddr,
    condition: watch::Sender<NetworkCondition>,
    /// Connections opened before this instant are closed.
    closed: watch::Sender<Instant>,
    /// Connections opened before this instant are half-open: the database has closed its end.
    half_open: watch::Sender<Instant>,
    acceptor: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Proxy {
    pub(super) async fn start(socket_dir: &Path) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (condition, condition_rx) = watch::channel(NetworkCondition::Normal);
        let (closed, closed_rx) = watch::channel(Instant::now());
        let (half_open, half_open_rx) = watch::channel(Instant::now());
        let upstream = socket_dir.join(".s.PGSQL.5432");
        let acceptor = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(forward(
                    stream,
                    upstream.clone(),
                    condition_rx.clone(),
                    closed_rx.clone(),
                    half_open_rx.clone(),
                ));
            }
        });
        Proxy {
            address,
            condition,
            closed,
            half_open,
            acceptor,
        }
    }

    pub(super) fn url(&self) -> String {
        format!("postgres://todo@{}/todo", self.address)
    }

    pub(super) fn set_condition(&self, condition: NetworkCondition) {
        self.condition.send_replace(condition);
        if matches!(condition, NetworkCondition::Suspended(_)) {
            self.closed.send_replace(Instant::now());
        }
    }

    /// Closes the database's end of all open connections without notifying the service.
    pub(super) fn make_half_open(&self) {
        self.half_open.send_replace(Instant::now());
    }
}

/// Forwards one connection until it ends.
async fn forward(
    mut stream: TcpStream,
    upstream: PathBuf,
    mut condition: watch::Receiver<NetworkCondition>,
    mut closed: watch::Receiver<Instant>,
    mut half_open: watch::Receiver<Instant>,
) {
    let opened = Instant::now();
    let initial = *condition.borrow();
    match initial {
        NetworkCondition::Suspended(wake_time) => {
            let resumed = condition.wait_for(|now| !matches!(now, NetworkCondition::Suspended(_)));
            timeout(wake_time, resumed).await.ok();
        }
        _ => wait_while_blackholed(&mut condition).await,
    }
    let Ok(mut server) = UnixStream::connect(upstream).await else {
        return;
    };
    stream.set_nodelay(true).unwrap();
    let (mut from_client, mut to_client) = stream.split();
    let (mut from_server, mut to_server) = server.split();
    let end = tokio::select! {
        end = forward_one_way(&mut from_client, &mut to_server, condition.clone(), false) => end,
        end = forward_one_way(&mut from_server, &mut to_client, condition.clone(), true) => end,
        _ = half_open.wait_for(|at| *at > opened) => End::HalfOpen,
        _ = closed.wait_for(|at| *at > opened) => End::Close,
    };
    drop(server);
    match end {
        End::Close => {}
        End::Reset => stream.set_zero_linger().unwrap(),
        // The client's end stays open, and its data is discarded.
        End::HalfOpen => {
            copy(&mut stream, &mut tokio::io::sink()).await.ok();
        }
    }
}

/// How a forwarded connection ends, as the service sees it.
enum End {
    Close,
    Reset,
    HalfOpen,
}

/// Forwards one direction of a connection. A delay adds latency without limiting throughput.
async fn forward_one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut condition: watch::Receiver<NetworkCondition>,
    carries_responses: bool,
) -> End {
    let (sender, mut in_transit) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let current = condition.clone();
    let read = async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let delay = match *current.borrow() {
                NetworkCondition::Slow(delay) => delay,
                _ => Duration::ZERO,
            };
            let packet = (Instant::now() + delay, buffer[..length].to_vec());
            sender.send(packet).ok();
        }
        drop(sender);
        // The writing half ends the connection once it has delivered everything.
        pending::<End>().await
    };
    let write = async {
        while let Some((due, bytes)) = in_transit.recv().await {
            sleep_until(due).await;
            wait_while_blackholed(&mut condition).await;
            let resets = carries_responses && *condition.borrow() == NetworkCondition::Reset;
            let length = if resets { bytes.len() / 2 } else { bytes.len() };
            if to.write_all(&bytes[..length]).await.is_err() {
                return End::Close;
            }
            if resets {
                return End::Reset;
            }
        }
        End::Close
    };
    tokio::select! {
        end = read => end,
        end = write => end,
    }
}

async fn wait_while_blackholed(condition: &mut watch::Receiver<NetworkCondition>) {
    let delivers = condition.wait_for(|now| *now != NetworkCondition::Blackhole);
    delivers.await.ok();
}
