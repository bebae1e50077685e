//! Former kinds in the world: what is known of them, and the policies they become, kept up to date.
//!
//! Called by the changes of [`super::World`]. A conversion depends on the former objects, on the Services of its namespace and, for named
//! ports, on its pods; so each of these changes repeats the conversion of the namespaces it can influence, and only what came out
//! differently is a change for proxies.

use std::collections::BTreeSet;
use std::sync::Arc;

use mantlet_api::kind as rows;
use mantlet_api::legacy::authn::{Policy, Target};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::service::Service;
use super::{Config, Configs, Effect, Kind, Namespace, ObjectMeta, Scope, World};
use crate::legacy::{self, Former};

/// Which namespaces a change of former objects can influence.
enum Reach {
    One(String),
    All,
}

impl Kind {
    /// The row of a former kind; `None` for kinds of today.
    pub(super) fn former(self) -> Option<&'static rows::Kind> {
        Some(match self {
            Kind::MeshPolicy => &rows::MESH_POLICY,
            Kind::Policy => &rows::POLICY,
            Kind::ServiceRole => &rows::SERVICE_ROLE,
            Kind::ServiceRoleBinding => &rows::SERVICE_ROLE_BINDING,
            Kind::ClusterRbacConfig => &rows::CLUSTER_RBAC_CONFIG,
            Kind::RbacConfig => &rows::RBAC_CONFIG,
            _ => return None,
        })
    }

    /// Whether Istio has removed it and it is converted here.
    pub fn is_former(self) -> bool {
        self.former().is_some()
    }

    /// Whether its objects have no namespace.
    pub fn cluster_scoped(self) -> bool {
        self.former().is_some_and(rows::Kind::cluster_scoped)
    }
}

/// Takes a new version of an object, or takes the object away; false when nothing is different.
fn put<T: PartialEq>(list: &mut Configs<T>, name: &str, namespace: &str, new: Option<Config<T>>) -> bool {
    let same = |c: &Arc<Config<T>>| c.meta.name == name && c.meta.namespace == namespace;
    match (list.iter().find(|c| same(c)), &new) {
        (Some(old), Some(new)) if **old == *new => return false,
        (None, None) => return false,
        _ => {}
    }
    list.retain(|c| !same(c));
    list.extend(new.map(Arc::new));
    list.sort_by(|a, b| a.meta.cmp(&b.meta));
    true
}

fn read<T: DeserializeOwned + Default>(row: &'static rows::Kind, meta: ObjectMeta, object: &Value) -> Config<T> {
    match mantlet_api::legacy::read(row, object) {
        Ok(spec) => Config {
            meta,
            spec,
            broken: None,
        },
        Err((path, message)) => Config {
            meta,
            spec: T::default(),
            broken: Some(format!("{path}: {message}")),
        },
    }
}

/// A policy that cannot be read fails closed where it was meant to act, and on its whole scope only if that cannot be read either.
fn read_policy(row: &'static rows::Kind, meta: ObjectMeta, object: &Value) -> Config<Policy> {
    let mut config: Config<Policy> = read(row, meta, object);
    if config.broken.is_some() {
        let targets = object.pointer("/spec/targets").map(mantlet_api::legacy::normalize);
        config.spec.targets = targets
            .and_then(|t| serde_json::from_value::<Vec<Target>>(t).ok())
            .unwrap_or_default();
    }
    config
}

impl World {
    /// The former objects.
    pub fn former(&self) -> &Former {
        &self.former
    }

    /// Kubernetes Services of a namespace, by name.
    pub fn kubernetes_services(&self, namespace: &str) -> impl Iterator<Item = &Service> {
        let space = self.namespaces.get(namespace);
        space.into_iter().flat_map(|n| n.services.values()).map(|s| &**s)
    }

