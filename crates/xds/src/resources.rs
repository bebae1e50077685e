//! Resource types, and the encoded resources of one proxy with their versions.
//!
//! Versions are hashes of the content, so they survive a restart of the control plane and are equal between
//! replicas: a proxy that reconnects with `initial_resource_versions` gets only what changed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use mantlet_model::cluster::Discovery;
use mantlet_model::{Cluster, Endpoints, Listener, ProxySnapshot, RouteTable, Secret};
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
    /// Secrets.
    Secret,
}

impl ResourceType {
    /// All types, in sending order: CDS, EDS, LDS, RDS, SDS.
    pub const ALL: [ResourceType; 5] = [
        ResourceType::Cluster,
        ResourceType::Endpoints,
        ResourceType::Listener,
        ResourceType::Routes,
        ResourceType::Secret,
    ];

    /// The type URL on the wire.
    pub fn url(self) -> &'static str {
        match self {
            ResourceType::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            ResourceType::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            ResourceType::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            ResourceType::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            ResourceType::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The type of a URL; `None` for types that Mantlet does not speak.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.url() == url)
    }

    /// Istio's short name: `CDS`, `EDS`, `LDS`, `RDS`, `SDS`.
    pub fn short(self) -> &'static str {
        match self {
            ResourceType::Cluster => "CDS",
            ResourceType::Endpoints => "EDS",
            ResourceType::Listener => "LDS",
            ResourceType::Routes => "RDS",
            ResourceType::Secret => "SDS",
        }
    }

    /// Whether a first subscription without names asks for everything.
    pub fn is_wildcard(self) -> bool {
        matches!(self, ResourceType::Cluster | ResourceType::Listener)
    }
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

/// What an encoded resource was made from; equal sources are not encoded again.
#[derive(Clone, Debug, PartialEq)]
enum Source {
    Cluster(Arc<Cluster>),
    Endpoints(Arc<Endpoints>),
    Listener(Arc<Listener>),
    Routes(Arc<RouteTable>),
    Secret(Arc<Secret>),
}

impl Source {
    fn is_same(&self, other: &Source) -> bool {
        let same_pointer = match (self, other) {
            (Source::Cluster(a), Source::Cluster(b)) => Arc::ptr_eq(a, b),
            (Source::Endpoints(a), Source::Endpoints(b)) => Arc::ptr_eq(a, b),
            (Source::Listener(a), Source::Listener(b)) => Arc::ptr_eq(a, b),
            (Source::Routes(a), Source::Routes(b)) => Arc::ptr_eq(a, b),
            (Source::Secret(a), Source::Secret(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same_pointer || self == other
    }
}

/// One encoded resource.
#[derive(Clone)]
pub struct Encoded {
    /// Hash of the content.
    pub version: String,
    /// The resource.
    pub any: Any,
    source: Source,
}

impl Encoded {
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
        write!(f, "Encoded({}, {} bytes)", self.version, self.any.value.len())
    }
}

/// Encoded resources of one proxy, by type and name.
#[derive(Clone, Debug, Default)]
pub struct ResourceSet {
    types: BTreeMap<ResourceType, BTreeMap<String, Arc<Encoded>>>,
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
        let mut set = ResourceSet::default();
        for (name, cluster) in &snapshot.clusters {
            set.put(
                ResourceType::Cluster,
                name,
                Source::Cluster(cluster.clone()),
                options,
                previous,
            );
        }
        for (name, endpoints) in &snapshot.endpoints {
            let source = Source::Endpoints(endpoints.clone());
            set.put(ResourceType::Endpoints, name, source, options, previous);
        }
        for (name, listener) in &snapshot.listeners {
            let source = Source::Listener(listener.clone());
            set.put(ResourceType::Listener, name, source, options, previous);
        }
        for (name, routes) in &snapshot.routes {
            set.put(
                ResourceType::Routes,
                name,
                Source::Routes(routes.clone()),
                options,
                previous,
            );
        }
        for secret in secrets {
            let name = secret.name.clone();
            set.put(ResourceType::Secret, &name, Source::Secret(secret), options, previous);
        }
        set
    }

    fn put(
        &mut self,
        kind: ResourceType,
        name: &str,
        source: Source,
        options: &Options,
        previous: Option<&ResourceSet>,
    ) {
        let known = previous.and_then(|p| p.get(kind, name));
        let encoded = match known {
            Some(known) if known.source.is_same(&source) => known.clone(),
            _ => Arc::new(Encoded {
                version: version(&source, options),
                any: match &source {
                    Source::Cluster(c) => encode::cluster(c, options),
                    Source::Endpoints(e) => encode::endpoints(e, options),
                    Source::Listener(l) => encode::listener(l, options),
                    Source::Routes(r) => encode::route_table(r, options),
                    Source::Secret(s) => encode::secret(s),
                },
                source,
            }),
        };
        self.types.entry(kind).or_default().insert(name.to_string(), encoded);
    }

    /// One resource.
    pub fn get(&self, kind: ResourceType, name: &str) -> Option<&Arc<Encoded>> {
        self.types.get(&kind)?.get(name)
    }

    /// All resources of a type, by name.
    pub fn all(&self, kind: ResourceType) -> impl Iterator<Item = (&str, &Arc<Encoded>)> {
        self.types
            .get(&kind)
            .into_iter()
            .flatten()
            .map(|(n, e)| (n.as_str(), e))
    }

    /// Number of resources of a type.
    pub fn len(&self, kind: ResourceType) -> usize {
        self.types.get(&kind).map_or(0, BTreeMap::len)
    }

    /// Whether there is no resource of any type.
    pub fn is_empty(&self) -> bool {
        self.types.values().all(BTreeMap::is_empty)
    }

    /// Puts a ready-made resource in; used by tests of the state machines.
    #[cfg(test)]
    pub(crate) fn put_raw(&mut self, kind: ResourceType, name: &str, version: &str) {
        let encoded = Encoded {
            version: version.into(),
            any: Any {
                type_url: kind.url().into(),
                value: version.as_bytes().to_vec(),
            },
            source: Source::Endpoints(Arc::default()),
        };
        self.types
            .entry(kind)
            .or_default()
            .insert(name.into(), Arc::new(encoded));
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
        Source::Secret(s) => hash.update(&encode::secret(s).value),
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
