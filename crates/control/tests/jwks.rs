//! Key sets from a real issuer to a proxy's listener, and what a bad issuer costs: its own tokens and nothing else.

mod support;

use std::sync::{Arc, Mutex};

use http_body_util::Full;
use mantlet_control::jwks::guard::Guard;
use mantlet_identity::jws::{NO_KEYS, key_set_name};
use mantlet_model::http::JwtProvider;
use mantlet_model::listener::{Filters, Listener};
use mantlet_model::names::VIRTUAL_INBOUND;
use mantlet_testkit::EchoServer;
use mantlet_testkit::eventually;
use serde_json::{Value, json};
use support::{Cluster, Control, Dialer, PATIENCE, Proxy, node};

/// An issuer whose answer can be changed.
async fn issuer(kid: &str) -> (EchoServer, Arc<Mutex<String>>) {
    let body = Arc::new(Mutex::new(keys(kid)));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shown = body.clone();
    let server = EchoServer::on(listener, None, move |_| {
        http::Response::new(Full::from(shown.lock().unwrap().clone()))
    });
    (server, body)
}

/// A key set with the P-256 point of RFC 7515, A.3.
fn keys(kid: &str) -> String {
    json!({"keys": [{"kty": "EC", "crv": "P-256", "kid": kid,
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]})
    .to_string()
}

fn authentication(name: &str, rule: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": name, "namespace": "default"}, "spec": {"jwtRules": [rule]}})
}

async fn web() -> (Cluster, Control, Proxy) {
    web_guarded(Guard::default().with_loopback()).await
}

/// With what may be dialled for keys.
async fn web_guarded(guard: Guard) -> (Cluster, Control, Proxy) {
    let cluster = Cluster::new().await;
    let token = cluster.token("default", "web").await;
    for object in [
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-1", "namespace": "default", "labels": {"app": "web"}},
            "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "app"}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
            "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}),
    ] {
        cluster.apply(&object).await;
    }
    let control = cluster.start_guarded(cluster.client(), guard).await;
    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.anonymous()),
        token: Some(token),
    };
    let proxy = Proxy::start(node("sidecar", "web-1", "default", "web", &[("app", "web")]), dialer);
    (cluster, control, proxy)
}

fn providers(listener: Option<&Listener>) -> Vec<JwtProvider> {
    let mut managers = listener.into_iter().flat_map(|l| l.all_chains()).filter_map(|chain| {
        match (&chain.filters, chain.matches.destination_port) {
            (Filters::Http(http), Some(8080)) => Some(http),
            _ => None,
        }
    });
    let jwt = managers.next().and_then(|http| http.jwt.clone());
    jwt.map(|j| j.providers).unwrap_or_default()
}

