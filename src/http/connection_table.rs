//! The table of open connections. When it is full, the connections that have been idle longest are
//! closed to make room for new ones. One network gets half of it at most.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

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
    open: Mutex<OpenConnections>,
}

#[derive(Default)]
struct OpenConnections {
    next_id: u64,
    connections: HashMap<u64, Entry>,
    networks: HashMap<IpAddr, NetworkShare>,
}

struct Entry {
    state: Arc<ConnectionState>,
    /// The network whose share the connection is part of; `None` once it is being evicted.
    network: Option<IpAddr>,
}

#[derive(Default)]
struct NetworkShare {
    open: usize,
    /// When the share was last searched for idle connections without finding any.
    exhausted_at: Option<Instant>,
}

impl ConnectionTable {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            permits: Arc::new(Semaphore::new(limit)),
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
        if let Some(network) = network {
            open.admit(network, self.limit / 2)?;
        }
        let id = open.next_id;
        open.next_id += 1;
        let state = Arc::<ConnectionState>::default();
        let entry = Entry {
            state: state.clone(),
            network,
        };
        open.connections.insert(id, entry);
        Some(ConnectionPermit {
            id,
            state,
            table: self.clone(),
            _permit: permit,
        })
    }
}

impl OpenConnections {
    /// Counts a connection of this network, evicting idle ones if there are already `limit`.
    fn admit(&mut self, network: IpAddr, limit: usize) -> Option<()> {
        let share = self.networks.entry(network).or_default();
        if share.open >= limit {
            let is_recent = |at: Instant| at.elapsed() < EVICTION_INTERVAL;
            if share.exhausted_at.is_some_and(is_recent) {
                return None;
            }
            if self.evict_idle(Some(network), limit) == 0 {
                self.networks.get_mut(&network)?.exhausted_at = Some(Instant::now());
                return None;
            }
        }
        self.networks.entry(network).or_default().open += 1;
        Some(())
    }

    /// Evicts the longest idle connections, of one network or of all. Returns their number, which
    /// depends on `limit`, the number of connections that there may be.
    fn evict_idle(&mut self, network: Option<IpAddr>, limit: usize) -> usize {
        let mut idle: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, entry)| network.is_none() || entry.network == network)
            .filter_map(|(id, entry)| Some((entry.state.idle_time()?, *id)))
            .filter(|(time, _)| *time >= MIN_IDLE)
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        idle.truncate(limit.div_ceil(EVICTED_SHARE));
        for (_, id) in &idle {
            if let Some(entry) = self.connections.get_mut(id) {
                entry.state.evict();
                let network = entry.network.take();
                self.release(network);
            }
        }
        idle.len()
    }

    /// Stops counting a connection of this network.
    fn release(&mut self, network: Option<IpAddr>) {
        let Some(network) = network else { return };
        if let Some(share) = self.networks.get_mut(&network) {
            share.open -= 1;
            if share.open == 0 {
                self.networks.remove(&network);
            }
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
        let mut open = self.table.open.lock();
        if let Some(entry) = open.connections.remove(&self.id) {
            open.release(entry.network);
        }
    }
}
