//! Deployments, ReplicaSets, StatefulSets, DaemonSets, Jobs, CronJobs: defaults, selectors, templates.

use serde_json::{Value, json};

use super::{ensure, pod, set_default};
use crate::error::Cause;
use crate::meta;
use crate::resources::Resource;
use crate::selector::LabelSelector;

pub(super) fn default(r: &Resource, object: &mut Value) {
    if r.kind == "ControllerRevision" {
        return;
    }
    ensure(object, "spec");
    let spec = &mut object["spec"];
    match r.kind.as_str() {
        "Deployment" => {
            set_default(spec, "replicas", 1);
            set_default(spec, "revisionHistoryLimit", 10);
            set_default(spec, "progressDeadlineSeconds", 600);
            ensure(spec, "strategy");
            let strategy = &mut spec["strategy"];
            set_default(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                ensure(strategy, "rollingUpdate");
                set_default(&mut strategy["rollingUpdate"], "maxUnavailable", "25%");
                set_default(&mut strategy["rollingUpdate"], "maxSurge", "25%");
            }
        }
        "ReplicaSet" | "ReplicationController" => {
            set_default(spec, "replicas", 1);
            if r.kind == "ReplicationController" {
                let labels = spec["template"]["metadata"]["labels"].clone();
                if !labels.is_null() {
                    set_default(spec, "selector", labels);
                }
            }
        }
        "StatefulSet" => {
            set_default(spec, "replicas", 1);
            set_default(spec, "revisionHistoryLimit", 10);
            set_default(spec, "podManagementPolicy", "OrderedReady");
            set_default(
                spec,
                "updateStrategy",
                json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}),
            );
            set_default(
                spec,
                "persistentVolumeClaimRetentionPolicy",
                json!({"whenDeleted": "Retain", "whenScaled": "Retain"}),
            );
        }
        "DaemonSet" => {
            set_default(spec, "revisionHistoryLimit", 10);
            set_default(
                spec,
                "updateStrategy",
                json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
            );
        }
        "Job" => job(spec),
        "CronJob" => {
            set_default(spec, "concurrencyPolicy", "Allow");
            set_default(spec, "suspend", false);
            set_default(spec, "successfulJobsHistoryLimit", 3);
            set_default(spec, "failedJobsHistoryLimit", 1);
            if spec["jobTemplate"]["spec"].is_object() {
                let template = &mut spec["jobTemplate"]["spec"]["template"]["spec"];
                pod::default_spec(template, true);
            }
        }
        _ => {}
    }
    if spec["template"]["spec"].is_object() {
        pod::default_spec(&mut spec["template"]["spec"], true);
    } else if let Some(map) = spec.as_object_mut() {
        // Indexing above may have left nulls behind.
        map.retain(|_, v| !v.is_null());
    }
}

fn job(spec: &mut Value) {
    if spec["completions"].is_null() && spec["parallelism"].is_null() {
        spec["completions"] = 1.into();
    }
    set_default(spec, "parallelism", 1);
    set_default(spec, "backoffLimit", 6);
    set_default(spec, "completionMode", "NonIndexed");
    set_default(spec, "suspend", false);
    set_default(spec, "manualSelector", false);
    set_default(spec, "podReplacementPolicy", "TerminatingOrFailed");
    if let Some(map) = spec.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
}

