//! The ConfigMap that gives workloads the roots: one per namespace, healed when edited or deleted, rewritten when the roots
//! change (S4.67).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, ObjectMeta, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use mantlet_identity::TrustBundle;
use tokio::sync::watch;

/// The key that holds the PEM.
pub const ROOT_KEY: &str = "root-cert.pem";
/// Namespaces that get none (kube-system does).
pub const EXCLUDED: [&str; 3] = ["kube-public", "kube-node-lease", "local-path-storage"];
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// Keeps the ConfigMaps right until the process ends. `name` is `istio-ca-root-cert` unless configured otherwise.
/// RBAC: list and watch namespaces; get, list, watch, create, update configmaps.
pub async fn run(client: kube::Client, name: String, mut bundle: watch::Receiver<Arc<TrustBundle>>) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let maps: Api<ConfigMap> = Api::all(client.clone());
    let mut namespace_events = watcher(namespaces, watcher::Config::default())
        .default_backoff()
        .boxed();
    let only_ours = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut map_events = watcher(maps, only_ours).default_backoff().boxed();
    let mut known: BTreeSet<String> = BTreeSet::new();
    loop {
        let touched: Vec<String> = tokio::select! {
            event = namespace_events.try_next() => match event {
                Ok(Some(event)) => namespace_event(event, &mut known),
                Ok(None) => return,
                Err(error) => { tracing::warn!(target: "namespace-controller", "watching namespaces: {error}"); vec![] }
            },
            event = map_events.try_next() => match event {
                Ok(Some(event)) => map_event(event, &name, &bundle.borrow().to_pem(), &known),
                Ok(None) => return,
                Err(error) => { tracing::warn!(target: "namespace-controller", "watching configmaps: {error}"); vec![] }
            },
            changed = bundle.changed() => {
                if changed.is_err() {
                    return;
                }
                known.iter().cloned().collect()
            }
        };
        let pem = bundle.borrow().to_pem();
        for namespace in touched {
            ensure_with_retries(&client, &namespace, &name, &pem).await;
        }
    }
}

/// Namespaces to look at after an event; keeps the list of known ones.
fn namespace_event(event: Event<Namespace>, known: &mut BTreeSet<String>) -> Vec<String> {
    match event {
        Event::Apply(object) | Event::InitApply(object) => {
            let Some(name) = object.metadata.name else {
                return vec![];
            };
            if EXCLUDED.contains(&name.as_str()) || object.metadata.deletion_timestamp.is_some() {
                known.remove(&name);
                return vec![];
            }
            known.insert(name.clone());
            vec![name]
        }
        Event::Delete(object) => {
            known.remove(object.metadata.name.as_deref().unwrap_or_default());
            vec![]
        }
        Event::Init | Event::InitDone => vec![],
    }
}

/// Namespaces whose ConfigMap is not as it should be.
fn map_event(event: Event<ConfigMap>, name: &str, pem: &str, known: &BTreeSet<String>) -> Vec<String> {
    let (object, gone) = match event {
        Event::Apply(object) | Event::InitApply(object) => (object, false),
        Event::Delete(object) => (object, true),
        Event::Init | Event::InitDone => return vec![],
    };
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    if object.metadata.name.as_deref() != Some(name) || !known.contains(&namespace) {
        return vec![];
    }
    if gone || !is_right(&object, pem) {
        vec![namespace]
    } else {
        vec![]
    }
}

fn is_right(object: &ConfigMap, pem: &str) -> bool {
    let data = object.data.as_ref().and_then(|d| d.get(ROOT_KEY)).map(String::as_str);
    let label = object
        .metadata
        .labels
        .as_ref()
        .and_then(|l| l.get("istio.io/config"))
        .map(String::as_str);
    data == Some(pem) && label == Some("true")
}

async fn ensure_with_retries(client: &kube::Client, namespace: &str, name: &str, pem: &str) {
    let mut pause = FIRST_PAUSE;
    for attempt in 1..=ATTEMPTS {
        match ensure(client, namespace, name, pem).await {
            Ok(()) => return,
            Err(error) if attempt == ATTEMPTS => {
                tracing::error!(target: "namespace-controller", "cannot write {namespace}/{name}: {error}");
            }
            Err(_) => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
        }
    }
}

/// Creates or repairs one ConfigMap. Other keys, labels and annotations of an existing one stay.
pub async fn ensure(client: &kube::Client, namespace: &str, name: &str, pem: &str) -> Result<(), kube::Error> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(name).await? {
        Some(object) if is_right(&object, pem) => Ok(()),
        Some(mut object) => {
            object
                .data
                .get_or_insert_default()
                .insert(ROOT_KEY.to_owned(), pem.to_owned());
            object
                .metadata
                .labels
                .get_or_insert_default()
                .insert("istio.io/config".to_owned(), "true".to_owned());
            api.replace(name, &PostParams::default(), &object).await.map(drop)
        }
        None => {
            let object = ConfigMap {
                metadata: ObjectMeta {
                    name: Some(name.to_owned()),
                    labels: Some(BTreeMap::from([("istio.io/config".to_owned(), "true".to_owned())])),
                    ..ObjectMeta::default()
                },
                data: Some(BTreeMap::from([(ROOT_KEY.to_owned(), pem.to_owned())])),
                ..ConfigMap::default()
            };
            match api.create(&PostParams::default(), &object).await {
                Ok(_) => Ok(()),
                // The namespace is going or gone: nothing to do there any more.
                Err(kube::Error::Api(status))
                    if status.code == 404 || (status.code == 403 && status.message.contains("being terminated")) =>
                {
                    Ok(())
                }
                Err(error) => Err(error),
            }
        }
    }
}
