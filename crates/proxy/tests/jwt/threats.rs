//! Attacks on tokens that were met elsewhere, by their number in the list of threats, over the wire.

use std::time::Duration;

use mantlet_model::authz::{Attribute, Expr, Matcher};
use mantlet_model::http::JwtAuthn;
use mantlet_testkit::jwt::{Issuer, base64url};
use serde_json::json;

use super::cases::{get, now, provider};
use super::common::{allow, curl};
use super::pair::{Outcome, alone, alone_with, exchange};

fn one(issuer: &Issuer) -> JwtAuthn {
    JwtAuthn {
        providers: vec![provider("i", &[issuer.jwk("P-256", json!({"kid": "k"}))])],
    }
}

fn status(outcome: &Outcome) -> (u16, &str) {
    (outcome.status, &outcome.body)
}

/// A token of an unknown issuer is no missing token.
#[tokio::test]
async fn reg_118_unknown_issuers_are_not_missing_tokens() {
    let issuer = Issuer::new();
    let (_proxy, app, address) = alone(Some(one(&issuer))).await;
    for iss in ["j", "", "I", "i "] {
        let token = issuer.token("ES256", &json!({"iss": iss}));
        let answer = exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
        assert_eq!(status(&answer), (401, "Jwt issuer is not configured"), "{iss:?}");
    }
    assert_eq!(exchange(address, &get("/", &[])).await.status, 200);
    assert_eq!(app.requests().len(), 1, "only the request without a token arrives");
}

