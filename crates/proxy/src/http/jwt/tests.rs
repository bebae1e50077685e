//! The parts of the step that are not seen from outside; requests over the wire are in `tests/jwt`.

use http::Request;
use mantlet_model::http::{JwtAuthn, JwtProvider};
use mantlet_testkit::jwt::Issuer;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn provider(issuer: &str, keys: &str) -> JwtProvider {
    JwtProvider {
        name: "origins-0".into(),
        issuer: issuer.into(),
        audiences: vec![],
        jwks: keys.into(),
        from_headers: vec![],
        from_params: vec![],
        from_cookies: vec![],
        forward: false,
        payload_header: None,
        claim_headers: vec![],
        space_delimited: vec![],
        clear_route_cache: false,
    }
}

fn plan(providers: Vec<JwtProvider>) -> Plan {
    Plan::compile(&JwtAuthn { providers }, &mut KeySets::new()).unwrap()
}

fn parts(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

#[test]
fn no_providers_is_no_plan_and_a_key_set_is_parsed_once() {
    assert!(Plan::compile(&JwtAuthn { providers: vec![] }, &mut KeySets::new()).is_none());
    let keys = Issuer::jwks(&[Issuer::new().jwk("Ed25519", json!({}))]);
    let mut sets = KeySets::new();
    let model = JwtAuthn {
        providers: vec![provider("a", &keys), provider("b", &keys)],
    };
    Plan::compile(&model, &mut sets);
    Plan::compile(&model, &mut sets);
    assert_eq!(sets.len(), 1);
    assert_eq!(Arc::strong_count(sets.values().next().unwrap().as_ref().unwrap()), 1);
}

#[test]
fn the_cache_is_bounded_and_keeps_what_is_used() {
    let verified = || {
        Rc::new(Verified {
            claims: json!({}),
            headers: vec![],
            impossible: None,
            not_before: 0,
            expires: None,
        })
    };
    let mut cache = Cache::default();
    cache.put(7, "used", verified());
    for n in 0..10_000 {
        cache.put(n % 3, &format!("token {n}"), verified());
        assert!(cache.get(7, "used").is_some(), "after {n}");
        assert!(cache.len() <= 512, "{} entries", cache.len());
    }
    assert!(cache.get(0, "token 0").is_none(), "what is not used leaves");
    assert!(cache.get(8, "used").is_none(), "an entry is one provider's");
    cache.put(9, &"x".repeat(5000), verified());
    assert!(cache.get(9, &"x".repeat(5000)).is_none(), "long tokens are not kept");
}

#[test]
fn refusals_are_not_remembered_and_success_is() {
    let issuer = Issuer::new();
    let keys = Issuer::jwks(&[issuer.jwk("P-256", json!({}))]);
    let plan = plan(vec![provider("i", &keys)]);
    let mut cache = Cache::default();
    let token = issuer.token("ES256", &json!({"iss": "i", "exp": 1000}));
    let bearer = format!("Bearer {token}");
    let good = parts("/", &[("authorization", &bearer)]);
    for _ in 0..3 {
        assert!(plan.evaluate(&good, 1000, &mut cache).unwrap().is_some());
    }
    assert_eq!(cache.len(), 1);
    let late = plan.evaluate(&good, 1061, &mut cache).unwrap_err();
    assert_eq!(late.failure, Failure::Expired, "a remembered token ends as well");
    for n in 0..100 {
        let bearer = format!("Bearer {}", issuer.token("ES256", &json!({"iss": format!("x{n}")})));
        assert!(
            plan.evaluate(&parts("/", &[("authorization", &bearer)]), 1000, &mut cache)
                .is_err()
        );
    }
    assert_eq!(cache.len(), 1);
}

#[test]
fn parameters_are_removed_and_the_rest_stays_as_sent() {
    for (query, left) in [
        ("t=1", None),
        ("t", None),
        ("a=1&t=1", Some("a=1")),
        ("t=1&a=%2F&t=2&b", Some("a=%2F&b")),
        ("%74=1&a", Some("a")),
        ("tt=1", Some("tt=1")),
        ("a=t=1", Some("a=t=1")),
    ] {
        assert_eq!(without_parameter(query, "t").as_deref(), left, "{query}");
    }
    let mut uri = "/p/%2e?t=1".parse().unwrap();
    remove_parameter(&mut uri, "t");
    assert_eq!(uri, "/p/%2e");
}

#[test]
fn scopes_and_named_claims_become_lists() {
    let claims = json!({"scope": "a b  c ", "permission": "x", "roles": "r s", "other": "p q", "n": 5});
    let claims = output::normalize(claims.as_object().unwrap().clone(), &["roles".into(), "n".into()]);
    let expected = json!({"scope": ["a", "b", "c"], "permission": ["x"], "roles": ["r", "s"], "other": "p q", "n": 5});
    assert_eq!(claims, expected, "S2.73, S3.47");
    let empty = output::normalize(json!({"scope": ""}).as_object().unwrap().clone(), &[]);
    assert_eq!(empty, json!({"scope": ""}));
}

#[test]
fn connection_cannot_name_output_headers() {
    let mut model = provider("i", "{}");
    model.claim_headers = vec![("x-sub".into(), "sub".into())];
    let plan = plan(vec![model]);
    let mut head = parts(
        "/",
        &[("connection", "close, X-Sub"), ("connection", "x-sub"), ("x-sub", "me")],
    );
    plan.strip(&mut head.headers);
    let left: Vec<_> = head
        .headers
        .iter()
        .map(|(n, v)| (n.as_str(), v.to_str().unwrap()))
        .collect();
    assert_eq!(left, [("connection", "close")]);
}

proptest! {
    /// Whatever a client writes where tokens can be, the answer is a refusal or "no token".
    #[test]
    fn nothing_passes_without_a_signature(
        authorization in "(Bearer )?[ -~]{0,60}",
        query in "[a-z_=&%A-Z0-9.]{0,60}",
        cookie in "[ -~]{0,60}",
        own in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let mut other = provider("", mantlet_identity::jws::NO_KEYS);
        other.from_headers = vec![("x-jwt".into(), String::new())];
        other.from_cookies = vec!["a".into(), "c".into()];
        other.from_params = vec!["p".into()];
        let plan = plan(vec![provider("", "{"), other]);
        let mut head = parts("/", &[("authorization", &authorization), ("cookie", &cookie)]);
        if let Ok(uri) = format!("/?access_token={query}&p={query}").parse() {
            head.uri = uri;
        }
        if let Ok(value) = http::HeaderValue::from_bytes(&own) {
            head.headers.insert("x-jwt", value);
        }
        let outcome = plan.evaluate(&head, 1000, &mut Cache::default());
        prop_assert!(!matches!(outcome, Ok(Some(_))), "{outcome:?}");
    }
}
