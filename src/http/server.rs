//! The accept loop, the limits on connections, and graceful shutdown, during which every accepted
//! request still gets its response.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use log::{debug, error, info, warn};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::client_ip::{client_network, is_trusted};
use crate::http::connection_state::ConnectionState;
use crate::http::connection_table::ConnectionTable;
use crate::http::response;
use crate::http::service;
use crate::http::state::AppState;
use crate::http::timeout_io::{ClientSocket, TimeoutStream};
use crate::telemetry::log_limiter::LineKind;

/// hyper responds with 431 to longer heads.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// An idle connection takes about 20 KiB.
const MAX_CONNECTIONS: u64 = 16_384;
/// File descriptors for everything but client connections.
const RESERVED_FDS: u64 = 100;
/// How long connections are still accepted after shutdown begins. Responses carry
/// `Connection: close` during this time, so that clients reconnect elsewhere.
const ACCEPT_GRACE: Duration = Duration::from_millis(500);
/// How long shutdown waits for the first request of a new connection, which is probably in flight.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long shutdown waits for connections to end. Together with `ACCEPT_GRACE`, this is less than
/// the 10 s after which container runtimes kill a process.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(9);
/// How long shutdown takes at most.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = ACCEPT_GRACE.saturating_add(DRAIN_TIMEOUT);
/// How many unsent bytes of a response the kernel holds. The service holds the other bytes, to
/// which the limits on large responses apply.
#[cfg(target_os = "linux")]
const MAX_UNSENT_BYTES: u32 = 64 * 1024;
/// How long the kernel holds data that the client does not acknowledge, even after the connection
/// was closed.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one scrape of the metrics may take.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves requests until `shutdown` is cancelled, then completes those in progress.
pub(crate) async fn serve(
    listeners: Vec<TcpListener>,
    app: Arc<AppState>,
    shutdown: CancellationToken,
) {
    for listener in &listeners {
        if let Err(error) = limit_send_queue(listener) {
            warn!("cannot limit the send queues of connections: {error}");
        }
    }
    let acceptor = Acceptor {
        app: app.clone(),
        table: ConnectionTable::new(connection_limit()),
        connections: TaskTracker::new(),
        closing: CancellationToken::new(),
    };
    let accept = || join_all(listeners.iter().map(|listener| acceptor.accept(listener)));
    shutdown.run_until_cancelled(accept()).await;
    app.shutdown.cancel();
    info!("shutting down: completing accepted requests");
    timeout(ACCEPT_GRACE, accept()).await.ok();
    for listener in &listeners {
        acceptor.drain_backlog(listener).await;
    }
    drop(listeners);
    acceptor.closing.cancel();
    acceptor.connections.close();
    let drained = timeout(DRAIN_TIMEOUT, acceptor.connections.wait()).await;
    if drained.is_err() {
        let count = acceptor.connections.len();
        warn!("closing connections that are still open after the drain timeout: count={count}");
    }
}

/// Limits the data that the kernel holds for each client. Accepted sockets inherit the options.
#[cfg(target_os = "linux")]
fn limit_send_queue(listener: &TcpListener) -> io::Result<()> {
    let socket = socket2::SockRef::from(listener);
    socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES)?;
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT))
}

#[cfg(not(target_os = "linux"))]
fn limit_send_queue(_: &TcpListener) -> io::Result<()> {
    Ok(())
}

/// Accepts connections and spawns a task for each.
struct Acceptor {
    app: Arc<AppState>,
    table: Arc<ConnectionTable>,
    connections: TaskTracker,
    /// Tells connections to close after their current request.
    closing: CancellationToken,
}

