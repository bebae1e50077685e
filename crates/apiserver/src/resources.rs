//! The table of built-in resources, and the form that custom resources are brought into as well.
//!
//! Read by discovery, routing, the handlers and the protobuf decoder. It knows names and capabilities, no behaviour.

use std::sync::Arc;

use crate::crd::CustomVersion;

/// One served resource in one version.
#[derive(Debug, Clone)]
pub(crate) struct Resource {
    /// API group; empty for core.
    pub(crate) group: String,
    /// Version.
    pub(crate) version: String,
    /// Plural name, as in paths.
    pub(crate) plural: String,
    /// Singular name.
    pub(crate) singular: String,
    /// Kind.
    pub(crate) kind: String,
    /// Kind of the list.
    pub(crate) list_kind: String,
    /// Whether objects live in namespaces.
    pub(crate) namespaced: bool,
    /// Short names.
    pub(crate) short_names: Vec<String>,
    /// Categories, such as `all`.
    pub(crate) categories: Vec<String>,
    /// Verbs served.
    pub(crate) verbs: Vec<String>,
    /// Subresources served (`status`, `scale`, `exec`, ...).
    pub(crate) subresources: Vec<String>,
    /// Set for custom resources.
    pub(crate) custom: Option<Arc<CustomVersion>>,
    /// Where objects are stored when several groups serve the same ones (`events`).
    pub(crate) storage_group: String,
}

impl Resource {
    /// `v1` or `apps/v1`.
    pub(crate) fn api_version(&self) -> String {
        join_gv(&self.group, &self.version)
    }

    /// First-level store prefix of all objects.
    pub(crate) fn prefix(&self) -> String {
        let group = if self.storage_group.is_empty() {
            "core"
        } else {
            &self.storage_group
        };
        format!("/{group}/{}/", self.plural)
    }

    /// Store prefix of one namespace, or of all objects when `namespace` is none.
    pub(crate) fn namespace_prefix(&self, namespace: Option<&str>) -> String {
        match namespace {
            Some(ns) if self.namespaced => format!("{}{ns}/", self.prefix()),
            _ => self.prefix(),
        }
    }

    /// Store key of one object.
    pub(crate) fn key(&self, namespace: Option<&str>, name: &str) -> String {
        match namespace {
            Some(ns) if self.namespaced => format!("{}{ns}/{name}", self.prefix()),
            _ => format!("{}{name}", self.prefix()),
        }
    }

    /// Whether a subresource is served.
    pub(crate) fn has_subresource(&self, name: &str) -> bool {
        self.subresources.iter().any(|s| s == name)
    }

    /// Whether a verb is served.
    pub(crate) fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }
}

/// `v1` or `apps/v1`.
pub(crate) fn join_gv(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}

/// Splits `apps/v1` or `v1`.
pub(crate) fn split_gv(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

const ALL: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
const CREATE: &[&str] = &["create"];
const N: bool = true;
const C: bool = false;

type Row = (
    &'static str,            // plural
    &'static str,            // kind
    bool,                    // namespaced
    &'static [&'static str], // short names
    &'static [&'static str], // categories
    &'static [&'static str], // subresources
    &'static [&'static str], // verbs
);

