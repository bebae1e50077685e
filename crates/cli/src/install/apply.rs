//! Bringing objects to a cluster: server-side apply in order, waiting for what was applied, removing what is no longer part of it.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::FIELD_MANAGER;
use super::objects::Group;
use super::spec::Spec;

/// Kinds the installer makes, which is where it looks for leftovers: group, version, kind, plural, namespaced. Deleted in this order:
/// what sends traffic or admissions to us first.
pub(super) const KINDS: &[(&str, &str, &str, &str, bool)] = &[
    (
        "admissionregistration.k8s.io",
        "v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
        false,
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        false,
    ),
    (
        "autoscaling",
        "v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        true,
    ),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
    ("apps", "v1", "Deployment", "deployments", true),
    ("", "v1", "Service", "services", true),
    ("", "v1", "ConfigMap", "configmaps", true),
    ("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", true),
    ("rbac.authorization.k8s.io", "v1", "Role", "roles", true),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
        false,
    ),
    ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", false),
    ("", "v1", "ServiceAccount", "serviceaccounts", true),
];

/// Kinds without which the mesh works as well; skipped where the API server does not have them.
const OPTIONAL: [&str; 2] = ["HorizontalPodAutoscaler", "PodDisruptionBudget"];

/// Lowest Kubernetes minor version of 1.x.
const MIN_MINOR: u32 = 28;

/// Asks the API server for its version, so that "no cluster" is one clear message before anything is changed.
pub(super) async fn check_server(client: &Client) -> Result<()> {
    let version = client.apiserver_version().await.context(
        "cannot reach the Kubernetes API server; start a cluster with `mantlet cluster up`, or choose one with --context",
    )?;
    let minor: u32 = version.minor.trim_end_matches('+').parse().unwrap_or(MIN_MINOR);
    if minor < MIN_MINOR {
        bail!(
            "the Kubernetes version v{}.{} is not supported, the lowest one is 1.{MIN_MINOR}",
            version.major,
            version.minor
        );
    }
    Ok(())
}

/// Applies groups of objects and waits for them.
pub(super) struct Applier {
    client: Client,
    timeout: Duration,
    wait: bool,
}

impl Applier {
    pub(super) fn new(client: Client, timeout: Duration, wait: bool) -> Self {
        Self { client, timeout, wait }
    }

    /// Applies a group, then waits until its CRDs are established and its Deployments are rolled out.
    pub(super) async fn install(&self, spec: &Spec, group: &Group, output: &mut dyn Write) -> Result<()> {
        writeln!(output, "- Processing resources for {}.", group.component.title())?;
        output.flush()?;
        if group.component != super::objects::Component::Base {
            self.ensure_namespace(&spec.namespace).await?;
        }
        for object in &group.objects {
            self.apply(object, output).await?;
        }
        for object in group.objects.iter().filter(|o| o["kind"] == "CustomResourceDefinition") {
            self.crd_established(name_of(object)).await?;
        }
        if self.wait {
            for object in group.objects.iter().filter(|o| o["kind"] == "Deployment") {
                self.rolled_out(object).await?;
            }
        }
        Ok(())
    }

