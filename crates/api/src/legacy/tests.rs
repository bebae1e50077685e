//! Tests of the former kinds: what is read, refused and said.

use serde_json::{Value, json};

use super::*;
use crate::diagnostic::Severity;
use crate::kind;
use crate::legacy::authn::{PeerMode, Policy};

fn object(kind: &str, group: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": format!("{group}/v1alpha1"), "kind": kind, "metadata": {"name": name, "namespace": "a"}, "spec": spec})
}

fn errors(value: &Value) -> Vec<String> {
    crate::validate::object(value)
        .iter()
        .filter(|f| f.severity == Severity::Error)
        .map(|f| format!("{}: {f}", f.path))
        .collect()
}

fn warnings(value: &Value) -> Vec<String> {
    crate::validate::object(value)
        .iter()
        .filter(|f| f.severity == Severity::Warning)
        .map(ToString::to_string)
        .collect()
}

fn mode(spec: Value) -> PeerMode {
    read::<Policy>(&kind::POLICY, &json!({ "spec": spec }))
        .unwrap()
        .peer_mode()
        .0
}

#[test]
fn forms_of_mtls() {
    for strict in [
        json!([{"mtls": {}}]),
        json!([{"mtls": null}]),
        json!([{"mtls": {"mode": "STRICT"}}]),
        json!([{"mtls": {"allowTls": true}}]),
        json!([{"mtls": {"allow_tls": true}}]),
        json!([{"jwt": {"issuer": "x"}}]),
        json!([{}]),
    ] {
        assert_eq!(mode(json!({ "peers": strict.clone() })), PeerMode::Strict, "{strict}");
    }
    assert_eq!(
        mode(json!({"peers": [{"mtls": {"mode": "PERMISSIVE"}}]})),
        PeerMode::Permissive
    );
    assert_eq!(
        mode(json!({"peers": [{"mtls": {}}], "peerIsOptional": true})),
        PeerMode::Permissive
    );
    assert_eq!(mode(json!({})), PeerMode::Disable);
    assert_eq!(mode(json!({"peers": []})), PeerMode::Disable);
}

#[test]
fn both_spellings_of_names() {
    let spec = json!({"origins": [{"jwt": {"issuer": "x", "jwks_uri": "https://x/k", "trigger_rules": [{"excluded_paths": [{"exact": "/a"}]}]}}],
        "principal_binding": "USE_ORIGIN"});
    let policy: Policy = read(&kind::POLICY, &json!({ "spec": spec })).unwrap();
    let jwt = policy.jwts().next().unwrap();
    assert_eq!(jwt.trigger_rules[0].excluded_paths[0].exact.as_deref(), Some("/a"));
    assert_eq!(jwt.jwks_uri, "https://x/k");
    assert!(errors(&object("Policy", AUTHENTICATION, "default", spec)).is_empty());
    let keep = normalize(&json!({"subjects": [{"properties": {"my_key": "v"}}]}));
    assert_eq!(keep["subjects"][0]["properties"]["my_key"], "v");
}

#[test]
fn the_seeds_objects_are_fine_and_warn() {
    let mesh = object(
        "MeshPolicy",
        AUTHENTICATION,
        "default",
        json!({"peers": [{"mtls": {}}]}),
    );
    assert_eq!(errors(&mesh), Vec::<String>::new());
    let said = warnings(&mesh);
    assert!(
        said.len() == 1 && said[0].contains("PeerAuthentication") && said[0].contains("STRICT"),
        "{said:?}"
    );
    let role = object(
        "ServiceRole",
        RBAC,
        "service-viewer",
        json!({"rules": [{"services": ["*"], "methods": ["GET"],
            "constraints": [{"key": "destination.labels[app]", "values": ["productpage", "details"]}]}]}),
    );
    assert_eq!(errors(&role), Vec::<String>::new());
    assert!(warnings(&role)[0].contains("AuthorizationPolicy"));
}

