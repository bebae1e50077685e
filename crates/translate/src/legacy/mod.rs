//! Istio's former security kinds, turned into the modern ones (SEMANTICS 7).
//!
//! [`World`] calls [`namespace`] whenever something that matters to them changes, and keeps the results among its policies, marked
//! with the [`Origin`] they come from; the command line prints the same results as files. So a former object means in the mesh
//! exactly what its migrated form means. What has no equivalent is told as a [`Note`] and fails closed.
//!
//! | module | turns |
//! |---|---|
//! | [`authn`] | Policy and MeshPolicy into PeerAuthentication, RequestAuthentication and AuthorizationPolicy |
//! | [`rbac`] | ServiceRole, ServiceRoleBinding and their configuration into AuthorizationPolicy |
//! | [`migrate`] | a whole world into files |
//! | [`subject`] | a binding's subject and a role's rule into one rule of a policy |
//!
//! Modern objects win, workload by workload (S7.48): a PeerAuthentication over `peers`, a RequestAuthentication over `origins`, an
//! enforced ALLOW policy over roles. The requirement of a token stays in force until the Policy is deleted.

pub mod authn;
pub mod migrate;
pub mod rbac;
pub mod subject;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mantlet_api::legacy::authn::Policy;
use mantlet_api::legacy::rbac::{RbacConfig, ServiceRole, ServiceRoleBinding};
use mantlet_api::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication, WorkloadSelector};

use crate::world::service::Service;
use crate::world::{Config, Kind, ObjectMeta, World};

/// The object that a policy was converted from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for kinds of the whole cluster.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl Origin {
    pub(crate) fn of(kind: Kind, meta: &ObjectMeta) -> Origin {
        Origin {
            kind,
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        }
    }

    /// Whether it is one of the authorization kinds.
    pub fn is_rbac(&self) -> bool {
        matches!(
            self.kind,
            Kind::ServiceRole | Kind::ServiceRoleBinding | Kind::ClusterRbacConfig | Kind::RbacConfig
        )
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.kind.name())?;
        match self.namespace.as_str() {
            "" => write!(f, " {}", self.name),
            namespace => write!(f, " {namespace}/{}", self.name),
        }
    }
}

/// How much a note matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Kept, but seen differently in a detail.
    Changed,
    /// Not in force as written; what is, admits less.
    Lost,
}

/// What of an object is not kept as it was.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// The object.
    pub origin: Origin,
    /// How much it matters.
    pub weight: Weight,
    /// What, and what is in force instead.
    pub message: String,
}

/// The former objects of a world.
#[derive(Clone, Debug, Default)]
pub struct Former {
    pub(crate) mesh_policies: Vec<Arc<Config<Policy>>>,
    pub(crate) policies: BTreeMap<String, Vec<Arc<Config<Policy>>>>,
    pub(crate) roles: BTreeMap<String, Vec<Arc<Config<ServiceRole>>>>,
    pub(crate) bindings: BTreeMap<String, Vec<Arc<Config<ServiceRoleBinding>>>>,
    pub(crate) cluster_configs: Vec<Arc<Config<RbacConfig>>>,
    pub(crate) configs: Vec<Arc<Config<RbacConfig>>>,
}

impl Former {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.mesh_policies.is_empty()
            && self.policies.is_empty()
            && self.roles.is_empty()
            && self.bindings.is_empty()
            && self.cluster_configs.is_empty()
            && self.configs.is_empty()
    }

    /// Namespaces that hold any.
    pub fn namespaces(&self) -> BTreeSet<&str> {
        let mut out: BTreeSet<&str> = self.policies.keys().map(String::as_str).collect();
        out.extend(self.roles.keys().map(String::as_str));
        out.extend(self.bindings.keys().map(String::as_str));
        out
    }

    /// All of them.
    pub fn origins(&self) -> BTreeSet<Origin> {
        fn all<'a, T>(kind: Kind, list: impl IntoIterator<Item = &'a Arc<Config<T>>>) -> Vec<Origin>
        where
            T: 'a,
        {
            list.into_iter().map(|c| Origin::of(kind, &c.meta)).collect()
        }
        let mut out = BTreeSet::new();
        out.extend(all(Kind::MeshPolicy, &self.mesh_policies));
        out.extend(all(Kind::Policy, self.policies.values().flatten()));
        out.extend(all(Kind::ServiceRole, self.roles.values().flatten()));
        out.extend(all(Kind::ServiceRoleBinding, self.bindings.values().flatten()));
        out.extend(all(Kind::ClusterRbacConfig, &self.cluster_configs));
        out.extend(all(Kind::RbacConfig, &self.configs));
        out
    }
}

