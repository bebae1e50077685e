//! One case per fact of SEMANTICS 2a, 2b, 2c, 2d, 2f, 2i and 2j: policies as YAML in, a decision out. Facts about CUSTOM are in
//! `custom.rs`, facts about the wire in the proxy's tests.

mod support;

use std::collections::BTreeMap;

use mantlet_model::authz::{Action, AuthzFilter, Connection, Engine, HttpView, Verdict};
use mantlet_model::listener::Filters;
use mantlet_translate::authz::{Form, Target, bound, filters, problems};
use mantlet_translate::world::World;
use support::world;

struct Get<'a>(&'a str, &'a str, &'a [(&'a str, &'a str)]);

impl HttpView for Get<'_> {
    fn method(&self) -> &str {
        self.0
    }
    fn authority(&self) -> &str {
        "web:80"
    }
    fn path(&self) -> &str {
        self.1
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.2.iter().any(|(n, v)| *n == name && f(v.as_bytes()))
    }
    fn claims(&self) -> Option<&serde_json::Value> {
        None
    }
}

/// Policies as `namespace/name: spec` or `namespace/name dry-run=VALUE: spec`, one a line.
fn policies(lines: &str) -> World {
    let mut yaml = String::new();
    for line in lines.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let (head, spec) = line.split_once(": ").unwrap();
        let (name, annotations) = match head.split_once(" dry-run=") {
            Some((name, value)) => (name, format!("{{istio.io/dry-run: '{value}'}}")),
            None => (head, "{}".to_string()),
        };
        let (namespace, name) = name.split_once('/').unwrap();
        yaml.push_str(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {namespace}, annotations: {annotations}}}\nspec: {spec}\n---\n"
        ));
    }
    world(&yaml)
}

fn labels(app: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("app".to_string(), app.to_string())])
}

fn of(world: &World, namespace: &str, app: &str, form: Form) -> Vec<AuthzFilter> {
    let labels = labels(app);
    let target = Target {
        namespace,
        labels: &labels,
        gateway: false,
    };
    filters(world, target, form)
}

fn decide(filters: &[AuthzFilter], peer: &str, port: u16, http: Option<&Get<'_>>) -> bool {
    let uris: Vec<String> = match peer {
        "" => Vec::new(),
        peer => vec![format!("spiffe://{peer}")],
    };
    let connection = Connection {
        peer_uris: &uris,
        source: "10.1.2.3".parse().unwrap(),
        remote: "192.0.2.9".parse().unwrap(),
        destination: format!("10.0.0.1:{port}").parse().unwrap(),
        sni: Some("web.example.com"),
    };
    let engine = Engine::new(filters);
    engine.decide(&connection, http.map(|h| h as &dyn HttpView)).verdict == Verdict::Allowed
}

const A: &str = "cluster.local/ns/a/sa/x";