type GroupTable = (&'static str, &'static str, &'static [Row]);

const STATUS: &[&str] = &["status"];
const SCALED: &[&str] = &["scale", "status"];
const EVERYTHING: &[&str] = &["all"];

const TABLE: &[GroupTable] = &[
    (
        "",
        "v1",
        &[
            ("bindings", "Binding", N, &[], &[], &[], CREATE),
            (
                "componentstatuses",
                "ComponentStatus",
                C,
                &["cs"],
                &[],
                &[],
                &["get", "list"],
            ),
            ("configmaps", "ConfigMap", N, &["cm"], &[], &[], ALL),
            ("endpoints", "Endpoints", N, &["ep"], &[], &[], ALL),
            ("events", "Event", N, &["ev"], &[], &[], ALL),
            ("limitranges", "LimitRange", N, &["limits"], &[], &[], ALL),
            (
                "namespaces",
                "Namespace",
                C,
                &["ns"],
                &[],
                &["finalize", "status"],
                &["create", "delete", "get", "list", "patch", "update", "watch"],
            ),
            ("nodes", "Node", C, &["no"], &[], &["proxy", "status"], ALL),
            (
                "persistentvolumeclaims",
                "PersistentVolumeClaim",
                N,
                &["pvc"],
                &[],
                STATUS,
                ALL,
            ),
            ("persistentvolumes", "PersistentVolume", C, &["pv"], &[], STATUS, ALL),
            (
                "pods",
                "Pod",
                N,
                &["po"],
                EVERYTHING,
                &[
                    "attach",
                    "binding",
                    "ephemeralcontainers",
                    "eviction",
                    "exec",
                    "log",
                    "portforward",
                    "proxy",
                    "resize",
                    "status",
                ],
                ALL,
            ),
            ("podtemplates", "PodTemplate", N, &[], &[], &[], ALL),
            (
                "replicationcontrollers",
                "ReplicationController",
                N,
                &["rc"],
                EVERYTHING,
                SCALED,
                ALL,
            ),
            ("resourcequotas", "ResourceQuota", N, &["quota"], &[], STATUS, ALL),
            ("secrets", "Secret", N, &[], &[], &[], ALL),
            ("serviceaccounts", "ServiceAccount", N, &["sa"], &[], &["token"], ALL),
            (
                "services",
                "Service",
                N,
                &["svc"],
                EVERYTHING,
                &["proxy", "status"],
                ALL,
            ),
        ],
    ),
    (
        "apps",
        "v1",
        &[
            ("controllerrevisions", "ControllerRevision", N, &[], &[], &[], ALL),
            ("daemonsets", "DaemonSet", N, &["ds"], EVERYTHING, STATUS, ALL),
            ("deployments", "Deployment", N, &["deploy"], EVERYTHING, SCALED, ALL),
            ("replicasets", "ReplicaSet", N, &["rs"], EVERYTHING, SCALED, ALL),
            ("statefulsets", "StatefulSet", N, &["sts"], EVERYTHING, SCALED, ALL),
        ],
    ),
    (
        "batch",
        "v1",
        &[
            ("cronjobs", "CronJob", N, &["cj"], EVERYTHING, STATUS, ALL),
            ("jobs", "Job", N, &[], EVERYTHING, STATUS, ALL),
        ],
    ),
    (
        "authentication.k8s.io",
        "v1",
        &[
            ("selfsubjectreviews", "SelfSubjectReview", C, &[], &[], &[], CREATE),
            ("tokenreviews", "TokenReview", C, &[], &[], &[], CREATE),
        ],
    ),
    (
        "authorization.k8s.io",
        "v1",
        &[
            (
                "localsubjectaccessreviews",
                "LocalSubjectAccessReview",
                N,
                &[],
                &[],
                &[],
                CREATE,
            ),
            (
                "selfsubjectaccessreviews",
                "SelfSubjectAccessReview",
                C,
                &[],
                &[],
                &[],
                CREATE,
            ),
            (
                "selfsubjectrulesreviews",
                "SelfSubjectRulesReview",
                C,
                &[],
                &[],
                &[],
                CREATE,
            ),
            ("subjectaccessreviews", "SubjectAccessReview", C, &[], &[], &[], CREATE),
        ],
    ),
    (
        "autoscaling",
        "v2",
        &[(
            "horizontalpodautoscalers",
            "HorizontalPodAutoscaler",
            N,
            &["hpa"],
            EVERYTHING,
            STATUS,
            ALL,
        )],
    ),
    (
        "autoscaling",
        "v1",
        &[(
            "horizontalpodautoscalers",
            "HorizontalPodAutoscaler",
            N,
            &["hpa"],
            EVERYTHING,
            STATUS,
            ALL,
        )],
    ),
    (
        "certificates.k8s.io",
        "v1",
        &[(
            "certificatesigningrequests",
            "CertificateSigningRequest",
            C,
            &["csr"],
            &[],
            &["approval", "status"],
            ALL,
        )],
    ),
    (
        "coordination.k8s.io",
        "v1",
        &[("leases", "Lease", N, &[], &[], &[], ALL)],
    ),
    (
        "discovery.k8s.io",
        "v1",
        &[("endpointslices", "EndpointSlice", N, &[], &[], &[], ALL)],
    ),
    ("events.k8s.io", "v1", &[("events", "Event", N, &["ev"], &[], &[], ALL)]),
    (
        "flowcontrol.apiserver.k8s.io",
        "v1",
        &[
            ("flowschemas", "FlowSchema", C, &[], &[], STATUS, ALL),
            (
                "prioritylevelconfigurations",
                "PriorityLevelConfiguration",
                C,
                &[],
                &[],
                STATUS,
                ALL,
            ),
        ],
    ),
    (
        "networking.k8s.io",
        "v1",
        &[
            ("ingressclasses", "IngressClass", C, &[], &[], &[], ALL),
            ("ingresses", "Ingress", N, &["ing"], &[], STATUS, ALL),
            ("networkpolicies", "NetworkPolicy", N, &["netpol"], &[], &[], ALL),
        ],
    ),
    (
        "node.k8s.io",
        "v1",
        &[("runtimeclasses", "RuntimeClass", C, &[], &[], &[], ALL)],
    ),
    (
        "policy",
        "v1",
        &[(
            "poddisruptionbudgets",
            "PodDisruptionBudget",
            N,
            &["pdb"],
            &[],
            STATUS,
            ALL,
        )],
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        &[
            ("clusterrolebindings", "ClusterRoleBinding", C, &[], &[], &[], ALL),
            ("clusterroles", "ClusterRole", C, &[], &[], &[], ALL),
            ("rolebindings", "RoleBinding", N, &[], &[], &[], ALL),
            ("roles", "Role", N, &[], &[], &[], ALL),
        ],
    ),
    (
        "scheduling.k8s.io",
        "v1",
        &[("priorityclasses", "PriorityClass", C, &["pc"], &[], &[], ALL)],
    ),
    (
        "storage.k8s.io",
        "v1",
        &[
            ("csidrivers", "CSIDriver", C, &[], &[], &[], ALL),
            ("csinodes", "CSINode", C, &[], &[], &[], ALL),
            ("csistoragecapacities", "CSIStorageCapacity", N, &[], &[], &[], ALL),
            ("storageclasses", "StorageClass", C, &["sc"], &[], &[], ALL),
            ("volumeattachments", "VolumeAttachment", C, &[], &[], STATUS, ALL),
        ],
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        &[
            (
                "mutatingwebhookconfigurations",
                "MutatingWebhookConfiguration",
                C,
                &[],
                &["api-extensions"],
                &[],
                ALL,
            ),
            (
                "validatingadmissionpolicies",
                "ValidatingAdmissionPolicy",
                C,
                &[],
                &["api-extensions"],
                STATUS,
                ALL,
            ),
            (
                "validatingadmissionpolicybindings",
                "ValidatingAdmissionPolicyBinding",
                C,
                &[],
                &["api-extensions"],
                &[],
                ALL,
            ),
            (
                "validatingwebhookconfigurations",
                "ValidatingWebhookConfiguration",
                C,
                &[],
                &["api-extensions"],
                &[],
                ALL,
            ),
        ],
    ),
    (
        "apiextensions.k8s.io",
        "v1",
        &[(
            "customresourcedefinitions",
            "CustomResourceDefinition",
            C,
            &["crd", "crds"],
            &["api-extensions"],
            STATUS,
            ALL,
        )],
    ),
    (
        "apiregistration.k8s.io",
        "v1",
        &[("apiservices", "APIService", C, &[], &["api-extensions"], STATUS, ALL)],
    ),
];

/// All built-in resources in the order in which discovery names them.
pub(crate) fn builtin() -> Vec<Resource> {
    let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let mut all = Vec::new();
    for (group, version, rows) in TABLE {
        for (plural, kind, namespaced, short, categories, subresources, verbs) in *rows {
            all.push(Resource {
                group: (*group).to_owned(),
                version: (*version).to_owned(),
                plural: (*plural).to_owned(),
                singular: kind.to_lowercase(),
                kind: (*kind).to_owned(),
                list_kind: format!("{kind}List"),
                namespaced: *namespaced,
                short_names: owned(short),
                categories: owned(categories),
                verbs: owned(verbs),
                subresources: owned(subresources),
                custom: None,
                storage_group: if *plural == "events" {
                    String::new()
                } else {
                    (*group).to_owned()
                },
            });
        }
    }
    all
}