/// A Job selects its pods by its own uid.
pub(super) fn job_labels(object: &mut Value) {
    if object["spec"]["manualSelector"] == true {
        return;
    }
    let (uid, name) = (meta::text(object, "uid").to_owned(), meta::name(object).to_owned());
    let spec = &mut object["spec"];
    spec["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
    if !spec["template"].is_object() {
        return;
    }
    ensure(&mut spec["template"], "metadata");
    ensure(&mut spec["template"]["metadata"], "labels");
    let labels = &mut spec["template"]["metadata"]["labels"];
    for (key, value) in [
        ("batch.kubernetes.io/controller-uid", &uid),
        ("controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("job-name", &name),
    ] {
        labels[key] = value.clone().into();
    }
}

pub(super) fn validate(r: &Resource, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &object["spec"];
    for field in [
        "replicas",
        "minReadySeconds",
        "revisionHistoryLimit",
        "parallelism",
        "completions",
        "backoffLimit",
        "progressDeadlineSeconds",
    ] {
        if spec[field].as_i64().is_some_and(|n| n < 0) {
            causes.push(Cause::invalid(
                format!("spec.{field}"),
                &spec[field],
                "must be greater than or equal to 0",
            ));
        }
    }
    let kind = r.kind.as_str();
    if kind == "CronJob" {
        if spec["schedule"].as_str().unwrap_or_default().split_whitespace().count() != 5
            && !spec["schedule"].as_str().unwrap_or_default().starts_with('@')
        {
            causes.push(Cause::invalid(
                "spec.schedule",
                &spec["schedule"],
                "want five fields: minute hour day month weekday",
            ));
        }
        pod::validate_spec(
            &spec["jobTemplate"]["spec"]["template"]["spec"],
            "spec.jobTemplate.spec.template.spec",
            causes,
        );
        return;
    }
    let labels = &spec["template"]["metadata"]["labels"];
    match kind {
        "ReplicationController" => {
            for (k, v) in spec["selector"].as_object().into_iter().flatten() {
                if labels.get(k) != Some(v) {
                    causes.push(Cause::invalid(
                        "spec.template.metadata.labels",
                        labels,
                        "`selector` does not match template `labels`",
                    ));
                    break;
                }
            }
        }
        "Job" => {}
        _ => {
            let selector = &spec["selector"];
            if !selector.is_object() {
                causes.push(Cause::required("spec.selector", ""));
            } else {
                match LabelSelector::from_object(selector) {
                    Ok(s) if s.is_empty() => {
                        causes.push(Cause::invalid(
                            "spec.selector",
                            selector,
                            "empty selector is invalid for deployment",
                        ));
                    }
                    Ok(s) if !s.matches_labels(labels) => {
                        let shown = if labels.is_null() { json!({}) } else { labels.clone() };
                        causes.push(Cause::invalid(
                            "spec.template.metadata.labels",
                            &shown,
                            "`selector` does not match template `labels`",
                        ));
                    }
                    Ok(_) => {}
                    Err(e) => causes.push(Cause::invalid("spec.selector", selector, e.message)),
                }
            }
        }
    }
    pod::validate_spec(&spec["template"]["spec"], "spec.template.spec", causes);
    let policy = spec["template"]["spec"]["restartPolicy"].as_str();
    match (kind, policy) {
        ("Job", Some("Always") | None) => causes.push(Cause::required(
            "spec.template.spec.restartPolicy",
            "valid values: \"OnFailure\", \"Never\"",
        )),
        ("Job", _) => {}
        (_, Some("Always") | None) => {}
        (_, Some(_)) => {
            let value = &spec["template"]["spec"]["restartPolicy"];
            causes.push(Cause::not_supported(
                "spec.template.spec.restartPolicy",
                value,
                &["Always"],
            ));
        }
    }
    if kind == "Deployment" {
        let strategy = &spec["strategy"];
        match strategy["type"].as_str() {
            Some("Recreate") if strategy["rollingUpdate"].is_object() => {
                let why = "may not be specified when strategy `type` is 'Recreate'";
                causes.push(Cause::forbidden("spec.strategy.rollingUpdate", why));
            }
            Some("Recreate" | "RollingUpdate") => {}
            _ => causes.push(Cause::not_supported(
                "spec.strategy.type",
                &strategy["type"],
                &["Recreate", "RollingUpdate"],
            )),
        }
    }
    if let Some(old) = old
        && kind != "ReplicationController"
        && spec["selector"] != old["spec"]["selector"]
    {
        causes.push(Cause::invalid("spec.selector", &spec["selector"], "field is immutable"));
    }
}
