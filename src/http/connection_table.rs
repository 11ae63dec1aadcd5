//! The table of open connections. When it is full, the connections that have been idle longest are
//! closed to make room for new ones. One network gets half of it at most.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::db::keyed_semaphore::{KeyedPermit, KeyedSemaphore};
use crate::http::connection_state::ConnectionState;

/// A connection that was active more recently is likely to be used again soon.
const MIN_IDLE: Duration = Duration::from_secs(1);
/// How often a full table, or a full share of it, is searched for idle connections.
const EVICTION_INTERVAL: Duration = Duration::from_millis(100);
/// A search evicts up to one connection in this many, so that not every new connection needs one.
const EVICTED_SHARE: usize = 64;

pub(crate) struct ConnectionTable {
    limit: usize,
    permits: Arc<Semaphore>,
    /// The shares of the networks.
    shares: KeyedSemaphore<IpAddr>,
    open: Mutex<OpenConnections>,
}

#[derive(Default)]
struct OpenConnections {
    next_id: u64,
    connections: HashMap<u64, Entry>,
    /// When the connections of a network were searched for idle ones without finding any.
    exhausted: HashMap<IpAddr, Instant>,
}

struct Entry {
    state: Arc<ConnectionState>,
    /// The network whose share the connection is part of.
    network: Option<IpAddr>,
    /// Released when the connection is being evicted.
    share: Option<KeyedPermit<IpAddr>>,
}

impl ConnectionTable {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            permits: Arc::new(Semaphore::new(limit)),
            shares: KeyedSemaphore::new(limit / 2),
            open: Mutex::default(),
        })
    }

    /// Waits for a permit to accept a connection, evicting idle connections if there is none.
    pub(crate) async fn acquire(&self) -> OwnedSemaphorePermit {
        loop {
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            self.open.lock().evict_idle(None, self.limit);
            let permit = self.permits.clone().acquire_owned();
            if let Ok(Ok(permit)) = timeout(EVICTION_INTERVAL, permit).await {
                return permit;
            }
        }
    }

    pub(crate) fn try_acquire(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_owned().ok()
    }

    /// Enters a connection. Returns `None` if the share of its network is used up by connections
    /// that are not idle. A connection without a network is not limited.
    pub(crate) fn register(
        self: &Arc<Self>,
        permit: OwnedSemaphorePermit,
        network: Option<IpAddr>,
    ) -> Option<ConnectionPermit> {
        let mut open = self.open.lock();
        let share = match network {
            Some(network) => Some(self.acquire_share(&mut open, network)?),
            None => None,
        };
        let id = open.next_id;
        open.next_id += 1;
        let state = Arc::<ConnectionState>::default();
        let entry = Entry {
            state: state.clone(),
            network,
            share,
        };
        open.connections.insert(id, entry);
        Some(ConnectionPermit {
            id,
            state,
            table: self.clone(),
            _permit: permit,
        })
    }

    /// Acquires a part of the share of a network, evicting idle connections if there is none left.
    fn acquire_share(
        &self,
        open: &mut OpenConnections,
        network: IpAddr,
    ) -> Option<KeyedPermit<IpAddr>> {
        if let Some(share) = self.shares.try_acquire(network) {
            return Some(share);
        }
        let exhausted = &mut open.exhausted;
        exhausted.retain(|_, since| since.elapsed() < EVICTION_INTERVAL);
        let was_searched = exhausted.contains_key(&network);
        if !was_searched && open.evict_idle(Some(network), self.limit / 2) == 0 {
            open.exhausted.insert(network, Instant::now());
        }
        self.shares.try_acquire(network)
    }
}

impl OpenConnections {
    /// Evicts the connections that have been idle longest, of one network or of all: a share of
    /// `limit`, the maximum number of connections. Returns the number evicted.
    fn evict_idle(&mut self, network: Option<IpAddr>, limit: usize) -> usize {
        let mut idle: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, entry)| network.is_none() || entry.network == network)
            .filter_map(|(id, entry)| Some((entry.state.idle_since()?, *id)))
            .filter(|(since, _)| since.elapsed() >= MIN_IDLE)
            .collect();
        idle.sort_unstable();
        idle.truncate(limit.div_ceil(EVICTED_SHARE));
        for (_, id) in &idle {
            if let Some(entry) = self.connections.get_mut(id) {
                entry.state.evict();
                (entry.network, entry.share) = (None, None);
            }
        }
        idle.len()
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
        self.table.open.lock().connections.remove(&self.id);
    }
}
