//! The table of open connections. When it is full, the connections that have been idle longest are
//! closed to make room for new ones.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::http::connection_state::ConnectionState;

/// A connection that was active more recently is likely to be used again soon.
const MIN_IDLE: Duration = Duration::from_secs(1);
/// How often a full table is searched for idle connections.
const EVICTION_INTERVAL: Duration = Duration::from_millis(100);
/// A search evicts up to one connection in this many, so that not every new connection needs one.
const EVICTED_SHARE: usize = 64;

pub(crate) struct ConnectionTable {
    limit: usize,
    permits: Arc<Semaphore>,
    open: Mutex<HashMap<u64, Arc<ConnectionState>>>,
    next_id: AtomicU64,
}

impl ConnectionTable {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            permits: Arc::new(Semaphore::new(limit)),
            open: Mutex::default(),
            next_id: AtomicU64::new(0),
        })
    }

    /// Waits for a permit, evicting idle connections if there is none.
    pub(crate) async fn acquire(self: &Arc<Self>) -> ConnectionPermit {
        loop {
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            self.evict_idle();
            let permit = self.permits.clone().acquire_owned();
            if let Ok(Ok(permit)) = timeout(EVICTION_INTERVAL, permit).await {
                return self.register(permit);
            }
        }
    }

    pub(crate) fn try_acquire(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        Some(self.register(permit))
    }

    fn register(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> ConnectionPermit {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let state = Arc::<ConnectionState>::default();
        self.open.lock().insert(id, state.clone());
        ConnectionPermit {
            id,
            state,
            table: self.clone(),
            _permit: permit,
        }
    }

    fn evict_idle(&self) {
        let open = self.open.lock();
        let mut idle: Vec<_> = open
            .values()
            .filter_map(|state| Some((state.idle_time()?, state)))
            .filter(|(time, _)| *time >= MIN_IDLE)
            .collect();
        idle.sort_unstable_by(|(a, _), (b, _)| b.cmp(a));
        for (_, state) in idle.iter().take(self.limit.div_ceil(EVICTED_SHARE)) {
            state.evict();
        }
    }
}

/// An entry in the table, removed on drop.
pub(crate) struct ConnectionPermit {
    id: u64,
    pub(crate) state: Arc<ConnectionState>,
    table: Arc<ConnectionTable>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.table.open.lock().remove(&self.id);
    }
}
