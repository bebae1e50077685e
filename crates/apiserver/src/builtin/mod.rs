//! What the API server itself knows of built-in kinds: defaults, immutability, required fields, built-in admission.
//!
//! Called by the write pipeline; split by kind. Kinds that are not named here are only data.

pub(crate) mod alloc;
mod pod;
mod rbac;
mod service;
mod workload;

use serde_json::{Value, json};

use crate::admission;
use crate::auth::Identity;
use crate::error::{ApiResult, Cause};
use crate::meta;
use crate::resources::Resource;
use crate::server::ApiServer;

/// Sets a field if it is absent or null.
fn set_default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut()
        && map.get(field).is_none_or(Value::is_null)
    {
        map.insert(field.to_owned(), value.into());
    }
}

/// Items of a list field, mutably.
fn items_mut<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object
        .get_mut(field)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

/// Fills in the defaults of a built-in object.
pub(crate) fn default(r: &Resource, object: &mut Value) {
    match (r.group.as_str(), r.kind.as_str()) {
        ("", "Pod") => {
            ensure(object, "spec");
            pod::default_spec(&mut object["spec"], false);
        }
        ("", "PodTemplate") => pod::default_spec(&mut object["template"]["spec"], true),
        ("", "Service") => service::default(object),
        ("", "Secret") => secret(object),
        ("", "Namespace") => {
            let name = meta::name(object).to_owned();
            if !name.is_empty()
                && let Ok(m) = meta::metadata(object)
            {
                let labels = m.entry("labels").or_insert_with(|| json!({}));
                if labels.is_object() {
                    labels["kubernetes.io/metadata.name"] = name.into();
                }
            }
        }
        ("", "Endpoints") => {
            for subset in items_mut(object, "subsets") {
                for port in items_mut(subset, "ports") {
                    set_default(port, "protocol", "TCP");
                }
            }
        }
        ("", "PersistentVolumeClaim") => {
            ensure(object, "spec");
            set_default(&mut object["spec"], "volumeMode", "Filesystem");
        }
        ("apps", _) | ("batch", _) | ("", "ReplicationController") => workload::default(r, object),
        ("discovery.k8s.io", "EndpointSlice") => {
            for port in items_mut(object, "ports") {
                set_default(port, "protocol", "TCP");
                set_default(port, "name", "");
            }
        }
        ("rbac.authorization.k8s.io", _) => rbac::default(object),
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            let mutating = r.kind.starts_with("Mutating");
            for hook in items_mut(object, "webhooks") {
                set_default(hook, "failurePolicy", "Fail");
                set_default(hook, "matchPolicy", "Equivalent");
                set_default(hook, "namespaceSelector", json!({}));
                set_default(hook, "objectSelector", json!({}));
                set_default(hook, "timeoutSeconds", 10);
                if mutating {
                    set_default(hook, "reinvocationPolicy", "Never");
                }
                if hook["clientConfig"]["service"].is_object() {
                    set_default(&mut hook["clientConfig"]["service"], "port", 443);
                }
                for rule in items_mut(hook, "rules") {
                    set_default(rule, "scope", "*");
                }
            }
        }
        ("autoscaling", "HorizontalPodAutoscaler") => {
            ensure(object, "spec");
            set_default(&mut object["spec"], "minReplicas", 1);
        }
        ("networking.k8s.io", "NetworkPolicy") => {
            ensure(object, "spec");
            let types = if object["spec"]["egress"].is_array() {
                json!(["Ingress", "Egress"])
            } else {
                json!(["Ingress"])
            };
            set_default(&mut object["spec"], "policyTypes", types);
        }
        ("scheduling.k8s.io", "PriorityClass") => set_default(object, "preemptionPolicy", "PreemptLowerPriority"),
        _ => {}
    }
}

fn ensure(object: &mut Value, field: &str) {
    if object[field].is_null() {
        object[field] = json!({});
    }
}

/// `stringData` becomes `data`; the type defaults to Opaque.
fn secret(object: &mut Value) {
    use base64::Engine;
    set_default(object, "type", "Opaque");
    let Some(map) = object.as_object_mut() else { return };
    let Some(Value::Object(plain)) = map.shift_remove("stringData") else {
        return;
    };
    let data = map.entry("data").or_insert_with(|| json!({}));
    if data.is_null() {
        *data = json!({});
    }
    for (k, v) in plain {
        if let Some(text) = v.as_str() {
            data[k] = base64::engine::general_purpose::STANDARD.encode(text).into();
        }
    }
}

/// Whether status is written through its own subresource.
pub(crate) fn has_status(r: &Resource) -> bool {
    r.has_subresource("status")
}

