//! Where requests and bytes go: clusters, their endpoints, the connections to them. One instance per worker, nothing
//! shared, nothing locked.
//!
//! `http` and `tcp` ask for an endpoint and a connection. A new configuration keeps every endpoint that it still
//! contains, with its connections; what left the configuration gets no new request and dies with its last one.

pub mod answer;
pub mod balance;
pub mod connect;
pub mod http1;
pub mod multiplex;
pub mod pool;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use mantlet_model::cluster::{Cluster, ClusterTls, Discovery};
use mantlet_model::endpoint::{Health, WorkloadRef};
use mantlet_model::tls::ClientTls;

use crate::config::{CompiledCluster, Config};

/// Most original-destination endpoints that are remembered per cluster and worker.
const MAX_DYNAMIC: usize = 4096;

/// All clusters of one worker.
#[derive(Default)]
pub struct Upstreams {
    clusters: RefCell<HashMap<String, Rc<ClusterState>>>,
}

thread_local! {
    static NEXT_ID: Cell<u64> = const { Cell::new(1) };
}

/// A number that no other cluster or endpoint of this worker has had.
fn new_id() -> u64 {
    NEXT_ID.with(|next| next.replace(next.get() + 1))
}

/// A cluster with this worker's view of it.
pub struct ClusterState {
    /// Unique in its worker, for metrics.
    pub id: u64,
    /// The value.
    pub model: Arc<Cluster>,
    endpoints: RefCell<Vec<Rc<Endpoint>>>,
    dynamic: RefCell<HashMap<SocketAddr, Rc<Endpoint>>>,
    /// Position of the round robin.
    next: Cell<usize>,
    /// Requests under way, for the limit.
    pub active: Cell<u32>,
    /// Retries under way, for the limit.
    pub retries: Cell<u32>,
}

/// An endpoint with this worker's connections to it.
pub struct Endpoint {
    /// Unique in its worker, for metrics.
    pub id: u64,
    /// Identity in the certificate that it last presented.
    pub principal: RefCell<Option<Rc<str>>>,
    /// Where to connect.
    pub address: SocketAddr,
    /// TLS towards it.
    pub tls: Option<Box<ClientTls>>,
    /// The workload behind it.
    pub workload: Option<Arc<WorkloadRef>>,
    /// Whether its proxy is Mantlet's own, so that HTTP/1.1 requests may share HTTP/2 connections.
    pub mantlet: Cell<bool>,
    /// Weight, at least 1.
    pub weight: Cell<u32>,
    /// Whether it may get new requests.
    pub healthy: Cell<bool>,
    /// Requests under way.
    pub active: Cell<u32>,
    /// Ejection by outlier detection.
    pub outlier: balance::OutlierState,
    /// Idle and shared connections.
    pub pool: pool::Pool,
}

impl Endpoint {
    fn new(address: SocketAddr, tls: Option<Box<ClientTls>>, workload: Option<Arc<WorkloadRef>>) -> Self {
        Endpoint {
            id: new_id(),
            principal: RefCell::default(),
            address,
            tls,
            workload,
            mantlet: Cell::new(false),
            weight: Cell::new(1),
            healthy: Cell::new(true),
            active: Cell::new(0),
            outlier: balance::OutlierState::default(),
            pool: pool::Pool::default(),
        }
    }
}

impl Endpoint {
    /// Remembers who a new connection reached.
    pub fn note_principal(&self, stream: &crate::stream::Stream) {
        if self.tls.is_some() {
            let uri = stream.server_uri();
            if self.principal.borrow().as_deref() != uri.as_deref() {
                *self.principal.borrow_mut() = uri.map(Rc::from);
            }
        }
    }
}

/// Counts a request of a cluster and of an endpoint while it lives.
pub struct ActiveGuard {
    cluster: Rc<ClusterState>,
    endpoint: Rc<Endpoint>,
}

impl ActiveGuard {
    /// Begins a request.
    pub fn new(cluster: Rc<ClusterState>, endpoint: Rc<Endpoint>) -> Self {
        cluster.active.set(cluster.active.get() + 1);
        endpoint.active.set(endpoint.active.get() + 1);
        ActiveGuard { cluster, endpoint }
    }
}

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        self.cluster.active.set(self.cluster.active.get().saturating_sub(1));
        self.endpoint.active.set(self.endpoint.active.get().saturating_sub(1));
    }
}

