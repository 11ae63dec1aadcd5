//! The limits on logins of each client network. Failed logins are counted in the database, where
//! all instances see them; this limit and [`MAX_CONCURRENT_LOGINS`] apply to one instance.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::auth::rate_limiter::RateLimiter;
use crate::error::{Error, Result};
use crate::telemetry::labels::LoginFailure;

/// The maximum number of concurrent login attempts on one account from one network. Prevents them
/// from filling the hash queue.
pub(crate) const MAX_CONCURRENT_LOGINS: usize = 5;

/// Limits the number of requests per minute from each network.
pub(crate) struct IpRateLimiter(RateLimiter<IpAddr>);

impl IpRateLimiter {
    /// A rate of 0 disables the limit.
    pub(crate) fn new(per_minute: u32) -> Self {
        Self(RateLimiter::new(per_minute, per_minute))
    }

    /// Counts a request. Fails if it exceeds the limit.
    pub(crate) fn check(&self, client: IpAddr) -> Result<()> {
        let network = match self.0.is_full() {
            true => prefix(client, 16, 32),
            false => client_network(client),
        };
        self.0
            .check(&network)
            .map_err(|retry_after| Error::TooManyAttempts {
                retry_after,
                reason: LoginFailure::RateLimited,
            })
    }
}

/// The network of a client: an IPv4 address or an IPv6 /64, which usually belongs to one customer.
pub(crate) fn client_network(client: IpAddr) -> IpAddr {
    prefix(client, 32, 64)
}

fn prefix(client: IpAddr, ipv4_bits: u8, ipv6_bits: u8) -> IpAddr {
    let bits = match client {
        IpAddr::V4(_) => ipv4_bits,
        IpAddr::V6(_) => ipv6_bits,
    };
    IpNet::new(client, bits).map_or(client, |network| network.trunc().addr())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::auth::rate_limiter::MAX_KEYS;

    #[test]
    fn limits_the_number_of_networks() {
        let limiter = IpRateLimiter::new(1);
        for number in 0..u32::try_from(MAX_KEYS).unwrap() * 2 {
            let client = Ipv6Addr::from_bits(u128::from(number) << 64);
            limiter.check(client.into()).ok();
        }
        assert!(limiter.0.len() <= MAX_KEYS + 1);
        // A client outside the shared network still has its own quota.
        assert!(limiter.check("192.0.2.1".parse().unwrap()).is_ok());
    }
}
