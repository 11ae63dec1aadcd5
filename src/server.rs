//! Accepting, bounds, and the end: what was accepted is answered before the process goes.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use log::{debug, error, info, warn};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::App;
use crate::connection::{Guarded, Line};
use crate::response;
use crate::router;

/// A request's head; what is longer hyper answers with 431.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Connections at a time; some 20 KiB each.
const MAX_CONNECTIONS: u64 = 16_384;
/// Descriptors for everything that is no client's connection.
const OTHER_DESCRIPTORS: u64 = 100;
/// After the signal to stop: answers close their connections, new ones are still accepted, so that
/// no request crosses the closing of its connection.
const FAREWELL: Duration = Duration::from_millis(500);
/// A connection that has brought no request yet has one on its way, most likely.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// After that: what runs may finish.
const DRAIN: Duration = Duration::from_secs(9);

/// Answers requests until `stop` turns true, then finishes those under way.
pub async fn serve(listener: TcpListener, app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(connection_limit()));
    let (close, closing) = watch::channel(false);
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    let door = Door {
        app: app.clone(),
        places,
        closing,
        alive,
    };

    tokio::select! {
        () = door.accept(&listener) => {}
        () = told(&mut stop) => {}
    }
    app.stop();
    info!("stopping: finishing what was accepted");
    timeout(FAREWELL, door.accept(&listener)).await.ok();
    door.accept_waiting(&listener).await;
    drop(listener);
    drop(door);
    close.send_replace(true);
    if timeout(DRAIN, all_gone.recv()).await.is_err() {
        warn!("some connections did not end in time and are cut");
    }
}

/// What a new connection needs.
struct Door {
    app: Arc<App>,
    places: Arc<Semaphore>,
    closing: watch::Receiver<bool>,
    alive: mpsc::Sender<Infallible>,
}

impl Door {
    async fn accept(&self, listener: &TcpListener) {
        loop {
            // The place first: who cannot be served waits in the kernel's queue.
            let Ok(place) = self.places.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, peer)) => self.admit(stream, peer, place),
                Err(error) if is_of_one_socket(&error) => {
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
    async fn accept_waiting(&self, listener: &TcpListener) {
        while let Ok(place) = self.places.clone().try_acquire_owned() {
            match timeout(Duration::ZERO, listener.accept()).await {
                Ok(Ok((stream, peer))) => self.admit(stream, peer, place),
                Ok(Err(error)) if is_of_one_socket(&error) => {}
                _ => return,
            }
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        let (app, closing, alive) = (self.app.clone(), self.closing.clone(), self.alive.clone());
        tokio::spawn(async move {
            app.metrics.connections.inc();
            converse(stream, peer, &app, closing).await;
            app.metrics.connections.dec();
            drop((place, alive));
        });
    }
}

/// One connection from its first byte to its last.
async fn converse(
    stream: TcpStream,
    peer: SocketAddr,
    app: &Arc<App>,
    mut closing: watch::Receiver<bool>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!("cannot set TCP_NODELAY: {error}");
    }
    let line = Arc::new(Line::default());
    let io = TokioIo::new(Guarded::new(stream, line.clone()));
    let service = service_fn(|request: Request<Incoming>| {
        let fault = line.begin(request.body());
        let line = line.clone();
        let app = app.clone();
        async move {
            let response = router::respond(&app, request, peer.ip(), fault).await;
            line.end();
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
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(&mut closing) => {
            // Its first answer closes it, now that we are stopping.
            let patience = if line.is_fresh() { FIRST_REQUEST } else { Duration::ZERO };
            match timeout(patience, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }
    };
    if let Err(error) = ended {
        debug!("connection from {peer} ended: {error}");
    }
}

/// Waits for the word; if nobody is left to give it, that is it.
async fn told(word: &mut watch::Receiver<bool>) {
    word.wait_for(|word| *word).await.ok();
}

fn is_of_one_socket(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// As many connections as we want and the system lets us have.
fn connection_limit() -> usize {
    let wanted = MAX_CONNECTIONS + OTHER_DESCRIPTORS;
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
        .saturating_sub(OTHER_DESCRIPTORS)
        .clamp(16, MAX_CONNECTIONS) as usize
}

/// Shows the metrics, and nothing else, on a listener of their own.
pub async fn serve_metrics(listener: TcpListener, app: Arc<App>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let text = (request.uri().path() == "/metrics")
                    .then(|| app.metrics.text(app.database.connections()));
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
