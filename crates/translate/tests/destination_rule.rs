//! Clients of the mesh: which DestinationRule counts and what TLS comes of it (S1.60–S1.118), one test per group of facts.

mod support;

use std::collections::BTreeMap;

use mantlet_model::cluster::{Cluster, ClusterTls, Discovery};
use mantlet_model::tls::{ClientTls, SanMatch};
use mantlet_translate::destination_rule::{Client, applied};
use mantlet_translate::translate;
use mantlet_translate::world::World;
use serde_json::{Value, json};
use support::{add, pod, router, service, sidecar, world};

const HOST: &str = "web.shop.svc.cluster.local";
const ROOT: &str = "istio-system";

/// A service `web` in `shop` with one pod in the mesh, and a client pod in `client`.
fn shop() -> World {
    let mut world = world("");
    add(&mut world, &pod("web", "shop", "10.0.0.2", true));
    for object in service("web", "shop", "10.96.0.2", ("http", 80, 8080), "10.0.0.2") {
        add(&mut world, &object);
    }
    add(&mut world, &pod("client", "client", "10.0.0.1", true));
    world
}

fn rule(name: &str, namespace: &str, age: u32, spec: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": format!("2026-01-01T00:00:{age:02}Z")},
        "spec": spec})
}

fn tls(host: &str, mode: &str) -> Value {
    json!({"host": host, "trafficPolicy": {"tls": {"mode": mode}}})
}

fn with(rules: &[Value]) -> World {
    let mut world = shop();
    for rule in rules {
        add(&mut world, rule);
    }
    world
}

/// The cluster of `web:80` (and a subset) as the sidecar of a pod `client` in a namespace gets it.
fn cluster_of(world: &World, namespace: &str, subset: &str) -> Cluster {
    let node = sidecar("client-1", namespace, "10.0.0.1", &[("app", "client")]);
    let snapshot = translate(world, &node);
    let name = format!("outbound|80|{subset}|{HOST}");
    let found = snapshot.clusters.get(&name);
    found.unwrap_or_else(|| panic!("no {name}")).as_ref().clone()
}

/// What the client does: `auto`, `plain`, `mesh` (mesh certificates, always), `simple` (no own certificate), `mutual`, or `refused`.
fn does(world: &World, namespace: &str) -> &'static str {
    kind(&cluster_of(world, namespace, ""))
}

fn kind(cluster: &Cluster) -> &'static str {
    match &cluster.tls {
        ClusterTls::Auto(_) => "auto",
        ClusterTls::Plain if matches!(&cluster.discovery, Discovery::Static(none) if none.is_empty()) => "refused",
        ClusterTls::Plain => "plain",
        ClusterTls::Always(tls) => match tls.certificate.as_deref() {
            Some("default") => "mesh",
            Some(_) => "mutual",
            None => "simple",
        },
    }
}

fn client_tls(cluster: &Cluster) -> &ClientTls {
    match &cluster.tls {
        ClusterTls::Always(tls) | ClusterTls::Auto(tls) => tls,
        ClusterTls::Plain => panic!("plaintext: {cluster:?}"),
    }
}

fn exact(names: &[&str]) -> Vec<SanMatch> {
    names.iter().map(|n| SanMatch::Exact(n.to_string())).collect()
}

#[test]
fn s1_100_short_hosts_are_of_the_rules_own_namespace() {
    for (host, namespace, counts) in [
        ("web", "shop", true),
        ("web", "client", false),
        (HOST, "client", true),
        ("web.shop", "client", false),
        ("*.shop.svc.cluster.local", "client", true),
        ("WEB.shop.svc.cluster.local", "client", true),
    ] {
        let world = with(&[rule("r", namespace, 1, tls(host, "DISABLE"))]);
        let want = if counts { "plain" } else { "auto" };
        assert_eq!(does(&world, "client"), want, "{host} in {namespace}");
    }
}

