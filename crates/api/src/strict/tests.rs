//! Findings about objects as users write them, by their exact texts.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{document, near_name};
use crate::yaml;

/// `code path: message (…)` of each finding.
fn texts(text: &str) -> Vec<String> {
    let value = yaml::read_one(text).expect("YAML");
    lines(&value)
}

fn lines(value: &Value) -> Vec<String> {
    document(value)
        .iter()
        .map(|f| format!("{} {}: {}", f.code, f.path, f.full()))
        .collect()
}

#[track_caller]
fn has(found: &[String], expected: &[&str]) {
    assert_eq!(found, expected, "\n{}", found.join("\n"));
}

#[test]
fn lost_indentation_is_told_field_by_field() {
    has(
        &texts(
            "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata:\nname: \"example-peer-policy_strict\"\nnamespace: example_1\nspec:\nselector:\nmatchLabels:\napp: reviews\nmtls:\nmode: STRICT\n",
        ),
        &[
            "MNT0002 metadata: metadata is empty, so the object has no name (name and namespace belong below metadata:, indented by two spaces)",
            "MNT0001 name: unknown field \"name\" (it belongs below metadata:, indented by two spaces more)",
            "MNT0001 namespace: unknown field \"namespace\" (it belongs below metadata:, indented by two spaces more)",
            "MNT0001 selector: unknown field \"selector\" (it belongs below spec:, indented by two spaces more)",
            "MNT0001 matchLabels: unknown field \"matchLabels\" (it belongs below spec.selector:, indented)",
            "MNT0001 app: unknown field \"app\" (allowed: apiVersion, kind, metadata, spec, status)",
            "MNT0001 mtls: unknown field \"mtls\" (it belongs below spec:, indented by two spaces more)",
            "MNT0001 mode: unknown field \"mode\" (it belongs below spec.mtls:, indented)",
        ],
    );
}

#[test]
fn misspelt_fields() {
    has(
        &texts(
            "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec:\n  rules:\n  - to:\n    - operation:\n        path: [\"/a\"]\n",
        ),
        &[
            "MNT0001 spec.rules[0].to[0].operation.path: unknown field \"path\" (allowed: hosts, notHosts, ports, notPorts, methods, notMethods, paths, notPaths; did you mean \"paths\"?)",
        ],
    );
    has(
        &texts(
            "apiVersion: security.istio.io/v1beta1\nkind: RequestAuthentication\nmetadata: {name: a}\nspec:\n  Jwtrules: []\n",
        ),
        &[
            "MNT0001 spec.Jwtrules: unknown field \"Jwtrules\" (allowed: selector, targetRef, targetRefs, jwtRules; did you mean \"jwtRules\"?)",
        ],
    );
    let found = texts(
        "apiVersion: security.istio.io/v1beta1\nkind: RequestAuthentication\nmetadata: {name: a}\nspec:\n  jwtRules:\n  - issuer: ”test@istio.io”\n    jwkUri: x\n",
    );
    assert!(found[0].starts_with("MNT0006 spec.jwtRules[0].issuer: the typographic quotes are part of the value \"”test@istio.io”\" (did you mean \"test@istio.io\"?)"), "{found:?}");
    assert!(found[1].ends_with("did you mean \"jwksUri\"?)"), "{found:?}");
    assert_eq!(found.len(), 2);
}

#[test]
fn types_and_values() {
    let spec = |spec: &str| {
        texts(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a}}\nspec: {spec}\n"
        ))
    };
    has(
        &spec("{action: DENY, rules: {}}"),
        &[
            "MNT0002 spec.rules: must be a list, found a map (an empty map is no list: write \"rules:\" with one item \"- {}\" below it to deny everything; a DENY policy without rules is refused)",
        ],
    );
    has(
        &spec("{rules: {}}"),
        &[
            "MNT0002 spec.rules: must be a list, found a map (an empty map is no list: write \"rules:\" with one item \"- {}\" below it to match everything, or leave it out to match nothing)",
        ],
    );
    has(
        &spec("{action: Alow}"),
        &["MNT0002 spec.action: unknown value \"Alow\" (allowed: ALLOW, DENY, AUDIT, CUSTOM; did you mean \"ALLOW\"?)"],
    );
    has(
        &spec("{rules: [{to: [{operation: {ports: [80], methods: GET}}]}]}"),
        &[
            "MNT0002 spec.rules[0].to[0].operation.ports[0]: must be a text, found the number 80 (put it in quotes)",
            "MNT0002 spec.rules[0].to[0].operation.methods: must be a list, found the text \"GET\" (write it as an item: \"- \" in front of it, below \"methods:\")",
        ],
    );
    has(
        &spec("{selector: {matchLabels: app}}"),
        &["MNT0002 spec.selector.matchLabels: must be a map, found the text \"app\""],
    );
    has(
        &spec("[]"),
        &[
            "MNT0002 spec: must be a map, found a list (allowed: selector, targetRef, targetRefs, rules, action, provider)",
        ],
    );
    has(
        &spec("{rules: [{to: [{operation: {paths: [\"*/api/catalog*\"]}}]}]}"),
        &[
            "MNT0102 spec.rules[0].to[0].operation.paths[0]: \"*/api/catalog*\" matches only what ends with the text \"/api/catalog*\": a `*` is a wildcard at the beginning or at the end of a value, not at both and not in the middle (write \"/api/catalog*\" for every path that begins so, \"*/api/catalog\" for every path that ends so, or \"/{**}/api/catalog\" for any number of segments in front)",
        ],
    );
}

