//! Resource types, and the encoded resources of one proxy with their versions.
//!
//! Versions are hashes of the content, so they survive a restart of the control plane and are equal between
//! replicas: a proxy that reconnects with `initial_resource_versions` gets only what changed.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use mantlet_model::cluster::Discovery;
use mantlet_model::route::{HostIndex, VirtualHost, VirtualHostName};
use mantlet_model::{
    Cluster, Derived, Destinations, Endpoints, Listener, ProxySnapshot, RouteTable, Secret, SharedMap, SharedSnapshot,
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::Any;
use crate::encode::{self, Options};

/// The xDS types that Mantlet speaks, in the order in which they are sent (make before break).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// Clusters.
    Cluster,
    /// Endpoints.
    Endpoints,
    /// Listeners.
    Listener,
    /// Route tables.
    Routes,
    /// Virtual hosts, each asked for by the table and authority that a proxy met
    /// ([`VirtualHostName`]).
    VirtualHosts,
    /// Secrets.
    Secret,
    /// What is served in the mesh; Mantlet's own type.
    Destinations,
}

impl ResourceType {
    /// All types, in sending order.
    pub const ALL: [ResourceType; 7] = [
        ResourceType::Cluster,
        ResourceType::Endpoints,
        ResourceType::Listener,
        ResourceType::Routes,
        ResourceType::VirtualHosts,
        ResourceType::Secret,
        ResourceType::Destinations,
    ];

    /// The type URL on the wire.
    pub fn url(self) -> &'static str {
        match self {
            ResourceType::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            ResourceType::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            ResourceType::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            ResourceType::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            ResourceType::VirtualHosts => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
            ResourceType::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            ResourceType::Destinations => "type.googleapis.com/mantlet.v1.Destinations",
        }
    }

    /// The type of a URL; `None` for types that Mantlet does not speak.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.url() == url)
    }

    /// The short name: Istio's `CDS`, `EDS`, `LDS`, `RDS`, `SDS`, Envoy's `VHDS`, or `DESTINATIONS`.
    pub fn short(self) -> &'static str {
        match self {
            ResourceType::Cluster => "CDS",
            ResourceType::Endpoints => "EDS",
            ResourceType::Listener => "LDS",
            ResourceType::Routes => "RDS",
            ResourceType::VirtualHosts => "VHDS",
            ResourceType::Secret => "SDS",
            ResourceType::Destinations => "DESTINATIONS",
        }
    }

    /// Whether a first subscription without names asks for everything.
    pub fn is_wildcard(self) -> bool {
        matches!(
            self,
            ResourceType::Cluster | ResourceType::Listener | ResourceType::Destinations
        )
    }
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

/// What an encoded resource was made from; equal sources are not encoded again.
#[derive(Clone, Debug)]
enum Source {
    Cluster(Arc<Cluster>),
    Endpoints(Arc<Endpoints>),
    Listener(Arc<Listener>),
    Routes(Arc<RouteTable>),
    /// A table of which proxies get the bare one, and virtual hosts by name.
    Bare(Arc<RouteTable>),
    VirtualHost(VirtualHost),
    Secret(Arc<Secret>),
    Destinations(Arc<Destinations>),
    /// Nothing: a peer holds it, from an earlier stream.
    Held,
}

impl Source {
    /// A table for proxies that ask for virtual hosts by name.
    fn asked_by_name(table: Arc<RouteTable>) -> Source {
        if table.is_of_port() {
            Source::Bare(table)
        } else {
            Source::Routes(table)
        }
    }