#[test]
fn s1_101_client_then_service_then_root_namespace() {
    let client = rule("c", "client", 3, tls(HOST, "DISABLE"));
    let own = rule("s", "shop", 2, tls(HOST, "ISTIO_MUTUAL"));
    let root = rule("r", ROOT, 1, tls(HOST, "SIMPLE"));
    let third = rule("o", "other", 1, tls(HOST, "DISABLE"));
    assert_eq!(does(&with(&[client, own.clone(), root.clone()]), "client"), "plain");
    assert_eq!(does(&with(&[own, root.clone()]), "client"), "mesh");
    assert_eq!(does(&with(&[root, third.clone()]), "client"), "simple");
    // Rules of namespaces that have nothing to do with the call do not count.
    assert_eq!(does(&with(&[third]), "client"), "auto");
}

#[test]
fn s1_101_a_client_of_the_root_namespace_sees_only_private_rules_of_it_first() {
    let own = rule("s", "shop", 2, tls(HOST, "ISTIO_MUTUAL"));
    let public = rule("r", ROOT, 1, tls(HOST, "DISABLE"));
    let private = rule("r", ROOT, 1, {
        let mut spec = tls(HOST, "DISABLE");
        spec["exportTo"] = json!(["."]);
        spec
    });
    assert_eq!(does(&with(&[own.clone(), public.clone()]), ROOT), "mesh");
    assert_eq!(does(&with(&[own, private]), ROOT), "plain");
    assert_eq!(does(&with(&[public]), ROOT), "plain");
}

#[test]
fn s1_102_nothing_merges_across_namespaces() {
    let client = rule(
        "c",
        "client",
        1,
        json!({"host": HOST, "subsets": [{"name": "mine", "labels": {}}]}),
    );
    let mut spec = tls(HOST, "DISABLE");
    spec["subsets"] = json!([{"name": "theirs", "labels": {}}]);
    let world = with(&[client, rule("s", "shop", 1, spec)]);
    assert_eq!(does(&world, "client"), "auto", "the service's rule is not looked at");
    let service = world.service(HOST, "client").unwrap();
    let labels = BTreeMap::new();
    let found = applied(
        &world,
        Client {
            namespace: "client",
            labels: &labels,
        },
        service,
    )
    .unwrap();
    assert_eq!(found.subsets.iter().map(|s| &*s.name).collect::<Vec<_>>(), ["mine"]);
}

#[test]
fn s1_103_exact_hosts_beat_wildcards_and_longer_wildcards_shorter_ones() {
    let all = [
        rule("a", ROOT, 1, tls("*", "SIMPLE")),
        rule("b", ROOT, 2, tls("*.local", "DISABLE")),
        rule("c", ROOT, 3, tls("*.shop.svc.cluster.local", "ISTIO_MUTUAL")),
        rule("d", ROOT, 4, json!({"host": HOST})),
    ];
    for (count, want) in [(1, "simple"), (2, "plain"), (3, "mesh"), (4, "auto")] {
        assert_eq!(does(&with(&all[..count]), "client"), want, "{count} rules");
    }
}

#[test]
fn s1_104_the_mesh_wide_switch_and_its_exceptions() {
    for (mode, want) in [("ISTIO_MUTUAL", "mesh"), ("DISABLE", "plain")] {
        let switch = rule("default", ROOT, 1, tls("*.local", mode));
        assert_eq!(does(&with(std::slice::from_ref(&switch)), "client"), want);
        // Any more specific rule of the client or the service overrides it entirely, even one without TLS.
        for namespace in ["client", "shop"] {
            let other = rule("r", namespace, 2, json!({"host": HOST}));
            assert_eq!(does(&with(&[switch.clone(), other]), "client"), "auto", "{namespace}");
        }
    }
}

