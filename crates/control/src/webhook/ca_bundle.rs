//! Writes the CA bundle into the webhook configurations that point at this control plane, and keeps it there.
//!
//! Without it the API server cannot verify the webhooks and, for injection, refuses pods: the safe direction. Validation starts
//! with failurePolicy Ignore and is switched to Fail once this control plane serves (S8.2).

use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration, WebhookClientConfig,
};
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use mantlet_identity::TrustBundle;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

/// A kind of webhook configuration.
trait Configuration:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug + Send + Sync + 'static
{
    /// Its webhooks: client configuration and failure policy.
    fn webhooks(&self) -> Vec<(&WebhookClientConfig, Option<&str>)>;
    /// Whether entries fail closed as soon as they can be served.
    const FAIL: bool;
}

impl Configuration for MutatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&WebhookClientConfig, Option<&str>)> {
        let list = self.webhooks.iter().flatten();
        list.map(|w| (&w.client_config, w.failure_policy.as_deref())).collect()
    }
    const FAIL: bool = false;
}

impl Configuration for ValidatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&WebhookClientConfig, Option<&str>)> {
        let list = self.webhooks.iter().flatten();
        list.map(|w| (&w.client_config, w.failure_policy.as_deref())).collect()
    }
    const FAIL: bool = true;
}

/// Which webhooks are ours: the Service they call.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Namespace of the control plane's Service.
    pub namespace: String,
    /// Names of the control plane's Service.
    pub services: Vec<String>,
}

/// Keeps both kinds right until the process ends.
pub async fn run(client: Client, owner: Owner, bundle: watch::Receiver<Arc<TrustBundle>>) {
    tokio::join!(
        keep::<MutatingWebhookConfiguration>(client.clone(), owner.clone(), bundle.clone()),
        keep::<ValidatingWebhookConfiguration>(client, owner, bundle),
    );
}

async fn keep<K: Configuration>(client: Client, owner: Owner, mut bundle: watch::Receiver<Arc<TrustBundle>>) {
    let api: Api<K> = Api::all(client);
    let mut events = watcher(api.clone(), watcher::Config::default())
        .default_backoff()
        .boxed();
    let mut known: std::collections::BTreeMap<String, K> = Default::default();
    loop {
        let touched: Vec<K> = tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Apply(object) | Event::InitApply(object))) => {
                    known.insert(object.name_any(), object.clone());
                    vec![object]
                }
                Some(Ok(Event::Delete(object))) => {
                    known.remove(&object.name_any());
                    vec![]
                }
                Some(Ok(Event::Init | Event::InitDone)) => vec![],
                Some(Err(error)) => {
                    tracing::warn!(target: "webhook", "watching webhook configurations: {error}");
                    vec![]
                }
                None => return,
            },
            changed = bundle.changed() => {
                if changed.is_err() {
                    return;
                }
                known.values().cloned().collect()
            }
        };
        let pem = bundle.borrow().to_pem();
        for object in touched {
            let Some(patch) = patch_for(&object, &owner, pem.as_bytes()) else {
                continue;
            };
            let name = object.name_any();
            let patch: Patch<()> = match serde_json::from_value(patch) {
                Ok(patch) => Patch::Json(patch),
                Err(error) => {
                    tracing::error!(target: "webhook", "patch of {name}: {error}");
                    continue;
                }
            };
            // A conflict is no failure: the new version of the object comes by the watch and is looked at again.
            match api.patch(&name, &PatchParams::default(), &patch).await {
                Ok(_) => tracing::info!(target: "webhook", "CA bundle written into webhook configuration {name}"),
                Err(error) => tracing::warn!(target: "webhook", "patching webhook configuration {name}: {error}"),
            }
        }
    }
}

/// The JSON patch that brings a configuration in order; `None` when it is.
fn patch_for<K: Configuration>(object: &K, owner: &Owner, pem: &[u8]) -> Option<Value> {
    let mut operations = Vec::new();
    for (index, (config, policy)) in object.webhooks().into_iter().enumerate() {
        let ours = config
            .service
            .as_ref()
            .is_some_and(|s| s.namespace == owner.namespace && owner.services.contains(&s.name));
        if !ours {
            continue;
        }
        // The index is only right for this version of the list: tested before it is used.
        let guard = |operations: &mut Vec<Value>| {
            if let Some(service) = &config.service {
                let path = format!("/webhooks/{index}/clientConfig/service/name");
                operations.push(json!({"op": "test", "path": path, "value": service.name}));
            }
        };
        if config.ca_bundle.as_ref() != Some(&ByteString(pem.to_vec())) {
            guard(&mut operations);
            let value = serde_json::to_value(ByteString(pem.to_vec())).unwrap_or_default();
            operations
                .push(json!({"op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": value}));
        }
        if K::FAIL && policy != Some("Fail") {
            guard(&mut operations);
            operations.push(json!({"op": "add", "path": format!("/webhooks/{index}/failurePolicy"), "value": "Fail"}));
        }
    }
    (!operations.is_empty()).then_some(Value::Array(operations))
}
