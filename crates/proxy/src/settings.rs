//! What the process is told by its environment (SEMANTICS S4.90, S5.34): names, addresses, files, times.
//!
//! Read once at start by `main`; everything below gets values, not variables.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use mantlet_identity::{KeyAlgorithm, SpiffeId, TrustDomain};
use serde_json::{Map, Value};

use crate::telemetry::exchange::PeerLabels;

/// Version that the proxy reports; Istio's, since clients compare it.
pub const ISTIO_VERSION: &str = "1.30.0-mantlet";

/// A setting that cannot be used. The process ends with this text: nothing can be right after it.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct SettingError {
    name: &'static str,
    problem: String,
}

fn bad(name: &'static str, problem: impl std::fmt::Display) -> SettingError {
    SettingError {
        name,
        problem: problem.to_string(),
    }
}

/// Sidecar or gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Beside one application.
    Sidecar,
    /// On its own.
    Router,
}

/// Everything the process was told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Sidecar or gateway.
    pub role: Role,
    /// xDS node id.
    pub node_id: String,
    /// Own identity, asked for in CSRs.
    pub identity: SpiffeId,
    /// Namespace.
    pub namespace: String,
    /// Pod address.
    pub address: IpAddr,
    /// Node metadata.
    pub metadata: Map<String, Value>,
    /// This workload in telemetry.
    pub local: PeerLabels,
    /// `host:port` of xDS.
    pub discovery: String,
    /// `host:port` of the certificate authority.
    pub ca: String,
    /// Name to verify the control plane's certificate by, if not the host.
    pub control_san: Option<String>,
    /// Trust anchors for xDS.
    pub xds_root: PathBuf,
    /// Trust anchors for the certificate authority.
    pub ca_root: PathBuf,
    /// The mesh's mounted trust anchors.
    pub mesh_root: PathBuf,
    /// Service account token, read again for each call.
    pub token: PathBuf,
    /// Asked-for life of the certificate.
    pub secret_ttl: Duration,
    /// `SECRET_GRACE_PERIOD_RATIO` and its jitter.
    pub grace: (f64, f64),
    /// Kind of the workload key.
    pub key: KeyAlgorithm,
    /// Directory for copies of the certificate (`OUTPUT_CERTS`).
    pub output_certs: Option<PathBuf>,
    /// Worker threads.
    pub workers: usize,
    /// How long a terminating proxy goes on.
    pub termination_drain: Duration,
    /// Exit as soon as no connection is left.
    pub exit_on_zero: bool,
    /// Least time of a drain with [`Settings::exit_on_zero`].
    pub minimum_drain: Duration,
    /// Ports: admin (loopback), agent status, health, metrics.
    pub ports: Ports,
    /// Probers of the application (`ISTIO_KUBE_APP_PROBERS`).
    pub probers: BTreeMap<String, Value>,
    /// Whether all configuration is asked for at once (`--eager`, `MANTLET_EAGER`), as Envoy does, and not at first use.
    pub eager: bool,
    /// After how long without use configuration that was asked for at first use is given up (`MANTLET_ON_DEMAND_IDLE`).
    pub on_demand_idle: Duration,
    /// Extra gRPC metadata for the control plane (`XDS_HEADER_*`, `CA_HEADER_*`).
    pub headers: Vec<(String, String)>,
    /// What the process gives up at its start.
    pub sandbox: Sandbox,
}

/// What the operator says of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Whether there is one (`MANTLET_SANDBOX`, `off` for debugging).
    pub on: bool,
    /// More files and directories to read (`MANTLET_SANDBOX_READ`, separated by colons), such as mounts that
    /// configuration names in `file-cert:`.
    pub read: Vec<PathBuf>,
    /// More directories to write in (`MANTLET_SANDBOX_WRITE`), such as that of an access log in a file.
    pub write: Vec<PathBuf>,
}

impl Sandbox {
    fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Sandbox, SettingError> {
        let paths = |name: &'static str| {
            let text = get(name).unwrap_or_default();
            let paths: Vec<PathBuf> = text.split(':').filter(|p| !p.is_empty()).map(PathBuf::from).collect();
            match paths.iter().find(|path| !path.is_absolute()) {
                Some(path) => Err(bad(name, format!("{} is no absolute path", path.display()))),
                None => Ok(paths),
            }
        };
        Ok(Sandbox {
            on: match get("MANTLET_SANDBOX").as_deref() {
                None | Some("on") => true,
                Some("off") => false,
                Some(other) => return Err(bad("MANTLET_SANDBOX", format!("{other:?} is neither on nor off"))),
            },
            read: paths("MANTLET_SANDBOX_READ")?,
            write: paths("MANTLET_SANDBOX_WRITE")?,
        })
    }
}

