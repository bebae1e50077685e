//! Former kinds: the cases of SEMANTICS 7, and properties over generated objects and requests.
//!
//! Three answers are compared: the world with the former objects, the world with what `migrate` writes, and an evaluator that reads
//! the former objects by their own rules (`legacy_naive`) and shares no code with the conversion.

mod legacy_naive;
mod support;

use std::collections::BTreeMap;

use legacy_naive::{Naive, Question};
use mantlet_model::authz::{Connection, Engine, HttpView, Verdict};
use mantlet_translate::authz::{Form, Target, filters};
use mantlet_translate::legacy::migrate::{Migration, migrate};
use mantlet_translate::legacy::{self, Weight};
use mantlet_translate::peer_authentication::{Mode, effective};
use mantlet_translate::world::World;
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{add, documents, world};

/// Three services of namespace `shop`, one of them with a port that speaks no HTTP.
const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, clusterIP: 10.0.0.1, ports: [{name: http, port: 80, targetPort: 8080}, {name: http-admin, port: 90, targetPort: admin}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api, version: v1}, clusterIP: 10.0.0.2, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {selector: {app: db}, clusterIP: 10.0.0.3, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-redis, port: 6379, targetPort: 6379}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web, tier: front}}
spec: {serviceAccountName: web, containers: [{name: c, ports: [{name: admin, containerPort: 9090}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, labels: {app: api, version: v1}}
spec: {serviceAccountName: api, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db-1, namespace: shop, labels: {app: db}}
spec: {serviceAccountName: db, containers: [{name: c}]}
"#;

fn shop(more: &str) -> World {
    world(&format!("{SHOP}---\n{more}"))
}

fn labels(app: &str) -> BTreeMap<String, String> {
    let pairs: &[(&str, &str)] = match app {
        "web" => &[("app", "web"), ("tier", "front")],
        "api" => &[("app", "api"), ("version", "v1")],
        _ => &[("app", "db")],
    };
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// The world with the written objects in the place of the former ones.
fn migrated(base: &str, old: &World) -> (World, Migration) {
    let migration = migrate(old);
    let mut new = world(base);
    for written in &migration.objects {
        let object = through_yaml(&written.object);
        let errors: Vec<String> = mantlet_api::validate::object(&object)
            .into_iter()
            .filter(|f| f.severity == mantlet_api::diagnostic::Severity::Error)
            .map(|f| format!("{}: {f}", f.path))
            .collect();
        assert!(errors.is_empty(), "{object}\n{errors:?}");
        add(&mut new, &object);
    }
    (new, migration)
}

fn through_yaml(object: &Value) -> Value {
    let text = mantlet_api::yaml::write(object);
    let back = mantlet_api::yaml::read_one(&text).unwrap();
    assert_eq!(back, *object, "{text}");
    back
}

struct View<'a>(&'a Question);

impl HttpView for View<'_> {
    fn method(&self) -> &str {
        &self.0.method
    }
    fn authority(&self) -> &str {
        &self.0.host
    }
    fn path(&self) -> &str {
        &self.0.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.0
            .header
            .as_ref()
            .is_some_and(|v| name == "x-role" && f(v.as_bytes()))
    }
    fn claims(&self) -> Option<&Value> {
        self.0.claims.as_ref()
    }
}

/// Whether the world lets a request through. A token counts if its issuer is known to the workload.
fn allowed(world: &World, question: &Question) -> bool {
    let labels = labels(question.app);
    let target = Target {
        namespace: "shop",
        labels: &labels,
        gateway: false,
    };
    let mut question = question.clone();
    let issuer = question.claims.as_ref().map(|c| c["iss"].clone());
    let known = [world.mesh().root_namespace.as_str(), "shop"]
        .into_iter()
        .flat_map(|ns| world.request_authentications(ns))
        .filter(|r| mantlet_api::selector::selects(r.spec.selector.as_ref(), &labels))
        .flat_map(|r| &r.spec.jwt_rules)
        .any(|rule| issuer.as_ref().is_some_and(|i| *i == json!(rule.issuer)));
    if !known {
        question.claims = None;
    }
    let form = if question.http { Form::Http } else { Form::Tcp };
    let mut filters = filters(world, target, form);
    // How a token itself is checked is not the question here.
    for filter in &mut filters {
        filter.rules.retain(|r| !r.id.contains("request-authentication"));
    }
    let engine = Engine::new(&filters);
    let uris: Vec<String> = question.peer.iter().map(|p| format!("spiffe://{p}")).collect();
    let connection = Connection {
        peer_uris: &uris,
        source: question.ip.parse().unwrap(),
        remote: question.ip.parse().unwrap(),
        destination: ([10, 0, 0, 9], question.port).into(),
        sni: None,
    };
    let view = View(&question);
    let http = question.http.then_some(&view as &dyn HttpView);
    engine.decide(&connection, http).verdict == Verdict::Allowed
}

fn question(app: &'static str) -> Question {
    Question {
        app,
        port: 8080,
        http: true,
        peer: Some("cluster.local/ns/shop/sa/web".into()),
        ip: "10.1.0.1".into(),
        method: "GET".into(),
        host: "web".into(),
        path: "/a".into(),
        header: None,
        claims: None,
    }
}

fn mode(world: &World, app: &str, port: u16) -> Mode {
    effective(world, "shop", &labels(app)).port(port)
}

fn messages(world: &World, kind: &str, name: &str) -> Vec<String> {
    let all = legacy::problems(world);
    let found = all.into_iter().find(|(o, _)| o.kind.name() == kind && o.name == name);
    found.unwrap_or_else(|| panic!("{kind} {name} is not known")).1
}

const MESH_STRICT: &str = "
apiVersion: authentication.istio.io/v1alpha1
kind: MeshPolicy
metadata: {name: default}
spec: {peers: [{mtls: {}}]}
---
";

#[test]
fn the_most_specific_policy_decides_alone() {
    let world = shop(&format!(
        "{MESH_STRICT}
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{name: default, namespace: shop}}
spec: {{peers: [{{mtls: {{mode: PERMISSIVE}}}}]}}
---
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{name: web, namespace: shop}}
spec: {{targets: [{{name: web}}], peers: [{{mtls: null}}]}}
---
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{name: web-admin, namespace: shop}}
spec: {{targets: [{{name: web, ports: [{{name: http-admin}}]}}]}}
"
    ));
    assert_eq!(mode(&world, "web", 8080), Mode::Strict);
    assert_eq!(
        mode(&world, "web", 9090),
        Mode::Disable,
        "a named port of the service, by number of the pod"
    );
    assert_eq!(mode(&world, "api", 8080), Mode::Permissive);
    assert_eq!(
        effective(&world, "other", &BTreeMap::new()).workload,
        Mode::Strict,
        "the mesh's"
    );
    let (new, migration) = migrated(SHOP, &world);
    for (app, port) in [("web", 8080), ("web", 9090), ("api", 8080), ("db", 6379)] {
        assert_eq!(mode(&new, app, port), mode(&world, app, port), "{app} {port}");
    }
    assert_eq!(migration.objects.len(), 3);
    assert!(messages(&world, "MeshPolicy", "default").is_empty());
}

