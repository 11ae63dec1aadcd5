//! The pool with its admission, health and metrics. Admission is first come, first served, with
//! limits on the queue and on searches.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::connect::Endpoint;
use super::deadline::Deadline;
use super::error::{DbError, Result};
use super::health::Health;
use super::isolation::Isolation;
use super::keyed_semaphore::{KeyedPermit, KeyedSemaphore};
use super::pool::{self, ConnectionManager, Pool, request_capacity};
use super::sockets::{CONNECT_TIMEOUT, Sockets};
use crate::telemetry::metrics::Metrics;

/// The longest wait for a connection while the queue is short-lived.
const QUEUE_TARGET: Duration = Duration::from_millis(500);
/// The longest wait once the queue has not been empty for `QUEUE_TARGET`. A standing queue delays
/// every request without increasing the throughput ("controlled delay").
const QUEUE_SHED_AFTER: Duration = Duration::from_millis(50);
/// The maximum number of concurrent searches, which leaves most of the pool to other requests.
const MAX_SEARCHES: usize = 5;
/// The maximum number of concurrent searches of one user, so that no user delays the searches of
/// all others.
const MAX_SEARCHES_PER_USER: usize = 2;
/// The maximum number of concurrent task writes of one user is the size of the pool divided by
/// this. These writes lock the row of the user's list, so more of them would only wait for each
/// other. At least two are allowed, so that the next one is at the server when the lock is
/// released.
const WRITES_PER_USER_DIVISOR: u32 = 4;

pub(super) struct Connections {
    pub(super) health: Arc<Health>,
    pub(super) pool: Pool,
    pub(super) isolation: Arc<Isolation>,
    pub(super) metrics: Arc<Metrics>,
    /// One permit per connection. Needed because bb8's own queue is not first come, first served.
    permits: Arc<Semaphore>,
    /// When a permit was last available without waiting.
    last_uncontended: Mutex<Instant>,
    searches: Semaphore,
    searches_per_user: KeyedSemaphore<Uuid>,
    writes_per_user: KeyedSemaphore<Uuid>,
}

impl Connections {
    pub(super) fn new(endpoint: Endpoint, max_sockets: u32, metrics: Arc<Metrics>) -> Self {
        let isolation = Arc::<Isolation>::default();
        let health = Arc::new(Health::new(endpoint, Sockets::new(max_sockets)));
        let manager = ConnectionManager {
            health: health.clone(),
            isolation: isolation.clone(),
        };
        let writes_per_user = request_capacity(max_sockets) / WRITES_PER_USER_DIVISOR;
        Self {
            pool: pool::build(manager, max_sockets),
            permits: Arc::new(Semaphore::new(request_capacity(max_sockets) as usize)),
            last_uncontended: Mutex::new(Instant::now()),
            searches: Semaphore::new(MAX_SEARCHES.min(max_sockets as usize)),
            searches_per_user: KeyedSemaphore::new(MAX_SEARCHES_PER_USER),
            writes_per_user: KeyedSemaphore::new(writes_per_user.max(2) as usize),
            health,
            isolation,
            metrics,
        }
    }

    /// Waits until a connection may be taken from the pool.
    pub(super) async fn acquire_permit(&self, until: Instant) -> Result<OwnedSemaphorePermit> {
        let now = Instant::now();
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            *self.last_uncontended.lock() = now;
            return Ok(permit);
        }
        let _waiting = self.metrics.db_pool_waiter();
        let limit = if self.health.sockets.is_connecting() {
            // Connecting to a remote or suspended database takes longer than requests may otherwise
            // queue.
            CONNECT_TIMEOUT
        } else if now.duration_since(*self.last_uncontended.lock()) > QUEUE_TARGET {
            QUEUE_SHED_AFTER
        } else {
            QUEUE_TARGET
        };
        let permit = self.health.while_up(self.permits.clone().acquire_owned());
        match timeout_at(until.min(now + limit), permit).await {
            Ok(Some(Ok(permit))) => Ok(permit),
            Ok(None) => Err(DbError::Unavailable("the database went down".into())),
            _ => Err(DbError::Overloaded),
        }
    }

    pub(super) async fn acquire_search(
        &self,
        user_id: Uuid,
        deadline: Deadline,
    ) -> Result<(SemaphorePermit<'_>, KeyedPermit<Uuid>)> {
        let of_user = self.searches_per_user.acquire(user_id, deadline).await?;
        match timeout_at(deadline.at(), self.searches.acquire()).await {
            Ok(Ok(permit)) => Ok((permit, of_user)),
            _ => Err(DbError::Overloaded),
        }
    }

    /// Whether writes of this user's tasks run alone at present.
    pub(super) fn is_writing_alone(&self, user_id: Uuid) -> bool {
        self.writes_per_user.is_in_use(&user_id)
    }

    /// Waits until this user may write tasks, for no longer than other requests wait for a connection.
    pub(super) async fn acquire_task_write(
        &self,
        user_id: Uuid,
        deadline: Deadline,
    ) -> Result<KeyedPermit<Uuid>> {
        if !self.health.is_up_after_startup(deadline.at()).await {
            return Err(DbError::Unavailable("the database is down".into()));
        }
        let limit = match self.health.sockets.is_connecting() {
            true => CONNECT_TIMEOUT,
            false => QUEUE_TARGET,
        };
        let deadline = deadline.min(Deadline::after(limit));
        let permit = self.writes_per_user.acquire(user_id, deadline);
        let permit = self.health.while_up(permit).await;
        permit.unwrap_or_else(|| Err(DbError::Unavailable("the database went down".into())))
    }
}
