//! The compiled configuration: an immutable value made from a [`ProxySnapshot`], swapped in whole.
//!
//! `agent` compiles a push here and NACKs it when this fails; workers hold an `Arc` of the result. What a request needs
//! is found by pointer or one hash lookup. Knows no socket and no secret.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use mantlet_model::authz::{Action, Engine};
use mantlet_model::cluster::{Cluster, Discovery};
use mantlet_model::endpoint::Endpoint;
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::http::{HttpManager, RouteSource};
use mantlet_model::listener::{ConnectionFacts, FilterChain, Filters, Listener, TcpManager};
use mantlet_model::route::{CompiledRoutes, RouteAction, RouteTable};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_xds::ResourceType;

use crate::http::jwt::{KeySets, Plan};
use crate::on_demand::{Demand, Usage, Wanted};

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompileError {
    /// Two filter chains of one listener have the same name.
    #[error("listener {listener}: filter chain name {chain:?} is used twice")]
    DuplicateChain {
        /// Listener name.
        listener: String,
        /// Chain name.
        chain: String,
    },
    /// Two listeners open the same socket.
    #[error("listeners {0:?} and {1:?} bind the same address")]
    SameAddress(String, String),
    /// A forwarding route without a cluster or without weight.
    #[error("route table {table}: route {route:?} forwards to no cluster with a weight above 0")]
    NoCluster {
        /// Table name.
        table: String,
        /// Route name.
        route: String,
    },
    /// An address that is none.
    #[error("cluster {cluster}: endpoint address {address:?} is no IP address")]
    BadEndpoint {
        /// Cluster name.
        cluster: String,
        /// What was there.
        address: String,
    },
}

/// Addresses of host names.
pub type Resolved = BTreeMap<String, BTreeSet<IpAddr>>;

/// Everything the data path needs.
#[derive(Default)]
pub struct Config {
    /// Counts the swaps; 0 is the empty configuration before the first push.
    pub version: u64,
    /// What it was made from, for `/config_dump`.
    pub snapshot: Arc<ProxySnapshot>,
    /// Listeners by name.
    pub listeners: HashMap<String, Arc<CompiledListener>>,
    /// Listeners without a socket of their own, by the address they stand for.
    by_address: HashMap<SocketAddr, Arc<CompiledListener>>,
    /// Route tables by name.
    pub routes: HashMap<String, Arc<Routes>>,
    /// Clusters by name.
    pub clusters: HashMap<String, Arc<CompiledCluster>>,
    /// What it knows of destinations that it does not hold; `None`: it holds everything that there is.
    pub demand: Option<Demand>,
}

/// A listener.
pub struct CompiledListener {
    /// The value.
    pub model: Arc<Listener>,
    /// Compiled chains, in the order of `Listener::all_chains`.
    chains: Vec<Arc<Chain>>,
    /// Who uses it, if it was asked for by name.
    pub usage: Option<Arc<Usage>>,
}

/// A filter chain.
pub struct Chain {
    /// The value.
    pub model: FilterChain,
    /// Compiled authorization.
    pub engine: Engine,
    /// Whether there is any authorization filter at all.
    pub has_authz: bool,
    /// Whether there is an AUDIT filter.
    pub audits: bool,
    /// CUSTOM stages, each with its compiled rules: "denied" says that the stage applies.
    pub custom: Vec<(Engine, CustomStage)>,
    /// Token authentication of an HTTP chain.
    pub jwt: Option<Plan>,
    /// Inline routes of an HTTP chain.
    inline: Option<Arc<Routes>>,
}

/// A route table.
pub struct Routes {
    compiled: CompiledRoutes,
    /// Who uses its virtual hosts, by position; those that were not asked for by name are not counted.
    usage: Vec<Arc<Usage>>,
}

impl Routes {
    /// Who uses the virtual host at this position, if it was asked for by name.
    pub fn usage(&self, index: usize) -> Option<&Arc<Usage>> {
        self.usage.get(index)
    }
}

impl std::ops::Deref for Routes {
    type Target = CompiledRoutes;

    fn deref(&self) -> &CompiledRoutes {
        &self.compiled
    }
}

