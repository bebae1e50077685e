//! The world that translation reads: an indexed value, cheap to clone, changed object by object.
//!
//! `control` keeps one `World`, applies what its watches tell and hands clones to translation; parts that did not change
//! are shared between clones. Every change says what it can influence ([`Effect`]), so that only affected proxies are
//! looked at. No clock, no I/O, and no object is kept in full: only what translation reads.

pub mod journal;
pub mod keys;
mod legacy;
pub mod object;
pub mod service;
pub mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mantlet_api::{
    AuthorizationPolicy, DestinationRule, Gateway, PeerAuthentication, RequestAuthentication, ServiceEntry, Sidecar,
    VirtualService, WorkloadSelector,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::mesh::Mesh;
use journal::Touch;
use service::Service;
use workload::Workload;

/// The Istio kinds that translation reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `security.istio.io`.
    PeerAuthentication,
    /// `security.istio.io`.
    AuthorizationPolicy,
    /// `security.istio.io`.
    RequestAuthentication,
    /// `networking.istio.io`.
    DestinationRule,
    /// `networking.istio.io`.
    VirtualService,
    /// `networking.istio.io`.
    Gateway,
    /// `networking.istio.io`.
    ServiceEntry,
    /// `networking.istio.io`.
    Sidecar,
    /// `authentication.istio.io`, a former kind.
    MeshPolicy,
    /// `authentication.istio.io`, a former kind.
    Policy,
    /// `rbac.istio.io`, a former kind.
    ServiceRole,
    /// `rbac.istio.io`, a former kind.
    ServiceRoleBinding,
    /// `rbac.istio.io`, a former kind.
    ClusterRbacConfig,
    /// `rbac.istio.io`, a former kind.
    RbacConfig,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 14] = [
        Kind::PeerAuthentication,
        Kind::AuthorizationPolicy,
        Kind::RequestAuthentication,
        Kind::DestinationRule,
        Kind::VirtualService,
        Kind::Gateway,
        Kind::ServiceEntry,
        Kind::Sidecar,
        Kind::MeshPolicy,
        Kind::Policy,
        Kind::ServiceRole,
        Kind::ServiceRoleBinding,
        Kind::ClusterRbacConfig,
        Kind::RbacConfig,
    ];

    /// The `kind` field of its objects.
    pub fn name(self) -> &'static str {
        match self {
            Kind::PeerAuthentication => "PeerAuthentication",
            Kind::AuthorizationPolicy => "AuthorizationPolicy",
            Kind::RequestAuthentication => "RequestAuthentication",
            Kind::DestinationRule => "DestinationRule",
            Kind::VirtualService => "VirtualService",
            Kind::Gateway => "Gateway",
            Kind::ServiceEntry => "ServiceEntry",
            Kind::Sidecar => "Sidecar",
            Kind::MeshPolicy => "MeshPolicy",
            Kind::Policy => "Policy",
            Kind::ServiceRole => "ServiceRole",
            Kind::ServiceRoleBinding => "ServiceRoleBinding",
            Kind::ClusterRbacConfig => "ClusterRbacConfig",
            Kind::RbacConfig => "RbacConfig",
        }
    }

    /// API group, preferred version and resource name of its objects.
    pub fn resource(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Kind::PeerAuthentication => ("security.istio.io", "v1", "peerauthentications"),
            Kind::AuthorizationPolicy => ("security.istio.io", "v1", "authorizationpolicies"),
            Kind::RequestAuthentication => ("security.istio.io", "v1", "requestauthentications"),
            Kind::DestinationRule => ("networking.istio.io", "v1", "destinationrules"),
            Kind::VirtualService => ("networking.istio.io", "v1", "virtualservices"),
            Kind::Gateway => ("networking.istio.io", "v1", "gateways"),
            Kind::ServiceEntry => ("networking.istio.io", "v1", "serviceentries"),
            Kind::Sidecar => ("networking.istio.io", "v1", "sidecars"),
            Kind::MeshPolicy => ("authentication.istio.io", "v1alpha1", "meshpolicies"),
            Kind::Policy => ("authentication.istio.io", "v1alpha1", "policies"),
            Kind::ServiceRole => ("rbac.istio.io", "v1alpha1", "serviceroles"),
            Kind::ServiceRoleBinding => ("rbac.istio.io", "v1alpha1", "servicerolebindings"),
            Kind::ClusterRbacConfig => ("rbac.istio.io", "v1alpha1", "clusterrbacconfigs"),
            Kind::RbacConfig => ("rbac.istio.io", "v1alpha1", "rbacconfigs"),
        }
    }

    /// The kind of this name.
    pub fn by_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| k.name() == name)
    }
}

