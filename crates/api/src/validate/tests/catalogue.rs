//! The catalogue of SEMANTICS 8a–8f as a table: for each rule an object that breaks it, the field path and the exact message, or the
//! statement that Istio lets it pass.
//!
//! `E` is an error, `W` a warning of [`crate::validate::object`] (what the webhook says), `S` an error that [`crate::strict`] finds before it (what the
//! API server's schema says), `-` an object that must be accepted.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::diagnostic::{Diagnostic, Severity};

/// Number, weight, object, expected `path: message`.
type Row = (&'static str, char, Value, &'static str);

fn of(api: &str, kind: &str, spec: Value) -> Value {
    json!({"apiVersion": api, "kind": kind, "metadata": {"name": "p", "namespace": "n"}, "spec": spec})
}

fn ap(spec: Value) -> Value {
    of("security.istio.io/v1", "AuthorizationPolicy", spec)
}

fn rule(rule: Value) -> Value {
    ap(json!({"rules": [rule]}))
}

fn source(source: Value) -> Value {
    rule(json!({"from": [{"source": source}]}))
}

fn operation(operation: Value) -> Value {
    rule(json!({"to": [{"operation": operation}]}))
}

fn when(key: &str, value: &str) -> Value {
    rule(json!({"when": [{"key": key, "values": [value]}]}))
}

fn custom(rule: Value) -> Value {
    ap(json!({"action": "CUSTOM", "provider": {"name": "x"}, "rules": [rule]}))
}

fn ra(rule: Value) -> Value {
    of(
        "security.istio.io/v1",
        "RequestAuthentication",
        json!({"jwtRules": [rule]}),
    )
}

fn pa(spec: Value) -> Value {
    of("security.istio.io/v1", "PeerAuthentication", spec)
}

fn dr(spec: Value) -> Value {
    of("networking.istio.io/v1", "DestinationRule", spec)
}

fn dr_tls(tls: Value) -> Value {
    dr(json!({"host": "a", "trafficPolicy": {"tls": tls}}))
}

fn gw(server: Value) -> Value {
    of("networking.istio.io/v1", "Gateway", json!({"servers": [server]}))
}

