//! Garbage collection by owner references, in all three ways of deleting: background, foreground, orphan.
//!
//! A graph of every object's metadata is kept by watching each deletable kind (custom resources too). An object whose
//! last owner is gone is deleted; an owner that waits with the finalizer `foregroundDeletion` or `orphan` gets its
//! dependents deleted or released first. The graph is only a hint: before anything is deleted, the owner's absence is
//! confirmed with the API server.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::GroupVersionKind;
use kube::discovery::{ApiCapabilities, ApiResource, Discovery, Scope, verbs};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, not_found};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

/// Kinds that come and go in masses and are never owners or owned in a way that matters.
const IGNORED: &[(&str, &str)] = &[("", "Event"), ("events.k8s.io", "Event")];

/// One object.
#[derive(Clone, Debug)]
struct Node {
    resource: Arc<ApiResource>,
    namespace: Option<String>,
    name: String,
    owners: Vec<OwnerReference>,
    finalizers: Vec<String>,
    deleting: bool,
}

#[derive(Default)]
struct Graph {
    nodes: HashMap<String, Node>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    fn insert(&mut self, uid: String, node: Node) {
        self.unlink(&uid);
        for owner in &node.owners {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(uid.clone());
        }
        self.nodes.insert(uid, node);
    }

    fn remove(&mut self, uid: &str) -> Option<Node> {
        self.unlink(uid);
        self.nodes.remove(uid)
    }

    fn unlink(&mut self, uid: &str) {
        let Some(node) = self.nodes.get(uid) else { return };
        for owner in &node.owners {
            if let Some(set) = self.dependents.get_mut(&owner.uid) {
                set.remove(uid);
                if set.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
    }

    fn dependents(&self, uid: &str) -> Vec<(String, Node)> {
        let uids = self.dependents.get(uid).into_iter().flatten();
        uids.filter_map(|uid| Some((uid.clone(), self.nodes.get(uid)?.clone())))
            .collect()
    }
}

/// (group, kind) → how to ask for it, and whether it lives in namespaces.
type Kinds = HashMap<(String, String), (Arc<ApiResource>, bool)>;

struct Collector {
    client: Client,
    graph: Mutex<Graph>,
    /// Kind → resource, to find an owner that is not in the graph.
    kinds: Mutex<Kinds>,
    queue: Arc<Queue<String>>,
}

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let collector = Arc::new(Collector {
        client: context.client.clone(),
        graph: Mutex::new(Graph::default()),
        kinds: Mutex::new(HashMap::new()),
        queue: Queue::new(),
    });
    let watching = tokio::spawn(collector.clone().watch_kinds(stop.clone()));
    let queue = collector.queue.clone();
    queue::run("garbage-collector", queue, 4, stop, move |uid: String| {
        let collector = collector.clone();
        async move { collector.reconcile(&uid).await }
    })
    .await;
    watching.abort();
}

/// Every resource that can be listed, watched and deleted.
pub(crate) async fn deletable(client: &Client) -> Result<Vec<(ApiResource, ApiCapabilities)>, Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut found = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let usable = [verbs::LIST, verbs::WATCH, verbs::DELETE]
                .iter()
                .all(|verb| capabilities.supports_operation(verb));
            if usable && !IGNORED.contains(&(resource.group.as_str(), resource.kind.as_str())) {
                found.push((resource, capabilities));
            }
        }
    }
    Ok(found)
}

