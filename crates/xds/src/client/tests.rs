//! The client against the server, without a network between them.

use std::collections::BTreeMap;
use std::sync::Arc;

use mantlet_model::ProxySnapshot;
use mantlet_model::cluster::{Balancer, Limits, UpstreamProtocol};
use mantlet_model::listener::{FilterChain, Inspector};
use mantlet_model::names::Direction;
use proptest::prelude::*;

use super::*;
use crate::encode::Options;
use crate::resources::ResourceSet;
use crate::server::{DeltaServer, StreamEvent};
use crate::tests::generate;

/// A small world: which clusters, listeners and route tables exist, and which variant of each.
type World = (BTreeMap<u8, u8>, BTreeMap<u8, u8>, BTreeMap<u8, u8>);

fn world() -> impl Strategy<Value = World> {
    let some = || proptest::collection::btree_map(0..4u8, 0..3u8, 0..4);
    (some(), some(), some())
}

fn snapshot(world: &World) -> ProxySnapshot {
    let mut out = ProxySnapshot::default();
    for (n, variant) in &world.0 {
        let name = format!("c{n}");
        // One variant shares the endpoints of another cluster.
        let service = if *variant == 2 { "c0".to_string() } else { name.clone() };
        let cluster = Cluster {
            name: name.clone(),
            discovery: Discovery::Eds { service },
            connect_timeout_ms: (*variant).into(),
            balancer: Balancer::LeastRequest,
            tls: ClusterTls::Plain,
            protocol: UpstreamProtocol::Http1,
            bind_source: None,
            limits: Limits::default(),
            outlier: None,
            services: vec![],
            alpn_override: true,
        };
        let endpoints = Endpoints {
            cluster: name.clone(),
            endpoints: vec![],
        };
        out.clusters.insert(name.clone(), Arc::new(cluster));
        out.endpoints.insert(name, Arc::new(endpoints));
    }
    for (n, variant) in &world.1 {
        let name = format!("l{n}");
        let sample = generate::sample(generate::listener_with_http());
        let Filters::Http(mut http) = sample.chains[0].filters.clone() else {
            panic!("HTTP chain expected");
        };
        http.jwt = None;
        http.routes = RouteSource::Named(format!("r{variant}"));
        let listener = Listener {
            name: name.clone(),
            address: ([0, 0, 0, 0], (*n).into()).into(),
            bind_to_port: false,
            use_original_dst: false,
            direction: Direction::Outbound,
            chains: vec![FilterChain {
                name: "c".into(),
                matches: Default::default(),
                tls: None,
                filters: Filters::Http(http),
            }],
            default_chain: None,
            tls_inspector: Inspector::Off,
            http_inspector: Inspector::Off,
            detection_timeout_ms: 0,
            access_log: None,
        };
        out.listeners.insert(name, Arc::new(listener));
    }
    for (n, variant) in &world.2 {
        let table = RouteTable {
            name: format!("r{n}"),
            hosts: vec![],
            ignore_port_in_host: *variant == 1,
            on_demand: false,
        };
        out.routes.insert(table.name.clone(), Arc::new(table));
    }
    out
}

/// What the proxy holds.
#[derive(Default)]
struct Proxy(BTreeMap<(ResourceType, String), Decoded>);

