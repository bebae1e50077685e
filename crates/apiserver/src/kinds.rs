//! Schemas of the built-in kinds, generated at first use from the Rust types of the Kubernetes API.
//!
//! Used for strict field validation, for pruning and decode errors, and for OpenAPI. One document of definitions for all.

use std::sync::OnceLock;

use k8s_openapi::api;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::schema::Schema;

/// Definition of ObjectMeta.
pub(crate) const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

struct Table {
    root: Value,
}

macro_rules! definitions {
    ($generator:expr, $($t:ty),* $(,)?) => { $( let _ = $generator.subschema_for::<$t>(); )* };
}

fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut g = SchemaSettings::draft2020_12().into_generator();
        definitions!(
            g,
            api::core::v1::Binding,
            api::core::v1::ConfigMap,
            api::core::v1::Endpoints,
            api::core::v1::Event,
            api::core::v1::LimitRange,
            api::core::v1::Namespace,
            api::core::v1::Node,
            api::core::v1::PersistentVolume,
            api::core::v1::PersistentVolumeClaim,
            api::core::v1::Pod,
            api::core::v1::PodTemplate,
            api::core::v1::ReplicationController,
            api::core::v1::ResourceQuota,
            api::core::v1::Secret,
            api::core::v1::ServiceAccount,
            api::core::v1::Service,
            api::apps::v1::ControllerRevision,
            api::apps::v1::DaemonSet,
            api::apps::v1::Deployment,
            api::apps::v1::ReplicaSet,
            api::apps::v1::StatefulSet,
            api::batch::v1::CronJob,
            api::batch::v1::Job,
            api::authentication::v1::TokenRequest,
            api::authentication::v1::TokenReview,
            api::authentication::v1::SelfSubjectReview,
            api::authorization::v1::LocalSubjectAccessReview,
            api::authorization::v1::SelfSubjectAccessReview,
            api::authorization::v1::SelfSubjectRulesReview,
            api::authorization::v1::SubjectAccessReview,
            api::autoscaling::v1::Scale,
            api::autoscaling::v1::HorizontalPodAutoscaler,
            api::autoscaling::v2::HorizontalPodAutoscaler,
            api::certificates::v1::CertificateSigningRequest,
            api::coordination::v1::Lease,
            api::discovery::v1::EndpointSlice,
            api::events::v1::Event,
            api::flowcontrol::v1::FlowSchema,
            api::flowcontrol::v1::PriorityLevelConfiguration,
            api::networking::v1::Ingress,
            api::networking::v1::IngressClass,
            api::networking::v1::NetworkPolicy,
            api::node::v1::RuntimeClass,
            api::policy::v1::Eviction,
            api::policy::v1::PodDisruptionBudget,
            api::rbac::v1::ClusterRole,
            api::rbac::v1::ClusterRoleBinding,
            api::rbac::v1::Role,
            api::rbac::v1::RoleBinding,
            api::scheduling::v1::PriorityClass,
            api::storage::v1::CSIDriver,
            api::storage::v1::CSINode,
            api::storage::v1::CSIStorageCapacity,
            api::storage::v1::StorageClass,
            api::storage::v1::VolumeAttachment,
            api::admissionregistration::v1::MutatingWebhookConfiguration,
            api::admissionregistration::v1::ValidatingWebhookConfiguration,
            api::admissionregistration::v1::ValidatingAdmissionPolicy,
            api::admissionregistration::v1::ValidatingAdmissionPolicyBinding,
            k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService,
        );
        // The definition of definitions refers to itself; it is generated apart so that its name is stable too.
        definitions!(
            g,
            k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition
        );
        let mut definitions = g.take_definitions(true);
        // A schema may hold any JSON (defaults, enums); lists of schemas are not structural, so `items` is one schema.
        let package = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1";
        for any in ["JSON", "JSONSchemaPropsOrBool", "JSONSchemaPropsOrStringArray"] {
            definitions.insert(format!("{package}.{any}"), json!({}));
        }
        let one = json!({"$ref": format!("#/$defs/{package}.JSONSchemaProps")});
        definitions.insert(format!("{package}.JSONSchemaPropsOrArray"), one);
        debug_assert!(
            definitions.contains_key(OBJECT_META),
            "schema names follow the Kubernetes definitions"
        );
        Table {
            root: json!({"$defs": definitions}),
        }
    })
}

