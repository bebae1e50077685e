//! Simulated sidecars: real connections with TLS and a pod's token, real ADS streams, answers to everything. They follow references as
//! proxies do and remember names and versions, but do not decode resources: what is measured is the control plane.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use mantlet_identity::{ClientTlsOptions, ExpectedServer, TlsIdentity};
use mantlet_xds::{Node, ResourceType};
use prost::Message;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Request;
use tonic::transport::Channel;

use crate::objects;

/// Largest message.
const MAX_MESSAGE: usize = 256 << 20;
/// The listener of the inbound side.
const INBOUND: &str = "virtualInbound";
/// Name of the control plane in its certificate.
const SERVER_NAME: &str = "istiod.istio-system.svc";

/// The protocol variant of a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Mode {
    /// Incremental, everything.
    Delta,
    /// State of the world, everything.
    Sotw,
    /// Incremental, five services by name.
    OnDemand,
}

/// How a sidecar is known.
#[derive(Clone)]
pub(crate) struct Identity {
    /// Pod.
    pub(crate) pod: String,
    /// Namespace.
    pub(crate) namespace: String,
    /// Address.
    pub(crate) ip: String,
    /// Token of the pod.
    pub(crate) token: String,
    /// Hosts that it calls, for [`Mode::OnDemand`].
    pub(crate) calls: Vec<String>,
}

/// What all sidecars share.
pub(crate) struct Fleet {
    /// Where xDS listens with TLS.
    pub(crate) address: SocketAddr,
    /// TLS of clients without a certificate.
    pub(crate) tls: TlsIdentity,
    /// Variant.
    pub(crate) mode: Mode,
    /// Streams that failed and were opened again.
    pub(crate) again: AtomicU64,
    /// Responses that sidecars have got.
    pub(crate) responses: AtomicU64,
    /// Told whenever any sidecar has got something.
    pub(crate) progress: watch::Sender<()>,
    /// Told of addresses in endpoints that the probe gets.
    pub(crate) probe: Mutex<Option<mpsc::UnboundedSender<(String, String, Instant)>>>,
    /// Texts that many sidecars hold.
    texts: Mutex<HashSet<Arc<str>>>,
}

impl Fleet {
    /// Nobody yet.
    pub(crate) fn new(address: SocketAddr, tls: TlsIdentity, mode: Mode) -> Arc<Fleet> {
        Arc::new(Fleet {
            address,
            tls,
            mode,
            again: AtomicU64::new(0),
            responses: AtomicU64::new(0),
            progress: watch::Sender::new(()),
            probe: Mutex::default(),
            texts: Mutex::default(),
        })
    }

    fn text(&self, text: &str) -> Arc<str> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        match texts.get(text) {
            Some(known) => known.clone(),
            None => {
                let known: Arc<str> = text.into();
                texts.insert(known.clone());
                known
            }
        }
    }

    /// Waits until `done`; fails after `limit`.
    pub(crate) async fn until(&self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
        let mut progress = self.progress.subscribe();
        let wait = async {
            while !done() {
                // The sender is in self.
                progress.changed().await.unwrap_or_default();
            }
        };
        tokio::time::timeout(limit, wait)
            .await
            .with_context(|| format!("gave up waiting after {limit:?}: {what}"))
    }

    /// A channel with a connection of its own.
    pub(crate) async fn channel(&self) -> Result<Channel> {
        let config = self.tls.client(&ClientTlsOptions {
            expected: ExpectedServer::ServerName,
            alpn: vec![b"h2".to_vec()],
            present_certificate: false,
            min_tls13: false,
        })?;
        let address = self.address;
        let connector = tower::service_fn(move |_: http::Uri| {
            let config = config.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
                let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Channel::from_static("http://istiod.istio-system.svc:15012");
        Ok(endpoint.connect_with_connector(connector).await?)
    }
}

/// What one sidecar has got so far; read by the measurements.
#[derive(Default)]
pub(crate) struct Seen {
    /// Whether it holds everything that it asked for.
    pub(crate) synced: AtomicBool,
    /// Bytes of responses.
    pub(crate) bytes: AtomicU64,
    /// Newest turn of the policies in the inbound listener that it has accepted.
    pub(crate) policy: AtomicUsize,
    /// Names and versions by type, kept over reconnects.
    held: Mutex<HashMap<ResourceType, Held>>,
}

type Held = HashMap<Arc<str>, Arc<str>>;

impl Seen {
    /// The version that it holds.
    pub(crate) fn version(&self, kind: ResourceType, name: &str) -> Option<Arc<str>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(&kind)?.get(name).cloned()
    }
}

