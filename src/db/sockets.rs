//! The sockets to the database that are open or being opened.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long acquiring a connection may take, including connecting and preparing statements.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The sockets of the pool and of the health probe.
pub(super) struct Sockets {
    permits: Arc<Semaphore>,
    /// Cancelled to close every socket of the pool.
    pub(super) close: Mutex<CancellationToken>,
    /// Connections whose last response is older may be dead.
    pub(super) responsive_since: Mutex<Instant>,
    /// Cloned by each attempt to connect.
    pub(super) connecting: Arc<()>,
}

impl Sockets {
    pub(super) fn new(max_sockets: u32) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(max_sockets as usize)),
            close: Mutex::default(),
            responsive_since: Mutex::new(Instant::now()),
            connecting: Arc::default(),
        }
    }

    /// Waits until another socket may be opened: the number of open sockets is limited.
    pub(super) async fn acquire(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().acquire_owned().await.ok()
    }

    /// Whether the pool is opening connections.
    pub(super) fn is_connecting(&self) -> bool {
        Arc::strong_count(&self.connecting) > 1
    }

    /// Closes every socket of the pool.
    pub(super) fn close_all(&self) {
        std::mem::take(&mut *self.close.lock()).cancel();
    }

    /// Evicts connections that have received no response since the given time.
    pub(super) fn evict_unresponsive_since(&self, since: Instant) {
        let mut responsive_since = self.responsive_since.lock();
        *responsive_since = since.max(*responsive_since);
    }
}