#[test]
fn changes_of_services_and_pods_are_followed() {
    let policy = documents(
        "
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: web, namespace: shop}
spec: {targets: [{name: web}, {name: web, ports: [{number: 90}]}], peers: [{mtls: {}}]}
",
    );
    let mut world = world("");
    add(&mut world, &policy[0]);
    assert!(messages(&world, "Policy", "web")[0].contains("no such Service"));
    assert_eq!(mode(&world, "web", 8080), Mode::Permissive);
    for object in documents(SHOP) {
        add(&mut world, &object);
    }
    assert_eq!(mode(&world, "web", 8080), Mode::Strict);
    assert!(messages(&world, "Policy", "web").is_empty());
    let effect = world.remove_config(mantlet_translate::world::Kind::Policy, "shop", "web");
    assert!(effect.outbound && effect.touches("shop"), "{effect:?}");
    assert_eq!(mode(&world, "web", 8080), Mode::Permissive);
    assert!(world.peer_authentications("shop").is_empty());
}

#[test]
fn modern_objects_win_and_the_status_says_so() {
    let modern = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: PERMISSIVE}}
";
    let mut world = shop(&format!("{MESH_STRICT}{modern}"));
    assert_eq!(mode(&world, "web", 8080), Mode::Permissive);
    assert_eq!(effective(&world, "other", &BTreeMap::new()).workload, Mode::Strict);
    let kind = mantlet_translate::world::Kind::PeerAuthentication;
    assert!(!world.remove_config(kind, "shop", "default").is_none());
    assert_eq!(mode(&world, "web", 8080), Mode::Strict);
    // A modern object of the same name as a converted one is not confused with it.
    let root = documents(&modern.replace("namespace: shop", "namespace: istio-system"));
    add(&mut world, &root[0]);
    assert_eq!(mode(&world, "web", 8080), Mode::Permissive);
    assert!(messages(&world, "MeshPolicy", "default")[0].contains("istio-system/default"));
    assert!(migrate(&world).objects.is_empty(), "it is in force nowhere");
    world.remove_config(kind, "istio-system", "default");
    assert_eq!(mode(&world, "web", 8080), Mode::Strict);
}