/// Ports of the process's own servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Admin, loopback only.
    pub admin: u16,
    /// Merged metrics, probes.
    pub status: u16,
    /// Readiness.
    pub health: u16,
    /// Metrics.
    pub prometheus: u16,
}

/// Variables by name; a function, so that tests need not change the process's environment.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    /// Reads the environment. `domain` is the DNS domain of the namespace (`--domain`).
    ///
    /// # Errors
    /// The first variable that cannot be used.
    pub fn from_env(role: Role, domain: Option<&str>, env: Env<'_>) -> Result<Settings, SettingError> {
        let get = |name: &str| env(name).filter(|v| !v.is_empty());
        let proxy_config: Value = match get("PROXY_CONFIG") {
            None => Value::Null,
            Some(text) => serde_json::from_str(&text).map_err(|e| bad("PROXY_CONFIG", e))?,
        };
        let config_text = |name: &str| proxy_config.get(name).and_then(Value::as_str).map(str::to_string);
        let namespace = get("POD_NAMESPACE").unwrap_or_else(|| "default".to_string());
        let account = get("SERVICE_ACCOUNT").unwrap_or_else(|| "default".to_string());
        let name = get("POD_NAME").unwrap_or_else(|| "localhost".to_string());
        let address: IpAddr = match get("INSTANCE_IP") {
            None => IpAddr::from([127, 0, 0, 1]),
            Some(text) => text.parse().map_err(|e| bad("INSTANCE_IP", e))?,
        };
        let trust_domain = get("TRUST_DOMAIN").unwrap_or_else(|| "cluster.local".to_string());
        let trust_domain = TrustDomain::from_config(&trust_domain).map_err(|e| bad("TRUST_DOMAIN", e))?;
        let identity = SpiffeId::new(&trust_domain, &namespace, &account).map_err(|e| bad("SERVICE_ACCOUNT", e))?;
        let domain = domain
            .map(str::to_string)
            .unwrap_or_else(|| format!("{namespace}.svc.cluster.local"));
        let kind = match role {
            Role::Sidecar => "sidecar",
            Role::Router => "router",
        };
        let node_id = format!("{kind}~{address}~{name}.{namespace}~{domain}");
        let discovery = config_text("discoveryAddress").unwrap_or_else(|| "istiod.istio-system.svc:15012".to_string());
        let ca = get("CA_ADDR").unwrap_or_else(|| discovery.clone());
        let mesh_root = PathBuf::from("/var/run/secrets/istio/root-cert.pem");
        let root = |name: &str| get(name).filter(|v| v != "SYSTEM").map(PathBuf::from);
        let labels = labels(env)?;
        let label = |name: &str| labels.get(name).and_then(Value::as_str).map(str::to_string);
        let workload = get("ISTIO_META_WORKLOAD_NAME").unwrap_or_else(|| name.clone());
        let or_unknown = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_string());
        let local = PeerLabels {
            id: 0,
            canonical_name: label("service.istio.io/canonical-name")
                .or_else(|| label("app.kubernetes.io/name"))
                .or_else(|| label("app"))
                .unwrap_or_else(|| workload.clone()),
            canonical_revision: label("service.istio.io/canonical-revision")
                .or_else(|| label("version"))
                .unwrap_or_else(|| "latest".to_string()),
            app: or_unknown(label("app")),
            version: or_unknown(label("version")),
            workload,
            namespace: namespace.clone(),
            cluster: get("ISTIO_META_CLUSTER_ID").unwrap_or_else(|| "Kubernetes".to_string()),
        };
        let metadata = metadata(env, &namespace, &account, &name, address, &local, labels, &proxy_config);
        let port = |name: &'static str, default: u16| match get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|e| bad(name, e)),
        };
        let config_port = |name: &str, default: u16| {
            proxy_config
                .get(name)
                .and_then(Value::as_u64)
                .and_then(|p| u16::try_from(p).ok())
                .unwrap_or(default)
        };
        let ports = Ports {
            admin: config_port("proxyAdminPort", 15000),
            status: config_port("statusPort", 15020),
            health: port("ENVOY_STATUS_PORT", 15021)?,
            prometheus: port("ENVOY_PROMETHEUS_PORT", 15090)?,
        };
        let seconds = |name: &'static str, default: Duration| match get(name) {
            None => Ok(default),
            Some(text) => duration(&text).ok_or_else(|| bad(name, format!("{text:?} is no duration such as 5s"))),
        };
        let ratio = |name: &'static str, default: f64| match get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|e| bad(name, e)),
        };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let concurrency = proxy_config.get("concurrency").and_then(Value::as_u64).unwrap_or(0) as usize;
        let termination_drain = match config_text("terminationDrainDuration") {
            None => Duration::from_secs(5),
            Some(text) => duration(&text).ok_or_else(|| {
                bad(
                    "PROXY_CONFIG",
                    format!("terminationDrainDuration {text:?} is no duration"),
                )
            })?,
        };
        let probers = match get("ISTIO_KUBE_APP_PROBERS") {
            None => BTreeMap::new(),
            Some(text) => serde_json::from_str(&text).map_err(|e| bad("ISTIO_KUBE_APP_PROBERS", e))?,
        };
        Ok(Settings {
            role,
            node_id,
            identity,
            namespace,
            address,
            metadata,
            local,
            discovery,
            ca,
            control_san: get("ISTIOD_SAN"),
            xds_root: root("XDS_ROOT_CA").unwrap_or_else(|| mesh_root.clone()),
            ca_root: root("CA_ROOT_CA").unwrap_or_else(|| mesh_root.clone()),
            mesh_root: root("MANTLET_MESH_ROOT").unwrap_or(mesh_root),
            token: get("MANTLET_TOKEN_FILE")
                .map_or_else(|| PathBuf::from("/var/run/secrets/tokens/istio-token"), PathBuf::from),
            secret_ttl: seconds("SECRET_TTL", Duration::from_secs(24 * 3600))?,
            grace: (
                ratio(
                    "SECRET_GRACE_PERIOD_RATIO",
                    mantlet_identity::rotation::DEFAULT_GRACE_RATIO,
                )?,
                ratio(
                    "SECRET_GRACE_PERIOD_RATIO_JITTER",
                    mantlet_identity::rotation::DEFAULT_GRACE_JITTER,
                )?,
            ),
            key: key(env)?,
            output_certs: get("OUTPUT_CERTS").map(PathBuf::from),
            workers: if concurrency == 0 { cores } else { concurrency.min(64) },
            termination_drain,
            exit_on_zero: get("EXIT_ON_ZERO_ACTIVE_CONNECTIONS").as_deref() == Some("true"),
            minimum_drain: seconds("MINIMUM_DRAIN_DURATION", Duration::from_secs(5))?,
            ports,
            probers,
            eager: eager(env),
            on_demand_idle: seconds("MANTLET_ON_DEMAND_IDLE", Duration::from_secs(600))?,
            headers: Vec::new(),
            sandbox: Sandbox::from_env(get)?,
        })
    }
}