/// A cluster with its endpoints.
pub struct CompiledCluster {
    /// The value.
    pub model: Arc<Cluster>,
    /// Endpoints with their addresses.
    pub endpoints: Vec<(SocketAddr, Endpoint)>,
}

impl Config {
    /// Compiles a snapshot; `resolved` holds the addresses of host names in DNS clusters.
    ///
    /// # Errors
    /// The first thing that cannot run; nothing of the snapshot is used then.
    pub fn compile(snapshot: Arc<ProxySnapshot>, version: u64, resolved: &Resolved) -> Result<Config, CompileError> {
        Config::compile_for(snapshot, version, resolved, None)
    }

    /// The same; `wanted` is what was asked for by name, if not all was asked for.
    ///
    /// # Errors
    /// As [`Config::compile`].
    pub fn compile_for(
        snapshot: Arc<ProxySnapshot>,
        version: u64,
        resolved: &Resolved,
        wanted: Option<&Wanted>,
    ) -> Result<Config, CompileError> {
        let usage = |kind, name: &str| wanted.and_then(|wanted| wanted.usage(kind, name));
        let mut config = Config {
            version,
            ..Config::default()
        };
        for (name, table) in &snapshot.routes {
            let hosts = snapshot.hosts_of(name).filter(|_| table.on_demand);
            let usage = hosts.map(|(host, _)| usage(ResourceType::VirtualHosts, host).unwrap_or_default());
            let usage = usage.collect();
            config
                .routes
                .insert(name.clone(), routes(snapshot.filled(table), usage)?);
        }
        let mut sockets: HashMap<SocketAddr, &str> = HashMap::new();
        let mut keys = KeySets::new();
        for (name, listener) in &snapshot.listeners {
            let mut compiled = CompiledListener::compile(listener.clone(), &mut keys)?;
            compiled.usage = usage(ResourceType::Listener, name);
            let compiled = Arc::new(compiled);
            if listener.bind_to_port {
                if let Some(other) = sockets.insert(listener.address, name) {
                    return Err(CompileError::SameAddress(other.to_string(), name.clone()));
                }
            } else {
                config.by_address.insert(listener.address, compiled.clone());
            }
            config.listeners.insert(name.clone(), compiled);
        }
        for (name, cluster) in &snapshot.clusters {
            let compiled = CompiledCluster::compile(cluster.clone(), &snapshot, resolved)?;
            config.clusters.insert(name.clone(), Arc::new(compiled));
        }
        config.demand = wanted.map(|wanted| wanted.demand(snapshot.destinations.values()));
        config.snapshot = snapshot;
        Ok(config)
    }

    /// Whether an address has a listener of its own.
    pub fn has_listener(&self, destination: SocketAddr) -> bool {
        self.by_address.contains_key(&destination)
    }

    /// The listener that takes over a captured connection: its exact address first, then the wildcard of its port.
    pub fn listener_for(&self, destination: SocketAddr) -> Option<&Arc<CompiledListener>> {
        let port = destination.port();
        let wildcard: IpAddr = match destination.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        self.by_address
            .get(&destination)
            .or_else(|| self.by_address.get(&SocketAddr::new(wildcard, port)))
            // One wildcard listener serves both families.
            .or_else(|| {
                self.by_address
                    .get(&SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
            })
    }

    /// The routes of an HTTP chain; `None` while a named table has not arrived.
    pub fn routes_of<'a>(&'a self, chain: &'a Chain) -> Option<&'a Arc<Routes>> {
        match &chain.model.filters {
            Filters::Http(http) => match &http.routes {
                RouteSource::Inline(_) => chain.inline.as_ref(),
                RouteSource::Named(name) => self.routes.get(name),
            },
            Filters::Tcp(_) => None,
        }
    }
}

impl CompiledListener {
    fn compile(model: Arc<Listener>, keys: &mut KeySets) -> Result<Self, CompileError> {
        let mut chains: Vec<Arc<Chain>> = Vec::new();
        for chain in model.all_chains() {
            if chains.iter().any(|c| c.model.name == chain.name) {
                return Err(CompileError::DuplicateChain {
                    listener: model.name.clone(),
                    chain: chain.name.clone(),
                });
            }
            chains.push(Arc::new(Chain::compile(chain.clone(), keys)?));
        }
        Ok(CompiledListener {
            model,
            chains,
            usage: None,
        })
    }