const RBAC: &str = r#"
apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {name: default}
spec: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [shop]}}
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRole
metadata: {name: service-viewer, namespace: shop}
spec:
  rules:
  - services: ["*"]
    methods: ["GET"]
    constraints: [{key: "destination.labels[app]", values: ["web", "api"]}]
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {name: viewers, namespace: shop}
spec:
  subjects: [{user: "cluster.local/ns/shop/sa/web"}]
  roleRef: {kind: ServiceRole, name: service-viewer}
"#;

#[test]
fn roles_allow_and_everything_else_is_denied() {
    let world = shop(RBAC);
    let ask = |app: &'static str, change: &dyn Fn(&mut Question)| {
        let mut q = question(app);
        change(&mut q);
        allowed(&world, &q)
    };
    assert!(ask("web", &|_| ()));
    assert!(ask("api", &|_| ()));
    assert!(!ask("db", &|_| ()), "the label is not listed");
    assert!(!ask("web", &|q| q.method = "POST".into()));
    assert!(!ask("web", &|q| q.peer = None));
    assert!(!ask("web", &|q| q.peer = Some("cluster.local/ns/shop/sa/api".into())));
    assert!(!ask("web", &|q| q.http = false), "a rule with methods is none for TCP");
    let names: Vec<&str> = world
        .authorization_policies("shop")
        .iter()
        .map(|p| p.meta.name.as_str())
        .collect();
    assert!(names.contains(&"generated-namespace-deny-all"), "{names:?}");
    assert!(
        names.contains(&"generated-service-viewer-rule0-svc0-target1"),
        "{names:?}"
    );
    assert!(messages(&world, "ServiceRole", "service-viewer").is_empty());
}

#[test]
fn without_a_configuration_roles_say_that_they_are_not_in_force() {
    let only: Vec<&str> = RBAC.split("---\n").skip(1).collect();
    let world = shop(&only.join("---\n"));
    assert!(allowed(&world, &question("db")));
    assert!(messages(&world, "ServiceRole", "service-viewer")[0].contains("no ClusterRbacConfig"));
    let off = shop(&RBAC.replace("ON_WITH_INCLUSION", "\"OFF\""));
    assert!(allowed(&off, &question("db")));
}

#[test]
fn an_allow_policy_of_today_replaces_roles_on_its_workloads_only() {
    let policy = |action: &str| {
        shop(&format!(
            "{RBAC}---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: web}}}}, action: {action}, rules: [{{to: [{{operation: {{methods: [POST]}}}}]}}]}}\n"
        ))
    };
    let post = Question {
        method: "POST".into(),
        ..question("web")
    };
    let allow = policy("ALLOW");
    assert!(allowed(&allow, &post) && !allowed(&allow, &question("web")));
    assert!(allowed(&allow, &question("api")), "other workloads keep the role");
    assert!(messages(&allow, "ServiceRole", "service-viewer")[0].contains("shop/p"));
    for action in ["DENY", "AUDIT"] {
        let world = policy(action);
        assert!(!allowed(&world, &post), "{action}: what no role allows stays denied");
        assert!(allowed(&world, &question("web")), "{action}");
    }
    // As files, both would be in force; the role must not open what the policy leaves shut.
    let (new, _) = migrated(SHOP, &allow);
    assert!(!allowed(&new, &question("web")));
    let text = serde_json::to_string(&migrate(&allow).notes.iter().map(|n| &n.message).collect::<Vec<_>>()).unwrap();
    assert!(text.contains("shop/p"), "{text}");
}