/// The modern objects of one namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Converted {
    /// Who must prove to be a workload.
    pub peer: Vec<Config<PeerAuthentication>>,
    /// Whose tokens are understood.
    pub request: Vec<Config<RequestAuthentication>>,
    /// Who may do what.
    pub authz: Vec<Config<AuthorizationPolicy>>,
    /// What is not kept.
    pub notes: Vec<Note>,
}

impl Converted {
    pub(crate) fn note(&mut self, origin: &Origin, weight: Weight, message: impl Into<String>) {
        let note = Note {
            origin: origin.clone(),
            weight,
            message: message.into(),
        };
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub(crate) fn lost(&mut self, origin: &Origin, message: impl Into<String>) {
        self.note(origin, Weight::Lost, message);
    }

    pub(crate) fn changed(&mut self, origin: &Origin, message: impl Into<String>) {
        self.note(origin, Weight::Changed, message);
    }

    /// A name that no other policy of the same kind has.
    fn name(&self, wanted: String, taken: impl Fn(&Converted, &str) -> bool) -> String {
        // Names of objects end at 253 characters; the end of ours tells them apart.
        let base: String = wanted.chars().take(240).collect();
        let mut name = base.trim_end_matches(['-', '.']).to_string();
        let mut number = 2;
        while taken(self, &name) {
            name = format!("{base}-{number}");
            number += 1;
        }
        name
    }

    pub(crate) fn add_peer(&mut self, meta: &Meta<'_>, name: &str, spec: PeerAuthentication) {
        let name = self.name(name.to_string(), |c, n| c.peer.iter().any(|p| p.meta.name == n));
        self.peer.push(meta.config(name, spec, false));
    }

    pub(crate) fn add_request(&mut self, meta: &Meta<'_>, name: &str, spec: RequestAuthentication) {
        let name = self.name(name.to_string(), |c, n| c.request.iter().any(|p| p.meta.name == n));
        self.request.push(meta.config(name, spec, false));
    }

    pub(crate) fn add_authz(&mut self, meta: &Meta<'_>, name: &str, spec: AuthorizationPolicy, dry_run: bool) {
        let name = self.name(name.to_string(), |c, n| c.authz.iter().any(|p| p.meta.name == n));
        self.authz.push(meta.config(name, spec, dry_run));
    }
}

/// Where a converted object comes from and belongs.
pub(crate) struct Meta<'a> {
    /// The former object.
    pub(crate) origin: &'a Origin,
    /// Its creation.
    pub(crate) created: i64,
    /// Namespace of the result.
    pub(crate) namespace: &'a str,
}

impl Meta<'_> {
    fn config<T>(&self, name: String, spec: T, dry_run: bool) -> Config<T> {
        let annotations = if dry_run {
            BTreeMap::from([("istio.io/dry-run".to_string(), "true".to_string())])
        } else {
            BTreeMap::new()
        };
        Config {
            meta: ObjectMeta {
                created: self.created,
                name,
                namespace: self.namespace.to_string(),
                annotations,
                origin: Some(self.origin.clone()),
            },
            spec,
            broken: None,
        }
    }
}

/// Converts what the former objects say about a namespace. In the root namespace this is also what they say about the mesh.
pub fn namespace(world: &World, namespace: &str) -> Converted {
    let mut out = Converted::default();
    if !world.former().is_empty() {
        authn::convert(world, namespace, &mut out);
        rbac::convert(world, namespace, &mut out);
        out.notes.sort();
    }
    out
}

/// Namespaces for which something may come out.
pub fn namespaces(world: &World) -> BTreeSet<String> {
    let mut out: BTreeSet<String> = world.namespaces().map(str::to_string).collect();
    out.extend(world.former().namespaces().into_iter().map(str::to_string));
    out.insert(world.mesh().root_namespace.clone());
    out
}