    /// A profile without the base component still needs the namespace.
    async fn ensure_namespace(&self, name: &str) -> Result<()> {
        let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.client.clone());
        if api
            .get_opt(name)
            .await
            .with_context(|| format!("reading namespace {name}"))?
            .is_none()
        {
            let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
            self.apply(&object, &mut std::io::sink()).await?;
        }
        Ok(())
    }

    async fn apply(&self, object: &Value, output: &mut dyn Write) -> Result<()> {
        let kind = object["kind"].as_str().unwrap_or_default();
        let name = name_of(object);
        let api = api_for(&self.client, object);
        let mut object = object.clone();
        if kind.ends_with("WebhookConfiguration")
            && let Some(existing) = api
                .get_opt(name)
                .await
                .with_context(|| format!("reading {kind} {name}"))?
        {
            keep_runtime_fields(&mut object, &existing.data);
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match api.patch(name, &params, &Patch::Apply(&object)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 && OPTIONAL.contains(&kind) => {
                writeln!(
                    output,
                    "! {kind} {name} skipped: the API server does not have this kind"
                )?;
                Ok(())
            }
            Err(error) => Err(error).with_context(|| {
                let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
                let place = if namespace.is_empty() {
                    String::new()
                } else {
                    format!(" in namespace {namespace}")
                };
                format!("applying {kind} {name}{place}")
            }),
        }
    }

    async fn crd_established(&self, name: &str) -> Result<()> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        tokio::time::timeout(
            self.timeout,
            await_condition(api, name, conditions::is_crd_established()),
        )
        .await
        .map_err(|_| anyhow::anyhow!("timed out waiting for CustomResourceDefinition {name} to be established"))?
        .with_context(|| format!("watching CustomResourceDefinition {name}"))?;
        Ok(())
    }

    async fn rolled_out(&self, object: &Value) -> Result<()> {
        let name = name_of(object);
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), namespace);
        let waited = tokio::time::timeout(self.timeout, await_condition(api, name, rollout_complete)).await;
        match waited {
            Ok(result) => result
                .map(|_| ())
                .with_context(|| format!("watching Deployment {namespace}/{name}")),
            Err(_) => {
                let why = self.why_not_ready(object, namespace).await;
                bail!(
                    "failed to wait for resource: resources not ready after {}s: timed out waiting for the condition\n  \
                     Deployment/{namespace}/{name}{why}",
                    self.timeout.as_secs()
                )
            }
        }
    }

    /// What the pods of a Deployment wait for, in the words of their statuses.
    async fn why_not_ready(&self, object: &Value, namespace: &str) -> String {
        let selector: Vec<String> = object
            .pointer("/spec/selector/matchLabels")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| value.as_str().map(|value| format!("{key}={value}")))
            .collect();
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pods = match api.list(&ListParams::default().labels(&selector.join(","))).await {
            Ok(pods) => pods.items,
            Err(error) => return format!(" (its pods cannot be listed: {error})"),
        };
        if pods.is_empty() {
            return " (it has no pods)".into();
        }
        let reasons: Vec<String> = pods.iter().map(pod_state).collect();
        format!(" ({})", reasons.join("; "))
    }

    /// Removes objects of this revision that an earlier installation made and this one does not have (a gateway switched off, say).
    pub(super) async fn prune(&self, spec: &Spec, groups: &[Group], output: &mut dyn Write) -> Result<()> {
        let wanted: BTreeSet<(String, String, String)> = groups
            .iter()
            .flat_map(|g| &g.objects)
            .map(|o| key(o["kind"].as_str().unwrap_or_default(), o))
            .collect();
        let selector = format!(
            "operator.istio.io/managed=Reconcile,istio.io/rev={},install.operator.istio.io/owning-resource-namespace={}",
            spec.revision_label(),
            spec.namespace
        );
        for found in find(&self.client, &selector).await? {
            let object = serde_json::to_value(&found.object).unwrap_or_default();
            if !wanted.contains(&key(found.kind, &object)) {
                found.delete(&self.client).await?;
                writeln!(
                    output,
                    "  Removed {}:{}:{}.",
                    found.kind,
                    found.namespace(),
                    found.object.name_any()
                )?;
            }
        }
        Ok(())
    }
}

/// An object found by label.
pub(super) struct Found {
    /// Its kind.
    pub(super) kind: &'static str,
    resource: ApiResource,
    /// The object.
    pub(super) object: DynamicObject,
}

impl Found {
    /// Its namespace, empty for cluster-wide ones.
    pub(super) fn namespace(&self) -> String {
        self.object.namespace().unwrap_or_default()
    }

    /// Deletes it; gone already is fine.
    pub(super) async fn delete(&self, client: &Client) -> Result<()> {
        let api: Api<DynamicObject> = match self.object.namespace() {
            Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &self.resource),
            None => Api::all_with(client.clone(), &self.resource),
        };
        let name = self.object.name_any();
        match api.delete(&name, &DeleteParams::background()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).with_context(|| format!("deleting {} {name}", self.kind)),
        }
    }
}