/// One stream.
struct Stream {
    fleet: Arc<Fleet>,
    seen: Arc<Seen>,
    probe: bool,
    /// Names that were asked for, by type.
    names: HashMap<ResourceType, BTreeSet<Arc<str>>>,
    /// Types that were answered on this stream.
    answered: HashSet<ResourceType>,
}

/// What a sidecar subscribes to: all of it by name and on demand, the first four otherwise.
const KINDS: [ResourceType; 6] = [
    ResourceType::Cluster,
    ResourceType::Endpoints,
    ResourceType::Listener,
    ResourceType::Routes,
    ResourceType::VirtualHosts,
    ResourceType::Destinations,
];

/// Runs one stream until it fails or is dropped.
pub(crate) async fn run(fleet: Arc<Fleet>, identity: Identity, seen: Arc<Seen>, probe: bool) -> Result<()> {
    seen.synced.store(false, Ordering::SeqCst);
    let channel = fleet.channel().await?;
    let ads = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let stream = Stream {
        seen,
        probe,
        names: HashMap::new(),
        answered: HashSet::new(),
        fleet: fleet.clone(),
    };
    match fleet.mode {
        Mode::Sotw => stream.sotw(ads, &identity).await,
        Mode::Delta | Mode::OnDemand => stream.delta(ads, &identity).await,
    }
}

impl Stream {
    async fn delta(mut self, mut ads: AggregatedDiscoveryServiceClient<Channel>, identity: &Identity) -> Result<()> {
        let (tx, rx) = mpsc::unbounded_channel();
        let opening = self.opening(identity);
        let mut first = Some(node(identity, self.fleet.mode));
        for kind in KINDS {
            let names = opening.get(&kind);
            let wild = match self.fleet.mode {
                Mode::OnDemand => kind == ResourceType::Destinations,
                Mode::Delta | Mode::Sotw => matches!(kind, ResourceType::Cluster | ResourceType::Listener),
            };
            if names.is_none() && !wild {
                continue;
            }
            let held = self.seen.held.lock().unwrap_or_else(PoisonError::into_inner);
            let versions = held.get(&kind).into_iter().flatten();
            let request = DeltaDiscoveryRequest {
                node: first.take(),
                type_url: kind.url().into(),
                resource_names_subscribe: names.into_iter().flatten().map(|n| n.to_string()).collect(),
                initial_resource_versions: versions.map(|(n, v)| (n.to_string(), v.to_string())).collect(),
                ..DeltaDiscoveryRequest::default()
            };
            drop(held);
            tx.send(request)?;
        }
        for (kind, names) in opening {
            self.names.insert(kind, names);
        }
        let request = with_token(UnboundedReceiverStream::new(rx), identity)?;
        let mut responses = ads.delta_aggregated_resources(request).await?.into_inner();
        while let Some(response) = responses.message().await? {
            let size = response.encoded_len();
            let Some(kind) = ResourceType::from_url(&response.type_url) else {
                continue;
            };
            let DeltaDiscoveryResponse {
                resources,
                removed_resources,
                nonce,
                type_url,
                ..
            } = response;
            let named = resources.iter().map(|r| (&*r.name, &*r.version));
            let mut new = self.hold(kind, named, &removed_resources);
            let inbound = resources.iter().find(|r| r.name == INBOUND);
            let inbound = inbound
                .and_then(|r| r.resource.as_ref())
                .map(|any| objects::turn_in(&any.value));
            tx.send(DeltaDiscoveryRequest {
                type_url,
                response_nonce: nonce,
                ..DeltaDiscoveryRequest::default()
            })?;
            if kind == ResourceType::Endpoints && self.probe {
                let values = resources.iter().filter_map(|r| r.resource.as_ref());
                values.for_each(|any| self.report(&any.value));
            }
            if let Some(next) = next_kind(kind)
                && self.fleet.mode == Mode::Delta
            {
                let names = self.names.entry(next).or_default();
                new.retain(|name| !names.contains(name));
                if !new.is_empty() {
                    tx.send(DeltaDiscoveryRequest {
                        type_url: next.url().into(),
                        resource_names_subscribe: new.iter().map(|n| n.to_string()).collect(),
                        ..DeltaDiscoveryRequest::default()
                    })?;
                    names.extend(new);
                }
            }
            self.took(kind, size, inbound);
        }
        Ok(())
    }