#[test]
fn s1_105_rules_of_one_host_are_joined() {
    let policy = |mode: &str| json!({"tls": {"mode": mode}});
    let rules = [
        rule(
            "b",
            "shop",
            2,
            json!({"host": HOST, "trafficPolicy": policy("DISABLE"),
            "subsets": [{"name": "v1", "labels": {"v": "2"}}, {"name": "v2", "labels": {}}]}),
        ),
        rule(
            "a",
            "shop",
            1,
            json!({"host": "web", "subsets": [{"name": "v1", "labels": {"app": "web"}}]}),
        ),
        rule(
            "c",
            "shop",
            3,
            json!({"host": HOST, "trafficPolicy": policy("ISTIO_MUTUAL")}),
        ),
    ];
    let world = with(&rules);
    // The oldest has no policy, so the next one's counts; the youngest's never.
    assert_eq!(does(&world, "client"), "plain");
    // Of a subset's name the first one counts: it selects by `app`, so it has the pod.
    let node = sidecar("client-1", "client", "10.0.0.1", &[]);
    let snapshot = translate(&world, &node);
    let endpoints = |subset: &str| {
        snapshot.endpoints[&format!("outbound|80|{subset}|{HOST}")]
            .endpoints
            .len()
    };
    assert_eq!((endpoints("v1"), endpoints("v2")), (1, 1));
}

#[test]
fn s1_106_rules_with_other_audiences_are_not_joined() {
    let mut first = json!({"host": HOST, "subsets": [{"name": "v1", "labels": {}}]});
    first["exportTo"] = json!(["client", "."]);
    let second = tls(HOST, "DISABLE");
    let world = with(&[rule("a", "shop", 1, first), rule("b", "shop", 2, second)]);
    assert_eq!(
        does(&world, "client"),
        "auto",
        "the first one that it sees counts alone"
    );
    assert_eq!(
        does(&world, "other"),
        "plain",
        "whoever does not see the first has the second"
    );
}

#[test]
fn s1_107_rules_that_select_clients() {
    let mut selecting = tls(HOST, "DISABLE");
    selecting["workloadSelector"] = json!({"matchLabels": {"app": "client"}});
    let mut other = tls(HOST, "SIMPLE");
    other["workloadSelector"] = json!({"matchLabels": {"app": "somebody"}});
    let general = tls(HOST, "ISTIO_MUTUAL");
    // It beats older rules without a selector, and takes nothing from them.
    let world = with(&[
        rule("a", "client", 1, general.clone()),
        rule("b", "client", 2, selecting.clone()),
        rule("c", "client", 3, other.clone()),
    ]);
    assert_eq!(does(&world, "client"), "plain");
    // Other clients of the namespace have the general one.
    let labels = BTreeMap::new();
    let service = world.service(HOST, "client").unwrap();
    let rules = applied(
        &world,
        Client {
            namespace: "client",
            labels: &labels,
        },
        service,
    )
    .unwrap();
    assert!(!rules.selects_clients);
    // It is private: in the service's namespace it is nothing to clients of others.
    assert_eq!(does(&with(&[rule("b", "shop", 1, selecting)]), "client"), "auto");
    // A namespace that has rules for the host, none of them for this client, is still the one that counts.
    let world = with(&[rule("c", "client", 1, other), rule("d", "shop", 1, general)]);
    assert_eq!(does(&world, "client"), "auto");
}

#[test]
fn s1_108_s1_109_visibility() {
    let export = |list: Value| {
        let mut spec = tls(HOST, "DISABLE");
        spec["exportTo"] = list;
        with(&[
            rule("r", "shop", 1, spec),
            rule("root", ROOT, 1, tls(HOST, "ISTIO_MUTUAL")),
        ])
    };
    for (list, want) in [
        (json!([]), "plain"),
        (json!(["*"]), "plain"),
        (json!(["client"]), "plain"),
        // Not for this client: the lookup goes on to the root namespace.
        (json!(["."]), "mesh"),
        (json!(["other"]), "mesh"),
    ] {
        assert_eq!(does(&export(list.clone()), "client"), want, "{list}");
    }
    // Absent: what the mesh says.
    let mut world = world("kind: MeshConfig\nspec: {defaultDestinationRuleExportTo: ['.']}");
    for object in [pod("web", "shop", "10.0.0.2", true)].into_iter().chain(service(
        "web",
        "shop",
        "10.96.0.2",
        ("http", 80, 8080),
        "10.0.0.2",
    )) {
        add(&mut world, &object);
    }
    add(&mut world, &rule("r", "shop", 1, tls(HOST, "DISABLE")));
    assert_eq!(does(&world, "client"), "auto");
    assert_eq!(does(&world, "shop"), "plain");
}

