//! A semaphore for each key, for example for each account.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use super::{DbError, Deadline, Result};

type Semaphores<K> = Arc<Mutex<HashMap<K, Arc<Semaphore>>>>;

/// Limits how many permits are held for each key. Semaphores exist only while they are in use.
pub(crate) struct KeyedSemaphore<K: Clone + Eq + Hash> {
    permits_per_key: usize,
    semaphores: Semaphores<K>,
}

/// A permit for one key, or a request for one. Released on drop.
pub(crate) struct KeyedPermit<K: Clone + Eq + Hash> {
    semaphores: Semaphores<K>,
    key: K,
    permit: Option<OwnedSemaphorePermit>,
}

impl<K: Clone + Eq + Hash> KeyedSemaphore<K> {
    pub(crate) fn new(permits_per_key: usize) -> Self {
        Self {
            permits_per_key,
            semaphores: Arc::default(),
        }
    }

    /// Waits for a permit until the deadline.
    pub(crate) async fn acquire(&self, key: K, deadline: Deadline) -> Result<KeyedPermit<K>> {
        let (semaphore, mut keyed) = self.request(key);
        match timeout_at(deadline.at(), semaphore.acquire_owned()).await {
            Ok(Ok(permit)) => keyed.permit = Some(permit),
            _ => return Err(DbError::Overloaded),
        }
        Ok(keyed)
    }

    /// Returns a permit if one is available.
    pub(crate) fn try_acquire(&self, key: K) -> Option<KeyedPermit<K>> {
        let (semaphore, mut keyed) = self.request(key);
        keyed.permit = Some(semaphore.try_acquire_owned().ok()?);
        Some(keyed)
    }

    /// Whether permits for a key are held or waited for.
    pub(crate) fn is_in_use(&self, key: &K) -> bool {
        self.semaphores.lock().contains_key(key)
    }

    /// Returns the semaphore of a key, and a permit that is yet to be acquired. Dropping the permit
    /// removes an unused semaphore, even if the permit was never acquired.
    fn request(&self, key: K) -> (Arc<Semaphore>, KeyedPermit<K>) {
        let new = || Arc::new(Semaphore::new(self.permits_per_key));
        let semaphore = self
            .semaphores
            .lock()
            .entry(key.clone())
            .or_insert_with(new)
            .clone();
        let keyed = KeyedPermit {
            semaphores: self.semaphores.clone(),
            key,
            permit: None,
        };
        (semaphore, keyed)
    }
}

impl<K: Clone + Eq + Hash> Drop for KeyedPermit<K> {
    fn drop(&mut self) {
        let mut semaphores = self.semaphores.lock();
        // Releases this permit's reference, so that only the map's reference counts below.
        self.permit = None;
        let semaphore = semaphores.get(&self.key);
        if semaphore.is_some_and(|semaphore| Arc::strong_count(semaphore) == 1) {
            semaphores.remove(&self.key);
        }
    }
}
