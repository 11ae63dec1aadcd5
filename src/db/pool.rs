//! The connections: made with every statement prepared, checked without a round trip, thrown
//! away when something on them ran out of time.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bb8::{ManageConnection, QueueStrategy};
use futures_util::future::try_join;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Statement};

use super::isolation::Isolation;
use super::statements::{Prepared, Sql};
use super::{Endpoint, error_message};

/// Neon suspends after 300 s; a connection that it is about to close is no use to anybody.
const IDLE_TIMEOUT: Duration = Duration::from_secs(240);
/// A connection lives this long at most, and up to a fifth less, so that those opened in one burst
/// are not all replaced in another.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

/// A connection as the pool hands it out.
pub(super) type Pooled = bb8::PooledConnection<'static, ConnectionManager>;

/// One connection and the statements that it knows.
pub(super) struct Connection {
    client: Client,
    statements: Prepared,
    /// The task that owns the socket. Dropping a client does not close a socket on which answers
    /// are outstanding; aborting this does.
    io_task: AbortHandle,
    evicted: AtomicBool,
    opened: Instant,
    lifetime: Duration,
    /// Milliseconds since `opened`: when it last answered.
    answered: AtomicU64,
}

impl Connection {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn statement(&self, sql: Sql) -> &Statement {
        &self.statements[sql]
    }

    /// Nobody gets this connection again; it closes when who uses it is done.
    pub(super) fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
    }

    pub(super) fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire)
    }

    fn is_usable(&self) -> bool {
        !self.is_evicted() && !self.client.is_closed()
    }

    /// It works.
    pub(super) fn answered(&self) {
        let age = self.opened.elapsed().as_millis() as u64;
        self.answered.store(age, Ordering::Relaxed);
    }

    fn is_silent_since(&self, moment: Instant) -> bool {
        let answered = Duration::from_millis(self.answered.load(Ordering::Relaxed));
        self.opened + answered < moment
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.is_evicted() {
            self.io_task.abort();
        }
    }
}

/// What the pool keeps.
pub(super) struct Handle(Arc<Connection>);

impl Handle {
    pub(super) fn link(&self) -> Arc<Connection> {
        self.0.clone()
    }
}

/// Makes and checks connections for bb8. bb8-postgres's own manager asks the server at every
/// checkout, which costs as much as a read, and keeps no hold on the socket.
pub(super) struct ConnectionManager {
    endpoint: Endpoint,
    bound: Duration,
    socket_permits: Arc<Semaphore>,
    connecting: Arc<AtomicUsize>,
    live: Arc<Mutex<Vec<Weak<Connection>>>>,
    isolation: Arc<Isolation>,
}

impl ManageConnection for ConnectionManager {
    type Connection = Handle;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Handle, ConnectError> {
        let _opening = ConnectingGuard::of(&self.connecting);
        timeout(self.bound, self.open())
            .await
            .unwrap_or_else(|_| Err(ConnectError::Failed("connecting ran out of time".into())))
    }

    async fn is_valid(&self, handle: &mut Handle) -> Result<(), ConnectError> {
        match handle.0.is_usable() {
            true => Ok(()),
            false => Err(ConnectError::Stale),
        }
    }

    /// Asked when a connection comes back: its lifetime ends here, where no request waits for it.
    fn has_broken(&self, handle: &mut Handle) -> bool {
        !handle.0.is_usable() || handle.0.opened.elapsed() > handle.0.lifetime
    }
}

impl ConnectionManager {
    async fn open(&self) -> Result<Handle, ConnectError> {
        // The socket before may still be closing: never more of them than the pool has places.
        let socket = acquire(&self.socket_permits).await;
        let (client, connection) = self.endpoint.connect().await.map_err(ConnectError::from)?;
        let io_task = tokio::spawn(async move {
            let _socket = socket;
            // What ends a connection reaches whoever waits for an answer on it.
            connection.await.ok();
        });
        let half_way = AbortOnDrop(Some(io_task.abort_handle()));
        let isolation = self.isolation.detect(&client);
        let (statements, ()) = try_join(Prepared::prepare_all(&client), isolation)
            .await
            .map_err(ConnectError::from)?;
        let link = Arc::new(Connection {
            client,
            statements,
            io_task: io_task.abort_handle(),
            evicted: AtomicBool::new(false),
            opened: Instant::now(),
            lifetime: MAX_LIFETIME.mul_f64(1.0 - fastrand::f64() / 5.0),
            answered: AtomicU64::new(0),
        });
        half_way.disarm();
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.retain(|link| link.strong_count() > 0);
        live.push(Arc::downgrade(&link));
        Ok(Handle(link))
    }
}