#[test]
fn s1_110_to_s1_112_ports_replace_the_block_and_subsets_override_by_field() {
    let port = |mut entry: Value| {
        entry["port"] = json!({"number": 80});
        json!([entry])
    };
    // An entry without TLS is "unset", not inherited.
    let spec =
        json!({"host": HOST, "trafficPolicy": {"tls": {"mode": "DISABLE"}, "portLevelSettings": port(json!({}))}});
    assert_eq!(does(&with(&[rule("r", "shop", 1, spec)]), "client"), "auto");
    let spec = json!({"host": HOST, "trafficPolicy": {"tls": {"mode": "DISABLE"},
        "portLevelSettings": port(json!({"tls": {"mode": "ISTIO_MUTUAL"}}))}});
    assert_eq!(does(&with(&[rule("r", "shop", 1, spec)]), "client"), "mesh");
    // The number is the service's, not the workload's.
    let spec = json!({"host": HOST, "trafficPolicy": {"portLevelSettings": [{"port": {"number": 8080}, "tls": {"mode": "DISABLE"}}]}});
    assert_eq!(does(&with(&[rule("r", "shop", 1, spec)]), "client"), "auto");
    let subset = |policy: Value| {
        let spec = json!({"host": HOST, "trafficPolicy": {"tls": {"mode": "DISABLE"}},
            "subsets": [{"name": "v1", "labels": {}, "trafficPolicy": policy}]});
        kind(&cluster_of(&with(&[rule("r", "shop", 1, spec)]), "client", "v1"))
    };
    assert_eq!(subset(json!({})), "plain", "inherited");
    assert_eq!(subset(json!({"tls": {"mode": "ISTIO_MUTUAL"}})), "mesh");
    assert_eq!(
        subset(json!({"portLevelSettings": port(json!({}))})),
        "auto",
        "replaced as a block"
    );
}

