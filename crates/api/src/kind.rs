//! The table of Istio's kinds: group, versions, names, columns. One row per kind; CRDs, discovery and reading all come from it.

/// One printed column of `kubectl get`.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Heading.
    pub name: &'static str,
    /// `string` or `date`.
    pub kind: &'static str,
    /// Where the value is.
    pub json_path: &'static str,
    /// Shown by `kubectl explain`-like tools.
    pub description: &'static str,
}

/// One kind.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// CamelCase name.
    pub kind: &'static str,
    /// API group.
    pub group: &'static str,
    /// Name in URLs.
    pub plural: &'static str,
    /// Singular name.
    pub singular: &'static str,
    /// Short names for kubectl.
    pub short_names: &'static [&'static str],
    /// Served versions; all have the same schema. The first one is stored.
    pub versions: &'static [&'static str],
    /// Printed columns.
    pub columns: &'static [Column],
}

impl Kind {
    /// Name of the CustomResourceDefinition.
    pub fn crd_name(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }

    /// Group and stored version.
    pub fn api_version(&self) -> String {
        format!("{}/{}", self.group, self.versions[0])
    }

    /// True when its objects have no namespace.
    pub fn cluster_scoped(&self) -> bool {
        matches!(self.kind, "MeshPolicy" | "ClusterRbacConfig")
    }

    /// True when `api_version` is one of the kind's.
    pub fn serves(&self, api_version: &str) -> bool {
        api_version
            .split_once('/')
            .is_some_and(|(group, version)| group == self.group && self.versions.contains(&version))
    }
}

const AGE: Column = Column {
    name: "Age",
    kind: "date",
    json_path: ".metadata.creationTimestamp",
    description: "When the object was created. Clients show the time since then.",
};

const fn column(name: &'static str, json_path: &'static str, description: &'static str) -> Column {
    Column {
        name,
        kind: "string",
        json_path,
        description,
    }
}

const NETWORKING: &str = "networking.istio.io";
const SECURITY: &str = "security.istio.io";
const THREE: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const TWO: &[&str] = &["v1", "v1beta1"];

/// Every kind, in the order CRDs are installed.
pub const KINDS: &[Kind] = &[
    AUTHORIZATION_POLICY,
    DESTINATION_RULE,
    ENVOY_FILTER,
    GATEWAY,
    PEER_AUTHENTICATION,
    PROXY_CONFIG,
    REQUEST_AUTHENTICATION,
    SERVICE_ENTRY,
    SIDECAR,
    TELEMETRY,
    VIRTUAL_SERVICE,
    WASM_PLUGIN,
    WORKLOAD_ENTRY,
    WORKLOAD_GROUP,
    MESH_POLICY,
    POLICY,
    SERVICE_ROLE,
    SERVICE_ROLE_BINDING,
    CLUSTER_RBAC_CONFIG,
    RBAC_CONFIG,
];

/// AuthorizationPolicy.
pub const AUTHORIZATION_POLICY: Kind = Kind {
    kind: "AuthorizationPolicy",
    group: SECURITY,
    plural: "authorizationpolicies",
    singular: "authorizationpolicy",
    short_names: &["ap"],
    versions: TWO,
    columns: &[
        column("Action", ".spec.action", "What the policy does to matching requests."),
        AGE,
    ],
};

/// DestinationRule.
pub const DESTINATION_RULE: Kind = Kind {
    kind: "DestinationRule",
    group: NETWORKING,
    plural: "destinationrules",
    singular: "destinationrule",
    short_names: &["dr"],
    versions: THREE,
    columns: &[column("Host", ".spec.host", "The host the rule is for."), AGE],
};

/// EnvoyFilter.
pub const ENVOY_FILTER: Kind = Kind {
    kind: "EnvoyFilter",
    group: NETWORKING,
    plural: "envoyfilters",
    singular: "envoyfilter",
    short_names: &[],
    versions: &["v1alpha3"],
    columns: &[],
};

/// Gateway.
pub const GATEWAY: Kind = Kind {
    kind: "Gateway",
    group: NETWORKING,
    plural: "gateways",
    singular: "gateway",
    short_names: &["gw"],
    versions: THREE,
    columns: &[],
};

/// PeerAuthentication.
pub const PEER_AUTHENTICATION: Kind = Kind {
    kind: "PeerAuthentication",
    group: SECURITY,
    plural: "peerauthentications",
    singular: "peerauthentication",
    short_names: &["pa"],
    versions: TWO,
    columns: &[
        column("Mode", ".spec.mtls.mode", "Which connections are accepted."),
        AGE,
    ],
};

/// ProxyConfig.
pub const PROXY_CONFIG: Kind = Kind {
    kind: "ProxyConfig",
    group: NETWORKING,
    plural: "proxyconfigs",
    singular: "proxyconfig",
    short_names: &[],
    versions: &["v1beta1"],
    columns: &[],
};

