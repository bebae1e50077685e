//! Pods: defaults, the ServiceAccount admission with its token volume, priorities, validation.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{ensure, items_mut, set_default};
use crate::error::{ApiError, ApiResult, Cause};
use crate::meta;
use crate::names;
use crate::server::ApiServer;

const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Defaults of a pod spec; in templates the service account stays open.
pub(super) fn default_spec(spec: &mut Value, template: bool) {
    if !spec.is_object() {
        return;
    }
    set_default(spec, "restartPolicy", "Always");
    set_default(spec, "terminationGracePeriodSeconds", 30);
    set_default(spec, "dnsPolicy", "ClusterFirst");
    set_default(spec, "securityContext", json!({}));
    set_default(spec, "schedulerName", "default-scheduler");
    // The old name of the field follows the new one.
    let account = spec["serviceAccountName"]
        .as_str()
        .filter(|s| !s.is_empty())
        .or(spec["serviceAccount"].as_str().filter(|s| !s.is_empty()));
    if let Some(name) = account.map(str::to_owned) {
        spec["serviceAccountName"] = name.clone().into();
        spec["serviceAccount"] = name.into();
    }
    if !template {
        set_default(spec, "enableServiceLinks", true);
    }
    for field in ["initContainers", "containers", "ephemeralContainers"] {
        for c in items_mut(spec, field) {
            container(c);
        }
    }
    for v in items_mut(spec, "volumes") {
        volume(v);
    }
}

fn container(c: &mut Value) {
    let image = c["image"].as_str().unwrap_or_default();
    let tail = image.rsplit('/').next().unwrap_or_default();
    let pinned = image.contains('@');
    let latest = !pinned && (!tail.contains(':') || tail.ends_with(":latest"));
    set_default(c, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    set_default(c, "terminationMessagePath", "/dev/termination-log");
    set_default(c, "terminationMessagePolicy", "File");
    set_default(c, "resources", json!({}));
    for port in items_mut(c, "ports") {
        set_default(port, "protocol", "TCP");
    }
    for env in items_mut(c, "env") {
        if env["valueFrom"]["fieldRef"].is_object() {
            set_default(&mut env["valueFrom"]["fieldRef"], "apiVersion", "v1");
        }
    }
    for field in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = c.get_mut(field).filter(|p| p.is_object()) else {
            continue;
        };
        set_default(probe, "timeoutSeconds", 1);
        set_default(probe, "periodSeconds", 10);
        set_default(probe, "successThreshold", 1);
        set_default(probe, "failureThreshold", 3);
        http_get(&mut probe["httpGet"]);
        if probe["httpGet"].is_null()
            && let Some(p) = probe.as_object_mut()
        {
            p.shift_remove("httpGet");
        }
        if probe["grpc"].is_object() {
            set_default(&mut probe["grpc"], "service", "");
        }
    }
    for hook in ["postStart", "preStop"] {
        if c["lifecycle"][hook]["httpGet"].is_object() {
            http_get(&mut c["lifecycle"][hook]["httpGet"]);
        }
    }
    // Indexing a missing field above may have left nulls behind.
    if let Some(map) = c.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
    // Limits are requests unless said otherwise.
    let limits = c["resources"]["limits"].as_object().cloned().unwrap_or_default();
    if !limits.is_empty() {
        let resources = &mut c["resources"];
        ensure(resources, "requests");
        for (k, v) in limits {
            set_default(&mut resources["requests"], &k, v);
        }
    }
}

fn http_get(get: &mut Value) {
    if get.is_object() {
        set_default(get, "path", "/");
        set_default(get, "scheme", "HTTP");
    }
}

