//! LoadBalancer Services: an address 127.x.y.z of their own on the host, spliced to a ready pod.
//!
//! The cluster lives in its own network namespace, so the sockets that the host must reach are opened by somebody on the
//! host's side ([`HostSockets`], the broker) and only accepted on here. The address is written to the Service's status
//! once all of its ports are bound. A port that the cluster's user may not open gets a stand-in ([`host_ports`]), which is
//! in the Service's annotation before the address is in its status. NodePorts of such Services and of type NodePort listen
//! on the host's 127.0.0.1.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::host_ports::{self, HostPorts};
use super::plan::{self, Protocol};
use crate::controllers::endpoints::SERVICE_NAME;
use crate::controllers::informer::Key;
use crate::controllers::queue::{self, Queue};
use crate::controllers::{self, Informers, pods::Events};

/// Connections from the host at the same time, over all Services.
const MAX_CONNECTIONS: usize = 4096;
/// How many addresses are tried before giving up for now.
const CANDIDATES: u32 = 32;
/// How long a pod may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A future as trait objects return it.
pub type Answer<'a> = Pin<Box<dyn Future<Output = std::io::Result<std::net::TcpListener>> + Send + 'a>>;

/// Opens sockets in the host's network namespace.
pub trait HostSockets: Send + Sync {
    /// A listening TCP socket on the host.
    fn listen(&self, address: SocketAddrV4) -> Answer<'_>;
}

/// What is open for one Service.
#[derive(Default)]
struct Open {
    address: Option<Ipv4Addr>,
    /// Stand-ins for ports of the address.
    stand_ins: HostPorts,
    /// Host address → the task that accepts.
    listeners: HashMap<SocketAddrV4, CancellationToken>,
}

struct Balancer {
    client: Client,
    informers: Arc<Informers>,
    sockets: Arc<dyn HostSockets>,
    seed: String,
    open: Mutex<HashMap<Key, Open>>,
    permits: Arc<Semaphore>,
    events: Events,
    stop: CancellationToken,
}

/// Serves LoadBalancers and NodePorts to the host until `stop` is cancelled. `seed` (the cluster's name) spreads the
/// addresses of different clusters over 127.0.0.0/8.
pub async fn run(
    client: Client,
    informers: Arc<Informers>,
    sockets: Arc<dyn HostSockets>,
    seed: String,
    stop: CancellationToken,
) {
    let queue = Queue::new();
    informers.services.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            if let Some(service) = new.or(old) {
                queue.add(Key::of(service.as_ref()));
            }
        }
    }));
    let balancer = Arc::new(Balancer {
        events: Events::new(client.clone()),
        client,
        informers,
        sockets,
        seed,
        open: Mutex::new(HashMap::new()),
        permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        stop: stop.clone(),
    });
    queue::run("loadbalancer", queue, 2, stop, move |key| {
        let balancer = balancer.clone();
        async move { balancer.reconcile(&key).await }
    })
    .await;
}

/// The address that a Service tries in round `attempt`: 127.64.0.0 to 127.127.255.255, never 127.0.0.1.
fn candidate(seed: &str, key: &Key, attempt: u32) -> Ipv4Addr {
    let hash = controllers::pods::fnv1a(format!("{seed}/{key}/{attempt}").as_bytes());
    let [_, b, c, d] = hash.to_be_bytes();
    Ipv4Addr::new(127, 64 | (b & 63), c, d.clamp(1, 254))
}

/// Host port and the service port that stands behind it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    host: u16,
    name: String,
}

fn ports(
    service: &Service,
    host_port: impl Fn(&k8s_openapi::api::core::v1::ServicePort) -> Option<i32>,
) -> BTreeSet<Port> {
    let listed = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    listed
        .filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")))
        .filter_map(|port| {
            Some(Port {
                host: u16::try_from(host_port(port)?).ok().filter(|port| *port > 0)?,
                name: port.name.clone().unwrap_or_default(),
            })
        })
        .collect()
}