fn gw_tls(tls: Value) -> Value {
    gw(json!({"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["a.b"], "tls": tls}))
}

fn sidecar(spec: Value) -> Value {
    of("networking.istio.io/v1", "Sidecar", spec)
}

fn ingress_tls(protocol: &str, tls: Value) -> Value {
    sidecar(json!({"ingress": [{"port": {"number": 443, "name": "x", "protocol": protocol}, "tls": tls}]}))
}

fn se(spec: Value) -> Value {
    of("networking.istio.io/v1", "ServiceEntry", spec)
}

fn vs_header(name: &str) -> Value {
    of(
        "networking.istio.io/v1",
        "VirtualService",
        json!({"hosts": ["a"], "http": [{"match": [{"headers": {name: {"exact": "x"}}}], "route": [{"destination": {"host": "a"}}]}]}),
    )
}

fn annotated(kind: &str, action: &str, key: &str, value: &str) -> Value {
    let mut object = match kind {
        "AuthorizationPolicy" => ap(json!({"action": action, "rules": [{}]})),
        _ => pa(json!({})),
    };
    object["metadata"]["annotations"] = json!({key: value});
    object
}

/// What must be found is among the findings, word for word; what must be accepted has no error.
#[track_caller]
fn check(rows: Vec<Row>) {
    let mut wrong = Vec::new();
    for (number, weight, object, expected) in rows {
        let (found, severity): (Vec<Diagnostic>, Severity) = match weight {
            'S' => (crate::strict::document(&object), Severity::Error),
            'W' => (crate::validate::object(&object), Severity::Warning),
            _ => (crate::validate::object(&object), Severity::Error),
        };
        let texts: BTreeSet<String> = found
            .iter()
            .filter(|f| f.severity == severity)
            .map(|f| format!("{}: {}", f.path, f.message))
            .collect();
        let good = if weight == '-' {
            texts.is_empty()
        } else {
            texts.contains(expected)
        };
        if !good {
            wrong.push(format!(
                "{number} {weight}\n  wanted {expected}\n  found  {texts:#?}\n  in {}",
                object["spec"]
            ));
        }
        // The webhook's text names the field wherever the finding has one.
        for finding in &found {
            assert!(finding.located().contains(&finding.path), "{finding:?}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn frame_and_selectors() {
    let dry = "istio.io/dry-run";
    let dry_path = "metadata.annotations[istio.io/dry-run]";
    let mut top = pa(json!({}));
    top["spce"] = json!({});
    let targets = |refs: Value| ap(json!({"targetRefs": refs}));
    let kinds = "/Service networking.istio.io/ServiceEntry gateway.networking.k8s.io/Gateway gateway.networking.k8s.io/GatewayClass";
    let bad_kind = Box::leak(
        format!("spec.targetRefs[0]: targetRef must be to one of [{kinds}] but was apps/Deployment").into_boxed_str(),
    );
    let dry_text = |text: &str| -> &'static str { Box::leak(format!("{dry_path}: {text}").into_boxed_str()) };
    check(vec![
        (
            "S8.4",
            'E',
            top,
            "spce: unknown field \"spce\" on PeerAuthentication resource n/p",
        ),
        (
            "S8.4",
            'E',
            of("security.istio.io/v9", "PeerAuthentication", json!({})),
            "kind: unrecognized type security.istio.io/v9, Kind=PeerAuthentication",
        ),
        (
            "S8.4",
            'E',
            pa(json!({"mtls": {"mode": "strict"}})),
            "spec.mtls.mode: error decoding configuration: spec.mtls.mode: unknown variant `strict`, expected one of `UNSET`, `DISABLE`, `PERMISSIVE`, `STRICT`",
        ),
        (
            "S8.4",
            'W',
            pa(json!({"mtsl": {}})),
            "spec.mtsl: unknown field \"spec.mtsl\"",
        ),
        (
            "S8.4",
            'S',
            pa(json!({"mtsl": {}})),
            "spec.mtsl: unknown field \"mtsl\"",
        ),
        (
            "S8.7",
            'E',
            annotated("PeerAuthentication", "", dry, "true"),
            dry_text("n/p has unsupported annotation istio.io/dry-run, please remove the annotation"),
        ),
        (
            "S8.7",
            'E',
            annotated("AuthorizationPolicy", "ALLOW", dry, "maybe"),
            dry_text("n/p has annotation istio.io/dry-run with invalid value (maybe): not a boolean"),
        ),
        (
            "S8.7",
            'E',
            annotated("AuthorizationPolicy", "AUDIT", dry, "true"),
            dry_text(
                "the annotation istio.io/dry-run currently only supports action ALLOW/DENY, found action AUDIT in n/p",
            ),
        ),
        ("S8.7", '-', annotated("AuthorizationPolicy", "DENY", dry, "T"), ""),
        (
            "S8.8",
            'E',
            annotated("PeerAuthentication", "", "internal.istio.io/webhook-always-reject", ""),
            "metadata.annotations[internal.istio.io/webhook-always-reject]: \"internal.istio.io/webhook-always-reject\" annotation found, rejecting",
        ),
        (
            "S8.8",
            'E',
            annotated("PeerAuthentication", "", "internal.istio.io/parents", ""),
            "metadata.annotations[internal.istio.io/parents]: \"internal.istio.io/parents\" annotation found, this may not be set by users",
        ),
        (
            "S8.8",
            'E',
            annotated("PeerAuthentication", "", "internal.istio.io/parent-namespace", ""),
            "metadata.annotations[internal.istio.io/parent-namespace]: \"internal.istio.io/parent-namespace\" annotation found, this may not be set by users",
        ),
        (
            "S8.10",
            'E',
            ap(json!({"selector": {"matchLabels": {"a": "b"}}, "targetRefs": [{"kind": "Service", "name": "s"}]})),
            "spec: invalid policy p.n: only one of targetRefs or workloadSelector can be set",
        ),
        (
            "S8.10",
            'E',
            of(
                "security.istio.io/v1",
                "RequestAuthentication",
                json!({"targetRef": {"kind": "Service", "name": "s"}, "targetRefs": [{"kind": "Service", "name": "s"}]}),
            ),
            "spec: only one of targetRefs or workloadSelector can be set",
        ),
        (
            "S8.11",
            'E',
            pa(json!({"selector": {"matchLabels": {"": "v"}}})),
            "spec.selector: empty key is not supported in selector: \"=v\"",
        ),
        (
            "S8.11",
            'E',
            pa(json!({"selector": {"matchLabels": {"k": "v*"}}})),
            "spec.selector: wildcard is not supported in selector: \"k=v*\"",
        ),
        (
            "S8.11",
            'E',
            pa(json!({"selector": {"matchLabels": {"k*": "v"}}})),
            "spec.selector: wildcard is not supported in selector: \"k*=v\"",
        ),
        (
            "S8.11",
            'W',
            pa(json!({"selector": {}})),
            "spec.selector: workload selector specified without labels",
        ),
        (
            "S8.12",
            'E',
            targets(json!([{"kind": "Service", "name": ""}])),
            "spec.targetRefs[0]: invalid policy p.n: targetRef name must be set",
        ),
        (
            "S8.12",
            'E',
            targets(json!([{"kind": "Service", "name": "s", "namespace": "x"}])),
            "spec.targetRefs[0]: invalid policy p.n: targetRef namespace must not be set; cross namespace referencing is not supported",
        ),
        (
            "S8.12",
            'E',
            of(
                "security.istio.io/v1",
                "RequestAuthentication",
                json!({"targetRefs": [{"group": "apps", "kind": "Deployment", "name": "s"}]}),
            ),
            bad_kind,
        ),
        (
            "S8.12",
            '-',
            targets(
                json!([{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"}, {"kind": "Service", "name": "s"}]),
            ),
            "",
        ),
        (
            "S8.61",
            'E',
            pa(json!({"selector": {"matchLabels": {"k": "v".repeat(64)}}})),
            "spec.selector: value of label \"k\" is longer than 63 characters",
        ),
    ]);
}

#[test]
fn authorization_policy() {
    let meaningless =
        "as it will never be triggered, add an empty rule `{}` if you want it be triggered for every request";
    let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
    let no_custom = |field: &str| {
        leak(format!(
            "spec.rules[0].from: invalid policy p.n: {field} is currently not supported with CUSTOM action"
        ))
    };
    let mut rows: Vec<Row> = vec![
        (
            "S8.20",
            'E',
            ap(json!({"action": "CUSTOM", "provider": {"name": "x"}})),
            leak(format!(
                "spec.rules: invalid policy p.n: CUSTOM action without `rules` is meaningless {meaningless}"
            )),
        ),
        (
            "S8.20",
            'E',
            ap(json!({"action": "CUSTOM", "rules": [{}]})),
            "spec.provider: invalid policy p.n: `provider.name` must not be empty",
        ),
        ("S8.20", '-', custom(json!({})), ""),
        (
            "S8.21",
            'E',
            ap(json!({"provider": {"name": "x"}, "rules": [{}]})),
            "spec.provider: invalid policy p.n: `provider` must not be with non CUSTOM action, found ALLOW",
        ),
        (
            "S8.23",
            'E',
            ap(json!({"action": "DENY"})),
            leak(format!(
                "spec.rules: invalid policy p.n: DENY action without `rules` is meaningless {meaningless}"
            )),
        ),
        ("S8.23", '-', ap(json!({"action": "ALLOW"})), ""),
        ("S8.23", '-', ap(json!({"action": "AUDIT"})), ""),
        (
            "S8.24",
            'E',
            ap(json!({"rules": [null]})),
            "spec.rules[0]: invalid policy p.n: `rule` must not be nil, found at rule 0",
        ),
        (
            "S8.24",
            'E',
            rule(json!({"from": [null]})),
            "spec.rules[0].from[0]: invalid policy p.n: `from` must not be nil, found at rule 0",
        ),
        (
            "S8.24",
            'E',
            rule(json!({"from": [{}]})),
            "spec.rules[0].from[0]: invalid policy p.n: `from.source` must not be nil, found at rule 0",
        ),
        (
            "S8.24",
            'E',
            rule(json!({"to": [null]})),
            "spec.rules[0].to[0]: invalid policy p.n: `to` must not be nil, found at rule 0",
        ),
        (
            "S8.24",
            'E',
            rule(json!({"to": [{"operation": null}]})),
            "spec.rules[0].to[0]: invalid policy p.n: `to.operation` must not be nil, found at rule 0",
        ),
        (
            "S8.25",
            'E',
            rule(json!({"from": []})),
            "spec.rules[0].from: invalid policy p.n: `from` must not be empty, found at rule 0",
        ),
        (
            "S8.25",
            'E',
            rule(json!({"to": []})),
            "spec.rules[0].to: invalid policy p.n: `to` must not be empty, found at rule 0",
        ),
        (
            "S8.25",
            'E',
            source(json!({})),
            "spec.rules[0].from[0].source: invalid policy p.n: `from.source` must not be empty, found at rule 0",
        ),
        (
            "S8.25",
            'E',
            operation(json!({"paths": []})),
            "spec.rules[0].to[0].operation: invalid policy p.n: `to.operation` must not be empty, found at rule 0",
        ),
        ("S8.25", '-', source(json!({"notNamespaces": ["a"]})), ""),
        (
            "S8.27",
            'E',
            source(json!({"ipBlocks": ["10.0.0.0/33"]})),
            "spec.rules[0].from[0].source.ipBlocks[0]: invalid policy p.n: bad CIDR range (10.0.0.0/33): invalid IP address syntax",
        ),
        (
            "S8.27",
            'E',
            source(json!({"notRemoteIpBlocks": ["1.2.3.4", "1.2.3"]})),
            "spec.rules[0].from[0].source.notRemoteIpBlocks[1]: invalid policy p.n: bad IP address (1.2.3)",
        ),
        (
            "S8.27",
            'E',
            when("remote.ip", "x"),
            "spec.rules[0].when[0].values[0]: invalid policy p.n: invalid `value` for `key` remote.ip: bad IP address (x)",
        ),
        (
            "S8.27",
            '-',
            source(json!({"ipBlocks": ["10.1.2.3/8", "fd00::1/64", "::1"]})),
            "",
        ),
        (
            "S8.28",
            'E',
            operation(json!({"ports": ["80", "http"]})),
            "spec.rules[0].to[0].operation.ports[1]: invalid policy p.n: bad port (http): must be a decimal number from 0 to 65535",
        ),
        (
            "S8.28",
            'E',
            operation(json!({"notPorts": ["80-90"]})),
            "spec.rules[0].to[0].operation.notPorts[0]: invalid policy p.n: bad port (80-90): must be a decimal number from 0 to 65535",
        ),
        (
            "S8.28",
            'E',
            when("destination.port", "65536"),
            "spec.rules[0].when[0].values[0]: invalid policy p.n: invalid `value` for `key` destination.port: bad port (65536): must be a decimal number from 0 to 65535",
        ),
        ("S8.28", '-', operation(json!({"ports": ["0", "65535"]})), ""),
        (
            "S8.29",
            'E',
            operation(json!({"hosts": ["a", ""]})),
            "spec.rules[0].to[0].operation.hosts[1]: invalid policy p.n: empty value not allowed, found in To.Hosts",
        ),
        (
            "S8.29",
            'E',
            rule(json!({"when": [{"key": "source.ip", "notValues": [""]}]})),
            "spec.rules[0].when[0].notValues[0]: invalid policy p.n: empty value not allowed, found in NotValues",
        ),
        (
            "S8.26",
            'E',
            source(json!({"serviceAccounts": ["a"], "notNamespaces": ["b"]})),
            "spec.rules[0].from[0].source: invalid policy p.n: cannot set serviceAccounts with namespaces or principals, found at rule 0",
        ),
        (
            "S8.30",
            'E',
            source(json!({"serviceAccounts": vec!["a"; 17]})),
            "spec.rules[0].from[0].source.serviceAccounts: invalid policy p.n: From.ServiceAccounts may not have more than 16 values",
        ),
        (
            "S8.30",
            'E',
            source(json!({"serviceAccounts": ["a/*"]})),
            "spec.rules[0].from[0].source.serviceAccounts[0]: invalid policy p.n: wildcard not allowed in service account \"a/*\"",
        ),
        (
            "S8.30",
            'E',
            source(json!({"serviceAccounts": ["a/b/c"]})),
            "spec.rules[0].from[0].source.serviceAccounts[0]: invalid policy p.n: service account \"a/b/c\" must have at most one '/'",
        ),
        (
            "S8.30",
            'E',
            source(json!({"notServiceAccounts": ["a/"]})),
            "spec.rules[0].from[0].source.notServiceAccounts[0]: invalid policy p.n: namespace and name of service account \"a/\" must not be empty",
        ),
        (
            "S8.30",
            'E',
            source(json!({"serviceAccounts": ["a".repeat(321)]})),
            "spec.rules[0].from[0].source.serviceAccounts[0]: invalid policy p.n: service account must not be longer than 320 characters",
        ),
        (
            "S8.31",
            'E',
            source(json!({"trustDomains": ["a*b"]})),
            "spec.rules[0].from[0].source.trustDomains[0]: invalid policy p.n: trust domain may have one wildcard, at its start or end: \"a*b\"",
        ),
        (
            "S8.31",
            'E',
            source(json!({"notTrustDomains": ["a/b"]})),
            "spec.rules[0].from[0].source.notTrustDomains[0]: invalid policy p.n: trust domain must not contain '/': \"a/b\"",
        ),
        (
            "S8.31",
            'E',
            when("source.trustDomain", "*a*"),
            "spec.rules[0].when[0].values[0]: invalid policy p.n: invalid `value` for `key` source.trustDomain: trust domain may have one wildcard, at its start or end: \"*a*\"",
        ),
        ("S8.31", '-', when("source.trustDomain", "a/b"), ""),
        (
            "S8.32",
            'E',
            operation(json!({"paths": ["/a{*}"]})),
            "spec.rules[0].to[0].operation.paths[0]: invalid policy p.n: invalid path /a{*}. Contains '{' or '}' beyond a supported path template",
        ),
        (
            "S8.32",
            'E',
            operation(json!({"notPaths": ["/{**}/{*}"]})),
            "spec.rules[0].to[0].operation.notPaths[0]: invalid policy p.n: invalid path /{**}/{*}. {**} is not the last operator",
        ),
        (
            "S8.32",
            'E',
            operation(json!({"paths": ["/{*}/a*"]})),
            "spec.rules[0].to[0].operation.paths[0]: invalid policy p.n: invalid path /{*}/a*. invalid string literal in segment \"a*\"",
        ),
        (
            "S8.32",
            'E',
            operation(json!({"paths": ["/{*}//a"]})),
            "spec.rules[0].to[0].operation.paths[0]: invalid policy p.n: invalid path /{*}//a. invalid string literal in segment \"\"",
        ),
        (
            "S8.32",
            '-',
            operation(json!({"paths": ["/{*}/a/{**}", "/{**}/a", "/{*}/"]})),
            "",
        ),
        (
            "S8.33",
            'E',
            rule(json!({"when": [{"key": "", "values": ["a"]}]})),
            "spec.rules[0].when[0].key: invalid policy p.n: `key` must not be empty",
        ),
        (
            "S8.33",
            'E',
            rule(json!({"when": [{"key": "source.ip"}]})),
            "spec.rules[0].when[0]: invalid policy p.n: at least one of `values` or `notValues` must be set for key source.ip",
        ),
        (
            "S8.34",
            'E',
            when("request.headers", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` request.headers: bad key (request.headers): should have format a[b]",
        ),
        (
            "S8.34",
            'E',
            when("request.auth.claims[]", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` request.auth.claims[]: bad key (request.auth.claims[]): should have format a[b]",
        ),
        (
            "S8.34",
            'E',
            when("destination.namespace", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` destination.namespace: attribute destination.namespace is replaced by the metadata.namespace",
        ),
        (
            "S8.34",
            'E',
            when("destination.labels[a]", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` destination.labels[a]: attribute destination.labels[a] is replaced by the workload selector",
        ),
        (
            "S8.34",
            'E',
            when("destination.user", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` destination.user: deprecated attribute destination.user",
        ),
        (
            "S8.34",
            'E',
            when("destination.name", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` destination.name: deprecated attribute destination.name",
        ),
        (
            "S8.34",
            'E',
            when("source.pricipal", "a"),
            "spec.rules[0].when[0].key: invalid policy p.n: invalid `value` for `key` source.pricipal: unknown attribute: source.pricipal",
        ),
        ("S8.34", '-', when("request.headers[X-A]", "a"), ""),
        ("S8.34", '-', when("request.auth.claims[a][b]", "a"), ""),
        (
            "S8.36",
            '-',
            source(json!({"principals": ["spiffe://cluster.local/ns/a/sa/b"]})),
            "",
        ),
        (
            "S8.36",
            '-',
            operation(json!({"methods": ["no such"], "hosts": ["not a host"]})),
            "",
        ),
        (
            "S8.60",
            'S',
            ap(json!({"targetRefs": vec![json!({"kind": "Service", "name": "s"}); 17]})),
            "spec.targetRefs: too many: 17: must have at most 16 items",
        ),
        (
            "S8.60",
            'S',
            ap(json!({"targetRefs": [{"kind": "Service"}]})),
            "spec.targetRefs[0].name: name is required",
        ),
        (
            "S8.62",
            'S',
            ap(json!({"rules": vec![json!({}); 513]})),
            "spec.rules: too many: 513: must have at most 512 items",
        ),
        (
            "S8.62",
            'S',
            ap(json!({"action": "PERMIT"})),
            "spec.action: unknown value \"PERMIT\"",
        ),
        (
            "S8.62",
            'S',
            rule(json!({"when": [{"values": ["a"]}]})),
            "spec.rules[0].when[0].key: key is required",
        ),
    ];
    for (field, name) in [
        ("namespaces", "From.Namespaces"),
        ("notNamespaces", "From.NotNamespaces"),
        ("serviceAccounts", "From.ServiceAccounts"),
        ("notServiceAccounts", "From.NotServiceAccounts"),
        ("trustDomains", "From.TrustDomains"),
        ("notTrustDomains", "From.NotTrustDomains"),
        ("principals", "From.Principals"),
        ("notPrincipals", "From.NotPrincipals"),
        ("requestPrincipals", "From.RequestPrincipals"),
        ("notRequestPrincipals", "From.NotRequestPrincipals"),
    ] {
        rows.push((
            "S8.22",
            'E',
            custom(json!({"from": [{"source": {field: ["a"]}}]})),
            no_custom(name),
        ));
    }
    for key in [
        "source.namespace",
        "source.serviceAccount",
        "source.trustDomain",
        "source.principal",
        "request.auth.claims[a]",
        "request.auth.principal",
    ] {
        let text = leak(format!(
            "spec.rules[0].when: invalid policy p.n: {key} is currently not supported with CUSTOM action"
        ));
        rows.push((
            "S8.22",
            'E',
            custom(json!({"when": [{"key": key, "values": ["a"]}]})),
            text,
        ));
    }
    rows.push(("S8.22", '-', custom(json!({"from": [{"source": {"ipBlocks": ["1.1.1.1"]}}], "when": [{"key": "request.headers[a]", "values": ["a"]}]})), ""));
    let tcp = "spec.rules: configured AuthorizationPolicy will deny all traffic to TCP ports under its scope due to the use of only HTTP attributes in a DENY rule; it is recommended to explicitly specify the port";
    let deny = |rule: Value| ap(json!({"action": "DENY", "rules": [rule]}));
    for denied in [
        json!({"to": [{"operation": {"methods": ["GET"]}}]}),
        json!({"from": [{"source": {"requestPrincipals": ["*"]}}]}),
        json!({"from": [{"source": {"trustDomains": ["a"]}}]}),
    ] {
        rows.push(("S8.35", 'W', deny(denied), tcp));
    }
    check(rows);
    for silent in [
        json!({"to": [{"operation": {"methods": ["GET"], "ports": ["80"]}}]}),
        json!({"from": [{"source": {"namespaces": ["a"], "requestPrincipals": ["*"]}}]}),
        json!({"when": [{"key": "request.headers[a]", "values": ["b"]}]}),
        json!({}),
    ] {
        let found = crate::validate::object(&deny(silent.clone()));
        assert!(found.is_empty(), "S8.35: {silent}: {found:?}");
    }
}

#[test]
fn authentication() {
    let good = json!({"issuer": "a", "jwksUri": "https://a/b"});
    let with = |key: &str, value: Value| {
        let mut rule = good.clone();
        rule[key] = value;
        ra(rule)
    };
    let selector = json!({"matchLabels": {"a": "b"}});
    check(vec![
        (
            "S8.40",
            'E',
            with("audiences", json!(["a", ""])),
            "spec.jwtRules[0].audiences: audience must be non-empty string",
        ),
        (
            "S8.40",
            'E',
            ra(json!({})),
            "spec.jwtRules[0].issuer: issuer or jwksUri must be non-empty string",
        ),
        (
            "S8.40",
            'E',
            ra(json!({"issuer": "a", "jwksUri": "ftp://a"})),
            "spec.jwtRules[0].jwksUri: URI scheme \"ftp\" is not supported",
        ),
        (
            "S8.40",
            'E',
            ra(json!({"issuer": "a", "jwksUri": "a/b"})),
            "spec.jwtRules[0].jwksUri: URI scheme \"\" is not supported",
        ),
        (
            "S8.40",
            'E',
            ra(json!({"issuer": "a", "jwksUri": "http://a:x/b"})),
            "spec.jwtRules[0].jwksUri: port number in \"http://a:x/b\" must be numeric and at most 65535",
        ),
        (
            "S8.40",
            'E',
            ra(json!({"issuer": "a", "jwksUri": "http:///b"})),
            "spec.jwtRules[0].jwksUri: URI \"http:///b\" has no host",
        ),
        (
            "S8.40",
            'E',
            ra(json!({"issuer": "a", "jwks": "{}"})),
            "spec.jwtRules[0].jwks: jwks parse error: no \"keys\" array",
        ),
        (
            "S8.41",
            'E',
            with("fromHeaders", json!([null])),
            "spec.jwtRules[0].fromHeaders[0]: location header name must be non-null",
        ),
        (
            "S8.41",
            'E',
            with("fromHeaders", json!([{"name": ""}])),
            "spec.jwtRules[0].fromHeaders: location header name must be non-empty string",
        ),
        (
            "S8.41",
            'E',
            with("fromParams", json!([""])),
            "spec.jwtRules[0].fromParams: location query must be non-empty string",
        ),
        (
            "S8.41",
            'E',
            with("fromCookies", json!([""])),
            "spec.jwtRules[0].fromCookies: cookie name must be non-empty string",
        ),
        (
            "S8.42",
            'E',
            with("outputClaimToHeaders", json!([null])),
            "spec.jwtRules[0].outputClaimToHeaders[0]: outputClaimToHeaders must not be null",
        ),
        (
            "S8.42",
            'E',
            with("outputClaimToHeaders", json!([{"header": "a", "claim": ""}])),
            "spec.jwtRules[0].outputClaimToHeaders: outputClaimToHeaders header and claim value must be non-empty string",
        ),
        (
            "S8.42",
            'E',
            with("outputClaimToHeaders", json!([{"header": "a:b", "claim": "c"}])),
            "spec.jwtRules[0].outputClaimToHeaders: header name a:b is not a valid header name",
        ),
        (
            "S8.42",
            '-',
            with("outputClaimToHeaders", json!([{"header": "x-a_B", "claim": "c"}])),
            "",
        ),
        (
            "S8.43",
            'E',
            with("timeout", json!("0.5ms")),
            "spec.jwtRules[0].timeout: duration must be greater than 1ms",
        ),
        (
            "S8.43",
            'E',
            with("timeout", json!("1.5ms")),
            "spec.jwtRules[0].timeout: only durations to ms precision are supported",
        ),
        ("S8.43", '-', with("timeout", json!("1ms")), ""),
        (
            "S8.44",
            'W',
            ra(
                json!({"issuer": "a", "jwks": "{\"keys\":[{\"kty\":\"RSA\",\"n\":\"a\",\"e\":\"b\"},{\"kty\":\"oct\",\"k\":\"c\"}]}"}),
            ),
            "spec.jwtRules[0].jwks: jwks key at index 1 contains private key material; only public keys are used for verification",
        ),
        (
            "S8.45",
            '-',
            of(
                "security.istio.io/v1",
                "RequestAuthentication",
                json!({"jwtRules": [good.clone(), good.clone()]}),
            ),
            "",
        ),
        (
            "S8.45",
            '-',
            of("security.istio.io/v1", "RequestAuthentication", json!({"jwtRules": []})),
            "",
        ),
        (
            "S8.46",
            'E',
            pa(json!({"portLevelMtls": {"80": {}}})),
            "spec.portLevelMtls: mesh/namespace peer authentication cannot have port level mTLS",
        ),
        (
            "S8.46",
            'E',
            pa(json!({"selector": selector, "portLevelMtls": {}})),
            "spec.portLevelMtls: port level mTLS, if defined, must have at least one element",
        ),
        (
            "S8.46",
            'E',
            pa(json!({"selector": selector, "portLevelMtls": {"0": {}}})),
            "spec.portLevelMtls[0]: port number 0 must be in the range 1..65535",
        ),
        (
            "S8.46",
            'E',
            pa(json!({"selector": selector, "portLevelMtls": {"65536": {}}})),
            "spec.portLevelMtls[65536]: port number 65536 must be in the range 1..65535",
        ),
        (
            "S8.47",
            'S',
            pa(json!({"targetRefs": []})),
            "spec.targetRefs: unknown field \"targetRefs\"",
        ),
        (
            "S8.63",
            'S',
            pa(json!({"mtls": {"mode": "OFF"}})),
            "spec.mtls.mode: unknown value \"OFF\"",
        ),
        (
            "S8.63",
            'S',
            pa(json!({"selector": selector, "portLevelMtls": {}})),
            "spec.portLevelMtls: must have at least 1 entries",
        ),
        (
            "S8.64",
            'E',
            ra(json!({"issuer": "a", "jwksUri": "https://a", "jwks": "{\"keys\":[]}"})),
            "spec.jwtRules[0].jwks: only one of jwks or jwksUri can be set",
        ),
        (
            "S8.64",
            'S',
            ra(json!({"issuer": "", "jwksUri": "https://a"})),
            "spec.jwtRules[0].issuer: must not be empty",
        ),
        (
            "S8.64",
            'S',
            ra(json!({"jwksUri": "https://a"})),
            "spec.jwtRules[0].issuer: issuer is required",
        ),
        (
            "S8.64",
            'S',
            ra(json!({"issuer": "a", "jwksUri": format!("https://{}", "a".repeat(2048))})),
            "spec.jwtRules[0].jwksUri: too many: 2056: must have at most 2048 characters",
        ),
        (
            "S8.64",
            'S',
            with("spaceDelimitedClaims", json!(vec!["a"; 65])),
            "spec.jwtRules[0].spaceDelimitedClaims: too many: 65: must have at most 64 items",
        ),
    ]);
}

#[test]
fn networking() {
    let http = json!({"number": 80, "name": "http", "protocol": "HTTP"});
    let port = |settings: Value| dr(json!({"host": "a", "trafficPolicy": {"portLevelSettings": [settings]}}));
    let files = json!({"mode": "SIMPLE", "serverCertificate": "a", "privateKey": "b"});
    let plus = |key: &str, value: Value| {
        let mut tls = files.clone();
        tls[key] = value;
        gw_tls(tls)
    };
    let ports = json!([{"number": 80, "name": "http", "protocol": "HTTP"}]);
    check(vec![
        (
            "S8.50",
            'E',
            dr(json!({"host": "a..b"})),
            "spec.host: domain name \"a..b\" invalid, use a DNS name, optionally with a leading \"*.\"",
        ),
        (
            "S8.50",
            'E',
            dr(json!({})),
            "spec.host: domain name \"\" invalid (empty domain name not allowed)",
        ),
        (
            "S8.50",
            'E',
            dr(json!({"host": "a", "trafficPolicy": {}})),
            "spec.trafficPolicy: traffic policy must have at least one field",
        ),
        (
            "S8.50",
            'E',
            dr(json!({"host": "a", "subsets": [{"name": "v1", "trafficPolicy": {}}]})),
            "spec.subsets[0].trafficPolicy: traffic policy must have at least one field",
        ),
        (
            "S8.50",
            'E',
            dr(json!({"host": "a", "subsets": [{"name": "v1"}, {"name": "v1"}]})),
            "spec.subsets[1].name: duplicate subset names: v1",
        ),
        (
            "S8.50",
            'E',
            dr(json!({"host": "a", "subsets": [{"name": "V_1"}]})),
            "spec.subsets[0].name: subset name is invalid: \"V_1\"",
        ),
        (
            "S8.50",
            'E',
            port(json!({"port": {"number": 0}, "tls": {}})),
            "spec.trafficPolicy.portLevelSettings[0].port: portTrafficPolicy must have valid port",
        ),
        (
            "S8.50",
            'E',
            port(json!({"port": {"number": 80}})),
            "spec.trafficPolicy.portLevelSettings[0]: port traffic policy must have at least one field",
        ),
        (
            "S8.51",
            'E',
            dr_tls(json!({"mode": "MUTUAL", "privateKey": "k"})),
            "spec.trafficPolicy.tls: client certificate required for mutual tls",
        ),
        (
            "S8.51",
            'E',
            dr_tls(json!({"mode": "MUTUAL", "clientCertificate": "c"})),
            "spec.trafficPolicy.tls: private key required for mutual tls",
        ),
        (
            "S8.51",
            'E',
            dr_tls(json!({"mode": "MUTUAL", "credentialName": "c", "caCrl": "d"})),
            "spec.trafficPolicy.tls: cannot specify client certificates or CA certificate or CA CRL If credentialName is set",
        ),
        (
            "S8.51",
            'E',
            dr_tls(json!({"mode": "SIMPLE", "insecureSkipVerify": true, "credentialName": "c"})),
            "spec.trafficPolicy.tls: cannot specify CA certificates, credential name or subject alternate names if InsecureSkipVerify is set",
        ),
        (
            "S8.51",
            'E',
            dr_tls(
                json!({"mode": "MUTUAL", "credentialName": "c", "insecureSkipVerify": true, "subjectAltNames": ["a"]}),
            ),
            "spec.trafficPolicy.tls: cannot specify CA certificates or subject alternate names if InsecureSkipVerify is set",
        ),
        (
            "S8.51",
            'E',
            dr_tls(json!({"mode": "SIMPLE", "credentialName": "configmap://other/x"})),
            "spec.trafficPolicy.tls: configmap:// credentialName must be in the namespace of the rule",
        ),
        (
            "S8.51",
            '-',
            dr_tls(json!({"mode": "ISTIO_MUTUAL", "clientCertificate": "c"})),
            "",
        ),
        (
            "S8.52",
            'E',
            dr(json!({"host": "a", "exportTo": [".", "n"]})),
            "spec.exportTo: duplicate entries in exportTo: n",
        ),
        (
            "S8.52",
            'E',
            dr(json!({"host": "a", "exportTo": ["*", "b"]})),
            "spec.exportTo: cannot have both public (*) or none (~) and other values in exportTo",
        ),
        (
            "S8.52",
            'E',
            dr(json!({"host": "a", "exportTo": ["~"]})),
            "spec.exportTo: exportTo: ~ is not allowed for this kind",
        ),
        (
            "S8.52",
            'E',
            dr(json!({"host": "a", "exportTo": ["A_b"]})),
            "spec.exportTo: exportTo: \"A_b\" is no namespace name",
        ),
        (
            "S8.52",
            'E',
            dr(json!({"host": "a", "workloadSelector": {"matchLabels": {"a": "b"}}, "exportTo": ["*"]})),
            "spec.exportTo: destination rule with workload selector cannot have exportTo beyond current namespace",
        ),
        (
            "S8.52",
            'E',
            se(json!({"hosts": ["a.b"], "exportTo": ["~", "x"]})),
            "spec.exportTo: cannot have both public (*) or none (~) and other values in exportTo",
        ),
        ("S8.52", '-', se(json!({"hosts": ["a.b"], "exportTo": ["~"]})), ""),
        (
            "S8.53",
            'E',
            of("networking.istio.io/v1", "Gateway", json!({})),
            "spec.servers: gateway must have at least one server",
        ),
        (
            "S8.53",
            'E',
            of(
                "networking.istio.io/v1",
                "Gateway",
                json!({"servers": [{"port": http, "hosts": ["*"]}, {"port": http, "hosts": ["*"]}]}),
            ),
            "spec.servers[1].port.name: port names in servers must be unique: duplicate name http",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": http})),
            "spec.servers[0].hosts: server config must contain at least one host",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": {"number": 80, "name": "x", "protocol": "UDP"}, "hosts": ["*"]})),
            "spec.servers[0].port.protocol: invalid protocol \"UDP\", supported protocols are HTTP, HTTPS, GRPC, GRPC-WEB, HTTP2, MONGO, REDIS, MYSQL, TCP, TLS",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": {"number": 443, "name": "x", "protocol": "TLS"}, "hosts": ["*"]})),
            "spec.servers[0].tls: server must have TLS settings for HTTPS/TLS protocols",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": http, "hosts": ["*"], "tls": {"mode": "SIMPLE"}})),
            "spec.servers[0].tls: server cannot have TLS settings for non HTTPS/TLS protocols",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": http, "hosts": ["a*.b"]})),
            "spec.servers[0].hosts[0]: domain name \"a*.b\" invalid, use a DNS name, optionally with a leading \"*.\"",
        ),
        (
            "S8.53",
            'E',
            gw(json!({"port": http, "hosts": ["n/short"]})),
            "spec.servers[0].hosts[0]: short names (non FQDN) are not allowed: \"short\"",
        ),
        (
            "S8.53",
            'W',
            gw(json!({"port": {"number": 80, "name": "x", "protocol": "HTTP", "targetPort": 1}, "hosts": ["*"]})),
            "spec.servers[0].port.targetPort: targetPort has no impact on Gateways",
        ),
        (
            "S8.53",
            '-',
            gw(json!({"port": http, "hosts": ["*.a.b"], "tls": {"httpsRedirect": true}})),
            "",
        ),
        (
            "S8.54",
            'E',
            gw_tls(json!({"mode": "ISTIO_MUTUAL", "caCertificates": "c"})),
            "spec.servers[0].tls: ISTIO_MUTUAL TLS cannot have certificates or keys configured",
        ),
        (
            "S8.54",
            'E',
            plus("credentialName", json!("c")),
            "spec.servers[0].tls: only one of credential_name, credential_names, server_certificate/private_key, tls_certificates should be specified",
        ),
        (
            "S8.54",
            'E',
            gw_tls(json!({"mode": "SIMPLE", "privateKey": "b"})),
            "spec.servers[0].tls: SIMPLE TLS requires a server certificate",
        ),
        (
            "S8.54",
            'E',
            gw_tls(json!({"mode": "SIMPLE", "serverCertificate": "b"})),
            "spec.servers[0].tls: SIMPLE TLS requires a private key",
        ),
        (
            "S8.54",
            'E',
            plus("mode", json!("OPTIONAL_MUTUAL")),
            "spec.servers[0].tls: OPTIONAL_MUTUAL TLS requires a client CA bundle",
        ),
        (
            "S8.54",
            'E',
            plus("caCrl", json!("x")),
            "spec.servers[0].tls: CRL is not supported with SIMPLE TLS",
        ),
        (
            "S8.54",
            'E',
            gw_tls(json!({"mode": "MUTUAL", "credentialName": "c", "caCrl": "x"})),
            "spec.servers[0].tls: CRL is not supported with credentialName. CRL has to be specified in the credential",
        ),
        (
            "S8.54",
            'W',
            gw_tls(json!({"mode": "PASSTHROUGH", "credentialName": "c"})),
            "spec.servers[0].tls: PASSTHROUGH mode does not use certificates, they will be ignored",
        ),
        (
            "S8.54",
            'W',
            gw_tls(json!({"mode": "SIMPLE", "credentialNames": ["a", "b", "c"]})),
            "spec.servers[0].tls: at most two certificates, one RSA and one ECDSA, are used; the rest will be ignored",
        ),
        (
            "S8.54",
            'W',
            plus("cipherSuites", json!(["NO-SUCH"])),
            "spec.servers[0].tls: ignoring invalid cipher suite: NO-SUCH",
        ),
        (
            "S8.54",
            'W',
            plus("cipherSuites", json!(["AES128-SHA", "AES128-SHA"])),
            "spec.servers[0].tls: ignoring duplicate cipher suite: AES128-SHA",
        ),
        (
            "S8.54",
            'W',
            plus("minProtocolVersion", json!("TLSV1_0")),
            "spec.servers[0].tls: TLS version below TLSV1_2 require setting compatible ciphers and is not recommended",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({})),
            "spec: sidecar: empty configuration provided",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({"ingress": [{"defaultEndpoint": "127.0.0.1:80"}]})),
            "spec.ingress[0]: sidecar: port is required for ingress listeners",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({"ingress": [{"port": {"number": 80}}, {"port": {"number": 80}}]})),
            "spec.ingress[1].port.number: sidecar: ports on IP bound listeners must be unique: port 80 is duplicated",
        ),
        (
            "S8.55",
            'E',
            ingress_tls("HTTP", files.clone()),
            "spec.ingress[0].tls: sidecar: server cannot have TLS settings for non HTTPS/TLS ports",
        ),
        (
            "S8.55",
            'E',
            ingress_tls("HTTPS", json!({"mode": "ISTIO_MUTUAL"})),
            "spec.ingress[0].tls: sidecar: tls mode ISTIO_MUTUAL or AUTO_PASSTHROUGH is not supported for ingress listeners",
        ),
        (
            "S8.55",
            'E',
            ingress_tls("HTTPS", json!({"mode": "SIMPLE", "credentialName": "c"})),
            "spec.ingress[0].tls: sidecar: credentialName is not currently supported",
        ),
        (
            "S8.55",
            'E',
            ingress_tls(
                "HTTPS",
                json!({"mode": "SIMPLE", "tlsCertificates": [{"serverCertificate": "a", "privateKey": "b"}]}),
            ),
            "spec.ingress[0].tls: sidecar: tlsCertificates is not supported",
        ),
        (
            "S8.55",
            'E',
            ingress_tls("HTTPS", json!({"mode": "SIMPLE", "subjectAltNames": ["a"]})),
            "spec.ingress[0].tls: sidecar: subjectAltNames is not supported",
        ),
        (
            "S8.55",
            'E',
            ingress_tls("TLS", json!({"httpsRedirect": true})),
            "spec.ingress[0].tls: sidecar: httpsRedirect is not supported",
        ),
        ("S8.55", '-', ingress_tls("HTTPS", files.clone()), ""),
        (
            "S8.55",
            'E',
            sidecar(json!({"ingress": [{"port": {"number": 80}, "defaultEndpoint": "10.0.0.1:80"}]})),
            "spec.ingress[0].defaultEndpoint: sidecar: defaultEndpoint must be of form 127.0.0.1:<port>, 0.0.0.0:<port>, [::1]:port, [::]:port, or unix://filepath",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({"egress": [{"hosts": ["a/*"]}, {"port": {"number": 80}, "hosts": ["a/*"]}]})),
            "spec.egress[0]: sidecar: the egress listener with empty port should be the last listener in the list",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({"egress": [{"hosts": ["a.b"]}]})),
            "spec.egress[0].hosts: sidecar: host must be of form namespace/dnsName: \"a.b\"",
        ),
        (
            "S8.55",
            'W',
            sidecar(json!({"egress": [{"hosts": ["*/*", "a/*"]}]})),
            "spec.egress[0].hosts: `*/*` host select all resources, no other hosts can be added",
        ),
        (
            "S8.55",
            'E',
            sidecar(json!({"outboundTrafficPolicy": {"mode": "ALLOW_ANY_DYNAMIC_DNS"}})),
            "spec.outboundTrafficPolicy.mode: sidecar: ALLOW_ANY_DYNAMIC_DNS is only supported mesh-wide",
        ),
        (
            "S8.56",
            'E',
            se(json!({})),
            "spec.hosts: service entry must have at least one host",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["*"]})),
            "spec.hosts[0]: invalid host *",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["a.b"], "ports": [{"number": 80, "name": "x"}, {"number": 81, "name": "x"}]})),
            "spec.ports[1].name: service entry port name \"x\" already defined",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["a.b"], "ports": [{"number": 80, "name": "x"}, {"number": 80, "name": "y"}]})),
            "spec.ports[1].number: service entry port 80 already defined",
        ),
        (
            "S8.56",
            'E',
            se(
                json!({"hosts": ["a.b"], "resolution": "STATIC", "workloadSelector": {"labels": {"a": "b"}}, "endpoints": [{"address": "1.1.1.1"}]}),
            ),
            "spec.endpoints: only one of WorkloadSelector or Endpoints is allowed in Service Entry",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["a.b"], "endpoints": [{"address": "1.1.1.1"}]})),
            "spec.endpoints[0]: no endpoints should be provided for resolution type none",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["a.b"], "ports": ports, "resolution": "DNS", "endpoints": [{"address": "a b"}]})),
            "spec.endpoints[0].address: endpoint address \"a b\" is not a valid FQDN or an IP address",
        ),
        (
            "S8.56",
            'E',
            se(
                json!({"hosts": ["a.b"], "ports": ports, "resolution": "STATIC", "endpoints": [{"address": "1.1.1.1", "ports": {"x": 1}}]}),
            ),
            "spec.endpoints[0].ports: endpoint port x is not defined by the service entry",
        ),
        (
            "S8.56",
            'E',
            se(json!({"hosts": ["a.b"], "resolution": "DNS", "addresses": ["10.0.0.0/8"]})),
            "spec.addresses[0]: CIDR addresses are allowed only for NONE/STATIC resolution types",
        ),
        (
            "S8.58",
            'E',
            vs_header("@request.auth.claims"),
            "spec.http[0].match[0].headers[@request.auth.claims]: header \"@request.auth.claims\" is no claim: write @request.auth.claims.a.b or @request.auth.claims[a][b]",
        ),
        (
            "S8.58",
            'E',
            vs_header("@request.auth.claims.a[b]"),
            "spec.http[0].match[0].headers[@request.auth.claims.a[b]]: header \"@request.auth.claims.a[b]\" is no claim: write @request.auth.claims.a.b or @request.auth.claims[a][b]",
        ),
        (
            "S8.58",
            'E',
            vs_header("@request.headers.a"),
            "spec.http[0].match[0].headers[@request.headers.a]: header \"@request.headers.a\" is no claim: write @request.auth.claims.a.b or @request.auth.claims[a][b]",
        ),
        ("S8.58", '-', vs_header("@Request.auth.claims.a.b"), ""),
        ("S8.58", '-', vs_header("@request.auth.claims[a][b]"), ""),
    ]);
}