/// Name of a kind's definition.
pub(crate) fn definition_name(group: &str, version: &str, kind: &str) -> Option<String> {
    let package = match group {
        "" => "io.k8s.api.core".to_owned(),
        "apiextensions.k8s.io" => "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions".to_owned(),
        "apiregistration.k8s.io" => "io.k8s.kube-aggregator.pkg.apis.apiregistration".to_owned(),
        "flowcontrol.apiserver.k8s.io" => "io.k8s.api.flowcontrol".to_owned(),
        "rbac.authorization.k8s.io" => "io.k8s.api.rbac".to_owned(),
        g => format!("io.k8s.api.{}", g.strip_suffix(".k8s.io").unwrap_or(g)),
    };
    let name = format!("{package}.{version}.{kind}");
    table().root["$defs"].get(&name).is_some().then_some(name)
}

/// The schema of a built-in kind.
pub(crate) fn schema(group: &str, version: &str, kind: &str) -> Option<Schema<'static>> {
    let name = definition_name(group, version, kind)?;
    let root = &table().root;
    Some(Schema::at(root, &root["$defs"][name.as_str()]))
}

/// The schema of `metadata`.
pub(crate) fn object_meta() -> Schema<'static> {
    let root = &table().root;
    Schema::at(root, &root["$defs"][OBJECT_META])
}

/// Copies a definition and all that it refers to, with references as OpenAPI v3 has them.
pub(crate) fn collect(name: &str, out: &mut Map<String, Value>) {
    let mut todo = vec![name.to_owned()];
    while let Some(name) = todo.pop() {
        if out.contains_key(&name) {
            continue;
        }
        let Some(definition) = table().root["$defs"].get(&name) else {
            continue;
        };
        let mut definition = definition.clone();
        rewrite(&mut definition, &mut todo);
        out.insert(name, definition);
    }
}

fn rewrite(value: &mut Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map
                .get("$ref")
                .and_then(Value::as_str)
                .and_then(|r| r.strip_prefix("#/$defs/"))
            {
                let name = name.to_owned();
                let description = map.get("description").cloned();
                found.push(name.clone());
                // OpenAPI 3.0 ignores what stands beside a reference; a description needs allOf.
                let target = json!({"$ref": format!("#/components/schemas/{name}")});
                map.clear();
                match description {
                    Some(d) => {
                        map.insert("description".into(), d);
                        map.insert("allOf".into(), json!([target]));
                    }
                    None => {
                        map.insert("$ref".into(), target["$ref"].clone());
                    }
                }
                return;
            }
            for v in map.values_mut() {
                rewrite(v, found);
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| rewrite(v, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_builtin_kind_has_a_schema() {
        for r in crate::resources::builtin() {
            if matches!(r.kind.as_str(), "ComponentStatus") {
                continue;
            }
            assert!(
                definition_name(&r.group, &r.version, &r.kind).is_some(),
                "{} {}",
                r.group,
                r.kind
            );
        }
        let pod = schema("", "v1", "Pod").unwrap();
        let mut value = json!({"spec": {"containers": [{"name": "a", "iamge": "x", "ports": [{"containerPort": 80}]}]}, "metadata": {"name": "x"}});
        let mut unknown = Vec::new();
        crate::schema::prune(&mut value, pod, "", &mut unknown);
        assert_eq!(unknown, ["spec.containers[0].iamge"]);
        let mut limits =
            json!({"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": 0.5, "memory": "1Gi"}}}]}});
        assert_eq!(crate::schema::decode_error(&limits, pod, ""), None);
        crate::schema::strip_nulls(&mut limits, pod);
        assert_eq!(
            limits["spec"]["containers"][0]["resources"]["limits"],
            json!({"cpu": "0.5", "memory": "1Gi"})
        );
        limits["spec"]["containers"][0]["resources"]["limits"]["memory"] = "1GiB".into();
        assert_eq!(
            crate::schema::decode_error(&limits, pod, "").map(|e| e.1).as_deref(),
            Some("spec.containers.resources.limits.memory")
        );
        let bad = json!({"spec": {"replicas": "3"}});
        let deployment = schema("apps", "v1", "Deployment").unwrap();
        assert_eq!(
            crate::schema::decode_error(&bad, deployment, "").map(|e| (e.1, e.2)),
            Some(("spec.replicas".into(), "int32".into()))
        );
    }
}
