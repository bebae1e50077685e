//! Which providers a workload gets from the policies around it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::mesh::Mesh;
use crate::world::Kind;

/// A key set with one Ed25519 key (the point of RFC 8037, appendix A.2).
const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

fn world(objects: &[(&str, &str, Value)]) -> World {
    let mut world = World::new(Mesh::default());
    for (namespace, name, spec) in objects {
        world.set_config(
            Kind::RequestAuthentication,
            &json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}),
        );
    }
    world
}

fn of<'a>(labels: &'a BTreeMap<String, String>, gateway: bool) -> Target<'a> {
    Target {
        namespace: "a",
        labels,
        gateway,
    }
}

fn providers(world: &World) -> Vec<JwtProvider> {
    let labels = BTreeMap::from([("app".to_string(), "web".to_string())]);
    authentication(world, of(&labels, false)).map_or_else(Vec::new, |a| a.providers)
}

#[test]
fn rules_of_all_policies_are_joined_and_sorted_by_issuer() {
    let rules = |issuers: &[&str], mark: &str| {
        let rule = |i: &&str| json!({"issuer": i, "jwks": KEYS, "audiences": [mark]});
        json!({"jwtRules": issuers.iter().map(rule).collect::<Vec<_>>()})
    };
    let world = world(&[
        ("a", "own", rules(&["z", "m"], "own")),
        ("istio-system", "mesh", rules(&["m", "b"], "mesh")),
        ("other", "no", rules(&["a"], "other")),
        ("a", "empty", json!({})),
        (
            "a",
            "elsewhere",
            json!({"selector": {"matchLabels": {"app": "db"}}, "jwtRules": [{"issuer": "q", "jwks": KEYS}]}),
        ),
    ]);
    let found: Vec<_> = providers(&world)
        .iter()
        .map(|p| (p.name.clone(), p.issuer.clone(), p.audiences[0].clone()))
        .collect();
    let expected = [("b", "mesh"), ("m", "mesh"), ("m", "own"), ("z", "own")];
    let expected: Vec<_> = expected
        .iter()
        .enumerate()
        .map(|(n, (issuer, mark))| (format!("origins-{n}"), issuer.to_string(), mark.to_string()))
        .collect();
    assert_eq!(found, expected, "S3.2, S3.3");
    assert_eq!(providers(&self::world(&[("a", "x", json!({}))])), [], "S3.4");
}

#[test]
fn targets_bind_gateways_only() {
    let spec = json!({
        "targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"}],
        "jwtRules": [{"issuer": "i", "jwks": KEYS}],
    });
    let world = world(&[("a", "x", spec)]);
    let labels = BTreeMap::from([("gateway.networking.k8s.io/gateway-name".to_string(), "g".to_string())]);
    let bound = authentication(&world, of(&labels, true)).unwrap();
    assert!(bound.providers[0].clear_route_cache, "S3.50");
    assert!(authentication(&world, of(&labels, false)).is_none());
}

#[test]
fn fetched_keys_are_used_when_they_are_there() {
    let mut world = world(&[("a", "x", json!({"jwtRules": [{"issuer": "i", "jwksUri": "http://k"}]}))]);
    assert_eq!(&*providers(&world)[0].jwks, NO_KEYS, "S3.62");
    world.set_key_set("i", "http://k", Some(KEYS.into()));
    assert_eq!(&*providers(&world)[0].jwks, KEYS);
    world.set_key_set("i", "http://k", Some("<html>".into()));
    assert_eq!(&*providers(&world)[0].jwks, NO_KEYS);
    world.set_key_set("other", "http://k", Some(KEYS.into()));
    world.set_key_set("i", "http://k", None);
    assert_eq!(
        &*providers(&world)[0].jwks,
        NO_KEYS,
        "keys belong to issuer and address"
    );
}

#[test]
fn inline_keys_win_and_bad_ones_verify_nothing() {
    let spec = json!({"jwtRules": [{"issuer": "i", "jwksUri": "http://k", "jwks": KEYS}]});
    let mut world = world(&[("a", "x", spec)]);
    world.set_key_set("i", "http://k", Some("{}".into()));
    assert_eq!(&*providers(&world)[0].jwks, KEYS);
    for bad in ["{", "[]", r#"{"keys":[]}"#, r#"{"keys":[{"kty":"RSA"}]}"#] {
        let world = self::world(&[("a", "x", json!({"jwtRules": [{"issuer": "i", "jwks": bad}]}))]);
        assert_eq!(&*providers(&world)[0].jwks, NO_KEYS, "{bad}");
        let told = problems(&world, &world.request_authentications("a")[0]);
        assert!(told[0].contains("tokens of issuer \"i\" are refused"), "{told:?}");
    }
}

#[test]
fn what_cannot_be_read_refuses_tokens_on_its_target() {
    let selector = json!({"matchLabels": {"app": "web"}});
    let world = world(&[
        ("a", "bad", json!({"selector": selector, "jwtRules": [{"issuer": 7}]})),
        ("a", "good", json!({"jwtRules": [{"issuer": "i", "jwks": KEYS}]})),
    ]);
    let found = providers(&world);
    assert_eq!((found[0].issuer.as_str(), &*found[0].jwks), ("", NO_KEYS));
    assert_eq!(found[1].issuer, "i", "the readable policy stays in force");
    let others = BTreeMap::new();
    assert_eq!(authentication(&world, of(&others, false)).unwrap().providers.len(), 1);
    assert!(problems(&world, &world.request_authentications("a")[0])[0].contains("cannot be read"));
}

#[test]
fn every_field_reaches_the_provider() {
    let spec = json!({"jwtRules": [{
        "issuer": "i", "audiences": ["a", ""], "jwks": KEYS, "forwardOriginalToken": true,
        "fromHeaders": [{"name": "X-Token", "prefix": "T "}, {"name": "bad name"}, {"name": "x", "prefix": "\r\n"}],
        "fromParams": ["p", ""], "fromCookies": ["", "c"],
        "outputPayloadToHeader": "X-Payload",
        "outputClaimToHeaders": [{"header": "X-Sub", "claim": "sub"}, {"header": "x y", "claim": "a"}],
        "spaceDelimitedClaims": ["roles", "scope"],
    }]});
    let world = world(&[("a", "x", spec)]);
    let expected = JwtProvider {
        name: "origins-0".into(),
        issuer: "i".into(),
        audiences: vec!["a".into(), "".into()],
        jwks: KEYS.into(),
        from_headers: vec![("x-token".into(), "T ".into())],
        from_params: vec!["p".into()],
        from_cookies: vec!["c".into()],
        forward: true,
        payload_header: Some("x-payload".into()),
        claim_headers: vec![("x-sub".into(), "sub".into())],
        space_delimited: vec!["roles".into()],
        clear_route_cache: false,
    };
    assert_eq!(providers(&world), [expected]);
    assert_eq!(problems(&world, &world.request_authentications("a")[0]).len(), 3);
}

/// A rule whose own places cannot exist must not fall back to the default ones.
#[test]
fn impossible_places_do_not_become_the_default_ones() {
    let spec = json!({"jwtRules": [{"issuer": "i", "jwks": KEYS, "fromHeaders": [{"name": ""}]}]});
    let world = world(&[("a", "x", spec)]);
    assert_eq!(providers(&world), []);
    assert!(problems(&world, &world.request_authentications("a")[0])[0].contains("no request can carry"));
}
