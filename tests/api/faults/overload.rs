//! Overload: too many connections, too many requests, and abusive clients.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::stream::{self, StreamExt};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::JoinSet,
    time::{interval, sleep, sleep_until},
};
use tokio_postgres::Client as Sql;

use super::{
    Cluster, RECOVERY_TIMEOUT, RESPONSE_TIMEOUT, backends,
    fairness::{BUNDLE, insert_large_tasks, request_without_reading, sockets},
    load::{Addresses, Client, Credentials, Load, RequestLog, RequestRecord, percentile, summary},
    memory,
    proxy::NetworkCondition,
    raise_file_limit, report, short_or_full, start_heavy_load, start_light_load, until_served,
};
use crate::harness::{Server, User};

/// Samples the number of backends continuously. Returns the current maximum and the task.
fn watch_backends(sql: Sql) -> (Arc<AtomicUsize>, tokio::task::JoinHandle<()>) {
    let max = Arc::new(AtomicUsize::new(0));
    let sampled = max.clone();
    let sampler = tokio::spawn(async move {
        let mut ticks = interval(Duration::from_millis(50));
        loop {
            ticks.tick().await;
            sampled.fetch_max(backends(&sql).await.len(), Ordering::Relaxed);
        }
    });
    (max, sampler)
}

// FR-006
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_two_thousand_connections_with_twenty_backends() {
    const CONNECTIONS: usize = 2000;
    raise_file_limit();
    let _guard = start_light_load().await;
    let cluster = Cluster::direct(&[("DB_POOL_SIZE", "20")]).await;
    let (max_backends, sampler) = watch_backends(cluster.sql().await);
    let pid = cluster.server.pid();
    let idle = memory(pid).0;

    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut client = Client::at(cluster.server.addr());
        assert!(client.connect().await, "{} connected", clients.len());
        clients.push(client);
    }
    let requests = Arc::new(RequestLog::default());
    let credentials = cluster.credentials();
    // Each connection sends one request per round; a fifth of them are writes. As many requests are
    // outstanding as do not wait for a connection too long on a busy machine.
    let rounds = short_or_full(1, 12);
    for round in 0..rounds {
        let requests = &requests;
        let (credentials, task) = (&credentials, &cluster.task);
        let sent = clients
            .iter_mut()
            .enumerate()
            .map(async |(number, client)| {
                if number % 5 == 0 {
                    let title = format!("round {round} of {number}");
                    client.create(credentials, &title, requests).await
                } else {
                    client.read(credentials, task, requests).await
                }
            });
        stream::iter(sent)
            .buffer_unordered(40)
            .collect::<Vec<_>>()
            .await;
    }
    let (resident, peak) = memory(pid);
    sampler.abort();
    drop(clients);
    let kept = requests.assert_durable(&cluster.sql().await).await;
    let max_backends = max_backends.load(Ordering::Relaxed);
    report(
        "2,000 connections",
        format!(
            "{}; at most {max_backends} backends; resident memory {idle} KiB before, {resident} KiB with them, {peak} KiB at most; {kept} tasks verified",
            requests.summary()
        ),
    );
    let records = requests.all();
    assert_eq!(records.len(), CONNECTIONS * rounds);
    assert!(
        records.iter().all(RequestRecord::is_success),
        "{}",
        requests.summary()
    );
    assert!(max_backends <= 20, "{max_backends} backends");
    // The documented limit for the release build is 64 MiB.
    assert!(peak < 128 * 1024, "{peak} KiB");
    cluster.stop().await;
}

/// Creates tasks of several users at a fixed rate, independent of response times. Opens connections as
/// needed.
async fn create_at_rate(
    cluster: &Cluster,
    users: &[Credentials],
    rate: u32,
    duration: Duration,
    phase: &str,
) -> Arc<RequestLog> {
    let requests = Arc::new(RequestLog::default());
    let idle: Arc<Mutex<Vec<Client>>> = Arc::default();
    let start = tokio::time::Instant::now();
    let mut outstanding = JoinSet::new();
    for number in 0.. {
        let due = start + Duration::from_secs(1) * number / rate;
        if due > start + duration {
            break;
        }
        sleep_until(due).await;
        let reused = idle.lock().unwrap().pop();
        let mut client = reused.unwrap_or_else(|| Client::at(cluster.server.addr()));
        let (requests, idle) = (requests.clone(), idle.clone());
        let credentials = users[number as usize % users.len()].clone();
        let title = format!("{phase} {number}");
        outstanding.spawn(async move {
            client.create(&credentials, &title, &requests).await;
            idle.lock().unwrap().push(client);
        });
    }
    outstanding.join_all().await;
    requests
}