impl Upstreams {
    /// Takes a new configuration over.
    pub fn sync(&self, config: &Config) {
        let mut old = self.clusters.take();
        let mut new = HashMap::with_capacity(config.clusters.len());
        for (name, compiled) in &config.clusters {
            new.insert(name.clone(), Rc::new(ClusterState::next(compiled, old.remove(name))));
        }
        self.clusters.replace(new);
    }

    /// A cluster by name.
    pub fn cluster(&self, name: &str) -> Option<Rc<ClusterState>> {
        self.clusters.borrow().get(name).cloned()
    }

    /// All clusters, for the reaper and the admin pages.
    pub fn all(&self) -> Vec<(String, Rc<ClusterState>)> {
        self.clusters
            .borrow()
            .iter()
            .map(|(n, c)| (n.clone(), c.clone()))
            .collect()
    }
}

impl ClusterState {
    fn next(compiled: &CompiledCluster, old: Option<Rc<ClusterState>>) -> Self {
        let model = compiled.model.clone();
        // Connections were made under the old TLS settings and expected names; they are kept only when those still hold.
        let old = old.filter(|o| o.model.tls == model.tls && o.model.bind_source == model.bind_source);
        let mut known: HashMap<(SocketAddr, bool), Rc<Endpoint>> = old
            .iter()
            .flat_map(|o| o.endpoints.take())
            .map(|e| ((e.address, e.tls.is_some()), e))
            .collect();
        let endpoints = compiled
            .endpoints
            .iter()
            .map(|(address, endpoint)| {
                let tls = match &model.tls {
                    ClusterTls::Plain => None,
                    ClusterTls::Always(tls) => Some(tls.clone()),
                    ClusterTls::Auto(tls) => endpoint.mtls.then(|| tls.clone()),
                };
                let state = known
                    .remove(&(*address, tls.is_some()))
                    .filter(|e| e.workload == endpoint.workload)
                    .unwrap_or_else(|| Rc::new(Endpoint::new(*address, tls, endpoint.workload.clone())));
                state.mantlet.set(endpoint.mantlet);
                state.weight.set(endpoint.weight.max(1));
                state.healthy.set(endpoint.health == Health::Healthy);
                state
            })
            .collect();
        // Requests may still hold these; none may choose them anew.
        for gone in known.into_values() {
            gone.healthy.set(false);
            gone.pool.close();
        }
        let same = old.as_ref().filter(|o| o.model == model);
        ClusterState {
            id: new_id(),
            endpoints: RefCell::new(endpoints),
            dynamic: old.as_ref().map(|o| o.dynamic.take()).unwrap_or_default().into(),
            next: Cell::new(old.as_ref().map_or(0, |o| o.next.get())),
            active: Cell::new(0),
            retries: Cell::new(0),
            model: same.map_or(model, |o| o.model.clone()),
        }
    }

    /// This cluster's endpoints.
    pub fn endpoints(&self) -> Vec<Rc<Endpoint>> {
        let fixed = self.endpoints.borrow();
        let dynamic = self.dynamic.borrow();
        fixed.iter().chain(dynamic.values()).cloned().collect()
    }

    /// Chooses an endpoint; `original` is the connection's original destination, `avoid` the endpoint that just failed.
    pub fn choose(&self, original: SocketAddr, avoid: Option<&Rc<Endpoint>>) -> Option<Rc<Endpoint>> {
        if let Discovery::OriginalDestination { port } = &self.model.discovery {
            let address = SocketAddr::new(original.ip(), port.unwrap_or(original.port()));
            return Some(self.dynamic_endpoint(address));
        }
        balance::choose(&self.endpoints.borrow(), self.model.balancer, &self.next, avoid)
    }

    fn dynamic_endpoint(&self, address: SocketAddr) -> Rc<Endpoint> {
        let mut dynamic = self.dynamic.borrow_mut();
        if let Some(found) = dynamic.get(&address) {
            return found.clone();
        }
        if dynamic.len() >= MAX_DYNAMIC {
            dynamic.retain(|_, e| e.active.get() > 0);
        }
        let tls = match &self.model.tls {
            ClusterTls::Plain | ClusterTls::Auto(_) => None,
            ClusterTls::Always(tls) => Some(tls.clone()),
        };
        let made = Rc::new(Endpoint::new(address, tls, None));
        dynamic.insert(address, made.clone());
        made
    }
}
