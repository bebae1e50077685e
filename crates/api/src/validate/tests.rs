//! Rules of the kinds beside AuthorizationPolicy, by their messages (SEMANTICS 8a, 8b, 8d, 8e).

mod catalogue;

use serde_json::{Value, json};

use super::object;
use crate::diagnostic::Severity;

#[track_caller]
fn check(api: &str, kind: &str, spec: Value, error: Option<&str>) {
    let found = object(&json!({
        "apiVersion": api, "kind": kind, "metadata": {"name": "p", "namespace": "n"}, "spec": spec,
    }));
    let errors: Vec<String> = found
        .iter()
        .filter(|f| f.severity == Severity::Error)
        .map(ToString::to_string)
        .collect();
    match error {
        None => assert!(errors.is_empty(), "{spec}: {errors:?}"),
        Some(part) => assert!(
            errors.iter().any(|e| e.contains(part)),
            "{spec}: no {part:?} in {errors:?}"
        ),
    }
}

const SECURITY: &str = "security.istio.io/v1beta1";
const NETWORKING: &str = "networking.istio.io/v1alpha3";

#[test]
fn peer_authentication() {
    let pa = |spec, error| check(SECURITY, "PeerAuthentication", spec, error);
    pa(json!({"mtls": {"mode": "STRICT"}}), None);
    pa(json!({}), None);
    let selector = json!({"matchLabels": {"a": "b"}});
    pa(
        json!({"selector": selector, "portLevelMtls": {"8080": {"mode": "DISABLE"}}}),
        None,
    );
    pa(
        json!({"portLevelMtls": {"8080": {"mode": "DISABLE"}}}),
        Some("mesh/namespace peer authentication cannot have port level mTLS"),
    );
    pa(
        json!({"selector": selector, "portLevelMtls": {}}),
        Some("port level mTLS, if defined, must have at least one element"),
    );
    pa(
        json!({"selector": selector, "portLevelMtls": {"70000": {}}}),
        Some("in the range 1..65535"),
    );
    pa(
        json!({"selector": selector, "portLevelMtls": {"http": {}}}),
        Some("error decoding configuration"),
    );
    pa(
        json!({"mtls": {"mode": "Strict"}}),
        Some("error decoding configuration: spec.mtls.mode"),
    );
}

#[test]
fn request_authentication() {
    let ra = |rule, error| check(SECURITY, "RequestAuthentication", json!({"jwtRules": [rule]}), error);
    ra(json!({"issuer": "a", "jwksUri": "https://a:8443/b"}), None);
    ra(json!({"issuer": "a", "jwks": "{\"keys\":[{\"kty\":\"RSA\"}]}"}), None);
    ra(json!({}), Some("issuer or jwksUri must be non-empty string"));
    ra(
        json!({"issuer": "a", "audiences": [""]}),
        Some("audience must be non-empty string"),
    );
    ra(
        json!({"issuer": "a", "jwksUri": "ftp://a"}),
        Some("URI scheme \"ftp\" is not supported"),
    );
    ra(json!({"issuer": "a", "jwksUri": "a"}), Some("is not supported"));
    ra(
        json!({"issuer": "a", "jwksUri": "http://a:b/"}),
        Some("must be numeric"),
    );
    ra(json!({"issuer": "a", "jwks": "nonsense"}), Some("jwks parse error"));
    ra(
        json!({"issuer": "a", "fromHeaders": [{"name": ""}]}),
        Some("location header name must be non-empty string"),
    );
    ra(
        json!({"issuer": "a", "fromParams": [""]}),
        Some("location query must be non-empty string"),
    );
    ra(
        json!({"issuer": "a", "fromCookies": [""]}),
        Some("cookie name must be non-empty string"),
    );
    ra(
        json!({"issuer": "a", "outputClaimToHeaders": [{"header": "a b", "claim": "c"}]}),
        Some("header name a b is not a valid header name"),
    );
    ra(
        json!({"issuer": "a", "outputClaimToHeaders": [{"header": "a"}]}),
        Some("must be non-empty string"),
    );
    ra(
        json!({"issuer": "a", "timeout": "100us"}),
        Some("duration must be greater than 1ms"),
    );
    ra(
        json!({"issuer": "a", "timeout": "1.0005s"}),
        Some("only durations to ms precision are supported"),
    );
    let private = object(&json!({
        "apiVersion": SECURITY, "kind": "RequestAuthentication", "metadata": {"name": "a"},
        "spec": {"jwtRules": [{"issuer": "a", "jwks": "{\"keys\":[{\"kty\":\"RSA\",\"d\":\"x\"}]}"}]},
    }));
    assert!(
        private[0]
            .message
            .contains("jwks key at index 0 contains private key material"),
        "{private:?}"
    );
    assert_eq!(private[0].severity, Severity::Warning);
}

