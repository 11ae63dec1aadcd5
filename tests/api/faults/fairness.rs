//! Fair shares of memory and connections: a victim is served while other clients exceed their shares.

use std::{
    fs,
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tokio_postgres::Client as Sql;

use super::{RESPONSE_TIMEOUT, memory, raise_file_limit, report, short_or_full, start_light_load};
use crate::harness::{Server, User, head, until};

/// The bundle of Swagger UI, the largest static file.
pub(super) const BUNDLE: &str = "/docs/swagger-ui-bundle.js";
/// The number of large responses that the service sends to one network concurrently.
const LARGE_RESPONSES_PER_NETWORK: usize = 32;

/// Inserts tasks of 5 kB for a user.
pub(super) async fn insert_large_tasks(sql: &Sql, user: &User, count: usize) {
    let inserted = sql
        .execute(
            "insert into tasks (user_id, id, title, description, completed, created_at, updated_at)
             select $1::text::uuid, gen_random_uuid(), repeat('🌿', 200), repeat('🌿', 1000), false, now(), now()
             from generate_series(1, $2::bigint)",
            &[&user.id, &(count as i64)],
        )
        .await
        .unwrap();
    assert_eq!(inserted, count as u64);
}

/// Connects from an address of this machine with a small receive buffer, because the kernel acknowledges
/// bytes that the client has not read.
async fn connect_from(source: [u8; 4], server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(server).await.unwrap()
}

/// Sends a request several times and reads nothing. Returns once a response has begun.
pub(super) async fn request_without_reading(
    server: SocketAddr,
    target: &str,
    token: Option<&str>,
) -> TcpStream {
    let stream = send_without_reading(server, target, token).await;
    stream.readable().await.unwrap();
    stream
}

async fn send_without_reading(server: SocketAddr, target: &str, token: Option<&str>) -> TcpStream {
    let mut stream = connect_from([127, 0, 0, 1], server).await;
    let requests = head("GET", target, token, "").repeat(8);
    stream.write_all(requests.as_bytes()).await.unwrap();
    stream
}

/// Gets a short list repeatedly, and asserts that each response is 200. Returns the longest response
/// time.
async fn get_short_list(user: &User, count: usize) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..count {
        let sent_at = Instant::now();
        let list = user.get(user.tasks()).await.expect(200).json();
        assert_eq!(list.as_array().unwrap().len(), 1);
        slowest = slowest.max(sent_at.elapsed());
        sleep(Duration::from_millis(20)).await;
    }
    slowest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_lists_of_one_user_use_bounded_memory_and_do_not_delay_other_users() {
    raise_file_limit();
    let _guard = start_light_load().await;
    let server = Server::with(&[("DB_POOL_SIZE", "8")]).await;
    let (mallory, ann) = (server.user().await, server.user().await);
    ann.create_task("short").await;
    insert_large_tasks(&server.sql().await, &mallory, 100).await;
    let target = format!("{}?limit=100", mallory.tasks());
    let whole = mallory.get(&target).await.expect(200).body.len();
    assert!(whole > 400_000, "{whole} bytes");

    let idle = memory(server.pid()).0;
    let clients = short_or_full(250, 2400);
    let mut streams = Vec::new();
    for _ in 0..clients {
        let token = Some(mallory.access_token.as_str());
        streams.push(send_without_reading(server.addr(), &target, token).await);
    }
    let slowest = get_short_list(&ann, short_or_full(50, 500)).await;
    let peak = memory(server.pid()).1;
    drop(streams);
    until("the user's lists are served again", async || {
        mallory.get(&target).await.status == 200
    })
    .await;
    let after = memory(server.pid()).0;
    report(
        "unread lists of one user",
        format!(
            "{clients} clients; resident memory {idle} KiB before, {peak} KiB at most, {after} KiB after; another user's list took {slowest:.1?} at most",
        ),
    );
    assert!(slowest < RESPONSE_TIMEOUT, "{slowest:?}");
    // One page for each client would be 500 KiB.
    let grown = peak.saturating_sub(idle);
    assert!(grown < 64 * 1024 + 96 * clients as u64, "{grown} KiB more");
    assert_eq!(server.stop().await.code(), Some(0));
}

/// The first hundred changes are small, the others are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_end_with_large_tasks_count_as_a_large_response() {
    let _guard = start_light_load().await;
    let server = Server::start().await;
    let sql = server.sql().await;
    let mallory = server.user().await;
    let cursor = mallory.changes_since("", 1).await.cursor;
    insert_large_tasks(&sql, &mallory, 100).await;
    sql.execute("delete from tasks", &[]).await.unwrap();
    insert_large_tasks(&sql, &mallory, 40).await;
    let target = format!("{}?since={cursor}&limit=140", mallory.changes());
    let whole = mallory.get(&target).await.expect(200).body.len();
    assert!(whole > 150_000, "{whole} bytes");
    let mut streams = Vec::new();
    for _ in 0..4 {
        let token = Some(mallory.access_token.as_str());
        streams.push(request_without_reading(server.addr(), &target, token).await);
    }
    // A user can have four large lists at a time.
    assert_eq!(mallory.get(&target).await.status, 503);
    drop(streams);
    mallory.get(&target).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_a_short_list_while_its_network_holds_all_its_large_response_permits() {
    let _guard = start_light_load().await;
    let server = Server::with(&[("DB_POOL_SIZE", "8")]).await;
    let sql = server.sql().await;
    let ann = server.user().await;
    ann.create_task("short").await;
    let quiet = get_short_list(&ann, 50).await;
    let mut streams = Vec::new();
    let accounts = short_or_full(LARGE_RESPONSES_PER_NETWORK / 4 + 1, 34);
    for number in 0..accounts {
        let mallory = server.user().await;
        insert_large_tasks(&sql, &mallory, 180).await;
        for _ in 0..4 {
            let token = Some(mallory.access_token.as_str());
            let stream = send_without_reading(server.addr(), &mallory.tasks(), token).await;
            // The last user gets no permits.
            if number < LARGE_RESPONSES_PER_NETWORK / 4 {
                stream.readable().await.unwrap();
            }
            streams.push(stream);
        }
    }
    let busy = get_short_list(&ann, short_or_full(50, 1000)).await;

    // A client of another network gets a permit for a large list.
    insert_large_tasks(&sql, &ann, 100).await;
    let mut other = connect_from([127, 0, 0, 2], server.addr()).await;
    let request = head("GET", &ann.tasks(), Some(&ann.access_token), "");
    other.write_all(request.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    let read = timeout(Duration::from_secs(3), other.read_exact(&mut status));
    read.await.expect("a response").unwrap();
    assert_eq!(status, *b"HTTP/1.1 200");
    report(
        "unread lists of many users",
        format!("{accounts} users; a short list took {quiet:.1?} before, {busy:.1?} at most"),
    );
    assert!(busy < RESPONSE_TIMEOUT, "{busy:?}");
}

/// Reads at this rate until the response ends with `end` or the connection fails. Returns the number of
/// bytes read, and the error.
async fn read_at(
    mut stream: TcpStream,
    bytes_per_second: usize,
    end: &[u8],
) -> Result<usize, (usize, ErrorKind)> {
    let mut buffer = vec![0; bytes_per_second / 4];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return Err((total, ErrorKind::UnexpectedEof)),
            Ok(count) => {
                total += count;
                if buffer[..count].ends_with(end) {
                    return Ok(total);
                }
            }
            Err(error) => return Err((total, error.kind())),
        }
        sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_connections_that_read_slower_than_16_kib_per_second() {
    let server = Server::start().await;
    let ann = server.user().await;
    insert_large_tasks(&server.sql().await, &ann, 180).await;
    let open = async || {
        let mut stream = connect_from([127, 0, 0, 1], server.addr()).await;
        let request = head("GET", &ann.tasks(), Some(&ann.access_token), "");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    };
    let (slow, steady) = (open().await, open().await);
    let start = Instant::now();
    let (slow, steady) = tokio::join!(
        async {
            let read = timeout(Duration::from_secs(45), read_at(slow, 6 * 1024, b"}]")).await;
            (read.expect("a reset"), start.elapsed())
        },
        read_at(steady, 48 * 1024, b"}]"),
    );
    let (slow, reset_after) = slow;
    let (read, error) = slow.expect_err("a reset");
    assert_eq!(error, ErrorKind::ConnectionReset, "after {read} bytes");
    assert!(read < 400_000, "{read} bytes");
    assert!(reset_after > Duration::from_secs(8), "{reset_after:?}");
    assert!(steady.is_ok_and(|read| read > 900_000), "{steady:?}");
}

/// A connection of a server in the kernel's table.
pub(super) struct Socket {
    /// Whether the server has not closed it.
    pub(super) is_open: bool,
    /// The length of the send queue: the bytes that have not been sent or acknowledged.
    queue: u64,
}

/// Reads the connections of a server. The kernel takes milliseconds to format the table, so this
/// first waits a little, for the callers that poll it.
pub(super) async fn sockets(server: SocketAddr) -> Vec<Socket> {
    sleep(Duration::from_millis(100)).await;
    let port = format!(":{:04X} ", server.port());
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, queues, inode) = (fields[1], fields[3], fields[4], fields[9]);
        const LISTEN: &str = "0A";
        const TIME_WAIT: &str = "06";
        if !local.ends_with(port.trim_end()) || [LISTEN, TIME_WAIT].contains(&state) {
            return None;
        }
        Some(Socket {
            is_open: inode != "0",
            queue: u64::from_str_radix(queues.split_once(':')?.0, 16).ok()?,
        })
    };
    let lines = table.lines().filter(|line| line.contains(&port));
    lines.filter_map(socket).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_files_use_bounded_kernel_memory_and_are_reset() {
    raise_file_limit();
    let _guard = start_light_load().await;
    let server = Server::start().await;
    let clients = short_or_full(64, 600);
    let mut streams = Vec::new();
    for _ in 0..clients {
        streams.push(send_without_reading(server.addr(), BUNDLE, None).await);
    }
    until("the files are sent", async || {
        let sockets = sockets(server.addr()).await;
        sockets.iter().filter(|socket| socket.queue > 0).count() >= LARGE_RESPONSES_PER_NETWORK
    })
    .await;
    sleep(Duration::from_secs(1)).await;
    let queues = sockets(server.addr()).await;
    let queues = queues.iter().map(|socket| socket.queue);
    let (total, largest) = (queues.clone().sum::<u64>(), queues.max().unwrap());
    report(
        "unread files",
        format!("{clients} clients; {total} bytes in the kernel"),
    );
    assert!(largest < 512 * 1024, "{largest} bytes");
    // Clients without a permit get a 503.
    let share = 512 * 1024 * LARGE_RESPONSES_PER_NETWORK + 16 * 1024 * clients;
    assert!(total < share as u64, "{total} bytes");
    server.get("/healthz").await.expect(200);
    server.get("/docs/docs.css").await.expect(200);

    // The clients keep their connections open; other clients may get the permits meanwhile.
    let start = Instant::now();
    until("the first connections are reset", async || {
        sockets(server.addr()).await.len() <= clients - LARGE_RESPONSES_PER_NETWORK
    })
    .await;
    report(
        "unread files",
        format!("reset after {:.0?}", start.elapsed()),
    );
    // The clients that got no permit within 5 s fail at the same moment, but do not flood the log.
    server.wait_for_log("slow requests suppressed count=").await;
    drop(streams);
    until("all connections are closed", async || {
        sockets(server.addr()).await.is_empty()
    })
    .await;
}