impl Balancer {
    async fn reconcile(self: &Arc<Self>, key: &Key) -> Result<Option<Duration>, controllers::Error> {
        let service = self.informers.services.get(key);
        let service = service.filter(|service| service.metadata.deletion_timestamp.is_none());
        let kind = service
            .as_ref()
            .and_then(|service| service.spec.as_ref()?.type_.clone())
            .unwrap_or_default();
        let Some(service) = service.filter(|_| matches!(kind.as_str(), "LoadBalancer" | "NodePort")) else {
            if let Some(open) = self.lock().remove(key) {
                for token in open.listeners.into_values() {
                    token.cancel();
                }
            }
            return Ok(None);
        };
        self.node_ports(key, &service).await;
        if kind == "NodePort" {
            self.close_others(key, |open| open.ip() == &Ipv4Addr::LOCALHOST);
            return Ok(None);
        }
        self.load_balancer(key, &service).await
    }

    async fn node_ports(self: &Arc<Self>, key: &Key, service: &Service) {
        let wanted = ports(service, |port| port.node_port);
        let addresses: Vec<_> = wanted
            .iter()
            .map(|port| (SocketAddrV4::new(Ipv4Addr::LOCALHOST, port.host), port.name.clone()))
            .collect();
        self.close_others(key, |address| {
            address.ip() != &Ipv4Addr::LOCALHOST || addresses.iter().any(|(a, _)| a == address)
        });
        for (address, name) in addresses {
            if self.is_open(key, address) {
                continue;
            }
            match self.sockets.listen(address).await {
                Ok(listener) => self.accept(key, address, name, listener),
                // Another cluster or program of the host has it; the port still works inside the cluster.
                Err(error) => {
                    let message = format!(
                        "node port {} cannot be opened on the host's {address}: {error}",
                        address.port()
                    );
                    self.events.warning(service, "NodePortUnavailable", &message);
                }
            }
        }
    }

    async fn load_balancer(
        self: &Arc<Self>,
        key: &Key,
        service: &Service,
    ) -> Result<Option<Duration>, controllers::Error> {
        let wanted = ports(service, |port| Some(port.port));
        if wanted.is_empty() {
            return Ok(None);
        }
        let published = service
            .status
            .iter()
            .filter_map(|status| {
                status
                    .load_balancer
                    .as_ref()?
                    .ingress
                    .as_ref()?
                    .first()?
                    .ip
                    .as_deref()?
                    .parse()
                    .ok()
            })
            .next();
        let asked = service
            .spec
            .as_ref()
            .and_then(|spec| spec.load_balancer_ip.as_deref()?.parse::<Ipv4Addr>().ok())
            .filter(Ipv4Addr::is_loopback);
        let held = self.lock().get(key).and_then(|open| open.address);
        let first = asked.or(held).or(published);
        let before = host_ports::of(service);
        let candidates = first
            .into_iter()
            .chain((0..CANDIDATES).map(|attempt| candidate(&self.seed, key, attempt)));
        let mut last_error = None;
        for address in candidates {
            match self.bind_all(key, address, &wanted, &before).await {
                Ok(stand_ins) => {
                    self.publish(key, service, address, &stand_ins).await?;
                    return Ok(None);
                }
                Err(error) => {
                    let taken = error.kind() == std::io::ErrorKind::AddrInUse;
                    last_error = Some((address, error));
                    if !taken || asked.is_some() {
                        break;
                    }
                }
            }
        }
        let Some((address, error)) = last_error else {
            return Ok(None);
        };
        let message = format!("cannot listen on the host's {address}: {error}");
        self.events.warning(service, "SyncLoadBalancerFailed", &message);
        Ok(Some(Duration::from_secs(30)))
    }