#[test]
fn what_cannot_be_read_or_kept_fails_closed() {
    let broken = shop(
        "
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: web, namespace: shop}
spec: {targets: [{name: web}], peers: [{mtls: {mode: LOOSE}}]}
",
    );
    assert_eq!(mode(&broken, "web", 8080), Mode::Strict);
    assert!(!allowed(&broken, &question("web")) && allowed(&broken, &question("api")));
    assert!(messages(&broken, "Policy", "web")[0].contains("cannot be read"));

    let config = shop(
        "apiVersion: rbac.istio.io/v1alpha1\nkind: ClusterRbacConfig\nmetadata: {name: default}\nspec: {mode: SOME}\n",
    );
    assert!(!allowed(&config, &question("web")));

    for (field, value) in [
        ("constraints", r#"[{key: "destination.user", values: ["x"]}]"#),
        ("constraints", r#"[{key: "destination.labels[app]", values: ["w*"]}]"#),
        ("constraints", r#"[{key: "frobnicate", values: ["x"]}]"#),
        ("paths", r#"["/{*}/x"]"#),
        ("services", r#"["web"]"#),
        ("services", r#"["web.other.svc.cluster.local"]"#),
    ] {
        let rule = if field == "services" {
            format!("{{{field}: {value}}}")
        } else {
            format!("{{services: [\"*\"], {field}: {value}}}")
        };
        let text = RBAC.replace(
            "  - services: [\"*\"]\n    methods: [\"GET\"]\n    constraints: [{key: \"destination.labels[app]\", values: [\"web\", \"api\"]}]",
            &format!("  - {rule}"),
        );
        assert_ne!(text, RBAC);
        let world = shop(&text);
        assert!(!allowed(&world, &question("web")), "{rule}");
        assert!(!messages(&world, "ServiceRole", "service-viewer").is_empty(), "{rule}");
    }

    let regex = shop(
        "
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: default, namespace: shop}
spec: {origins: [{jwt: {issuer: i, jwks: '{}', triggerRules: [{includedPaths: [{regex: '/x.*'}]}]}}]}
",
    );
    assert!(!allowed(&regex, &question("web")));
    assert!(messages(&regex, "Policy", "default")[0].contains("regex"));
}

#[test]
fn roles_of_the_root_namespace_are_bound_from_others_but_never_allow_in_the_mesh() {
    let text = RBAC
        .replace(
            "name: service-viewer, namespace: shop",
            "name: service-viewer, namespace: istio-system",
        )
        .replace(
            "roleRef: {kind: ServiceRole, name: service-viewer}",
            "role: /service-viewer",
        );
    let world = shop(&text);
    assert!(allowed(&world, &question("web")) && !allowed(&world, &question("db")));
    let own = text
        .replace(
            "name: viewers, namespace: shop",
            "name: viewers, namespace: istio-system",
        )
        .replace("role: /service-viewer", "role: service-viewer")
        .replace("namespaces: [shop]", "namespaces: [shop, istio-system]");
    let world = shop(&own);
    assert!(!allowed(&world, &question("web")));
    assert!(messages(&world, "ServiceRole", "service-viewer")[0].contains("mesh's"));
}

#[test]
fn trial_runs_enforce_nothing() {
    let global = shop(&RBAC.replace("mode: ON_WITH", "enforcementMode: PERMISSIVE, mode: ON_WITH"));
    assert!(allowed(&global, &question("db")));
    let one = shop(&RBAC.replace("  subjects:", "  mode: PERMISSIVE\n  subjects:"));
    assert!(
        !allowed(&one, &question("web")),
        "the role is tried out, deny by default is not"
    );
    let (new, migration) = migrated(SHOP, &one);
    assert!(!allowed(&new, &question("web")));
    assert!(
        migration
            .objects
            .iter()
            .any(|w| w.object["metadata"]["annotations"]["istio.io/dry-run"] == "true")
    );
}

#[test]
fn use_origin_makes_principals_those_of_tokens() {
    let world = shop(&format!(
        "{}---\n
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {{name: web, namespace: shop}}
spec: {{targets: [{{name: web}}], origins: [{{jwt: {{issuer: i, jwks: '{{}}'}}}}], principalBinding: USE_ORIGIN}}
",
        RBAC.replace("cluster.local/ns/shop/sa/web", "i/alice")
    ));
    let token = Question {
        claims: Some(json!({"iss": "i", "sub": "alice"})),
        ..question("web")
    };
    assert!(allowed(&world, &token));
    assert!(!allowed(&world, &question("web")));
    assert!(
        !allowed(&world, &Question { app: "api", ..token }),
        "there the principal is the peer's"
    );
}

#[test]
fn tokens_are_required_where_the_policy_says() {
    let world = shop(
        "
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: default, namespace: shop}
spec: {origins: [{jwt: {issuer: 'https://i/x', jwks: '{}', trigger_rules: [{excluded_paths: [{prefix: /public}]}]}}]}
---
apiVersion: authentication.istio.io/v1alpha1
kind: Policy
metadata: {name: api, namespace: shop}
spec: {targets: [{name: api}], peers: [{mtls: {}}]}
",
    );
    let with = |app, path: &str, token: bool| {
        allowed(
            &world,
            &Question {
                path: path.into(),
                claims: token.then(|| json!({"iss": "https://i/x", "sub": "s"})),
                ..question(app)
            },
        )
    };
    assert!(!with("web", "/a", false) && with("web", "/a", true) && with("web", "/public/x", false));
    assert!(with("api", "/a", false), "its own policy has no origins");
    let redis = Question {
        port: 6379,
        http: false,
        ..question("db")
    };
    assert!(allowed(&world, &redis), "a port that speaks no HTTP has no tokens");
    assert!(!with("db", "/a", false));
}

// Generated objects.

fn text(pool: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::sample::select(pool).prop_map(str::to_string)
}

fn texts(pool: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(text(pool), 0..3)
}

const NAMES: &[&str] = &["web", "api", "db"];
const HOSTS: &[&str] = &[
    "*",
    "web.shop.svc.cluster.local",
    "api.shop.svc.cluster.local",
    "db.shop.svc.cluster.local",
    "web*",
    "*.shop.svc.cluster.local",
];
const PEERS: &[&str] = &[
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop/sa/api",
    "cluster.local/ns/other/sa/web",
];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop/*",
    "*/sa/web",
    "allUsers",
    "allAuthenticatedUsers",
];
const METHODS: &[&str] = &["GET", "POST", "P*", "*"];
const PATHS: &[&str] = &["/a", "/a*", "*/c", "/a/b", "*"];
const ASKED: &[&str] = &["/a", "/a/b", "/b/c", "/"];
const IPS: &[&str] = &["10.1.0.0/24", "10.1.0.1", "10.2.0.0/16"];
const NAMESPACES: &[&str] = &["shop", "other", "sh*"];

fn mtls() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!([])),
        Just(json!([{"mtls": {}}])),
        Just(json!([{"mtls": null}])),
        Just(json!([{"mtls": {"mode": "PERMISSIVE"}}])),
    ]
}

