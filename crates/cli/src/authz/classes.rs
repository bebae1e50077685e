//! The doors of a workload port, and the universe of requests that come through each: what `who-can`, `what-can` and `diff`
//! analyse.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mantlet_model::authz::analyse::{Fixed, Peer, Policies, Universe, Witness};
use mantlet_model::authz::{HttpSample, Sample};
use mantlet_model::names;
use mantlet_translate::journey::{self, Arrival, Server, Wire};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::World;

/// What is asked about besides the identity.
#[derive(Clone, Debug, Default)]
pub struct Narrow {
    /// Only this method.
    pub method: Option<String>,
    /// Only this path.
    pub path: Option<String>,
}

/// A way into a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Door {
    /// Whether the client shows an identity of the mesh.
    pub mtls: bool,
    /// TLS that is not the mesh's (gateways).
    pub tls: bool,
    /// Whether an HTTP request comes, or bytes.
    pub http: bool,
}

impl Door {
    /// The doors of a port.
    pub fn of(gateway: bool, protocol: Protocol) -> Vec<Door> {
        let http = !matches!(protocol, Protocol::Tcp | Protocol::Tls);
        let bytes = !protocol.is_http();
        let mut out = Vec::new();
        for (mtls, tls) in [(!gateway, gateway), (false, false)] {
            for form in [http.then_some(true), bytes.then_some(false)].into_iter().flatten() {
                out.push(Door { mtls, tls, http: form });
            }
        }
        out
    }

    /// As printed.
    pub fn name(self) -> &'static str {
        match (self.mtls, self.tls, self.http) {
            (true, _, true) => "mTLS",
            (true, _, false) => "mTLS, not HTTP",
            (false, true, true) => "TLS",
            (false, true, false) => "TLS, not HTTP",
            (false, false, true) => "plaintext",
            (false, false, false) => "plaintext, not HTTP",
        }
    }

    /// The chain behind it; `None` is a reset.
    pub fn arrive<'s>(self, server: &'s Server<'_>, port: u16, protocol: Protocol) -> Option<Arrival<'s>> {
        let wire = match (self.mtls, self.tls) {
            (true, _) => Wire::Mtls { sni: "" },
            (false, true) => Wire::OtherTls,
            (false, false) => Wire::Plaintext,
        };
        server.arrive(port, protocol, &wire, self.http)
    }
}

/// What decides behind a door.
pub fn policies<'a>(arrival: &Arrival<'a>) -> Policies<'a> {
    Policies {
        custom: arrival.custom(),
        filters: arrival.filters(),
    }
}

/// All requests that come through a door.
pub fn universe(
    world: &World,
    server: &Server<'_>,
    arrival: &Arrival<'_>,
    port: u16,
    host: &str,
    narrow: &Narrow,
) -> Universe {
    // Outside of every private range, so that rules about addresses are met by chance only.
    let nobody = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let address = server.pod.ip;
    Universe {
        base: Sample {
            peer: Vec::new(),
            source: nobody,
            remote: nobody,
            destination: SocketAddr::new(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port),
            sni: None,
            http: arrival.http().map(|_| HttpSample {
                method: narrow.method.clone().unwrap_or_else(|| "GET".into()),
                path: narrow.path.clone().unwrap_or_else(|| "/".into()),
                host: host.to_string(),
                ..HttpSample::default()
            }),
        },
        peer: if arrival.mtls {
            let domains = world.mesh().accepted_trust_domains();
            Peer::Any(domains.into_iter().map(String::from).collect())
        } else {
            Peer::None
        },
        usual: if arrival.mtls { known(world) } else { Vec::new() },
        fixed: Fixed {
            method: narrow.method.is_some(),
            path: narrow.path.is_some(),
            port: true,
            address: address.is_some(),
            ..Fixed::default()
        },
        issuers: arrival.jwt().map(|jwt| {
            let all: Vec<String> = jwt.providers.iter().map(|p| p.issuer.clone()).collect();
            if all.iter().any(String::is_empty) {
                Vec::new()
            } else {
                all
            }
        }),
        normalization: arrival.normalization(),
    }
}

/// Identities of all pods in the mesh, in its own trust domain.
pub fn known(world: &World) -> Vec<String> {
    let namespaces: Vec<&str> = world.namespaces().collect();
    let all: BTreeSet<String> = namespaces
        .iter()
        .flat_map(|ns| world.pods(ns))
        .filter(|pod| journey::in_mesh(world, pod))
        .map(|pod| names::spiffe(&world.mesh().trust_domain, &pod.namespace, &pod.service_account))
        .collect();
    all.into_iter().collect()
}

/// An identity as people write it: `ns/sa` in the mesh's own trust domain.
pub fn short(world: &World, uri: &str) -> String {
    let plain = uri.strip_prefix("spiffe://").unwrap_or(uri);
    let own = plain
        .strip_prefix(world.mesh().trust_domain.as_str())
        .and_then(|rest| rest.strip_prefix("/ns/"))
        .and_then(|rest| rest.split_once("/sa/"));
    match own {
        Some((ns, sa)) => format!("{ns}/{sa}"),
        None => plain.to_string(),
    }
}

/// A request in one line; what is as in the ordinary one is left out.
pub fn request(world: &World, witness: &Witness, ordinary: &Sample) -> String {
    let sample = &witness.sample;
    let mut out = match &sample.http {
        Some(http) => format!("{} {}", http.method, http.path),
        None => "a connection".to_string(),
    };
    match sample.peer.first() {
        Some(uri) => out.push_str(&format!(" from {}", short(world, uri))),
        None => out.push_str(" from a client without identity"),
    }
    let mut more = Vec::new();
    if sample.source != ordinary.source {
        more.push(format!("address {}", sample.source));
    }
    if sample.remote != ordinary.remote && sample.remote != sample.source {
        more.push(format!("x-forwarded-for {}", sample.remote));
    }
    if let Some(sni) = &sample.sni {
        more.push(format!("server name {sni}"));
    }
    if let (Some(http), Some(usual)) = (&sample.http, &ordinary.http) {
        if http.host != usual.host {
            more.push(format!("host {}", http.host));
        }
        more.extend(http.headers.iter().map(|(name, value)| format!("{name}: {value}")));
        if let Some(claims) = &http.claims {
            more.push(format!("a token with {claims}"));
        }
    }
    more.extend(witness.providers.iter().map(|p| format!("provider {p} agreeing")));
    if !more.is_empty() {
        out.push_str(&format!(" with {}", more.join(", ")));
    }
    out
}