#[test]
fn refusals_name_field_and_reason() {
    let jwt = |more: Value| {
        let mut jwt = json!({"issuer": "x"});
        jwt.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        object("Policy", AUTHENTICATION, "default", json!({"origins": [{"jwt": jwt}]}))
    };
    let subject = |s: Value| {
        object(
            "ServiceRoleBinding",
            RBAC,
            "b",
            json!({"subjects": [s], "roleRef": {"kind": "ServiceRole", "name": "r"}}),
        )
    };
    let rule = |r: Value| object("ServiceRole", RBAC, "r", json!({"rules": [r]}));
    let config = |name: &str, spec: Value| object("ClusterRbacConfig", RBAC, name, spec);
    let cases: Vec<(Value, &str)> = vec![
        (
            object("MeshPolicy", AUTHENTICATION, "other", json!({})),
            "must be named \"default\"",
        ),
        (
            object(
                "MeshPolicy",
                AUTHENTICATION,
                "default",
                json!({"targets": [{"name": "x"}]}),
            ),
            "no targets",
        ),
        (
            object("Policy", AUTHENTICATION, "x", json!({})),
            "must be named \"default\"",
        ),
        (
            object("Policy", AUTHENTICATION, "default", json!({"targets": [{"name": "x"}]})),
            "must not be named",
        ),
        (
            object("Policy", AUTHENTICATION, "x", json!({"targets": [{"name": "x.a.svc"}]})),
            "spec.targets[0].name",
        ),
        (
            object(
                "Policy",
                AUTHENTICATION,
                "x",
                json!({"targets": [{"name": "x", "ports": [{"number": 0}]}]}),
            ),
            "spec.targets[0].ports[0]",
        ),
        (
            object(
                "Policy",
                AUTHENTICATION,
                "default",
                json!({"peers": [{"jwt": {"issuer": "x"}}]}),
            ),
            "tokens belong into origins",
        ),
        (
            object("Policy", AUTHENTICATION, "default", json!({"peers": [{"mtsl": {}}]})),
            "did you mean \"mtls\"",
        ),
        (
            object(
                "Policy",
                AUTHENTICATION,
                "default",
                json!({"peers": [{"mtls": {"mode": "STRIKT"}}]}),
            ),
            "spec.peers[0].mtls.mode",
        ),
        (
            object(
                "Policy",
                AUTHENTICATION,
                "default",
                json!({"origins": [{"jwt": {"issuer": "x"}}, {"jwt": {"issuer": "x"}}]}),
            ),
            "jwt with issuer \"x\" already defined",
        ),
        (jwt(json!({"issuer": ""})), "issuer must be set"),
        (jwt(json!({"jwksUri": "ftp://x"})), "must have scheme"),
        (
            jwt(json!({"jwksUri": "http://x", "jwks": "{}"})),
            "only one of jwks or jwksUri",
        ),
        (
            jwt(json!({"triggerRules": [{"includedPaths": [{"exact": "/a", "prefix": "/b"}]}]})),
            "exactly one of",
        ),
        (rule(json!({"paths": ["/a"], "notPaths": ["/b"]})), "cannot be set both"),
        (rule(json!({"ports": [70000]})), "0..65535"),
        (
            rule(json!({"constraints": [{"key": "destination.label[app]", "values": ["x"]}]})),
            "unknown constraint",
        ),
        (
            rule(
                json!({"constraints": [{"key": "destination.ip", "values": ["1.2.3.4"]}, {"key": "destination.ip", "values": ["1.2.3.5"]}]}),
            ),
            "stands twice",
        ),
        (
            object("ServiceRole", RBAC, "r", json!({"rules": []})),
            "at least 1 rule",
        ),
        (subject(json!({})), "nobody"),
        (subject(json!({"names": ["*"]})), "allUsers"),
        (subject(json!({"ips": ["1.2.3"]})), "neither an IP"),
        (
            object("ServiceRoleBinding", RBAC, "b", json!({"subjects": [{"user": "*"}]})),
            "exactly one of roleRef",
        ),
        (
            object(
                "ServiceRoleBinding",
                RBAC,
                "b",
                json!({"subjects": [{"user": "*"}], "roleRef": {"kind": "Role", "name": "r"}}),
            ),
            "only supported value",
        ),
        (config("mesh", json!({})), "name must be \"default\""),
        (
            config("default", json!({"mode": "ON_WITH_INCLUSION"})),
            "mode needs inclusion",
        ),
        (config("default", json!({"mode": true})), "into quotes"),
        (
            config(
                "default",
                json!({"mode": "ON_WITH_EXCLUSION", "exclusion": {"services": ["*.a.svc.cluster.local"]}}),
            ),
            "wildcards are not supported",
        ),
    ];
    for (value, wanted) in cases {
        let found = errors(&value);
        assert!(
            found.iter().any(|e| e.contains(wanted)),
            "{value}\nwanted {wanted:?}, found {found:?}"
        );
    }
}

#[test]
fn unknown_fields_survive_the_schema_so_that_admission_sees_them() {
    let crd = crate::crd::of(&kind::POLICY);
    assert_eq!(crd["spec"]["scope"], "Namespaced");
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    assert_eq!(spec["x-kubernetes-preserve-unknown-fields"], true);
    let peers = &spec["properties"]["peers"]["items"];
    assert_eq!(peers["x-kubernetes-preserve-unknown-fields"], true);
    assert_eq!(peers["properties"]["mtls"]["nullable"], true);
    assert_eq!(crate::crd::of(&kind::MESH_POLICY)["spec"]["scope"], "Cluster");
    assert_eq!(crate::crd::of(&kind::CLUSTER_RBAC_CONFIG)["spec"]["scope"], "Cluster");
}

#[test]
fn absurd_nesting_is_cut() {
    let mut value = json!({});
    for _ in 0..2000 {
        value = json!({ "a": value });
    }
    let _ = normalize(&value);
}