fn string_match() -> impl Strategy<Value = Value> {
    prop_oneof![
        text(&["/a", "/b/c"]).prop_map(|p| json!({ "exact": p })),
        text(&["/a", "/b"]).prop_map(|p| json!({ "prefix": p })),
        text(&["/c", "b"]).prop_map(|p| json!({ "suffix": p })),
    ]
}

fn triggers() -> impl Strategy<Value = Value> {
    let paths = || proptest::collection::vec(string_match(), 0..2);
    let rule = (paths(), paths())
        .prop_map(|(excluded, included)| json!({"excludedPaths": excluded, "includedPaths": included}));
    proptest::collection::vec(rule, 0..3).prop_map(Value::Array)
}

fn policy() -> impl Strategy<Value = Value> {
    let issuers = proptest::collection::btree_set(text(&["i", "https://j/k"]), 0..3);
    (
        mtls(),
        issuers,
        triggers(),
        proptest::bool::weighted(0.2),
        proptest::bool::weighted(0.2),
    )
        .prop_map(|(peers, issuers, triggers, optional, origin)| {
            let origins: Vec<Value> = issuers
                .into_iter()
                .map(|i| json!({"jwt": {"issuer": i, "jwks": "{\"keys\": []}", "triggerRules": triggers}}))
                .collect();
            let binding = if origin { "USE_ORIGIN" } else { "USE_PEER" };
            json!({"peers": peers, "origins": origins, "originIsOptional": optional, "principalBinding": binding})
        })
}