/// Metadata of an object, as far as translation reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectMeta {
    /// Creation, Unix seconds. First, so that the derived order is "oldest first, then name, then namespace" (G1).
    pub created: i64,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Annotations of the `istio.io` family.
    pub annotations: BTreeMap<String, String>,
    /// The former object that it was converted from; `None` for what users have written.
    pub origin: Option<crate::legacy::Origin>,
}

impl ObjectMeta {
    fn read(object: &Value) -> ObjectMeta {
        let meta = &object["metadata"];
        let text = |key: &str| meta[key].as_str().unwrap_or_default().to_string();
        let created = meta["creationTimestamp"]
            .as_str()
            .and_then(|t| time::OffsetDateTime::parse(t, &time::format_description::well_known::Rfc3339).ok())
            .map_or(0, |t| t.unix_timestamp());
        let annotations = meta["annotations"]
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(k, _)| k.contains("istio.io/"))
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string())))
            .collect();
        ObjectMeta {
            created,
            name: text("name"),
            namespace: text("namespace"),
            annotations,
            origin: None,
        }
    }
}

/// A configuration object.
#[derive(Clone, Debug, PartialEq)]
pub struct Config<T> {
    /// Metadata.
    pub meta: ObjectMeta,
    /// Specification; the kind's default (with the selector, if that could be read) when `broken`.
    pub spec: T,
    /// Why the specification could not be read. Policies fail closed on it.
    pub broken: Option<String>,
}

/// What a change can influence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Outbound configuration (services, endpoints, traffic rules, mesh) of any proxy.
    pub outbound: bool,
    /// Inbound configuration of the proxies in these namespaces.
    pub inbound: Scope,
    /// Inbound configuration of these pods' proxies: namespace and name.
    pub pods: BTreeSet<(String, String)>,
}

/// Namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// None.
    #[default]
    None,
    /// Some.
    Namespaces(BTreeSet<String>),
    /// All.
    All,
}

impl Scope {
    /// Whether a namespace is in scope.
    pub fn contains(&self, namespace: &str) -> bool {
        match self {
            Scope::None => false,
            Scope::Namespaces(set) => set.contains(namespace),
            Scope::All => true,
        }
    }
}

impl Effect {
    const NONE: Effect = Effect {
        outbound: false,
        inbound: Scope::None,
        pods: BTreeSet::new(),
    };

    /// Everything.
    pub fn all() -> Effect {
        Effect {
            outbound: true,
            inbound: Scope::All,
            ..Effect::NONE
        }
    }

    fn of(outbound: bool, namespace: &str) -> Effect {
        Effect {
            outbound,
            inbound: Scope::Namespaces(BTreeSet::from([namespace.to_string()])),
            ..Effect::NONE
        }
    }

    /// Whether nothing is influenced.
    pub fn is_none(&self) -> bool {
        *self == Effect::NONE
    }

