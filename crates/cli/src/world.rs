//! The world as the control plane sees it, from files or from a cluster, for every command that asks what configuration
//! means.
//!
//! Reading itself is `translate`'s ([`World::of_objects`], [`World::set_object`]); here is only where objects come from and where
//! in the files they stood. Nothing is decided here.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use mantlet_api::MeshConfig;
use mantlet_api::mesh_config::{CONFIG_KEY, CONFIG_MAP};
use mantlet_translate::mesh::Mesh as MeshSettings;
use mantlet_translate::world::{Kind, World};
use serde_json::Value;

use crate::files::Document;
use crate::inspect::Mesh;

/// Namespace of objects in files that name none, unless the user says otherwise.
pub const DEFAULT_NAMESPACE: &str = "default";
/// Namespace of the control plane, unless the user says otherwise.
pub const ISTIO_NAMESPACE: &str = "istio-system";
/// Objects asked for at a time.
const PAGE: u32 = 500;

/// Where something stood in the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File, as the user named it.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A world read from files. It is used as the [`World`] that it holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The world.
    pub world: World,
    /// What could not be read, with its place.
    pub problems: Vec<String>,
    /// Documents by kind, namespace and name.
    documents: BTreeMap<(String, String, String), Document>,
}

impl Loaded {
    /// The document of an object; `None` for a cluster's.
    pub fn document(&self, kind: &str, namespace: &str, name: &str) -> Option<&Document> {
        self.documents
            .get(&(kind.to_string(), namespace.to_string(), name.to_string()))
    }

    /// Where a field of an object (`spec.rules[1]`), or the nearest thing around it, stood; `None` for a cluster's.
    pub fn place(&self, kind: &str, namespace: &str, name: &str, field: &str) -> Option<Place> {
        let document = self.document(kind, namespace, name)?;
        Some(Place {
            file: document.file.clone(),
            line: document.position(field).0,
        })
    }
}

impl From<World> for Loaded {
    fn from(world: World) -> Loaded {
        Loaded {
            world,
            ..Loaded::default()
        }
    }
}

impl Deref for Loaded {
    type Target = World;
    fn deref(&self) -> &World {
        &self.world
    }
}

/// The world that documents describe. Deployments and other makers of pods stand for one pod each where no pod of theirs
/// is given; mesh settings come from ConfigMap `istio` or an IstioOperator; objects without a namespace belong to
/// `default_namespace`.
pub fn from_documents(documents: &[Document], default_namespace: &str) -> Loaded {
    let (world, unreadable) = World::of_objects(documents.iter().map(|d| &d.value), default_namespace);
    let text = |value: &Value, pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_string()
    };
    let mut by_name = BTreeMap::new();
    for document in documents {
        let mut namespace = text(&document.value, "/metadata/namespace");
        if namespace.is_empty() {
            namespace = default_namespace.to_string();
        }
        let key = (
            text(&document.value, "/kind"),
            namespace,
            text(&document.value, "/metadata/name"),
        );
        by_name.entry(key).or_insert_with(|| document.clone());
    }
    Loaded {
        problems: unreadable.iter().map(ToString::to_string).collect(),
        world,
        documents: by_name,
    }
}

/// The world of files and directories (`-` is stdin).
///
/// # Errors
/// A file cannot be read or is no YAML.
pub fn from_files(paths: &[PathBuf], default_namespace: &str) -> Result<Loaded> {
    let documents = crate::files::load(paths)?;
    Ok(from_documents(&documents, default_namespace))
}

/// The world of the running cluster, as the control plane in `istio-system` sees it.
///
/// # Errors
/// The API server refuses a read, or the mesh settings cannot be read.
pub async fn from_cluster(mesh: &Mesh) -> Result<World> {
    from_client(&mesh.client, ISTIO_NAMESPACE).await
}

/// The world of a cluster whose control plane runs in `istio_namespace`.
///
/// # Errors
/// As [`from_cluster`].
pub async fn from_client(client: &kube::Client, istio_namespace: &str) -> Result<World> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), istio_namespace);
    let text = maps
        .get_opt(CONFIG_MAP)
        .await?
        .and_then(|map| map.data.and_then(|mut data| data.remove(CONFIG_KEY)))
        .unwrap_or_default();
    let config = match MeshConfig::read(&text) {
        Ok((config, _warnings)) => config,
        Err(problem) => anyhow::bail!("ConfigMap {CONFIG_MAP} in {istio_namespace}, key {CONFIG_KEY}: {problem}"),
    };
    let mut world = World::new(MeshSettings::from_config(&config));
    for service in all::<Service>(Api::all(client.clone())).await? {
        world.set_service(&service);
    }
    for pod in all::<Pod>(Api::all(client.clone())).await? {
        world.set_pod(&pod);
    }
    for slice in all::<EndpointSlice>(Api::all(client.clone())).await? {
        world.set_slice(&slice);
    }
    for kind in Kind::ALL {
        let (group, version, plural) = kind.resource();
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.name()), plural);
        match all::<DynamicObject>(Api::all_with(client.clone(), &resource)).await {
            Ok(list) => {
                for object in list {
                    world.set_config(kind, &serde_json::to_value(&object)?);
                }
            }
            // A cluster without Istio's CRDs has none of these objects.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("listing {plural}.{group}")),
        }
    }
    Ok(world)
}

/// All objects of a kind, page by page.
async fn all<K>(api: Api<K>) -> Result<Vec<K>, kube::Error>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let mut out = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await?;
        out.extend(list.items);
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    #[test]
    fn documents_make_a_world_that_knows_their_places() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports:\n  - port: 80\n";
        let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "other"}, "spec": {}});
        let loaded = from_documents(
            &[
                Document {
                    file: "dir/a.yaml".into(),
                    line: 11,
                    text: Arc::from(text),
                    value: mantlet_api::yaml::read_one(text).expect("YAML"),
                },
                Document {
                    file: "b.yaml".into(),
                    line: 1,
                    text: Arc::from(policy.to_string()),
                    value: policy,
                },
            ],
            "shop",
        );
        assert!(loaded.service("web.shop.svc.cluster.local", "shop").is_some());
        let place = loaded.place("Service", "shop", "web", "spec.ports[0]").expect("known");
        assert_eq!(place.to_string(), "dir/a.yaml:17");
        assert!(loaded.place("AuthorizationPolicy", "other", "p", "spec").is_some());
        assert!(loaded.place("Service", "default", "web", "").is_none());
        assert!(loaded.problems.is_empty());
    }
}