/// RequestAuthentication.
pub const REQUEST_AUTHENTICATION: Kind = Kind {
    kind: "RequestAuthentication",
    group: SECURITY,
    plural: "requestauthentications",
    singular: "requestauthentication",
    short_names: &["ra"],
    versions: TWO,
    columns: &[],
};

/// ServiceEntry.
pub const SERVICE_ENTRY: Kind = Kind {
    kind: "ServiceEntry",
    group: NETWORKING,
    plural: "serviceentries",
    singular: "serviceentry",
    short_names: &["se"],
    versions: THREE,
    columns: &[
        column("Hosts", ".spec.hosts", "The hosts of the service."),
        column("Location", ".spec.location", "Inside or outside the mesh."),
        column(
            "Resolution",
            ".spec.resolution",
            "How addresses of endpoints are found.",
        ),
        AGE,
    ],
};

/// Sidecar.
pub const SIDECAR: Kind = Kind {
    kind: "Sidecar",
    group: NETWORKING,
    plural: "sidecars",
    singular: "sidecar",
    short_names: &[],
    versions: THREE,
    columns: &[],
};

/// Telemetry.
pub const TELEMETRY: Kind = Kind {
    kind: "Telemetry",
    group: "telemetry.istio.io",
    plural: "telemetries",
    singular: "telemetry",
    short_names: &["telemetry"],
    versions: &["v1", "v1alpha1"],
    columns: &[AGE],
};

/// VirtualService.
pub const VIRTUAL_SERVICE: Kind = Kind {
    kind: "VirtualService",
    group: NETWORKING,
    plural: "virtualservices",
    singular: "virtualservice",
    short_names: &["vs"],
    versions: THREE,
    columns: &[
        column("Gateways", ".spec.gateways", "The gateways it is bound to."),
        column("Hosts", ".spec.hosts", "The hosts whose traffic it routes."),
        AGE,
    ],
};

/// WasmPlugin.
pub const WASM_PLUGIN: Kind = Kind {
    kind: "WasmPlugin",
    group: "extensions.istio.io",
    plural: "wasmplugins",
    singular: "wasmplugin",
    short_names: &[],
    versions: &["v1alpha1"],
    columns: &[AGE],
};

/// WorkloadEntry.
pub const WORKLOAD_ENTRY: Kind = Kind {
    kind: "WorkloadEntry",
    group: NETWORKING,
    plural: "workloadentries",
    singular: "workloadentry",
    short_names: &["we"],
    versions: THREE,
    columns: &[
        AGE,
        column("Address", ".spec.address", "Where the workload is reached."),
    ],
};

/// WorkloadGroup.
pub const WORKLOAD_GROUP: Kind = Kind {
    kind: "WorkloadGroup",
    group: NETWORKING,
    plural: "workloadgroups",
    singular: "workloadgroup",
    short_names: &["wg"],
    versions: THREE,
    columns: &[AGE],
};

const fn former(
    kind: &'static str,
    group: &'static str,
    plural: &'static str,
    singular: &'static str,
    columns: &'static [Column],
) -> Kind {
    Kind {
        kind,
        group,
        plural,
        singular,
        short_names: &[],
        versions: &["v1alpha1"],
        columns,
    }
}

/// MeshPolicy, the former mesh-wide PeerAuthentication.
pub const MESH_POLICY: Kind = former(
    "MeshPolicy",
    crate::legacy::AUTHENTICATION,
    "meshpolicies",
    "meshpolicy",
    &[],
);

/// Policy, the former PeerAuthentication and RequestAuthentication.
pub const POLICY: Kind = former("Policy", crate::legacy::AUTHENTICATION, "policies", "policy", &[]);

/// ServiceRole, half of a former AuthorizationPolicy.
pub const SERVICE_ROLE: Kind = former("ServiceRole", crate::legacy::RBAC, "serviceroles", "servicerole", &[]);

/// ServiceRoleBinding, the other half.
pub const SERVICE_ROLE_BINDING: Kind = former(
    "ServiceRoleBinding",
    crate::legacy::RBAC,
    "servicerolebindings",
    "servicerolebinding",
    &[
        column(
            "Reference",
            ".spec.roleRef.name",
            "The ServiceRole that is given to the subjects.",
        ),
        AGE,
    ],
);

/// ClusterRbacConfig, where the former authorization is in force.
pub const CLUSTER_RBAC_CONFIG: Kind = former(
    "ClusterRbacConfig",
    crate::legacy::RBAC,
    "clusterrbacconfigs",
    "clusterrbacconfig",
    &[],
);

/// RbacConfig, the ClusterRbacConfig of still earlier days.
pub const RBAC_CONFIG: Kind = former("RbacConfig", crate::legacy::RBAC, "rbacconfigs", "rbacconfig", &[]);

/// The row of a kind by its name and, if given, its apiVersion (any served one).
pub fn find(kind: &str, api_version: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|row| row.kind == kind && row.serves(api_version))
}
