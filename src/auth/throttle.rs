//! Brakes on guessing. The count of wrong passwords is in the database, where all instances see
//! it; here is what each instance does by itself: few attempts on one account at a time, and so
//! many requests a minute from one address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use crate::db::Deadline;
use crate::error::Error;

/// Attempts on one account that are checked at the same time on one instance. With ten failures
/// to the block, two instances check no more than 10 + 4 + 5 of any number of guesses at once.
const ATTEMPTS_AT_ONCE: usize = 5;
/// Addresses that are told apart; beyond, newcomers share one allowance. Some 100 bytes each.
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
        let key = if limiter.len() >= MAX_ADDRESSES {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            network(client)
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

/// Whoever has an IPv6 address has the 2^64 of its network.
fn network(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => client,
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            Ipv6Addr::from_bits(network).into()
        }
    }
}
