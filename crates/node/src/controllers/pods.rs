//! What the workload controllers share: owner references, pods from templates, readiness, template hashes, events.
//!
//! Pure functions but for [`Events`] and the small create / delete helpers. Called by the controllers only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::core::Selector;
use kube::{Api, Client, Resource, ResourceExt};

use super::{Context, Error, ignore_not_found, namespace_terminating};

/// The label that tells the replica sets of one Deployment apart.
pub(crate) const TEMPLATE_HASH: &str = "pod-template-hash";

/// A controller's reference to itself for what it creates.
pub(crate) fn owner_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The owner that manages the object.
pub(crate) fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true))
}

/// Whether `owner` manages the object.
pub(crate) fn is_controlled_by(meta: &ObjectMeta, owner: &ObjectMeta) -> bool {
    controller_of(meta).is_some_and(|reference| Some(&reference.uid) == owner.uid.as_ref())
}

/// Compiles a label selector; one that the API does not allow is an error, an empty one selects nothing here.
pub(crate) fn selector(selector: &LabelSelector) -> Result<Selector, Error> {
    if selector.match_labels.is_none() && selector.match_expressions.is_none() {
        return Err(Error::Invalid("spec.selector is empty".to_owned()));
    }
    Selector::try_from(selector.clone()).map_err(|error| Error::Invalid(format!("spec.selector: {error}")))
}

/// Whether the labels satisfy the selector.
pub(crate) fn selects(selector: &Selector, meta: &ObjectMeta) -> bool {
    use kube::core::SelectorExt;
    match &meta.labels {
        Some(labels) => selector.matches(labels),
        None => selector.matches(&BTreeMap::new()),
    }
}

/// Neither finished nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && !is_finished(pod)
}

/// Phase `Succeeded` or `Failed`.
pub(crate) fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// The pod's phase, empty when the node agent has not reported yet.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

/// When the pod became ready, if it is.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let condition = pod
        .status
        .as_ref()?
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready")?;
    if condition.status != "True" {
        return None;
    }
    Some(
        condition
            .last_transition_time
            .as_ref()
            .map_or(Timestamp::UNIX_EPOCH, |time| time.0),
    )
}

/// Whether the pod's Ready condition is true.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    ready_since(pod).is_some()
}

/// Ready, and for at least `min_ready_seconds`: `Ok`; otherwise how long that still takes (None: not ready at all).
pub(crate) fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Result<(), Option<Duration>> {
    let since = ready_since(pod).ok_or(None)?;
    let waited = now.as_second().saturating_sub(since.as_second());
    let missing = i64::from(min_ready_seconds).saturating_sub(waited);
    if min_ready_seconds <= 0 || missing <= 0 {
        Ok(())
    } else {
        Err(Some(Duration::from_secs(missing.unsigned_abs())))
    }
}

/// Now, in the precision of the API (whole seconds).
pub(crate) fn now() -> Time {
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// A pod as its controller creates it.
pub(crate) fn from_template(template: &PodTemplateSpec, namespace: &str, prefix: &str, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(prefix.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// A short name for a template, out of the letters that Kubernetes uses for generated names.
pub(crate) fn template_hash(template: &PodTemplateSpec, collisions: i32) -> Result<String, Error> {
    let mut hash = fnv1a(&serde_json::to_vec(&without_hash(template))?);
    if collisions > 0 {
        hash = fnv1a(format!("{hash}/{collisions}").as_bytes());
    }
    Ok(safe_name(hash))
}

/// Letters and digits without vowels and look-alikes, so that no generated name is a word.
pub(crate) fn safe_name(mut number: u32) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let base = LETTERS.len() as u32;
    let mut name = String::new();
    for _ in 0..7 {
        name.push(char::from(LETTERS[(number % base) as usize]));
        number /= base;
    }
    name
}

/// FNV-1a, 32 bit.
pub(crate) fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// The template without the label that its replica set adds.
pub(crate) fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    if let Some(meta) = &mut template.metadata {
        if let Some(labels) = &mut meta.labels {
            labels.remove(TEMPLATE_HASH);
        }
        if meta.labels.as_ref().is_some_and(BTreeMap::is_empty) {
            meta.labels = None;
        }
        // The API server may or may not keep an empty creationTimestamp in templates.
        meta.creation_timestamp = None;
    }
    template
}

/// `maxSurge`-like values: a number or a share of `total`.
pub(crate) fn scaled(value: &IntOrString, total: i32, round_up: bool) -> Result<i32, Error> {
    match value {
        IntOrString::Int(number) => Ok((*number).max(0)),
        IntOrString::String(text) => {
            let percent: i64 = text
                .strip_suffix('%')
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| Error::Invalid(format!("{text:?} is neither a number nor a percentage")))?;
            let product = percent.max(0).saturating_mul(i64::from(total));
            let share = if round_up {
                product.saturating_add(99) / 100
            } else {
                product / 100
            };
            i32::try_from(share).map_err(|_| Error::Invalid(format!("{text:?} is too large")))
        }
    }
}

