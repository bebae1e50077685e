//! One call through the mesh: what the client sends, which chain of the server takes it, which policies decide there.
//!
//! The command line asks this for `authz explain`, `authz test` and the analyses. Everything is read from what proxies are
//! told (the server's translated listener, the client's DestinationRule), so the answer is what would happen; nothing is
//! sent. Where the mesh cannot know (an address that no pod has), the caller is outside of it and sends plaintext.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mantlet_api::destination_rule::ClientTlsMode;
use mantlet_model::ProxySnapshot;
use mantlet_model::authz::AuthzFilter;
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::http::{HttpManager, JwtAuthn, PathNormalization};
use mantlet_model::listener::{ConnectionFacts, FilterChain, Filters, Listener, Transport};
use mantlet_model::names::{self, ALPN_ISTIO_HTTP, ALPN_ISTIO_TCP, ClusterName};

use crate::destination_rule;
use crate::endpoint::target_port;
use crate::gateway;
use crate::peer_authentication::{self, Mode};
use crate::protocol::Protocol;
use crate::sidecar::inbound;
use crate::world::World;
use crate::world::service::{Service, ServicePort};
use crate::world::workload::Workload;

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller<'w> {
    /// Its namespace; empty outside of the mesh.
    pub namespace: String,
    /// Its service account, if it is known.
    pub account: Option<String>,
    /// A pod of it, if there is one.
    pub pod: Option<&'w Workload>,
    /// Its address, if it is known.
    pub address: Option<IpAddr>,
    /// Whether it has a proxy that can present its identity.
    pub in_mesh: bool,
}

impl<'w> Caller<'w> {
    /// A service account. Its pods say whether it is in the mesh; without any it is taken for part of it.
    pub fn account(world: &'w World, namespace: &str, account: &str) -> Caller<'w> {
        let mut pods = world
            .pods(namespace)
            .filter(|p| p.service_account == account)
            .peekable();
        let none = pods.peek().is_none();
        // A pod in the mesh speaks for the account; one without a sidecar has the account's name only.
        let all: Vec<&Workload> = pods.map(|p| &**p).collect();
        let pod = all.iter().find(|p| in_mesh(world, p)).or(all.first()).copied();
        Caller {
            namespace: namespace.to_string(),
            account: Some(account.to_string()),
            pod,
            address: pod.and_then(|p| p.ip),
            in_mesh: none || pod.is_some_and(|p| in_mesh(world, p)),
        }
    }

    /// Whoever has this address.
    pub fn address(world: &'w World, address: IpAddr) -> Caller<'w> {
        let namespaces: Vec<&str> = world.namespaces().collect();
        let pod = namespaces
            .iter()
            .flat_map(|ns| world.pods(ns))
            .find(|p| p.ip == Some(address))
            .map(|p| &**p);
        Caller {
            namespace: pod.map(|p| p.namespace.clone()).unwrap_or_default(),
            account: pod.map(|p| p.service_account.clone()),
            pod,
            address: Some(address),
            in_mesh: pod.is_some_and(|p| in_mesh(world, p)),
        }
    }

    /// Somebody without an identity.
    pub fn outside() -> Caller<'static> {
        Caller {
            namespace: String::new(),
            account: None,
            pod: None,
            address: None,
            in_mesh: false,
        }
    }

    /// The identity that it presents when it speaks mTLS.
    pub fn principal(&self, world: &World) -> Option<String> {
        let account = self.account.as_ref().filter(|_| self.in_mesh)?;
        Some(names::spiffe(&world.mesh().trust_domain, &self.namespace, account))
    }
}

/// Whether a pod has a proxy of the mesh.
pub fn in_mesh(world: &World, pod: &Workload) -> bool {
    pod.mtls || pod.mantlet || is_gateway(world, pod)
}

/// Whether a pod is a gateway: some Gateway selects it.
pub fn is_gateway(world: &World, pod: &Workload) -> bool {
    world.gateways().iter().any(|g| {
        g.broken.is_none()
            && !g.spec.selector.is_empty()
            && mantlet_api::selector::subset(&g.spec.selector, &pod.labels)
    })
}

/// What a client puts on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sends {
    /// The mesh's mTLS with its identity; the server name is the service's.
    Mtls {
        /// Server name.
        sni: String,
    },
    /// Plaintext, and why.
    Plaintext(String),
    /// TLS that is not the mesh's, and why.
    OtherTls(String),
}