    /// Remembers what came (names and versions) and what is gone; the names that it refers to.
    fn hold<'a>(
        &self,
        kind: ResourceType,
        named: impl Iterator<Item = (&'a str, &'a str)>,
        removed: &[String],
    ) -> BTreeSet<Arc<str>> {
        let mut refers: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut held = self.seen.held.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.entry(kind).or_default();
        for (name, version) in named {
            refers.extend(refers_to(kind, name).map(|n| self.fleet.text(n)));
            held.insert(self.fleet.text(name), self.fleet.text(version));
        }
        for name in removed {
            held.remove(&**name);
        }
        refers
    }

    async fn sotw(mut self, mut ads: AggregatedDiscoveryServiceClient<Channel>, identity: &Identity) -> Result<()> {
        let (tx, rx) = mpsc::unbounded_channel();
        for (at, kind) in [ResourceType::Cluster, ResourceType::Listener].into_iter().enumerate() {
            tx.send(DiscoveryRequest {
                node: (at == 0).then(|| node(identity, self.fleet.mode)),
                type_url: kind.url().into(),
                ..DiscoveryRequest::default()
            })?;
        }
        let request = with_token(UnboundedReceiverStream::new(rx), identity)?;
        let mut responses = ads.stream_aggregated_resources(request).await?.into_inner();
        let mut last: HashMap<ResourceType, (String, String)> = HashMap::new();
        while let Some(response) = responses.message().await? {
            let size = response.encoded_len();
            let Some(kind) = ResourceType::from_url(&response.type_url) else {
                continue;
            };
            let DiscoveryResponse {
                resources,
                nonce,
                version_info,
                type_url,
                ..
            } = response;
            let names: Result<Vec<Named>, _> = resources.iter().map(|any| Named::decode(&*any.value)).collect();
            let names = names?;
            let named = names.iter().map(|named| (&*named.name, &*version_info));
            let new = self.hold(kind, named, &[]);
            let inbound = names.iter().position(|named| named.name == INBOUND);
            let inbound = inbound.map(|at| objects::turn_in(&resources[at].value));
            let names =
                |names: Option<&BTreeSet<Arc<str>>>| names.into_iter().flatten().map(|n| n.to_string()).collect();
            tx.send(DiscoveryRequest {
                type_url,
                response_nonce: nonce.clone(),
                version_info: version_info.clone(),
                resource_names: names(self.names.get(&kind)),
                ..DiscoveryRequest::default()
            })?;
            last.insert(kind, (version_info, nonce));
            if kind == ResourceType::Endpoints && self.probe {
                resources.iter().for_each(|any| self.report(&any.value));
            }
            if let Some(next) = next_kind(kind)
                && self.names.get(&next) != Some(&new)
            {
                let (version_info, response_nonce) = last.get(&next).cloned().unwrap_or_default();
                tx.send(DiscoveryRequest {
                    type_url: next.url().into(),
                    version_info,
                    response_nonce,
                    resource_names: names(Some(&new)),
                    ..DiscoveryRequest::default()
                })?;
                self.names.insert(next, new);
            }
            self.took(kind, size, inbound);
        }
        Ok(())
    }

    /// Names in the first requests: what is held from before, or what an on-demand proxy wants.
    fn opening(&self, identity: &Identity) -> HashMap<ResourceType, BTreeSet<Arc<str>>> {
        let mut out: HashMap<ResourceType, BTreeSet<Arc<str>>> = HashMap::new();
        if self.fleet.mode == Mode::OnDemand {
            let clusters: BTreeSet<Arc<str>> = identity
                .calls
                .iter()
                .map(|host| self.fleet.text(&format!("outbound|80||{host}")))
                .collect();
            let listeners = [INBOUND, "virtualOutbound", "0.0.0.0_80"].map(|n| self.fleet.text(n));
            let hosts = identity.calls.iter().map(|host| self.fleet.text(&format!("80/{host}")));
            out.insert(ResourceType::VirtualHosts, hosts.collect());
            out.insert(ResourceType::Routes, [self.fleet.text("80")].into());
            out.insert(ResourceType::Endpoints, clusters.clone());
            out.insert(ResourceType::Cluster, clusters);
            out.insert(ResourceType::Listener, listeners.into());
            return out;
        }
        let held = self.seen.held.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in [ResourceType::Endpoints, ResourceType::Routes] {
            if let Some(held) = held.get(&kind) {
                out.insert(kind, held.keys().cloned().collect());
            }
        }
        out
    }

    /// Accounts for a response that was answered; `inbound`: the turn of the policies in the inbound listener, if it came.
    fn took(&mut self, kind: ResourceType, size: usize, inbound: Option<usize>) {
        self.answered.insert(kind);
        self.seen.bytes.fetch_add(size as u64, Ordering::Relaxed);
        self.fleet.responses.fetch_add(1, Ordering::SeqCst);
        if let Some(turn) = inbound {
            self.seen.policy.store(turn, Ordering::SeqCst);
        }
        let held = self.seen.held.lock().unwrap_or_else(PoisonError::into_inner);
        let complete = |kind: &ResourceType| {
            self.names
                .get(kind)
                .is_none_or(|names| names.iter().all(|n| held.get(kind).is_some_and(|h| h.contains_key(n))))
        };
        let wanted = match self.fleet.mode {
            Mode::OnDemand => &KINDS[..],
            Mode::Delta | Mode::Sotw => &KINDS[..4],
        };
        if !self.seen.synced.load(Ordering::SeqCst)
            && wanted.iter().all(|k| self.answered.contains(k))
            && wanted.iter().all(complete)
        {
            self.seen.synced.store(true, Ordering::SeqCst);
        }
        drop(held);
        self.fleet.progress.send_replace(());
    }

    /// Tells the addresses of an assignment that the churn has put in.
    fn report(&self, value: &[u8]) {
        let probe = self.fleet.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(probe) = &*probe else { return };
        let Ok(assignment) = ClusterLoadAssignment::decode(value) else {
            return;
        };
        use envoy_types::pb::envoy::config::core::v3::address::Address;
        use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
        for endpoint in assignment.endpoints.iter().flat_map(|l| &l.lb_endpoints) {
            if let Some(HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier
                && let Some(Address::SocketAddress(address)) =
                    endpoint.address.as_ref().and_then(|a| a.address.as_ref())
                && address.address.starts_with(super::churn::PREFIX)
            {
                // Nobody listens any more once the measurement is over.
                let _ = probe.send((assignment.cluster_name.clone(), address.address.clone(), Instant::now()));
            }
        }
    }
}

