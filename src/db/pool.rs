//! The connection pool. A new connection prepares every statement, checking one out costs no round
//! trip, and a connection on which a statement timed out is evicted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bb8::{ManageConnection, QueueStrategy};
use futures_util::future::try_join;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Statement};
use tokio_util::task::AbortOnDropHandle;

use super::connect::Endpoint;
use super::error::error_message;
use super::isolation::Isolation;
use super::statements::{Prepared, Sql};

/// How long acquiring a connection may take, including connecting and preparing statements.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Less than the 300 s after which Neon suspends an idle database and closes its connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(240);
/// The maximum lifetime of a connection. Each connection gets up to a fifth less, so that
/// connections opened in a burst are not all replaced at the same time.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

pub(super) type Pool = bb8::Pool<ConnectionManager>;
pub(super) type PooledConnection = bb8::PooledConnection<'static, ConnectionManager>;

/// A connection and its prepared statements.
pub(super) struct Connection {
    client: Client,
    statements: Prepared,
    /// Drives the socket. Dropping a `Client` does not close a socket on which responses are
    /// outstanding; aborting this task does.
    io_task: AbortHandle,
    evicted: AtomicBool,
    expires_at: Instant,
    last_response: Mutex<Instant>,
}

impl Connection {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn statement(&self, sql: Sql) -> &Statement {
        &self.statements[sql]
    }

    /// Keeps the pool from handing out this connection again; it is closed when it is returned.
    pub(super) fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
    }

    pub(super) fn record_response(&self) {
        *self.last_response.lock() = Instant::now();
    }

    fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::Acquire)
    }

    fn is_usable(&self) -> bool {
        !self.is_evicted() && !self.client.is_closed()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.is_evicted() {
            self.io_task.abort();
        }
    }
}

/// All open connections, including the one of the health probe.
pub(super) struct Registry {
    sockets: Arc<Semaphore>,
    live: Mutex<Vec<Weak<Connection>>>,
    /// Cloned by each attempt to connect.
    connecting: Arc<()>,
}

impl Registry {
    pub(super) fn new(max_sockets: u32) -> Self {
        Self {
            sockets: Arc::new(Semaphore::new(max_sockets as usize)),
            live: Mutex::default(),
            connecting: Arc::default(),
        }
    }

    /// Waits for one of the limited number of sockets that the service may have open at a time.
    pub(super) async fn acquire_socket(&self) -> Option<OwnedSemaphorePermit> {
        self.sockets.clone().acquire_owned().await.ok()
    }

    /// Whether the pool is opening connections.
    pub(super) fn is_connecting(&self) -> bool {
        Arc::strong_count(&self.connecting) > 1
    }

    /// Closes every connection of the pool.
    pub(super) fn evict_all(&self) {
        for connection in self.live.lock().iter().filter_map(Weak::upgrade) {
            connection.evict();
            connection.io_task.abort();
        }
    }

    /// Evicts connections that have received no response since the given time.
    pub(super) fn evict_unresponsive_since(&self, since: Instant) {
        for connection in self.live.lock().iter().filter_map(Weak::upgrade) {
            if *connection.last_response.lock() < since {
                connection.evict();
            }
        }
    }

    fn add(&self, connection: &Arc<Connection>) {
        let mut live = self.live.lock();
        live.retain(|connection| connection.strong_count() > 0);
        live.push(Arc::downgrade(connection));
    }
}

/// Opens and checks connections for bb8. The manager in bb8-postgres makes a round trip at every
/// checkout, which costs as much as a read, and cannot abort a connection.
pub(super) struct ConnectionManager {
    pub(super) endpoint: Endpoint,
    pub(super) registry: Arc<Registry>,
    pub(super) isolation: Arc<Isolation>,
    /// Called with the reason whenever connecting fails.
    pub(super) on_failure: Box<dyn Fn(String) + Send + Sync>,
}

impl ManageConnection for ConnectionManager {
    type Connection = Arc<Connection>;
    type Error = ();

    async fn connect(&self) -> Result<Arc<Connection>, ()> {
        let _connecting = self.registry.connecting.clone();
        let result = match timeout(CONNECT_TIMEOUT, self.open()).await {
            Ok(result) => result.map_err(|error| error_message(&error)),
            Err(_) => Err("connecting timed out".into()),
        };
        result.map_err(&self.on_failure)
    }

    async fn is_valid(&self, connection: &mut Arc<Connection>) -> Result<(), ()> {
        connection.is_usable().then_some(()).ok_or(())
    }

    /// Called when a connection is returned. Also ends connections that exceed their lifetime,
    /// because no request is waiting at this point.
    fn has_broken(&self, connection: &mut Arc<Connection>) -> bool {
        !connection.is_usable() || Instant::now() > connection.expires_at
    }
}

impl ConnectionManager {
    async fn open(&self) -> Result<Arc<Connection>, tokio_postgres::Error> {
        // The socket of the previous connection may still be closing.
        let socket = self.registry.acquire_socket().await;
        let (client, connection) = self.endpoint.connect().await?;
        let io_task = AbortOnDropHandle::new(tokio::spawn(async move {
            let _socket = socket;
            // Errors are reported to the statements that wait for responses.
            connection.await.ok();
        }));
        let isolation = self.isolation.detect(&client);
        let (statements, ()) = try_join(Prepared::prepare_all(&client), isolation).await?;
        let now = Instant::now();
        let connection = Arc::new(Connection {
            client,
            statements,
            io_task: io_task.detach().abort_handle(),
            evicted: AtomicBool::new(false),
            expires_at: now + MAX_LIFETIME.mul_f64(1.0 - fastrand::f64() / 5.0),
            last_response: Mutex::new(now),
        });
        self.registry.add(&connection);
        Ok(connection)
    }
}

/// How many of the sockets are available to requests; one is reserved for the health probe.
pub(super) fn request_capacity(max_sockets: u32) -> u32 {
    max_sockets.saturating_sub(1).max(1)
}

/// A pool that opens its first connection when one is requested.
pub(super) fn build(manager: ConnectionManager, max_sockets: u32) -> Pool {
    bb8::Pool::builder()
        .max_size(request_capacity(max_sockets))
        .connection_timeout(CONNECT_TIMEOUT)
        .idle_timeout(IDLE_TIMEOUT)
        .max_lifetime(None)
        // Reuses the most recent connection, so that surplus ones reach their idle timeout.
        .queue_strategy(QueueStrategy::Lifo)
        .build_unchecked(manager)
}