fn key(env: Env<'_>) -> Result<KeyAlgorithm, SettingError> {
    match env("ECC_CURVE").as_deref() {
        Some("P384") => return Ok(KeyAlgorithm::EcdsaP384),
        Some("" | "P256") | None => {}
        Some(other) => return Err(bad("ECC_CURVE", format!("{other:?} is neither P256 nor P384"))),
    }
    match env("WORKLOAD_RSA_KEY_SIZE").filter(|v| !v.is_empty()) {
        None => Ok(KeyAlgorithm::EcdsaP256),
        Some(text) => {
            let bits = text.parse().map_err(|e| bad("WORKLOAD_RSA_KEY_SIZE", e))?;
            KeyAlgorithm::rsa(bits).map_err(|e| bad("WORKLOAD_RSA_KEY_SIZE", e))
        }
    }
}

/// Pod labels: the downward API's file, then `ISTIO_METAJSON_LABELS`.
fn labels(env: Env<'_>) -> Result<Map<String, Value>, SettingError> {
    let file = env("MANTLET_PODINFO").unwrap_or_else(|| "/etc/istio/pod".to_string());
    let mut out = match std::fs::read_to_string(PathBuf::from(file).join("labels")) {
        Ok(text) => parse_labels(&text),
        Err(_) => Map::new(),
    };
    if let Some(text) = env("ISTIO_METAJSON_LABELS").filter(|v| !v.is_empty()) {
        let more: Map<String, Value> = serde_json::from_str(&text).map_err(|e| bad("ISTIO_METAJSON_LABELS", e))?;
        out.extend(more);
    }
    Ok(out)
}

/// Lines of `key="value"` with Go's quoting, of which labels need only the quotes.
fn parse_labels(text: &str) -> Map<String, Value> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(k, v)| (k.to_string(), Value::String(v.trim().trim_matches('"').to_string())))
        .collect()
}

fn eager(env: Env<'_>) -> bool {
    env("MANTLET_EAGER").is_some_and(|flag| flag == "true")
}