    /// Adds another change's influence.
    pub fn merge(&mut self, other: Effect) {
        self.outbound |= other.outbound;
        self.pods.extend(other.pods);
        self.inbound = match (std::mem::take(&mut self.inbound), other.inbound) {
            (Scope::All, _) | (_, Scope::All) => Scope::All,
            (Scope::None, scope) | (scope, Scope::None) => scope,
            (Scope::Namespaces(mut a), Scope::Namespaces(b)) => {
                a.extend(b);
                Scope::Namespaces(a)
            }
        };
    }

    /// Whether a proxy in this namespace is affected, whatever its pod.
    pub fn touches(&self, namespace: &str) -> bool {
        self.outbound || self.inbound.contains(namespace)
    }

    /// Whether the proxy of a pod is affected.
    pub fn touches_pod(&self, namespace: &str, pod: &str) -> bool {
        let own = || self.pods.iter().any(|(n, p)| n == namespace && p == pod);
        self.touches(namespace) || own()
    }
}

/// Endpoints of one EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Port name and number.
    pub ports: Vec<(String, u16)>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

impl Slice {
    /// An EndpointSlice with the name of its Service; `None` for one without.
    pub fn of_service(object: &EndpointSlice) -> Option<(String, Slice)> {
        let labels = object.metadata.labels.as_ref()?;
        let service = labels.get("kubernetes.io/service-name")?;
        Some((service.clone(), read_slice(object)))
    }
}

/// One address of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Address.
    pub address: IpAddr,
    /// Whether it takes new traffic.
    pub ready: bool,
    /// Whether it is going away but still serves.
    pub draining: bool,
    /// Pod behind it, in the slice's namespace.
    pub pod: Option<String>,
}

/// Objects of one namespace.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    services: BTreeMap<String, Arc<Service>>,
    entries: BTreeMap<String, Vec<Arc<Service>>>,
    /// What of a ServiceEntry is not in force, by its name; every one that is known has an entry.
    entry_problems: BTreeMap<String, Vec<String>>,
    slices: BTreeMap<String, BTreeMap<String, Arc<Slice>>>,
    /// The Service of each slice.
    slice_services: BTreeMap<String, String>,
    pods: BTreeMap<String, Arc<Workload>>,
    peer: Configs<PeerAuthentication>,
    authz: Configs<AuthorizationPolicy>,
    request: Configs<RequestAuthentication>,
    rules: Configs<DestinationRule>,
    virtual_services: Configs<VirtualService>,
    gateways: Configs<Gateway>,
    sidecars: Configs<Sidecar>,
}

type Configs<T> = Vec<Arc<Config<T>>>;

/// The world.
#[derive(Clone, Debug, Default)]
pub struct World {
    mesh: Arc<Mesh>,
    namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Services by host, best first (S6.52).
    hosts: Arc<BTreeMap<String, Vec<Arc<Service>>>>,
    outbound_revision: u64,
    journal: journal::Journal,
    /// Objects of former kinds; what they become is among the policies.
    former: Arc<crate::legacy::Former>,
    /// Fetched key sets.
    key_sets: Arc<keys::KeySets>,
}

impl World {
    /// An empty world with these settings.
    pub fn new(mesh: Mesh) -> World {
        World {
            mesh: Arc::new(mesh),
            ..World::default()
        }
    }

    /// Mesh settings.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    // Changes.

    /// Replaces the mesh settings.
    pub fn set_mesh(&mut self, mesh: Mesh) -> Effect {
        if *self.mesh == mesh {
            return Effect::NONE;
        }
        self.mesh = Arc::new(mesh);
        self.convert_all_former();
        self.changed_outbound(Effect::all())
    }

    /// Adds or replaces a Service.
    pub fn set_service(&mut self, object: &core::Service) -> Effect {
        let (Some(name), namespace) = (
            &object.metadata.name,
            object.metadata.namespace.as_deref().unwrap_or_default(),
        ) else {
            return Effect::NONE;
        };
        let new = Service::from_kubernetes(object, &self.mesh.domain).map(Arc::new);
        self.put_service(namespace, name, new)
    }