    /// Adds, replaces or (without an object) removes one of a former kind.
    pub(super) fn put_former(&mut self, kind: Kind, meta: ObjectMeta, object: Option<&Value>) -> Effect {
        let Some(row) = kind.former() else { return Effect::NONE };
        let (name, namespace) = (meta.name.clone(), meta.namespace.clone());
        let former = Arc::make_mut(&mut self.former);
        let policy = |meta: ObjectMeta| object.map(|o| read_policy(row, meta, o));
        let reach = Reach::One(namespace.clone());
        let (changed, mut reach) = match kind {
            Kind::MeshPolicy => (
                put(&mut former.mesh_policies, &name, &namespace, policy(meta)),
                Reach::All,
            ),
            Kind::Policy => {
                let list = former.policies.entry(namespace.clone()).or_default();
                (put(list, &name, &namespace, policy(meta)), reach)
            }
            Kind::ServiceRole => {
                let list = former.roles.entry(namespace.clone()).or_default();
                (put(list, &name, &namespace, object.map(|o| read(row, meta, o))), reach)
            }
            Kind::ServiceRoleBinding => {
                let list = former.bindings.entry(namespace.clone()).or_default();
                (put(list, &name, &namespace, object.map(|o| read(row, meta, o))), reach)
            }
            Kind::ClusterRbacConfig => {
                let new = object.map(|o| read(row, meta, o));
                (put(&mut former.cluster_configs, &name, &namespace, new), Reach::All)
            }
            _ => {
                let new = object.map(|o| read(row, meta, o));
                (put(&mut former.configs, &name, &namespace, new), Reach::All)
            }
        };
        former.policies.retain(|_, list| !list.is_empty());
        former.roles.retain(|_, list| !list.is_empty());
        former.bindings.retain(|_, list| !list.is_empty());
        // A Policy makes an exception to the mesh's origins, and a role of the root namespace is bound from others.
        if namespace == self.mesh.root_namespace || (kind == Kind::Policy && !former.mesh_policies.is_empty()) {
            reach = Reach::All;
        }
        if !changed {
            return Effect::NONE;
        }
        match reach {
            Reach::One(namespace) => self.convert_former(&namespace),
            Reach::All => self.convert_all_former(),
        }
    }

    /// Repeats all conversions.
    pub(super) fn convert_all_former(&mut self) -> Effect {
        let mut all: BTreeSet<String> = legacy::namespaces(self);
        // Former results may stand where nothing is known any longer.
        all.extend(self.namespaces.keys().cloned());
        let mut effect = Effect::NONE;
        for namespace in all {
            effect.merge(self.convert_former(&namespace));
        }
        effect
    }

    /// Repeats the conversion of a namespace whose pods have changed.
    pub(super) fn reconvert(&mut self, namespace: &str) -> Effect {
        if self.former.is_empty() {
            return Effect::NONE;
        }
        self.convert_former(namespace)
    }

    /// Repeats the conversions that a changed Service of a namespace can influence: how the mesh's origins are written depends
    /// on the ports of all of them.
    pub(super) fn reconvert_service(&mut self, namespace: &str) -> Effect {
        let mesh_wide = |p: &Arc<Config<Policy>>| p.broken.is_some() || !p.spec.origins.is_empty();
        if self.former.mesh_policies.iter().any(mesh_wide) {
            return self.convert_all_former();
        }
        self.reconvert(namespace)
    }

    fn convert_former(&mut self, namespace: &str) -> Effect {
        let converted = legacy::namespace(self, namespace);
        let nothing = converted.peer.is_empty() && converted.request.is_empty() && converted.authz.is_empty();
        if nothing && !self.namespaces.contains_key(namespace) {
            return Effect::NONE;
        }
        let space = self.namespace_mut(namespace);
        let peer = replace(space, |n| &mut n.peer, converted.peer);
        let request = replace(space, |n| &mut n.request, converted.request);
        let authz = replace(space, |n| &mut n.authz, converted.authz);
        if !(peer || request || authz) {
            return Effect::NONE;
        }
        let inbound = if namespace == self.mesh.root_namespace {
            Scope::All
        } else {
            Scope::Namespaces(BTreeSet::from([namespace.to_string()]))
        };
        let effect = Effect {
            // Clients follow the modes of servers.
            outbound: peer,
            inbound,
            ..Effect::NONE
        };
        if peer {
            self.changed_outbound(effect)
        } else {
            self.stamped(effect)
        }
    }
}

/// Puts new results in the place of earlier ones; false when they are the same.
fn replace<T: PartialEq>(
    space: &mut Namespace,
    list: fn(&mut Namespace) -> &mut Configs<T>,
    new: Vec<Config<T>>,
) -> bool {
    let configs = list(space);
    let old: Vec<&Config<T>> = configs
        .iter()
        .map(|c| &**c)
        .filter(|c| c.meta.origin.is_some())
        .collect();
    if old.len() == new.len() && old.iter().all(|o| new.contains(o)) {
        return false;
    }
    configs.retain(|c| c.meta.origin.is_none());
    configs.extend(new.into_iter().map(Arc::new));
    configs.sort_by(|a, b| a.meta.cmp(&b.meta));
    true
}