#[test]
fn mesh_config() {
    let found = |text: &str| -> Vec<String> {
        let line = |f: &Diagnostic| format!("{:?} {}: {}", f.severity, f.path, f.message);
        match crate::MeshConfig::read(text) {
            Err(refused) => vec![line(&refused)],
            Ok((config, unknown)) => unknown.iter().chain(&config.validate()).map(line).collect(),
        }
    };
    let has = |text: &str, expected: &str| {
        let all = found(text);
        assert!(
            all.iter().any(|f| f.contains(expected)),
            "S8.57: no {expected:?} in {all:?}"
        );
    };
    has("trustDomain: A_b\n", "Error trustDomain: ");
    has("meshMTLS: {ecdhCurves: [P-256]}\n", "ecdhCurves");
    has(
        "extensionProviders: [{name: '', envoyExtAuthzGrpc: {service: a, port: 1}}]\n",
        "Warning extensionProviders[0]",
    );
    has(
        "extensionProviders: [{name: x, envoyExtAuthzGrpc: {service: a, port: 1}}, {name: x, envoyExtAuthzGrpc: {service: a, port: 1}}]\n",
        "extensionProviders[1]",
    );
    has(
        "extensionProviders: [{name: x, envoyExtAuthzHttp: {service: '', port: 1}}]\n",
        "extensionProviders[0]",
    );
    has(
        "extensionProviders: [{name: x, envoyExtAuthzHttp: {service: a, port: 0}}]\n",
        "extensionProviders[0]",
    );
    has(
        "extensionProviders: [{name: x, envoyExtAuthzHttp: {service: a, port: 1, statusOnError: '9'}}]\n",
        "extensionProviders[0]",
    );
    has(
        "extensionProviders: [{name: x, envoyExtAuthzHttp: {service: a, port: 1, pathPrefix: a}}]\n",
        "extensionProviders[0]",
    );
    assert_eq!(
        found(
            "extensionProviders: [{name: x, envoyExtAuthzHttp: {service: a.b, port: 1, statusOnError: '503', pathPrefix: /a}}]\n"
        ),
        Vec::<String>::new()
    );
}