fn policies() -> impl Strategy<Value = Vec<Value>> {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "authentication.istio.io/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    };
    let mesh = proptest::option::of(policy());
    let wide = proptest::option::of(policy());
    let targeted = proptest::collection::vec((policy(), text(NAMES), proptest::option::of(Just(80))), 0..3);
    (mesh, wide, targeted).prop_map(move |(mesh, wide, targeted)| {
        let mut out: Vec<Value> = mesh.into_iter().map(|p| object("MeshPolicy", "default", p)).collect();
        out.extend(wide.map(|p| object("Policy", "default", p)));
        for (i, (mut spec, name, port)) in targeted.into_iter().enumerate() {
            let ports: Vec<Value> = port.into_iter().map(|n: u16| json!({ "number": n })).collect();
            spec["targets"] = json!([{"name": name, "ports": ports}]);
            out.push(object("Policy", &format!("p{i}"), spec));
        }
        out
    })
}

fn pair(key: &'static str, not: &'static str, pool: &'static [&'static str]) -> impl Strategy<Value = Value> {
    (texts(pool), proptest::bool::weighted(0.3)).prop_map(move |(values, negate)| {
        if values.is_empty() {
            json!({})
        } else {
            json!({ (if negate { not } else { key }): values })
        }
    })
}

fn merge(parts: impl IntoIterator<Item = Value>) -> Value {
    let mut out = serde_json::Map::new();
    for part in parts {
        out.extend(part.as_object().cloned().unwrap_or_default());
    }
    Value::Object(out)
}

fn access_rule() -> impl Strategy<Value = Value> {
    let constraint = prop_oneof![
        Just(json!([])),
        Just(json!([])),
        texts(&["web", "api"]).prop_map(|v| json!([{"key": "destination.labels[app]", "values": v}])),
        texts(&["admin", "u*"]).prop_map(|v| json!([{"key": "request.headers[x-role]", "values": v}])),
        texts(&["8080", "6379"]).prop_map(|v| json!([{"key": "destination.port", "values": v}])),
        texts(NAMESPACES).prop_map(|v| json!([{"key": "destination.namespace", "values": v}])),
        texts(NAMES).prop_map(|v| json!([{"key": "destination.name", "values": v}])),
    ];
    // Sometimes one that cannot be kept.
    let constraint = prop_oneof![
        40 => constraint,
        1 => Just(json!([{"key": "destination.user", "values": ["x"]}])),
    ];
    (
        proptest::collection::vec(text(HOSTS), 1..3),
        pair("methods", "notMethods", METHODS),
        pair("paths", "notPaths", PATHS),
        pair("hosts", "notHosts", &["web", "w*"]),
        proptest::option::weighted(0.2, proptest::sample::select(&[8080u16, 6379][..])),
        constraint,
    )
        .prop_map(|(services, methods, paths, hosts, port, constraints)| {
            // Fields that must have values, in the odd case of none.
            let constraints: Vec<Value> = constraints
                .as_array()
                .into_iter()
                .flatten()
                .filter(|c| c["values"].as_array().is_some_and(|v| !v.is_empty()))
                .cloned()
                .collect();
            let ports: Vec<u16> = port.into_iter().collect();
            merge([
                json!({"services": services, "ports": ports, "constraints": constraints}),
                methods,
                paths,
                hosts,
            ])
        })
}