// SC-003
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sheds_excess_requests_quickly_at_twice_the_capacity() {
    raise_file_limit();
    let _guard = start_heavy_load().await;
    // One of the five connections is reserved for the health probe.
    let cluster = Cluster::proxied(&[("DB_POOL_SIZE", "5")]).await;
    let mut users = Vec::new();
    for _ in 0..4 {
        users.push(Credentials::from(&cluster.server.user().await));
    }
    // With a round trip of 40 ms, four connections execute 100 writes per second on any machine.
    let capacity = 100;
    cluster
        .proxy()
        .set_condition(NetworkCondition::Slow(Duration::from_millis(20)));
    // Opens the connections.
    create_at_rate(
        &cluster,
        &users,
        capacity / 4,
        Duration::from_secs(1),
        "before",
    )
    .await;

    let duration = short_or_full(Duration::from_secs(3), Duration::from_secs(60));
    let requests = create_at_rate(&cluster, &users, 2 * capacity, duration, "during").await;
    let end = Instant::now();
    let mut recovered = None;
    while recovered.is_none() && end.elapsed() < 2 * RECOVERY_TIMEOUT {
        let phase = format!("after {:?}", end.elapsed());
        let after = create_at_rate(
            &cluster,
            &users,
            capacity / 4,
            Duration::from_secs(1),
            &phase,
        )
        .await;
        if after.all().iter().all(RequestRecord::is_success) {
            recovered = Some(end.elapsed());
        }
    }
    let kept = requests.assert_durable(&cluster.sql().await).await;
    let records = requests.all();
    let total = records.len();
    let (served, shed): (Vec<_>, Vec<_>) = records.into_iter().partition(RequestRecord::is_success);
    report(
        "twice the capacity",
        format!(
            "{} requests a second for {duration:?}; served: {}; shed: {}; recovered after {recovered:.1?}, of which 1 s is the measurement; {kept} tasks verified",
            2 * capacity,
            summary(&served),
            summary(&shed)
        ),
    );
    requests.assert_all_responded_within(RESPONSE_TIMEOUT);
    assert!(
        shed.iter()
            .all(|request| request.is_retryable_503("overloaded")),
        "{}",
        summary(&shed)
    );
    // Half of the requests can be served; a quarter leaves room for noise.
    assert!(4 * served.len() > total, "{}", requests.summary());
    for group in [&served, &shed] {
        let p95 = percentile(group, 95);
        assert!(p95 < Duration::from_secs(1), "{}", summary(group));
    }
    assert!(
        recovered.is_some_and(|recovered| recovered < RECOVERY_TIMEOUT),
        "{recovered:?}"
    );
    cluster.stop().await;
}

/// A client that occupies connections or responses for as long as possible.
#[derive(Clone, Copy)]
enum AbusiveClient {
    /// Sends part of a head and then nothing.
    HalfHead,
    /// Sends a head at one byte a second.
    SlowHead,
    /// Sends a body at one byte a second.
    SlowBody,
    /// Requests a large list several times and reads nothing.
    NeverReads,
    /// Requests the largest static file several times and reads nothing.
    NeverReadsDocs,
}

