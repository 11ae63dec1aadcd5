//! Login rate limiting. Failed attempts are counted in the database, where all instances see them;
//! this is what each instance does by itself: few attempts on one account from one network at a
//! time, and so many requests a minute from one network.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use crate::db::Deadline;
use crate::error::Error;
use crate::telemetry::labels::LoginFailure;

/// Attempts on one account from one network that one instance checks at the same time, so that they
/// do not fill the hash queue.
pub(crate) const MAX_CONCURRENT_LOGINS: usize = 5;
/// Addresses that are told apart, at some 100 bytes each; beyond, whole regions share an allowance.
const MAX_ADDRESSES: usize = 50_000;

/// A semaphore for each key: logins on one account from one network, large answers to one user.
pub(crate) struct KeyedSemaphore<K: Clone + Eq + Hash> {
    at_once: usize,
    taken: Arc<Mutex<HashMap<K, Arc<Semaphore>>>>,
}

/// A permit of one key's semaphore, until it is dropped.
pub(crate) struct KeyedPermit<K: Clone + Eq + Hash> {
    taken: Arc<Mutex<HashMap<K, Arc<Semaphore>>>>,
    key: K,
    permit: Option<OwnedSemaphorePermit>,
}

impl<K: Clone + Eq + Hash> KeyedSemaphore<K> {
    pub(crate) fn new(at_once: usize) -> Self {
        Self {
            at_once,
            taken: Arc::default(),
        }
    }

    /// Waits for a permit until the deadline.
    pub(crate) async fn acquire(
        &self,
        key: K,
        deadline: Deadline,
    ) -> Result<KeyedPermit<K>, Error> {
        // Made before waiting: a caller that gives up waiting has to clear up as well.
        let (mut keyed, semaphore) = self.entry(key);
        match timeout_at(deadline.at(), semaphore.acquire_owned()).await {
            Ok(Ok(permit)) => keyed.permit = Some(permit),
            _ => return Err(Error::Overloaded),
        }
        Ok(keyed)
    }

    fn entry(&self, key: K) -> (KeyedPermit<K>, Arc<Semaphore>) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Semaphore::new(self.at_once));
        let semaphore = taken.entry(key.clone()).or_insert_with(new).clone();
        let keyed = KeyedPermit {
            taken: self.taken.clone(),
            key,
            permit: None,
        };
        (keyed, semaphore)
    }
}

impl<K: Clone + Eq + Hash> Drop for KeyedPermit<K> {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // The permit holds the semaphore, too; the map's own reference is the last one.
        self.permit = None;
        if taken
            .get(&self.key)
            .is_some_and(|semaphore| Arc::strong_count(semaphore) == 1)
        {
            taken.remove(&self.key);
        }
    }
}

/// So many requests a minute from one address.
pub(crate) struct IpRateLimiter {
    limiter: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
    last_pruned: Mutex<Option<Instant>>,
}

impl IpRateLimiter {
    /// A rate of 0 lets everything through.
    pub(crate) fn new(per_minute: u32) -> Self {
        let quota = NonZeroU32::new(per_minute).map(Quota::per_minute);
        Self {
            limiter: quota.map(RateLimiter::keyed),
            clock: DefaultClock::default(),
            last_pruned: Mutex::default(),
        }
    }

    /// Counts a request; refuses it with the seconds to wait.
    pub(crate) fn check(&self, client: IpAddr) -> Result<(), Error> {
        let Some(limiter) = &self.limiter else {
            return Ok(());
        };
        if limiter.len() >= MAX_ADDRESSES {
            self.prune(limiter);
        }
        let is_full = limiter.len() >= MAX_ADDRESSES;
        let key = if is_full {
            prefix(client, 16, 32)
        } else {
            client_network(client)
        };
        limiter
            .check_key(&key)
            .map_err(|until| Error::TooManyAttempts {
                retry_after: until.wait_time_from(self.clock.now()).as_secs() + 1,
                reason: LoginFailure::RateLimited,
            })
    }

    /// Forgets the addresses that have their whole allowance again; once a second, since it walks
    /// through all of them.
    fn prune(&self, limiter: &DefaultKeyedRateLimiter<IpAddr>) {
        let mut last_pruned = self
            .last_pruned
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last_pruned.is_none_or(|last_pruned| last_pruned.elapsed() > Duration::from_secs(1)) {
            limiter.retain_recent();
            *last_pruned = Some(Instant::now());
        }
    }
}

/// The network of a client: an IPv4 address, or an IPv6 /64, all of which one customer has.
pub(crate) fn client_network(client: IpAddr) -> IpAddr {
    prefix(client, 32, 64)
}

fn prefix(client: IpAddr, bits_4: u8, bits_6: u8) -> IpAddr {
    let bits = if client.is_ipv4() { bits_4 } else { bits_6 };
    IpNet::new(client, bits).map_or(client, |network| network.trunc().addr())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn an_ipv6_network_is_one_client() {
        let of = |text: &str| client_network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn the_addresses_that_are_told_apart_have_a_bound() {
        let addresses = IpRateLimiter::new(1);
        for number in 0..u32::try_from(MAX_ADDRESSES).unwrap() * 2 {
            let client = Ipv6Addr::from_bits(u128::from(number) << 64);
            addresses.check(client.into()).ok();
        }
        assert!(addresses.limiter.as_ref().unwrap().len() <= MAX_ADDRESSES + 1);
        // Somebody from elsewhere is none of theirs.
        assert!(addresses.check("192.0.2.1".parse().unwrap()).is_ok());
    }
}
