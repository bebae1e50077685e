//! Policies as users write them → what the proxy decides, through translation and the engine (SEMANTICS 2b–2f).

mod support;

use std::collections::BTreeMap;

use mantlet_model::authz::{Connection, Engine, HttpView, Verdict};
use mantlet_model::ext_authz::{CustomStage, Then};
use mantlet_translate::authz::{Form, Target, custom, filters};
use mantlet_translate::world::World;
use support::world;

#[derive(Default, Clone)]
struct Request {
    method: &'static str,
    host: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
}

impl HttpView for Request {
    fn method(&self) -> &str {
        self.method
    }
    fn authority(&self) -> &str {
        self.host
    }
    fn path(&self) -> &str {
        self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(k, v)| *k == name && f(v.as_bytes()))
    }
    fn claims(&self) -> Option<&serde_json::Value> {
        None
    }
}

fn get(path: &'static str) -> Request {
    Request {
        method: "GET",
        host: "web",
        path,
        headers: vec![],
    }
}

struct Case {
    world: World,
    labels: BTreeMap<String, String>,
}

impl Case {
    /// A workload `app: web` in `default`, with these policies.
    fn new(specs: &[&str]) -> Case {
        let yaml: String = specs
            .iter()
            .enumerate()
            .map(|(i, spec)| {
                format!(
                    "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{i}}}\nspec: {spec}\n---\n"
                )
            })
            .collect();
        Case {
            world: world(&yaml),
            labels: BTreeMap::from([("app".to_string(), "web".to_string())]),
        }
    }

    fn decide(&self, peer: Option<&str>, port: u16, request: Option<&Request>) -> bool {
        let target = Target {
            namespace: "default",
            labels: &self.labels,
            gateway: false,
        };
        let form = if request.is_some() { Form::Http } else { Form::Tcp };
        let engine = Engine::new(&filters(&self.world, target, form));
        let uris: Vec<String> = peer.iter().map(|p| format!("spiffe://cluster.local/{p}")).collect();
        let connection = Connection {
            peer_uris: &uris,
            source: "10.0.0.7".parse().unwrap(),
            remote: "10.0.0.7".parse().unwrap(),
            destination: format!("10.0.0.1:{port}").parse().unwrap(),
            sni: None,
        };
        let view = request.map(|r| r as &dyn HttpView);
        // Nobody is there to be asked in these worlds, so every CUSTOM stage denies.
        let custom = custom(&self.world, target, form);
        assert!(custom.iter().all(|s| s.then == Then::Deny), "{custom:?}");
        let stages: Vec<_> = custom.iter().map(CustomStage::selector).collect();
        Engine::new(&stages).decide(&connection, view).verdict == Verdict::Allowed
            && engine.decide(&connection, view).verdict == Verdict::Allowed
    }

    fn http(&self, peer: Option<&str>, request: Request) -> bool {
        self.decide(peer, 8080, Some(&request))
    }

    fn tcp(&self, peer: Option<&str>, port: u16) -> bool {
        self.decide(peer, port, None)
    }
}

const A: Option<&str> = Some("ns/a/sa/x");
const B: Option<&str> = Some("ns/b/sa/y");

#[test]
fn empty_specs_and_empty_rules() {
    // spec, HTTP allowed, TCP allowed (table in 2b).
    for (spec, http, tcp) in [
        ("{}", false, false),
        ("{rules: []}", false, false),
        ("{rules: [{}]}", true, true),
        ("{action: DENY}", true, true),
        ("{action: DENY, rules: [{}]}", false, false),
        ("{action: AUDIT}", true, true),
        ("{action: AUDIT, rules: [{}]}", true, true),
        ("{action: CUSTOM, provider: {name: p}}", true, true),
        ("{action: CUSTOM, provider: {name: p}, rules: [{}]}", false, false),
    ] {
        let case = Case::new(&[spec]);
        assert_eq!(case.http(A, get("/")), http, "{spec} HTTP");
        assert_eq!(case.tcp(A, 9000), tcp, "{spec} TCP");
    }
    let nothing = Case::new(&[]);
    assert!(nothing.http(None, get("/")) && nothing.tcp(None, 1));
}

#[test]
fn deny_comes_first_and_any_allow_flips_the_default() {
    let case = Case::new(&[
        "{rules: [{from: [{source: {namespaces: [a]}}]}]}",
        "{rules: [{to: [{operation: {paths: [/public]}}]}]}",
        "{action: DENY, rules: [{to: [{operation: {paths: [/private]}}]}]}",
    ]);
    assert!(case.http(A, get("/x")));
    assert!(!case.http(B, get("/x")), "S2.29");
    assert!(case.http(B, get("/public")));
    assert!(case.http(None, get("/public")));
    assert!(!case.http(A, get("/private")));
}

#[test]
fn rules_are_or_sections_and_values_or_not_fields_and() {
    let case = Case::new(&[
        "{rules: [{from: [{source: {namespaces: [a, b], notPrincipals: [cluster.local/ns/b/sa/y]}}], to: [{operation: {methods: [GET], notPaths: [\"/x*\"]}}]}]}",
    ]);
    assert!(case.http(A, get("/")));
    assert!(!case.http(B, get("/")));
    assert!(!case.http(A, get("/x1")));
    assert!(!case.http(
        A,
        Request {
            method: "PUT",
            ..get("/")
        }
    ));
}

