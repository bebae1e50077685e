//! Secrets that gateways refer to by `credentialName`: fetched when first needed, watched while needed, given only to
//! proxies that may list secrets in their own namespace (SEMANTICS 4h).
//!
//! Keys are never logged. A secret that is missing, foreign or not allowed is simply absent from the response, so that only
//! the server that names it cannot be used (S4.123).

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
use mantlet_model::{Cluster, Listener, Secret, SharedSnapshot};
use mantlet_runtime::task::AbortOnDrop;
use tokio::sync::mpsc;

use super::hub::Hub;

/// How names of secrets of the API server begin.
const KUBERNETES: &str = "kubernetes://";
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

/// Names of secrets of the API server that a snapshot refers to, with how often. Followed by differences, since a snapshot has thousands
/// of resources and few of them name a secret.
#[derive(Default)]
pub struct SecretNames(BTreeMap<String, usize>);

impl SecretNames {
    /// From the names of one snapshot to those of the next.
    pub fn follow(&mut self, old: &SharedSnapshot, new: &SharedSnapshot) {
        for (_, before, after) in old.listeners.diff(&new.listeners) {
            let names = |l: Option<&Arc<Listener>>, each: &mut dyn FnMut(&str)| {
                for tls in l.iter().flat_map(|l| l.all_chains()).filter_map(|c| c.tls.as_ref()) {
                    each(&tls.certificate);
                    tls.trust_bundle.iter().for_each(|name| each(name));
                }
            };
            names(after, &mut |name| self.add(name));
            names(before, &mut |name| self.take(name));
        }
        for (_, before, after) in old.clusters.diff(&new.clusters) {
            let names = |cluster: Option<&Arc<Cluster>>, each: &mut dyn FnMut(&str)| {
                if let Some(ClusterTls::Always(tls) | ClusterTls::Auto(tls)) = cluster.map(|c| &c.tls) {
                    tls.certificate.iter().for_each(|name| each(name));
                    tls.trust_bundle.iter().for_each(|name| each(name));
                }
            };
            names(after, &mut |name| self.add(name));
            names(before, &mut |name| self.take(name));
        }
    }

    fn add(&mut self, name: &str) {
        if name.starts_with(KUBERNETES) {
            *self.0.entry(name.to_string()).or_default() += 1;
        }
    }

    fn take(&mut self, name: &str) {
        if let Some(count) = self.0.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(name);
            }
        }
    }

    /// The secrets that this identity could be given: those of its own namespace.
    pub fn wanted(&self, identity: &SpiffeId) -> BTreeSet<SecretKey> {
        self.0
            .keys()
            .filter_map(|name| {
                let path = name.strip_prefix(KUBERNETES)?;
                // `kubernetes://ns/name` must be of the proxy's own namespace (S4.122).
                let foreign = path.split_once('/').is_some_and(|(ns, _)| ns != identity.namespace());
                (!foreign).then(|| SecretKey {
                    resource: name.clone(),
                    namespace: identity.namespace().to_string(),
                    service_account: identity.service_account().to_string(),
                })
            })
            .collect()
    }
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