/// What the caller sends to a service port of a server (SEMANTICS 1d).
pub fn sends(world: &World, caller: &Caller<'_>, service: &Service, port: &ServicePort, server: &Workload) -> Sends {
    if !caller.in_mesh {
        let who = match (caller.pod, caller.address) {
            (Some(pod), _) => format!("pod {}.{} has no sidecar", pod.name, pod.namespace),
            (None, Some(address)) => format!("{address} is no address of a pod in the mesh"),
            (None, None) => "the client is outside of the mesh".into(),
        };
        return Sends::Plaintext(who);
    }
    let sni = ClusterName::outbound(port.number, "", &service.host).sni();
    let no_labels = BTreeMap::new();
    let client = destination_rule::Client {
        namespace: &caller.namespace,
        labels: caller.pod.map_or(&no_labels, |p| &*p.labels),
    };
    let rule = destination_rule::applied(world, client, service)
        .and_then(|applied| applied.settings(port.number, None).tls.map(|tls| tls.mode));
    match rule {
        Some(ClientTlsMode::IstioMutual) => return Sends::Mtls { sni },
        Some(ClientTlsMode::Disable) => {
            return Sends::Plaintext(format!("a DestinationRule for {} sets tls.mode DISABLE", service.host));
        }
        Some(mode) => {
            return Sends::OtherTls(format!(
                "a DestinationRule for {} sets tls.mode {}",
                service.host,
                format!("{mode:?}").to_uppercase()
            ));
        }
        None => {}
    }
    if !world.mesh().auto_mtls {
        return Sends::Plaintext("enableAutoMtls is false and no DestinationRule asks for mTLS".into());
    }
    if service.external {
        return Sends::Plaintext(format!("{} is outside of the mesh", service.host));
    }
    if peer_authentication::namespace_mode(world, &service.namespace) == Some(Mode::Disable) {
        return Sends::Plaintext(format!(
            "PeerAuthentication of namespace {} is DISABLE",
            service.namespace
        ));
    }
    if !server.mtls {
        return Sends::Plaintext(format!("pod {}.{} has no sidecar", server.name, server.namespace));
    }
    let number = target_port(&port.target, server).unwrap_or(port.number);
    if peer_authentication::effective(world, &server.namespace, &server.labels).port(number) == Mode::Disable {
        return Sends::Plaintext(format!(
            "PeerAuthentication of pod {}.{} is DISABLE",
            server.name, server.namespace
        ));
    }
    Sends::Mtls { sni }
}

/// The server's side of a call.
#[derive(Clone, Debug)]
pub struct Server<'w> {
    /// The pod.
    pub pod: &'w Workload,
    /// Whether it is a gateway.
    pub gateway: bool,
    /// Its listeners that take calls; empty for a pod without a proxy.
    listeners: Vec<Arc<Listener>>,
    modes: peer_authentication::Effective,
}

/// What arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wire<'a> {
    /// The mesh's mTLS.
    Mtls {
        /// Server name.
        sni: &'a str,
    },
    /// Other TLS.
    OtherTls,
    /// Plaintext.
    Plaintext,
}

/// Who decides about a call at the server.
#[derive(Clone, Debug)]
pub struct Arrival<'s> {
    /// The chain that took it.
    pub chain: &'s FilterChain,
    /// Whether the peer's identity is verified there.
    pub mtls: bool,
}

impl<'s> Arrival<'s> {
    /// The HTTP connection manager, if the chain speaks HTTP.
    pub fn http(&self) -> Option<&'s HttpManager> {
        match &self.chain.filters {
            Filters::Http(http) => Some(http),
            Filters::Tcp(_) => None,
        }
    }

    /// Authorization filters.
    pub fn filters(&self) -> &'s [AuthzFilter] {
        match &self.chain.filters {
            Filters::Http(http) => &http.authz,
            Filters::Tcp(tcp) => &tcp.authz,
        }
    }

    /// CUSTOM stages, which come first.
    pub fn custom(&self) -> &'s [CustomStage] {
        match &self.chain.filters {
            Filters::Http(http) => &http.custom,
            Filters::Tcp(tcp) => &tcp.custom,
        }
    }

    /// Token verification.
    pub fn jwt(&self) -> Option<&'s JwtAuthn> {
        self.http().and_then(|http| http.jwt.as_ref())
    }

    /// What happens to paths before policies see them.
    pub fn normalization(&self) -> PathNormalization {
        self.http().map_or(PathNormalization::None, |http| http.normalization)
    }

    /// Prefixes of identities that the handshake accepts; empty accepts all that the mesh's roots vouch for.
    pub fn accepts(&self, principal: &str) -> bool {
        match &self.chain.tls {
            Some(tls) => tls.client_sans.is_empty() || tls.client_sans.iter().any(|s| s.matches(principal)),
            None => true,
        }
    }
}

