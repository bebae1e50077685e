//! The node agent: registers the node and runs the pods that are bound to it.
//!
//! Called by the `cluster` command inside the sandbox. It is a Kubernetes client like any other: it watches pods, runs one
//! worker per pod, and writes their status. Scheduling is the controllers' business.

pub(crate) mod events;
pub(crate) mod fields;
mod hooks;
mod node;
pub(crate) mod spec;
pub(crate) mod state;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::watcher;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::images::Images;
use crate::podnet::AddressPool;
use crate::sandbox::NODE_ADDRESS;
use crate::shim::client::Shim;
use events::Recorder;
use spec::ClusterFacts;

/// The only node's name.
pub const NODE_NAME: &str = "mantlet";

/// What the node agent needs.
#[derive(Clone)]
pub struct NodeConfig {
    /// A client with the node's rights.
    pub client: kube::Client,
    /// The cluster's state directory; pods are below `pods/`.
    pub state_dir: PathBuf,
    /// A binary that calls `shim_main` for `mantlet shim`, normally the running one.
    pub shim_program: PathBuf,
    /// Where Mantlet's binaries are, for the image table.
    pub bin_dir: PathBuf,
    /// Where to serve the kubelet's HTTP endpoint, normally `<state_dir>/kubelet.sock`.
    pub socket: PathBuf,
    /// The cluster DNS server, normally 10.96.0.10.
    pub dns_server: Ipv4Addr,
    /// The cluster's domain, normally `cluster.local`.
    pub cluster_domain: String,
    /// Address and port of the Service `kubernetes`, normally 10.96.0.1:443.
    pub kubernetes_service: (Ipv4Addr, u16),
    /// The rules of service addresses, when they are kept in this process: a pod that ends waits until they no longer
    /// lead to it.
    pub services: Option<crate::services::Handle>,
}

impl NodeConfig {
    /// The usual configuration for a state directory.
    #[must_use]
    pub fn new(client: kube::Client, state_dir: PathBuf, shim_program: PathBuf) -> Self {
        let bin_dir = shim_program.parent().map(std::path::Path::to_owned).unwrap_or_default();
        let socket = state_dir.join("kubelet.sock");
        Self {
            client,
            state_dir,
            shim_program,
            bin_dir,
            socket,
            dns_server: Ipv4Addr::new(10, 96, 0, 10),
            cluster_domain: "cluster.local".into(),
            kubernetes_service: (Ipv4Addr::new(10, 96, 0, 1), 443),
            services: None,
        }
    }
}

/// Why the node agent could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The state directory or the socket.
    #[error("node agent: {path}: {source}")]
    Io {
        /// The path.
        path: String,
        /// The error.
        source: std::io::Error,
    },
    /// The API server.
    #[error("node agent: {step}: {source}")]
    Api {
        /// What was being done.
        step: &'static str,
        /// The error.
        source: Box<kube::Error>,
    },
}

/// A running or ended container, as `exec`, `logs` and `attach` need it.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) id: String,
    pub(crate) running: bool,
    pub(crate) log: PathBuf,
    pub(crate) previous: Option<PathBuf>,
    /// Our end of its standard input or terminal.
    pub(crate) input: Option<Arc<OwnedFd>>,
    pub(crate) tty: bool,
    /// Its standard input ends with the first client that was attached to it.
    pub(crate) stdin_once: bool,
}

/// A pod, as the HTTP endpoint sees it.
#[derive(Debug, Default)]
pub(crate) struct PodHandle {
    pub(crate) uid: String,
    pub(crate) shim: Mutex<Option<Shim>>,
    pub(crate) containers: Mutex<BTreeMap<String, Live>>,
    /// Names of all containers of the specification.
    pub(crate) names: Vec<String>,
    /// Raised at each change above.
    pub(crate) changed: tokio::sync::Notify,
}

/// Shared by the parts of the agent.
pub(crate) struct Shared {
    pub(crate) config: NodeConfig,
    pub(crate) images: Images,
    pub(crate) cluster: ClusterFacts,
    pub(crate) recorder: Recorder,
    pub(crate) addresses: Mutex<AddressPool>,
    pub(crate) pods: RwLock<HashMap<(String, String), Arc<PodHandle>>>,
    pub(crate) cpus: u64,
    pub(crate) memory: u64,
}

impl Shared {
    pub(crate) fn pods_dir(&self) -> PathBuf {
        self.config.state_dir.join("pods")
    }

    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Option<Arc<PodHandle>> {
        let pods = self.pods.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }
}

/// What a worker is told about its pod.
#[derive(Clone)]
pub(crate) struct Input {
    pub(crate) pod: Arc<Pod>,
    /// The object does not exist any more: end at once.
    pub(crate) gone: bool,
}