/// Everything, namespace by namespace.
pub fn all(world: &World) -> Converted {
    let mut out = Converted::default();
    for name in namespaces(world) {
        let one = namespace(world, &name);
        out.peer.extend(one.peer);
        out.request.extend(one.request);
        out.authz.extend(one.authz);
        out.notes.extend(one.notes);
    }
    out.notes.sort();
    out.notes.dedup();
    out
}

/// What every former object has to say in its status; an empty list means that it is in force as written.
pub fn problems(world: &World) -> BTreeMap<Origin, Vec<String>> {
    let mut out: BTreeMap<Origin, Vec<String>> = world
        .former()
        .origins()
        .into_iter()
        .map(|origin| {
            let superseded = superseded(world, &origin);
            (origin, superseded)
        })
        .collect();
    for note in all(world).notes {
        if note.weight == Weight::Lost {
            let list = out.entry(note.origin).or_default();
            if !list.contains(&note.message) {
                list.push(note.message);
            }
        }
    }
    out
}

/// Modern objects that take the place of a former one, in words.
pub fn superseded(world: &World, origin: &Origin) -> Vec<String> {
    let root = world.mesh().root_namespace.as_str();
    let mut out = Vec::new();
    let own = (origin.namespace != root && !origin.namespace.is_empty()).then_some(origin.namespace.as_str());
    for namespace in std::iter::once(root).chain(own) {
        let mut tell = |kind: &str, name: &str, selector: Option<&WorkloadSelector>, what: &str| {
            let place = match selector.filter(|s| !s.is_empty()) {
                Some(_) => "on the workloads that it selects",
                None if namespace == root => "in the whole mesh",
                None => "in its namespace",
            };
            out.push(format!("{what} not in force {place}: {kind} {namespace}/{name} is"));
        };
        if origin.is_rbac() {
            for policy in world.authorization_policies(namespace) {
                if is_modern_allow(policy) && selects_workloads(&policy.spec) {
                    tell(
                        "AuthorizationPolicy",
                        &policy.meta.name,
                        policy.spec.selector.as_ref(),
                        "roles are",
                    );
                }
            }
            continue;
        }
        for policy in world.peer_authentications(namespace) {
            let ignored = namespace == root && policy.spec.has_selector();
            if policy.meta.origin.is_none() && !ignored {
                tell(
                    "PeerAuthentication",
                    &policy.meta.name,
                    policy.spec.selector.as_ref(),
                    "peers are",
                );
            }
        }
        for policy in world.request_authentications(namespace) {
            if policy.meta.origin.is_none() {
                tell(
                    "RequestAuthentication",
                    &policy.meta.name,
                    policy.spec.selector.as_ref(),
                    "the issuers of origins are",
                );
            }
        }
    }
    out
}

/// Whether a policy takes the place of roles on the workloads that it binds (S7.48): an enforced ALLOW policy, after which what
/// is not allowed is denied as it was before. DENY, AUDIT and CUSTOM come on top of roles.
pub fn is_modern_allow(policy: &Config<AuthorizationPolicy>) -> bool {
    policy.meta.origin.is_none()
        && policy.broken.is_none()
        && policy.spec.action == mantlet_api::authorization_policy::Action::Allow
        && policy
            .meta
            .annotations
            .get("istio.io/dry-run")
            .is_none_or(|text| mantlet_api::validate::parse_bool(text) != Some(true))
}

/// Whether a policy is for workloads by label; others are attached to gateways.
pub(crate) fn selects_workloads(spec: &AuthorizationPolicy) -> bool {
    spec.target_ref.is_none() && spec.target_refs.is_empty()
}

/// Of the policies that bind a workload, those in force: converted ones only where there is no modern one.
pub fn in_force<T>(mut bound: Vec<&Config<T>>) -> Vec<&Config<T>> {
    if bound.iter().any(|c| c.meta.origin.is_none()) {
        bound.retain(|c| c.meta.origin.is_none());
    }
    bound
}

/// The selector that stands for a Service (S7.75); `None` for one without a selector.
pub(crate) fn selector_of(service: &Service) -> Option<WorkloadSelector> {
    (!service.selector.is_empty()).then(|| WorkloadSelector {
        match_labels: service.selector.clone(),
    })
}

/// Whether the same pod may carry both sets of labels.
pub(crate) fn overlap(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> bool {
    a.iter().all(|(k, v)| b.get(k).is_none_or(|other| other == v))
}
