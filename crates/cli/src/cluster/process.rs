//! The cluster process: API server, controllers, DNS, service addresses and node agent in one tokio process.
//!
//! Re-executed inside the sandbox as `mantlet cluster-process JSON`; its standard input is the channel to the broker, whose
//! end ends it. It composes the parts and knows nothing of kubeconfig files or of the host's network.

use std::collections::HashMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mantlet_apiserver::{ApiServer, Identity};
use mantlet_net::fdpass::{FrameReader, Read as FrameRead, send_frame};
use mantlet_node::controllers::{self, Informers};
use mantlet_node::services::loadbalancer::{self, HostSockets};
use mantlet_node::{dns, sandbox, services};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::paths::Paths;
use super::pki;
use super::protocol::{FromBroker, Start, ToBroker};

/// The hidden word that leads here.
pub const SUBCOMMAND: &str = "cluster-process";
/// Port of the API server on the node's address; the Service `kubernetes` leads there.
const API_PORT: u16 = 6443;
/// Address of the name server's Service, as pods' resolv.conf has it.
const DNS_SERVICE: &str = "10.96.0.10";

/// Entry point of the re-execution.
pub fn main(args: &[String]) -> ExitCode {
    let (channel, start) = match begin(args) {
        Ok(parts) => parts,
        Err(error) => {
            eprintln!("mantlet: cluster: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")
        .and_then(|runtime| {
            let result = runtime.block_on(serve(channel.clone(), start));
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            result
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let _ = channel.send(&ToBroker::Failed {
                reason: format!("{error:#}"),
            });
            ExitCode::FAILURE
        }
    }
}

fn begin(args: &[String]) -> Result<(Arc<Channel>, Start)> {
    let [json] = args else { bail!("expected one argument") };
    let start: Start = serde_json::from_str(json).context("bad argument")?;
    let _log = mantlet_runtime::log::init(&mantlet_runtime::log::LogOptions::default())?;
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("the broker's channel")?;
    Ok((Channel::new(socket), start))
}

/// Requests to the broker, answered in any order.
struct Channel {
    socket: OwnedFd,
    sending: Mutex<()>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<std::io::Result<std::net::TcpListener>>>>,
}

impl Channel {
    fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            socket,
            sending: Mutex::new(()),
            next: AtomicU64::new(1),
            waiting: Mutex::new(HashMap::new()),
        })
    }

    fn send(&self, message: &ToBroker) -> Result<()> {
        let body = serde_json::to_vec(message)?;
        let _guard = self.sending.lock();
        Ok(send_frame(&self.socket, &body, &[])?)
    }

    /// Reads the broker's messages in a thread of its own; `api` gets the first listener, `stop` is cancelled at the end.
    fn read(self: Arc<Self>, api: oneshot::Sender<OwnedFd>, stop: CancellationToken) {
        let mut api = Some(api);
        let mut reader = FrameReader::default();
        loop {
            let frame = match reader.read(&self.socket) {
                Ok(FrameRead::Frame(frame)) => frame,
                Ok(FrameRead::Pending) => continue,
                Ok(FrameRead::Closed) => break,
                Err(error) => {
                    tracing::error!(%error, "reading from the broker");
                    break;
                }
            };
            let listener = frame.fds.into_iter().next();
            match serde_json::from_slice(&frame.body) {
                Ok(FromBroker::Api) => {
                    if let (Some(api), Some(listener)) = (api.take(), listener) {
                        let _ = api.send(listener);
                    }
                }
                Ok(FromBroker::Listening { id, error }) => {
                    let waiting = self
                        .waiting
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .remove(&id);
                    let answer = match (error, listener) {
                        (Some(code), _) => Err(std::io::Error::from_raw_os_error(code)),
                        (None, Some(listener)) => Ok(std::net::TcpListener::from(listener)),
                        (None, None) => Err(std::io::ErrorKind::InvalidData.into()),
                    };
                    if let Some(waiting) = waiting {
                        let _ = waiting.send(answer);
                    }
                }
                Ok(FromBroker::Stop) => {
                    tracing::info!("stopping, as the broker says");
                    break;
                }
                Err(error) => tracing::error!(%error, "a message of the broker"),
            }
        }
        stop.cancel();
    }
}