/// A connection on its way, counted until it is dropped.
struct ConnectingGuard(Arc<AtomicUsize>);

impl ConnectingGuard {
    fn of(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for ConnectingGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that was given up half-way must not keep its socket.
struct AbortOnDrop(Option<AbortHandle>);

impl AbortOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(io_task) = &self.0 {
            io_task.abort();
        }
    }
}

async fn acquire(socket_permits: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    socket_permits.clone().acquire_owned().await.ok()
}

/// bb8's pool, with a way to be rid of every connection at once.
pub(super) struct Pool {
    pool: bb8::Pool<ConnectionManager>,
    socket_permits: Arc<Semaphore>,
    connecting: Arc<AtomicUsize>,
    live: Arc<Mutex<Vec<Weak<Connection>>>>,
}

impl Pool {
    /// Nobody gets any of today's connections again.
    pub(super) fn evict_all(&self) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        for link in live.iter().filter_map(Weak::upgrade) {
            link.evict();
            link.io_task.abort();
        }
    }

    /// Nobody gets a connection again that has not answered since then.
    pub(super) fn evict_unresponsive_since(&self, moment: Instant) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        for link in live.iter().filter_map(Weak::upgrade) {
            if link.is_silent_since(moment) {
                link.evict();
            }
        }
    }

    /// Whether connections are being made.
    pub(super) fn is_connecting(&self) -> bool {
        self.connecting.load(Ordering::Relaxed) > 0
    }

    /// A socket's worth of the pool's bound.
    pub(super) async fn socket(&self) -> Option<OwnedSemaphorePermit> {
        acquire(&self.socket_permits).await
    }
}

impl Deref for Pool {
    type Target = bb8::Pool<ConnectionManager>;

    fn deref(&self) -> &Self::Target {
        &self.pool
    }
}

/// Of the connections that we may have, one is left to ask whether the database is there.
pub(super) fn request_capacity(size: u32) -> u32 {
    size.saturating_sub(1).max(1)
}

/// A pool that connects when it is first asked; `failed` hears why a connection could not be made.
pub(super) fn build(
    endpoint: Endpoint,
    size: u32,
    bound: Duration,
    isolation: Arc<Isolation>,
    failed: impl Fn(String) + Send + Sync + Clone + 'static,
) -> Pool {
    let socket_permits = Arc::new(Semaphore::new(size as usize));
    let size = request_capacity(size);
    let live = Arc::default();
    let connecting = Arc::default();
    let connections = ConnectionManager {
        endpoint,
        bound,
        socket_permits: socket_permits.clone(),
        connecting: Arc::clone(&connecting),
        live: Arc::clone(&live),
        isolation,
    };
    let pool = bb8::Pool::builder()
        .max_size(size)
        .connection_timeout(bound)
        .idle_timeout(IDLE_TIMEOUT)
        .max_lifetime(None)
        // The connection used last is used next, so that surplus ones reach their idle timeout.
        .queue_strategy(QueueStrategy::Lifo)
        .error_sink(Box::new(Sink(failed)))
        .build_unchecked(connections);
    Pool {
        pool,
        socket_permits,
        connecting,
        live,
    }
}

/// Why a connection is none.
#[derive(Debug)]
pub(super) enum ConnectError {
    /// It could not be made.
    Failed(String),
    /// It was closed or retired while it lay in the pool: no news.
    Stale,
}

impl From<tokio_postgres::Error> for ConnectError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error_message(&error))
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(reason) => f.write_str(reason),
            Self::Stale => f.write_str("the connection was closed"),
        }
    }
}

impl std::error::Error for ConnectError {}

#[derive(Clone)]
struct Sink<F>(F);

impl<F: Fn(String) + Send + Sync + Clone + 'static> bb8::ErrorSink<ConnectError> for Sink<F> {
    fn sink(&self, error: ConnectError) {
        if let ConnectError::Failed(reason) = error {
            (self.0)(reason);
        }
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<ConnectError>> {
        Box::new(self.clone())
    }
}

impl<F> fmt::Debug for Sink<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}
