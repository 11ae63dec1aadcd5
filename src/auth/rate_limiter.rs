//! A rate limit for each key, for example for each client network.

use std::hash::Hash;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use governor::clock::Clock;
use governor::{DefaultKeyedRateLimiter, Quota};
use parking_lot::Mutex;

/// The expected maximum number of keys. Each takes about 100 bytes. Beyond this number, keys whose
/// quota is full again are removed.
const MAX_KEYS: usize = 50_000;

/// Limits the number of requests per minute of each key, on this instance.
pub(crate) struct RateLimiter<K: Clone + Eq + Hash> {
    limiter: Option<DefaultKeyedRateLimiter<K>>,
    last_pruned: Mutex<Option<Instant>>,
}

impl<K: Clone + Eq + Hash> RateLimiter<K> {
    /// Allows bursts of `burst` requests. A rate of 0 disables the limit.
    pub(crate) fn new(per_minute: u32, burst: u32) -> Self {
        let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
        let rate = NonZeroU32::new(per_minute).map(Quota::per_minute);
        let quota = rate.map(|rate| rate.allow_burst(burst));
        Self {
            limiter: quota.map(governor::RateLimiter::keyed),
            last_pruned: Mutex::default(),
        }
    }

    /// Counts a request. Fails with the number of seconds to wait if it exceeds the limit.
    ///
    /// While [`MAX_KEYS`] keys are in use, the request counts under `shared_key` instead.
    pub(crate) fn check(&self, key: &K, shared_key: &K) -> Result<(), u64> {
        let Some(limiter) = &self.limiter else {
            return Ok(());
        };
        let key = match self.is_full(limiter) {
            true => shared_key,
            false => key,
        };
        let checked = limiter.check_key(key);
        checked.map_err(|until| until.wait_time_from(limiter.clock().now()).as_secs() + 1)
    }

    /// Whether [`MAX_KEYS`] keys are in use, after those whose quota is full again were removed. They
    /// are removed at most once a second, because that visits every key.
    fn is_full(&self, limiter: &DefaultKeyedRateLimiter<K>) -> bool {
        if limiter.len() < MAX_KEYS {
            return false;
        }
        let mut last_pruned = self.last_pruned.lock();
        if last_pruned.is_none_or(|last_pruned| last_pruned.elapsed() > Duration::from_secs(1)) {
            limiter.retain_recent();
            *last_pruned = Some(Instant::now());
        }
        limiter.len() >= MAX_KEYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_the_number_of_keys() {
        let limiter = RateLimiter::new(1, 1);
        for key in 0..2 * MAX_KEYS {
            limiter.check(&key, &0).ok();
        }
        assert!(limiter.limiter.as_ref().unwrap().len() <= MAX_KEYS + 1);
        // Another shared key still has its own quota.
        assert!(limiter.check(&0, &usize::MAX).is_ok());
    }
}
