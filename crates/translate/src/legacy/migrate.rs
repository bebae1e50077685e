//! Former objects as files of today: what [`super::all`] gives, written out, beside the modern objects that are there already.
//!
//! In the mesh a modern object takes the place of what a former one says about the same workload. As files both would be in force,
//! so what a modern object replaces is left out here; roles are left out as soon as they might allow in addition.

use std::collections::BTreeSet;

use mantlet_api::kind::{AUTHORIZATION_POLICY, Kind as Row, PEER_AUTHENTICATION, REQUEST_AUTHENTICATION};
use mantlet_api::{Spec, WorkloadSelector};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Note, Origin, Weight, all, is_modern_allow, overlap, selects_workloads};
use crate::world::{Config, World};

/// A modern object and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The former object.
    pub origin: Origin,
    /// The object, ready to be applied.
    pub object: Value,
}

/// Everything that a world's former objects become.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Migration {
    /// Objects, PeerAuthentications first.
    pub objects: Vec<Written>,
    /// What is not kept.
    pub notes: Vec<Note>,
}

/// How a modern object meets a converted one.
enum Meets {
    Not,
    /// It binds some of the workloads.
    Partly,
    /// It binds all of them.
    Wholly,
}

/// Writes all former objects of a world as modern ones.
pub fn migrate(world: &World) -> Migration {
    let converted = all(world);
    let mut out = Migration {
        notes: converted.notes,
        ..Migration::default()
    };
    let root = world.mesh().root_namespace.as_str();
    for config in &converted.peer {
        let modern = |namespace: &str| -> Vec<(String, Option<WorkloadSelector>)> {
            let list = world.peer_authentications(namespace).iter();
            list.filter(|p| p.meta.origin.is_none() && !(namespace == root && p.spec.has_selector()))
                .map(|p| (p.meta.name.clone(), p.spec.selector.clone()))
                .collect()
        };
        if out.keeps(root, config, config.spec.selector.as_ref(), modern, false) {
            out.write(world, &PEER_AUTHENTICATION, config);
        }
    }
    for config in &converted.request {
        let modern = |namespace: &str| -> Vec<(String, Option<WorkloadSelector>)> {
            let list = world.request_authentications(namespace).iter();
            list.filter(|p| p.meta.origin.is_none())
                .map(|p| (p.meta.name.clone(), p.spec.selector.clone()))
                .collect()
        };
        if out.keeps(root, config, config.spec.selector.as_ref(), modern, false) {
            out.write(world, &REQUEST_AUTHENTICATION, config);
        }
    }
    for config in &converted.authz {
        let modern = |namespace: &str| -> Vec<(String, Option<WorkloadSelector>)> {
            let list = world.authorization_policies(namespace).iter();
            list.filter(|p| is_modern_allow(p) && selects_workloads(&p.spec))
                .map(|p| (p.meta.name.clone(), p.spec.selector.clone()))
                .collect()
        };
        // One without rules allows nothing, and so changes nothing where something else allows.
        let allows = config.meta.origin.as_ref().is_some_and(Origin::is_rbac) && !config.spec.rules.is_empty();
        if !allows || out.keeps(root, config, config.spec.selector.as_ref(), modern, true) {
            out.write(world, &AUTHORIZATION_POLICY, config);
        }
    }
    out.notes.sort();
    out.notes.dedup();
    out
}

impl Migration {
    /// Whether an object is written, given the modern ones of its kind.
    fn keeps<T>(
        &mut self,
        root: &str,
        config: &Config<T>,
        selector: Option<&WorkloadSelector>,
        modern: impl Fn(&str) -> Vec<(String, Option<WorkloadSelector>)>,
        never_both: bool,
    ) -> bool {
        let Some(origin) = &config.meta.origin else { return true };
        let own = config.meta.namespace.as_str();
        for namespace in BTreeSet::from([root, own]) {
            for (name, other) in modern(namespace) {
                let (weight, text) = match meets(selector, other.as_ref()) {
                    Meets::Not => continue,
                    Meets::Wholly => (Weight::Changed, "is in force in its place already; it is not written"),
                    Meets::Partly if never_both => (
                        Weight::Lost,
                        "binds some of its workloads, where both would allow; it is not written",
                    ),
                    Meets::Partly => (
                        Weight::Lost,
                        "is in force in its place on some of its workloads; compare both",
                    ),
                };
                let drop = never_both || matches!(weight, Weight::Changed);
                self.notes.push(Note {
                    origin: origin.clone(),
                    weight,
                    message: format!("{}: the modern {namespace}/{name} {text}", config.meta.name),
                });
                if drop {
                    return false;
                }
            }
        }
        true
    }

    fn write<T: Spec + Serialize>(&mut self, world: &World, row: &Row, config: &Config<T>) {
        let Some(origin) = &config.meta.origin else { return };
        let namespace = &config.meta.namespace;
        let taken = |name: &str| {
            let any = match row.kind {
                "PeerAuthentication" => names(world.peer_authentications(namespace)).any(|n| n == name),
                "RequestAuthentication" => names(world.request_authentications(namespace)).any(|n| n == name),
                _ => names(world.authorization_policies(namespace)).any(|n| n == name),
            };
            let written = self.objects.iter().any(|w| {
                w.object["kind"] == row.kind
                    && w.object["metadata"]["namespace"] == *namespace
                    && w.object["metadata"]["name"] == name
            });
            any || written
        };
        let mut name = config.meta.name.clone();
        let mut number = 2;
        while taken(&name) {
            name = format!("{}-{number}", config.meta.name);
            number += 1;
        }
        let mut metadata = json!({ "name": name, "namespace": namespace });
        if !config.meta.annotations.is_empty() {
            metadata["annotations"] = json!(config.meta.annotations);
        }
        let mut spec = serde_json::to_value(&config.spec).unwrap_or_else(|_| json!({}));
        prune(&mut spec);
        self.objects.push(Written {
            origin: origin.clone(),
            object: json!({
                "apiVersion": row.api_version(),
                "kind": row.kind,
                "metadata": metadata,
                "spec": spec,
            }),
        });
    }
}

/// Names of the modern objects of a list.
fn names<T>(list: &[std::sync::Arc<Config<T>>]) -> impl Iterator<Item = &str> {
    list.iter()
        .filter(|c| c.meta.origin.is_none())
        .map(|c| c.meta.name.as_str())
}

fn meets(selector: Option<&WorkloadSelector>, modern: Option<&WorkloadSelector>) -> Meets {
    let empty = std::collections::BTreeMap::new();
    let own = selector.map_or(&empty, |s| &s.match_labels);
    let modern = modern.map_or(&empty, |s| &s.match_labels);
    if !overlap(own, modern) {
        Meets::Not
    } else if mantlet_api::selector::subset(modern, own) {
        Meets::Wholly
    } else {
        Meets::Partly
    }
}

/// Takes out fields that say nothing. An empty object inside a list stays: a rule `{}` matches everything.
fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(prune);
            map.retain(|_, v| !says_nothing(v));
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => Map::is_empty(map),
        Value::Number(_) => false,
    }
}