    /// Opens every port, or its stand-in, on one address, or none; the answer are the stand-ins.
    async fn bind_all(
        self: &Arc<Self>,
        key: &Key,
        address: Ipv4Addr,
        wanted: &BTreeSet<Port>,
        before: &HostPorts,
    ) -> std::io::Result<HostPorts> {
        let held = match self.lock().get(key) {
            Some(open) if open.address == Some(address) => open.stand_ins.clone(),
            _ => HostPorts::new(),
        };
        let mut stand_ins = HostPorts::new();
        let mut fresh = Vec::new();
        for port in wanted {
            // A listener on this port may be another's stand-in.
            let own = !held.values().any(|host| *host == port.host);
            if own && self.is_open(key, SocketAddrV4::new(address, port.host)) {
                continue;
            }
            if let Some(host) = held.get(&port.host)
                && self.is_open(key, SocketAddrV4::new(address, *host))
            {
                stand_ins.insert(port.host, *host);
                continue;
            }
            let (host, listener) = self.open(address, port.host, wanted, before).await?;
            if host != port.host {
                stand_ins.insert(port.host, host);
            }
            fresh.push((SocketAddrV4::new(address, host), port.name.clone(), listener));
        }
        self.close_others(key, |open| {
            let serves = |port: &Port| *stand_ins.get(&port.host).unwrap_or(&port.host) == open.port();
            open.ip() == &Ipv4Addr::LOCALHOST || (open.ip() == &address && wanted.iter().any(serves))
        });
        for (socket, name, listener) in fresh {
            self.accept(key, socket, name, listener);
        }
        let mut all = self.lock();
        let open = all.entry(key.clone()).or_default();
        open.address = Some(address);
        open.stand_ins = stand_ins.clone();
        Ok(stand_ins)
    }

    /// The port itself, or the first stand-in that is free where the port is not for this user.
    async fn open(
        &self,
        address: Ipv4Addr,
        port: u16,
        wanted: &BTreeSet<Port>,
        before: &HostPorts,
    ) -> std::io::Result<(u16, std::net::TcpListener)> {
        let mut result = self.sockets.listen(SocketAddrV4::new(address, port)).await;
        if !matches!(&result, Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied) {
            return result.map(|listener| (port, listener));
        }
        for host in host_ports::stand_ins(port, before.get(&port).copied()) {
            if wanted.iter().any(|other| other.host == host) {
                continue;
            }
            result = self.sockets.listen(SocketAddrV4::new(address, host)).await;
            if !matches!(&result, Err(error) if error.kind() == std::io::ErrorKind::AddrInUse) {
                return result.map(|listener| (host, listener));
            }
        }
        result.map(|listener| (port, listener))
    }

    async fn publish(
        &self,
        key: &Key,
        service: &Service,
        address: Ipv4Addr,
        stand_ins: &HostPorts,
    ) -> Result<(), controllers::Error> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        if host_ports::of(service) != *stand_ins {
            // Null takes an annotation away.
            let text = (!stand_ins.is_empty()).then(|| host_ports::text(stand_ins));
            let patch = json!({"metadata": {"annotations": {(host_ports::ANNOTATION): text}}});
            let written = api
                .patch(&key.name, &PatchParams::default(), &Patch::Merge(&patch))
                .await;
            if let Some(service) = controllers::ignore_not_found(written)? {
                self.informers.services.observe(&service);
            }
            for (port, host) in stand_ins {
                let message = format!(
                    "port {port} is reserved for root on the host: it is at {address}:{host} there (mantlet cluster ports)"
                );
                self.events.normal(service, "HostPortMapped", &message);
            }
        }
        let known = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let known = known.and_then(|known| known.ingress.as_deref()).unwrap_or_default();
        if known.len() == 1 && known[0].ip.as_deref() == Some(&address.to_string()) {
            return Ok(());
        }
        let patch = json!({"status": {"loadBalancer": {"ingress": [{"ip": address.to_string(), "ipMode": "Proxy"}]}}});
        let written = api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Some(service) = controllers::ignore_not_found(written)? {
            self.informers.services.observe(&service);
        }
        self.events.normal(
            service,
            "EnsuredLoadBalancer",
            &format!("listening on the host's {address}"),
        );
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Open>> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn is_open(&self, key: &Key, address: SocketAddrV4) -> bool {
        self.lock()
            .get(key)
            .is_some_and(|open| open.listeners.contains_key(&address))
    }

