//! Which resources are served now: the built-in table plus what stored definitions establish.
//!
//! Rebuilt lazily when the store says that a definition changed, so a custom resource is usable by the request that follows
//! the definition's acknowledgement. Read by routing, discovery and authorization reviews.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use crate::cache::Cached;
use crate::crd;
use crate::resources::{Resource, builtin};
use crate::store::{Store, StoreError};

/// All resources served.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    by_gvr: HashMap<(String, String, String), Arc<Resource>>,
    /// Groups in order, each with its versions in order of preference.
    pub(crate) groups: Vec<Group>,
    /// Digest of the whole, for discovery ETags.
    pub(crate) digest: String,
}

/// One API group.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Its name; empty for core.
    pub(crate) name: String,
    /// Versions, preferred first.
    pub(crate) versions: Vec<(String, Vec<Arc<Resource>>)>,
}

impl Registry {
    fn build(custom: Vec<Resource>, revision: u64) -> Self {
        let mut registry = Self {
            digest: format!("{revision:X}"),
            ..Self::default()
        };
        for resource in builtin().into_iter().chain(custom) {
            let resource = Arc::new(resource);
            let key = (
                resource.group.clone(),
                resource.version.clone(),
                resource.plural.clone(),
            );
            if registry.by_gvr.contains_key(&key) {
                continue;
            }
            registry.by_gvr.insert(key, resource.clone());
            let group = match registry.groups.iter_mut().find(|g| g.name == resource.group) {
                Some(g) => g,
                None => {
                    registry.groups.push(Group {
                        name: resource.group.clone(),
                        versions: vec![],
                    });
                    let last = registry.groups.len() - 1;
                    &mut registry.groups[last]
                }
            };
            match group.versions.iter_mut().find(|(v, _)| *v == resource.version) {
                Some((_, list)) => list.push(resource),
                None => group.versions.push((resource.version.clone(), vec![resource])),
            }
        }
        for group in &mut registry.groups {
            group
                .versions
                .sort_by_key(|(v, _)| std::cmp::Reverse(crd::version_order(v)));
        }
        registry
    }

    /// A resource by group, version and plural name.
    pub(crate) fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.by_gvr
            .get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// Every resource once per version.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.groups
            .iter()
            .flat_map(|g| g.versions.iter().flat_map(|(_, list)| list))
    }

    /// Whether another definition or built-in kind of the group already uses a kind or plural name.
    pub(crate) fn name_taken(&self, crd: &Value) -> Option<String> {
        let names = &crd["spec"]["names"];
        let (plural, kind) = (names["plural"].as_str()?, names["kind"].as_str()?);
        let group = crd["spec"]["group"].as_str()?;
        let own = crate::meta::name(crd);
        let other = |r: &Resource| r.group == group && r.custom.as_ref().is_none_or(|c| c.crd_name != own);
        self.all()
            .find(|r| other(r) && (r.kind == kind || r.plural == plural))
            .map(|r| {
                if r.kind == kind {
                    format!("{kind:?} is already in use")
                } else {
                    format!("{plural:?} is already in use")
                }
            })
    }
}

/// The registry as a cache over the store.
pub(crate) fn cache() -> Cached<Registry> {
    let prefix = format!("/{}/{}/", crd::GROUP, crd::PLURAL);
    Cached::new(
        vec![prefix.clone()],
        move |store: &dyn Store| -> Result<Registry, StoreError> {
            let snapshot = store.range(&prefix, None, 0)?;
            let mut custom = Vec::new();
            for entry in &snapshot.entries {
                match serde_json::from_slice::<Value>(&entry.value) {
                    Ok(crd) => custom.extend(crd::resources(&crd)),
                    Err(e) => tracing::error!(key = %entry.key, error = %e, "stored definition is not readable"),
                }
            }
            let newest = snapshot.entries.iter().map(|e| e.mod_rev).max().unwrap_or(0);
            Ok(Registry::build(custom, newest))
        },
    )
}