    /// Whether both are one value.
    fn is_pointer(&self, other: &Source) -> bool {
        match (self, other) {
            (Source::Cluster(a), Source::Cluster(b)) => Arc::ptr_eq(a, b),
            (Source::Endpoints(a), Source::Endpoints(b)) => Arc::ptr_eq(a, b),
            (Source::Listener(a), Source::Listener(b)) => Arc::ptr_eq(a, b),
            (Source::Routes(a), Source::Routes(b)) => Arc::ptr_eq(a, b),
            (Source::Bare(a), Source::Bare(b)) => Arc::ptr_eq(a, b),
            (Source::Secret(a), Source::Secret(b)) => Arc::ptr_eq(a, b),
            (Source::Destinations(a), Source::Destinations(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Where the value is. Two values that are there at the same time have different addresses.
    fn address(&self) -> usize {
        match self {
            Source::Cluster(a) => Arc::as_ptr(a).addr(),
            Source::Endpoints(a) => Arc::as_ptr(a).addr(),
            Source::Listener(a) => Arc::as_ptr(a).addr(),
            Source::Routes(a) | Source::Bare(a) => Arc::as_ptr(a).addr(),
            Source::Secret(a) => Arc::as_ptr(a).addr(),
            Source::Destinations(a) => Arc::as_ptr(a).addr(),
            Source::VirtualHost(_) | Source::Held => 0,
        }
    }
}

impl PartialEq for Source {
    fn eq(&self, other: &Source) -> bool {
        self.is_pointer(other)
            || match (self, other) {
                (Source::Cluster(a), Source::Cluster(b)) => a == b,
                (Source::Endpoints(a), Source::Endpoints(b)) => a == b,
                (Source::Listener(a), Source::Listener(b)) => a == b,
                (Source::Routes(a), Source::Routes(b)) => a == b,
                (Source::Bare(a), Source::Bare(b)) => a == b,
                (Source::Secret(a), Source::Secret(b)) => a == b,
                (Source::Destinations(a), Source::Destinations(b)) => a == b,
                _ => false,
            }
    }
}

/// One resource as it goes over the wire. Encoding and hashing happen when somebody asks, once for all who share it: what no
/// proxy subscribes to is never encoded.
pub struct Encoded {
    source: Source,
    options: Options,
    version: OnceLock<String>,
    bytes: OnceLock<Box<[u8]>>,
    /// Where the virtual hosts of a bare table are.
    index: OnceLock<Box<HostIndex>>,
}

impl Encoded {
    fn new(source: Source, options: &Options) -> Encoded {
        Encoded {
            source,
            options: *options,
            version: OnceLock::new(),
            bytes: OnceLock::new(),
            index: OnceLock::new(),
        }
    }

    /// What a peer says that it holds: a version, and nothing that could be sent.
    pub(crate) fn held(version: String) -> Encoded {
        Encoded {
            source: Source::Held,
            options: Options::default(),
            version: OnceLock::from(version),
            bytes: OnceLock::from(Box::default()),
            index: OnceLock::new(),
        }
    }

    /// Hash of the content.
    pub fn version(&self) -> &str {
        self.version.get_or_init(|| version(&self.source, &self.options))
    }

    /// Whether the two have the same content. Values are compared where both have one: that is far less work than hashing them.
    pub fn is_same(&self, other: &Encoded) -> bool {
        if std::ptr::eq(self, other) {
            return true;
        }
        match (&self.source, &other.source) {
            (Source::Held | Source::VirtualHost(_), _) | (_, Source::Held | Source::VirtualHost(_)) => {
                self.version() == other.version()
            }
            (own, others) => self.options == other.options && own == others,
        }
    }

    /// Bytes of the resource.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get_or_init(|| {
            let options = &self.options;
            let any = match &self.source {
                Source::Cluster(c) => encode::cluster(c, options),
                Source::Endpoints(e) => encode::endpoints(e, options),
                Source::Listener(l) => encode::listener(l, options),
                Source::Routes(r) => encode::route_table(r, options),
                Source::Bare(r) => encode::route_table(&r.bare(), options),
                Source::VirtualHost(h) => encode::virtual_host(h),
                Source::Secret(s) => encode::secret(s),
                Source::Destinations(d) => encode::destinations(d),
                Source::Held => Any::default(),
            };
            any.value.into_boxed_slice()
        })
    }

    /// The resource as a message of this type.
    pub fn any(&self, kind: ResourceType) -> Any {
        Any {
            type_url: kind.url().into(),
            value: self.bytes().to_vec(),
        }
    }

    /// The virtual host of an authority, if this is a table of which they are given by name.
    fn virtual_host(&self, authority: &str) -> Option<Encoded> {
        let Source::Bare(table) = &self.source else { return None };
        let index = self.index.get_or_init(|| Box::new(HostIndex::new(table)));
        let found = index.find(table, authority)?;
        // Under the one name that was asked for: so no two that a proxy holds can have a domain in common.
        let host = VirtualHost {
            domains: vec![authority.to_string()],
            ..found.clone()
        };
        Some(Encoded::new(Source::VirtualHost(host), &self.options))
    }

    /// The endpoints resource that this cluster waits for.
    pub(crate) fn eds_service(&self) -> Option<&str> {
        match &self.source {
            Source::Cluster(cluster) => match &cluster.discovery {
                Discovery::Eds { service } => Some(service),
                _ => None,
            },
            _ => None,
        }
    }
}

impl fmt::Debug for Encoded {
    /// Without the bytes: a secret's hold a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Encoded({})", self.version())
    }
}