fn subject() -> impl Strategy<Value = Value> {
    let user = proptest::option::weighted(0.4, text(&["*", "cluster.local/ns/shop/sa/web", "i/alice", "*/alice"]));
    let properties = prop_oneof![
        Just(json!({})),
        Just(json!({})),
        text(&["*", "cluster.local/ns/shop/*"]).prop_map(|v| json!({ "source.principal": v })),
        text(NAMESPACES).prop_map(|v| json!({ "source.namespace": v })),
        text(IPS).prop_map(|v| json!({ "source.ip": v })),
        text(&["g1", "g*"]).prop_map(|v| json!({ "request.auth.claims[groups]": v })),
        text(&["admin"]).prop_map(|v| json!({ "request.headers[x-role]": v })),
    ];
    let properties = prop_oneof![40 => properties, 1 => Just(json!({ "frobnicate": "x" }))];
    (
        user,
        pair("names", "notNames", PRINCIPALS),
        pair("namespaces", "notNamespaces", NAMESPACES),
        pair("ips", "notIps", IPS),
        pair("groups", "notGroups", &["g1", "g2"]),
        properties,
    )
        .prop_map(|(user, names, namespaces, ips, groups, properties)| {
            let mut out = merge([names, namespaces, ips, groups]);
            if let Some(user) = user {
                out["user"] = json!(user);
            }
            if properties.as_object().is_some_and(|p| !p.is_empty()) {
                out["properties"] = properties;
            }
            out
        })
}

fn rbac() -> impl Strategy<Value = Vec<Value>> {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "rbac.istio.io/v1alpha1", "kind": kind,
            "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    };
    let config = prop_oneof![
        Just(json!({"mode": "ON"})),
        Just(json!({"mode": "ON_WITH_INCLUSION", "inclusion": {"namespaces": ["shop"]}})),
        Just(json!({"mode": "ON_WITH_INCLUSION", "inclusion": {"services": ["web.shop.svc.cluster.local"]}})),
        Just(json!({"mode": "ON_WITH_EXCLUSION", "exclusion": {"namespaces": ["istio-system"]}})),
        Just(json!({"mode": "ON_WITH_EXCLUSION", "exclusion": {"namespaces": ["shop"]}})),
        Just(json!({"mode": "ON_WITH_EXCLUSION", "exclusion": {"services": ["api.shop.svc.cluster.local"]}})),
        Just(json!({"mode": "OFF"})),
        Just(json!({"mode": "ON", "enforcementMode": "PERMISSIVE"})),
    ];
    let config = proptest::option::weighted(0.9, config);
    let roles = proptest::collection::vec(proptest::collection::vec(access_rule(), 1..3), 1..3);
    let binding = (
        proptest::collection::vec(subject(), 1..3),
        0..3usize,
        proptest::bool::weighted(0.1),
        proptest::option::weighted(0.1, proptest::collection::vec(access_rule(), 1..2)),
    );
    let bindings = proptest::collection::vec(binding, 0..4);
    (config, roles, bindings).prop_map(move |(config, roles, bindings)| {
        let mut out: Vec<Value> = config
            .into_iter()
            .map(|spec| object("ClusterRbacConfig", "default", spec))
            .collect();
        let count = roles.len();
        for (i, rules) in roles.into_iter().enumerate() {
            out.push(object("ServiceRole", &format!("r{i}"), json!({ "rules": rules })));
        }
        for (i, (subjects, role, trial, actions)) in bindings.into_iter().enumerate() {
            let mut spec = json!({ "subjects": subjects });
            match actions {
                Some(actions) => spec["actions"] = json!(actions),
                None => spec["roleRef"] = json!({"kind": "ServiceRole", "name": format!("r{}", role % count)}),
            }
            if trial {
                spec["mode"] = json!("PERMISSIVE");
            }
            out.push(object("ServiceRoleBinding", &format!("b{i}"), spec));
        }
        out
    })
}

