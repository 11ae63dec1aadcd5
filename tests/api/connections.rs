//! Idle connections, the limits on connections, and sockets passed by systemd.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::time::{sleep, timeout};

use crate::faults::{process_and_children, short_or_full};
use crate::harness::{DataDir, Process, SECRET, Server, Wire, head, until};

/// Starts the program as systemd does, with these sockets as descriptors 3 and 4.
pub(crate) fn start_with_sockets(
    sockets: &[TcpListener; 2],
    variables: &[(&str, &str)],
) -> Process {
    let [first, second] = sockets
        .each_ref()
        .map(|socket| OwnedFd::from(socket.try_clone().unwrap()));
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            // exec keeps the process id.
            r#"LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" 3<&0 4<&1 0</dev/null 1>/dev/null"#,
            env!("CARGO_BIN_EXE_todo-api"),
        ])
        .stdin(Stdio::from(first))
        .stdout(Stdio::from(second));
    Process::run(command, variables)
}

pub(crate) fn listening_socket() -> TcpListener {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    socket.listen(1024).unwrap().into_std().unwrap()
}

/// Sends `GET /healthz` on an open connection and returns the status.
async fn get_health(wire: &mut Wire) -> u16 {
    wire.send(head("GET", "/healthz", None, "")).await;
    wire.response().await.status
}