#[test]
fn s1_60_s1_61_s1_68_automatic_mtls_follows_the_servers_namespace() {
    let pa = |namespace: &str, spec: Value| {
        json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "p", "namespace": namespace}, "spec": spec})
    };
    for mode in ["STRICT", "PERMISSIVE"] {
        assert_eq!(
            does(&with(&[pa("shop", json!({"mtls": {"mode": mode}}))]), "client"),
            "auto"
        );
    }
    for namespace in ["shop", ROOT] {
        let disabled = with(&[pa(namespace, json!({"mtls": {"mode": "DISABLE"}}))]);
        assert_eq!(does(&disabled, "client"), "plain", "{namespace}");
    }
    assert_eq!(
        does(&with(&[pa("client", json!({"mtls": {"mode": "DISABLE"}}))]), "client"),
        "auto"
    );
    // A workload's own policy is applied per endpoint.
    let selected = with(&[pa(
        "shop",
        json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "DISABLE"}}),
    )]);
    assert_eq!(does(&selected, "client"), "auto");
    let node = sidecar("client-1", "client", "10.0.0.1", &[]);
    let endpoint = |world: &World| translate(world, &node).endpoints[&format!("outbound|80||{HOST}")].endpoints[0].mtls;
    assert!(!endpoint(&selected));
    assert!(endpoint(&shop()));
    let ports = json!({"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"8080": {"mode": "DISABLE"}}});
    assert!(!endpoint(&with(&[pa("shop", ports)])));
    // S1.66, S1.69: a rule with TLS settings decides for all endpoints, whatever the server wants.
    let strict = pa("shop", json!({"mtls": {"mode": "STRICT"}}));
    let world = with(&[strict, rule("r", "shop", 1, tls(HOST, "DISABLE"))]);
    assert_eq!(does(&world, "client"), "plain");
    assert!(!endpoint(&world));
    assert!(endpoint(&with(&[rule("r", "shop", 1, tls(HOST, "ISTIO_MUTUAL"))])));
}

#[test]
fn s1_64_s1_65_only_labelled_endpoints_get_mtls() {
    let node = sidecar("client-1", "client", "10.0.0.1", &[]);
    let mtls = |label: Option<&str>| {
        let mut world = shop();
        let mut object = pod("web", "shop", "10.0.0.2", false);
        if let Some(label) = label {
            object["metadata"]["labels"]["security.istio.io/tlsMode"] = json!(label);
        }
        add(&mut world, &object);
        translate(&world, &node).endpoints[&format!("outbound|80||{HOST}")].endpoints[0].mtls
    };
    assert!(mtls(Some("istio")));
    for label in [None, Some("disabled"), Some("Istio"), Some("")] {
        assert!(!mtls(label), "{label:?}");
    }
}

#[test]
fn s1_80_s1_82_s1_86_mesh_tls_has_istios_names() {
    let cluster = cluster_of(&shop(), "client", "");
    let auto = client_tls(&cluster);
    assert_eq!(auto.sni, format!("outbound_.80_._.{HOST}"));
    assert_eq!(auto.alpn, ["istio-peer-exchange", "istio"]);
    assert_eq!(auto.server_sans, exact(&["spiffe://cluster.local/ns/shop/sa/web"]));
    assert_eq!(
        (auto.certificate.as_deref(), auto.trust_bundle.as_deref()),
        (Some("default"), Some("ROOTCA"))
    );
    assert!(cluster.alpn_override, "S1.83: mesh TLS follows the request's protocol");
    // A subset has its own SNI; S1.81: a rule's SNI replaces it; S1.89: its names replace the generated ones.
    let spec = json!({"host": HOST, "subsets": [{"name": "v1", "labels": {}}],
        "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}});
    let world = with(&[rule("r", "shop", 1, spec)]);
    assert_eq!(
        client_tls(&cluster_of(&world, "client", "v1")).sni,
        format!("outbound_.80_.v1_.{HOST}")
    );
    let spec = json!({"host": HOST, "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL", "sni": "mine.example",
        "subjectAltNames": ["spiffe://other/ns/a/sa/b"]}}});
    let cluster = cluster_of(&with(&[rule("r", "shop", 1, spec)]), "client", "");
    assert_eq!(client_tls(&cluster).sni, "mine.example");
    assert_eq!(client_tls(&cluster).server_sans, exact(&["spiffe://other/ns/a/sa/b"]));
}

#[test]
fn s1_87_s1_88_s1_90_expected_servers_follow_accounts_annotations_and_aliases() {
    let mut world = world("kind: MeshConfig\nspec: {trustDomain: td, trustDomainAliases: [old]}");
    add(&mut world, &pod("web", "shop", "10.0.0.2", true));
    let [mut object, slice] = service("web", "shop", "10.96.0.2", ("http", 80, 8080), "10.0.0.2");
    object["metadata"]["annotations"] = json!({
        "alpha.istio.io/kubernetes-serviceaccounts": "extra",
        "alpha.istio.io/canonical-serviceaccounts": "spiffe://elsewhere/ns/x/sa/y",
    });
    add(&mut world, &object);
    add(&mut world, &slice);
    let names = |world: &World| client_tls(&cluster_of(world, "client", "")).server_sans.clone();
    assert_eq!(
        names(&world),
        exact(&[
            "spiffe://elsewhere/ns/x/sa/y",
            "spiffe://old/ns/shop/sa/extra",
            "spiffe://old/ns/shop/sa/web",
            "spiffe://td/ns/shop/sa/extra",
            "spiffe://td/ns/shop/sa/web",
        ])
    );
    // Another account of the same pod: the list follows.
    let mut moved = pod("web", "shop", "10.0.0.2", true);
    moved["spec"]["serviceAccountName"] = json!("web2");
    add(&mut world, &moved);
    assert!(names(&world).contains(&SanMatch::Exact("spiffe://td/ns/shop/sa/web2".into())));
    assert!(!names(&world).contains(&SanMatch::Exact("spiffe://td/ns/shop/sa/web".into())));
}

fn with_tls(settings: Value) -> Cluster {
    let spec = json!({"host": HOST, "trafficPolicy": {"tls": settings}});
    cluster_of(&with(&[rule("r", "shop", 1, spec)]), "client", "")
}

#[test]
fn s1_113_to_s1_115_one_way_and_mutual_tls() {
    let cluster = with_tls(json!({"mode": "SIMPLE"}));
    assert_eq!(
        *client_tls(&cluster),
        ClientTls {
            certificate: None,
            trust_bundle: Some("file-root:system".into()),
            server_sans: exact(&[HOST]),
            sni: HOST.into(),
            alpn: Vec::new(),
            min_version: Default::default(),
        }
    );
    assert!(!cluster.alpn_override, "S1.83");
    let cluster = with_tls(json!({"mode": "SIMPLE", "caCertificates": "/ca.pem", "sni": "x.example"}));
    assert_eq!(client_tls(&cluster).trust_bundle.as_deref(), Some("file-root:/ca.pem"));
    assert_eq!(client_tls(&cluster).sni, "x.example");
    let cluster = with_tls(
        json!({"mode": "MUTUAL", "clientCertificate": "/c.pem", "privateKey": "/k.pem", "subjectAltNames": ["y"]}),
    );
    assert_eq!(
        client_tls(&cluster).certificate.as_deref(),
        Some("file-cert:/c.pem~/k.pem")
    );
    assert_eq!(client_tls(&cluster).server_sans, exact(&["y"]));
    // Without a certificate Istio would build a cluster that sends plaintext; here nothing is sent.
    for settings in [
        json!({"mode": "MUTUAL"}),
        json!({"mode": "MUTUAL", "clientCertificate": "/c.pem"}),
        json!({"mode": "MUTUAL", "privateKey": "/k.pem"}),
        // Revocation lists are not supported: accepting what they revoke would be worse than sending nothing.
        json!({"mode": "SIMPLE", "caCrl": "/crl.pem"}),
    ] {
        assert_eq!(kind(&with_tls(settings.clone())), "refused", "{settings}");
    }
}

#[test]
fn s1_114_skipping_verification_drops_chain_and_names() {
    for settings in [
        json!({"mode": "SIMPLE", "insecureSkipVerify": true}),
        json!({"mode": "SIMPLE", "insecureSkipVerify": true, "subjectAltNames": ["x"], "caCertificates": "/ca.pem"}),
    ] {
        let cluster = with_tls(settings.clone());
        assert_eq!(client_tls(&cluster).trust_bundle, None, "{settings}");
        assert!(client_tls(&cluster).server_sans.is_empty(), "{settings}");
    }
    let cluster = with_tls(json!({"mode": "SIMPLE", "insecureSkipVerify": false}));
    assert!(client_tls(&cluster).trust_bundle.is_some());
}

#[test]
fn s1_116_named_credentials_on_sidecars_need_a_selector() {
    let settings = json!({"mode": "MUTUAL", "credentialName": "cred"});
    assert_eq!(
        kind(&with_tls(settings.clone())),
        "refused",
        "Istio would send plaintext"
    );
    let mut spec = json!({"host": HOST, "trafficPolicy": {"tls": settings}});
    let gateway_rule = rule("g", ROOT, 1, spec.clone());
    spec["workloadSelector"] = json!({"matchLabels": {"app": "client"}});
    let cluster = cluster_of(&with(&[rule("r", "client", 1, spec)]), "client", "");
    assert_eq!(client_tls(&cluster).certificate.as_deref(), Some("kubernetes://cred"));
    assert_eq!(
        client_tls(&cluster).trust_bundle.as_deref(),
        Some("kubernetes://cred-cacert")
    );
    // Gateways take it always.
    let mut world = with(&[gateway_rule]);
    add(
        &mut world,
        &json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway",
        "metadata": {"name": "g", "namespace": ROOT},
        "spec": {"selector": {"istio": "ingress"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}}),
    );
    add(
        &mut world,
        &json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": {"name": "v", "namespace": ROOT},
        "spec": {"hosts": ["*"], "gateways": ["g"], "http": [{"route": [{"destination": {"host": HOST}}]}]}}),
    );
    let mut gateway = pod("gw", ROOT, "10.0.0.8", false);
    gateway["metadata"]["labels"] = json!({"istio": "ingress"});
    add(&mut world, &gateway);
    let node = router("gw-1", ROOT, "10.0.0.8", &[("istio", "ingress")]);
    let snapshot = translate(&world, &node);
    let cluster = &snapshot.clusters[&format!("outbound|80||{HOST}")];
    assert_eq!(kind(cluster), "mutual");
}