fn asked() -> impl Strategy<Value = Question> {
    let claims = prop_oneof![
        Just(None),
        (text(&["i", "https://j/k"]), texts(&["g1", "g2"]))
            .prop_map(|(iss, groups)| Some(json!({"iss": iss, "sub": "alice", "groups": groups}))),
    ];
    (
        (proptest::sample::select(NAMES), proptest::bool::weighted(0.1)),
        proptest::option::weighted(0.8, text(PEERS)),
        text(&["10.1.0.1", "10.2.3.4"]),
        text(&["GET", "POST", "PUT"]),
        text(ASKED),
        text(&["web", "api"]),
        proptest::option::of(text(&["admin", "user"])),
        claims,
    )
        .prop_map(|((app, redis), peer, ip, method, path, host, header, claims)| {
            let redis = redis && app == "db";
            Question {
                app,
                port: if redis { 6379 } else { 8080 },
                http: !redis,
                peer,
                ip,
                method,
                host,
                path,
                header,
                claims: claims.filter(|_| !redis),
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever order objects come in, the world is the same, and taking the former ones away leaves nothing behind.
    #[test]
    fn order_does_not_matter(policies in policies(), rbac in rbac(), seed in any::<u64>()) {
        let mut objects: Vec<Value> = documents(SHOP);
        objects.extend(policies.iter().chain(&rbac).cloned());
        let mut shuffled = objects.clone();
        let mut state = seed | 1;
        for i in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            shuffled.swap(i, usize::try_from(state >> 33).unwrap() % (i + 1));
        }
        let (mut a, mut b) = (world(""), world(""));
        objects.iter().for_each(|o| add(&mut a, o));
        shuffled.iter().for_each(|o| add(&mut b, o));
        for ns in ["shop", "istio-system"] {
            prop_assert_eq!(a.authorization_policies(ns), b.authorization_policies(ns));
            prop_assert_eq!(a.peer_authentications(ns), b.peer_authentications(ns));
            prop_assert_eq!(a.request_authentications(ns), b.request_authentications(ns));
        }
        for object in policies.iter().chain(&rbac) {
            let kind = mantlet_translate::world::Kind::by_name(object["kind"].as_str().unwrap()).unwrap();
            a.remove_config(kind, "shop", object["metadata"]["name"].as_str().unwrap());
        }
        for ns in ["shop", "istio-system"] {
            prop_assert!(a.authorization_policies(ns).is_empty());
            prop_assert!(a.peer_authentications(ns).is_empty());
            prop_assert!(a.request_authentications(ns).is_empty());
        }
        prop_assert!(a.former().is_empty());
    }
}

/// The migrated files decide as the former objects do in the mesh, and neither allows what the former kinds denied; where nothing is
/// said to be lost, all three agree.
#[test]
fn migrated_former_and_naive_agree() {
    let config = ProptestConfig {
        cases: 600,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let strategy = (policies(), rbac(), proptest::collection::vec(asked(), 1..24));
    // Questions, those whose answers must be equal, and of these the allowed ones.
    let counts = std::cell::Cell::new([0u32; 3]);
    let run = |(policies, rbac, questions): (Vec<Value>, Vec<Value>, Vec<Question>)| {
        let mut old = world(SHOP);
        for object in policies.iter().chain(&rbac) {
            add(&mut old, object);
        }
        let (new, migration) = migrated(SHOP, &old);
        let naive = Naive::new(&policies, &rbac);
        let lost = migration.notes.iter().any(|n| n.weight == Weight::Lost);
        for app in NAMES {
            for port in [8080, 9090, 6379] {
                prop_assert_eq!(mode(&new, app, port), mode(&old, app, port), "{} {}", app, port);
                prop_assert_eq!(mode(&old, app, port), naive.mode(app, port), "{} {}", app, port);
            }
        }
        for question in &questions {
            let (in_mesh, in_files, before) =
                (allowed(&old, question), allowed(&new, question), naive.allows(question));
            prop_assert_eq!(in_files, in_mesh, "{:?}\n{:?}", question, migration.objects);
            prop_assert!(
                before || !in_mesh,
                "allowed what was denied: {:?}\n{:?}",
                question,
                migration.objects
            );
            if !lost {
                prop_assert_eq!(in_mesh, before, "{:?}\n{:?}", question, migration.objects);
            }
            let [all, equal, allows] = counts.get();
            counts.set([all + 1, equal + u32::from(!lost), allows + u32::from(!lost && before)]);
        }
        Ok(())
    };
    let result = proptest::test_runner::TestRunner::new(config).run(&strategy, run);
    result.unwrap_or_else(|error| panic!("{error}"));
    let [all, equal, allows] = counts.get();
    println!("{all} questions, {equal} with equal answers, {allows} of these allowed");
    assert!(equal * 3 > all, "too much is lost to compare: {equal} of {all}");
    assert!(
        allows * 10 > equal * 2 && allows * 10 < equal * 8,
        "{allows} of {equal} allowed"
    );
}