#[expect(clippy::too_many_arguments, reason = "the fields of one JSON object")]
fn metadata(
    env: Env<'_>,
    namespace: &str,
    account: &str,
    name: &str,
    address: IpAddr,
    local: &PeerLabels,
    labels: Map<String, Value>,
    proxy_config: &Value,
) -> Map<String, Value> {
    let mut out = Map::new();
    let mut set = |key: &str, value: Value| {
        out.insert(key.to_string(), value);
    };
    set("NAME", name.into());
    set("NAMESPACE", namespace.into());
    set("SERVICE_ACCOUNT", account.into());
    set("INSTANCE_IPS", address.to_string().into());
    set("ISTIO_VERSION", ISTIO_VERSION.into());
    set("WORKLOAD_NAME", local.workload.clone().into());
    set("CLUSTER_ID", local.cluster.clone().into());
    set("LABELS", Value::Object(labels));
    set("MANTLET", "true".into());
    if !eager(env) {
        set("MANTLET_ON_DEMAND", "true".into());
    }
    if !proxy_config.is_null() {
        set("PROXY_CONFIG", proxy_config.clone());
    }
    for (variable, key) in [
        ("ISTIO_META_MESH_ID", "MESH_ID"),
        ("ISTIO_META_NODE_NAME", "NODE_NAME"),
        ("ISTIO_META_INTERCEPTION_MODE", "INTERCEPTION_MODE"),
        ("ISTIO_META_NETWORK", "NETWORK"),
        ("ISTIO_META_OWNER", "OWNER"),
        ("ISTIO_META_APP_CONTAINERS", "APP_CONTAINERS"),
        ("ISTIO_META_POD_PORTS", "POD_PORTS"),
        ("ISTIO_META_DNS_CAPTURE", "DNS_CAPTURE"),
    ] {
        if let Some(value) = env(variable).filter(|v| !v.is_empty()) {
            out.insert(key.to_string(), value.into());
        }
    }
    out
}

/// Go's durations: `1h30m`, `500ms`, `5s`; a bare number is seconds.
pub fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?;
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let factor = match rest.get(..unit)? {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * factor).ok()?)?;
        rest = rest.get(unit..)?;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env_of(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string())
    }

    #[test]
    fn a_sidecar_gets_its_names_from_the_injector() {
        let env = env_of(&[
            ("POD_NAME", "web-1"),
            ("POD_NAMESPACE", "shop"),
            ("SERVICE_ACCOUNT", "web"),
            ("INSTANCE_IP", "10.244.0.7"),
            ("TRUST_DOMAIN", "cluster.local"),
            ("CA_ADDR", "istiod.istio-system.svc:15012"),
            (
                "PROXY_CONFIG",
                r#"{"concurrency":2,"terminationDrainDuration":"1m30s","discoveryAddress":"istiod:1"}"#,
            ),
            ("ISTIO_METAJSON_LABELS", r#"{"app":"web","version":"v1"}"#),
            ("MANTLET_PODINFO", "/nonexistent"),
            ("SECRET_TTL", "30s"),
        ]);
        let settings = Settings::from_env(Role::Sidecar, Some("shop.svc.cluster.local"), &env).unwrap();
        assert_eq!(settings.node_id, "sidecar~10.244.0.7~web-1.shop~shop.svc.cluster.local");
        assert_eq!(settings.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(settings.workers, 2);
        assert_eq!(settings.termination_drain, Duration::from_secs(90));
        assert_eq!(settings.secret_ttl, Duration::from_secs(30));
        assert_eq!(settings.discovery, "istiod:1");
        assert_eq!(settings.local.canonical_name, "web");
        assert_eq!(settings.metadata["MANTLET"], "true");
        assert_eq!(settings.metadata["LABELS"]["app"], "web");
    }

    #[test]
    fn bad_values_name_their_variable() {
        for (env, name) in [
            (env_of(&[("PROXY_CONFIG", "{")]), "PROXY_CONFIG"),
            (env_of(&[("INSTANCE_IP", "pod")]), "INSTANCE_IP"),
            (env_of(&[("SECRET_TTL", "soon")]), "SECRET_TTL"),
            (env_of(&[("WORKLOAD_RSA_KEY_SIZE", "512")]), "WORKLOAD_RSA_KEY_SIZE"),
            (env_of(&[("ECC_CURVE", "P521")]), "ECC_CURVE"),
        ] {
            let error = Settings::from_env(Role::Sidecar, None, &env).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }

    #[test]
    fn go_durations_are_read() {
        assert_eq!(duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("45"), Some(Duration::from_secs(45)));
        assert_eq!(duration("5 s"), None);
        assert_eq!(duration("5x"), None);
    }

    #[test]
    fn downward_api_labels_are_read() {
        let labels = parse_labels("app=\"web\"\nversion=\"v1\"\n");
        assert_eq!(labels["app"], "web");
        assert_eq!(labels["version"], "v1");
    }
}
