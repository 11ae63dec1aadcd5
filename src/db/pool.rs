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
use super::{Target, describe};

/// Neon suspends after 300 s; a connection that it is about to close is no use to anybody.
const IDLE: Duration = Duration::from_secs(240);
/// A connection lives this long at most, and up to a fifth less, so that those opened in one burst
/// are not all replaced in another.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

/// A connection as the pool hands it out.
pub(super) type Pooled = bb8::PooledConnection<'static, Connections>;

/// One connection and the statements that it knows.
pub(super) struct Link {
    client: Client,
    statements: Prepared,
    /// The task that owns the socket. Dropping a client does not close a socket on which answers
    /// are outstanding; aborting this does.
    driver: AbortHandle,
    retired: AtomicBool,
    opened: Instant,
    lifetime: Duration,
    /// Milliseconds since `opened`: when it last answered.
    answered: AtomicU64,
}

impl Link {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn statement(&self, sql: Sql) -> &Statement {
        &self.statements[sql]
    }

    /// Nobody gets this connection again; it closes when who uses it is done.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    fn is_usable(&self) -> bool {
        !self.is_retired() && !self.client.is_closed()
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

impl Drop for Link {
    fn drop(&mut self) {
        if self.is_retired() {
            self.driver.abort();
        }
    }
}

/// What the pool keeps.
pub(super) struct Handle(Arc<Link>);

impl Handle {
    pub(super) fn link(&self) -> Arc<Link> {
        self.0.clone()
    }
}

/// Makes and checks connections for bb8. bb8-postgres's own manager asks the server at every
/// checkout, which costs as much as a read, and keeps no hold on the socket.
pub(super) struct Connections {
    target: Target,
    bound: Duration,
    sockets: Arc<Semaphore>,
    opening: Arc<AtomicUsize>,
    links: Arc<Mutex<Vec<Weak<Link>>>>,
    isolation: Arc<Isolation>,
}

impl ManageConnection for Connections {
    type Connection = Handle;
    type Error = NoConnection;

    async fn connect(&self) -> Result<Handle, NoConnection> {
        let _opening = Opening::of(&self.opening);
        timeout(self.bound, self.open())
            .await
            .unwrap_or_else(|_| Err(NoConnection::Failed("connecting ran out of time".into())))
    }

    async fn is_valid(&self, handle: &mut Handle) -> Result<(), NoConnection> {
        match handle.0.is_usable() {
            true => Ok(()),
            false => Err(NoConnection::Stale),
        }
    }

    /// Asked when a connection comes back: its lifetime ends here, where no request waits for it.
    fn has_broken(&self, handle: &mut Handle) -> bool {
        !handle.0.is_usable() || handle.0.opened.elapsed() > handle.0.lifetime
    }
}

impl Connections {
    async fn open(&self) -> Result<Handle, NoConnection> {
        // The socket before may still be closing: never more of them than the pool has places.
        let socket = acquire(&self.sockets).await;
        let (client, connection) = self.target.connect().await.map_err(NoConnection::from)?;
        let driver = tokio::spawn(async move {
            let _socket = socket;
            // What ends a connection reaches whoever waits for an answer on it.
            connection.await.ok();
        });
        let half_way = AbortOnDrop(Some(driver.abort_handle()));
        let isolation = self.isolation.detect(&client);
        let (statements, ()) = try_join(Prepared::on(&client), isolation)
            .await
            .map_err(NoConnection::from)?;
        let link = Arc::new(Link {
            client,
            statements,
            driver: driver.abort_handle(),
            retired: AtomicBool::new(false),
            opened: Instant::now(),
            lifetime: MAX_LIFETIME.mul_f64(1.0 - fastrand::f64() / 5.0),
            answered: AtomicU64::new(0),
        });
        half_way.disarm();
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(Handle(link))
    }
}

/// A connection on its way, counted until it is dropped.
struct Opening(Arc<AtomicUsize>);

impl Opening {
    fn of(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Opening {
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
        if let Some(driver) = &self.0 {
            driver.abort();
        }
    }
}

async fn acquire(sockets: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    sockets.clone().acquire_owned().await.ok()
}

/// bb8's pool, with a way to be rid of every connection at once.
pub(super) struct Pool {
    pool: bb8::Pool<Connections>,
    sockets: Arc<Semaphore>,
    opening: Arc<AtomicUsize>,
    links: Arc<Mutex<Vec<Weak<Link>>>>,
}

impl Pool {
    /// Nobody gets any of today's connections again.
    pub(super) fn retire_all(&self) {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter().filter_map(Weak::upgrade) {
            link.retire();
            link.driver.abort();
        }
    }

    /// Nobody gets a connection again that has not answered since then.
    pub(super) fn retire_silent_since(&self, moment: Instant) {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.iter().filter_map(Weak::upgrade) {
            if link.is_silent_since(moment) {
                link.retire();
            }
        }
    }

    /// Whether connections are being made.
    pub(super) fn is_growing(&self) -> bool {
        self.opening.load(Ordering::Relaxed) > 0
    }

    /// A socket's worth of the pool's bound.
    pub(super) async fn socket(&self) -> Option<OwnedSemaphorePermit> {
        acquire(&self.sockets).await
    }
}

impl Deref for Pool {
    type Target = bb8::Pool<Connections>;

    fn deref(&self) -> &Self::Target {
        &self.pool
    }
}

/// Of the connections that we may have, one is left to ask whether the database is there.
pub(super) fn for_requests(size: u32) -> u32 {
    size.saturating_sub(1).max(1)
}

/// A pool that connects when it is first asked; `failed` hears why a connection could not be made.
pub(super) fn build(
    target: Target,
    size: u32,
    bound: Duration,
    isolation: Arc<Isolation>,
    failed: impl Fn(String) + Send + Sync + Clone + 'static,
) -> Pool {
    let sockets = Arc::new(Semaphore::new(size as usize));
    let size = for_requests(size);
    let links = Arc::default();
    let opening = Arc::default();
    let connections = Connections {
        target,
        bound,
        sockets: sockets.clone(),
        opening: Arc::clone(&opening),
        links: Arc::clone(&links),
        isolation,
    };
    let pool = bb8::Pool::builder()
        .max_size(size)
        .connection_timeout(bound)
        .idle_timeout(IDLE)
        .max_lifetime(None)
        // The connection used last is used next, so that surplus ones reach their idle timeout.
        .queue_strategy(QueueStrategy::Lifo)
        .error_sink(Box::new(Sink(failed)))
        .build_unchecked(connections);
    Pool {
        pool,
        sockets,
        opening,
        links,
    }
}

/// Why a connection is none.
#[derive(Debug)]
pub(super) enum NoConnection {
    /// It could not be made.
    Failed(String),
    /// It was closed or retired while it lay in the pool: no news.
    Stale,
}

impl From<tokio_postgres::Error> for NoConnection {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(describe(&error))
    }
}

impl fmt::Display for NoConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(reason) => f.write_str(reason),
            Self::Stale => f.write_str("the connection was closed"),
        }
    }
}

impl std::error::Error for NoConnection {}

#[derive(Clone)]
struct Sink<F>(F);

impl<F: Fn(String) + Send + Sync + Clone + 'static> bb8::ErrorSink<NoConnection> for Sink<F> {
    fn sink(&self, error: NoConnection) {
        if let NoConnection::Failed(reason) = error {
            (self.0)(reason);
        }
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<NoConnection>> {
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