/// The order in which surplus pods go: those that serve least first.
pub(crate) fn sort_for_deletion(pods: &mut [Arc<Pod>]) {
    pods.sort_by_key(|pod| {
        let assigned = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        let phase = match phase(pod) {
            "" | "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let ready = ready_since(pod);
        let restarts: i32 = pod
            .status
            .iter()
            .flat_map(|status| status.container_statuses.iter().flatten())
            .map(|container| container.restart_count)
            .sum();
        let created = pod.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
        (
            assigned,
            phase,
            ready.is_some(),
            std::cmp::Reverse(ready.map(Timestamp::as_second)),
            std::cmp::Reverse(restarts),
            std::cmp::Reverse(created),
            pod.name_any(),
        )
    });
}

/// Creates a pod for `owner`, with the events that `kubectl describe` shows.
pub(crate) async fn create<K: Resource<DynamicType = ()>>(
    context: &Context,
    owner: &K,
    pod: &Pod,
) -> Result<Option<Pod>, Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    match api.create(&PostParams::default(), pod).await {
        Ok(created) => {
            context.informers.pods.observe(&created);
            let message = format!("Created pod: {}", created.name_any());
            context.events.normal(owner, "SuccessfulCreate", &message);
            Ok(Some(created))
        }
        Err(error) if namespace_terminating(&error) => Ok(None),
        Err(error) => {
            let reason = match &error {
                kube::Error::Api(status) => status.message.clone(),
                other => other.to_string(),
            };
            context
                .events
                .warning(owner, "FailedCreate", &format!("Error creating: {reason}"));
            Err(error.into())
        }
    }
}

/// Deletes a pod that `owner` manages, unless another of that name has taken its place.
pub(crate) async fn delete<K: Resource<DynamicType = ()>>(
    context: &Context,
    owner: &K,
    pod: &Pod,
) -> Result<(), Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let params = DeleteParams::background().preconditions(Preconditions {
        uid: pod.uid(),
        resource_version: None,
    });
    let deleted = ignore_not_found(api.delete(&pod.name_any(), &params).await)?;
    if let Some(pod) = deleted.as_ref().and_then(|answer| answer.as_ref().left()) {
        // With a grace period the answer is the pod, marked as going.
        context.informers.pods.observe(pod);
    }
    if deleted.is_some() {
        let message = format!("Deleted pod: {}", pod.name_any());
        context.events.normal(owner, "SuccessfulDelete", &message);
    }
    Ok(())
}

/// Writes core/v1 Events; best effort, never in the way of a reconcile.
#[derive(Clone)]
pub(crate) struct Events {
    client: Client,
}

impl Events {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    pub(crate) fn normal<K: Resource<DynamicType = ()>>(&self, object: &K, reason: &str, message: &str) {
        self.post(object, "Normal", reason, message);
    }

    pub(crate) fn warning<K: Resource<DynamicType = ()>>(&self, object: &K, reason: &str, message: &str) {
        self.post(object, "Warning", reason, message);
    }

    fn post<K: Resource<DynamicType = ()>>(&self, object: &K, kind: &str, reason: &str, message: &str) {
        let namespace = object.namespace().unwrap_or_else(|| "default".to_owned());
        let time = now();
        let suffix = Timestamp::now().as_nanosecond();
        let component = format!("{}-controller", K::kind(&()).to_lowercase());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{suffix:x}", object.name_any())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some(K::api_version(&()).into_owned()),
                kind: Some(K::kind(&()).into_owned()),
                name: Some(object.name_any()),
                namespace: object.namespace(),
                uid: object.uid(),
                resource_version: object.resource_version(),
                field_path: None,
            },
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            type_: Some(kind.to_owned()),
            count: Some(1),
            first_timestamp: Some(time.clone()),
            last_timestamp: Some(time),
            source: Some(EventSource {
                component: Some(component.clone()),
                host: None,
            }),
            reporting_component: Some(component),
            reporting_instance: Some(String::new()),
            ..Event::default()
        };
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        tokio::spawn(async move {
            if let Err(error) = api.create(&PostParams::default(), &event).await {
                tracing::debug!(%error, "an event could not be written");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_round_as_kubernetes_does() {
        let quarter = IntOrString::String("25%".to_owned());
        assert_eq!(scaled(&quarter, 1, true).ok(), Some(1));
        assert_eq!(scaled(&quarter, 1, false).ok(), Some(0));
        assert_eq!(scaled(&quarter, 10, true).ok(), Some(3));
        assert_eq!(scaled(&quarter, 10, false).ok(), Some(2));
        assert_eq!(scaled(&IntOrString::Int(4), 1, false).ok(), Some(4));
        assert!(scaled(&IntOrString::String("4".to_owned()), 1, false).is_err());
    }

    #[test]
    fn the_hash_ignores_its_own_label() {
        let mut template = PodTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: Some(BTreeMap::from([("app".to_owned(), "a".to_owned())])),
                ..ObjectMeta::default()
            }),
            spec: None,
        };
        let before = template_hash(&template, 0).expect("serialises");
        if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
            labels.insert(TEMPLATE_HASH.to_owned(), before.clone());
        }
        assert_eq!(template_hash(&template, 0).expect("serialises"), before);
        assert_ne!(template_hash(&template, 1).expect("serialises"), before);
        assert!(before.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    }

    #[test]
    fn unready_pods_go_before_ready_ones() {
        let pod = |name: &str, phase: &str, ready: bool| {
            let json = serde_json::json!({
                "metadata": {"name": name},
                "spec": {"nodeName": "n", "containers": []},
                "status": {"phase": phase, "conditions": [{
                    "type": "Ready", "status": if ready { "True" } else { "False" },
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            });
            Arc::new(serde_json::from_value::<Pod>(json).expect("a pod"))
        };
        let mut pods = vec![
            pod("ready", "Running", true),
            pod("pending", "Pending", false),
            pod("starting", "Running", false),
        ];
        sort_for_deletion(&mut pods);
        let names: Vec<_> = pods.iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["pending", "starting", "ready"]);
    }
}