impl Proxy {
    fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Upsert(decoded) => {
                    let key = match decoded {
                        Decoded::Cluster(c) => (ResourceType::Cluster, c.name.clone()),
                        Decoded::Endpoints(e) => (ResourceType::Endpoints, e.cluster.clone()),
                        Decoded::Listener(l) => (ResourceType::Listener, l.name.clone()),
                        Decoded::Routes(r) => (ResourceType::Routes, r.name.clone()),
                        Decoded::VirtualHost(name, _) => (ResourceType::VirtualHosts, name.clone()),
                        Decoded::Secret(s) => (ResourceType::Secret, s.name.clone()),
                        Decoded::Destinations(d) => (ResourceType::Destinations, d.name.clone()),
                    };
                    self.0.insert(key, decoded.clone());
                }
                Change::Missing(kind, name) => {
                    assert!(!self.0.contains_key(&(*kind, name.clone())), "{kind} {name} is there");
                }
                Change::Remove(kind, name) => {
                    assert!(
                        self.0.remove(&(*kind, name.clone())).is_some(),
                        "{kind} {name} was not there"
                    );
                }
            }
        }
    }
}

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// The control plane has a new state.
    World(World),
    /// The stream breaks and is opened anew.
    Break,
    /// The proxy refuses the next response.
    Refuse,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![4 => world().prop_map(Step::World), 1 => Just(Step::Break), 1 => Just(Step::Refuse)];
    proptest::collection::vec(step, 1..12)
}

/// Moves messages until both sides are silent.
fn settle(server: &mut DeltaServer, client: &mut DeltaClient, proxy: &mut Proxy, set: &ResourceSet, refuse: &mut bool) {
    for _ in 0..1000 {
        let responses = server.poll(set);
        if responses.is_empty() {
            return;
        }
        for response in responses {
            let pending = client.on_response(response).expect("our own encoding decodes");
            let answers = if std::mem::take(refuse) {
                vec![client.reject(pending, "told to")]
            } else {
                proxy.apply(&pending.changes);
                let accepted = client.accept(pending);
                proxy.apply(&accepted.forgotten);
                accepted.requests
            };
            for answer in answers {
                server.on_request(answer).unwrap();
            }
        }
    }
    panic!("client and server never fall silent");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens on the way, in the end the proxy holds what the control plane has, as far as it is referred to.
    #[test]
    fn proxies_end_up_with_the_last_state(steps in steps(), last in world()) {
        let mut client = DeltaClient::new(Node::default());
        let mut proxy = Proxy::default();
        let mut server = DeltaServer::new("id");
        let mut set = ResourceSet::default();
        let mut refuse = false;
        for request in client.start() {
            server.on_request(request).unwrap();
        }
        for step in steps {
            match step {
                Step::World(world) => set = ResourceSet::new(&snapshot(&world), [], &Options::default(), Some(&set)),
                Step::Refuse => refuse = true,
                Step::Break => {
                    server = DeltaServer::new("other");
                    for request in client.start() {
                        server.on_request(request).unwrap();
                    }
                }
            }
            settle(&mut server, &mut client, &mut proxy, &set, &mut refuse);
        }
        // A last stream without refusals; what was refused before is tried again there.
        let snapshot = snapshot(&last);
        set = ResourceSet::new(&snapshot, [], &Options::default(), None);
        server = DeltaServer::new("last");
        for request in client.start() {
            server.on_request(request).unwrap();
        }
        settle(&mut server, &mut client, &mut proxy, &set, &mut false);

        let names = |kind| -> Vec<String> {
            proxy.0.keys().filter(|(k, _)| *k == kind).map(|(_, n)| n.clone()).collect()
        };
        prop_assert_eq!(names(ResourceType::Cluster), snapshot.clusters.keys().cloned().collect::<Vec<_>>());
        prop_assert_eq!(names(ResourceType::Listener), snapshot.listeners.keys().cloned().collect::<Vec<_>>());
        for (name, cluster) in &snapshot.clusters {
            let held = &proxy.0[&(ResourceType::Cluster, name.clone())];
            prop_assert_eq!(held, &Decoded::Cluster(cluster.as_ref().clone()));
            let Discovery::Eds { service } = &cluster.discovery else { unreachable!() };
            let held = proxy.0.contains_key(&(ResourceType::Endpoints, service.clone()));
            prop_assert_eq!(held, snapshot.endpoints.contains_key(service), "endpoints {}", service);
        }
        for listener in snapshot.listeners.values() {
            let Filters::Http(http) = &listener.chains[0].filters else { unreachable!() };
            let RouteSource::Named(name) = &http.routes else { unreachable!() };
            let held = proxy.0.get(&(ResourceType::Routes, name.clone()));
            let wanted = snapshot.routes.get(name).map(|t| Decoded::Routes(t.as_ref().clone()));
            prop_assert_eq!(held, wanted.as_ref(), "routes {}", name);
        }
        let refused = server.take_events().iter().any(|e| matches!(e, StreamEvent::Nacked { .. }));
        prop_assert!(!refused);
    }
}

