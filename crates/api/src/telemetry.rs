//! `Telemetry` (telemetry.istio.io): what is measured, traced and logged, and where it goes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::duration::Duration;
use crate::selector::{PolicyTargetReference, WorkloadSelector};

/// Specification of a Telemetry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Telemetry {
    /// Workloads it applies to.
    pub selector: Option<WorkloadSelector>,
    /// The one object it is attached to (deprecated form of `targetRefs`).
    pub target_ref: Option<PolicyTargetReference>,
    /// Objects it is attached to.
    #[schemars(length(max = 16))]
    pub target_refs: Vec<PolicyTargetReference>,
    /// Traces.
    pub tracing: Vec<Tracing>,
    /// Metrics.
    pub metrics: Vec<Metrics>,
    /// Access logs.
    pub access_logging: Vec<AccessLogging>,
}

/// Which side of a request a setting is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WorkloadMode {
    /// Both.
    #[default]
    ClientAndServer,
    /// The calling side.
    Client,
    /// The called side.
    Server,
}

/// A provider of `meshConfig.extensionProviders`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct ProviderRef {
    /// Its name.
    #[schemars(length(min = 1))]
    pub name: String,
}

/// Trace settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracing {
    /// Which side.
    pub r#match: Option<TracingSelector>,
    /// Where spans go.
    pub providers: Vec<ProviderRef>,
    /// Percent of requests that are sampled.
    pub random_sampling_percentage: Option<f64>,
    /// Report nothing.
    pub disable_span_reporting: Option<bool>,
    /// Further tags.
    pub custom_tags: BTreeMap<String, CustomTag>,
    /// Tag spans with Istio's own tags.
    pub enable_istio_tags: Option<bool>,
    /// Sample by the request id.
    pub use_request_id_for_trace_sampling: Option<bool>,
}

/// Which side of a request is traced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TracingSelector {
    /// The side.
    pub mode: WorkloadMode,
}

/// A further tag of spans.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CustomTag {
    /// Fixed.
    pub literal: Option<LiteralTag>,
    /// From the proxy's environment.
    pub environment: Option<EnvironmentTag>,
    /// From a request header.
    pub header: Option<HeaderTag>,
    /// From an access log formatter.
    pub formatter: Option<LiteralTag>,
}

/// A fixed value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LiteralTag {
    /// The value.
    pub value: String,
}

/// A value from the environment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvironmentTag {
    /// Variable.
    pub name: String,
    /// Used when it is not set.
    pub default_value: String,
}

/// A value from a header.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderTag {
    /// Header.
    pub name: String,
    /// Used when it is not sent.
    pub default_value: String,
}

/// Metric settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Metrics {
    /// Where they go.
    pub providers: Vec<ProviderRef>,
    /// Changes to the standard set.
    pub overrides: Vec<MetricsOverrides>,
    /// How often TCP and stream metrics are reported.
    pub reporting_interval: Option<Duration>,
}

/// A change to the standard metrics.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricsOverrides {
    /// Which metrics.
    pub r#match: Option<MetricSelector>,
    /// Leave them out.
    pub disabled: Option<bool>,
    /// Labels to set or remove.
    pub tag_overrides: BTreeMap<String, TagOverride>,
}

/// Which metrics a change is for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricSelector {
    /// A standard metric by its short name; ALL_METRICS when absent.
    pub metric: Option<String>,
    /// A metric by its full name.
    pub custom_metric: Option<String>,
    /// Which side.
    pub mode: WorkloadMode,
}

/// A change to one label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TagOverride {
    /// UPSERT or REMOVE.
    pub operation: TagOperation,
    /// CEL expression of the value.
    pub value: String,
}

/// What is done to a label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TagOperation {
    /// Set.
    #[default]
    Upsert,
    /// Remove.
    Remove,
}

/// Access log settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessLogging {
    /// Which side.
    pub r#match: Option<TracingSelector>,
    /// Where logs go.
    pub providers: Vec<ProviderRef>,
    /// Log nothing.
    pub disabled: Option<bool>,
    /// Which requests.
    pub filter: Option<AccessLogFilter>,
}

/// Which requests are logged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessLogFilter {
    /// CEL expression.
    pub expression: String,
}