/// Decisions about `GET /a/b`, as the peer, to port 8080 of `app: web` in `default`.
#[test]
fn facts_about_requests() {
    for (fact, lines, peer, want) in [
        ("S2.1 own namespace", "other/p: {}", A, true),
        ("S2.1 own namespace", "default/p: {}", A, false),
        (
            "S2.1 selector",
            "default/p: {selector: {matchLabels: {app: other}}}",
            A,
            true,
        ),
        ("S2.1 root namespace", "istio-system/p: {}", A, false),
        (
            "S2.2 ALLOW of the namespace does not cancel DENY of the mesh",
            "default/a: {rules: [{}]}\nistio-system/d: {action: DENY, rules: [{}]}",
            A,
            false,
        ),
        (
            "S2.2 DENY of the namespace does not cancel ALLOW of the mesh",
            "default/d: {action: DENY, rules: [{}]}\nistio-system/a: {rules: [{}]}",
            A,
            false,
        ),
        (
            "S2.2 ALLOW of either admits",
            "default/a: {}\nistio-system/a: {rules: [{}]}",
            A,
            true,
        ),
        (
            "S2.4 targets are not for sidecars",
            "default/p: {targetRefs: [{kind: Service, name: web}]}",
            A,
            true,
        ),
        (
            "S2.20 AUDIT decides nothing",
            "default/p: {action: AUDIT, rules: [{}]}",
            A,
            true,
        ),
        (
            "S2.20 DENY before ALLOW",
            "default/a: {rules: [{}]}\ndefault/d: {action: DENY, rules: [{to: [{operation: {paths: [/a/*]}}]}]}",
            A,
            false,
        ),
        (
            "S2.26 absent action is ALLOW",
            "default/p: {rules: [{to: [{operation: {paths: [/x]}}]}]}",
            A,
            false,
        ),
        ("S2.28 deny-all of the mesh", "istio-system/p: {}", "", false),
        (
            "S2.30 any rule",
            "default/p: {rules: [{to: [{operation: {paths: [/x]}}]}, {to: [{operation: {methods: [GET]}}]}]}",
            A,
            true,
        ),
        (
            "S2.30 from and to",
            "default/p: {rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {paths: [/x]}}]}]}",
            A,
            false,
        ),
        (
            "S2.31 fields are ANDed",
            "default/p: {rules: [{to: [{operation: {paths: [/a/b], methods: [POST]}}]}]}",
            A,
            false,
        ),
        (
            "S2.31 values are ORed",
            "default/p: {rules: [{to: [{operation: {paths: [/x, /a/b]}}]}]}",
            A,
            true,
        ),
        (
            "S2.31 not",
            "default/p: {rules: [{to: [{operation: {paths: [/a/*], notPaths: [/x, /a/b]}}]}]}",
            A,
            false,
        ),
        (
            "S2.32 the same key twice",
            "default/p: {rules: [{when: [{key: destination.port, values: ['8080']}, {key: destination.port, values: ['1']}]}]}",
            A,
            false,
        ),
        (
            "S2.32 values and notValues",
            "default/p: {rules: [{when: [{key: source.ip, values: [10.0.0.0/8], notValues: [10.1.2.3]}]}]}",
            A,
            false,
        ),
        (
            "S2.33 when holds for every from",
            "default/p: {rules: [{from: [{source: {namespaces: [b]}}, {source: {namespaces: [a]}}], when: [{key: connection.sni, values: ['*.example.com']}]}]}",
            A,
            true,
        ),
        (
            "S2.34 empty lists are any",
            "default/p: {rules: [{from: [], to: []}]}",
            A,
            true,
        ),
        (
            "S2.35 an empty source is anyone",
            "default/p: {rules: [{from: [{source: {}}]}]}",
            "",
            true,
        ),
        (
            "S2.40 suffix",
            "default/p: {rules: [{to: [{operation: {paths: ['*/b']}}]}]}",
            A,
            true,
        ),
        (
            "S2.43 case",
            "default/p: {rules: [{to: [{operation: {paths: [/A/b]}}]}]}",
            A,
            false,
        ),
        (
            "S2.43 hosts ignore case",
            "default/p: {rules: [{to: [{operation: {hosts: ['WEB:80']}}]}]}",
            A,
            true,
        ),
        (
            "S2.44 a scheme never matches",
            "default/p: {rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/a/sa/x']}}]}]}",
            A,
            false,
        ),
        (
            "S2.45 any trust domain",
            "default/p: {rules: [{from: [{source: {principals: ['*/ns/a/sa/x']}}]}]}",
            "td/ns/a/sa/x",
            true,
        ),
        (
            "S2.45 presence",
            "default/p: {rules: [{from: [{source: {principals: ['*']}}]}]}",
            "",
            false,
        ),
        (
            "S2.46 no certificate, no match",
            "default/p: {rules: [{from: [{source: {principals: ['*/x']}}]}]}",
            "",
            false,
        ),
        (
            "S2.48 namespaces",
            "default/p: {rules: [{from: [{source: {namespaces: ['a*']}}]}]}",
            "cluster.local/ns/ab/sa/x",
            true,
        ),
        (
            "S2.49 own namespace's account",
            "default/p: {rules: [{from: [{source: {serviceAccounts: [x]}}]}]}",
            A,
            false,
        ),
        (
            "S2.49 account",
            "default/p: {rules: [{from: [{source: {serviceAccounts: [a/x]}}]}]}",
            "any/ns/a/sa/x",
            true,
        ),
        (
            "S2.50 trust domain",
            "default/p: {rules: [{from: [{source: {trustDomains: ['*.local']}}]}]}",
            A,
            true,
        ),
        (
            "S2.51 host bits are masked",
            "default/p: {rules: [{from: [{source: {ipBlocks: [10.1.9.9/16]}}]}]}",
            "",
            true,
        ),
        (
            "S2.52 remote address",
            "default/p: {rules: [{from: [{source: {remoteIpBlocks: [192.0.2.0/24]}}]}]}",
            "",
            true,
        ),
        (
            "S2.54 the port belongs to the host",
            "default/p: {rules: [{to: [{operation: {hosts: [web]}}]}]}",
            A,
            false,
        ),
        (
            "S2.55 methods",
            "default/p: {rules: [{to: [{operation: {methods: [get]}}]}]}",
            A,
            false,
        ),
        (
            "S2.56 paths",
            "default/p: {rules: [{to: [{operation: {paths: [/a/b]}}]}]}",
            A,
            true,
        ),
        (
            "S2.57 template",
            "default/p: {rules: [{to: [{operation: {paths: ['/a/{*}']}}]}]}",
            A,
            true,
        ),
        (
            "S2.58 template",
            "default/p: {rules: [{to: [{operation: {paths: ['/a/b/{**}']}}]}]}",
            A,
            false,
        ),
        (
            "S2.59 the workload's port",
            "default/p: {rules: [{to: [{operation: {ports: ['80']}}]}]}",
            A,
            false,
        ),
        (
            "S2.60 not-forms match plaintext",
            "default/p: {rules: [{from: [{source: {notPrincipals: [x]}}]}]}",
            "",
            true,
        ),
        (
            "S2.60 deny plaintext",
            "default/p: {action: DENY, rules: [{from: [{source: {notPrincipals: ['*']}}]}]}",
            "",
            false,
        ),
        (
            "S2.61 plaintext against principals",
            "default/p: {rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/x]}}]}]}",
            "",
            false,
        ),
        (
            "S2.65 deny unless a token",
            "default/p: {action: DENY, rules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]}",
            A,
            false,
        ),
        (
            "S2.75 notValues of claims",
            "default/p: {rules: [{when: [{key: 'request.auth.claims[a]', notValues: [x]}]}]}",
            A,
            true,
        ),
        (
            "S2.82 a bad CIDR drops the ALLOW rule",
            "default/p: {rules: [{from: [{source: {ipBlocks: [10.0.0.0/8, bad]}}]}]}",
            A,
            false,
        ),
        (
            "S2.82 a bad CIDR widens DENY",
            "default/p: {action: DENY, rules: [{from: [{source: {ipBlocks: [bad]}}]}]}",
            A,
            false,
        ),
        (
            "S2.82 a bad port drops the ALLOW rule only",
            "default/p: {rules: [{to: [{operation: {ports: ['x']}}]}, {to: [{operation: {methods: [GET]}}]}]}",
            A,
            true,
        ),
        (
            "S2.82 a bad header key widens DENY",
            "default/p: {action: DENY, rules: [{when: [{key: 'request.headers[a b]', values: [x]}]}]}",
            A,
            false,
        ),
        (
            "S2.122 cluster.local is the own trust domain",
            "default/p: {rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/x]}}]}]}",
            A,
            true,
        ),
        (
            "S2.130 a trial run of DENY",
            "default/p dry-run=true: {action: DENY, rules: [{}]}",
            A,
            true,
        ),
        (
            "S2.130 Go's booleans",
            "default/p dry-run=T: {action: DENY, rules: [{}]}",
            A,
            true,
        ),
        (
            "S2.131 no boolean is enforced",
            "default/p dry-run=yes: {action: DENY, rules: [{}]}",
            A,
            false,
        ),
        ("S2.132 trial runs of ALLOW only", "default/p dry-run=true: {}", A, true),
        (
            "S2.132 beside an enforced one",
            "default/p dry-run=true: {rules: [{}]}\ndefault/q: {}",
            A,
            false,
        ),
        (
            "S2.135 AUDIT is no ALLOW",
            "default/p: {action: AUDIT, rules: [{to: [{operation: {paths: [/x]}}]}]}",
            A,
            true,
        ),
    ] {
        let world = policies(lines);
        let filters = of(&world, "default", "web", Form::Http);
        let request = Get("GET", "/a/b", &[]);
        assert_eq!(decide(&filters, peer, 8080, Some(&request)), want, "{fact}\n{lines}");
    }
}