    /// Removes a Service.
    pub fn remove_service(&mut self, namespace: &str, name: &str) -> Effect {
        self.put_service(namespace, name, None)
    }

    fn put_service(&mut self, namespace: &str, name: &str, new: Option<Arc<Service>>) -> Effect {
        let old = self
            .namespaces
            .get(namespace)
            .and_then(|n| n.services.get(name))
            .cloned();
        if old == new {
            return Effect::NONE;
        }
        let hosts: BTreeSet<String> = old.iter().chain(&new).map(|s| s.host.clone()).collect();
        if let Some(old) = &old {
            self.unlist_host(old);
        }
        let space = self.namespace_mut(namespace);
        match &new {
            Some(service) => {
                space.services.insert(name.to_string(), service.clone());
            }
            None => {
                space.services.remove(name);
            }
        }
        if let Some(new) = new {
            self.list_host(new);
        }
        let mut effect = self.changed_listing(Effect::of(true, namespace), hosts);
        effect.merge(self.reconvert_service(namespace));
        effect
    }

    /// Adds or replaces an EndpointSlice.
    pub fn set_slice(&mut self, object: &EndpointSlice) -> Effect {
        let (Some(name), namespace) = (
            &object.metadata.name,
            object.metadata.namespace.as_deref().unwrap_or_default(),
        ) else {
            return Effect::NONE;
        };
        self.put_slice(namespace, name, Slice::of_service(object))
    }