#[test]
fn a_resource_that_cannot_be_read_refuses_its_response_by_name() {
    let client = DeltaClient::new(Node::default());
    let cluster = generate::sample(generate::cluster());
    let resource = |name: &str, any| envoy_types::pb::envoy::service::discovery::v3::Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(any),
        ..Default::default()
    };
    let good = crate::encode::cluster(&cluster, &Options::default());
    let mut bad = good.clone();
    bad.value.push(0xff);
    let response = |resources| DeltaDiscoveryResponse {
        type_url: ResourceType::Cluster.url().into(),
        nonce: "7".into(),
        resources,
        ..DeltaDiscoveryResponse::default()
    };
    let refusal = client
        .on_response(response(vec![
            resource(&cluster.name, good.clone()),
            resource("broken", bad),
        ]))
        .unwrap_err();
    assert!(refusal.message.contains("broken"), "{}", refusal.message);
    assert_eq!(refusal.request.response_nonce, "7");
    assert_eq!(refusal.request.error_detail.as_ref().unwrap().message, refusal.message);
    let refusal = client
        .on_response(response(vec![resource("another name", good.clone())]))
        .unwrap_err();
    assert!(refusal.message.contains("another name"), "{}", refusal.message);
    assert!(
        client
            .on_response(response(vec![resource(&cluster.name, good)]))
            .is_ok()
    );
}

/// Secrets of the local agent are not asked for, and what a listener asked for goes with it.
#[test]
fn own_secrets_are_not_asked_for() {
    use mantlet_model::tls::{ServerTls, TlsVersion};

    let mut listener = generate::sample(generate::listener_with_http());
    listener.default_chain = None;
    listener.chains[0].tls = Some(ServerTls {
        certificate: "default".into(),
        trust_bundle: Some("file-root:system".into()),
        client_sans: vec![],
        require_client_certificate: false,
        alpn: vec![],
        min_version: TlsVersion::V1_2,
        ciphers: vec![],
    });
    let Filters::Http(http) = &mut listener.chains[0].filters else {
        panic!("HTTP chain expected");
    };
    http.routes = RouteSource::Named("r".into());
    let response = |resources, removed| DeltaDiscoveryResponse {
        type_url: ResourceType::Listener.url().into(),
        nonce: "1".into(),
        resources,
        removed_resources: removed,
        ..DeltaDiscoveryResponse::default()
    };
    let resource = envoy_types::pb::envoy::service::discovery::v3::Resource {
        name: listener.name.clone(),
        version: "1".into(),
        resource: Some(crate::encode::listener(&listener, &Options::default())),
        ..Default::default()
    };
    let mut client = DeltaClient::new(Node::default());
    assert_eq!(client.start().len(), 2);
    let mut proxy = Proxy::default();
    let pending = client.on_response(response(vec![resource], vec![])).unwrap();
    proxy.apply(&pending.changes);
    let accepted = client.accept(pending);
    assert!(accepted.forgotten.is_empty());
    let asked: Vec<_> = accepted
        .requests
        .iter()
        .flat_map(|r| &r.resource_names_subscribe)
        .collect();
    assert_eq!(asked, ["r"], "own secrets are not subscribed to");

    let pending = client
        .on_response(response(vec![], vec![listener.name.clone()]))
        .unwrap();
    proxy.apply(&pending.changes);
    proxy.apply(&client.accept(pending).forgotten);
    assert!(proxy.0.is_empty(), "{:?}", proxy.0.keys());
}