/// Finds the resources that were made of values before, for whichever proxy, so that all who see one value share one
/// encoding, and all who see one map share one map of encodings. It keeps no value alive,
/// only the place of what is gone until it is cleared away.
#[derive(Debug, Default)]
pub struct Encoder {
    made: Made,
    maps: HashMap<Options, Maps>,
}

/// Maps of encodings by what they were made of.
#[derive(Debug, Default)]
struct Maps {
    clusters: Derived<Cluster, Encoded>,
    endpoints: Derived<Endpoints, Encoded>,
    listeners: Derived<Listener, Encoded>,
    routes: Derived<RouteTable, Encoded>,
    destinations: Derived<Destinations, Encoded>,
}

/// Encodings by what they were made of.
#[derive(Debug, Default)]
struct Made {
    made: HashMap<(usize, Options), Weak<Encoded>>,
    /// Size at which what is gone is cleared away.
    limit: usize,
}

impl Made {
    /// Entries below which nothing is cleared away.
    const SLACK: usize = 64;

    fn encoded(&mut self, source: Source, options: &Options) -> Arc<Encoded> {
        let key = (source.address(), *options);
        if let Some(made) = self.made.get(&key).and_then(Weak::upgrade)
            // An address is free for another value once its own is gone.
            && made.source.is_pointer(&source)
        {
            return made;
        }
        if self.made.len() >= self.limit {
            self.made.retain(|_, made| made.strong_count() > 0);
            self.limit = self.made.len() * 2 + Made::SLACK;
        }
        let made = Arc::new(Encoded::new(source, options));
        self.made.insert(key, Arc::downgrade(&made));
        made
    }
}

/// Encoded resources of one proxy, by type and name. Copies share what they have in common.
#[derive(Clone, Debug, Default)]
pub struct ResourceSet {
    types: [SharedMap<Encoded>; ResourceType::ALL.len()],
    /// What it was made of.
    snapshot: SharedSnapshot,
    /// Number of the state of the world that it is of, if its maker counts them.
    revision: u64,
}

impl ResourceSet {
    /// Encodes a snapshot and the secrets that go with it. Resources equal to those of `previous` are taken over
    /// without encoding them again; `previous` must have been made with the same dialect.
    pub fn new(
        snapshot: &ProxySnapshot,
        secrets: impl IntoIterator<Item = Arc<Secret>>,
        options: &Options,
        previous: Option<&ResourceSet>,
    ) -> ResourceSet {
        let empty = ResourceSet::default();
        let previous = previous.unwrap_or(&empty);
        previous.next(&snapshot.into(), secrets, options, &mut Encoder::default())
    }

    /// The set of the next snapshot: only what differs is looked at. `self` must have been made with the same dialect.
    #[must_use]
    pub fn next(
        &self,
        snapshot: &SharedSnapshot,
        secrets: impl IntoIterator<Item = Arc<Secret>>,
        options: &Options,
        encoder: &mut Encoder,
    ) -> ResourceSet {
        let mut set = self.clone();
        let former = &self.snapshot;
        let Encoder { made, maps } = encoder;
        let maps = maps.entry(*options).or_default();
        let mut make = |former: &SharedMap<Encoded>, name: &str, source: Source| match former.get(name) {
            Some(known) if known.source == source => known.clone(),
            _ => made.encoded(source, options),
        };
        let table: fn(Arc<RouteTable>) -> Source = if options.on_demand {
            Source::asked_by_name
        } else {
            Source::Routes
        };
        let [clusters, endpoints, listeners, routes, _, given, destinations] = &mut set.types;
        if !former.clusters.is_same(&snapshot.clusters) {
            let known = clusters.clone();
            *clusters = maps.clusters.of(&snapshot.clusters, |name, value| {
                make(&known, name, Source::Cluster(value.clone()))
            });
        }
        if !former.endpoints.is_same(&snapshot.endpoints) {
            let known = endpoints.clone();
            *endpoints = maps.endpoints.of(&snapshot.endpoints, |name, value| {
                make(&known, name, Source::Endpoints(value.clone()))
            });
        }
        if !former.listeners.is_same(&snapshot.listeners) {
            let known = listeners.clone();
            *listeners = maps.listeners.of(&snapshot.listeners, |name, value| {
                make(&known, name, Source::Listener(value.clone()))
            });
        }
        if !former.routes.is_same(&snapshot.routes) {
            let known = routes.clone();
            *routes = maps
                .routes
                .of(&snapshot.routes, |name, value| make(&known, name, table(value.clone())));
        }
        if !former.destinations.is_same(&snapshot.destinations) {
            let known = destinations.clone();
            *destinations = maps.destinations.of(&snapshot.destinations, |name, value| {
                make(&known, name, Source::Destinations(value.clone()))
            });
        }
        let known = std::mem::take(given);
        for secret in secrets {
            let encoded = make(&known, &secret.name, Source::Secret(secret.clone()));
            given.insert(secret.name.as_str(), encoded);
        }
        set.snapshot = snapshot.clone();
        set
    }

