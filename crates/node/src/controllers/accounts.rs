//! What every namespace is given: the service account `default` and the ConfigMap `kube-root-ca.crt`.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Config, Context, Error, already_exists, namespace_terminating};

/// The ConfigMap that carries the API server's CA.
pub(crate) const ROOT_CA_NAME: &str = "kube-root-ca.crt";

pub(crate) async fn run(context: Context, config: Config, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.namespaces.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(namespace) = new {
                queue.add(namespace.name_any());
            }
        }
    }));
    context.informers.accounts.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            if let (Some(account), None) = (old, new) {
                queue.add(account.namespace().unwrap_or_default());
            }
        }
    }));
    context.informers.root_cas.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            if let Some(map) = new.or(old) {
                queue.add(map.namespace().unwrap_or_default());
            }
        }
    }));
    queue::run("namespace-defaults", queue, 2, stop, move |namespace: String| {
        let (context, config) = (context.clone(), config.clone());
        async move { reconcile(&context, &config, &namespace).await }
    })
    .await;
}

async fn reconcile(context: &Context, config: &Config, namespace: &str) -> Result<Option<Duration>, Error> {
    let known = context.informers.namespaces.get(&Key::new("", namespace));
    if known.is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
        return Ok(None);
    }
    let meta = |name: &str| ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()),
        ..ObjectMeta::default()
    };
    if context
        .informers
        .accounts
        .get(&Key::new(namespace, "default"))
        .is_none()
    {
        let api: Api<ServiceAccount> = Api::namespaced(context.client.clone(), namespace);
        let account = ServiceAccount {
            metadata: meta("default"),
            ..ServiceAccount::default()
        };
        match api.create(&PostParams::default(), &account).await {
            Ok(account) => context.informers.accounts.observe(&account),
            Err(error) if already_exists(&error) => {}
            Err(error) if namespace_terminating(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    let wanted = BTreeMap::from([("ca.crt".to_owned(), config.root_ca_pem.clone())]);
    let api: Api<ConfigMap> = Api::namespaced(context.client.clone(), namespace);
    let mut map = ConfigMap {
        metadata: meta(ROOT_CA_NAME),
        data: Some(wanted.clone()),
        ..ConfigMap::default()
    };
    let written = match context.informers.root_cas.get(&Key::new(namespace, ROOT_CA_NAME)) {
        Some(known) if known.data.as_ref() == Some(&wanted) => return Ok(None),
        Some(known) => {
            map.metadata.resource_version = known.resource_version();
            api.replace(ROOT_CA_NAME, &PostParams::default(), &map).await
        }
        None => api.create(&PostParams::default(), &map).await,
    };
    match written {
        Ok(map) => context.informers.root_cas.observe(&map),
        Err(error) if already_exists(&error) || namespace_terminating(&error) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(None)
}