#[test]
fn s1_60_services_outside_of_the_mesh_and_meshes_without_automatic_mtls() {
    let mut world = world("kind: MeshConfig\nspec: {enableAutoMtls: false}");
    add(&mut world, &pod("web", "shop", "10.0.0.2", true));
    for object in service("web", "shop", "10.96.0.2", ("http", 80, 8080), "10.0.0.2") {
        add(&mut world, &object);
    }
    assert_eq!(does(&world, "client"), "plain");
    add(&mut world, &rule("r", "shop", 1, tls(HOST, "ISTIO_MUTUAL")));
    assert_eq!(does(&world, "client"), "mesh");

    let mut world = shop();
    add(
        &mut world,
        &json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "e", "namespace": "shop"},
        "spec": {"hosts": ["api.example.com"], "location": "MESH_EXTERNAL", "resolution": "STATIC",
            "subjectAltNames": ["other.example.com"],
            "ports": [{"number": 443, "name": "http", "protocol": "HTTP"}], "endpoints": [{"address": "192.0.2.1"}]}}),
    );
    let node = sidecar("client-1", "client", "10.0.0.1", &[]);
    let of = |world: &World| {
        translate(world, &node).clusters["outbound|443||api.example.com"]
            .as_ref()
            .clone()
    };
    assert_eq!(kind(&of(&world)), "plain");
    // S1.115: the entry's names stand in for the rule's.
    add(&mut world, &rule("r", "shop", 1, tls("api.example.com", "SIMPLE")));
    assert_eq!(client_tls(&of(&world)).server_sans, exact(&["other.example.com"]));
}