    /// Removes an EndpointSlice.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) -> Effect {
        self.put_slice(namespace, name, None)
    }

    /// Adds or replaces an EndpointSlice, read before by [`Slice::of_service`]; `None` removes it.
    pub fn put_slice(&mut self, namespace: &str, name: &str, new: Option<(String, Slice)>) -> Effect {
        let new = new.map(|(service, slice)| (service, Arc::new(slice)));
        let old = self.namespaces.get(namespace).and_then(|n| {
            let service = n.slice_services.get(name)?;
            Some((service.clone(), n.slices.get(service)?.get(name)?.clone()))
        });
        if old == new {
            return Effect::NONE;
        }
        let services: BTreeSet<String> = old.iter().chain(&new).map(|(service, _)| service.clone()).collect();
        let space = self.namespace_mut(namespace);
        if let Some((service, _)) = old
            && let Some(slices) = space.slices.get_mut(&service)
        {
            slices.remove(name);
            if slices.is_empty() {
                space.slices.remove(&service);
            }
            space.slice_services.remove(name);
        }
        if let Some((service, slice)) = new {
            space.slice_services.insert(name.to_string(), service.clone());
            space.slices.entry(service).or_default().insert(name.to_string(), slice);
        }
        let effect = Effect {
            outbound: true,
            ..Effect::NONE
        };
        let touches = services.into_iter().map(|s| Touch::Slices(namespace.to_string(), s));
        self.changed_clusters(effect, touches)
    }

    /// Adds or replaces a pod.
    pub fn set_pod(&mut self, object: &core::Pod) -> Effect {
        let (Some(name), namespace) = (
            &object.metadata.name,
            object.metadata.namespace.as_deref().unwrap_or_default(),
        ) else {
            return Effect::NONE;
        };
        let new = Workload::from_pod(object, &self.mesh.cluster);
        self.put_pod(namespace, name, new)
    }

    /// Removes a pod.
    pub fn remove_pod(&mut self, namespace: &str, name: &str) -> Effect {
        self.put_pod(namespace, name, None)
    }

    /// Adds or replaces a pod, read before by [`Workload::from_pod`]; `None` removes it.
    pub fn put_pod(&mut self, namespace: &str, name: &str, new: Option<Workload>) -> Effect {
        let old = self.namespaces.get(namespace).and_then(|n| n.pods.get(name));
        if old.map(|old| &**old) == new.as_ref() {
            return Effect::NONE;
        }
        let pods = &mut self.namespace_mut(namespace).pods;
        match new {
            Some(mut workload) => {
                // Pods of one Deployment begin alike, so the neighbours are its other pods.
                let before = pods
                    .range::<str, _>((Bound::Unbounded, Bound::Excluded(name)))
                    .next_back();
                let after = pods.range::<str, _>((Bound::Excluded(name), Bound::Unbounded)).next();
                for (_, other) in before.into_iter().chain(after) {
                    workload.share(other);
                }
                pods.insert(name.to_string(), Arc::new(workload))
            }
            None => pods.remove(name),
        };
        let effect = Effect {
            outbound: true,
            pods: BTreeSet::from([(namespace.to_string(), name.to_string())]),
            ..Effect::NONE
        };
        let touch = Touch::Pod(namespace.to_string(), name.to_string());
        let mut effect = self.changed_clusters(effect, [touch]);
        effect.merge(self.reconvert(namespace));
        effect
    }

    /// Adds or replaces a configuration object (as JSON). Objects of kinds that do not matter are ignored.
    pub fn set_config(&mut self, kind: Kind, object: &Value) -> Effect {
        let mut meta = ObjectMeta::read(object);
        if meta.name.is_empty() {
            return Effect::NONE;
        }
        if kind.former().is_some() {
            if kind.cluster_scoped() {
                meta.namespace.clear();
            }
            return self.put_former(kind, meta, Some(object));
        }
        let mut spec = object.get("spec").cloned().unwrap_or(Value::Null);
        mantlet_api::object::drop_nulls(&mut spec);
        let namespace = meta.namespace.clone();
        let changed = match kind {
            Kind::ServiceEntry => {
                let config: Config<ServiceEntry> = read_spec(meta, spec, |_, _| {});
                let name = config.meta.name.clone();
                let mut problems: Vec<String> = config
                    .broken
                    .iter()
                    .map(|error| format!("cannot be read ({error}); it is ignored"))
                    .collect();
                problems.extend(crate::report::service_entry(&config.spec));
                self.namespace_mut(&namespace)
                    .entry_problems
                    .insert(name.clone(), problems);
                let services = Service::from_entry(&config.meta, &config.spec)
                    .into_iter()
                    .map(Arc::new)
                    .collect();
                return self.put_entry(&namespace, &name, services);
            }
            Kind::PeerAuthentication => {
                let config = read_spec(meta, spec, |spec: &mut PeerAuthentication, s| spec.selector = s);
                self.put_config(config, |n| &mut n.peer)
            }
            Kind::AuthorizationPolicy => {
                let config = read_spec(meta, spec, |spec: &mut AuthorizationPolicy, s| spec.selector = s);
                self.put_config(config, |n| &mut n.authz)
            }
            Kind::RequestAuthentication => {
                let config = read_spec(meta, spec, |spec: &mut RequestAuthentication, s| spec.selector = s);
                self.put_config(config, |n| &mut n.request)
            }
            Kind::DestinationRule => {
                self.put_config(read_spec::<DestinationRule>(meta, spec, |_, _| {}), |n| &mut n.rules)
            }
            Kind::VirtualService => self.put_config(read_spec::<VirtualService>(meta, spec, |_, _| {}), |n| {
                &mut n.virtual_services
            }),
            Kind::Gateway => self.put_config(read_spec::<Gateway>(meta, spec, |_, _| {}), |n| &mut n.gateways),
            Kind::Sidecar => self.put_config(read_spec::<Sidecar>(meta, spec, |_, _| {}), |n| &mut n.sidecars),
            // Taken above.
            _ => false,
        };
        if changed {
            self.config_effect(kind, &namespace)
        } else {
            Effect::NONE
        }
    }

    /// Removes a configuration object.
    pub fn remove_config(&mut self, kind: Kind, namespace: &str, name: &str) -> Effect {
        if kind == Kind::ServiceEntry {
            self.namespace_mut(namespace).entry_problems.remove(name);
            return self.put_entry(namespace, name, Vec::new());
        }
        if kind.former().is_some() {
            let meta = ObjectMeta {
                name: name.to_string(),
                namespace: if kind.cluster_scoped() { "" } else { namespace }.to_string(),
                ..ObjectMeta::default()
            };
            return self.put_former(kind, meta, None);
        }
        let space = self.namespace_mut(namespace);
        fn drop_named<T>(configs: &mut Configs<T>, name: &str) -> bool {
            let before = configs.len();
            configs.retain(|c| c.meta.origin.is_some() || c.meta.name != name);
            configs.len() != before
        }
        let removed = match kind {
            Kind::PeerAuthentication => drop_named(&mut space.peer, name),
            Kind::AuthorizationPolicy => drop_named(&mut space.authz, name),
            Kind::RequestAuthentication => drop_named(&mut space.request, name),
            Kind::DestinationRule => drop_named(&mut space.rules, name),
            Kind::VirtualService => drop_named(&mut space.virtual_services, name),
            Kind::Gateway => drop_named(&mut space.gateways, name),
            Kind::Sidecar => drop_named(&mut space.sidecars, name),
            // Taken away above.
            _ => false,
        };
        if removed {
            self.config_effect(kind, namespace)
        } else {
            Effect::NONE
        }
    }

    fn put_config<T: PartialEq>(&mut self, config: Config<T>, list: fn(&mut Namespace) -> &mut Configs<T>) -> bool {
        let namespace = config.meta.namespace.clone();
        let configs = list(self.namespace_mut(&namespace));
        if configs.iter().any(|c| **c == config) {
            return false;
        }
        configs.retain(|c| c.meta.origin.is_some() || c.meta.name != config.meta.name);
        configs.push(Arc::new(config));
        configs.sort_by(|a, b| a.meta.cmp(&b.meta));
        true
    }

    fn put_entry(&mut self, namespace: &str, name: &str, new: Vec<Arc<Service>>) -> Effect {
        let old = self
            .namespaces
            .get(namespace)
            .and_then(|n| n.entries.get(name))
            .cloned()
            .unwrap_or_default();
        if old == new {
            return Effect::NONE;
        }
        let hosts: BTreeSet<String> = old.iter().chain(&new).map(|s| s.host.clone()).collect();
        for service in &old {
            self.unlist_host(service);
        }
        let entries = &mut self.namespace_mut(namespace).entries;
        if new.is_empty() {
            entries.remove(name);
        } else {
            entries.insert(name.to_string(), new.clone());
        }
        for service in new {
            self.list_host(service);
        }
        self.changed_listing(Effect::of(true, namespace), hosts)
    }

    fn config_effect(&mut self, kind: Kind, namespace: &str) -> Effect {
        let inbound = if namespace == self.mesh.root_namespace {
            Scope::All
        } else {
            Scope::Namespaces(BTreeSet::from([namespace.to_string()]))
        };
        let of = |outbound| Effect {
            outbound,
            inbound: inbound.clone(),
            ..Effect::NONE
        };
        match kind {
            Kind::AuthorizationPolicy | Kind::RequestAuthentication => self.stamped(of(false)),
            // Clients follow the modes of servers.
            Kind::PeerAuthentication if inbound == Scope::All => self.changed_all_clusters(of(true)),
            Kind::PeerAuthentication => self.changed_clusters(of(true), [Touch::Namespace(namespace.to_string())]),
            // A Gateway selects pods of any namespace.
            Kind::Gateway | Kind::VirtualService => self.changed_listing(Effect::all(), []),
            _ => self.changed_outbound(of(true)),
        }
    }

    fn namespace_mut(&mut self, name: &str) -> &mut Namespace {
        Arc::make_mut(self.namespaces.entry(name.to_string()).or_default())
    }

    fn list_host(&mut self, service: Arc<Service>) {
        let list = Arc::make_mut(&mut self.hosts).entry(service.host.clone()).or_default();
        list.push(service);
        list.sort_by(|a, b| a.rank().cmp(&b.rank()));
    }

    fn unlist_host(&mut self, service: &Arc<Service>) {
        let hosts = Arc::make_mut(&mut self.hosts);
        if let Some(list) = hosts.get_mut(&service.host) {
            list.retain(|s| s != service);
            if list.is_empty() {
                hosts.remove(&service.host);
            }
        }
    }

    // Questions.

    /// The service that a host names for a client in `namespace`: its own namespace's first, then by rank (S6.52).
    pub fn service(&self, host: &str, namespace: &str) -> Option<&Arc<Service>> {
        choose_service(self.hosts.get(host)?, namespace)
    }

    /// All services of a host, whoever sees them, best first.
    pub fn services_of_host(&self, host: &str) -> &[Arc<Service>] {
        self.hosts.get(host).map_or(&[], Vec::as_slice)
    }

    /// All services that a client in `namespace` sees, one per host, in the order of hosts.
    pub fn visible_services(&self, namespace: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.hosts
            .values()
            .filter_map(move |list| choose_service(list, namespace))
    }

    /// The services of a namespace whose selector matches these labels, oldest first (S1.51).
    pub fn services_of_workload(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Vec<Arc<Service>> {
        let Some(space) = self.namespaces.get(namespace) else {
            return Vec::new();
        };
        let mut out: Vec<Arc<Service>> = space
            .services
            .values()
            .chain(space.entries.values().flatten())
            .filter(|s| !s.selector.is_empty() && mantlet_api::selector::subset(&s.selector, labels))
            .cloned()
            .collect();
        out.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        out
    }

    /// A pod.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.namespaces.get(namespace)?.pods.get(name)
    }

    /// Pods of a namespace.
    pub fn pods(&self, namespace: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.namespaces.get(namespace).into_iter().flat_map(|n| n.pods.values())
    }

    /// Slices of a Kubernetes Service.
    pub fn slices(&self, namespace: &str, service: &str) -> impl Iterator<Item = &Arc<Slice>> {
        self.namespaces
            .get(namespace)
            .and_then(|n| n.slices.get(service))
            .into_iter()
            .flat_map(|s| s.values())
    }

    /// PeerAuthentications of a namespace, oldest first.
    pub fn peer_authentications(&self, namespace: &str) -> &[Arc<Config<PeerAuthentication>>] {
        self.namespaces.get(namespace).map_or(&[], |n| &n.peer)
    }

    /// AuthorizationPolicies of a namespace, oldest first.
    pub fn authorization_policies(&self, namespace: &str) -> &[Arc<Config<AuthorizationPolicy>>] {
        self.namespaces.get(namespace).map_or(&[], |n| &n.authz)
    }

    /// RequestAuthentications of a namespace, oldest first.
    pub fn request_authentications(&self, namespace: &str) -> &[Arc<Config<RequestAuthentication>>] {
        self.namespaces.get(namespace).map_or(&[], |n| &n.request)
    }

    /// DestinationRules of a namespace, oldest first.
    pub fn destination_rules(&self, namespace: &str) -> &[Arc<Config<DestinationRule>>] {
        self.namespaces.get(namespace).map_or(&[], |n| &n.rules)
    }

    /// VirtualServices of all namespaces, oldest first.
    pub fn virtual_services(&self) -> Vec<&Arc<Config<VirtualService>>> {
        let mut out: Vec<_> = self.namespaces.values().flat_map(|n| &n.virtual_services).collect();
        out.sort_by(|a, b| a.meta.cmp(&b.meta));
        out
    }

    /// Gateways of all namespaces, oldest first.
    pub fn gateways(&self) -> Vec<&Arc<Config<Gateway>>> {
        let mut out: Vec<_> = self.namespaces.values().flat_map(|n| &n.gateways).collect();
        out.sort_by(|a, b| a.meta.cmp(&b.meta));
        out
    }

    /// Sidecars of a namespace, oldest first.
    pub fn sidecars(&self, namespace: &str) -> &[Arc<Config<Sidecar>>] {
        self.namespaces.get(namespace).map_or(&[], |n| &n.sidecars)
    }

    /// Whether all namespaces see the same services and DestinationRules: every host has one service, and nothing is
    /// exported to some namespaces only.
    pub fn all_exported(&self) -> bool {
        let services = self
            .hosts
            .values()
            .all(|list| list.len() == 1 && list.iter().all(|s| s.export_to == service::ExportTo::All));
        services
            && self.namespaces.values().flat_map(|n| &n.rules).all(|rule| {
                // Rules that select clients are of their own namespace alone, and no rule of any other client.
                rule.spec.workload_selector.is_some()
                    || crate::destination_rule::export(self, rule) == service::ExportTo::All
            })
    }

    /// Whether a ServiceEntry of this name gives any host.
    pub fn service_entry_exists(&self, namespace: &str, name: &str) -> bool {
        self.namespaces
            .get(namespace)
            .is_some_and(|n| n.entries.contains_key(name))
    }

    /// What of a ServiceEntry is not in force; `None` when it is not known.
    pub fn entry_problems(&self, namespace: &str, name: &str) -> Option<&[String]> {
        let problems = self.namespaces.get(namespace)?.entry_problems.get(name)?;
        Some(problems)
    }

    /// Names of all namespaces that hold anything.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.namespaces.keys().map(String::as_str)
    }
}

