//! How lists and maps of built-in kinds merge: by key, as a set, or as a whole.
//!
//! Two tables, because the API has two: strategic merge patches identify a container port by its number alone, server-side apply
//! by number and protocol.

/// How a list merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListKind<'a> {
    /// Items are identified by these fields.
    Map(&'a [&'a str]),
    /// Items are scalars that appear once.
    Set,
    /// The list is one value.
    Atomic,
}

/// Strategic merge: the key of a list at a path of field names (list items add nothing to the path).
pub(crate) fn strategic(kind: &str, path: &[&str]) -> ListKind<'static> {
    let parent = if path.len() >= 2 { path[path.len() - 2] } else { "" };
    match path.last().copied().unwrap_or_default() {
        "containers" | "initContainers" | "ephemeralContainers" if parent == "spec" => ListKind::Map(&["name"]),
        "volumes" if parent == "spec" => ListKind::Map(&["name"]),
        "env" | "imagePullSecrets" | "webhooks" | "resourceClaims" | "schedulingGates" | "matchConditions" => {
            ListKind::Map(&["name"])
        }
        "secrets" if kind == "ServiceAccount" => ListKind::Map(&["name"]),
        "volumeMounts" => ListKind::Map(&["mountPath"]),
        "volumeDevices" => ListKind::Map(&["devicePath"]),
        "ports" if matches!(parent, "containers" | "initContainers" | "ephemeralContainers") => {
            ListKind::Map(&["containerPort"])
        }
        "ports" if kind == "Service" && parent == "spec" => ListKind::Map(&["port"]),
        "hostAliases" => ListKind::Map(&["ip"]),
        "topologySpreadConstraints" => ListKind::Map(&["topologyKey"]),
        "conditions" if parent == "status" => ListKind::Map(&["type"]),
        "addresses" if kind == "Node" => ListKind::Map(&["type"]),
        "podIPs" | "hostIPs" if parent == "status" => ListKind::Map(&["ip"]),
        "taints" => ListKind::Map(&["key"]),
        "ownerReferences" => ListKind::Map(&["uid"]),
        "finalizers" => ListKind::Set,
        "podCIDRs" => ListKind::Set,
        _ => ListKind::Atomic,
    }
}

/// Server-side apply: the kind of a list of a built-in object.
pub(crate) fn apply_list(kind: &str, path: &[&str]) -> ListKind<'static> {
    let parent = if path.len() >= 2 { path[path.len() - 2] } else { "" };
    match path.last().copied().unwrap_or_default() {
        "ports" if matches!(parent, "containers" | "initContainers" | "ephemeralContainers") => {
            ListKind::Map(&["containerPort", "protocol"])
        }
        "ports" if kind == "Service" && parent == "spec" => ListKind::Map(&["port", "protocol"]),
        "topologySpreadConstraints" => ListKind::Map(&["topologyKey", "whenUnsatisfiable"]),
        "taints" => ListKind::Atomic,
        "conditions" if kind == "CustomResourceDefinition" || parent == "status" => ListKind::Map(&["type"]),
        _ => strategic(kind, path),
    }
}

/// Server-side apply: whether a map of a built-in object is one value.
pub(crate) fn apply_map_atomic(kind: &str, path: &[&str]) -> bool {
    let parent = if path.len() >= 2 { path[path.len() - 2] } else { "" };
    match path.last().copied().unwrap_or_default() {
        "selector" => matches!(
            kind,
            "Deployment"
                | "ReplicaSet"
                | "StatefulSet"
                | "DaemonSet"
                | "Job"
                | "Service"
                | "ReplicationController"
                | "PodDisruptionBudget"
        ),
        "nodeSelector"
        | "labelSelector"
        | "podSelector"
        | "namespaceSelector"
        | "objectSelector"
        | "fieldRef"
        | "resourceFieldRef"
        | "secretKeyRef"
        | "configMapKeyRef"
        | "secretRef"
        | "claimRef"
        | "localObjectReference"
        | "roleRef"
        | "targetRef"
        | "involvedObject" => true,
        "limits" | "requests" => false,
        "service" => parent == "backend",
        _ => false,
    }
}
