//! Secrets that gateways refer to by `credentialName`: fetched when first needed, watched while needed, given only to
//! proxies that may list secrets in their own namespace (SEMANTICS 4h).
//!
//! Keys are never logged. A secret that is missing, foreign or not allowed is simply absent from the response, so that only
//! the server that names it cannot be used (S4.123).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1 as core;
use kube::api::{Api, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use mantlet_identity::SpiffeId;
use mantlet_model::cluster::ClusterTls;
use mantlet_model::secret::{KeyBytes, SecretValue};
use mantlet_model::{ProxySnapshot, Secret};
use mantlet_runtime::task::AbortOnDrop;
use tokio::sync::mpsc;

use super::hub::Hub;

/// How long a positive review counts.
const ALLOWED_FOR: Duration = Duration::from_secs(300);
/// How long a negative review counts.
const DENIED_FOR: Duration = Duration::from_secs(60);

/// A secret as a resource of one service account's proxies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretKey {
    /// Resource name, as the snapshot says it (`kubernetes://name`, `kubernetes://name-cacert`).
    pub resource: String,
    /// Namespace of the secret, equal to the proxy's.
    pub namespace: String,
    /// Service account of the proxy.
    pub service_account: String,
}

/// Tells the fetching task what is needed.
#[derive(Clone)]
pub struct SecretWants(mpsc::UnboundedSender<Want>);

enum Want {
    Start(SecretKey),
    Stop(SecretKey),
}

impl SecretWants {
    /// A pair of ends.
    pub fn channel() -> (SecretWants, SecretRequests) {
        let (tx, rx) = mpsc::unbounded_channel();
        (SecretWants(tx), SecretRequests(rx))
    }

    pub(super) fn want(&self, key: SecretKey) {
        let _ = self.0.send(Want::Start(key));
    }

    pub(super) fn drop_secret(&self, key: SecretKey) {
        let _ = self.0.send(Want::Stop(key));
    }
}

/// The receiving end of [`SecretWants`].
pub struct SecretRequests(mpsc::UnboundedReceiver<Want>);

/// The secrets that a snapshot names and that this identity could be given: those of its own namespace.
pub fn wanted_secrets(snapshot: &ProxySnapshot, identity: &SpiffeId) -> BTreeSet<SecretKey> {
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for listener in snapshot.listeners.values() {
        for tls in listener.all_chains().filter_map(|c| c.tls.as_ref()) {
            names.insert(&tls.certificate);
            names.extend(tls.trust_bundle.as_deref());
        }
    }
    for cluster in snapshot.clusters.values() {
        if let ClusterTls::Always(tls) | ClusterTls::Auto(tls) = &cluster.tls {
            names.extend(tls.certificate.as_deref());
            names.extend(tls.trust_bundle.as_deref());
        }
    }
    names
        .into_iter()
        .filter_map(|name| {
            let path = name.strip_prefix("kubernetes://")?;
            // `kubernetes://ns/name` must be of the proxy's own namespace (S4.122).
            let foreign = path.split_once('/').is_some_and(|(ns, _)| ns != identity.namespace());
            (!foreign).then(|| SecretKey {
                resource: name.to_string(),
                namespace: identity.namespace().to_string(),
                service_account: identity.service_account().to_string(),
            })
        })
        .collect()
}

/// Serves wants until the hub is gone.
pub async fn run(client: kube::Client, hub: Hub, mut requests: SecretRequests) {
    let mut running: HashMap<SecretKey, AbortOnDrop> = HashMap::new();
    while let Some(want) = requests.0.recv().await {
        match want {
            Want::Start(key) => {
                let task = tokio::spawn(follow(client.clone(), hub.clone(), key.clone()));
                running.insert(key, AbortOnDrop(task.abort_handle()));
            }
            Want::Stop(key) => {
                running.remove(&key);
            }
        }
    }
}

/// Follows one secret: the right to it first, then its content.
async fn follow(client: kube::Client, hub: Hub, key: SecretKey) {
    let (object, ca_only) = object_name(&key.resource);
    loop {
        let allowed = ca_only || may_list(&client, &key).await;
        let until = Instant::now() + if allowed { ALLOWED_FOR } else { DENIED_FOR };
        if !allowed {
            tracing::warn!(
                target: "ads",
                "service account {}/{} may not list secrets; {} is not sent",
                key.namespace, key.service_account, key.resource
            );
            hub.secret(key.clone(), Vec::new());
            tokio::time::sleep_until(until.into()).await;
            continue;
        }
        let api: Api<core::Secret> = Api::namespaced(client.clone(), &key.namespace);
        let only = watcher::Config::default().fields(&format!("metadata.name={object}"));
        let mut events = watcher(api, only).default_backoff().boxed();
        // The right is looked at again when it has aged.
        while let Ok(Some(event)) = tokio::time::timeout_at(until.into(), events.next()).await {
            match event {
                Ok(Event::Apply(secret) | Event::InitApply(secret)) => {
                    hub.secret(key.clone(), read(&key.resource, ca_only, &secret).into_iter().collect());
                }
                Ok(Event::Delete(_)) => hub.secret(key.clone(), Vec::new()),
                Ok(Event::Init | Event::InitDone) => {}
                Err(error) => tracing::warn!(target: "ads", "watching secret {}/{object}: {error}", key.namespace),
            }
        }
    }
}

/// Name of the object, and whether only its CA part is meant (S4.121).
fn object_name(resource: &str) -> (String, bool) {
    let path = resource.strip_prefix("kubernetes://").unwrap_or(resource);
    let name = path.split_once('/').map_or(path, |(_, name)| name);
    match name.strip_suffix("-cacert") {
        Some(base) => (base.to_string(), true),
        None => (name.to_string(), false),
    }
}

fn read(resource: &str, ca_only: bool, secret: &core::Secret) -> Option<Arc<Secret>> {
    let data = secret.data.as_ref()?;
    let get = |names: [&str; 2]| names.iter().find_map(|n| data.get(*n)).map(|b| b.0.clone());
    let value = if ca_only {
        SecretValue::TrustBundle(get(["ca.crt", "cacert"])?)
    } else {
        SecretValue::KeyPair {
            chain: get(["tls.crt", "cert"])?,
            key: KeyBytes::new(get(["tls.key", "key"])?),
        }
    };
    Some(Arc::new(Secret {
        name: resource.to_string(),
        value,
    }))
}

async fn may_list(client: &kube::Client, key: &SecretKey) -> bool {
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!(
                "system:serviceaccount:{}:{}",
                key.namespace, key.service_account
            )),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(key.namespace.clone()),
                verb: Some("list".into()),
                resource: Some("secrets".into()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    match api.create(&PostParams::default(), &review).await {
        Ok(answer) => answer.status.is_some_and(|s| s.allowed),
        Err(error) => {
            tracing::warn!(target: "ads", "access review for {}/{}: {error}", key.namespace, key.service_account);
            false
        }
    }
}
