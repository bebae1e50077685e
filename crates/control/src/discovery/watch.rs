//! Watches of the API server, turned into changes of the world.
//!
//! Every kind is listed and watched; readiness waits for the first complete list of each. After a lost watch the list is
//! compared with what is known, so that deletions meanwhile are not missed. A kind that the API server does not know
//! (its CRD is not installed) counts as empty and is asked for again.

use std::collections::BTreeSet;
use std::fmt::Debug;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use mantlet_api::MeshConfig;
use mantlet_runtime::{Readiness, ReadyTask};
use mantlet_translate::mesh::Mesh;
use mantlet_translate::world::workload::Workload;
use mantlet_translate::world::{Effect, Kind, Slice, World};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::board::Board;
use super::hub::Hub;
use super::lanes::{Lanes, Wait};
use super::metrics::PilotMetrics;
use super::status::StatusJob;
use crate::jwks::Resolver;

/// What the watches need.
#[derive(Clone)]
pub struct Watches {
    /// Client with the control plane's own account.
    pub client: Client,
    /// Where changes go.
    pub hub: Hub,
    /// Told which versions went there.
    pub board: Board,
    /// Counts changes.
    pub metrics: PilotMetrics,
    /// Gets a condition per kind.
    pub readiness: Readiness,
    /// Told of policies whose status must be looked at.
    pub status: mpsc::UnboundedSender<StatusJob>,
    /// Namespace of the control plane.
    pub namespace: String,
    /// Name of the mesh ConfigMap (`istio`, or `istio-<revision>`).
    pub mesh_configmap: String,
    /// Told which key sets RequestAuthentications are about to name.
    pub keys: Resolver,
    /// What the mesh configuration does not say: cluster id, cluster domain, namespace.
    pub base: Mesh,
}

impl Watches {
    /// Starts all watches; they end when the set is dropped.
    pub fn start(self) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let all = watcher::Config::default;
        let client = &self.client;