#[test]
fn kinds_and_versions() {
    let kind = |api: &str, kind: &str| lines(&json!({"apiVersion": api, "kind": kind, "metadata": {"name": "a"}}));
    let found = kind("security.istio.io/v1", "AuthorisationPolicy");
    assert!(found[0].starts_with("MNT0003 kind: unrecognized type security.istio.io/v1, Kind=AuthorisationPolicy (allowed: AuthorizationPolicy, "), "{found:?}");
    assert!(
        found[0].ends_with("did you mean \"AuthorizationPolicy\"?)"),
        "{found:?}"
    );
    has(
        &kind("security.istio.io/v1beta2", "PeerAuthentication"),
        &[
            "MNT0003 apiVersion: PeerAuthentication is not served in version \"security.istio.io/v1beta2\" (allowed: security.istio.io/v1, security.istio.io/v1beta1; did you mean \"security.istio.io/v1\"?)",
        ],
    );
    has(
        &kind("networking.istio.io/v1", "PeerAuthentication"),
        &[
            "MNT0003 apiVersion: unrecognized type networking.istio.io/v1, Kind=PeerAuthentication (did you mean \"security.istio.io/v1\"?)",
        ],
    );
    has(
        &kind("v1", "PeerAuthentication"),
        &["MNT0003 apiVersion: unrecognized type v1, Kind=PeerAuthentication (did you mean \"security.istio.io/v1\"?)"],
    );
    has(
        &kind("security.istoi.io/v1", "PeerAuthentication"),
        &[
            "MNT0003 apiVersion: unrecognized type security.istoi.io/v1, Kind=PeerAuthentication (did you mean \"security.istio.io/v1\"?)",
        ],
    );
    for (api, name) in [
        ("v1", "Service"),
        ("apps/v1", "Deployment"),
        ("gateway.networking.k8s.io/v1", "Gateway"),
        ("example.com/v1", "Sidecar"),
    ] {
        has(&kind(api, name), &[]);
    }
    has(
        &lines(&json!({"metadata": {"name": "a"}})),
        &[
            "MNT0003 apiVersion: apiVersion is required",
            "MNT0003 kind: kind is required",
        ],
    );
    has(
        &lines(&json!([1])),
        &["MNT0002 : not a Kubernetes object (an object is a map with apiVersion, kind, metadata and spec)"],
    );
}

#[test]
fn names() {
    let named = |metadata: Value| {
        lines(&json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata}))
    };
    has(
        &named(json!({"name": "Example_1", "namespace": "example_1"})),
        &[
            "MNT0004 metadata.name: \"Example_1\" is no name that Kubernetes takes (RFC 1123) (allowed: lower case letters, digits, '-' and '.', beginning and ending with a letter or digit, at most 253 characters; did you mean \"example-1\"?)",
            "MNT0004 metadata.namespace: \"example_1\" is no name that Kubernetes takes (RFC 1123) (allowed: lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63 characters; did you mean \"example-1\"?)",
        ],
    );
    has(&named(json!({})), &["MNT0002 metadata: metadata.name is required"]);
    has(&named(json!({"generateName": "a-"})), &[]);
    has(
        &named(json!({"name": 1, "labels": {"a": true}, "lables": {}, "foo": "x"})),
        &[
            "MNT0001 metadata.lables: unknown field \"lables\" (did you mean \"labels\"?)",
            "MNT0001 metadata.foo: unknown field \"foo\" (if it is a label or an annotation, it belongs below labels: or annotations:)",
            "MNT0002 metadata.name: must be a text, found the number 1",
            "MNT0002 metadata.labels[a]: must be a text, found the boolean true (put it in quotes)",
        ],
    );
    assert_eq!(near_name("a.b_c", true).as_deref(), Some("a-b-c"));
    assert_eq!(near_name("ä", true), None);
    assert_eq!(near_name("--", false), None);
}

#[test]
fn rules_of_the_kind_come_after_the_schema() {
    // Only the misspelt field is told, not that the operation around it is empty.
    let found = lines(&json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "n"},
        "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"port": ["99999"]}}]}, {"to": [{"operation": {"ports": ["99999"]}}]}]},
    }));
    assert_eq!(
        found.iter().filter(|f| f.starts_with("MNT0001")).count(),
        1,
        "{found:?}"
    );
    assert!(
        found
            .iter()
            .any(|f| f.contains("spec.rules[1].to[0].operation") && f.contains("bad port (99999)")),
        "{found:?}"
    );
    assert!(!found.iter().any(|f| f.contains("must not be empty")), "{found:?}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        "name",
        "rules",
        "from",
        "source",
        "jwtRules",
        "jwks",
        "mtls",
        "mode",
        "selector",
        "matchLabels",
        "host",
        "tls",
        "servers",
        "portLevelMtls",
        "x",
        "*",
        "",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 60, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..5)
                .prop_map(|entries| Value::Object(entries.into_iter().map(|(k, v)| (k.to_string(), v)).collect())),
        ]
    })
}

proptest! {
    /// Whatever stands in an object of any kind, nothing panics, and the findings are bounded.
    #[test]
    fn no_object_panics(row in prop::sample::select(crate::kind::KINDS.to_vec()), metadata in any_json(), spec in any_json(), other in any_json()) {
        let object = json!({"apiVersion": row.api_version(), "kind": row.kind, "metadata": metadata, "spec": spec});
        prop_assert!(document(&object).len() <= super::MAX_FINDINGS);
        document(&other);
        crate::validate::traps(&object);
        crate::validate::traps(&other);
    }
}