impl<'w> Server<'w> {
    /// The server side of a pod, as its proxy is told.
    pub fn of(world: &'w World, pod: &'w Workload) -> Server<'w> {
        let gateway = is_gateway(world, pod);
        let listeners = if gateway {
            let snapshot = gateway::build(world, &pod.namespace, &pod.labels, Some(pod));
            snapshot.listeners.into_values().collect()
        } else if in_mesh(world, pod) {
            let mut snapshot = ProxySnapshot::default();
            inbound::build(world, &pod.namespace, &pod.labels, Some(pod), &mut snapshot);
            snapshot.listeners.into_values().collect()
        } else {
            Vec::new()
        };
        Server {
            pod,
            gateway,
            listeners,
            modes: peer_authentication::effective(world, &pod.namespace, &pod.labels),
        }
    }

    /// Whether a proxy stands before the application.
    pub fn has_proxy(&self) -> bool {
        !self.listeners.is_empty()
    }

    /// The mTLS mode of a port.
    pub fn mode(&self, port: u16) -> Mode {
        self.modes.port(port)
    }

    /// The workload's port behind a service port.
    pub fn port(&self, port: &ServicePort) -> Option<u16> {
        target_port(&port.target, self.pod)
    }

    /// The chain that takes a connection to a port; `None` is a reset. `http` says whether its bytes are an HTTP request.
    pub fn arrive(&self, port: u16, protocol: Protocol, wire: &Wire<'_>, http: bool) -> Option<Arrival<'_>> {
        let listener = if self.gateway {
            self.listeners.iter().find(|l| l.address.port() == port)?
        } else {
            self.listeners.iter().find(|l| l.name == names::VIRTUAL_INBOUND)?
        };
        let speaks_http = http || protocol.is_http();
        let protocols: Vec<String> = match wire {
            Wire::Mtls { .. } if self.gateway => Vec::new(),
            Wire::Mtls { .. } if speaks_http && protocol != Protocol::Tcp && protocol != Protocol::Tls => {
                vec![ALPN_ISTIO_HTTP[1].to_string()]
            }
            Wire::Mtls { .. } => ALPN_ISTIO_TCP.map(String::from).to_vec(),
            Wire::Plaintext if speaks_http && listener.http_inspector.covers(port) => vec!["http/1.1".into()],
            Wire::Plaintext | Wire::OtherTls => Vec::new(),
        };
        let transport = match wire {
            Wire::Plaintext => Transport::Raw,
            _ if listener.tls_inspector.covers(port) || self.gateway => Transport::Tls,
            _ => Transport::Raw,
        };
        let address = self.pod.ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let chain = listener.choose(&ConnectionFacts {
            destination: SocketAddr::new(address, port),
            transport,
            server_name: match wire {
                Wire::Mtls { sni } => Some(sni),
                _ => None,
            },
            application_protocols: &protocols,
        })?;
        let mtls = chain.tls.as_ref().is_some_and(|t| t.require_client_certificate);
        if mtls && matches!(wire, Wire::OtherTls) {
            // No certificate of the mesh: the handshake fails.
            return None;
        }
        Some(Arrival { chain, mtls })
    }
}

/// The pods behind a service, by name.
pub fn servers<'w>(world: &'w World, service: &Service) -> Vec<&'w Workload> {
    if service.selector.is_empty() {
        return Vec::new();
    }
    world
        .pods(&service.namespace)
        .map(|p| &**p)
        .filter(|p| mantlet_api::selector::subset(&service.selector, &p.labels))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn world(extra: &[Value]) -> World {
        let pod = |name: &str, labels: Value| {
            json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop", "labels": labels},
            "spec": {"serviceAccountName": name, "containers": [{"name": "c"}]}})
        };
        let mut objects = vec![
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
                "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}),
            pod("web", json!({"app": "web"})),
            pod("sleep", json!({"app": "sleep"})),
            pod("old", json!({"app": "old", "sidecar.istio.io/inject": "false"})),
        ];
        objects.extend_from_slice(extra);
        let (world, problems) = World::of_objects(&objects, "shop");
        assert_eq!(problems, []);
        world
    }

    fn wire(world: &World, account: &str) -> Sends {
        let caller = Caller::account(world, "shop", account);
        let service = world.service("web.shop.svc.cluster.local", "shop").unwrap();
        let pod = world.pod("shop", "web").unwrap();
        sends(world, &caller, service, &service.ports[0], pod)
    }

    #[test]
    fn sidecars_send_mtls_until_a_rule_says_otherwise() {
        let plain = world(&[]);
        assert!(
            matches!(wire(&plain, "sleep"), Sends::Mtls { sni } if sni == "outbound_.80_._.web.shop.svc.cluster.local")
        );
        assert!(matches!(wire(&plain, "old"), Sends::Plaintext(why) if why.contains("no sidecar")));
        let rule = json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "d", "namespace": "shop"},
            "spec": {"host": "web", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}});
        assert!(matches!(wire(&world(&[rule]), "sleep"), Sends::Plaintext(why) if why.contains("DISABLE")));
    }

    #[test]
    fn strict_has_no_chain_for_plaintext() {
        let strict = json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "shop"}, "spec": {"mtls": {"mode": "STRICT"}}});
        let world = world(&[strict]);
        let server = Server::of(&world, world.pod("shop", "web").unwrap());
        assert!(server.arrive(8080, Protocol::Http, &Wire::Plaintext, true).is_none());
        let arrival = server
            .arrive(8080, Protocol::Http, &Wire::Mtls { sni: "x" }, true)
            .expect("mTLS is taken");
        assert!(arrival.mtls && arrival.http().is_some());
        assert!(arrival.accepts("spiffe://cluster.local/ns/a/sa/b"));
        assert!(!arrival.accepts("spiffe://elsewhere/ns/a/sa/b"));
        assert!(!Server::of(&world, world.pod("shop", "old").unwrap()).has_proxy());
    }
}