fn choose_service<'a>(list: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    let visible = || list.iter().filter(|s| s.export_to.visible_to(namespace));
    visible()
        .find(|s| s.namespace == namespace)
        .or_else(|| visible().next())
}

fn read_spec<T: DeserializeOwned + Default>(
    meta: ObjectMeta,
    spec: Value,
    keep_selector: impl FnOnce(&mut T, Option<WorkloadSelector>),
) -> Config<T> {
    // What a policy selects is read apart, so that one that cannot be understood fails closed where it was meant to
    // act, and on its whole scope only if that cannot be read either.
    let selector = spec.get("selector").cloned();
    let parsed = if spec.is_null() {
        Ok(T::default())
    } else {
        serde_json::from_value(spec)
    };
    match parsed {
        Ok(spec) => Config {
            meta,
            spec,
            broken: None,
        },
        Err(error) => {
            let mut spec = T::default();
            keep_selector(&mut spec, selector.and_then(|s| serde_json::from_value(s).ok()));
            Config {
                meta,
                spec,
                broken: Some(error.to_string()),
            }
        }
    }
}

fn read_slice(object: &EndpointSlice) -> Slice {
    let ports = object
        .ports
        .iter()
        .flatten()
        .filter(|p| p.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .filter_map(|p| Some((p.name.clone().unwrap_or_default(), u16::try_from(p.port?).ok()?)))
        .collect();
    let endpoints = object
        .endpoints
        .iter()
        .flatten()
        .flat_map(|e| {
            let conditions = e.conditions.as_ref();
            let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
            let serving = conditions.and_then(|c| c.serving).unwrap_or(false);
            let ready = conditions.and_then(|c| c.ready).unwrap_or(true) && !terminating;
            let pod = e
                .target_ref
                .as_ref()
                .filter(|r| r.kind.as_deref() == Some("Pod"))
                .and_then(|r| r.name.clone());
            e.addresses.iter().filter_map(move |address| {
                Some(SliceEndpoint {
                    address: address.parse().ok()?,
                    ready,
                    draining: terminating && serving,
                    pod: pod.clone(),
                })
            })
        })
        .collect();
    Slice { ports, endpoints }
}

/// Unix seconds of a Kubernetes time; 0 for none.
pub(crate) fn seconds(time: Option<&Time>) -> i64 {
    time.map_or(0, |t| t.0.as_second())
}
