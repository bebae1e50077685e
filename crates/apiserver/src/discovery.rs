//! Discovery: which groups, versions and resources there are, aggregated (v2, v2beta1) and plain.
//!
//! Pure functions of the registry; routed by `crate::server`.

use serde_json::{Value, json};

use crate::registry::{Group, Registry};
use crate::resources::{Resource, join_gv};

fn subresource_kind(resource: &Resource, sub: &str) -> (String, String, String, Vec<&'static str>) {
    let own = (resource.group.clone(), resource.version.clone(), resource.kind.clone());
    let (g, v, k) = match sub {
        "scale" => ("autoscaling".into(), "v1".into(), "Scale".into()),
        "eviction" => ("policy".into(), "v1".into(), "Eviction".into()),
        "binding" => (String::new(), "v1".into(), "Binding".into()),
        "token" => ("authentication.k8s.io".into(), "v1".into(), "TokenRequest".into()),
        "exec" => (String::new(), "v1".into(), "PodExecOptions".into()),
        "attach" => (String::new(), "v1".into(), "PodAttachOptions".into()),
        "portforward" => (String::new(), "v1".into(), "PodPortForwardOptions".into()),
        "proxy" => (String::new(), "v1".into(), format!("{}ProxyOptions", resource.kind)),
        _ => own,
    };
    let verbs: Vec<&'static str> = match sub {
        "status" | "scale" | "ephemeralcontainers" | "resize" | "approval" => vec!["get", "patch", "update"],
        "log" => vec!["get"],
        "exec" | "attach" | "portforward" => vec!["create", "get"],
        "proxy" => vec!["create", "delete", "get", "patch", "update"],
        "finalize" => vec!["update"],
        _ => vec!["create"],
    };
    (g, v, k, verbs)
}

/// `/api/v1` and `/apis/G/V`: APIResourceList.
pub(crate) fn resource_list(group: &str, version: &str, resources: &[std::sync::Arc<Resource>]) -> Value {
    let mut out = Vec::new();
    for r in resources {
        let mut item = json!({
            "name": r.plural, "singularName": r.singular, "namespaced": r.namespaced, "kind": r.kind, "verbs": r.verbs,
        });
        if !r.short_names.is_empty() {
            item["shortNames"] = json!(r.short_names);
        }
        if !r.categories.is_empty() {
            item["categories"] = json!(r.categories);
        }
        out.push(item);
        for sub in &r.subresources {
            let (g, v, k, verbs) = subresource_kind(r, sub);
            let mut item = json!({
                "name": format!("{}/{sub}", r.plural), "singularName": "", "namespaced": r.namespaced, "kind": k, "verbs": verbs,
            });
            if (g.as_str(), v.as_str()) != (r.group.as_str(), r.version.as_str()) {
                item["group"] = g.into();
                item["version"] = v.into();
            }
            out.push(item);
        }
    }
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": join_gv(group, version), "resources": out})
}

fn group_json(group: &Group) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|(v, _)| json!({"groupVersion": join_gv(&group.name, v), "version": v}))
        .collect();
    json!({"name": group.name, "versions": versions, "preferredVersion": versions.first()})
}

/// `/apis`: APIGroupList.
pub(crate) fn group_list(registry: &Registry) -> Value {
    let groups: Vec<Value> = registry
        .groups
        .iter()
        .filter(|g| !g.name.is_empty())
        .map(group_json)
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/G`: APIGroup.
pub(crate) fn group(group: &Group) -> Value {
    let mut v = group_json(group);
    v["kind"] = "APIGroup".into();
    v["apiVersion"] = "v1".into();
    v
}

/// `/api`: APIVersions.
pub(crate) fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

/// Aggregated discovery of the core group (`/api`) or of all others (`/apis`).
pub(crate) fn aggregated(registry: &Registry, core: bool, version: &str) -> Value {
    let items: Vec<Value> = registry
        .groups
        .iter()
        .filter(|g| g.name.is_empty() == core)
        .map(|g| {
            let versions: Vec<Value> = g
                .versions
                .iter()
                .map(|(v, resources)| json!({"version": v, "freshness": "Current", "resources": resources.iter().map(|r| entry(r)).collect::<Vec<_>>()}))
                .collect();
            let metadata = if core { json!({"creationTimestamp": null}) } else { json!({"name": g.name, "creationTimestamp": null}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"), "metadata": {}, "items": items,
    })
}

fn entry(r: &Resource) -> Value {
    let mut item = json!({
        "resource": r.plural,
        "responseKind": {"group": r.group, "version": r.version, "kind": r.kind},
        "scope": if r.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": r.singular,
        "verbs": r.verbs,
    });
    if !r.short_names.is_empty() {
        item["shortNames"] = json!(r.short_names);
    }
    if !r.categories.is_empty() {
        item["categories"] = json!(r.categories);
    }
    if !r.subresources.is_empty() {
        item["subresources"] = r
            .subresources
            .iter()
            .map(|s| {
                let (group, version, kind, verbs) = subresource_kind(r, s);
                json!({"subresource": s, "responseKind": {"group": group, "version": version, "kind": kind}, "verbs": verbs})
            })
            .collect::<Vec<_>>()
            .into();
    }
    item
}