fn volume(v: &mut Value) {
    let sources = v.as_object().map_or(0, |m| m.keys().filter(|k| *k != "name").count());
    if sources == 0 {
        v["emptyDir"] = json!({});
    }
    let Some(map) = v.as_object_mut() else { return };
    for kind in ["secret", "configMap", "downwardAPI", "projected"] {
        let Some(source) = map.get_mut(kind).filter(|s| s.is_object()) else {
            continue;
        };
        set_default(source, "defaultMode", 420);
        for item in items_mut(source, "items") {
            if item["fieldRef"].is_object() {
                set_default(&mut item["fieldRef"], "apiVersion", "v1");
            }
            if let Some(m) = item.as_object_mut() {
                m.retain(|_, v| !v.is_null());
            }
        }
        for projection in items_mut(source, "sources") {
            if let Some(token) = projection.get_mut("serviceAccountToken").filter(|t| t.is_object()) {
                set_default(token, "expirationSeconds", 3600);
            }
            if let Some(down) = projection.get_mut("downwardAPI").filter(|d| d.is_object()) {
                for item in items_mut(down, "items") {
                    if let Some(field) = item.get_mut("fieldRef").filter(|f| f.is_object()) {
                        set_default(field, "apiVersion", "v1");
                    }
                }
            }
        }
    }
    if let Some(host) = map.get_mut("hostPath").filter(|h| h.is_object()) {
        set_default(host, "type", "");
    }
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub(super) fn qos_class(spec: &Value) -> &'static str {
    let (mut any, mut all) = (false, true);
    let containers = ["containers", "initContainers"]
        .iter()
        .flat_map(|f| spec[*f].as_array().into_iter().flatten());
    for c in containers {
        for resource in ["cpu", "memory"] {
            let limit = &c["resources"]["limits"][resource];
            let request = &c["resources"]["requests"][resource];
            any |= !limit.is_null() || !request.is_null();
            all &= !limit.is_null() && (request.is_null() || request == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        _ => "Burstable",
    }
}

/// ServiceAccount and Priority admission of a new pod.
pub(super) fn admit(server: &ApiServer, pod: &mut Value) -> ApiResult<()> {
    let namespace = meta::namespace(pod).to_owned();
    let name = match meta::name(pod) {
        "" => meta::text(pod, "generateName").to_owned(),
        n => n.to_owned(),
    };
    // Mirror pods of a node agent have no account.
    let mirror = !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null();
    let spec = &mut pod["spec"];
    if !mirror {
        if spec["serviceAccountName"].as_str().unwrap_or_default().is_empty() {
            spec["serviceAccountName"] = "default".into();
            spec["serviceAccount"] = "default".into();
        }
        let account_name = spec["serviceAccountName"].as_str().unwrap_or_default().to_owned();
        let (entry, _) = server
            .store()
            .get(&format!("/core/serviceaccounts/{namespace}/{account_name}"))?;
        let Some(entry) = entry else {
            let why = format!(
                "error looking up service account {namespace}/{account_name}: serviceaccount {account_name:?} not found"
            );
            return Err(ApiError::forbidden("", "pods", &name, &why));
        };
        let account: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
        let mount = spec["automountServiceAccountToken"]
            .as_bool()
            .or(account["automountServiceAccountToken"].as_bool())
            .unwrap_or(true);
        if mount {
            mount_token(spec);
        }
        if spec["imagePullSecrets"].as_array().is_none_or(Vec::is_empty)
            && account["imagePullSecrets"].as_array().is_some_and(|l| !l.is_empty())
        {
            spec["imagePullSecrets"] = account["imagePullSecrets"].clone();
        }
    }
    let class = spec["priorityClassName"].as_str().unwrap_or_default().to_owned();
    let mut priority = json!(0);
    let mut preemption = json!("PreemptLowerPriority");
    if !class.is_empty() {
        let (entry, _) = server
            .store()
            .get(&format!("/scheduling.k8s.io/priorityclasses/{class}"))?;
        let Some(entry) = entry else {
            let why = format!("no PriorityClass with name {class} was found");
            return Err(ApiError::forbidden("", "pods", &name, &why));
        };
        let found: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
        priority = found["value"].clone();
        if found["preemptionPolicy"].is_string() {
            preemption = found["preemptionPolicy"].clone();
        }
    }
    set_default(spec, "priority", priority);
    set_default(spec, "preemptionPolicy", preemption);
    // As the DefaultTolerationSeconds admission does.
    if !spec["tolerations"].is_array() {
        spec["tolerations"] = json!([]);
    }
    if let Some(list) = spec["tolerations"].as_array_mut() {
        for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
            let covered = list.iter().any(|t| {
                (t["key"].as_str() == Some(key) || t["key"].is_null())
                    && matches!(t["effect"].as_str(), None | Some("" | "NoExecute"))
            });
            if !covered {
                list.push(json!({"effect": "NoExecute", "key": key, "operator": "Exists", "tolerationSeconds": 300}));
            }
        }
    }
    Ok(())
}

/// Mounts the account's token, the cluster's root certificate and the namespace, unless the pod mounts something there.
fn mount_token(spec: &mut Value) {
    let existing = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|v| v["name"].as_str())
        .find(|n| n.starts_with("kube-api-access-"))
        .map(str::to_owned);
    let volume = existing
        .clone()
        .unwrap_or_else(|| format!("kube-api-access-{}", names::random_suffix(5)));
    let mut used = false;
    for field in ["initContainers", "containers"] {
        for c in items_mut(spec, field) {
            let taken = c["volumeMounts"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|m| m["mountPath"].as_str() == Some(TOKEN_MOUNT));
            if taken {
                continue;
            }
            if !c["volumeMounts"].is_array() {
                c["volumeMounts"] = json!([]);
            }
            if let Some(list) = c["volumeMounts"].as_array_mut() {
                list.push(json!({"mountPath": TOKEN_MOUNT, "name": volume, "readOnly": true}));
                used = true;
            }
        }
    }
    if used && existing.is_none() {
        if !spec["volumes"].is_array() {
            spec["volumes"] = json!([]);
        }
        if let Some(list) = spec["volumes"].as_array_mut() {
            list.push(json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ]}}));
        }
    }
}

