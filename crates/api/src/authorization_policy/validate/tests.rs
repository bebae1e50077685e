//! Each rule of SEMANTICS 8c, by its message.

use serde_json::{Value, json};

use crate::diagnostic::Severity;
use crate::validate;

fn findings(spec: Value) -> Vec<(Severity, String)> {
    let object = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "n"}, "spec": spec,
    });
    validate::object(&object)
        .into_iter()
        .map(|f| (f.severity, f.to_string()))
        .collect()
}

#[track_caller]
fn refused(spec: Value, part: &str) {
    let found = findings(spec.clone());
    assert!(
        found
            .iter()
            .any(|(severity, text)| *severity == Severity::Error && text.contains(part)),
        "{spec}: no error with {part:?} in {found:?}"
    );
}

#[track_caller]
fn accepted(spec: Value) {
    let found = findings(spec.clone());
    assert!(
        found.iter().all(|(severity, _)| *severity != Severity::Error),
        "{spec}: {found:?}"
    );
}

fn source(source: Value) -> Value {
    json!({"rules": [{"from": [{"source": source}]}]})
}

fn operation(operation: Value) -> Value {
    json!({"rules": [{"to": [{"operation": operation}]}]})
}

fn when(key: &str, value: &str) -> Value {
    json!({"rules": [{"when": [{"key": key, "values": [value]}]}]})
}

#[test]
fn empty_forms() {
    accepted(json!({}));
    accepted(json!({"rules": []}));
    accepted(json!({"rules": [{}]}));
    accepted(json!({"action": "DENY", "rules": [{}]}));
    refused(
        json!({"action": "DENY"}),
        "invalid policy p.n: DENY action without `rules` is meaningless",
    );
    accepted(json!({"action": "AUDIT"}));
}

#[test]
fn nulls_are_named() {
    refused(json!({"rules": [null]}), "`rule` must not be nil, found at rule 0");
    refused(
        json!({"rules": [{}, {"from": [null]}]}),
        "`from` must not be nil, found at rule 1",
    );
    refused(
        json!({"rules": [{"from": [{}]}]}),
        "`from.source` must not be nil, found at rule 0",
    );
    refused(
        json!({"rules": [{"to": [{"operation": null}]}]}),
        "`to.operation` must not be nil, found at rule 0",
    );
    refused(source(json!({})), "`from.source` must not be empty, found at rule 0");
    refused(
        operation(json!({"paths": []})),
        "`to.operation` must not be empty, found at rule 0",
    );
}

#[test]
fn custom_action() {
    refused(
        json!({"action": "CUSTOM"}),
        "CUSTOM action without `rules` is meaningless",
    );
    refused(
        json!({"action": "CUSTOM", "rules": [{}]}),
        "`provider.name` must not be empty",
    );
    accepted(json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{}]}));
    refused(
        json!({"provider": {"name": "x"}, "rules": [{}]}),
        "`provider` must not be with non CUSTOM action, found ALLOW",
    );
    refused(
        json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{"from": [{"source": {"principals": ["a"]}}]}]}),
        "From.Principals is currently not supported with CUSTOM action",
    );
    refused(
        json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [{"when": [{"key": "request.auth.claims[a]", "values": ["b"]}]}]}),
        "request.auth.claims[a] is currently not supported with CUSTOM action",
    );
}

#[test]
fn sources() {
    accepted(source(
        json!({"principals": ["cluster.local/ns/a/sa/b"], "ipBlocks": ["10.0.0.1/8", "::1"]}),
    ));
    refused(
        source(json!({"ipBlocks": ["10.0.0.1/33"]})),
        "bad CIDR range (10.0.0.1/33)",
    );
    refused(source(json!({"notRemoteIpBlocks": ["x"]})), "bad IP address (x)");
    refused(
        source(json!({"principals": [""]})),
        "empty value not allowed, found in From.Principals",
    );
    refused(
        source(json!({"serviceAccounts": ["a"], "notNamespaces": ["b"]})),
        "cannot set serviceAccounts with namespaces or principals, found at rule 0",
    );
    for bad in ["a*", "a/b/c", "/b", "a/", &"x".repeat(321)] {
        refused(source(json!({"serviceAccounts": [bad]})), "service account");
    }
    refused(
        source(json!({"serviceAccounts": vec!["a"; 17]})),
        "may not have more than 16 values",
    );
    refused(
        source(json!({"trustDomains": ["a/b"]})),
        "trust domain must not contain '/'",
    );
    refused(source(json!({"trustDomains": ["a*b"]})), "one wildcard");
    accepted(source(json!({"trustDomains": ["*.a", "b*", "*"]})));
}

