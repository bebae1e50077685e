//! The agent against a real control plane end: TLS, token, CSR, delta xDS; renewal, refusal, reconnection.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::agent::{Agent, outbound, status};
use common::control::{Control, resources, serve, token};
use common::*;
use mantlet_proxy::agent::certs;
use mantlet_proxy::settings::{Role, Settings};
use mantlet_runtime::Readiness;
use mantlet_testkit::{EchoServer, TestCa, eventually};

#[tokio::test]
async fn from_nothing_to_ready_and_renewed() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    // Half of four seconds, so renewal comes within the test.
    let agent = Agent::start(&out.snapshot(), 4, 0.5).await;
    agent.ready().await;
    *agent.proxy.destination.lock().unwrap() = ([10, 96, 0, 20], 80).into();
    assert_eq!(status(&out).await, 200);
    let first = agent.proxy.shared.secrets.load().identity.clone().unwrap();
    assert_eq!(first.spiffe_id().unwrap().as_str(), CLIENT_SA);
    eventually("the certificate is renewed", Duration::from_secs(10), || async {
        let now = agent.proxy.shared.secrets.load().identity.clone().unwrap();
        if now.chain() == first.chain() {
            Err("the same")
        } else {
            Ok(())
        }
    })
    .await;
    assert!(agent.control.issued.load(Ordering::SeqCst) >= 2);
}

#[tokio::test]
async fn a_refused_configuration_changes_nothing() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let agent = Agent::start(&out.snapshot(), 3600, 0.5).await;
    agent.ready().await;
    *agent.proxy.destination.lock().unwrap() = ([10, 96, 0, 20], 80).into();
    assert_eq!(status(&out).await, 200);
    // Two listeners on one socket cannot run.
    let mut bad = out.snapshot();
    let mut twin = (*bad.listeners["0.0.0.0_80"]).clone();
    twin.bind_to_port = true;
    twin.address = out.listen;
    bad.listeners.insert(twin.name.clone(), Arc::new(twin));
    agent.control.resources.send_replace(resources(&bad));
    eventually("the push is refused", Duration::from_secs(10), || async {
        let events = agent.events();
        if events.iter().any(|e| e.contains("bind the same address")) {
            Ok(())
        } else {
            Err(events)
        }
    })
    .await;
    assert_eq!(status(&out).await, 200);
    // And the way out is open: the next good push is taken.
    let other = EchoServer::start().await;
    let good = Outbound {
        endpoints: vec![other.address()],
        listen: out.listen,
        ..outbound(other.address())
    };
    agent.control.resources.send_replace(resources(&good.snapshot()));
    eventually("the new endpoint is used", Duration::from_secs(10), || async {
        assert_eq!(status(&out).await, 200);
        if other.requests().is_empty() {
            Err("not yet")
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn the_last_configuration_stays_when_the_control_plane_goes_and_comes_back() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let mut agent = Agent::start(&out.snapshot(), 3600, 0.5).await;
    agent.ready().await;
    *agent.proxy.destination.lock().unwrap() = ([10, 96, 0, 20], 80).into();
    // What was never used before is not there.
    assert_eq!(status(&out).await, 200);
    drop(agent.server.take());
    for _ in 0..5 {
        assert_eq!(status(&out).await, 200);
    }
    let other = EchoServer::start().await;
    let good = Outbound {
        listen: out.listen,
        ..outbound(other.address())
    };
    agent.control.resources.send_replace(resources(&good.snapshot()));
    // A new token and the same address: both are read anew.
    std::fs::write(agent.directory.path().join("token"), token("sleep")).unwrap();
    let _server = serve(agent.control.clone(), agent.address);
    eventually("the proxy is connected again", Duration::from_secs(20), || async {
        assert_eq!(status(&out).await, 200);
        if other.requests().is_empty() {
            Err("not yet")
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn a_wrong_token_or_a_foreign_control_plane_leaves_the_proxy_unready_and_alive() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let agent = Agent::start(&out.snapshot(), 3600, 0.5).await;
    agent.ready().await;

    let stranger = TestCa::new("cluster.local");
    let foreign = Agent::start(&out.snapshot(), 3600, 0.5).await;
    foreign.ready().await;
    // A control plane that is certified by somebody else gets no token and no CSR.
    let control = Control::new(Arc::new(stranger), resources(&out.snapshot()), 3600);
    let address = free_address();
    let _server = serve(control.clone(), address);
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("token"), "wrong").unwrap();
    std::fs::write(directory.path().join("root.pem"), agent.control.ca.root_pem()).unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for (port, why) in [
        (address.port(), "foreign authority"),
        (agent.address.port(), "wrong token"),
    ] {
        let before = agent.control.issued.load(Ordering::SeqCst);
        let discovery = format!("{{\"discoveryAddress\":\"localhost:{port}\"}}");
        let settings = Settings::from_env(Role::Sidecar, None, &|name| {
            Some(match name {
                "PROXY_CONFIG" => discovery.clone(),
                "MANTLET_TOKEN_FILE" => path("token"),
                "XDS_ROOT_CA" | "CA_ROOT_CA" | "MANTLET_MESH_ROOT" => path("root.pem"),
                _ => return None,
            })
        })
        .unwrap();
        let proxy = Proxy::start("sleep", 1);
        let readiness = Readiness::new();
        let task = readiness.register("certificate");
        let keep = tokio::spawn(certs::keep_fresh(Arc::new(settings), proxy.shared.clone(), task));
        let waited = tokio::time::timeout(Duration::from_secs(2), readiness.ready()).await;
        assert!(waited.is_err(), "{why}: ready");
        assert!(!keep.is_finished(), "{why}: it goes on trying");
        assert!(proxy.shared.secrets.load().identity.is_none(), "{why}");
        assert_eq!(control.issued.load(Ordering::SeqCst), 0, "{why}");
        assert_eq!(agent.control.issued.load(Ordering::SeqCst), before, "{why}");
        keep.abort();
    }
}

#[tokio::test]
async fn new_trust_anchors_are_followed_without_a_restart() {
    let app = EchoServer::start().await;
    let out = outbound(app.address());
    let agent = Agent::start(&out.snapshot(), 3600, 0.5).await;
    agent.ready().await;
    let issued = agent.control.issued.load(Ordering::SeqCst);
    let added = TestCa::new("cluster.local");
    let root = agent.directory.path().join("root.pem");
    // Both roots: nothing to renew, both are trusted.
    std::fs::write(&root, format!("{}{}", agent.control.ca.root_pem(), added.root_pem())).unwrap();
    eventually("both roots are trusted", Duration::from_secs(10), || async {
        match agent
            .proxy
            .shared
            .secrets
            .load()
            .mesh_roots()
            .unwrap()
            .certificates()
            .len()
        {
            2 => Ok(()),
            n => Err(n),
        }
    })
    .await;
    assert_eq!(agent.control.issued.load(Ordering::SeqCst), issued);
}