#[test]
fn identity_fields_and_plaintext_peers() {
    let authenticated = Case::new(&["{rules: [{from: [{source: {principals: [\"*\"]}}]}]}"]);
    assert!(authenticated.http(A, get("/")));
    assert!(!authenticated.http(None, get("/")), "trap 12");
    let not_x = Case::new(&["{rules: [{from: [{source: {notPrincipals: [cluster.local/ns/a/sa/x]}}]}]}"]);
    assert!(!not_x.http(A, get("/")));
    assert!(not_x.http(B, get("/")));
    assert!(not_x.http(None, get("/")), "S2.60: a client without identity is not x");
    let deny_plaintext = Case::new(&["{action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]}"]);
    assert!(deny_plaintext.http(A, get("/")));
    assert!(!deny_plaintext.http(None, get("/")));
    assert!(!deny_plaintext.tcp(None, 1));
}

#[test]
fn tcp_reduction() {
    // S2.80, S2.81, S2.85: spec → allowed on TCP port 9000 and 9001, for peer A.
    for (spec, on_9000, on_9001) in [
        ("{rules: [{to: [{operation: {paths: [/a]}}]}]}", false, false),
        ("{rules: [{to: [{operation: {notPaths: [/a]}}]}]}", false, false),
        ("{rules: [{to: [{operation: {ports: ['9000']}}]}]}", true, false),
        (
            "{rules: [{to: [{operation: {methods: [GET]}}]}, {from: [{source: {namespaces: [a]}}]}]}",
            true,
            true,
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
            false,
            false,
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {notPaths: [/a]}}]}]}",
            false,
            false,
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {paths: [/x], ports: ['9000']}}]}]}",
            false,
            true,
        ),
        (
            "{action: DENY, rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}",
            false,
            false,
        ),
        (
            "{action: DENY, rules: [{when: [{key: 'request.headers[x]', values: [yes-it-is]}, {key: source.namespace, values: [b]}]}]}",
            true,
            true,
        ),
    ] {
        let case = Case::new(&[spec]);
        assert_eq!((case.tcp(A, 9000), case.tcp(A, 9001)), (on_9000, on_9001), "{spec}");
    }
}

#[test]
fn bad_values_narrow_allow_and_widen_everything_else() {
    let allow = Case::new(&["{rules: [{to: [{operation: {ports: [http, '8080']}}]}]}"]);
    assert!(!allow.http(A, get("/")), "S2.82: the whole rule goes");
    let deny = Case::new(&["{action: DENY, rules: [{to: [{operation: {ports: [http]}}]}]}"]);
    assert!(!deny.http(A, get("/")), "S2.82: the value goes, the rule matches all");
    let unknown = Case::new(&["{rules: [{when: [{key: no.such, values: [x]}]}]}"]);
    assert!(!unknown.http(A, get("/")));
    // Istio drops the rule here (S2.70); denying is the safe direction.
    let unknown = Case::new(&["{action: DENY, rules: [{when: [{key: no.such, values: [x]}]}]}"]);
    assert!(!unknown.http(A, get("/")));
}

#[test]
fn unreadable_policies_deny_on_their_target_only() {
    let on_web = Case::new(&["{selector: {matchLabels: {app: web}}, action: MAYBE}"]);
    assert!(!on_web.http(A, get("/")) && !on_web.tcp(A, 1));
    let elsewhere = Case::new(&["{selector: {matchLabels: {app: other}}, action: MAYBE}"]);
    assert!(elsewhere.http(A, get("/")));
    let unknown_target = Case::new(&["{selector: 7, rules: []}"]);
    assert!(!unknown_target.http(A, get("/")));
}

#[test]
fn hosts_methods_headers() {
    let case = Case::new(&[
        "{rules: [{to: [{operation: {hosts: [Shop.Example.com]}}], when: [{key: 'request.headers[X-Role]', values: [admin]}]}]}",
    ]);
    let request = |host, headers| Request {
        host,
        headers,
        ..get("/")
    };
    assert!(case.http(A, request("shop.example.COM", vec![("x-role", "admin")])));
    assert!(
        !case.http(A, request("shop.example.com:8080", vec![("x-role", "admin")])),
        "S2.54"
    );
    assert!(!case.http(A, request("shop.example.com", vec![("x-role", "user,admin")])));
    assert!(case.http(
        A,
        request("shop.example.com", vec![("x-role", "user"), ("x-role", "admin")])
    ));
    assert!(!case.http(A, request("shop.example.com", vec![])));
}

#[test]
fn dry_run_never_decides() {
    let yaml = |annotation: &str, spec: &str| {
        world(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, annotations: {{istio.io/dry-run: '{annotation}'}}}}\nspec: {spec}\n"
        ))
    };
    for (annotation, spec, allowed) in [
        ("true", "{}", true),
        ("T", "{action: DENY, rules: [{}]}", true),
        ("false", "{}", false),
        ("maybe", "{}", false),
    ] {
        let case = Case {
            world: yaml(annotation, spec),
            labels: BTreeMap::new(),
        };
        assert_eq!(case.http(A, get("/")), allowed, "{annotation} {spec}");
    }
}

#[test]
fn root_policies_bind_everywhere_and_target_refs_nowhere_on_sidecars() {
    let bound = |namespace: &str, extra: &str| {
        let case = Case {
            world: world(&format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {{{extra}}}\n"
            )),
            labels: BTreeMap::from([("app".to_string(), "web".to_string())]),
        };
        !case.http(A, get("/"))
    };
    assert!(bound("istio-system", ""));
    assert!(bound("istio-system", "selector: {matchLabels: {app: web}}"), "G4");
    assert!(!bound("istio-system", "selector: {matchLabels: {app: other}}"));
    assert!(bound("default", ""));
    assert!(!bound("other", ""));
    assert!(!bound("default", "targetRefs: [{kind: Service, name: web}]"), "S2.4");
}