/// Decisions about a connection to port 9000.
#[test]
fn facts_about_connections() {
    for (fact, lines, peer, want) in [
        (
            "S2.80 an HTTP field drops the ALLOW rule",
            "default/p: {rules: [{to: [{operation: {paths: [/x]}}]}]}",
            A,
            false,
        ),
        (
            "S2.80 also a negative one",
            "default/p: {rules: [{to: [{operation: {notMethods: [GET]}}]}]}",
            A,
            false,
        ),
        (
            "S2.80 other rules stay",
            "default/p: {rules: [{to: [{operation: {paths: [/x]}}]}, {from: [{source: {namespaces: [a]}}]}]}",
            A,
            true,
        ),
        (
            "S2.81 DENY with HTTP fields only denies all",
            "default/p: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            A,
            false,
        ),
        (
            "S2.81 what is left decides",
            "default/p: {action: DENY, rules: [{to: [{operation: {paths: [/x], ports: ['9001']}}]}]}",
            A,
            true,
        ),
        (
            "S2.81 what is left decides",
            "default/p: {action: DENY, rules: [{to: [{operation: {paths: [/x], ports: ['9000']}}]}]}",
            A,
            false,
        ),
        (
            "S2.81 AUDIT",
            "default/p: {action: AUDIT, rules: [{to: [{operation: {paths: [/x]}}]}]}",
            A,
            true,
        ),
        (
            "S2.83 the reduced form",
            "default/p: {rules: [{to: [{operation: {ports: ['9000']}}]}]}",
            "",
            true,
        ),
        (
            "S2.85 DENY notPaths",
            "default/p: {action: DENY, rules: [{to: [{operation: {notPaths: [/x]}}]}]}",
            A,
            false,
        ),
        (
            "S2.85 DENY requestPrincipals",
            "default/p: {action: DENY, rules: [{from: [{source: {requestPrincipals: [i/s]}}]}]}",
            A,
            false,
        ),
        (
            "2f a claim",
            "default/p: {rules: [{when: [{key: 'request.auth.claims[a]', values: [x]}]}]}",
            A,
            false,
        ),
        (
            "2f a header",
            "default/p: {rules: [{when: [{key: 'request.headers[a]', values: [x]}]}]}",
            A,
            false,
        ),
        (
            "2f sni is no HTTP",
            "default/p: {rules: [{when: [{key: connection.sni, values: [web.example.com]}]}]}",
            "",
            true,
        ),
    ] {
        let filters = of(&policies(lines), "default", "web", Form::Tcp);
        assert_eq!(decide(&filters, peer, 9000, None), want, "{fact}\n{lines}");
    }
}