#[test]
fn s1_71_headless_services_are_all_or_nothing() {
    let headless = |second_in_mesh: bool| {
        let mut world = world("");
        add(&mut world, &pod("web", "shop", "10.0.0.2", true));
        add(&mut world, &pod("web2", "shop", "10.0.0.3", second_in_mesh));
        let [mut object, mut slice] = service("web", "shop", "None", ("http", 80, 8080), "10.0.0.2");
        object["spec"]["clusterIPs"] = json!(["None"]);
        let mut second = slice["endpoints"][0].clone();
        second["addresses"] = json!(["10.0.0.3"]);
        second["targetRef"]["name"] = json!("web2-1");
        slice["endpoints"].as_array_mut().unwrap().push(second);
        add(&mut world, &object);
        add(&mut world, &slice);
        kind(&cluster_of(&world, "client", ""))
    };
    assert_eq!(headless(true), "mesh");
    assert_eq!(headless(false), "plain");
}

#[test]
fn s1_72_pass_through_never_uses_tls() {
    let world = with(&[rule("r", ROOT, 1, tls("*", "ISTIO_MUTUAL"))]);
    let snapshot = translate(&world, &sidecar("client-1", "client", "10.0.0.1", &[]));
    for name in ["PassthroughCluster", "BlackHoleCluster", "InboundPassthroughCluster"] {
        assert_eq!(snapshot.clusters[name].tls, ClusterTls::Plain, "{name}");
    }
}
