//! Accepting connections, their limits, and graceful shutdown: every request that was accepted gets
//! its response before the process ends.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use log::{debug, error, info, warn};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::connection_state::ConnectionState;
use crate::http::connection_table::{ConnectionPermit, ConnectionTable};
use crate::http::response;
use crate::http::service;
use crate::http::state::AppState;
use crate::http::timeout_io::TimeoutStream;

/// A request's head; hyper responds with 431 to a longer one.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Open connections at a time; each takes about 20 KiB.
const MAX_CONNECTIONS: u64 = 16_384;
/// Descriptors for everything but client connections.
const RESERVED_FDS: u64 = 100;
/// How long connections are still accepted after the signal to stop. Responses close their
/// connections during this time, so that no request is sent into a connection being closed.
const ACCEPT_GRACE: Duration = Duration::from_millis(500);
/// A new connection most likely has its first request on the way.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long requests may still run after that.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(9);

/// Serves requests until `stop` is cancelled, then finishes those under way.
pub(crate) async fn serve(
    listeners: Vec<TcpListener>,
    app: Arc<AppState>,
    stop: CancellationToken,
) {
    let acceptor = Acceptor {
        app: app.clone(),
        table: ConnectionTable::new(connection_limit()),
        connections: TaskTracker::new(),
        closing: CancellationToken::new(),
    };
    let accept = || join_all(listeners.iter().map(|listener| acceptor.accept(listener)));
    stop.run_until_cancelled(accept()).await;
    app.begin_shutdown();
    info!("stopping: finishing what was accepted");
    timeout(ACCEPT_GRACE, accept()).await.ok();
    for listener in &listeners {
        acceptor.drain_backlog(listener).await;
    }
    drop(listeners);
    acceptor.closing.cancel();
    acceptor.connections.close();
    if timeout(DRAIN_TIMEOUT, acceptor.connections.wait())
        .await
        .is_err()
    {
        warn!("some connections did not end in time and are cut");
    }
}

/// What a new connection needs.
struct Acceptor {
    app: Arc<AppState>,
    table: Arc<ConnectionTable>,
    connections: TaskTracker,
    closing: CancellationToken,
}

impl Acceptor {
    async fn accept(&self, listener: &TcpListener) {
        loop {
            // The permit first: connections that cannot be served wait in the kernel's queue.
            let permit = self.table.acquire().await;
            match listener.accept().await {
                Ok((stream, peer)) => self.spawn_connection(stream, peer, permit),
                Err(error) if is_connection_error(&error) => {
                    debug!("a connection was gone before it was accepted: {error}")
                }
                Err(error) => {
                    // Out of descriptors, most likely: nothing to do but wait for some.
                    error!("cannot accept connections: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Accepts what the kernel has accepted already.
    async fn drain_backlog(&self, listener: &TcpListener) {
        while let Some(permit) = self.table.try_acquire() {
            match timeout(Duration::ZERO, listener.accept()).await {
                Ok(Ok((stream, peer))) => self.spawn_connection(stream, peer, permit),
                Ok(Err(error)) if is_connection_error(&error) => {}
                _ => return,
            }
        }
    }

    fn spawn_connection(&self, stream: TcpStream, peer: SocketAddr, permit: ConnectionPermit) {
        let (app, closing) = (self.app.clone(), self.closing.clone());
        self.connections.spawn(async move {
            if let Err(error) = stream.set_nodelay(true) {
                debug!("cannot set TCP_NODELAY: {error}");
            }
            app.metrics.open_connections.inc();
            serve_connection(stream, peer.ip(), &app, permit.state.clone(), closing).await;
            app.metrics.open_connections.dec();
            drop(permit);
        });
    }
}

/// Serves one connection from its first byte to its last.
async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: IpAddr,
    app: &Arc<AppState>,
    state: Arc<ConnectionState>,
    closing: CancellationToken,
) {
    let io = TokioIo::new(TimeoutStream::new(stream, state.clone()));
    let service = service_fn(|request: Request<Incoming>| {
        let fault = state.on_request(request.body());
        let state = state.clone();
        async move {
            let response = service::handle(app, request, peer, fault).await;
            state.on_response();
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        // A client that has said all it has to say still gets its answer.
        .half_close(true)
        .max_buf_size(MAX_HEAD_BYTES)
        // The socket has a clock for this that does not run while a connection is idle.
        .header_read_timeout(None)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let evicted = tokio::select! {
        ended = connection.as_mut() => return log_end(peer, ended),
        () = state.evicted() => true,
        () = closing.cancelled() => false,
    };
    // A request that has just arrived still gets its response.
    let wait = match state.is_unused() && !evicted {
        true => FIRST_REQUEST_TIMEOUT,
        false => Duration::ZERO,
    };
    let ended = match timeout(wait, connection.as_mut()).await {
        Ok(ended) => ended,
        // A client that keeps its end open must not keep the connection.
        Err(_) if evicted && state.is_idle() => return,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    log_end(peer, ended);
}

fn log_end(peer: IpAddr, ended: hyper::Result<()>) {
    if let Err(error) = ended {
        debug!("connection from {peer} ended: {error}");
    }
}

/// Sends `GET /healthz` through the HTTP server. The connection is a socket pair: it needs no room
/// in the table of connections, which may be full, and no listener.
pub(crate) async fn check_health(app: &Arc<AppState>) -> io::Result<()> {
    let (mut client, server) = UnixStream::pair()?;
    let (peer, closing) = (Ipv4Addr::LOCALHOST.into(), CancellationToken::new());
    let serving = serve_connection(server, peer, app, Arc::default(), closing);
    let checking = async {
        let request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
        client.write_all(request).await?;
        let mut status_line = [0; 15];
        client.read_exact(&mut status_line).await?;
        Ok(&status_line == b"HTTP/1.1 200 OK")
    };
    match tokio::select! { () = serving => Ok(false), checked = checking => checked } {
        Ok(true) => Ok(()),
        Ok(false) => Err(io::Error::other("a response other than 200")),
        Err(error) => Err(error),
    }
}

fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// As many connections as we want and the system lets us have.
fn connection_limit() -> usize {
    let wanted = MAX_CONNECTIONS + RESERVED_FDS;
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = wanted.min(limit.maximum.unwrap_or(u64::MAX)).max(current);
    let granted = match setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(raised),
            ..limit
        },
    ) {
        Ok(()) => raised,
        Err(_) => current,
    };
    granted
        .saturating_sub(RESERVED_FDS)
        .clamp(16, MAX_CONNECTIONS) as usize
}

/// Shows the metrics, and nothing else, on a listener of their own.
pub(crate) async fn serve_metrics(listener: TcpListener, app: Arc<AppState>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let text = (request.uri().path() == "/metrics")
                    .then(|| app.metrics.encode(app.database.connections()));
                async move {
                    Ok::<_, Infallible>(match text {
                        Some(text) => {
                            response::bytes(hyper::StatusCode::OK, prometheus::TEXT_FORMAT, text)
                        }
                        None => response::empty(hyper::StatusCode::NOT_FOUND),
                    })
                }
            });
            // A scraper asks once and goes; one that does not is cut.
            let answer = http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            timeout(Duration::from_secs(10), answer).await.ok();
        });
    }
}
