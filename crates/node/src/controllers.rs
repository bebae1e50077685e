//! The controllers of `kube-controller-manager` that a single-machine cluster needs.
//!
//! Called by the cluster process with a `kube::Client`; everything here is a plain Kubernetes client and runs against any
//! API server. Each controller watches through the shared [`Informers`], queues the keys that a change touches and
//! reconciles them; nothing polls. Controllers must not know how pods are run or how the API server stores objects.

pub mod accounts;
pub mod daemonset;
pub mod deployment;
pub mod endpoints;
pub mod gc;
pub mod informer;
pub mod job;
pub mod namespace;
pub mod podgc;
pub(crate) mod pods;
pub mod queue;
pub mod replicaset;
pub mod rollout;
pub mod scheduler;
pub mod statefulset;

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use informer::Informer;

/// What can go wrong in one reconcile; each is retried with backoff.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached.
    #[error("{}", message_of(.0))]
    Api(#[from] kube::Error),
    /// An object cannot be acted upon as it is; retrying helps once somebody has changed it.
    #[error("{0}")]
    Invalid(String),
    /// An object could not be converted to or from JSON.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

/// The API server's own words; the client's rendering repeats the whole Status.
fn message_of(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

impl Error {
    /// Somebody else has changed the object meanwhile, which an immediate retry resolves.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(kube::Error::Api(status)) if status.code == 409)
    }
}

/// The API's answer `404 Not Found` (also for an object that has been deleted meanwhile).
pub(crate) fn not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// `409` because an object of that name is there already.
pub(crate) fn already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == "AlreadyExists")
}

/// The API server says that the namespace is going away: nothing more is created there.
pub(crate) fn namespace_terminating(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 403 && status.message.contains("being terminated"))
}

/// Turns "it is gone already" into success.
pub(crate) fn ignore_not_found<T>(result: Result<T, kube::Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if not_found(&error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The shared caches.
pub struct Informers {
    /// Namespaces.
    pub namespaces: Arc<Informer<Namespace>>,
    /// Nodes.
    pub nodes: Arc<Informer<Node>>,
    /// Pods.
    pub pods: Arc<Informer<Pod>>,
    /// Services.
    pub services: Arc<Informer<Service>>,
    /// Endpoint slices.
    pub slices: Arc<Informer<EndpointSlice>>,
    /// Endpoints, which older clients read.
    pub endpoints: Arc<Informer<Endpoints>>,
    /// Service accounts.
    pub accounts: Arc<Informer<ServiceAccount>>,
    /// The ConfigMaps `kube-root-ca.crt`.
    pub root_cas: Arc<Informer<ConfigMap>>,
    /// Deployments.
    pub deployments: Arc<Informer<Deployment>>,
    /// Replica sets.
    pub replica_sets: Arc<Informer<ReplicaSet>>,
    /// Daemon sets.
    pub daemon_sets: Arc<Informer<DaemonSet>>,
    /// Stateful sets.
    pub stateful_sets: Arc<Informer<StatefulSet>>,
    /// Jobs.
    pub jobs: Arc<Informer<Job>>,
}

impl Informers {
    /// Starts to list and watch everything; returns at once.
    pub fn start(client: &Client, stop: &CancellationToken) -> Arc<Self> {
        macro_rules! watch {
            ($kind:ty) => {
                watch!($kind, watcher::Config::default())
            };
            ($kind:ty, $config:expr) => {{
                let informer = Informer::<$kind>::new();
                tokio::spawn(
                    informer
                        .clone()
                        .run(Api::all(client.clone()), $config, stop.clone()),
                );
                informer
            }};
        }
        let root_ca = format!("metadata.name={}", accounts::ROOT_CA_NAME);
        Arc::new(Self {
            namespaces: watch!(Namespace),
            nodes: watch!(Node),
            pods: watch!(Pod),
            services: watch!(Service),
            slices: watch!(EndpointSlice),
            endpoints: watch!(Endpoints),
            accounts: watch!(ServiceAccount),
            root_cas: watch!(ConfigMap, watcher::Config::default().fields(&root_ca)),
            deployments: watch!(Deployment),
            replica_sets: watch!(ReplicaSet),
            daemon_sets: watch!(DaemonSet),
            stateful_sets: watch!(StatefulSet),
            jobs: watch!(Job),
        })
    }

    /// Resolves once every cache holds its first full list.
    pub async fn synced(&self) {
        tokio::join!(
            self.namespaces.synced(),
            self.nodes.synced(),
            self.pods.synced(),
            self.services.synced(),
            self.slices.synced(),
            self.endpoints.synced(),
            self.accounts.synced(),
            self.root_cas.synced(),
            self.deployments.synced(),
            self.replica_sets.synced(),
            self.daemon_sets.synced(),
            self.stateful_sets.synced(),
            self.jobs.synced(),
        );
    }
}

/// What the controllers need from outside.
#[derive(Clone, Debug)]
pub struct Config {
    /// The CA of the API server, PEM, published as `kube-root-ca.crt` in every namespace.
    pub root_ca_pem: String,
}

/// What every controller holds.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) informers: Arc<Informers>,
    pub(crate) events: pods::Events,
}

/// Runs every controller until `stop` is cancelled. Waits for the caches first, because a controller that acts on half a
/// cache would create what exists already.
pub async fn run(client: Client, informers: Arc<Informers>, config: Config, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => return,
        () = informers.synced() => {}
    }
    let context = Context {
        events: pods::Events::new(client.clone()),
        client,
        informers,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(accounts::run(context.clone(), config, stop.clone()));
    tasks.spawn(scheduler::run(context.clone(), stop.clone()));
    tasks.spawn(deployment::run(context.clone(), stop.clone()));
    tasks.spawn(replicaset::run(context.clone(), stop.clone()));
    tasks.spawn(daemonset::run(context.clone(), stop.clone()));
    tasks.spawn(statefulset::run(context.clone(), stop.clone()));
    tasks.spawn(job::run(context.clone(), stop.clone()));
    tasks.spawn(endpoints::run(context.clone(), stop.clone()));
    tasks.spawn(namespace::run(context.clone(), stop.clone()));
    tasks.spawn(gc::run(context.clone(), stop.clone()));
    tasks.spawn(podgc::run(context, stop));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            // A controller that panics would otherwise leave the cluster silently half alive.
            tracing::error!(%error, "a controller ended");
        }
    }
}