    /// The chain for a connection.
    pub fn choose(&self, facts: &ConnectionFacts<'_>) -> Option<&Arc<Chain>> {
        let chosen = self.model.choose(facts)?;
        let index = self.model.all_chains().position(|c| std::ptr::eq(c, chosen))?;
        self.chains.get(index)
    }
}

impl Chain {
    fn compile(model: FilterChain, keys: &mut KeySets) -> Result<Self, CompileError> {
        let (custom, filters, inline) = match &model.filters {
            Filters::Http(http) => {
                let inline = match &http.routes {
                    RouteSource::Inline(table) => Some(routes(Arc::new((**table).clone()), Vec::new())?),
                    RouteSource::Named(_) => None,
                };
                (&http.custom, &http.authz, inline)
            }
            Filters::Tcp(tcp) => (&tcp.custom, &tcp.authz, None),
        };
        let jwt = match &model.filters {
            Filters::Http(http) => http.jwt.as_ref().and_then(|jwt| Plan::compile(jwt, keys)),
            Filters::Tcp(_) => None,
        };
        Ok(Chain {
            jwt,
            engine: Engine::new(filters),
            has_authz: !filters.is_empty(),
            audits: filters.iter().any(|f| f.action == Action::Log),
            custom: custom
                .iter()
                .map(|stage| (Engine::new(&[stage.selector()]), stage.clone()))
                .collect(),
            inline,
            model,
        })
    }

    /// The connection manager of an HTTP chain.
    pub fn http(&self) -> Option<&HttpManager> {
        match &self.model.filters {
            Filters::Http(http) => Some(http),
            Filters::Tcp(_) => None,
        }
    }

    /// The proxy of a TCP chain.
    pub fn tcp(&self) -> Option<&TcpManager> {
        match &self.model.filters {
            Filters::Tcp(tcp) => Some(tcp),
            Filters::Http(_) => None,
        }
    }
}

fn routes(model: Arc<RouteTable>, usage: Vec<Arc<Usage>>) -> Result<Arc<Routes>, CompileError> {
    for route in model.hosts.iter().flat_map(|h| &h.routes) {
        if let RouteAction::Forward(forward) = &route.action
            && forward.clusters.iter().map(|(_, w)| u64::from(*w)).sum::<u64>() == 0
        {
            return Err(CompileError::NoCluster {
                table: model.name.clone(),
                route: route.name.clone(),
            });
        }
    }
    Ok(Arc::new(Routes {
        compiled: CompiledRoutes::new(model),
        usage,
    }))
}

impl CompiledCluster {
    fn compile(model: Arc<Cluster>, snapshot: &ProxySnapshot, resolved: &Resolved) -> Result<Self, CompileError> {
        let mut endpoints = Vec::new();
        let given: &[Endpoint] = match &model.discovery {
            Discovery::Eds { service } => snapshot.endpoints.get(service).map_or(&[], |e| &e.endpoints),
            Discovery::Static(list) | Discovery::Dns(list) => list,
            Discovery::OriginalDestination { .. } => &[],
        };
        for endpoint in given {
            match endpoint.address.parse::<IpAddr>() {
                Ok(ip) => endpoints.push((SocketAddr::new(ip, endpoint.port), endpoint.clone())),
                Err(_) if matches!(model.discovery, Discovery::Dns(_)) => {
                    let found = resolved.get(&endpoint.address).into_iter().flatten();
                    endpoints.extend(found.map(|ip| (SocketAddr::new(*ip, endpoint.port), endpoint.clone())));
                }
                Err(_) => {
                    return Err(CompileError::BadEndpoint {
                        cluster: model.name.clone(),
                        address: endpoint.address.clone(),
                    });
                }
            }
        }
        Ok(CompiledCluster { model, endpoints })
    }
}
