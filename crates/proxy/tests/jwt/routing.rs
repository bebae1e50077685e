//! Routes that ask for claims (S3.80–S3.84), chosen after the token is verified.

use std::collections::BTreeSet;

use mantlet_model::http::JwtAuthn;
use mantlet_model::route::{ClaimMatch, Route, RouteAction, RouteMatch, RouteTable, StringMatch};
use mantlet_testkit::jwt::Issuer;
use serde_json::json;

use super::cases::{get, provider};
use super::common::{forward_to, table};
use super::pair::Pair;

fn claim(path: &[&str], value: Option<StringMatch>, invert: bool) -> ClaimMatch {
    ClaimMatch {
        path: path.iter().map(|s| s.to_string()).collect(),
        value,
        invert,
    }
}

/// Each route answers with a text of its own; no route is 404.
fn routes() -> RouteTable {
    let exact = |text: &str| Some(StringMatch::Exact(text.into()));
    let list: Vec<(&str, Vec<ClaimMatch>)> = vec![
        ("admin", vec![claim(&["roles"], exact("admin"), false)]),
        ("nested", vec![claim(&["a", "b"], exact("deep"), false)]),
        (
            "prefix",
            vec![claim(&["sub"], Some(StringMatch::Prefix("svc-".into())), false)],
        ),
        (
            "regex",
            vec![claim(&["sub"], Some(StringMatch::Regex("u[0-9]+".into())), false)],
        ),
        ("scope", vec![claim(&["scope"], exact("write"), false)]),
        ("present", vec![claim(&["flag"], None, false)]),
        (
            "both",
            vec![claim(&["x"], exact("1"), false), claim(&["y"], exact("1"), true)],
        ),
        (
            "without",
            vec![claim(&["sub"], None, true), claim(&["z"], exact("1"), true)],
        ),
    ];
    let mut table = table("claims", &["*"], forward_to("app", None));
    std::sync::Arc::make_mut(&mut table.hosts[0]).routes = list
        .into_iter()
        .map(|(name, claims)| Route {
            name: name.into(),
            matches: RouteMatch {
                claims,
                ..RouteMatch::default()
            },
            action: RouteAction::Respond {
                status: 200,
                body: name.into(),
            },
            decorator: String::new(),
            request_headers: vec![],
            response_headers: vec![],
        })
        .collect();
    table
}

#[tokio::test]
async fn claims_choose_routes_as_in_envoy() {
    let issuer = Issuer::new();
    let mut provider = provider("i", &[issuer.jwk("Ed25519", json!({}))]);
    provider.clear_route_cache = true;
    let plan = JwtAuthn {
        providers: vec![provider],
    };
    let table = routes();
    let pair = Pair::with_routes(vec![plan], Some(&table)).await;
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for claims in [
        json!({"roles": ["user", "admin"]}),
        json!({"roles": "admin"}),
        json!({"roles": "admins"}),
        json!({"roles": {"admin": true}}),
        json!({"roles": ["user"], "sub": "x"}),
        json!({"a": {"b": "deep"}}),
        json!({"a.b": "deep"}),
        json!({"a": {"b": ["x", "deep"]}}),
        json!({"sub": "svc-1"}),
        json!({"sub": "u12"}),
        json!({"sub": "u12x"}),
        json!({"sub": "s", "scope": "read write"}),
        json!({"sub": "s", "scope": ["read write"]}),
        json!({"sub": "s", "flag": true}),
        json!({"sub": "s", "flag": 0}),
        json!({"sub": "s", "flag": {}}),
        json!({"sub": "s", "flag": ""}),
        json!({"sub": "s", "flag": null}),
        json!({"sub": "s", "x": "1"}),
        json!({"sub": "s", "x": "1", "y": "1"}),
        json!({"sub": "s", "x": "1", "y": ["2", "1"]}),
        json!({"sub": "s", "x": 1}),
        json!({}),
        json!({"z": "1"}),
        json!({"z": ["1"]}),
    ] {
        let mut claims = claims;
        claims["iss"] = "i".into();
        let bearer = format!("Bearer {}", issuer.token("EdDSA", &claims));
        let request = get("/", &[("authorization", &bearer)]);
        let (theirs, ours) = (pair.envoy(0, &request).await, pair.ours(0, &request).await);
        if theirs != ours {
            wrong.push(format!("{claims}: envoy {theirs:?}, ours {ours:?}"));
        }
        seen.insert(ours.body);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let request = get("/", &[]);
    assert_eq!(pair.envoy(0, &request).await, pair.ours(0, &request).await, "no token");
    let all: Vec<&str> = seen.iter().map(String::as_str).collect();
    assert_eq!(
        all,
        [
            "", "admin", "both", "nested", "prefix", "present", "regex", "scope", "without"
        ]
    );
    pair.stop();
}