/// Checks a pod.
pub(super) fn validate(pod: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    validate_spec(&pod["spec"], "spec", causes);
    let Some(old) = old else { return };
    // Of a running pod only a few fields may change.
    let frozen = |v: &Value| {
        let mut s = v["spec"].clone();
        for field in ["containers", "initContainers"] {
            for c in items_mut(&mut s, field) {
                if let Some(m) = c.as_object_mut() {
                    m.shift_remove("image");
                    m.shift_remove("resources");
                    m.shift_remove("imagePullPolicy");
                }
            }
        }
        if let Some(m) = s.as_object_mut() {
            for f in [
                "activeDeadlineSeconds",
                "tolerations",
                "terminationGracePeriodSeconds",
                "schedulingGates",
                "ephemeralContainers",
                "nodeSelector",
            ] {
                m.shift_remove(f);
            }
        }
        s
    };
    if frozen(pod) != frozen(old) {
        let why = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
        causes.push(Cause::forbidden("spec", why));
    }
}

/// Checks a pod spec at a path.
pub(super) fn validate_spec(spec: &Value, at: &str, causes: &mut Vec<Cause>) {
    let containers = spec["containers"].as_array().map(Vec::as_slice).unwrap_or_default();
    if containers.is_empty() {
        causes.push(Cause::required(format!("{at}.containers"), ""));
    }
    let mut volumes = HashSet::new();
    for (i, v) in spec["volumes"].as_array().into_iter().flatten().enumerate() {
        let here = format!("{at}.volumes[{i}]");
        let name = v["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            causes.push(Cause::required(format!("{here}.name"), ""));
        } else if !names::is_dns1123_label(name) {
            causes.push(Cause::invalid(format!("{here}.name"), &v["name"], names::LABEL_MSG));
        } else if !volumes.insert(name.to_owned()) {
            causes.push(Cause::duplicate(format!("{here}.name"), &v["name"]));
        }
        if v.as_object().map_or(0, |m| m.keys().filter(|k| *k != "name").count()) > 1 {
            causes.push(Cause::forbidden(here, "may not specify more than 1 volume type"));
        }
    }
    let mut seen = HashSet::new();
    for field in ["initContainers", "containers"] {
        for (i, c) in spec[field].as_array().into_iter().flatten().enumerate() {
            validate_container(c, &format!("{at}.{field}[{i}]"), &mut seen, &volumes, causes);
        }
    }
    let choices: &[(&str, &[&str])] = &[
        ("restartPolicy", &["Always", "Never", "OnFailure"]),
        (
            "dnsPolicy",
            &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        ),
    ];
    for (field, allowed) in choices {
        let value = &spec[*field];
        if !value.is_null() && !allowed.contains(&value.as_str().unwrap_or_default()) {
            causes.push(Cause::not_supported(format!("{at}.{field}"), value, allowed));
        }
    }
    if spec["terminationGracePeriodSeconds"].as_i64().is_some_and(|n| n < 0) {
        let why = "must be greater than or equal to 0";
        causes.push(Cause::invalid(
            format!("{at}.terminationGracePeriodSeconds"),
            &spec["terminationGracePeriodSeconds"],
            why,
        ));
    }
    if let Some(name) = spec["serviceAccountName"].as_str().filter(|n| !n.is_empty())
        && !names::is_dns1123_subdomain(name)
    {
        causes.push(Cause::invalid(
            format!("{at}.serviceAccountName"),
            &spec["serviceAccountName"],
            names::SUBDOMAIN_MSG,
        ));
    }
    if let Some(host) = spec["hostname"].as_str().filter(|h| !h.is_empty())
        && !names::is_dns1123_label(host)
    {
        causes.push(Cause::invalid(
            format!("{at}.hostname"),
            &spec["hostname"],
            names::LABEL_MSG,
        ));
    }
}

