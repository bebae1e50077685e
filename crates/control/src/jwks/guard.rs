//! Which addresses the control plane may dial for a `jwksUri` (S3.67, server-side request forgery).
//!
//! Whoever may write a RequestAuthentication chooses the URI, so the control plane must not become their way to its own
//! loopback, to the node's metadata service, or to networks that the operator closed. The check is on the address that
//! is dialled, after name resolution and for each redirect, so a name that changes its address between check and use gains nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Reads `10.0.0.0/8`, `fd00::/8`, or a single address.
///
/// # Errors
/// What is wrong with the text.
pub fn range(text: &str) -> Result<IpNet, String> {
    let single = text.parse::<IpAddr>().map(IpNet::from);
    single
        .or_else(|_| text.parse::<IpNet>())
        .map_err(|_| format!("{text:?} is no address range, such as 10.0.0.0/8"))
}

/// What may be dialled.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    blocked: Vec<IpNet>,
    /// Whether this machine itself may be dialled. Only tests say so.
    loopback: bool,
}

/// Metadata services outside of the link-local ranges: Alibaba, Oracle, Azure, and the IPv6 ones of AWS and Google.
const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

impl Guard {
    /// A guard that refuses these ranges besides what is never allowed (`BLOCKED_CIDRS_IN_JWKS_URIS`).
    pub fn new(blocked: Vec<IpNet>) -> Guard {
        Guard {
            blocked,
            loopback: false,
        }
    }

    /// The same guard, with this machine allowed.
    #[must_use]
    pub fn with_loopback(self) -> Guard {
        Guard { loopback: true, ..self }
    }

    /// `Err` says why an address is not dialled.
    ///
    /// # Errors
    /// The kind of address, in words.
    pub fn check(&self, address: IpAddr) -> Result<(), String> {
        // An IPv6 form of an IPv4 address is that address.
        let inner = unwrap(address);
        for address in std::iter::once(address).chain(inner) {
            if METADATA.contains(&address) {
                return Err(format!("{address} is a metadata service"));
            }
            if let Some(what) = never(address, self.loopback) {
                return Err(format!("{address} is {what}"));
            }
            if let Some(range) = self.blocked.iter().find(|c| c.contains(&address)) {
                return Err(format!(
                    "{address} is in {range}, which BLOCKED_CIDRS_IN_JWKS_URIS lists"
                ));
            }
        }
        Ok(())
    }
}

/// Kinds of addresses that no issuer is at.
fn never(address: IpAddr, loopback: bool) -> Option<&'static str> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => (v6.segments()[0] & 0xffc0) == 0xfe80,
    };
    if link_local {
        Some("link-local")
    } else if address.is_loopback() && !loopback {
        Some("this machine itself")
    } else if address.is_unspecified() || matches!(address, IpAddr::V4(v4) if v4.octets()[0] == 0) {
        Some("no address of a server")
    } else if address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast()) {
        Some("a group address")
    } else {
        None
    }
}

/// The IPv4 address inside a mapped, compatible, NAT64 or 6to4 one.
fn unwrap(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(v6) = address else { return None };
    let s = v6.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Some(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))
    };
    match s {
        [0, 0, 0, 0, 0, 0xffff, high, low] => v4(high, low),
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => v4(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x2002, high, low, ..] => v4(high, low),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(guard: &Guard, address: &str) -> Result<(), String> {
        guard.check(address.parse().unwrap())
    }

    #[test]
    fn what_is_never_dialled() {
        let guard = Guard::default();
        for address in [
            "169.254.169.254",
            "169.254.0.1",
            "fe80::1",
            "febf::1",
            "100.100.100.200",
            "192.0.0.192",
            "168.63.129.16",
            "fd00:ec2::254",
            "fd20:ce::254",
            "127.0.0.1",
            "127.8.9.1",
            "::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            // The same in IPv6 clothes.
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(check(&guard, address).is_err(), "{address}");
        }
        for address in [
            "10.0.0.1",
            "192.168.1.1",
            "8.8.8.8",
            "fd00::1",
            "2001:db8::1",
            "fec0::1",
        ] {
            assert_eq!(check(&guard, address), Ok(()), "{address}");
        }
        assert_eq!(check(&Guard::default().with_loopback(), "127.0.0.1"), Ok(()));
        assert!(check(&Guard::default().with_loopback(), "169.254.169.254").is_err());
    }

    #[test]
    fn operators_close_ranges() {
        let ranges = ["10.0.0.0/8", "192.168.4.0/22", "203.0.113.9", "fd00::/8"];
        let guard = Guard::new(ranges.iter().map(|r| range(r).unwrap()).collect());
        for address in [
            "10.255.0.1",
            "192.168.7.255",
            "203.0.113.9",
            "fd12::1",
            "::ffff:10.0.0.1",
        ] {
            let error = check(&guard, address).unwrap_err();
            assert!(error.contains("BLOCKED_CIDRS_IN_JWKS_URIS"), "{error}");
        }
        for address in ["11.0.0.1", "192.168.8.0", "203.0.113.8", "fe00::1"] {
            assert_eq!(check(&guard, address), Ok(()), "{address}");
        }
        let all = Guard::new(vec![range("0.0.0.0/0").unwrap()]);
        assert!(check(&all, "8.8.8.8").is_err());
        for bad in [
            "",
            "x",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/8/8",
        ] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }
}