#[test]
fn destination_rule() {
    let dr = |spec, error| check(NETWORKING, "DestinationRule", spec, error);
    dr(
        json!({"host": "*.a.b", "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}}),
        None,
    );
    dr(
        json!({"host": "a", "subsets": [{"name": "v1", "labels": {"v": "1"}}, {"name": "v2"}]}),
        None,
    );
    dr(json!({"host": ""}), Some("empty domain name not allowed"));
    dr(json!({"host": "a*"}), Some("invalid"));
    dr(
        json!({"host": "a", "trafficPolicy": {}}),
        Some("traffic policy must have at least one field"),
    );
    dr(
        json!({"host": "a", "subsets": [{"name": "v1"}, {"name": "v1"}]}),
        Some("duplicate subset names: v1"),
    );
    let tls = |tls| json!({"host": "a", "trafficPolicy": {"tls": tls}});
    dr(
        tls(json!({"mode": "MUTUAL"})),
        Some("client certificate required for mutual tls"),
    );
    dr(
        tls(json!({"mode": "MUTUAL", "clientCertificate": "c"})),
        Some("private key required for mutual tls"),
    );
    dr(tls(json!({"mode": "MUTUAL", "credentialName": "c"})), None);
    dr(
        tls(json!({"mode": "SIMPLE", "credentialName": "c", "caCertificates": "d"})),
        Some("If credentialName is set"),
    );
    dr(
        tls(json!({"mode": "SIMPLE", "insecureSkipVerify": true, "caCertificates": "d"})),
        Some("InsecureSkipVerify"),
    );
    dr(
        tls(json!({"mode": "SIMPLE", "credentialName": "configmap://other/x"})),
        Some("namespace of the rule"),
    );
    let port = |port| json!({"host": "a", "trafficPolicy": {"portLevelSettings": [port]}});
    dr(
        port(json!({"tls": {"mode": "SIMPLE"}})),
        Some("portTrafficPolicy must have valid port"),
    );
    dr(
        port(json!({"port": {"number": 80}})),
        Some("port traffic policy must have at least one field"),
    );
    dr(json!({"host": "a", "exportTo": [".", "n"]}), Some("duplicate"));
    dr(json!({"host": "a", "exportTo": ["*", "b"]}), Some("public"));
    dr(json!({"host": "a", "exportTo": ["~"]}), Some("~ is not allowed"));
    dr(
        json!({"host": "a", "workloadSelector": {"matchLabels": {"a": "b"}}, "exportTo": ["x"]}),
        Some("beyond current namespace"),
    );
}

#[test]
fn gateway() {
    let server = |server| json!({"selector": {"istio": "ingressgateway"}, "servers": [server]});
    let gw = |spec, error| check(NETWORKING, "Gateway", spec, error);
    let http = json!({"number": 80, "name": "http", "protocol": "HTTP"});
    let https = json!({"number": 443, "name": "https", "protocol": "HTTPS"});
    gw(server(json!({"port": http, "hosts": ["*"]})), None);
    gw(
        server(json!({"port": https, "hosts": ["a.b"], "tls": {"mode": "SIMPLE", "credentialName": "c"}})),
        None,
    );
    gw(json!({}), Some("gateway must have at least one server"));
    gw(
        server(json!({"port": http})),
        Some("server config must contain at least one host"),
    );
    gw(
        server(json!({"port": http, "hosts": ["short"]})),
        Some("short names (non FQDN) are not allowed"),
    );
    gw(server(json!({"port": http, "hosts": ["a*.b"]})), Some("invalid"));
    gw(server(json!({"hosts": ["*"]})), Some("port is required"));
    gw(
        server(json!({"port": {"number": 80, "name": "a", "protocol": "HTPP"}, "hosts": ["*"]})),
        Some("did you mean \"HTTP\""),
    );
    gw(
        server(json!({"port": https, "hosts": ["*"]})),
        Some("server must have TLS settings for HTTPS/TLS protocols"),
    );
    gw(
        server(json!({"port": http, "hosts": ["*"], "tls": {"mode": "SIMPLE"}})),
        Some("server cannot have TLS settings"),
    );
    gw(
        server(json!({"port": http, "hosts": ["*"], "tls": {"httpsRedirect": true}})),
        None,
    );
    gw(
        server(json!({"port": https, "hosts": ["*"], "tls": {"mode": "ISTIO_MUTUAL", "credentialName": "c"}})),
        Some("ISTIO_MUTUAL TLS cannot have"),
    );
    gw(
        server(json!({"port": https, "hosts": ["*"], "tls": {"mode": "SIMPLE"}})),
        Some("SIMPLE TLS requires a server certificate"),
    );
    gw(
        server(
            json!({"port": https, "hosts": ["*"], "tls": {"mode": "MUTUAL", "serverCertificate": "a", "privateKey": "b"}}),
        ),
        Some("MUTUAL TLS requires a client CA bundle"),
    );
    gw(
        server(
            json!({"port": https, "hosts": ["*"], "tls": {"mode": "SIMPLE", "serverCertificate": "a", "privateKey": "b", "credentialName": "c"}}),
        ),
        Some("only one of credential_name"),
    );
    let twice = json!({"servers": [{"port": http, "hosts": ["*"]}, {"port": http, "hosts": ["*"]}]});
    gw(twice, Some("port names in servers must be unique"));
}

#[test]
fn virtual_service() {
    let vs = |spec, error| check(NETWORKING, "VirtualService", spec, error);
    let route = json!([{"route": [{"destination": {"host": "a"}}]}]);
    vs(json!({"hosts": ["a"], "http": route}), None);
    vs(json!({"hosts": ["*"], "gateways": ["g"], "http": route}), None);
    vs(
        json!({"hosts": ["*"], "http": route}),
        Some("wildcard host * is not allowed"),
    );
    vs(
        json!({"hosts": ["a"]}),
        Some("http, tcp or tls must be provided in virtual service"),
    );
    vs(
        json!({"hosts": ["a", "a"], "http": route}),
        Some("duplicate hosts in virtual service: a"),
    );
    vs(
        json!({"hosts": ["a"], "gateways": ["a/b/c"], "http": route}),
        Some("no gateway name"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{}]}),
        Some("HTTP route, redirect or direct_response is required"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"route": [{}]}]}),
        Some("destination is required"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"route": [{"destination": {"host": "*"}}]}]}),
        Some("invalid destination host *"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"redirect": {"uri": "/"}, "route": [{"destination": {"host": "a"}}]}]}),
        Some("cannot contain both route and redirect"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"match": [{"uri": {"exact": "/a", "prefix": "/"}}], "route": [{"destination": {"host": "a"}}]}]}),
        Some("only one of exact, prefix, regex"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"match": [{"uri": {"regex": "("}}], "route": [{"destination": {"host": "a"}}]}]}),
        Some("is not a valid RE2 regex"),
    );
    vs(
        json!({"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}, "weight": -1}]}]}),
        Some("weight must be non-negative"),
    );
    vs(
        json!({"hosts": ["a"], "tls": [{"match": [{}], "route": [{"destination": {"host": "a"}}]}]}),
        Some("SNI host"),
    );
}

#[test]
fn service_entry_and_sidecar() {
    let se = |spec, error| check(NETWORKING, "ServiceEntry", spec, error);
    let port = json!([{"number": 80, "name": "http", "protocol": "HTTP"}]);
    se(json!({"hosts": ["a.b"], "ports": port, "resolution": "DNS"}), None);
    se(json!({"hosts": []}), Some("at least one host"));
    se(json!({"hosts": ["*"]}), Some("invalid host *"));
    se(
        json!({"hosts": ["a.b"], "endpoints": [{"address": "1.2.3.4"}]}),
        Some("no endpoints should be provided"),
    );
    se(
        json!({"hosts": ["a.b"], "resolution": "STATIC", "endpoints": [{"address": "x"}]}),
        Some("not a valid IP address"),
    );
    se(
        json!({"hosts": ["a.b"], "resolution": "STATIC", "ports": port, "endpoints": [{"address": "1.2.3.4", "ports": {"x": 1}}]}),
        Some("endpoint port x is not defined"),
    );
    se(
        json!({"hosts": ["a.b"], "resolution": "DNS", "addresses": ["10.0.0.0/8"]}),
        Some("CIDR addresses are allowed only"),
    );
    let sidecar = |spec, error| check(NETWORKING, "Sidecar", spec, error);
    sidecar(json!({"egress": [{"hosts": ["./*", "istio-system/*"]}]}), None);
    sidecar(json!({}), Some("empty configuration"));
    sidecar(json!({"egress": [{"hosts": ["a.b"]}]}), Some("namespace/dnsName"));
    sidecar(
        json!({"ingress": [{"port": {"number": 1}, "defaultEndpoint": "10.0.0.1:80"}]}),
        Some("defaultEndpoint must be of form"),
    );
}

#[test]
fn frame() {
    let found = object(&json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorisationPolicy"}));
    assert!(
        found[0].to_string().contains("did you mean \"AuthorizationPolicy\""),
        "{found:?}"
    );
    let found = object(&json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "a", "namespace": "b"}, "spce": {},
    }));
    assert!(
        found[0]
            .to_string()
            .contains("unknown field \"spce\" on PeerAuthentication resource b/a"),
        "{found:?}"
    );
    let annotated = |key: &str| {
        object(&json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
            "metadata": {"name": "a", "namespace": "b", "annotations": {key: "true"}}, "spec": {"host": "a"},
        }))
    };
    assert!(
        annotated("internal.istio.io/webhook-always-reject")[0]
            .message
            .ends_with("annotation found, rejecting")
    );
    assert!(
        annotated("internal.istio.io/parents")[0]
            .message
            .contains("may not be set by users")
    );
    assert!(
        annotated("istio.io/dry-run")[0]
            .message
            .contains("has unsupported annotation istio.io/dry-run")
    );
    assert!(object(&json!(null)).len() == 1 && object(&json!([1])).len() == 1);
}