/// All objects of the installer's kinds that carry the labels, in the order in which they are best deleted.
pub(super) async fn find(client: &Client, selector: &str) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for (group, version, kind, plural, _) in KINDS {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        match api.list(&ListParams::default().labels(selector)).await {
            Ok(list) => {
                all.extend(list.items.into_iter().map(|object| Found {
                    kind,
                    resource: resource.clone(),
                    object,
                }));
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).with_context(|| format!("listing {plural}")),
        }
    }
    Ok(all)
}

fn key(kind: &str, object: &Value) -> (String, String, String) {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    (kind.to_string(), namespace.to_string(), name_of(object).to_string())
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// The API of an object's kind, from the table or, for CRDs and namespaces, by rule.
fn api_for(client: &Client, object: &Value) -> Api<DynamicObject> {
    let api_version = object["apiVersion"].as_str().unwrap_or_default();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let kind = object["kind"].as_str().unwrap_or_default();
    let plural = KINDS
        .iter()
        .find(|row| row.2 == kind && row.0 == group)
        .map_or_else(|| format!("{}s", kind.to_ascii_lowercase()), |row| row.3.to_string());
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural);
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Takes over what the control plane has written into its webhooks, so that a second installation opens no gap in which admissions
/// are not verified or not validated.
pub(super) fn keep_runtime_fields(object: &mut Value, existing: &Value) {
    let existing = existing.get("webhooks").and_then(Value::as_array);
    for webhook in object
        .get_mut("webhooks")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let Some(old) = existing
            .into_iter()
            .flatten()
            .find(|old| old["name"] == webhook["name"])
        else {
            continue;
        };
        // A caBundle is worth something only for the Service it was written for.
        if old["clientConfig"]["service"]["name"] == webhook["clientConfig"]["service"]["name"] {
            if let Some(bundle) = old["clientConfig"].get("caBundle").filter(|b| !b.is_null()) {
                webhook["clientConfig"]["caBundle"] = bundle.clone();
            }
            if let Some(policy) = old.get("failurePolicy").filter(|p| !p.is_null()) {
                webhook["failurePolicy"] = policy.clone();
            }
        }
    }
}

/// As `kubectl rollout status` decides: the new revision is observed, complete and available, the old one gone.
pub(super) fn rollout_complete(deployment: Option<&Deployment>) -> bool {
    let Some(deployment) = deployment else { return false };
    let Some(status) = &deployment.status else { return false };
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let observed = status.observed_generation.unwrap_or_default() >= deployment.metadata.generation.unwrap_or_default();
    observed
        && status.updated_replicas.unwrap_or_default() >= wanted
        && status.replicas.unwrap_or_default() <= status.updated_replicas.unwrap_or_default()
        && status.available_replicas.unwrap_or_default() >= wanted
}

fn pod_state(pod: &Pod) -> String {
    let name = pod.name_any();
    let Some(status) = &pod.status else {
        return format!("pod {name} has no status yet");
    };
    let containers = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(status.container_statuses.iter().flatten());
    for container in containers {
        let Some(state) = &container.state else { continue };
        let waiting = state.waiting.as_ref().map(|w| (w.reason.clone(), w.message.clone()));
        let ended = state
            .terminated
            .as_ref()
            .filter(|t| t.exit_code != 0)
            .map(|t| (t.reason.clone(), Some(format!("exit code {}", t.exit_code))));
        if let Some((reason, message)) = waiting.or(ended) {
            let reason = reason.unwrap_or_else(|| "waiting".into());
            let message = message
                .filter(|m| !m.is_empty())
                .map(|m| format!(": {m}"))
                .unwrap_or_default();
            return format!("pod {name}, container {}: {reason}{message}", container.name);
        }
    }
    let condition = status.conditions.iter().flatten().find(|c| c.status != "True");
    match condition {
        Some(condition) => format!(
            "pod {name}: {} is {}{}",
            condition.type_,
            condition.status,
            condition.message.as_ref().map(|m| format!(": {m}")).unwrap_or_default()
        ),
        None => format!("pod {name}: {}", status.phase.clone().unwrap_or_default()),
    }
}