impl HostSockets for Channel {
    fn listen(&self, address: SocketAddrV4) -> loadbalancer::Answer<'_> {
        Box::pin(async move {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let (sender, answer) = oneshot::channel();
            self.waiting
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .insert(id, sender);
            self.send(&ToBroker::Listen { id, address })
                .map_err(std::io::Error::other)?;
            answer
                .await
                .map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))?
        })
    }
}

async fn serve(channel: Arc<Channel>, start: Start) -> Result<()> {
    let paths = Paths {
        name: start.name.clone(),
        dir: start.dir.clone(),
    };
    let stop = CancellationToken::new();
    let (api_sender, api_listener) = oneshot::channel();
    std::thread::spawn({
        let (channel, stop) = (channel.clone(), stop.clone());
        move || channel.read(api_sender, stop)
    });
    let pki = pki::load(&paths.pki())?;
    let config = mantlet_apiserver::Config::new(paths.store(), pki.ca_cert.clone(), pki.sa_key.clone());
    let server = ApiServer::open(config).await.with_context(|| {
        format!(
            "the cluster's state {} cannot be opened. Restore it from a copy, or begin anew with `mantlet cluster down --purge --name {}`",
            paths.store().display(),
            start.name
        )
    })?;
    let chain = format!("{}{}", pki.server_cert, pki.ca_cert);
    let tls = server.tls_config(&chain, &pki.server_key)?;
    let host = api_listener.await.context("the broker has gone")?;
    let host = std::net::TcpListener::from(host);
    host.set_nonblocking(true)?;
    let node_address = SocketAddr::from((sandbox::NODE_ADDRESS, API_PORT));
    let inside = TcpListener::bind(node_address)
        .await
        .with_context(|| format!("listening on {node_address}"))?;
    for listener in [TcpListener::from_std(host)?, inside] {
        let serving = server.clone().serve(listener, tls.clone());
        let stop = stop.clone();
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "the API server ended");
                stop.cancel();
            }
        });
    }
    let client = |name: &str| Client::new(server.service(Identity::admin(name)), "default");

    let informers = Informers::start(&client("system:kube-controller-manager"), &stop);
    let root_ca = controllers::Config {
        root_ca_pem: pki.ca_cert.clone(),
    };
    tokio::spawn(controllers::run(
        client("system:kube-controller-manager"),
        informers.clone(),
        root_ca,
        stop.clone(),
    ));
    dns::serve(informers.clone(), dns::Config::on_node(), stop.clone())
        .await
        .context("starting the name server")?;
    let handle = services::start(informers.clone(), stop.clone());
    tokio::spawn(loadbalancer::run(
        client("system:service-controller"),
        informers.clone(),
        channel.clone(),
        start.name.clone(),
        stop.clone(),
    ));
    publish_dns(&client("system:kube-controller-manager"))
        .await
        .context("publishing the name server")?;
    let agent = super::node_agent::start(&paths, client("system:node:mantlet"), handle, stop.clone())?;

    let node_client = client("system:node:mantlet");
    tokio::select! {
        ready = node_ready(&node_client) => ready?,
        () = stop.cancelled() => return Ok(()),
    }
    channel.send(&ToBroker::Ready).context("telling the broker")?;
    tracing::info!(cluster = start.name, port = start.port, "the cluster is up");

    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        () = stop.cancelled() => {}
        _ = terminate.recv() => stop.cancel(),
    }
    agent.stopped().await;
    Ok(())
}

/// The Service `kube-dns` under its well-known address, led to the name server on the node.
async fn publish_dns(client: &Client) -> Result<()> {
    let apply = PatchParams::apply("mantlet").force();
    let services: Api<Service> = Api::namespaced(client.clone(), "kube-system");
    let ports = json!([
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
    ]);
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"clusterIP": DNS_SERVICE, "ports": ports},
    });
    services.patch("kube-dns", &apply, &Patch::Apply(&service)).await?;
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "kube-system");
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns", "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns", "endpointslice.kubernetes.io/managed-by": "mantlet"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [sandbox::NODE_ADDRESS.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}],
    });
    slices.patch("kube-dns", &apply, &Patch::Apply(&slice)).await?;
    Ok(())
}

/// Resolves once the node says that it is ready.
async fn node_ready(client: &Client) -> Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let ready = |node: Option<&Node>| {
        let conditions = node
            .and_then(|node| node.status.as_ref())
            .and_then(|status| status.conditions.as_ref());
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    kube::runtime::wait::await_condition(nodes, "mantlet", ready)
        .await
        .context("waiting for the node")?;
    Ok(())
}