    fn close_others(&self, key: &Key, keep: impl Fn(&SocketAddrV4) -> bool) {
        if let Some(open) = self.lock().get_mut(key) {
            open.listeners.retain(|address, token| {
                let keep = keep(address);
                if !keep {
                    token.cancel();
                }
                keep
            });
        }
    }

    fn accept(self: &Arc<Self>, key: &Key, address: SocketAddrV4, name: String, listener: std::net::TcpListener) {
        let listener = match listener
            .set_nonblocking(true)
            .and_then(|()| TcpListener::from_std(listener))
        {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%address, %error, "a host listener cannot be used");
                return;
            }
        };
        let token = self.stop.child_token();
        self.lock()
            .entry(key.clone())
            .or_default()
            .listeners
            .insert(address, token.clone());
        tokio::spawn(self.clone().serve(key.clone(), name, listener, token));
    }

    async fn serve(self: Arc<Self>, key: Key, name: String, listener: TcpListener, stop: CancellationToken) {
        loop {
            // No more accepts while too many connections are open: the rest waits in the kernel's queue.
            let permit = tokio::select! {
                () = stop.cancelled() => return,
                permit = self.permits.clone().acquire_owned() => permit,
            };
            let Ok(permit) = permit else { return };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let mut client = match accepted {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::warn!(service = %key, %error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let balancer = self.clone();
            let (key, name) = (key.clone(), name.clone());
            tokio::spawn(async move {
                let _permit = permit;
                let Some(mut pod) = balancer.connect(&key, &name).await else {
                    // Without a backend the client sees what it would see at a ClusterIP: a reset.
                    let _ = mantlet_net::sockopt::reset_on_close(&client);
                    return;
                };
                let _ = client.set_nodelay(true);
                let _ = pod.set_nodelay(true);
                if copy_bidirectional(&mut client, &mut pod).await.is_err() {
                    let _ = mantlet_net::sockopt::reset_on_close(&client);
                    let _ = mantlet_net::sockopt::reset_on_close(&pod);
                }
            });
        }
    }

    /// A connection to a ready pod; if one refuses (it may just be leaving), the next.
    async fn connect(&self, key: &Key, name: &str) -> Option<TcpStream> {
        let slices = self.informers.slices.select(&key.namespace, |slice| {
            slice.labels().get(SERVICE_NAME) == Some(&key.name)
        });
        let backends = plan::backends(&slices.iter().collect::<Vec<_>>(), name, Protocol::Tcp);
        let mut backends: Vec<_> = backends.into_iter().collect();
        let start = rand::random_range(0..backends.len().max(1));
        backends.rotate_left(start);
        for (address, port) in backends {
            match tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect((address, port))).await {
                Ok(Ok(stream)) => return Some(stream),
                Ok(Err(error)) => tracing::debug!(service = %key, %address, %error, "a pod refused a connection"),
                Err(_) => tracing::debug!(service = %key, %address, "a pod did not accept in time"),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_loopback_stable_and_spread() {
        let key = Key::new("istio-system", "istio-ingressgateway");
        let first = candidate("mantlet", &key, 0);
        assert_eq!(first, candidate("mantlet", &key, 0));
        assert_ne!(first, candidate("mantlet", &key, 1));
        assert_ne!(first, candidate("other", &key, 0));
        for attempt in 0..1000 {
            let address = candidate("mantlet", &key, attempt);
            assert!(
                address.is_loopback() && (64..128).contains(&address.octets()[1]),
                "{address}"
            );
        }
    }
}
