//! The client's address behind trusted proxies, and its network.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Returns the peer's address or, if the peer is a trusted proxy, the last address in
/// `X-Forwarded-For` that is not a trusted proxy.
pub(crate) fn client_ip(headers: &HeaderMap, peer: IpAddr, trusted: &[IpNet]) -> IpAddr {
    let mut client = peer.to_canonical();
    let values = headers.get_all(FORWARDED_FOR).iter().rev();
    for hop in values.flat_map(|value| value.to_str().unwrap_or_default().rsplit(',')) {
        if !is_trusted(client, trusted) {
            break;
        }
        // A trusted proxy appends valid addresses only, so anything else ends the chain.
        let Some(address) = parse_forwarded_addr(hop.trim()) else {
            break;
        };
        client = address;
    }
    client
}

/// Whether the address belongs to a trusted proxy.
pub(crate) fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&address))
}

/// The network of a client: an IPv4 address or an IPv6 /64, which usually belongs to one customer.
pub(crate) fn client_network(client: IpAddr) -> IpAddr {
    network_prefix(client, 32, 64)
}

/// The network of a client with this prefix length.
pub(crate) fn network_prefix(client: IpAddr, ipv4_bits: u8, ipv6_bits: u8) -> IpAddr {
    let bits = match client {
        IpAddr::V4(_) => ipv4_bits,
        IpAddr::V6(_) => ipv6_bits,
    };
    IpNet::new(client, bits).map_or(client, |network| network.trunc().addr())
}

/// Parses an address as proxies write it: bare, with a port, or in brackets.
fn parse_forwarded_addr(hop: &str) -> Option<IpAddr> {
    let with_port = || hop.parse().ok().map(|address: SocketAddr| address.ip());
    let in_brackets = || hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    let address: IpAddr = hop.parse().ok().or_else(with_port).or_else(in_brackets)?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(crate::proptest_config())]

        #[test]
        fn only_a_trusted_proxy_can_change_the_client_address(
            values in prop::collection::vec(
                prop_oneof![any::<String>(), "[0-9.:,\\[\\] ]{0,60}"], 0..3
            )
        ) {
            let peer = IpAddr::from([192, 0, 2, 1]);
            let values = values.iter().filter_map(|value| HeaderValue::from_str(value).ok());
            let headers = values.map(|value| (FORWARDED_FOR, value)).collect();
            prop_assert_eq!(client_ip(&headers, peer, &[]), peer);
            // Must not panic, whatever the header contains.
            client_ip(&headers, peer, &["192.0.2.0/24".parse().unwrap()]);
        }
    }
}
