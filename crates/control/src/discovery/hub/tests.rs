//! The hub without Kubernetes: what is pushed when, and to whom.

use std::sync::mpsc as std_mpsc;

use mantlet_runtime::Registry;
use mantlet_translate::world::Kind;
use serde_json::{Value, json};

use super::*;

fn hub() -> (Hub, Board, Registry) {
    let registry = Registry::new();
    let metrics = PilotMetrics::new(&registry);
    let board = Board::new(metrics.clone(), "test");
    let (wants, _requests) = SecretWants::channel();
    let hub = Hub::start(Mesh::default(), metrics, board.clone(), wants).unwrap();
    (hub, board, registry)
}

fn subscriber(name: &str, namespace: &str) -> Subscriber {
    let id = format!("sidecar~10.0.0.1~{name}.{namespace}~{namespace}.svc.cluster.local");
    Subscriber {
        node: Arc::new(ProxyNode::parse(&id, &Value::Null).unwrap()),
        dialect: Dialect::Istio,
        identity: None,
    }
}

fn policy(name: &str, namespace: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace}, "spec": {}})
}

#[tokio::test]
async fn what_queues_up_during_a_push_is_pushed_once() {
    let (hub, _, registry) = hub();
    let mut admitted = hub.connect(subscriber("web", "a")).await.unwrap();
    let before = admitted.resources.borrow_and_update().clone();
    // The hub is busy until told to go on.
    let (go_on, wait) = std_mpsc::channel::<()>();
    let (busy_tx, busy) = oneshot::channel();
    let blocked = {
        let hub = hub.clone();
        tokio::spawn(async move {
            hub.ask(move |_| {
                busy_tx.send(()).unwrap();
                wait.recv().unwrap();
            })
            .await
        })
    };
    busy.await.unwrap();
    let pushes = registry.counter("pilot_push_triggers", "", &[]).total(&[]);
    for n in 0..500 {
        hub.change(move |w| w.set_config(Kind::AuthorizationPolicy, &policy(&format!("p{n}"), "a")));
    }
    go_on.send(()).unwrap();
    blocked.await.unwrap();
    let rules = hub
        .ask(|view| {
            let policies = view.world.authorization_policies("a").len();
            (policies, view.revision)
        })
        .await
        .unwrap();
    assert_eq!(rules, (500, 501), "every change counts");
    assert_eq!(registry.counter("pilot_push_triggers", "", &[]).total(&[]), pushes + 1);
    assert!(admitted.resources.has_changed().unwrap());
    let after = admitted.resources.borrow_and_update().clone();
    let version = |set: &ResourceSet| {
        set.get(ResourceType::Listener, "virtualInbound")
            .map(|e| e.version().to_string())
    };
    assert_ne!(version(&before), version(&after));
}

#[tokio::test]
async fn only_affected_proxies_get_something() {
    let (hub, board, _) = hub();
    let mut a = hub.connect(subscriber("web", "a")).await.unwrap();
    let mut b = hub.connect(subscriber("web", "b")).await.unwrap();
    a.resources.borrow_and_update();
    b.resources.borrow_and_update();
    hub.change(|w| w.set_config(Kind::AuthorizationPolicy, &policy("p", "a")));
    let revision = hub.ask(|view| view.revision).await.unwrap();
    assert!(a.resources.has_changed().unwrap());
    assert!(!b.resources.has_changed().unwrap());
    // Both are of the new revision; who is not affected has nothing to confirm.
    assert!(board.distribution().iter().all(|d| d.computed == revision));
    a.resources.borrow_and_update();
    hub.change(|w| w.set_config(Kind::AuthorizationPolicy, &policy("p", "istio-system")));
    // The same object again is no change.
    hub.change(|w| w.set_config(Kind::AuthorizationPolicy, &policy("p", "istio-system")));
    assert_eq!(hub.ask(|view| view.revision).await, Some(revision + 1));
    assert!(a.resources.has_changed().unwrap() && b.resources.has_changed().unwrap());
}

#[tokio::test]
async fn streams_end_by_name_and_all_at_closing() {
    let (hub, board, _) = hub();
    let mut a = hub.connect(subscriber("web", "a")).await.unwrap();
    let mut b = hub.connect(subscriber("web", "b")).await.unwrap();
    a.resources.borrow_and_update();
    b.resources.borrow_and_update();
    hub.disconnect(a.id);
    assert!(a.resources.changed().await.is_err(), "the sender is gone");
    assert_eq!(board.rows().len(), 1);
    hub.close();
    assert!(b.resources.changed().await.is_err());
    assert!(hub.connect(subscriber("late", "a")).await.is_none());
    assert!(board.rows().is_empty());
}

#[tokio::test]
async fn an_abandoned_stream_is_forgotten() {
    let (hub, board, _) = hub();
    drop(hub.connect(subscriber("web", "a")).await.unwrap());
    hub.change(|w| w.set_config(Kind::AuthorizationPolicy, &policy("p", "a")));
    assert_eq!(hub.ask(|view| view.proxies.len()).await, Some(0));
    assert!(board.rows().is_empty());
}