impl AbusiveClient {
    /// Runs until the server closes the connection. Clients that never read cannot detect that, and return
    /// once the response has begun.
    async fn run(self, address: SocketAddr, user: Arc<User>) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let (tasks, token) = (user.tasks(), &user.access_token);
        let credentials = format!("Host: a\r\nAuthorization: Bearer {token}\r\n");
        let trickled = match self {
            AbusiveClient::HalfHead => {
                let half = format!("GET {tasks} HTTP/1.1\r\n{credentials}");
                stream.write_all(half.as_bytes()).await.unwrap();
                return stream;
            }
            AbusiveClient::SlowHead => format!("GET {tasks} HTTP/1.1\r\n{credentials}\r\n"),
            AbusiveClient::SlowBody => {
                let head =
                    format!("POST {tasks} HTTP/1.1\r\n{credentials}Content-Length: 400\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                format!("{:400}", r#"{"title": "slowly"}"#)
            }
            AbusiveClient::NeverReads => {
                return request_without_reading(address, &tasks, Some(token)).await;
            }
            AbusiveClient::NeverReadsDocs => {
                return request_without_reading(address, BUNDLE, None).await;
            }
        };
        for byte in trickled.as_bytes() {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        stream
    }
}

async fn open_connections(address: SocketAddr) -> usize {
    let sockets = sockets(address).await;
    sockets.iter().filter(|socket| socket.is_open).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abusive_clients_are_disconnected_without_affecting_others() {
    raise_file_limit();
    let server = Server::with(&[("DB_POOL_SIZE", "8")]).await;
    let user = Arc::new(server.user().await);
    let sql = server.sql().await;
    insert_large_tasks(&sql, &user, 260).await;
    let other = server.user().await;
    let task = other.create_task("read me").await;
    let load = Load::new(&Addresses::new(&[server.addr()]))
        .reading(2, &Credentials::from(&other), task["id"].as_str().unwrap())
        .writing(1, &Credentials::from(&other));
    let requests = load.requests.clone();
    until_served(&requests, 51, 0).await;

    let pid = server.pid();
    let (before, idle) = (open_connections(server.addr()).await, memory(pid).0);
    let count = short_or_full(160, 1000);
    let start = Instant::now();
    let mut abusive = JoinSet::new();
    for number in 0..count {
        let client = match number % 4 {
            0 => AbusiveClient::HalfHead,
            1 => AbusiveClient::SlowHead,
            2 => AbusiveClient::SlowBody,
            // The number of large responses per user is limited.
            _ if number < 8 => AbusiveClient::NeverReads,
            _ => AbusiveClient::NeverReadsDocs,
        };
        abusive.spawn(client.run(server.addr(), user.clone()));
    }
    // Streams that are never read stay open until the end of the test.
    let mut streams = Vec::new();
    let mut max_open = 0;
    // In the full form, some clients get only refusals, and are idle until the idle timeout of 150 s.
    let limit = short_or_full(Duration::from_secs(60), Duration::from_secs(240));
    loop {
        while let Some(stream) = abusive.try_join_next() {
            streams.push(stream.unwrap());
        }
        let open = open_connections(server.addr()).await;
        max_open = max_open.max(open);
        if streams.len() == count && open <= before {
            break;
        }
        assert!(
            start.elapsed() < limit,
            "{} of {} connections are still open; {} clients have returned",
            open.saturating_sub(before),
            count,
            streams.len()
        );
    }
    let disconnected = start.elapsed();
    let during = requests.sent_between(start, Instant::now());
    load.finish().await;
    let (resident, peak) = memory(pid);
    report(
        "abusive clients",
        format!(
            "{count}, at most {} at once, all disconnected after {disconnected:.0?}; others: {}; resident memory {idle} KiB before, {peak} KiB at most, {resident} KiB after",
            max_open - before,
            summary(&during)
        ),
    );
    assert!(
        max_open - before > count / 2,
        "never more than {max_open} connections"
    );
    assert!(during.len() > 200, "{}", summary(&during));
    assert!(
        during.iter().all(RequestRecord::is_success),
        "{}",
        summary(&during)
    );
    assert!(
        percentile(&during, 95) < Duration::from_secs(1),
        "{}",
        summary(&during)
    );
    // The limit for unread responses, plus the connections themselves.
    let grown = peak.saturating_sub(idle);
    assert!(grown < 256 * 1024 + 64 * count as u64, "{grown} KiB more");
    assert_eq!(server.stop().await.code(), Some(0));
}
