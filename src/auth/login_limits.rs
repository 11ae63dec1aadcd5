//! The request rate limit for each client network. Failed logins are counted in the database, where
//! all instances see them; this limit and [`MAX_CONCURRENT_LOGINS`] apply to one instance.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use ipnet::IpNet;
use parking_lot::Mutex;

use crate::error::Error;
use crate::telemetry::labels::LoginFailure;

/// The maximum number of concurrent login attempts on one account from one network. Prevents them
/// from filling the hash queue.
pub(crate) const MAX_CONCURRENT_LOGINS: usize = 5;
/// How many networks are counted separately, at about 100 bytes each. Beyond that, larger networks
/// share a limit.
const MAX_NETWORKS: usize = 50_000;

/// Limits the number of requests per minute from each network.
pub(crate) struct IpRateLimiter {
    limiter: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
    last_pruned: Mutex<Option<Instant>>,
}

impl IpRateLimiter {
    /// A rate of 0 disables the limit.
    pub(crate) fn new(per_minute: u32) -> Self {
        let quota = NonZeroU32::new(per_minute).map(Quota::per_minute);
        Self {
            limiter: quota.map(RateLimiter::keyed),
            clock: DefaultClock::default(),
            last_pruned: Mutex::default(),
        }
    }

    /// Counts a request. Fails if it exceeds the limit.
    pub(crate) fn check(&self, client: IpAddr) -> Result<(), Error> {
        let Some(limiter) = &self.limiter else {
            return Ok(());
        };
        if limiter.len() >= MAX_NETWORKS {
            self.prune(limiter);
        }
        let key = if limiter.len() >= MAX_NETWORKS {
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

    /// Removes networks whose quota is full again. Runs at most once a second because it visits
    /// every network.
    fn prune(&self, limiter: &DefaultKeyedRateLimiter<IpAddr>) {
        let mut last_pruned = self.last_pruned.lock();
        if last_pruned.is_none_or(|last_pruned| last_pruned.elapsed() > Duration::from_secs(1)) {
            limiter.retain_recent();
            *last_pruned = Some(Instant::now());
        }
    }
}

/// The network of a client: an IPv4 address or an IPv6 /64, which usually belongs to one customer.
pub(crate) fn client_network(client: IpAddr) -> IpAddr {
    prefix(client, 32, 64)
}

fn prefix(client: IpAddr, ipv4_bits: u8, ipv6_bits: u8) -> IpAddr {
    let bits = if client.is_ipv4() {
        ipv4_bits
    } else {
        ipv6_bits
    };
    IpNet::new(client, bits).map_or(client, |network| network.trunc().addr())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn an_ipv6_network_counts_as_one_client() {
        let network = |text: &str| client_network(text.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:1"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }

    #[test]
    fn limits_the_number_of_networks() {
        let limiter = IpRateLimiter::new(1);
        for number in 0..u32::try_from(MAX_NETWORKS).unwrap() * 2 {
            let client = Ipv6Addr::from_bits(u128::from(number) << 64);
            limiter.check(client.into()).ok();
        }
        assert!(limiter.limiter.as_ref().unwrap().len() <= MAX_NETWORKS + 1);
        // A client outside the shared network still has its own quota.
        assert!(limiter.check("192.0.2.1".parse().unwrap()).is_ok());
    }
}