fn held(proxy: &Proxy) -> Vec<JwtProvider> {
    providers(proxy.listener(VIRTUAL_INBOUND))
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_there_when_the_policy_is_and_follow_a_rotation() {
    let (server, body) = issuer("first").await;
    let (cluster, control, mut proxy) = web().await;
    proxy.until("listener", |p| p.listener(VIRTUAL_INBOUND).is_some()).await;
    let uri = format!("http://{}/keys", server.address());
    cluster
        .apply(&authentication("a", json!({"issuer": "i", "jwksUri": uri})))
        .await;
    // The first configuration with the policy has the keys: good tokens are never refused for want of them.
    proxy.until("the policy", |p| !held(p).is_empty()).await;
    assert!(held(&proxy)[0].jwks.contains("\"first\""), "{:?}", held(&proxy));
    assert_eq!(server.requests().len(), 1);

    *body.lock().unwrap() = keys("second");
    let name = key_set_name(held(&proxy)[0].jwks.as_bytes());
    // Reports of sets that nobody fetched change nothing; that of the held one fetches it anew, when ten seconds have passed.
    proxy.unknown_keys.send("jwks/none".into()).await.unwrap();
    proxy.unknown_keys.send(name).await.unwrap();
    proxy
        .until("the new key", |p| held(p)[0].jwks.contains("\"second\""))
        .await;
    assert_eq!(server.requests().len(), 2);
    let (_, metrics) = control.get("/metrics").await;
    assert!(
        metrics.contains("pilot_jwks_resolver_network_fetch_success_total 2"),
        "{metrics}"
    );
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_issuer_delays_its_own_policy_only() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (server, _) = issuer("good").await;
    let (cluster, control, mut proxy) = web().await;
    proxy.until("listener", |p| p.listener(VIRTUAL_INBOUND).is_some()).await;
    let dead = format!("http://{}/keys", silent.local_addr().unwrap());
    let rule = json!({"issuer": "silent", "jwksUri": dead, "timeout": "60s"});
    cluster.apply(&authentication("a", rule)).await;
    let uri = format!("http://{}/keys", server.address());
    cluster
        .apply(&authentication("b", json!({"issuer": "good", "jwksUri": uri})))
        .await;
    cluster
        .apply(
            &json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "deny", "namespace": "default"}, "spec": {}}),
        )
        .await;
    proxy.until("the good issuer", |p| !held(p).is_empty()).await;
    let issuers: Vec<String> = held(&proxy).into_iter().map(|p| p.issuer).collect();
    assert_eq!(issuers, ["good"]);
    let denies = |p: &Proxy| {
        let listener = p.listener(VIRTUAL_INBOUND).unwrap();
        listener
            .all_chains()
            .any(|chain| matches!(&chain.filters, Filters::Http(http) if !http.authz.is_empty()))
    };
    proxy.until("the other policy", denies).await;
    // A later version of the delayed object is not overtaken by the earlier one.
    let (second, _) = issuer("late").await;
    let uri = format!("http://{}/keys", second.address());
    let renamed = json!({"issuer": "silent", "jwksUri": uri, "timeout": "60s"});
    drop(silent);
    cluster.apply(&authentication("a", renamed)).await;
    proxy
        .until("the repaired issuer", |p| {
            held(p).iter().any(|j| j.jwks.contains("\"late\""))
        })
        .await;
    assert_eq!(held(&proxy).len(), 2);
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_nothing_verifies_and_the_page_says_why() {
    let (cluster, control, mut proxy) = web().await;
    // The node's metadata service: never dialled, whoever asks for it.
    let rule = json!({"issuer": "i", "jwksUri": "http://169.254.169.254/latest/meta-data/"});
    cluster.apply(&authentication("a", rule)).await;
    proxy.until("the policy", |p| !held(p).is_empty()).await;
    assert_eq!(&*held(&proxy)[0].jwks, NO_KEYS);
    let row = eventually("a row", PATIENCE, || async {
        let (status, body) = control.get("/debug/jwksz").await;
        assert_eq!(status, 200);
        let rows: Vec<Value> = serde_json::from_str(&body).unwrap();
        rows.into_iter().next()
    })
    .await;
    assert_eq!(row["keys"], false);
    assert!(row["error"].as_str().unwrap().contains("link-local"), "{row}");
    let (_, metrics) = control.get("/metrics").await;
    assert!(
        !metrics.contains("pilot_jwks_resolver_network_fetch_fail_total 0"),
        "{metrics}"
    );
    control.stop().await;
}

/// GHSA-fgw5-hp8f-xfhc: whoever may write a RequestAuthentication chooses what the control plane dials. Its own machine and the
/// metadata services of clouds are out of reach, however they are spelt; without the guard the same objects get there.
#[tokio::test(flavor = "multi_thread")]
async fn reg_121_key_fetches_do_not_reach_inside() {
    for guarded in [true, false] {
        let (inside, _) = issuer("inside").await;
        let port = inside.address().port();
        let guard = if guarded {
            Guard::default()
        } else {
            Guard::default().with_loopback()
        };
        let (cluster, control, mut proxy) = web_guarded(guard).await;
        let mut uris: Vec<String> = [
            "127.0.0.1",
            "localhost",
            "127.1",
            "2130706433",
            "0x7f.1",
            "0.0.0.0",
            "[::ffff:127.0.0.1]",
            "u:p@127.0.0.1",
        ]
        .iter()
        .map(|host| format!("http://{host}:{port}/keys"))
        .collect();
        if guarded {
            // Not without the guard: a machine of a cloud has these.
            uris.extend(
                [
                    "http://169.254.169.254/latest/meta-data/",
                    "http://[fe80::a9fe:a9fe]/",
                    "http://224.0.0.1/",
                ]
                .map(Into::into),
            );
        }
        let rules: Vec<Value> = uris
            .iter()
            .enumerate()
            .map(|(n, uri)| json!({"issuer": format!("i{n}"), "jwksUri": uri}))
            .collect();
        let object = json!({"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
            "metadata": {"name": "a", "namespace": "default"}, "spec": {"jwtRules": rules}});
        cluster.apply(&object).await;
        proxy.until("the policy", |p| held(p).len() == uris.len()).await;
        let with_keys = held(&proxy).iter().filter(|p| &*p.jwks != NO_KEYS).count();
        if guarded {
            assert_eq!((with_keys, inside.requests().len()), (0, 0), "{uris:?}");
        } else {
            assert!(
                with_keys > 0 && !inside.requests().is_empty(),
                "without the guard they get there"
            );
        }
        control.stop().await;
    }
}