#[test]
fn order_of_policies_and_filters() {
    let world = policies(
        "default/a: {rules: [{}]}\nistio-system/z: {action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}\ndefault/l: {action: AUDIT, rules: [{}]}",
    );
    let labels = labels("web");
    let target = Target {
        namespace: "default",
        labels: &labels,
        gateway: false,
    };
    let names: Vec<&str> = bound(&world, target).map(|p| p.meta.name.as_str()).collect();
    assert_eq!(names, ["z", "a", "l"], "S2.3: the root namespace first");
    let actions: Vec<Action> = filters(&world, target, Form::Http).iter().map(|f| f.action).collect();
    assert_eq!(actions, [Action::Log, Action::Deny, Action::Allow], "S2.25");
    let ids: Vec<String> = filters(&world, target, Form::Http)
        .iter()
        .flat_map(|f| &f.rules)
        .map(|r| r.id.clone())
        .collect();
    assert!(
        ids.contains(&"ns[istio-system]-policy[z]-rule[0]".to_string()),
        "S2.93: {ids:?}"
    );
}

#[test]
fn gateways_of_the_kubernetes_api_are_targets() {
    let gateway = |policy: &str, name: Option<&str>| {
        let world = policies(policy);
        let mut labels = labels("gw");
        if let Some(name) = name {
            labels.insert("gateway.networking.k8s.io/gateway-name".into(), name.into());
        }
        let target = Target {
            namespace: "default",
            labels: &labels,
            gateway: true,
        };
        !filters(&world, target, Form::Http).is_empty()
    };
    let to = |group: &str, kind: &str, name: &str, more: &str| {
        format!("default/p: {{targetRefs: [{{group: '{group}', kind: {kind}, name: {name}{more}}}]}}")
    };
    const GROUP: &str = "gateway.networking.k8s.io";
    assert!(gateway(&to(GROUP, "Gateway", "gw", ""), Some("gw")), "S2.5");
    assert!(!gateway(&to(GROUP, "Gateway", "gw", ""), Some("other")), "S2.5");
    assert!(
        !gateway(&to(GROUP, "Gateway", "gw", ""), None),
        "S2.10: no Kubernetes Gateway"
    );
    assert!(
        !gateway(&to("", "Service", "gw", ""), Some("gw")),
        "S2.6: for waypoints"
    );
    assert!(
        !gateway(&to(GROUP, "Gateway", "gw", ", namespace: other"), Some("gw")),
        "S2.8"
    );
    assert!(
        gateway("default/p: {}", Some("gw")),
        "S2.5: without targets by selector"
    );
    assert!(
        gateway("default/p: {selector: {matchLabels: {app: gw}}}", None),
        "S2.10"
    );
    let both = format!(
        "default/p: {{targetRef: {{group: {GROUP}, kind: Gateway, name: gw}}, targetRefs: [{{group: {GROUP}, kind: Gateway, name: other}}]}}"
    );
    assert!(!gateway(&both, Some("gw")), "S2.7: the singular counts only alone");
    let many = format!(
        "default/p: {{targetRefs: [{{group: {GROUP}, kind: Gateway, name: other}}, {{group: {GROUP}, kind: Gateway, name: gw}}]}}"
    );
    assert!(gateway(&many, Some("gw")), "S2.9");
}