        tasks.spawn(self.clone().follow(
            (Api::<Service>::all(client.clone()), all()),
            "services",
            |service: &Service, _: &Watches| {
                let service = service.clone();
                Box::new(move |w: &mut World| w.set_service(&service))
            },
            |ns, name, _: &Watches| Box::new(move |w: &mut World| w.remove_service(&ns, &name)),
            |_, _| None,
            |_| None,
        ));
        tasks.spawn(self.clone().follow(
            (Api::<EndpointSlice>::all(client.clone()), all()),
            "endpointslices",
            // Slices and pods are what there is most of: what waits for the hub is what it keeps of them, not the objects.
            |object: &EndpointSlice, _: &Watches| {
                let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                let slice = Slice::of_service(object);
                Box::new(move |w: &mut World| w.put_slice(&namespace, &name, slice))
            },
            |ns, name, _: &Watches| Box::new(move |w: &mut World| w.remove_slice(&ns, &name)),
            |_, _| None,
            |_| None,
        ));
        tasks.spawn(self.clone().follow(
            (Api::<Pod>::all(client.clone()), all()),
            "pods",
            |object: &Pod, watches: &Watches| {
                let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                let pod = Workload::from_pod(object, &watches.base.cluster);
                Box::new(move |w: &mut World| w.put_pod(&namespace, &name, pod))
            },
            |ns, name, _: &Watches| Box::new(move |w: &mut World| w.remove_pod(&ns, &name)),
            |_, _| None,
            |_| None,
        ));
        let mesh_only = all().fields(&format!("metadata.name={}", self.mesh_configmap));
        tasks.spawn(self.clone().follow(
            (Api::<ConfigMap>::namespaced(client.clone(), &self.namespace), mesh_only),
            "mesh config",
            |map: &ConfigMap, watches: &Watches| match read_mesh(map, &watches.base) {
                Ok(mesh) => Box::new(move |w: &mut World| w.set_mesh(mesh)),
                Err(reason) => {
                    tracing::error!(target: "config", "mesh configuration is kept as it was: {reason}");
                    Box::new(|_: &mut World| Effect::default())
                }
            },
            |_, _, watches: &Watches| {
                let mesh = watches.base.clone();
                Box::new(move |w: &mut World| w.set_mesh(mesh))
            },
            |_, _| None,
            |_| None,
        ));
        for kind in Kind::ALL {
            let (group, version, plural) = kind.resource();
            let resource =
                ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.name()), plural);
            let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            tasks.spawn(self.clone().follow(
                (api, all()),
                plural,
                move |object: &DynamicObject, _: &Watches| match serde_json::to_value(object) {
                    Ok(value) => Box::new(move |w: &mut World| w.set_config(kind, &value)),
                    Err(error) => {
                        tracing::error!(target: "config", "{}: {error}", kind.name());
                        Box::new(|_: &mut World| Effect::default())
                    }
                },
                move |ns, name, _: &Watches| Box::new(move |w: &mut World| w.remove_config(kind, &ns, &name)),
                move |object: &DynamicObject, watches: &Watches| watches.first_keys(kind, object),
                move |object: &DynamicObject| Some(StatusJob::look(kind, object)),
            ));
        }
        tasks
    }

    async fn follow<K>(
        self,
        (api, config): (Api<K>, watcher::Config),
        what: &'static str,
        set: impl Fn(&K, &Watches) -> Box<dyn FnOnce(&mut World) -> Effect + Send> + Send,
        remove: impl Fn(String, String, &Watches) -> Box<dyn FnOnce(&mut World) -> Effect + Send> + Send,
        before: impl Fn(&K, &Watches) -> Option<Wait> + Send,
        job: impl Fn(&K) -> Option<StatusJob> + Send,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    {
        let mut pending: Option<ReadyTask> = Some(self.readiness.register(format!("watch of {what}")));
        let mut known: BTreeSet<(String, String)> = BTreeSet::new();
        let mut listed: BTreeSet<(String, String)> = BTreeSet::new();
        // Objects one by one, not in one list: a list of all pods of a large mesh is hundreds of megabytes once it is read.
        let mut streaming = true;
        let mut events = watcher(api.clone(), config.clone().streaming_lists())
            .default_backoff()
            .boxed();
        let key = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        let mut lanes = Lanes::default();
        let land = |object: &K| {
            let (hub, board, status) = (self.hub.clone(), self.board.clone(), self.status.clone());
            let (change, job) = (set(object, &self), job(object));
            let version = object.meta().resource_version.clone();
            move || {
                hub.change(change);
                board.saw(what, version.as_deref());
                // Without a status writer nobody is told.
                if let Some(job) = job {
                    let _ = status.send(job);
                }
            }
        };
        let leave = |namespace: String, name: String| {
            let (hub, change) = (self.hub.clone(), remove(namespace, name, &self));
            move || hub.change(change)
        };
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(object)) => {
                    listed.insert(key(&object));
                    lanes.run(key(&object), before(&object, &self), land(&object));
                }
                Ok(Event::InitDone) => {
                    for (namespace, name) in known.difference(&listed) {
                        let gone = (namespace.clone(), name.clone());
                        lanes.run(gone, None, leave(namespace.clone(), name.clone()));
                    }
                    known = std::mem::take(&mut listed);
                    if pending.is_some() {
                        lanes.settled().await;
                    }
                    self.synced(&mut pending).await;
                }
                Ok(Event::Apply(object)) => {
                    self.metrics.inbound_updates.with(&[what]).inc();
                    known.insert(key(&object));
                    lanes.run(key(&object), before(&object, &self), land(&object));
                }
                Ok(Event::Delete(object)) => {
                    self.metrics.inbound_updates.with(&[what]).inc();
                    let (namespace, name) = key(&object);
                    known.remove(&(namespace.clone(), name.clone()));
                    lanes.run(key(&object), None, leave(namespace, name));
                }
                Err(error) => {
                    if is_unknown_kind(&error) {
                        tracing::debug!(target: "kube", "{what}: the API server does not know them");
                        self.synced(&mut pending).await;
                    } else if streaming && is_refused(&error) {
                        tracing::info!(target: "kube", "{what} come as lists: {error}");
                        streaming = false;
                        events = watcher(api.clone(), config.clone()).default_backoff().boxed();
                    } else {
                        tracing::warn!(target: "kube", "watching {what}: {error}");
                    }
                }
            }
        }
    }

    /// The first fetch of the key sets that an object names, if it names any. Keys of issuers that are known already are there at
    /// once.
    fn first_keys(&self, kind: Kind, object: &DynamicObject) -> Option<Wait> {
        // What a world with this object alone would ask for.
        let mut world = World::default();
        world.set_config(kind, &serde_json::to_value(object).ok()?);
        let needs = world.needed_key_sets();
        let keys = self.keys.clone();
        (!needs.is_empty()).then(|| -> Wait { Box::pin(async move { keys.announce(needs).await }) })
    }

    /// Ready once the hub has taken over what was listed.
    async fn synced(&self, pending: &mut Option<ReadyTask>) {
        if let Some(task) = pending.take()
            && self.hub.ask(|_| ()).await.is_some()
        {
            task.done();
        }
    }
}

/// The resource is not served: its CRD is absent.
fn is_unknown_kind(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        watcher::Error::WatchError(status) => status.code == 404,
        _ => false,
    }
}

/// The API server does not stream lists: it is one without the feature `WatchList` (on since Kubernetes 1.32).
fn is_refused(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}

/// Reads the mesh ConfigMap over what the control plane knows itself.
pub(crate) fn read_mesh(map: &ConfigMap, base: &Mesh) -> Result<Mesh, String> {
    let text = map
        .data
        .as_ref()
        .and_then(|d| d.get(mantlet_api::mesh_config::CONFIG_KEY))
        .map(String::as_str)
        .unwrap_or_default();
    let (config, findings) = MeshConfig::read(text).map_err(|e| e.to_string())?;
    for finding in findings {
        tracing::warn!(target: "config", "mesh configuration: {finding}");
    }
    let mut mesh = Mesh::from_config(&config);
    mesh.cluster.clone_from(&base.cluster);
    mesh.domain.clone_from(&base.domain);
    mesh.multiple_custom_providers = base.multiple_custom_providers;
    Ok(mesh)
}
