//! Columns and cells of the built-in kinds.

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{age, human};

type Columns = &'static [(&'static str, i64)];

/// Column names with their priority (1: only with `-o wide`).
pub(super) fn of(group: &str, kind: &str) -> Columns {
    match (group, kind) {
        ("", "Pod") => &[
            ("Name", 0),
            ("Ready", 0),
            ("Status", 0),
            ("Restarts", 0),
            ("Age", 0),
            ("IP", 1),
            ("Node", 1),
            ("Nominated Node", 1),
            ("Readiness Gates", 1),
        ],
        ("apps", "Deployment") => &[
            ("Name", 0),
            ("Ready", 0),
            ("Up-to-date", 0),
            ("Available", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        ("apps", "ReplicaSet") | ("", "ReplicationController") => &[
            ("Name", 0),
            ("Desired", 0),
            ("Current", 0),
            ("Ready", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        ("apps", "StatefulSet") => &[("Name", 0), ("Ready", 0), ("Age", 0), ("Containers", 1), ("Images", 1)],
        ("apps", "DaemonSet") => &[
            ("Name", 0),
            ("Desired", 0),
            ("Current", 0),
            ("Ready", 0),
            ("Up-to-date", 0),
            ("Available", 0),
            ("Node Selector", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        ("apps", "ControllerRevision") => &[("Name", 0), ("Controller", 0), ("Revision", 0), ("Age", 0)],
        ("batch", "Job") => &[
            ("Name", 0),
            ("Status", 0),
            ("Completions", 0),
            ("Duration", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        ("batch", "CronJob") => &[
            ("Name", 0),
            ("Schedule", 0),
            ("Timezone", 0),
            ("Suspend", 0),
            ("Active", 0),
            ("Last Schedule", 0),
            ("Age", 0),
            ("Containers", 1),
            ("Images", 1),
            ("Selector", 1),
        ],
        ("", "Service") => &[
            ("Name", 0),
            ("Type", 0),
            ("Cluster-IP", 0),
            ("External-IP", 0),
            ("Port(s)", 0),
            ("Age", 0),
            ("Selector", 1),
        ],
        ("", "Namespace") => &[("Name", 0), ("Status", 0), ("Age", 0)],
        ("", "Node") => &[
            ("Name", 0),
            ("Status", 0),
            ("Roles", 0),
            ("Age", 0),
            ("Version", 0),
            ("Internal-IP", 1),
            ("External-IP", 1),
            ("OS-Image", 1),
            ("Kernel-Version", 1),
            ("Container-Runtime", 1),
        ],
        ("", "ConfigMap") => &[("Name", 0), ("Data", 0), ("Age", 0)],
        ("", "Secret") => &[("Name", 0), ("Type", 0), ("Data", 0), ("Age", 0)],
        ("", "ServiceAccount") => &[("Name", 0), ("Secrets", 0), ("Age", 0)],
        ("", "Endpoints") => &[("Name", 0), ("Endpoints", 0), ("Age", 0)],
        ("", "Event") => &[
            ("Last Seen", 0),
            ("Type", 0),
            ("Reason", 0),
            ("Object", 0),
            ("Subobject", 1),
            ("Source", 1),
            ("Message", 0),
            ("First Seen", 1),
            ("Count", 1),
            ("Name", 1),
        ],
        ("events.k8s.io", "Event") => of("", "Event"),
        ("", "PersistentVolumeClaim") => &[
            ("Name", 0),
            ("Status", 0),
            ("Volume", 0),
            ("Capacity", 0),
            ("Access Modes", 0),
            ("StorageClass", 0),
            ("VolumeAttributesClass", 0),
            ("Age", 0),
            ("VolumeMode", 1),
        ],
        ("discovery.k8s.io", "EndpointSlice") => &[
            ("Name", 0),
            ("AddressType", 0),
            ("Ports", 0),
            ("Endpoints", 0),
            ("Age", 0),
        ],
        ("rbac.authorization.k8s.io", "ClusterRole" | "Role") => &[("Name", 0), ("Created At", 0)],
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => &[
            ("Name", 0),
            ("Role", 0),
            ("Age", 0),
            ("Users", 1),
            ("Groups", 1),
            ("ServiceAccounts", 1),
        ],
        ("apiextensions.k8s.io", "CustomResourceDefinition") => &[("Name", 0), ("Created At", 0)],
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            &[("Name", 0), ("Webhooks", 0), ("Age", 0)]
        }
        ("coordination.k8s.io", "Lease") => &[("Name", 0), ("Holder", 0), ("Age", 0)],
        ("policy", "PodDisruptionBudget") => &[
            ("Name", 0),
            ("Min Available", 0),
            ("Max Unavailable", 0),
            ("Allowed Disruptions", 0),
            ("Age", 0),
        ],
        ("autoscaling", "HorizontalPodAutoscaler") => &[
            ("Name", 0),
            ("Reference", 0),
            ("Targets", 0),
            ("MinPods", 0),
            ("MaxPods", 0),
            ("Replicas", 0),
            ("Age", 0),
        ],
        ("networking.k8s.io", "Ingress") => &[
            ("Name", 0),
            ("Class", 0),
            ("Hosts", 0),
            ("Address", 0),
            ("Ports", 0),
            ("Age", 0),
        ],
        ("networking.k8s.io", "NetworkPolicy") => &[("Name", 0), ("Pod-Selector", 0), ("Age", 0)],
        ("scheduling.k8s.io", "PriorityClass") => &[
            ("Name", 0),
            ("Value", 0),
            ("Global-Default", 0),
            ("Age", 0),
            ("PreemptionPolicy", 0),
        ],
        ("storage.k8s.io", "StorageClass") => &[("Name", 0), ("Provisioner", 0), ("Age", 0)],
        ("certificates.k8s.io", "CertificateSigningRequest") => &[
            ("Name", 0),
            ("Age", 0),
            ("SignerName", 0),
            ("Requestor", 0),
            ("Condition", 0),
        ],
        _ => &[("Name", 0), ("Age", 0)],
    }
}

fn text(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn or(s: String, fallback: &str) -> String {
    if s.is_empty() { fallback.to_owned() } else { s }
}

fn int(v: &Value) -> i64 {
    v.as_i64().unwrap_or(0)
}

fn list(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}

fn containers(template: &Value, field: &str) -> String {
    list(&template["spec"]["containers"])
        .map(|c| text(&c[field]))
        .collect::<Vec<_>>()
        .join(",")
}

fn selector(s: &Value) -> String {
    let mut parts: Vec<String> = s["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", text(v)))
        .collect();
    parts.sort();
    for e in list(&s["matchExpressions"]) {
        let values: Vec<String> = list(&e["values"]).map(text).collect();
        parts.push(match e["operator"].as_str() {
            Some("Exists") => text(&e["key"]),
            Some("DoesNotExist") => format!("!{}", text(&e["key"])),
            Some(op) => format!("{} {} ({})", text(&e["key"]), op.to_lowercase(), values.join(",")),
            None => text(&e["key"]),
        });
    }
    or(parts.join(","), "<none>")
}

fn label_map(m: &Value) -> String {
    let mut parts: Vec<String> = m
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", text(v)))
        .collect();
    parts.sort();
    or(parts.join(","), "<none>")
}

/// Cells in the order of [`of`].
pub(super) fn cells(group: &str, kind: &str, o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let name = o["metadata"]["name"].clone();
    let old = || Value::String(age(&o["metadata"]["creationTimestamp"], now));
    let (spec, status) = (&o["spec"], &o["status"]);
    match (group, kind) {
        ("", "Pod") => pod(o, now),
        ("apps", "Deployment") => vec![
            name,
            format!("{}/{}", int(&status["readyReplicas"]), int(&spec["replicas"])).into(),
            int(&status["updatedReplicas"]).into(),
            int(&status["availableReplicas"]).into(),
            old(),
            containers(&spec["template"], "name").into(),
            containers(&spec["template"], "image").into(),
            selector(&spec["selector"]).into(),
        ],
        ("apps", "ReplicaSet") | ("", "ReplicationController") => vec![
            name,
            int(&spec["replicas"]).into(),
            int(&status["replicas"]).into(),
            int(&status["readyReplicas"]).into(),
            old(),
            containers(&spec["template"], "name").into(),
            containers(&spec["template"], "image").into(),
            if group.is_empty() {
                label_map(&spec["selector"])
            } else {
                selector(&spec["selector"])
            }
            .into(),
        ],
        ("apps", "StatefulSet") => vec![
            name,
            format!("{}/{}", int(&status["readyReplicas"]), int(&spec["replicas"])).into(),
            old(),
            containers(&spec["template"], "name").into(),
            containers(&spec["template"], "image").into(),
        ],
        ("apps", "DaemonSet") => vec![
            name,
            int(&status["desiredNumberScheduled"]).into(),
            int(&status["currentNumberScheduled"]).into(),
            int(&status["numberReady"]).into(),
            int(&status["updatedNumberScheduled"]).into(),
            int(&status["numberAvailable"]).into(),
            label_map(&spec["template"]["spec"]["nodeSelector"]).into(),
            old(),
            containers(&spec["template"], "name").into(),
            containers(&spec["template"], "image").into(),
            selector(&spec["selector"]).into(),
        ],
        ("apps", "ControllerRevision") => {
            let owner = list(&o["metadata"]["ownerReferences"]).find(|r| r["controller"] == true);
            let controller = owner.map_or_else(
                || "<none>".into(),
                |r| format!("{}/{}", text(&r["kind"]).to_lowercase(), text(&r["name"])),
            );
            vec![name, controller.into(), int(&o["revision"]).into(), old()]
        }
        ("batch", "Job") => job(o, now),
        ("batch", "CronJob") => vec![
            name,
            text(&spec["schedule"]).into(),
            or(text(&spec["timeZone"]), "<none>").into(),
            if spec["suspend"] == true { "True" } else { "False" }.into(),
            (list(&status["active"]).count() as i64).into(),
            if status["lastScheduleTime"].is_null() {
                "<none>".into()
            } else {
                age(&status["lastScheduleTime"], now)
            }
            .into(),
            old(),
            containers(&spec["jobTemplate"]["spec"]["template"], "name").into(),
            containers(&spec["jobTemplate"]["spec"]["template"], "image").into(),
            selector(&spec["jobTemplate"]["spec"]["selector"]).into(),
        ],
        ("", "Service") => service(o, now),
        ("", "Namespace") => vec![name, text(&status["phase"]).into(), old()],
        ("", "Node") => node(o, now),
        ("", "ConfigMap") => {
            let n = o["data"].as_object().map_or(0, |m| m.len()) + o["binaryData"].as_object().map_or(0, |m| m.len());
            vec![name, (n as i64).into(), old()]
        }
        ("", "Secret") => vec![
            name,
            text(&o["type"]).into(),
            (o["data"].as_object().map_or(0, |m| m.len()) as i64).into(),
            old(),
        ],
        ("", "ServiceAccount") => vec![name, (list(&o["secrets"]).count() as i64).into(), old()],
        ("", "Endpoints") => {
            let mut all = Vec::new();
            for subset in list(&o["subsets"]) {
                for address in list(&subset["addresses"]) {
                    let mut ports = list(&subset["ports"]).peekable();
                    if ports.peek().is_none() {
                        all.push(text(&address["ip"]));
                    }
                    for port in ports {
                        all.push(format!("{}:{}", text(&address["ip"]), text(&port["port"])));
                    }
                }
            }
            vec![name, abbreviated(&all, 3).into(), old()]
        }
        ("" | "events.k8s.io", "Event") => event(o, now),
        ("discovery.k8s.io", "EndpointSlice") => {
            let ports: Vec<String> = list(&o["ports"]).map(|p| or(text(&p["port"]), "*")).collect();
            let addresses: Vec<String> = list(&o["endpoints"])
                .flat_map(|e| list(&e["addresses"]))
                .map(text)
                .collect();
            let unset = |all: &[String]| {
                if all.is_empty() {
                    "<unset>".to_owned()
                } else {
                    abbreviated(all, 3)
                }
            };
            vec![
                name,
                text(&o["addressType"]).into(),
                unset(&ports).into(),
                unset(&addresses).into(),
                old(),
            ]
        }
        ("rbac.authorization.k8s.io", "ClusterRole" | "Role") | ("apiextensions.k8s.io", _) => {
            vec![name, o["metadata"]["creationTimestamp"].clone()]
        }
        ("rbac.authorization.k8s.io", _) => {
            let of = |kind: &str| {
                list(&o["subjects"])
                    .filter(|s| s["kind"].as_str() == Some(kind))
                    .map(|s| {
                        if kind == "ServiceAccount" {
                            format!("{}/{}", text(&s["namespace"]), text(&s["name"]))
                        } else {
                            text(&s["name"])
                        }
                    })
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            vec![
                name,
                format!("{}/{}", text(&o["roleRef"]["kind"]), text(&o["roleRef"]["name"])).into(),
                old(),
                of("User").into(),
                of("Group").into(),
                of("ServiceAccount").into(),
            ]
        }
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            vec![name, (list(&o["webhooks"]).count() as i64).into(), old()]
        }
        ("coordination.k8s.io", "Lease") => vec![name, text(&spec["holderIdentity"]).into(), old()],
        ("policy", "PodDisruptionBudget") => vec![
            name,
            or(text(&spec["minAvailable"]), "N/A").into(),
            or(text(&spec["maxUnavailable"]), "N/A").into(),
            int(&status["disruptionsAllowed"]).into(),
            old(),
        ],
        ("autoscaling", "HorizontalPodAutoscaler") => vec![
            name,
            format!(
                "{}/{}",
                text(&spec["scaleTargetRef"]["kind"]),
                text(&spec["scaleTargetRef"]["name"])
            )
            .into(),
            hpa_targets(spec, status).into(),
            or(text(&spec["minReplicas"]), "<unset>").into(),
            int(&spec["maxReplicas"]).into(),
            int(&status["currentReplicas"]).into(),
            old(),
        ],
        ("networking.k8s.io", "Ingress") => {
            let hosts: Vec<String> = list(&spec["rules"])
                .map(|r| text(&r["host"]))
                .filter(|h| !h.is_empty())
                .collect();
            let addresses: Vec<String> = list(&status["loadBalancer"]["ingress"])
                .map(|i| or(text(&i["ip"]), &text(&i["hostname"])))
                .collect();
            vec![
                name,
                or(text(&spec["ingressClassName"]), "<none>").into(),
                or(hosts.join(","), "*").into(),
                addresses.join(",").into(),
                if list(&spec["tls"]).next().is_some() {
                    "80, 443"
                } else {
                    "80"
                }
                .into(),
                old(),
            ]
        }
        ("networking.k8s.io", "NetworkPolicy") => vec![name, selector(&spec["podSelector"]).into(), old()],
        ("scheduling.k8s.io", "PriorityClass") => vec![
            name,
            int(&o["value"]).into(),
            (o["globalDefault"] == true).into(),
            old(),
            or(text(&o["preemptionPolicy"]), "PreemptLowerPriority").into(),
        ],
        ("storage.k8s.io", "StorageClass") => vec![name, text(&o["provisioner"]).into(), old()],
        ("certificates.k8s.io", "CertificateSigningRequest") => {
            let mut conditions: Vec<String> = list(&status["conditions"]).map(|c| text(&c["type"])).collect();
            if conditions.is_empty() {
                conditions.push("Pending".into());
            } else if !text(&status["certificate"]).is_empty() {
                conditions.push("Issued".into());
            }
            vec![
                name,
                old(),
                text(&spec["signerName"]).into(),
                text(&spec["username"]).into(),
                conditions.join(",").into(),
            ]
        }
        ("", "PersistentVolumeClaim") => vec![
            name,
            or(text(&status["phase"]), "Pending").into(),
            text(&spec["volumeName"]).into(),
            text(&status["capacity"]["storage"]).into(),
            list(&spec["accessModes"])
                .map(text)
                .collect::<Vec<_>>()
                .join(",")
                .into(),
            text(&spec["storageClassName"]).into(),
            "<unset>".into(),
            old(),
            text(&spec["volumeMode"]).into(),
        ],
        _ => vec![name, old()],
    }
}

fn hpa_targets(spec: &Value, status: &Value) -> String {
    let shown: Vec<String> = list(&spec["metrics"])
        .enumerate()
        .map(|(i, m)| {
            let resource = &m["resource"];
            let target = &resource["target"]["averageUtilization"];
            let current = &status["currentMetrics"][i]["resource"]["current"]["averageUtilization"];
            let current = if current.is_null() {
                "<unknown>".to_owned()
            } else {
                format!("{current}%")
            };
            format!("{}: {current}/{}%", text(&resource["name"]), text(target))
        })
        .collect();
    or(shown.join(", "), "<none>")
}

fn abbreviated(all: &[String], max: usize) -> String {
    if all.is_empty() {
        return "<none>".into();
    }
    let shown = all.iter().take(max).cloned().collect::<Vec<_>>().join(",");
    if all.len() > max {
        format!("{shown} + {} more...", all.len() - max)
    } else {
        shown
    }
}

/// The status word of a pod, as the API derives it from phase, reasons and container states.
pub(crate) fn pod_reason(o: &Value) -> (String, i64, i64, i64, Option<String>) {
    let (spec, status) = (&o["spec"], &o["status"]);
    let mut reason = or(text(&status["reason"]), &or(text(&status["phase"]), "Unknown"));
    let mut restarts = 0;
    let mut last_restart: Option<String> = None;
    let mut note = |cs: &Value| {
        let at = text(&cs["lastState"]["terminated"]["finishedAt"]);
        if !at.is_empty() && last_restart.as_ref().is_none_or(|l| *l < at) {
            last_restart = Some(at);
        }
    };
    for c in list(&status["conditions"]) {
        if c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated" {
            reason = "SchedulingGated".into();
        }
    }
    let mut initializing = false;
    let init_total = list(&spec["initContainers"]).count();
    let sidecar =
        |name: &Value| list(&spec["initContainers"]).any(|c| c["name"] == *name && c["restartPolicy"] == "Always");
    let mut total = list(&spec["containers"]).count() as i64;
    total += list(&spec["initContainers"])
        .filter(|c| c["restartPolicy"] == "Always")
        .count() as i64;
    let mut ready = 0;
    for (i, cs) in list(&status["initContainerStatuses"]).enumerate() {
        let is_sidecar = sidecar(&cs["name"]);
        restarts += int(&cs["restartCount"]);
        note(cs);
        let state = &cs["state"];
        if state["terminated"].is_object() && int(&state["terminated"]["exitCode"]) == 0 {
            continue;
        }
        if is_sidecar && cs["started"] == true {
            if cs["ready"] == true {
                ready += 1;
            }
            continue;
        }
        let waiting = text(&state["waiting"]["reason"]);
        reason = if state["terminated"].is_object() {
            match (
                text(&state["terminated"]["reason"]),
                int(&state["terminated"]["signal"]),
            ) {
                (r, _) if !r.is_empty() => format!("Init:{r}"),
                (_, s) if s != 0 => format!("Init:Signal:{s}"),
                _ => format!("Init:ExitCode:{}", int(&state["terminated"]["exitCode"])),
            }
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{i}/{init_total}")
        };
        initializing = true;
        break;
    }
    let initialized = list(&status["conditions"]).any(|c| c["type"] == "Initialized" && c["status"] == "True");
    if !initializing || initialized {
        // Once containers run, restarts count those of the containers (and sidecars) only.
        restarts = list(&status["initContainerStatuses"])
            .filter(|c| sidecar(&c["name"]))
            .map(|c| int(&c["restartCount"]))
            .sum();
        let mut has_running = false;
        let statuses: Vec<&Value> = list(&status["containerStatuses"]).collect();
        for cs in statuses.iter().rev() {
            restarts += int(&cs["restartCount"]);
            note(cs);
            let state = &cs["state"];
            let waiting = text(&state["waiting"]["reason"]);
            if !waiting.is_empty() {
                reason = waiting;
            } else if state["terminated"].is_object() {
                reason = match (
                    text(&state["terminated"]["reason"]),
                    int(&state["terminated"]["signal"]),
                ) {
                    (r, _) if !r.is_empty() => r,
                    (_, s) if s != 0 => format!("Signal:{s}"),
                    _ => format!("ExitCode:{}", int(&state["terminated"]["exitCode"])),
                };
            } else if cs["ready"] == true && state["running"].is_object() {
                has_running = true;
                ready += 1;
            }
        }
        if reason == "Completed" && has_running {
            let pod_ready = list(&status["conditions"]).any(|c| c["type"] == "Ready" && c["status"] == "True");
            reason = if pod_ready { "Running" } else { "NotReady" }.into();
        }
    }
    if !o["metadata"]["deletionTimestamp"].is_null() {
        reason = if text(&status["reason"]) == "NodeLost" {
            "Unknown".into()
        } else if matches!(text(&status["phase"]).as_str(), "Succeeded" | "Failed") {
            reason
        } else {
            "Terminating".into()
        };
    }
    (reason, ready, total, restarts, last_restart)
}

fn pod(o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let (spec, status) = (&o["spec"], &o["status"]);
    let (reason, ready, total, restarts, last) = pod_reason(o);
    let restarts = match last.filter(|_| restarts > 0) {
        Some(at) => format!("{restarts} ({} ago)", age(&at.into(), now)),
        None => restarts.to_string(),
    };
    let gates = list(&spec["readinessGates"]).count();
    let gates = if gates == 0 {
        "<none>".to_owned()
    } else {
        let good = list(&spec["readinessGates"])
            .filter(|g| list(&status["conditions"]).any(|c| c["type"] == g["conditionType"] && c["status"] == "True"))
            .count();
        format!("{good}/{gates}")
    };
    vec![
        o["metadata"]["name"].clone(),
        format!("{ready}/{total}").into(),
        reason.into(),
        restarts.into(),
        age(&o["metadata"]["creationTimestamp"], now).into(),
        or(text(&status["podIP"]), "<none>").into(),
        or(text(&spec["nodeName"]), "<none>").into(),
        or(text(&status["nominatedNodeName"]), "<none>").into(),
        gates.into(),
    ]
}

fn job(o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let (spec, status) = (&o["spec"], &o["status"]);
    let has = |kind: &str| list(&status["conditions"]).any(|c| c["type"] == kind && c["status"] == "True");
    let word = if has("Complete") {
        "Complete"
    } else if has("Failed") {
        "Failed"
    } else if !o["metadata"]["deletionTimestamp"].is_null() {
        "Terminating"
    } else if has("Suspended") {
        "Suspended"
    } else if has("FailureTarget") {
        "FailureTarget"
    } else if has("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    let done = int(&status["succeeded"]);
    let completions = match (&spec["completions"], int(&spec["parallelism"])) {
        (Value::Number(n), _) => format!("{done}/{n}"),
        (_, p) if p > 1 => format!("{done}/1 of {p}"),
        _ => format!("{done}/1"),
    };
    let duration = match (status["startTime"].as_str(), status["completionTime"].as_str()) {
        (Some(s), Some(e)) => match (crate::meta::parse_time(s), crate::meta::parse_time(e)) {
            (Some(s), Some(e)) => human(e - s),
            _ => String::new(),
        },
        (Some(_), None) => age(&status["startTime"], now),
        _ => String::new(),
    };
    vec![
        o["metadata"]["name"].clone(),
        word.into(),
        completions.into(),
        duration.into(),
        age(&o["metadata"]["creationTimestamp"], now).into(),
        containers(&spec["template"], "name").into(),
        containers(&spec["template"], "image").into(),
        selector(&spec["selector"]).into(),
    ]
}

fn service(o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let (spec, status) = (&o["spec"], &o["status"]);
    let kind = or(text(&spec["type"]), "ClusterIP");
    let ingress: Vec<String> = list(&status["loadBalancer"]["ingress"])
        .map(|i| or(text(&i["ip"]), &text(&i["hostname"])))
        .collect();
    let mut external: Vec<String> = list(&spec["externalIPs"]).map(text).collect();
    let shown = match kind.as_str() {
        "LoadBalancer" => {
            let mut all = ingress;
            all.append(&mut external);
            or(all.join(","), "<pending>")
        }
        "ExternalName" => text(&spec["externalName"]),
        _ => or(external.join(","), "<none>"),
    };
    let ports: Vec<String> = list(&spec["ports"])
        .map(|p| {
            let protocol = or(text(&p["protocol"]), "TCP");
            if int(&p["nodePort"]) > 0 {
                format!("{}:{}/{protocol}", int(&p["port"]), int(&p["nodePort"]))
            } else {
                format!("{}/{protocol}", int(&p["port"]))
            }
        })
        .collect();
    vec![
        o["metadata"]["name"].clone(),
        kind.into(),
        or(text(&spec["clusterIP"]), "<none>").into(),
        shown.into(),
        or(ports.join(","), "<none>").into(),
        age(&o["metadata"]["creationTimestamp"], now).into(),
        label_map(&spec["selector"]).into(),
    ]
}

fn node(o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let status = &o["status"];
    let ready = list(&status["conditions"]).find(|c| c["type"] == "Ready");
    let mut word = match ready.map(|c| text(&c["status"])) {
        Some(s) if s == "True" => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if o["spec"]["unschedulable"] == true {
        word += ",SchedulingDisabled";
    }
    let mut roles: Vec<String> = Vec::new();
    for (k, v) in o["metadata"]["labels"].as_object().into_iter().flatten() {
        if let Some(role) = k.strip_prefix("node-role.kubernetes.io/").filter(|r| !r.is_empty()) {
            roles.push(role.to_owned());
        } else if k == "kubernetes.io/role" {
            roles.push(text(v));
        }
    }
    roles.sort();
    let address = |kind: &str| {
        or(
            list(&status["addresses"])
                .find(|a| a["type"] == kind)
                .map(|a| text(&a["address"]))
                .unwrap_or_default(),
            "<none>",
        )
    };
    let info = &status["nodeInfo"];
    vec![
        o["metadata"]["name"].clone(),
        word.into(),
        or(roles.join(","), "<none>").into(),
        age(&o["metadata"]["creationTimestamp"], now).into(),
        text(&info["kubeletVersion"]).into(),
        address("InternalIP").into(),
        address("ExternalIP").into(),
        or(text(&info["osImage"]), "<unknown>").into(),
        or(text(&info["kernelVersion"]), "<unknown>").into(),
        or(text(&info["containerRuntimeVersion"]), "<unknown>").into(),
    ]
}

fn event(o: &Value, now: OffsetDateTime) -> Vec<Value> {
    let first_of = |fields: &[&Value]| {
        fields
            .iter()
            .find(|v| v.as_str().is_some())
            .map_or(Value::Null, |v| (*v).clone())
    };
    let first = first_of(&[&o["firstTimestamp"], &o["deprecatedFirstTimestamp"], &o["eventTime"]]);
    let last = first_of(&[
        &o["series"]["lastObservedTime"],
        &o["lastTimestamp"],
        &o["deprecatedLastTimestamp"],
        &o["eventTime"],
    ]);
    let object = if o["involvedObject"].is_object() {
        &o["involvedObject"]
    } else {
        &o["regarding"]
    };
    let source = if o["source"].is_object() {
        &o["source"]
    } else {
        &o["deprecatedSource"]
    };
    let component = or(
        text(&source["component"]),
        &or(text(&o["reportingComponent"]), &text(&o["reportingController"])),
    );
    let host = text(&source["host"]);
    let source = if host.is_empty() {
        component
    } else {
        format!("{component}, {host}")
    };
    let count = [&o["series"]["count"], &o["count"], &o["deprecatedCount"]]
        .iter()
        .find_map(|v| v.as_i64())
        .unwrap_or(1)
        .max(1);
    let message = or(text(&o["message"]), &text(&o["note"]));
    vec![
        age(&last, now).into(),
        text(&o["type"]).into(),
        text(&o["reason"]).into(),
        format!("{}/{}", text(&object["kind"]).to_lowercase(), text(&object["name"])).into(),
        text(&object["fieldPath"]).into(),
        source.into(),
        message.trim().into(),
        age(&first, now).into(),
        json!(count),
        o["metadata"]["name"].clone(),
    ]
}
