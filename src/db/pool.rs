//! The connection pool. A new connection prepares every statement, checking one out costs no round
//! trip, and a connection on which a statement timed out is evicted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bb8::{ManageConnection, QueueStrategy};
use futures_util::future::try_join;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, Statement};
use tokio_util::sync::CancellationToken;

use super::error::error_message;
use super::health::Health;
use super::isolation::Isolation;
use super::sockets::CONNECT_TIMEOUT;
use super::statements::prepare_all;

/// Less than the 300 s after which Neon suspends an idle database and closes its connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(240);
/// The maximum lifetime of a connection. Each connection gets up to a fifth less, so that
/// connections opened in a burst are not all replaced at the same time.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

pub(super) type Pool = bb8::Pool<ConnectionManager>;
pub(super) type PooledConnection = bb8::PooledConnection<'static, ConnectionManager>;

/// A connection and its prepared statements.
pub(super) struct Connection {
    pub(super) client: Client,
    pub(super) statements: Vec<Statement>,
    /// Closes the socket. Dropping a `Client` does not if responses are outstanding on it.
    close: CancellationToken,
    evicted: AtomicBool,
    expires_at: Instant,
    last_response: Mutex<Instant>,
}

impl Connection {
    /// Keeps the pool from handing out this connection again; it is closed when it is returned.
    pub(super) fn evict(&self) {
        self.evicted.store(true, Ordering::Release);
    }

    pub(super) fn record_response(&self) {
        *self.last_response.lock() = Instant::now();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if *self.evicted.get_mut() {
            self.close.cancel();
        }
    }
}

/// Opens and checks connections for bb8. The manager in bb8-postgres makes a round trip at every
/// checkout, which costs as much as a read, and cannot abort a connection.
pub(super) struct ConnectionManager {
    pub(super) health: Arc<Health>,
    pub(super) isolation: Arc<Isolation>,
}

impl ManageConnection for ConnectionManager {
    type Connection = Arc<Connection>;
    type Error = ();

    async fn connect(&self) -> Result<Arc<Connection>, ()> {
        let _connecting = self.health.sockets.connecting.clone();
        let result = match timeout(CONNECT_TIMEOUT, self.open()).await {
            Ok(result) => result.map_err(|error| error_message(&error)),
            Err(_) => Err("connecting timed out".into()),
        };
        result.map_err(|reason| self.health.start_probe(reason))
    }

    async fn is_valid(&self, connection: &mut Arc<Connection>) -> Result<(), ()> {
        match self.is_usable(connection) {
            true => Ok(()),
            false => Err(()),
        }
    }

    /// Called when a connection is returned. Also ends connections that exceed their lifetime,
    /// because no request is waiting at this point.
    fn has_broken(&self, connection: &mut Arc<Connection>) -> bool {
        !self.is_usable(connection) || Instant::now() > connection.expires_at
    }
}

impl ConnectionManager {
    fn is_usable(&self, connection: &Connection) -> bool {
        if *connection.last_response.lock() < *self.health.sockets.responsive_since.lock() {
            connection.evict();
        }
        !connection.evicted.load(Ordering::Acquire) && !connection.client.is_closed()
    }

    async fn open(&self) -> Result<Arc<Connection>, tokio_postgres::Error> {
        let close = self.health.sockets.close.lock().child_token();
        let close_on_error = close.clone().drop_guard();
        // The socket of the previous connection may still be closing.
        let socket = self.health.sockets.acquire().await;
        let (client, connection) = self.health.endpoint.connect().await?;
        // Errors are reported to the statements that wait for responses.
        tokio::spawn(close.clone().run_until_cancelled_owned(async move {
            let _socket = socket;
            connection.await.ok();
        }));
        let isolation = self.isolation.detect(&client);
        let (statements, ()) = try_join(prepare_all(&client), isolation).await?;
        close_on_error.disarm();
        let now = Instant::now();
        Ok(Arc::new(Connection {
            client,
            statements,
            close,
            evicted: AtomicBool::new(false),
            expires_at: now + MAX_LIFETIME.mul_f64(1.0 - fastrand::f64() / 5.0),
            last_response: Mutex::new(now),
        }))
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