#[tokio::test]
async fn serves_every_socket_that_systemd_passes_and_passes_none_to_postgres() {
    let sockets = [listening_socket(), listening_socket()];
    let directory = DataDir::initialized().await;
    let process = start_with_sockets(&sockets, &[("DATA_DIR", directory.text())]);
    process.wait_for_log("database ready").await;
    for socket in &sockets {
        let address = socket.local_addr().unwrap();
        let line = format!("listening on http://{address}");
        process.wait_for_log(&line).await;
        assert_eq!(get_health(&mut Wire::connect(address).await).await, 200);
    }
    if cfg!(target_os = "linux") {
        let open_files = |descriptors: &str| -> Vec<_> {
            let descriptors = fs::read_dir(descriptors).unwrap().flatten();
            descriptors
                .map(|entry| fs::read_link(entry.path()).ok())
                .collect()
        };
        for socket in &sockets {
            let socket = format!("/proc/self/fd/{}", socket.as_raw_fd());
            let socket = Some(fs::read_link(socket).unwrap());
            assert!(open_files(&format!("/proc/{}/fd", process.pid())).contains(&socket));
            for backend in process_and_children(directory.postgres().unwrap()) {
                let inherited = open_files(&format!("/proc/{backend}/fd")).contains(&socket);
                assert!(!inherited, "{backend} has {socket:?}");
            }
        }
    }
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

/// Starts a service with a limit of 40 connections. Its database is unreachable, which these requests do
/// not need.
async fn start_with_40_connections(variables: &[(&str, &str)]) -> (Process, SocketAddr) {
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            r#"ulimit -n 140; exec "$0""#,
            env!("CARGO_BIN_EXE_todo-api"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut all = vec![
        ("LISTEN_ADDR", "127.0.0.1:0"),
        (
            "DATABASE_URL",
            "postgres://todo@127.0.0.1:1/todo?sslmode=disable",
        ),
        ("JWT_SECRET", SECRET),
    ];
    all.extend(variables);
    let process = Process::run(command, &all);
    let address = process.listening().await;
    (process, address)
}

/// Makes this machine a trusted proxy, whose connections are not limited.
const TRUSTED: (&str, &str) = ("TRUSTED_PROXIES", "127.0.0.1");

/// Opens a connection and sends an incomplete request.
async fn open_busy(address: SocketAddr) -> Wire {
    let mut wire = Wire::connect(address).await;
    let form = "Content-Length: 2\r\n";
    wire.send(head("POST", "/api/v1/auth/login", None, form) + "{")
        .await;
    wire
}

#[tokio::test]
async fn closes_the_longest_idle_connections_at_the_connection_limit() {
    let (process, address) = start_with_40_connections(&[TRUSTED]).await;
    let mut busy = Vec::new();
    for _ in 0..5 {
        busy.push(open_busy(address).await);
    }
    let mut idle = Vec::new();
    for number in 0..35 {
        // Some of the oldest connections have not sent a request yet. Younger ones might reach the
        // timeout of the first request while they are checked.
        let mut wire = Wire::connect(address).await;
        if number > 8 || number % 4 > 0 {
            assert_eq!(get_health(&mut wire).await, 200);
        }
        idle.push(wire);
    }
    // This makes the oldest connection the newest.
    assert_eq!(get_health(&mut idle[1]).await, 200);
    let active = idle.remove(1);

    let mut new = Vec::new();
    for _ in 0..10 {
        let mut wire = Wire::connect(address).await;
        assert_eq!(
            get_health(&mut wire).await,
            200,
            "a new connection is served"
        );
        new.push(wire);
    }
    // The order of eviction can differ slightly: the server can handle a connection without a request
    // after it has responded on the next ones.
    let mut closed = Vec::new();
    for (age, wire) in idle.iter_mut().enumerate() {
        if wire.is_readable(Duration::from_millis(200)).await && wire.is_closed().await {
            closed.push(age);
        } else {
            assert_eq!(get_health(wire).await, 200, "{age}");
        }
    }
    assert!((10..=12).contains(&closed.len()), "{closed:?}");
    assert!(closed.iter().all(|age| *age < 16), "{closed:?}");
    for mut wire in new.into_iter().chain([active]) {
        assert_eq!(
            get_health(&mut wire).await,
            200,
            "a younger connection was closed"
        );
    }
    for mut wire in busy {
        wire.send("}").await;
        assert_eq!(
            wire.response().await.status,
            422,
            "a busy connection was closed"
        );
    }
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

#[tokio::test]
async fn limits_a_network_to_half_of_the_connections() {
    let (process, address) = start_with_40_connections(&[]).await;
    let mut idle = Wire::connect(address).await;
    assert_eq!(get_health(&mut idle).await, 200);
    let mut busy = Vec::new();
    for _ in 0..19 {
        busy.push(open_busy(address).await);
    }
    // The server closes the idle connection once it has been idle for a second.
    until("a new connection is served", async || {
        let mut wire = Wire::connect(address).await;
        wire.send(head("GET", "/healthz", None, "")).await;
        let served = wire.response_or_close().await.is_some();
        if served {
            busy.push(wire);
        }
        served
    })
    .await;
    assert!(idle.is_closed().await, "the idle connection stays open");
    // Send an incomplete request on the last connection.
    let form = "Content-Length: 2\r\n";
    let last = busy.last_mut().unwrap();
    last.send(head("POST", "/api/v1/auth/login", None, form) + "{")
        .await;
    assert!(!last.is_readable(Duration::from_millis(100)).await);
    for _ in 0..10 {
        let mut rejected = Wire::connect(address).await;
        assert!(rejected.is_closed().await, "the network exceeds its share");
    }
    process.wait_for_log("reason=too_many_of_network").await;

    let mut others = Vec::new();
    for _ in 0..18 {
        let mut wire = Wire::connect_from([127, 0, 0, 2], address).await;
        assert_eq!(
            get_health(&mut wire).await,
            200,
            "a client of another network is not served"
        );
        others.push(wire);
    }
    for mut wire in busy {
        wire.send("}").await;
        assert_eq!(wire.response().await.status, 422);
    }
    assert_eq!(process.stop().await.code(), Some(0), "{}", process.log());
}

#[tokio::test]
async fn notifies_the_watchdog_at_the_connection_limit() {
    let directory = DataDir::new();
    let path = directory.parent().join("notify");
    let notified = UnixDatagram::bind(&path).unwrap();
    notified.set_nonblocking(true).unwrap();
    let variables = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "1000000"),
        TRUSTED,
    ];
    let (process, address) = start_with_40_connections(&variables).await;
    let mut busy = Vec::new();
    for _ in 0..40 {
        busy.push(open_busy(address).await);
    }
    let mut excess = Wire::connect(address).await;
    let waiting = timeout(Duration::from_secs(1), get_health(&mut excess));
    assert!(waiting.await.is_err(), "the limit is not reached");

    let mut message = [0; 64];
    while notified.recv(&mut message).is_ok() {}
    let mut notifications = 0;
    until("the watchdog is notified", async || {
        while let Ok(length) = notified.recv(&mut message) {
            notifications += usize::from(message[..length].starts_with(b"WATCHDOG=1"));
        }
        notifications >= 4
    })
    .await;
    assert!(!process.log().contains("health check"), "{}", process.log());
    // The waiting client is served once another connection closes.
    drop(busy.pop());
    assert_eq!(excess.response().await.status, 200);
}

// Caddy keeps idle connections to its upstreams for 120 seconds, other proxies for less.
#[tokio::test]
async fn keeps_idle_connections_longer_than_common_proxies_do() {
    let server = Server::shared().await;
    let mut wire = Wire::open(server).await;
    for _ in 0..2 {
        assert_eq!(get_health(&mut wire).await, 200);
        sleep(short_or_full(
            Duration::from_millis(10),
            Duration::from_secs(125),
        ))
        .await;
    }
    assert_eq!(get_health(&mut wire).await, 200);
}