/// The name of a cluster, listener, route table or assignment: all have it in the same field.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// What a resource of this name refers to: clusters of services have endpoints, wildcard listeners a table of their port.
fn refers_to(kind: ResourceType, name: &str) -> Option<&str> {
    match kind {
        ResourceType::Cluster => name.starts_with("outbound|").then_some(name),
        ResourceType::Listener => name.strip_prefix("0.0.0.0_"),
        _ => None,
    }
}

fn next_kind(kind: ResourceType) -> Option<ResourceType> {
    match kind {
        ResourceType::Cluster => Some(ResourceType::Endpoints),
        ResourceType::Listener => Some(ResourceType::Routes),
        _ => None,
    }
}

fn with_token<T>(message: T, identity: &Identity) -> Result<Request<T>> {
    let mut request = Request::new(message);
    let bearer = format!("Bearer {}", identity.token).parse()?;
    request.metadata_mut().insert("authorization", bearer);
    Ok(request)
}

fn node(identity: &Identity, mode: Mode) -> Node {
    static LABELS: OnceLock<Struct> = OnceLock::new();
    let text = |t: &str| Value {
        kind: Some(Kind::StringValue(t.to_string())),
    };
    let labels = LABELS.get_or_init(Struct::default).clone();
    let mut fields = vec![
        ("NAMESPACE", text(&identity.namespace)),
        ("SERVICE_ACCOUNT", text(objects::ACCOUNT)),
        ("CLUSTER_ID", text("Kubernetes")),
        ("ISTIO_VERSION", text("1.28.0")),
        (
            "LABELS",
            Value {
                kind: Some(Kind::StructValue(labels)),
            },
        ),
    ];
    if mode != Mode::Sotw {
        fields.push(("MANTLET", text("true")));
    }
    if mode == Mode::OnDemand {
        fields.push(("MANTLET_ON_DEMAND", text("true")));
    }
    let (ip, pod, ns) = (&identity.ip, &identity.pod, &identity.namespace);
    Node {
        id: format!("sidecar~{ip}~{pod}.{ns}~{ns}.svc.cluster.local"),
        metadata: Some(Struct {
            fields: fields.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
        }),
        ..Node::default()
    }
}