#[test]
fn policies_are_on_all_inbound_chains_and_on_no_outbound_one() {
    let mut world = policies("default/p: {}");
    world.set_pod(&serde_json::from_value(support::pod("web", "default", "10.0.0.1", true)).unwrap());
    for object in support::service("web", "default", "10.96.0.1", ("http", 80, 8080), "10.0.0.1") {
        support::add(&mut world, &object);
    }
    let node = support::sidecar("web-1", "default", "10.0.0.1", &[("app", "web")]);
    let snapshot = mantlet_translate::translate(&world, &node);
    let mut seen = (0, 0);
    for (name, listener) in &snapshot.listeners {
        for chain in listener.all_chains() {
            let authz = match &chain.filters {
                Filters::Http(http) => &http.authz,
                Filters::Tcp(tcp) => &tcp.authz,
            };
            if name != "virtualInbound" {
                assert!(authz.is_empty(), "S2.11: {name} {}", chain.name);
                seen.1 += 1;
            } else if chain.name != "virtualInbound-blackhole" {
                assert!(!authz.is_empty(), "S2.12, S2.29: {}", chain.name);
                seen.0 += 1;
            }
        }
    }
    assert!(seen.0 > 4 && seen.1 > 2, "{seen:?}");
}

#[test]
fn trust_domains_and_aliases() {
    let with = |principals: &str, field: &str| {
        let mut world = policies(&format!(
            "default/p: {{rules: [{{from: [{{source: {{{field}: [{principals}]}}}}]}}]}}"
        ));
        let mesh = mantlet_translate::mesh::Mesh {
            trust_domain: "new".into(),
            trust_domain_aliases: vec!["old".into(), "older-td".into()],
            ..world.mesh().clone()
        };
        world.set_mesh(mesh);
        let filters = of(&world, "default", "web", Form::Http);
        move |peer: &str| decide(&filters, peer, 8080, Some(&Get("GET", "/", &[])))
    };
    for own in ["new/ns/a/sa/x", "old/ns/a/sa/x", "cluster.local/ns/a/sa/x"] {
        let allowed = with(own, "principals");
        for peer in ["new/ns/a/sa/x", "old/ns/a/sa/x", "older-td/ns/a/sa/x"] {
            assert!(allowed(peer), "S2.122: {own} {peer}");
        }
        assert!(
            !allowed("foreign/ns/a/sa/x") && !allowed("new/ns/a/sa/y"),
            "S2.122: {own}"
        );
    }
    assert!(
        !with("cluster.local/ns/a/sa/x", "principals")("cluster.local/ns/a/sa/x"),
        "S2.122: replaced, not added"
    );
    let foreign = with("foreign/ns/a/sa/x", "principals");
    assert!(
        foreign("foreign/ns/a/sa/x") && !foreign("new/ns/a/sa/x"),
        "S2.123: others stay"
    );
    let suffix = with("'*-td/ns/a/sa/x'", "principals");
    assert!(suffix("older-td/ns/a/sa/x") && suffix("new/ns/a/sa/x"), "S2.123");
    let few = with("'new/*'", "principals");
    assert!(
        few("new/ns/a/sa/x") && !few("old/ns/a/sa/x"),
        "S2.124: fewer parts are not expanded"
    );
    let four = with("new/ns/a/*", "principals");
    assert!(!four("old/ns/a/sa/x"), "S2.121: four parts");
    let inner = with("'new/ns/a/sa/*'", "principals");
    assert!(inner("old/ns/a/sa/x"), "S2.121: wildcards inside parts");
    let member = with("new", "trustDomains");
    assert!(member("old/ns/a/sa/x") && !member("foreign/ns/a/sa/x"), "S2.120");
    let plain = with("cluster.local", "trustDomains");
    assert!(
        !plain("new/ns/a/sa/x") && plain("cluster.local/ns/a/sa/x"),
        "S2.120: not special here"
    );
    let namespaces = with("a", "namespaces");
    assert!(namespaces("foreign/ns/a/sa/x"), "S2.120: ignores the trust domain");
}