    /// The same as of this state of the world.
    #[must_use]
    pub fn of_revision(mut self, revision: u64) -> ResourceSet {
        self.revision = revision;
        self
    }

    /// The state of the world that it is of; 0 if nobody counts.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The virtual host of this [name](VirtualHostName); `None` if nothing but the fallback of its table serves it.
    pub fn virtual_host(&self, name: &str) -> Option<Arc<Encoded>> {
        let name = VirtualHostName::parse(name)?;
        let table = self.get(ResourceType::Routes, name.table)?;
        table.virtual_host(name.authority).map(Arc::new)
    }

    /// What the set was made of.
    pub fn snapshot(&self) -> &SharedSnapshot {
        &self.snapshot
    }

    /// One resource.
    pub fn get(&self, kind: ResourceType, name: &str) -> Option<&Arc<Encoded>> {
        self.map(kind).get(name)
    }

    /// All resources of a type, by name.
    pub fn map(&self, kind: ResourceType) -> &SharedMap<Encoded> {
        &self.types[kind as usize]
    }

    /// All resources of a type, by name.
    pub fn all(&self, kind: ResourceType) -> impl Iterator<Item = (&str, &Arc<Encoded>)> {
        self.map(kind).iter().map(|(n, e)| (&**n, e))
    }

    /// Number of resources of a type.
    pub fn len(&self, kind: ResourceType) -> usize {
        self.map(kind).len()
    }

    /// Whether there is no resource of any type.
    pub fn is_empty(&self) -> bool {
        self.types.iter().all(SharedMap::is_empty)
    }

    /// Puts a ready-made resource in; used by tests of the state machines.
    #[cfg(test)]
    pub(crate) fn put_raw(&mut self, kind: ResourceType, name: &str, version: &str) {
        let encoded = Encoded {
            source: Source::Endpoints(Arc::new(Endpoints {
                cluster: version.to_string(),
                ..Endpoints::default()
            })),
            options: Options::default(),
            version: OnceLock::from(version.to_string()),
            bytes: OnceLock::from(version.as_bytes().to_vec().into_boxed_slice()),
            index: OnceLock::new(),
        };
        self.types[kind as usize].insert(name, Arc::new(encoded));
    }
}

/// Hash of the content. It is taken over the model, not over the encoding: protobuf maps have no fixed order.
fn version(source: &Source, options: &Options) -> String {
    let mut hash = Sha256::new();
    hash.update([options.dialect as u8]);
    match source {
        Source::Cluster(c) => update(&mut hash, c.as_ref()),
        Source::Endpoints(e) => update(&mut hash, e.as_ref()),
        Source::Listener(l) => update(&mut hash, l.as_ref()),
        Source::Routes(r) => update(&mut hash, r.as_ref()),
        Source::Bare(r) => update(&mut hash, &r.bare()),
        Source::VirtualHost(h) => update(&mut hash, h),
        Source::Destinations(d) => update(&mut hash, d.as_ref()),
        Source::Secret(s) => hash.update(&encode::secret(s).value),
        Source::Held => {}
    }
    hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect()
}

fn update(hash: &mut Sha256, value: &impl Serialize) {
    struct Writer<'h>(&'h mut Sha256);
    impl std::io::Write for Writer<'_> {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.update(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    // Model values hold no map with non-string keys and no failing serializer, so this cannot fail.
    serde_json::to_writer(Writer(hash), value).unwrap_or_default();
}