fn validate_container(
    c: &Value,
    at: &str,
    seen: &mut HashSet<String>,
    volumes: &HashSet<String>,
    causes: &mut Vec<Cause>,
) {
    let name = c["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        causes.push(Cause::required(format!("{at}.name"), ""));
    } else if !names::is_dns1123_label(name) {
        causes.push(Cause::invalid(format!("{at}.name"), &c["name"], names::LABEL_MSG));
    } else if !seen.insert(name.to_owned()) {
        causes.push(Cause::duplicate(format!("{at}.name"), &c["name"]));
    }
    match c["image"].as_str() {
        None | Some("") => causes.push(Cause::required(format!("{at}.image"), "")),
        Some(i) if i.trim() != i => causes.push(Cause::invalid(
            format!("{at}.image"),
            &c["image"],
            "must not have leading or trailing whitespace",
        )),
        _ => {}
    }
    let policies = ["Always", "IfNotPresent", "Never"];
    if !c["imagePullPolicy"].is_null() && !policies.contains(&c["imagePullPolicy"].as_str().unwrap_or_default()) {
        causes.push(Cause::not_supported(
            format!("{at}.imagePullPolicy"),
            &c["imagePullPolicy"],
            &policies,
        ));
    }
    let mut port_names = HashSet::new();
    for (i, port) in c["ports"].as_array().into_iter().flatten().enumerate() {
        let here = format!("{at}.ports[{i}]");
        match &port["containerPort"] {
            Value::Null => causes.push(Cause::required(format!("{here}.containerPort"), "")),
            v if !v.as_i64().is_some_and(|p| (1..=65535).contains(&p)) => {
                causes.push(Cause::invalid(
                    format!("{here}.containerPort"),
                    v,
                    "must be between 1 and 65535, inclusive",
                ));
            }
            _ => {}
        }
        let protocols = ["SCTP", "TCP", "UDP"];
        if !port["protocol"].is_null() && !protocols.contains(&port["protocol"].as_str().unwrap_or_default()) {
            causes.push(Cause::not_supported(
                format!("{here}.protocol"),
                &port["protocol"],
                &protocols,
            ));
        }
        if let Some(n) = port["name"].as_str().filter(|n| !n.is_empty()) {
            if !super::service::port_name(n) {
                let why = if n.len() > 15 {
                    "must be no more than 15 characters"
                } else {
                    "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
                };
                causes.push(Cause::invalid(format!("{here}.name"), &port["name"], why));
            } else if !port_names.insert(n.to_owned()) {
                causes.push(Cause::duplicate(format!("{here}.name"), &port["name"]));
            }
        }
    }
    for (i, env) in c["env"].as_array().into_iter().flatten().enumerate() {
        let here = format!("{at}.env[{i}]");
        match env["name"].as_str() {
            None | Some("") => causes.push(Cause::required(format!("{here}.name"), "")),
            Some(n) if n.contains('=') => {
                causes.push(Cause::invalid(
                    format!("{here}.name"),
                    &env["name"],
                    "a valid environment variable name must consist only of printable ASCII characters other than '='",
                ));
            }
            _ => {}
        }
        if env["valueFrom"].is_object() && env["value"].as_str().is_some_and(|v| !v.is_empty()) {
            let why = "may not be specified when `value` is not empty";
            causes.push(Cause::invalid(format!("{here}.valueFrom"), &json!(""), why));
        }
    }
    let mut paths = HashSet::new();
    for (i, m) in c["volumeMounts"].as_array().into_iter().flatten().enumerate() {
        let here = format!("{at}.volumeMounts[{i}]");
        match m["name"].as_str() {
            None | Some("") => causes.push(Cause::required(format!("{here}.name"), "")),
            Some(n) if !volumes.contains(n) => causes.push(Cause::not_found(format!("{here}.name"), &m["name"])),
            _ => {}
        }
        match m["mountPath"].as_str() {
            None | Some("") => causes.push(Cause::required(format!("{here}.mountPath"), "")),
            Some(p) if !paths.insert(p.to_owned()) => causes.push(Cause::invalid(
                format!("{here}.mountPath"),
                &m["mountPath"],
                "must be unique",
            )),
            _ => {}
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let p = &c[probe];
        if !p.is_object() {
            continue;
        }
        let handlers = ["exec", "httpGet", "tcpSocket", "grpc"]
            .iter()
            .filter(|h| p[**h].is_object())
            .count();
        match handlers {
            0 => causes.push(Cause::required(format!("{at}.{probe}"), "must specify a handler type")),
            1 => {}
            _ => causes.push(Cause::forbidden(
                format!("{at}.{probe}"),
                "may not specify more than 1 handler type",
            )),
        }
        if probe != "readinessProbe" && p["successThreshold"].as_i64().is_some_and(|n| n != 1) {
            causes.push(Cause::invalid(
                format!("{at}.{probe}.successThreshold"),
                &p["successThreshold"],
                "must be 1",
            ));
        }
    }
}
