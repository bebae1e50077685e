//! OpenAPI v3: an index, and per group and version the documents that kubectl reads.
//!
//! Paths tell kubectl that the server validates fields; component schemas serve `kubectl explain`. PATCH has no request body on
//! purpose: if it listed strategic merge patches, kubectl would take merge keys from here instead of its own tables.

use serde_json::{Map, Value, json};

use crate::kinds;
use crate::registry::Registry;
use crate::resources::{Resource, join_gv};

fn url_of(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// `/openapi/v3`.
pub(crate) fn index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for g in &registry.groups {
        for (v, _) in &g.versions {
            let at = url_of(&g.name, v);
            let custom = g.versions.iter().any(|(_, l)| l.iter().any(|r| r.custom.is_some()));
            let hash = if custom {
                registry.digest.as_str()
            } else {
                env!("CARGO_PKG_VERSION")
            };
            let url = format!("/openapi/v3/{at}?hash={hash}");
            paths.insert(at, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// Media type in which kubectl asks for OpenAPI v2.
pub(crate) const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";

/// `/openapi/v2`: a document without paths or definitions. kubectl asks for it only where v3 has no answer (a kind that nobody
/// serves) and then needs to learn "unknown", not "broken".
pub(crate) fn v2(protobuf: bool) -> Vec<u8> {
    let (title, version) = ("Kubernetes", crate::GIT_VERSION);
    if !protobuf {
        return json!({"swagger": "2.0", "info": {"title": title, "version": version}, "paths": {}})
            .to_string()
            .into();
    }
    // Document { swagger = 1, info = 2 { title = 1, version = 2 }, paths = 8 }; all texts are shorter than 128 bytes.
    let text = |field: u8, bytes: &[u8]| {
        let mut out = vec![field << 3 | 2, bytes.len() as u8];
        out.extend_from_slice(bytes);
        out
    };
    let info = [text(1, title.as_bytes()), text(2, version.as_bytes())].concat();
    [text(1, b"2.0"), text(2, &info), text(8, b"")].concat()
}

/// `/openapi/v3/apis/G/V`.
pub(crate) fn document(group: &str, version: &str, resources: &[std::sync::Arc<Resource>]) -> Value {
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for r in resources {
        let name = schema_name(r);
        if let Some(custom) = &r.custom {
            let mut schema = custom.schema.clone();
            if let Some(properties) = schema["properties"].as_object_mut() {
                properties.entry("apiVersion").or_insert(json!({"type": "string"}));
                properties.entry("kind").or_insert(json!({"type": "string"}));
                properties.insert(
                    "metadata".into(),
                    json!({"allOf": [{"$ref": format!("#/components/schemas/{}", kinds::OBJECT_META)}]}),
                );
            }
            schema["x-kubernetes-group-version-kind"] =
                json!([{"group": r.group, "version": r.version, "kind": r.kind}]);
            schemas.insert(name.clone(), schema);
            kinds::collect(kinds::OBJECT_META, &mut schemas);
        } else if let Some(definition) = kinds::definition_name(&r.group, &r.version, &r.kind) {
            kinds::collect(&definition, &mut schemas);
            if let Some(schema) = schemas.get_mut(&definition) {
                schema["x-kubernetes-group-version-kind"] =
                    json!([{"group": r.group, "version": r.version, "kind": r.kind}]);
            }
        }
        add_paths(r, &name, &mut paths);
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": crate::GIT_VERSION},
        "paths": paths,
        "components": {"schemas": schemas},
        "x-mantlet-group-version": join_gv(group, version),
    })
}

fn schema_name(r: &Resource) -> String {
    kinds::definition_name(&r.group, &r.version, &r.kind).unwrap_or_else(|| {
        let reversed: Vec<&str> = r.group.split('.').rev().collect();
        format!("{}.{}.{}", reversed.join("."), r.version, r.kind)
    })
}

fn add_paths(r: &Resource, schema: &str, paths: &mut Map<String, Value>) {
    let base = if r.group.is_empty() {
        format!("/api/{}", r.version)
    } else {
        format!("/apis/{}/{}", r.group, r.version)
    };
    let collection = if r.namespaced {
        format!("{base}/namespaces/{{namespace}}/{}", r.plural)
    } else {
        format!("{base}/{}", r.plural)
    };
    let gvk = json!({"group": r.group, "version": r.version, "kind": r.kind});
    let parameters = |names: &[&str]| -> Vec<Value> {
        names
            .iter()
            .map(|n| json!({"name": n, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
            .collect()
    };
    let write = ["pretty", "dryRun", "fieldManager", "fieldValidation"];
    let reply = json!({"200": {"description": "OK", "content": {"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}}}});
    let op = |action: &str, params: &[&str]| json!({"x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk, "parameters": parameters(params), "responses": reply});
    let mut on_collection = Map::new();
    if r.has_verb("list") {
        on_collection.insert(
            "get".into(),
            op("list", &["labelSelector", "fieldSelector", "limit", "watch"]),
        );
    }
    if r.has_verb("create") {
        on_collection.insert("post".into(), op("post", &write));
    }
    paths.insert(collection.clone(), Value::Object(on_collection));
    if r.has_verb("get") {
        let item = json!({
            "get": op("get", &["pretty"]),
            "put": op("put", &write),
            "patch": op("patch", &["pretty", "dryRun", "fieldManager", "fieldValidation", "force"]),
            "delete": op("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"]),
        });
        paths.insert(format!("{collection}/{{name}}"), item);
    }
}