/// A new object starts without the status that its author wrote.
pub(crate) fn reset_status(r: &Resource, object: &mut Value) {
    if r.custom.as_ref().is_some_and(|c| !c.status) {
        return;
    }
    match (r.group.as_str(), r.kind.as_str()) {
        // A node describes itself when it registers.
        ("", "Node") => {}
        ("", "Pod") => object["status"] = json!({"phase": "Pending", "qosClass": pod::qos_class(&object["spec"])}),
        ("", "Namespace") => object["status"] = json!({"phase": "Active"}),
        ("", "Service") => object["status"] = json!({"loadBalancer": {}}),
        ("", "PersistentVolumeClaim" | "PersistentVolume") => object["status"] = json!({"phase": "Pending"}),
        ("apps" | "batch" | "policy" | "", _) => object["status"] = json!({}),
        _ => {
            if let Some(map) = object.as_object_mut() {
                map.shift_remove("status");
            }
        }
    }
    if let Value::Object(s) = &object["status"]
        && s.is_empty()
        && !matches!(r.group.as_str(), "apps" | "batch")
        && let Some(map) = object.as_object_mut()
    {
        map.shift_remove("status");
    }
}

/// Built-in admission and preparation of a new object.
pub(crate) fn prepare_create(server: &ApiServer, user: &Identity, r: &Resource, object: &mut Value) -> ApiResult<()> {
    match (r.group.as_str(), r.kind.as_str()) {
        ("", "Pod") => pod::admit(server, object)?,
        ("", "Namespace") => object["spec"]["finalizers"] = json!(["kubernetes"]),
        ("rbac.authorization.k8s.io", _) => rbac::check_escalation(server, user, r, object, None)?,
        ("certificates.k8s.io", _) => {
            object["spec"]["username"] = user.username.clone().into();
            object["spec"]["groups"] = json!(user.groups);
        }
        ("batch", "Job") => workload::job_labels(object),
        _ => {}
    }
    Ok(())
}

/// Built-in admission of a new object that webhooks changed; doing it twice changes nothing.
pub(crate) fn readmit(server: &ApiServer, r: &Resource, object: &mut Value) -> ApiResult<()> {
    if r.group.is_empty() && r.kind == "Pod" {
        pod::admit(server, object)
    } else {
        Ok(())
    }
}

/// Built-in admission and preparation of a replacement.
pub(crate) fn prepare_update(
    server: &ApiServer,
    user: &Identity,
    r: &Resource,
    sub: &str,
    object: &mut Value,
    old: &Value,
) -> ApiResult<()> {
    if !sub.is_empty() {
        return Ok(());
    }
    match (r.group.as_str(), r.kind.as_str()) {
        ("rbac.authorization.k8s.io", _) => rbac::check_escalation(server, user, r, object, Some(old))?,
        ("", "Service") => service::carry_over(object, old),
        ("certificates.k8s.io", _) => object["spec"] = old["spec"].clone(),
        _ => {}
    }
    Ok(())
}

/// What is wrong with a built-in object.
pub(crate) fn validate(r: &Resource, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    match (r.group.as_str(), r.kind.as_str()) {
        ("", "Pod") => pod::validate(object, old, causes),
        ("", "Service") => service::validate(object, old, causes),
        ("", "ConfigMap") => data_keys(object, &["data", "binaryData"], causes, old),
        ("", "Secret") => {
            data_keys(object, &["data"], causes, old);
            if let Some(old) = old
                && object["type"] != old["type"]
            {
                causes.push(Cause::invalid("type", &object["type"], "field is immutable"));
            }
            for (k, v) in object["data"].as_object().into_iter().flatten() {
                let ok = v
                    .as_str()
                    .is_some_and(|t| base64::Engine::decode(&base64::engine::general_purpose::STANDARD, t).is_ok());
                if !ok {
                    causes.push(Cause::invalid(
                        format!("data[{k}]"),
                        &json!("<redacted>"),
                        "must be base64",
                    ));
                }
            }
            let required: &[&str] = match object["type"].as_str() {
                Some("kubernetes.io/tls") => &["tls.crt", "tls.key"],
                Some("kubernetes.io/dockerconfigjson") => &[".dockerconfigjson"],
                _ => &[],
            };
            for key in required {
                if object["data"].get(*key).is_none() {
                    causes.push(Cause::required(format!("data[{key}]"), ""));
                }
            }
        }
        ("apps", "ControllerRevision") => {}
        ("apps" | "batch", _) | ("", "ReplicationController") => workload::validate(r, object, old, causes),
        ("rbac.authorization.k8s.io", _) => rbac::validate(r, object, old, causes),
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            admission::validate_config(object, causes);
        }
        ("admissionregistration.k8s.io", kind) => {
            // Storing a policy that is never enforced would deceive whoever wrote it.
            let why = format!("{kind} objects are not supported by this server");
            causes.push(Cause::forbidden("spec", &why));
        }
        ("discovery.k8s.io", "EndpointSlice") => endpoint_slice(object, old, causes),
        ("coordination.k8s.io", "Lease") => positive(&object["spec"], "leaseDurationSeconds", causes),
        ("policy", "PodDisruptionBudget") => {
            let spec = &object["spec"];
            if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
                causes.push(Cause::invalid(
                    "spec",
                    &json!({}),
                    "minAvailable and maxUnavailable cannot be both set",
                ));
            }
        }
        ("" | "events.k8s.io", "Event") => {
            let involved = if r.group.is_empty() {
                &object["involvedObject"]
            } else {
                &object["regarding"]
            };
            let (own, theirs) = (
                meta::namespace(object),
                involved["namespace"].as_str().unwrap_or_default(),
            );
            if !(theirs == own || (theirs.is_empty() && own == "default")) {
                let why = "does not match event.namespace";
                causes.push(Cause::invalid("involvedObject.namespace", &involved["namespace"], why));
            }
        }
        _ => {}
    }
}