struct Worker {
    input: watch::Sender<Input>,
    task: tokio::task::JoinHandle<()>,
}

/// Runs the node agent until `stop` is cancelled (pods are then left to end with this process) or it cannot go on.
///
/// # Errors
/// [`NodeError`] when it cannot start.
pub async fn run(config: NodeConfig, stop: CancellationToken) -> Result<(), NodeError> {
    let pods_dir = config.state_dir.join("pods");
    std::fs::create_dir_all(&pods_dir).map_err(|source| NodeError::Io {
        path: pods_dir.display().to_string(),
        source,
    })?;
    let (cpus, memory) = node::capacity();
    let (service_host, service_port) = config.kubernetes_service;
    let shared = Arc::new(Shared {
        images: Images::new(&config.bin_dir),
        cluster: ClusterFacts {
            dns_server: config.dns_server.to_string(),
            cluster_domain: config.cluster_domain.clone(),
            service_host: service_host.to_string(),
            service_port,
        },
        recorder: Recorder::start(config.client.clone()),
        addresses: Mutex::new(AddressPool::load(&pods_dir)),
        pods: RwLock::default(),
        cpus,
        memory,
        config,
    });
    let endpoint = crate::kubelet_http::serve(Arc::clone(&shared), stop.clone()).map_err(|source| NodeError::Io {
        path: shared.config.socket.display().to_string(),
        source,
    })?;
    node::register(&shared).await?;
    let heartbeat = tokio::spawn(node::heartbeat(Arc::clone(&shared)));
    let mut workers: HashMap<String, Worker> = HashMap::new();
    tokio::select! {
        () = stop.cancelled() => {}
        () = watch_pods(&shared, &mut workers) => {}
    }
    heartbeat.abort();
    endpoint.abort();
    for (_, worker) in workers.drain() {
        worker.task.abort();
        // Cancelled, which is what was asked for.
        let _ = worker.task.await;
    }
    // Whoever still holds a pod's handle (an open exec session) must not keep its shim.
    for handle in shared
        .pods
        .write()
        .unwrap_or_else(PoisonError::into_inner)
        .drain()
        .map(|(_, handle)| handle)
    {
        *handle.shim.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    Ok(())
}

async fn watch_pods(shared: &Arc<Shared>, workers: &mut HashMap<String, Worker>) {
    let api: Api<Pod> = Api::all(shared.config.client.clone());
    let mut first = true;
    let mut listed: HashSet<String> = HashSet::new();
    // The watcher starts anew by itself after errors; the pause is its backoff.
    let mut stream = std::pin::pin!(watcher(api, watcher::Config::default()));
    loop {
        match stream.try_next().await {
            Ok(Some(watcher::Event::Init)) => listed.clear(),
            Ok(Some(watcher::Event::InitApply(pod))) => {
                listed.extend(pod.metadata.uid.clone());
                apply(shared, workers, pod);
            }
            Ok(Some(watcher::Event::InitDone)) => {
                for (uid, worker) in workers.iter() {
                    if !listed.contains(uid) {
                        worker.input.send_modify(|input| input.gone = true);
                    }
                }
                if std::mem::take(&mut first) {
                    worker::remove_leftovers(shared, &listed);
                }
            }
            Ok(Some(watcher::Event::Apply(pod))) => apply(shared, workers, pod),
            Ok(Some(watcher::Event::Delete(pod))) => {
                if let Some(worker) = pod.metadata.uid.as_ref().and_then(|uid| workers.get(uid)) {
                    worker.input.send_modify(|input| input.gone = true);
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "watching pods failed; trying again");
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            }
        }
        workers.retain(|_, worker| !worker.task.is_finished());
    }
}

fn apply(shared: &Arc<Shared>, workers: &mut HashMap<String, Worker>, pod: Pod) {
    let ours = pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(NODE_NAME);
    let Some(uid) = pod.metadata.uid.clone().filter(|_| ours) else {
        return;
    };
    let pod = Arc::new(pod);
    if let Some(worker) = workers.get(&uid).filter(|worker| !worker.task.is_finished()) {
        worker.input.send_modify(|input| input.pod = pod);
        return;
    }
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let over = matches!(phase, Some("Succeeded" | "Failed"));
    if over && pod.metadata.deletion_timestamp.is_none() {
        return;
    }
    let (input, receiver) = watch::channel(Input { pod, gone: false });
    let task = tokio::spawn(worker::run(Arc::clone(shared), uid.clone(), receiver));
    workers.insert(uid, Worker { input, task });
}