/// Without usable keys nothing verifies, whoever signs.
#[tokio::test]
async fn reg_120_without_keys_every_token_fails() {
    let issuer = Issuer::new();
    for keys in [mantlet_identity::jws::NO_KEYS, "", "{}", r#"{"keys":[]}"#, "<html>"] {
        let mut plan = one(&issuer);
        plan.providers[0].jwks = keys.into();
        let (_proxy, app, address) = alone(Some(plan)).await;
        for alg in ["ES256", "RS256", "HS256", "EdDSA", "none"] {
            let token = issuer.token(alg, &json!({"iss": "i"}));
            let answer = exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
            assert_eq!(answer.status, 401, "{keys}: {alg}");
        }
        // Signed with an empty secret.
        let signed = format!("{}.{}", base64url(r#"{"alg":"HS256"}"#), base64url(r#"{"iss":"i"}"#));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"");
        let token = format!("{signed}.{}", base64url(aws_lc_rs::hmac::sign(&key, signed.as_bytes())));
        let answer = exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
        assert_eq!(answer.status, 401);
        assert!(app.requests().is_empty());
    }
}

/// Many tokens and many providers at once.
#[tokio::test]
async fn reg_122_many_tokens_and_many_providers() {
    let issuer = Issuer::new();
    let keys = [issuer.jwk("P-256", json!({}))];
    let providers = (0..20).map(|n| {
        let mut provider = provider(&format!("i{n}"), &keys);
        provider.name = format!("origins-{n}");
        provider.from_headers = vec![("x-jwt".into(), String::new()), (format!("x-{n}"), String::new())];
        provider
    });
    let plan = JwtAuthn {
        providers: providers.collect(),
    };
    let (_proxy, _app, address) = alone(Some(plan)).await;
    let tokens: Vec<String> = (0..20)
        .map(|n| issuer.token("ES256", &json!({"iss": format!("i{n}")})))
        .collect();
    for count in [1, 2, 5, 20] {
        let own: Vec<(String, String)> = (0..count).map(|n| (format!("x-{n}"), tokens[n].clone())).collect();
        let own: Vec<(&str, &str)> = own.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(exchange(address, &get("/", &own)).await.status, 200, "{count} places");
        let listed: Vec<(&str, &str)> = tokens[..count].iter().map(|t| ("x-jwt", t.as_str())).collect();
        let answer = exchange(address, &get("/", &listed)).await;
        assert!(matches!(answer.status, 200 | 401), "{answer:?}");
        let mut one_bad = own.clone();
        one_bad.push(("x-19", "bad"));
        assert_eq!(
            exchange(address, &get("/", &one_bad)).await.status,
            401,
            "{count} good, one bad"
        );
    }
}

/// A token and a peer: both must be right, and claims of a refused or absent token are no claims.
#[tokio::test]
async fn reg_125_claims_count_only_after_verification() {
    let issuer = Issuer::new();
    let subject = Expr::atom(Attribute::Claim(vec!["sub".into()]), Matcher::Exact("admin".into()));
    let (_proxy, app, address) = alone_with(Some(one(&issuer)), allow(subject)).await;
    let bearer = |token: &str| get("/", &[("authorization", &format!("Bearer {token}"))]);
    let good = issuer.token("ES256", &json!({"iss": "i", "sub": "admin"}));
    assert_eq!(exchange(address, &bearer(&good)).await.status, 200);
    let user = issuer.token("ES256", &json!({"iss": "i", "sub": "user"}));
    assert_eq!(
        status(&exchange(address, &bearer(&user)).await),
        (403, "RBAC: access denied")
    );
    assert_eq!(
        status(&exchange(address, &get("/", &[])).await),
        (403, "RBAC: access denied")
    );
    let forged = Issuer::new().token("ES256", &json!({"iss": "i", "sub": "admin"}));
    assert_eq!(exchange(address, &bearer(&forged)).await.status, 401);
    // In a place that nobody looks at.
    let elsewhere = get("/", &[("x-token", &good)]);
    assert_eq!(exchange(address, &elsewhere).await.status, 403);
    // A preflight has no claims, and authorization sees it.
    let mut preflight = get("/", &[("origin", "x"), ("access-control-request-method", "GET")]);
    preflight
        .headers
        .push(("authorization".into(), format!("Bearer {good}")));
    preflight.method = "OPTIONS";
    assert_eq!(exchange(address, &preflight).await.status, 403, "S3.6");
    assert_eq!(app.requests().len(), 1);
}

/// A claim cannot break out of its header, and a client cannot write one or have one removed.
#[tokio::test]
async fn reg_30_claims_in_headers_are_not_forged() {
    let issuer = Issuer::new();
    let mut plan = one(&issuer);
    plan.providers[0].claim_headers = vec![("x-o-sub".into(), "sub".into())];
    let (_proxy, app, address) = alone(Some(plan)).await;
    for sub in ["a\r\nx-admin: 1", "a\nb", "a\u{0}", "\u{7f}"] {
        let token = issuer.token("ES256", &json!({"iss": "i", "sub": sub}));
        let answer = exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
        assert_eq!(answer.status, 503, "{sub:?}");
    }
    assert!(app.requests().is_empty());
    let token = issuer.token("ES256", &json!({"iss": "i", "sub": "me"}));
    let bearer = format!("Bearer {token}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("X-O-Sub", "admin"),
        ("x-o-sub", "root"),
        ("connection", "close, x-o-sub"),
    ];
    let answer = exchange(address, &get("/", &headers)).await;
    assert_eq!(answer.upstream.unwrap().1, [("x-o-sub".to_string(), "me".to_string())]);
}

/// A verified token is remembered, its end is not forgotten, and new keys are met at once.
#[tokio::test]
async fn remembered_tokens_end_with_their_time_and_their_keys() {
    let issuer = Issuer::new();
    let (proxy, app, address) = alone(Some(one(&issuer))).await;
    // The skew is forgiven, so the token ends 60 s after this.
    let end = now() - 56;
    let token = issuer.token("ES256", &json!({"iss": "i", "exp": end}));
    let request = get("/", &[("authorization", &format!("Bearer {token}"))]);
    let mut passed = 0;
    loop {
        let before = now();
        let answer = exchange(address, &request).await;
        if before > end + 60 {
            assert_eq!(status(&answer), (401, "Jwt is expired"));
            break;
        }
        if answer.status == 200 {
            passed += 1;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // On a machine that stood still for all that time it may have been late from the start.
    assert!(passed > 0 || now() > end + 65, "the token never passed");

    let lasting = issuer.token("ES256", &json!({"iss": "i"}));
    let request = get("/", &[("authorization", &format!("Bearer {lasting}"))]);
    assert_eq!(exchange(address, &request).await.status, 200);
    let other = Issuer::new();
    proxy
        .apply(super::pair::snapshot(
            &[address],
            &[Some(one(&other))],
            app.address(),
            vec![],
            None,
        ))
        .await;
    assert_eq!(
        status(&exchange(address, &request).await),
        (401, "Jwt verification fails")
    );
}

/// gRPC clients get the status in their own terms, with the challenge (S3.23).
#[tokio::test]
async fn grpc_clients_get_a_status() {
    let issuer = Issuer::new();
    let mut plan = one(&issuer);
    plan.providers[0].audiences = vec!["a".into()];
    let (proxy, _app, address) = alone(Some(plan)).await;
    let url = format!("http://{address}/x");
    let ask = async |token: String| {
        let bearer = format!("authorization: Bearer {token}");
        let arguments = [
            "--http2-prior-knowledge",
            "-H",
            "content-type: application/grpc",
            "-H",
            &bearer,
            &url,
        ];
        curl(&arguments).await
    };
    let answer = ask("bad".into()).await;
    assert_eq!(answer.status, 200, "{}", answer.error);
    assert!(answer.headers.contains("grpc-status: 16"), "{}", answer.headers);
    assert!(
        answer.headers.contains("grpc-message: jwt is not in the form"),
        "{}",
        answer.headers
    );
    assert!(
        answer.headers.contains("www-authenticate: bearer realm="),
        "{}",
        answer.headers
    );
    let answer = ask(issuer.token("ES256", &json!({"iss": "i", "aud": "b"}))).await;
    assert!(answer.headers.contains("grpc-status: 7"), "{}", answer.headers);
    let metrics = proxy.metrics();
    assert!(metrics.contains("envoy_http_jwt_authn_denied 2"), "{metrics}");
}

/// A key id that the set does not hold is told to the control plane, once.
#[tokio::test]
async fn unknown_keys_are_reported() {
    let issuer = Issuer::new();
    let plan = one(&issuer);
    let held = mantlet_identity::jws::key_set_name(plan.providers[0].jwks.as_bytes());
    let (proxy, _app, address) = alone(Some(plan)).await;
    let mut reports = proxy.shared.unknown_keys.take().unwrap();
    for _ in 0..5 {
        let token = issuer.token_with(json!({"alg": "ES256", "kid": "new"}), &json!({"iss": "i"}));
        let answer = exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
        assert_eq!(
            status(&answer),
            (401, "Jwks doesn't have key to match kid or alg from Jwt")
        );
    }
    assert_eq!(reports.try_recv().unwrap(), held);
    assert!(reports.try_recv().is_err(), "a flood is one report");
    // Tokens of strangers are none of its business.
    let token = issuer.token_with(json!({"alg": "ES256", "kid": "new"}), &json!({"iss": "other"}));
    exchange(address, &get("/", &[("authorization", &format!("Bearer {token}"))])).await;
    assert!(reports.try_recv().is_err());
}
