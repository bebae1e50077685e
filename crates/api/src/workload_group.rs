//! `WorkloadGroup` (networking.istio.io): the template for workloads that register themselves.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::workload_entry::WorkloadEntry;

/// Specification of a WorkloadGroup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["template"]))]
pub struct WorkloadGroup {
    /// Labels and annotations of each member.
    pub metadata: Option<GroupMetadata>,
    /// The entry made for each member.
    pub template: Option<WorkloadEntry>,
    /// How a member's health is checked.
    pub probe: Option<ReadinessProbe>,
}

/// Labels and annotations of each member.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GroupMetadata {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// How a member's health is checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReadinessProbe {
    /// Wait before the first check.
    pub initial_delay_seconds: i32,
    /// Time for one check.
    pub timeout_seconds: i32,
    /// Time between checks.
    pub period_seconds: i32,
    /// Successes in a row that make it healthy.
    pub success_threshold: i32,
    /// Failures in a row that make it unhealthy.
    pub failure_threshold: i32,
    /// By HTTP.
    pub http_get: Option<HttpHealthCheck>,
    /// By TCP.
    pub tcp_socket: Option<TcpHealthCheck>,
    /// By a command.
    pub exec: Option<ExecHealthCheck>,
    /// By the gRPC health service.
    pub grpc: Option<GrpcHealthCheck>,
}

/// A check by HTTP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["port"]))]
pub struct HttpHealthCheck {
    /// Path.
    pub path: String,
    /// Port.
    pub port: u32,
    /// Host.
    pub host: String,
    /// HTTP or HTTPS.
    pub scheme: String,
    /// Headers.
    pub http_headers: Vec<HttpHeader>,
}

/// A header of a check.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpHeader {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
}

/// A check by TCP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["port"]))]
pub struct TcpHealthCheck {
    /// Host.
    pub host: String,
    /// Port.
    pub port: u32,
}

/// A check by a command.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["command"]))]
pub struct ExecHealthCheck {
    /// The command and its arguments.
    pub command: Vec<String>,
}

/// A check by the gRPC health service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcHealthCheck {
    /// Port.
    pub port: u32,
    /// Service name asked for.
    pub service: String,
}