impl Acceptor {
    async fn accept(&self, listener: &TcpListener) {
        loop {
            // Without a permit, new connections wait in the kernel's queue.
            let permit = self.table.acquire().await;
            match listener.accept().await {
                Ok((stream, peer)) => self.spawn_connection(stream, peer, permit),
                Err(error) if is_connection_error(&error) => {
                    debug!("connection closed before it was accepted: {error}")
                }
                Err(error) => {
                    // The process has probably run out of file descriptors.
                    error!("cannot accept connections: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Accepts the connections that wait in the kernel's queue.
    async fn drain_backlog(&self, listener: &TcpListener) {
        while let Some(permit) = self.table.try_acquire() {
            match timeout(Duration::ZERO, listener.accept()).await {
                Ok(Ok((stream, peer))) => self.spawn_connection(stream, peer, permit),
                Ok(Err(error)) if is_connection_error(&error) => {}
                _ => return,
            }
        }
    }

    /// Serves a connection, or closes it if its network has used up its share.
    fn spawn_connection(&self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let (app, closing) = (self.app.clone(), self.closing.clone());
        let peer = peer.ip().to_canonical();
        let network = client_network(peer);
        let is_proxy = is_trusted(peer, &app.config.trusted_proxies);
        let Some(permit) = self.table.register(permit, (!is_proxy).then_some(network)) else {
            app.limited_log.warn(LineKind::Capacity, network, peer, || {
                format!("connection refused reason=too_many_of_network client={peer}")
            });
            return;
        };
        self.connections.spawn(async move {
            if let Err(error) = stream.set_nodelay(true) {
                debug!("cannot set TCP_NODELAY: {error}");
            }
            app.metrics.open_connections.inc();
            let state = permit.state.clone();
            if let Err(error) = serve_connection(stream, peer, &app, state, closing).await {
                debug!("connection from {peer} ended: {error}");
            }
            app.metrics.open_connections.dec();
            drop(permit);
        });
    }
}

/// Serves one connection.
///
/// A handler runs to its end even if the client disconnects, so that a write is never left half
/// done: with `half_close`, hyper does not treat the end of the client's stream as a disconnect,
/// and a client that sent its last request still gets its response.
async fn serve_connection(
    stream: impl ClientSocket,
    peer: IpAddr,
    app: &Arc<AppState>,
    state: Arc<ConnectionState>,
    closing: CancellationToken,
) -> hyper::Result<()> {
    let io = TokioIo::new(TimeoutStream::new(stream, state.clone()));
    let service = service_fn(|request: Request<Incoming>| {
        let head_error = state.on_request(request.body());
        let state = state.clone();
        async move {
            let response = service::handle(app, request, peer, head_error).await;
            state.on_response();
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .max_buf_size(MAX_HEAD_BYTES)
        // hyper's timeout also runs on idle connections; `TimeoutStream` has its own.
        .header_read_timeout(None)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let evicted = tokio::select! {
        ended = connection.as_mut() => return ended,
        () = state.evicted() => true,
        () = closing.cancelled() => false,
    };
    // Even a timeout of zero serves a request that has already arrived.
    let wait = match state.is_unused() && !evicted {
        true => FIRST_REQUEST_TIMEOUT,
        false => Duration::ZERO,
    };
    match timeout(wait, connection.as_mut()).await {
        Ok(ended) => ended,
        // Dropped, because after a graceful shutdown the client could keep its side open.
        Err(_) if evicted && state.idle_since().is_some() => Ok(()),
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

/// Sends `GET /healthz` through the HTTP server. The connection is a socket pair, so that the check
/// works when the connection table is full.
pub(crate) async fn check_health(app: &Arc<AppState>) -> io::Result<()> {
    let (mut client, server) = UnixStream::pair()?;
    let (peer, closing) = (Ipv4Addr::LOCALHOST.into(), CancellationToken::new());
    let serving = serve_connection(server, peer, app, Arc::default(), closing);
    let checking = async {
        let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
        client.write_all(request).await?;
        let mut status_line = [0; 15];
        client.read_exact(&mut status_line).await?;
        io::Result::Ok(&status_line == b"HTTP/1.1 200 OK")
    };
    match tokio::select! { _ = serving => false, checked = checking => checked? } {
        true => Ok(()),
        false => Err(io::Error::other("GET /healthz did not return 200")),
    }
}

fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// Raises the limit on open files if possible. Returns the number of connections that it allows.
fn connection_limit() -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let wanted = (MAX_CONNECTIONS + RESERVED_FDS).min(limit.maximum.unwrap_or(u64::MAX));
    let raised = wanted.max(current);
    limit.current = Some(raised);
    let raised = setrlimit(Resource::Nofile, limit).map_or(current, |()| raised);
    let connections = raised.saturating_sub(RESERVED_FDS);
    connections.clamp(16, MAX_CONNECTIONS) as usize
}

/// Serves `GET /metrics` on a separate listener.
pub(crate) async fn serve_metrics(listener: TcpListener, app: Arc<AppState>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(async |request: Request<Incoming>| {
                Ok::<_, Infallible>(match request.uri().path() {
                    "/metrics" => {
                        let (database, metrics) = (&app.database, &app.metrics);
                        let text = metrics.encode(database.is_up(), database.connection_counts());
                        response::bytes(StatusCode::OK, prometheus::TEXT_FORMAT, text)
                    }
                    _ => response::empty(StatusCode::NOT_FOUND),
                })
            });
            let connection = http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            timeout(METRICS_TIMEOUT, connection).await.ok();
        });
    }
}
