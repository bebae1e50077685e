//! Lists of what is served, packed. Mantlet's own message: only its proxies ask for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mantlet_model::Destinations;

use crate::mantlet_proto::Destinations as Proto;
use crate::wire::{Result, expect, fault, port};

pub(crate) fn encode(model: &Destinations) -> Proto {
    let mut out = Proto {
        name: model.name.clone(),
        ports: model.ports.iter().map(|port| u32::from(*port)).collect(),
        hosts: model.hosts.clone(),
        ..Proto::default()
    };
    for address in &model.addresses {
        match address {
            IpAddr::V4(ip) => out.addresses_v4.extend(ip.octets()),
            IpAddr::V6(ip) => out.addresses_v6.extend(ip.octets()),
        }
    }
    for listener in &model.listeners {
        let list = match listener.ip() {
            IpAddr::V4(ip) => {
                out.listeners_v4.extend(ip.octets());
                &mut out.listeners_v4
            }
            IpAddr::V6(ip) => {
                out.listeners_v6.extend(ip.octets());
                &mut out.listeners_v6
            }
        };
        list.extend(listener.port().to_be_bytes());
    }
    out
}

pub(crate) fn decode(proto: Proto) -> Result<Destinations> {
    let mut model = Destinations {
        name: proto.name,
        hosts: proto.hosts,
        ..Destinations::default()
    };
    for number in proto.ports {
        model.ports.push(port(number, "ports")?);
    }
    for bytes in pieces::<4>(&proto.addresses_v4, "addresses_v4")? {
        model.addresses.push(Ipv4Addr::from(*bytes).into());
    }
    for bytes in pieces::<16>(&proto.addresses_v6, "addresses_v6")? {
        model.addresses.push(Ipv6Addr::from(*bytes).into());
    }
    for [a, b, c, d, high, low] in pieces::<6>(&proto.listeners_v4, "listeners_v4")? {
        let port = u16::from_be_bytes([*high, *low]);
        model.listeners.push(SocketAddr::from(([*a, *b, *c, *d], port)));
    }
    for bytes in pieces::<18>(&proto.listeners_v6, "listeners_v6")? {
        let [ip @ .., high, low] = bytes;
        let ip = Ipv6Addr::from(*ip);
        model
            .listeners
            .push(SocketAddr::new(ip.into(), u16::from_be_bytes([*high, *low])));
    }
    // The proxy searches them by halves.
    expect(model.ports.is_sorted(), "ports", "not in ascending order")?;
    expect(model.addresses.is_sorted(), "addresses", "not in ascending order")?;
    expect(model.listeners.is_sorted(), "listeners", "not in ascending order")?;
    Ok(model)
}

fn pieces<'b, const N: usize>(bytes: &'b [u8], field: &str) -> Result<&'b [[u8; N]]> {
    match bytes.as_chunks() {
        (pieces, []) => Ok(pieces),
        _ => fault(field, format!("{} bytes are no multiple of {N}", bytes.len())),
    }
}