#[test]
fn operations() {
    accepted(operation(
        json!({"ports": ["0", "65535"], "paths": ["/a/{*}/b/{**}", "/x*", "/a//b", "/a/{*}/"]}),
    ));
    for bad in ["65536", "-1", "+1", "http", "80-90", "080808"] {
        refused(operation(json!({"ports": [bad]})), "bad port");
    }
    refused(
        operation(json!({"paths": ["/a{*}"]})),
        "Contains '{' or '}' beyond a supported path template",
    );
    refused(
        operation(json!({"paths": ["/{**}/{*}"]})),
        "{**} is not the last operator",
    );
    refused(operation(json!({"paths": ["/a*/{*}"]})), "invalid string literal");
    refused(operation(json!({"notPaths": ["/a//{*}"]})), "invalid string literal");
    refused(
        operation(json!({"hosts": [""]})),
        "empty value not allowed, found in To.Hosts",
    );
}

#[test]
fn conditions() {
    accepted(when("request.headers[X-Token]", "a"));
    accepted(when("request.auth.claims[a][b]", "a"));
    accepted(when("experimental.envoy.filters.mysql[db]", "a"));
    refused(when("", "a"), "`key` must not be empty");
    refused(
        json!({"rules": [{"when": [{"key": "source.ip"}]}]}),
        "at least one of `values` or `notValues` must be set for key source.ip",
    );
    refused(
        when("source.ip", "x"),
        "invalid `value` for `key` source.ip: bad IP address (x)",
    );
    refused(when("destination.port", "x"), "bad port (x)");
    for key in [
        "request.headers",
        "request.headers[]",
        "request.headers[a",
        "request.headersX[a]",
        "request.auth.claims",
    ] {
        refused(when(key, "a"), "should have format a[b]");
    }
    refused(when("destination.namespace", "a"), "replaced by the metadata.namespace");
    refused(when("destination.labels[a]", "a"), "replaced by the workload selector");
    refused(when("destination.user", "a"), "deprecated attribute");
    refused(when("source.nam", "a"), "unknown attribute: source.nam");
}

#[test]
fn targets_and_annotations() {
    refused(
        json!({"selector": {"matchLabels": {"a": "b*"}}}),
        "wildcard is not supported in selector: \"a=b*\"",
    );
    refused(
        json!({"selector": {"matchLabels": {"": "b"}}}),
        "empty key is not supported in selector: \"=b\"",
    );
    let refs = json!([{"kind": "Service", "name": "x"}]);
    accepted(json!({"targetRefs": refs}));
    refused(
        json!({"targetRefs": refs, "selector": {"matchLabels": {"a": "b"}}}),
        "only one of targetRefs or workloadSelector can be set",
    );
    refused(
        json!({"targetRefs": [{"kind": "Pod", "name": "x"}]}),
        "targetRef must be to one of",
    );
    refused(
        json!({"targetRefs": [{"kind": "Service", "name": ""}]}),
        "targetRef name must be set",
    );
    refused(
        json!({"targetRef": {"kind": "Service", "name": "a", "namespace": "b"}}),
        "cross namespace referencing",
    );
    let dry_run = |value: &str, action: &str| {
        validate::object(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "n", "annotations": {"istio.io/dry-run": value}},
            "spec": {"action": action, "rules": [{}]},
        }))
    };
    assert!(dry_run("true", "DENY").is_empty());
    assert!(dry_run("maybe", "DENY")[0].message.contains("invalid value (maybe)"));
    assert!(
        dry_run("true", "AUDIT")[0]
            .message
            .contains("currently only supports action ALLOW/DENY, found action AUDIT in n/p")
    );
}

#[test]
fn tcp_warning() {
    let warns = |rules: Value| {
        let found = findings(json!({"action": "DENY", "rules": rules}));
        assert!(
            found.iter().all(|(severity, _)| *severity == Severity::Warning),
            "{found:?}"
        );
        found
            .iter()
            .any(|(_, text)| text.contains("will deny all traffic to TCP ports"))
    };
    assert!(warns(json!([{"to": [{"operation": {"methods": ["GET"]}}]}])));
    assert!(!warns(
        json!([{"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}])
    ));
    assert!(warns(json!([{"from": [{"source": {"requestPrincipals": ["*"]}}]}])));
    assert!(!warns(json!([{"from": [{"source": {"principals": ["*"]}}]}])));
    assert!(!warns(
        json!([{"when": [{"key": "request.headers[a]", "values": ["b"]}]}])
    ));
}