#[test]
fn accepted_identities_follow_the_aliases() {
    let mut world = policies("default/p: {}");
    let mesh = mantlet_translate::mesh::Mesh {
        trust_domain: "new".into(),
        trust_domain_aliases: vec!["old".into()],
        ..world.mesh().clone()
    };
    world.set_mesh(mesh);
    let node = support::sidecar("web-1", "default", "10.0.0.1", &[("app", "web")]);
    let snapshot = mantlet_translate::translate(&world, &node);
    let mut found = 0;
    for chain in snapshot.listeners["virtualInbound"].all_chains() {
        if let Some(tls) = &chain.tls {
            let accepts = |uri: &str| tls.client_sans.iter().any(|san| san.matches(uri));
            assert!(
                accepts("spiffe://new/ns/a/sa/x") && accepts("spiffe://old/ns/a/sa/x"),
                "S2.125"
            );
            assert!(!accepts("spiffe://foreign/ns/a/sa/x"), "S1.25");
            found += 1;
        }
    }
    assert!(found > 0);
}

#[test]
fn statuses_say_what_is_not_in_force_as_written() {
    for (lines, part) in [
        ("default/p dry-run=yes: {rules: [{}]}", "no boolean"),
        (
            "default/p: {rules: [{from: [{source: {ipBlocks: [bad]}}]}]}",
            "allows nothing",
        ),
        (
            "default/p: {action: DENY, rules: [{from: [{source: {ipBlocks: [bad]}}]}]}",
            "matches more",
        ),
        (
            "default/p: {rules: nonsense}",
            "everything is denied on what it selects",
        ),
    ] {
        let world = policies(lines);
        let found = problems(&world, &world.authorization_policies("default")[0]);
        assert!(found.iter().any(|p| p.message.contains(part)), "{lines}: {found:?}");
    }
}
