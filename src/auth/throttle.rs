//! Brakes on guessing. The count of wrong passwords is in the database, where all instances see
//! it; here is what each instance does by itself: few attempts on one account at a time, and so
//! many requests a minute from one address.

use std::collections::HashMap;
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

/// Attempts on one account that are checked at the same time on one instance. With ten failures
/// to the block, two instances check no more than 10 + 4 + 5 of any number of guesses at once.
const ATTEMPTS_AT_ONCE: usize = 5;
/// Addresses that are told apart, at some 100 bytes each; beyond, whole regions share an allowance.
const MAX_ADDRESSES: usize = 50_000;

/// Lets few attempts on one account through at a time.
#[derive(Default)]
pub(crate) struct Accounts {
    under_way: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
}

/// One attempt on an account, until it is dropped.
pub(crate) struct Attempt {
    under_way: Arc<Mutex<HashMap<String, Arc<Semaphore>>>>,
    email: String,
    permit: Option<OwnedSemaphorePermit>,
}

impl Accounts {
    /// Waits for a turn at this account.
    pub(crate) async fn enter(&self, email: &str, deadline: Deadline) -> Result<Attempt, Error> {
        let turns = {
            let mut under_way = self
                .under_way
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let new = || Arc::new(Semaphore::new(ATTEMPTS_AT_ONCE));
            under_way
                .entry(email.to_owned())
                .or_insert_with(new)
                .clone()
        };
        // Made before waiting: whoever gives up waiting has to clear up as well.
        let mut attempt = Attempt {
            under_way: self.under_way.clone(),
            email: email.to_owned(),
            permit: None,
        };
        match timeout_at(deadline.at(), turns.acquire_owned()).await {
            Ok(Ok(permit)) => attempt.permit = Some(permit),
            _ => return Err(Error::Overloaded),
        }
        Ok(attempt)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut under_way = self
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // The permit holds the semaphore, too; the map's own reference is the last one.
        self.permit = None;
        if under_way
            .get(&self.email)
            .is_some_and(|turns| Arc::strong_count(turns) == 1)
        {
            under_way.remove(&self.email);
        }
    }
}

/// So many requests a minute from one address.
pub(crate) struct Addresses {
    limiter: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
    forgot: Mutex<Option<Instant>>,
}

impl Addresses {
    /// A rate of 0 lets everything through.
    pub(crate) fn new(per_minute: u32) -> Self {
        let quota = NonZeroU32::new(per_minute).map(Quota::per_minute);
        Self {
            limiter: quota.map(RateLimiter::keyed),
            clock: DefaultClock::default(),
            forgot: Mutex::default(),
        }
    }

    /// Counts a request; refuses it with the seconds to wait.
    pub(crate) fn check(&self, client: IpAddr) -> Result<(), Error> {
        let Some(limiter) = &self.limiter else {
            return Ok(());
        };
        if limiter.len() >= MAX_ADDRESSES {
            self.forget(limiter);
        }
        let is_full = limiter.len() >= MAX_ADDRESSES;
        let key = if is_full {
            network(client, 16, 32)
        } else {
            network(client, 32, 64)
        };
        limiter
            .check_key(&key)
            .map_err(|until| Error::TooManyAttempts {
                retry_after: until.wait_time_from(self.clock.now()).as_secs() + 1,
                reason: "rate_limited",
            })
    }

    /// Forgets the addresses that have their whole allowance again; once a second, since it walks
    /// through all of them.
    fn forget(&self, limiter: &DefaultKeyedRateLimiter<IpAddr>) {
        let mut forgot = self.forgot.lock().unwrap_or_else(PoisonError::into_inner);
        if forgot.is_none_or(|forgot| forgot.elapsed() > Duration::from_secs(1)) {
            limiter.retain_recent();
            *forgot = Some(Instant::now());
        }
    }
}

/// The network of an address: so many bits of an IPv4 address, so many of an IPv6 address, whose
/// owner has the 2^64 others of its /64, too.
fn network(client: IpAddr, bits_4: u8, bits_6: u8) -> IpAddr {
    let bits = if client.is_ipv4() { bits_4 } else { bits_6 };
    IpNet::new(client, bits).map_or(client, |network| network.trunc().addr())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn an_ipv6_network_is_one_client() {
        let of = |text: &str| network(text.parse().unwrap(), 32, 64);
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn the_addresses_that_are_told_apart_have_a_bound() {
        let addresses = Addresses::new(1);
        for number in 0..u32::try_from(MAX_ADDRESSES).unwrap() * 2 {
            let client = Ipv6Addr::from_bits(u128::from(number) << 64);
            addresses.check(client.into()).ok();
        }
        assert!(addresses.limiter.as_ref().unwrap().len() <= MAX_ADDRESSES + 1);
        // Somebody from elsewhere is none of theirs.
        assert!(addresses.check("192.0.2.1".parse().unwrap()).is_ok());
    }
}