impl Collector {
    /// Watches every kind, and looks for new kinds whenever a CustomResourceDefinition changes.
    async fn watch_kinds(self: Arc<Self>, stop: CancellationToken) {
        let crds: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let mut changes = Box::pin(watcher(crds, watcher::Config::default()).default_backoff());
        let mut watched: HashMap<(String, String, String), CancellationToken> = HashMap::new();
        loop {
            match deletable(&self.client).await {
                Ok(found) => self.follow(&found, &mut watched, &stop),
                Err(error) => {
                    tracing::warn!(%error, "garbage collector: discovery failed, retrying");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            }
            // Several CRDs usually come together: take what is there, then wait for one that is established.
            loop {
                let change = tokio::select! {
                    () = stop.cancelled() => return,
                    change = changes.next() => change,
                };
                match change {
                    Some(Ok(watcher::Event::Apply(crd))) if !established(&crd) => {}
                    Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_))) => {}
                    Some(Ok(_)) => break,
                    Some(Err(error)) => tracing::debug!(%error, "garbage collector: watching CRDs"),
                    None => return,
                }
            }
        }
    }

    fn follow(
        self: &Arc<Self>,
        found: &[(ApiResource, ApiCapabilities)],
        watched: &mut HashMap<(String, String, String), CancellationToken>,
        stop: &CancellationToken,
    ) {
        let id = |resource: &ApiResource| (resource.group.clone(), resource.version.clone(), resource.kind.clone());
        let current: HashSet<_> = found.iter().map(|(resource, _)| id(resource)).collect();
        watched.retain(|key, token| {
            let keep = current.contains(key);
            if !keep {
                token.cancel();
            }
            keep
        });
        for (resource, capabilities) in found {
            let namespaced = matches!(capabilities.scope, Scope::Namespaced);
            let shared = Arc::new(resource.clone());
            guard(&self.kinds).insert(
                (resource.group.clone(), resource.kind.clone()),
                (shared.clone(), namespaced),
            );
            watched.entry(id(resource)).or_insert_with(|| {
                let token = stop.child_token();
                tokio::spawn(self.clone().watch_kind(shared, token.clone()));
                token
            });
        }
    }

    async fn watch_kind(self: Arc<Self>, resource: Arc<ApiResource>, stop: CancellationToken) {
        let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(self.client.clone(), resource.as_ref());
        let mut events = Box::pin(watcher(api, watcher::Config::default()).default_backoff());
        let mut listed: HashSet<String> = HashSet::new();
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(watcher::Event::Init)) => listed.clear(),
                Some(Ok(watcher::Event::InitApply(object))) => {
                    listed.extend(object.uid());
                    self.seen(&resource, &object);
                }
                Some(Ok(watcher::Event::InitDone)) => self.forget_unlisted(&resource, &listed),
                Some(Ok(watcher::Event::Apply(object))) => self.seen(&resource, &object),
                Some(Ok(watcher::Event::Delete(object))) => self.gone(&object.uid().unwrap_or_default()),
                Some(Err(error)) => {
                    tracing::debug!(kind = resource.kind, %error, "garbage collector: watch failed, retrying")
                }
                None => return,
            }
        }
    }

    fn seen(&self, resource: &Arc<ApiResource>, object: &PartialObjectMeta<DynamicObject>) {
        let Some(uid) = object.uid() else { return };
        let node = Node {
            resource: resource.clone(),
            namespace: object.namespace(),
            name: object.name_any(),
            owners: object.owner_references().to_vec(),
            finalizers: object.finalizers().to_vec(),
            deleting: object.metadata.deletion_timestamp.is_some(),
        };
        let interesting = !node.owners.is_empty() || node.deleting;
        let owners: Vec<_> = node.owners.iter().map(|owner| owner.uid.clone()).collect();
        guard(&self.graph).insert(uid.clone(), node);
        if interesting {
            self.queue.add(uid);
        }
        // An owner that waits for its dependents looks again.
        for owner in owners {
            let waits = guard(&self.graph).nodes.get(&owner).is_some_and(|owner| owner.deleting);
            if waits {
                self.queue.add(owner);
            }
        }
    }

    fn gone(&self, uid: &str) {
        let (node, dependents) = {
            let mut graph = guard(&self.graph);
            let node = graph.remove(uid);
            (node, graph.dependents.get(uid).cloned().unwrap_or_default())
        };
        for dependent in dependents {
            self.queue.add(dependent);
        }
        for owner in node.into_iter().flat_map(|node| node.owners) {
            self.queue.add(owner.uid);
        }
    }

    fn forget_unlisted(&self, resource: &ApiResource, listed: &HashSet<String>) {
        let missing: Vec<_> = {
            let graph = guard(&self.graph);
            let nodes = graph.nodes.iter();
            nodes
                .filter(|(uid, node)| *node.resource == *resource && !listed.contains(*uid))
                .map(|(uid, _)| uid.clone())
                .collect()
        };
        for uid in missing {
            self.gone(&uid);
        }
    }

    fn api(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    async fn reconcile(&self, uid: &str) -> Result<Option<Duration>, Error> {
        let Some(node) = guard(&self.graph).nodes.get(uid).cloned() else {
            return Ok(None);
        };
        if node.deleting {
            if node.finalizers.iter().any(|finalizer| finalizer == ORPHAN) {
                return self.orphan(uid, &node).await;
            }
            if node.finalizers.iter().any(|finalizer| finalizer == FOREGROUND) {
                return self.foreground(uid, &node).await;
            }
            return Ok(None);
        }
        if node.owners.is_empty() {
            return Ok(None);
        }
        let (mut present, mut waiting, mut absent) = (0, 0, Vec::new());
        for owner in &node.owners {
            match self.owner_state(&node, owner).await? {
                OwnerState::Present => present += 1,
                OwnerState::WaitsForDependents => waiting += 1,
                OwnerState::Absent => absent.push(owner.uid.clone()),
                // A kind that is not served says nothing about the object: keep it.
                OwnerState::Unknown => return Ok(Some(Duration::from_secs(30))),
            }
        }
        if present > 0 {
            if absent.is_empty() && waiting == 0 {
                return Ok(None);
            }
            let left: Vec<_> = node
                .owners
                .iter()
                .filter(|owner| !absent.contains(&owner.uid))
                .collect();
            if absent.is_empty() {
                return Ok(None);
            }
            return self.patch(uid, &node, &json!({"ownerReferences": left})).await;
        }
        let policy = if waiting > 0 && !guard(&self.graph).dependents(uid).is_empty() {
            PropagationPolicy::Foreground
        } else if node.finalizers.iter().any(|finalizer| finalizer == ORPHAN) {
            PropagationPolicy::Orphan
        } else {
            PropagationPolicy::Background
        };
        let params = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let api = self.api(&node.resource, node.namespace.as_deref());
        match api.delete(&node.name, &params).await {
            Ok(_) => tracing::debug!(
                kind = node.resource.kind,
                name = node.name,
                "deleted: its owner is gone"
            ),
            Err(error) if not_found(&error) => self.gone(uid),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    }

    async fn owner_state(&self, node: &Node, owner: &OwnerReference) -> Result<OwnerState, Error> {
        if let Some(known) = guard(&self.graph).nodes.get(&owner.uid) {
            // An owner in another namespace does not count (the API calls it absent).
            if known.namespace.is_none() || known.namespace == node.namespace {
                let waits = known.deleting && known.finalizers.iter().any(|finalizer| finalizer == FOREGROUND);
                return Ok(if waits {
                    OwnerState::WaitsForDependents
                } else {
                    OwnerState::Present
                });
            }
            return Ok(OwnerState::Absent);
        }
        let Ok(kind) = kube::core::TypeMeta {
            api_version: owner.api_version.clone(),
            kind: owner.kind.clone(),
        }
        .try_into() as Result<GroupVersionKind, _>
        else {
            return Ok(OwnerState::Unknown);
        };
        let known = guard(&self.kinds).get(&(kind.group, kind.kind)).cloned();
        let Some((resource, namespaced)) = known else {
            return Ok(OwnerState::Unknown);
        };
        let namespace = node.namespace.as_deref().filter(|_| namespaced);
        if namespaced && namespace.is_none() {
            return Ok(OwnerState::Absent);
        }
        match self.api(&resource, namespace).get_metadata(&owner.name).await {
            Ok(found) if found.uid().as_ref() == Some(&owner.uid) => Ok(OwnerState::Present),
            Ok(_) => Ok(OwnerState::Absent),
            Err(error) if not_found(&error) => Ok(OwnerState::Absent),
            Err(error) => Err(error.into()),
        }
    }

    async fn foreground(&self, uid: &str, node: &Node) -> Result<Option<Duration>, Error> {
        let dependents = guard(&self.graph).dependents(uid);
        let mut blocked = false;
        for (dependent, facts) in &dependents {
            let blocks = facts
                .owners
                .iter()
                .any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true));
            blocked |= blocks;
            if !facts.deleting {
                self.queue.add(dependent.clone());
            }
        }
        if blocked {
            // The last dependent's end brings the owner back.
            return Ok(None);
        }
        let left: Vec<_> = node
            .finalizers
            .iter()
            .filter(|finalizer| *finalizer != FOREGROUND)
            .collect();
        self.patch(uid, node, &json!({"finalizers": left})).await
    }

    async fn orphan(&self, uid: &str, node: &Node) -> Result<Option<Duration>, Error> {
        let dependents = guard(&self.graph).dependents(uid);
        for (dependent, facts) in dependents {
            let left: Vec<_> = facts.owners.iter().filter(|owner| owner.uid != uid).collect();
            self.patch(&dependent, &facts, &json!({"ownerReferences": left}))
                .await?;
        }
        let left: Vec<_> = node
            .finalizers
            .iter()
            .filter(|finalizer| *finalizer != ORPHAN)
            .collect();
        self.patch(uid, node, &json!({"finalizers": left})).await
    }

    async fn patch(&self, uid: &str, node: &Node, metadata: &serde_json::Value) -> Result<Option<Duration>, Error> {
        let mut metadata = metadata.clone();
        metadata["uid"] = json!(uid);
        let api = self.api(&node.resource, node.namespace.as_deref());
        let patch = json!({"metadata": metadata});
        ignore_not_found(
            api.patch(&node.name, &PatchParams::default(), &Patch::Merge(&patch))
                .await,
        )?;
        Ok(None)
    }
}

enum OwnerState {
    Present,
    WaitsForDependents,
    Absent,
    Unknown,
}

fn established(crd: &CustomResourceDefinition) -> bool {
    crd.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Established" && condition.status == "True")
}

fn guard<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