/// A number of the spec that must be above zero if it is there.
fn positive(spec: &Value, field: &str, causes: &mut Vec<Cause>) {
    if spec[field].as_i64().is_some_and(|n| n <= 0) {
        causes.push(Cause::invalid(
            format!("spec.{field}"),
            &spec[field],
            "must be greater than 0",
        ));
    }
}

/// Keys and size of ConfigMaps and Secrets, and that immutable ones stay so.
fn data_keys(object: &Value, fields: &[&str], causes: &mut Vec<Cause>, old: Option<&Value>) {
    let mut total = 0;
    for field in fields {
        for (key, value) in object[*field].as_object().into_iter().flatten() {
            let good = !key.is_empty()
                && key.len() <= 253
                && key
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
                && !matches!(key.as_str(), "." | "..")
                && !key.starts_with("..");
            if !good {
                let why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
                causes.push(Cause::invalid(format!("{field}[{key}]"), &json!(key), why));
            }
            total += value.as_str().map_or(0, str::len);
        }
    }
    if total > 1 << 20 {
        causes.push(Cause::too_long("", 1 << 20));
    }
    if let Some(old) = old
        && old["immutable"] == true
    {
        if object["immutable"] != true {
            causes.push(Cause::forbidden(
                "immutable",
                "field is immutable when `immutable` is set",
            ));
        }
        for field in fields {
            if object[*field] != old[*field] {
                causes.push(Cause::forbidden(*field, "field is immutable when `immutable` is set"));
            }
        }
    }
}

fn endpoint_slice(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let allowed = ["IPv4", "IPv6", "FQDN"];
    match object["addressType"].as_str() {
        None | Some("") => causes.push(Cause::required("addressType", "")),
        Some(t) if !allowed.contains(&t) => {
            causes.push(Cause::not_supported("addressType", &object["addressType"], &allowed))
        }
        _ => {}
    }
    if let Some(old) = old
        && old["addressType"] != object["addressType"]
    {
        causes.push(Cause::invalid(
            "addressType",
            &object["addressType"],
            "field is immutable",
        ));
    }
    let endpoints = object["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    if endpoints.len() > 1000 {
        causes.push(Cause::too_many("endpoints", endpoints.len(), 1000));
    }
    for (i, e) in endpoints.iter().enumerate() {
        let addresses = e["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        if addresses.is_empty() {
            causes.push(Cause::required(
                format!("endpoints[{i}].addresses"),
                "must contain at least 1 address",
            ));
        }
        for (j, a) in addresses.iter().enumerate() {
            let text = a.as_str().unwrap_or_default();
            let good = match object["addressType"].as_str() {
                Some("IPv4") => text.parse::<std::net::Ipv4Addr>().is_ok(),
                Some("IPv6") => text.parse::<std::net::Ipv6Addr>().is_ok(),
                _ => true,
            };
            if !good {
                let why = format!(
                    "must be a valid {} address",
                    object["addressType"].as_str().unwrap_or_default()
                );
                causes.push(Cause::invalid(format!("endpoints[{i}].addresses[{j}]"), a, why));
            }
        }
    }
}

/// Sets a status condition, keeping the transition time if nothing changes.
pub(crate) fn set_condition(object: &mut Value, kind: &str, status: &str, reason: Option<&str>) {
    let mut condition =
        json!({"type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": meta::now()});
    if let Some(r) = reason {
        condition["reason"] = r.into();
    }
    if object["status"].is_null() {
        object["status"] = json!({});
    }
    let list = &mut object["status"]["conditions"];
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        match list.iter_mut().find(|c| c["type"].as_str() == Some(kind)) {
            Some(c) if c["status"].as_str() == Some(status) => {}
            Some(c) => *c = condition,
            None => list.push(condition),
        }
    }
}
