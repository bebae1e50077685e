//! The containers that are added: `istio-proxy`, `istio-init` and `istio-validation` (S5.32–S5.37, S5.40, S5.41).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::template::Context;
use super::{INIT_CONTAINER, PROXY_CONTAINER, VALIDATION_CONTAINER};

/// What the proxy is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Beside an app.
    Sidecar,
    /// On its own.
    Gateway,
}

/// Container `istio-proxy`.
pub(super) fn container(context: &Context<'_>, role: Role) -> Value {
    let values = &context.config.values;
    let global = &values.global;
    let verb = if role == Role::Sidecar { "sidecar" } else { "router" };
    let mut args = vec![
        json!("proxy"),
        json!(verb),
        json!("--domain"),
        json!(format!("$(POD_NAMESPACE).svc.{}", global.proxy.cluster_domain)),
        json!(format!(
            "--proxyLogLevel={}",
            context.annotation_or("sidecar.istio.io/logLevel", &global.proxy.log_level)
        )),
        json!(format!(
            "--proxyComponentLogLevel={}",
            context.annotation_or("sidecar.istio.io/componentLogLevel", &global.proxy.component_log_level)
        )),
        json!(format!(
            "--log_output_level={}",
            context.annotation_or("sidecar.istio.io/agentLogLevel", &global.logging.level)
        )),
    ];
    if global.log_as_json {
        args.push(json!("--log_as_json"));
    }
    let mut container = json!({
        "name": PROXY_CONTAINER,
        "image": image(context),
        "args": args,
        "ports": [{ "containerPort": 15090, "protocol": "TCP", "name": "http-envoy-prom" }],
        "env": env(context, role),
        "resources": resources(context),
        "securityContext": security_context(context, role),
        "volumeMounts": mounts(),
    });
    if !global.image_pull_policy.is_empty() {
        container["imagePullPolicy"] = json!(global.image_pull_policy);
    }
    let native = role == Role::Sidecar && context.native_sidecar();
    if native {
        container["restartPolicy"] = json!("Always");
    }
    if let Some(lifecycle) = &global.proxy.lifecycle {
        container["lifecycle"] = lifecycle.clone();
    } else if native {
        container["lifecycle"] = json!({ "preStop": { "exec": { "command": [
            "pilot-agent", "request", format!("--debug-port={}", context.status_port()), "POST", "drain"
        ] } } });
    } else if role == Role::Sidecar && context.hold_application() {
        container["lifecycle"] = json!({ "postStart": { "exec": { "command": ["pilot-agent", "wait"] } } });
    }
    if context.status_port() != 0 {
        let http = json!({ "path": "/healthz/ready", "port": 15021 });
        let startup = &global.proxy.startup_probe;
        if startup.enabled {
            container["startupProbe"] = json!({
                "httpGet": http,
                "initialDelaySeconds": 0,
                "periodSeconds": 1,
                "timeoutSeconds": 3,
                "failureThreshold": startup.failure_threshold,
            });
        }
        let seconds = |name: &str, default: u32| {
            context
                .annotation(&format!("readiness.status.sidecar.istio.io/{name}"))
                .and_then(|text| text.parse().ok())
                .unwrap_or(default)
        };
        container["readinessProbe"] = json!({
            "httpGet": http,
            "initialDelaySeconds": seconds("initialDelaySeconds", global.proxy.readiness_initial_delay_seconds),
            "periodSeconds": seconds("periodSeconds", global.proxy.readiness_period_seconds),
            "timeoutSeconds": 3,
            "failureThreshold": seconds("failureThreshold", global.proxy.readiness_failure_threshold),
        });
    }
    container
}

/// Container `istio-init`: sets capture up as root, then ends.
pub(super) fn init(context: &Context<'_>) -> Value {
    let privileged = context.config.values.global.proxy.privileged;
    let mut container = json!({
        "name": INIT_CONTAINER,
        "image": init_image(context),
        "args": capture_args(context),
        "resources": resources(context),
        "securityContext": {
            "allowPrivilegeEscalation": privileged,
            "privileged": privileged,
            "capabilities": { "add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"] },
            "readOnlyRootFilesystem": false,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "runAsUser": 0,
        },
    });
    finish_init(context, &mut container);
    container
}

/// Container `istio-validation`: checks, without privileges, that a network plugin has set capture up.
pub(super) fn validation(context: &Context<'_>) -> Value {
    let mut args = capture_args(context);
    args.extend(["--run-validation".into(), "--skip-rule-apply".into()]);
    let mut container = json!({
        "name": VALIDATION_CONTAINER,
        "image": init_image(context),
        "args": args,
        "resources": resources(context),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "privileged": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsGroup": 1337,
            "runAsNonRoot": true,
            "runAsUser": 1337,
        },
    });
    finish_init(context, &mut container);
    container
}

fn finish_init(context: &Context<'_>, container: &mut Value) {
    let policy = &context.config.values.global.image_pull_policy;
    if !policy.is_empty() {
        container["imagePullPolicy"] = json!(policy);
    }
    let metadata = &context.proxy_config.proxy_metadata;
    if !metadata.is_empty() {
        let env: Vec<Value> = metadata.iter().map(|(k, v)| json!({ "name": k, "value": v })).collect();
        container["env"] = json!(env);
    }
}

/// Arguments of `istio-iptables` (S5.32).
fn capture_args(context: &Context<'_>) -> Vec<String> {
    let proxy = &context.config.values.global.proxy;
    let mesh = &context.config.mesh;
    let traffic =
        |name: &str, default: &str| context.annotation_or(&format!("traffic.sidecar.istio.io/{name}"), default);
    let mut args: Vec<String> = vec!["istio-iptables".into()];
    let mut flag = |name: &str, value: String| {
        args.push(name.into());
        args.push(value);
    };
    flag("-p", mesh.proxy_listen_port.to_string());
    flag("-z", mesh.proxy_inbound_listen_port.to_string());
    flag("-u", "1337".into());
    flag("-m", context.interception_mode().into());
    flag("-i", traffic("includeOutboundIPRanges", &proxy.include_ip_ranges));
    flag("-x", traffic("excludeOutboundIPRanges", &proxy.exclude_ip_ranges));
    flag("-b", traffic("includeInboundPorts", &proxy.include_inbound_ports));
    let mut excluded = vec!["15090".to_string(), "15021".to_string()];
    if context.status_port() != 0 {
        excluded.push(context.status_port().to_string());
    }
    for port in traffic("excludeInboundPorts", &proxy.exclude_inbound_ports)
        .split(',')
        .map(str::trim)
    {
        if !port.is_empty() && !excluded.iter().any(|p| p == port) {
            excluded.push(port.into());
        }
    }
    flag("-d", excluded.join(","));
    let include_outbound = traffic("includeOutboundPorts", &proxy.include_outbound_ports);
    if !include_outbound.is_empty() {
        flag("-q", include_outbound);
    }
    let exclude_outbound = traffic("excludeOutboundPorts", &proxy.exclude_outbound_ports);
    if !exclude_outbound.is_empty() {
        flag("-o", exclude_outbound);
    }
    let virtual_interfaces = context
        .annotation("istio.io/reroute-virtual-interfaces")
        .or_else(|| context.annotation("traffic.sidecar.istio.io/kubevirtInterfaces"));
    if let Some(interfaces) = virtual_interfaces.filter(|i| !i.is_empty()) {
        flag("-k", interfaces.into());
    }
    let exclude_interfaces = traffic("excludeInterfaces", "");
    if !exclude_interfaces.is_empty() {
        flag("-c", exclude_interfaces);
    }
    args
}

/// What a network plugin reads instead of the init container's arguments.
pub(super) fn cni_annotations(context: &Context<'_>) -> BTreeMap<String, String> {
    let proxy = &context.config.values.global.proxy;
    let defaults = [
        (
            "traffic.sidecar.istio.io/includeOutboundIPRanges",
            proxy.include_ip_ranges.as_str(),
        ),
        (
            "traffic.sidecar.istio.io/excludeOutboundIPRanges",
            proxy.exclude_ip_ranges.as_str(),
        ),
        (
            "traffic.sidecar.istio.io/includeInboundPorts",
            proxy.include_inbound_ports.as_str(),
        ),
        (
            "traffic.sidecar.istio.io/excludeInboundPorts",
            proxy.exclude_inbound_ports.as_str(),
        ),
        (
            "traffic.sidecar.istio.io/includeOutboundPorts",
            proxy.include_outbound_ports.as_str(),
        ),
        (
            "traffic.sidecar.istio.io/excludeOutboundPorts",
            proxy.exclude_outbound_ports.as_str(),
        ),
    ];
    let mut all: BTreeMap<String, String> = defaults
        .into_iter()
        .filter(|(name, default)| !default.is_empty() && context.annotation(name).is_none())
        .map(|(name, default)| (name.to_string(), default.to_string()))
        .collect();
    all.insert(
        "sidecar.istio.io/interceptionMode".into(),
        context.interception_mode().into(),
    );
    all
}

fn image(context: &Context<'_>) -> String {
    if let Some(image) = context.annotation("sidecar.istio.io/proxyImage") {
        return image.to_string();
    }
    with_type(
        context,
        context
            .config
            .values
            .image(&context.config.values.global.proxy.image, "", ""),
    )
}

fn init_image(context: &Context<'_>) -> String {
    let values = &context.config.values;
    let name = match values.global.proxy_init.image.as_str() {
        "" => &values.global.proxy.image,
        own => own,
    };
    with_type(context, values.image(name, "", ""))
}

/// Image types other than the default are tag suffixes.
fn with_type(context: &Context<'_>, image: String) -> String {
    match context.proxy_config.image.as_ref().map(|i| i.image_type.as_str()) {
        None | Some("" | "default") => image,
        Some(kind) => format!("{image}-{kind}"),
    }
}

fn resources(context: &Context<'_>) -> Value {
    let wanted = [
        ("requests", "cpu", "sidecar.istio.io/proxyCPU"),
        ("requests", "memory", "sidecar.istio.io/proxyMemory"),
        ("limits", "cpu", "sidecar.istio.io/proxyCPULimit"),
        ("limits", "memory", "sidecar.istio.io/proxyMemoryLimit"),
    ];
    if wanted
        .iter()
        .all(|(_, _, annotation)| context.annotation(annotation).is_none())
    {
        return context.config.values.global.proxy.resources.clone();
    }
    let mut resources = json!({});
    for (group, name, annotation) in wanted {
        if let Some(value) = context.annotation(annotation) {
            resources[group][name] = json!(value);
        }
    }
    resources
}

fn security_context(context: &Context<'_>, role: Role) -> Value {
    let privileged = context.config.values.global.proxy.privileged && role == Role::Sidecar;
    let tproxy = role == Role::Sidecar && context.interception_mode() == "TPROXY";
    let mut security = json!({
        "allowPrivilegeEscalation": privileged,
        "capabilities": { "drop": ["ALL"] },
        "privileged": privileged,
        "readOnlyRootFilesystem": true,
        "runAsGroup": 1337,
        "runAsNonRoot": true,
        "runAsUser": 1337,
    });
    if tproxy {
        // Transparent sockets need NET_ADMIN, which only root keeps across exec.
        security["capabilities"] = json!({ "add": ["NET_ADMIN"], "drop": ["ALL"] });
        security["runAsNonRoot"] = json!(false);
        security["runAsUser"] = json!(0);
    }
    security
}

fn mounts() -> Value {
    json!([
        { "name": "workload-socket", "mountPath": "/var/run/secrets/workload-spiffe-uds" },
        { "name": "credential-socket", "mountPath": "/var/run/secrets/credential-uds" },
        { "name": "workload-certs", "mountPath": "/var/run/secrets/workload-spiffe-credentials" },
        { "name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio" },
        { "name": "istio-ca-crl", "mountPath": "/var/run/secrets/istio/crl" },
        { "name": "istio-data", "mountPath": "/var/lib/istio/data" },
        { "name": "istio-envoy", "mountPath": "/etc/istio/proxy" },
        { "name": "istio-token", "mountPath": "/var/run/secrets/tokens" },
        { "name": "istio-podinfo", "mountPath": "/etc/istio/pod" },
    ])
}

/// Environment of the proxy (S5.34), in Istio's order.
fn env(context: &Context<'_>, role: Role) -> Value {
    let values = &context.config.values;
    let global = &values.global;
    let mut env = Vec::new();
    let literal = |name: &str, value: &str| json!({ "name": name, "value": value });
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let resource = |name: &str, what: &str| json!({ "name": name, "valueFrom": { "resourceFieldRef": { "resource": what, "divisor": "0" } } });
    let istiod = format!(
        "{}.{}.svc:15012",
        mantlet_api::names::with_revision("istiod", &context.config.revision),
        global.istio_namespace
    );
    env.push(literal("PILOT_CERT_PROVIDER", &global.pilot_cert_provider));
    env.push(literal(
        "CA_ADDR",
        if global.ca_address.is_empty() {
            &istiod
        } else {
            &global.ca_address
        },
    ));
    env.push(field("POD_NAME", "metadata.name"));
    env.push(field("POD_NAMESPACE", "metadata.namespace"));
    env.push(field("INSTANCE_IP", "status.podIP"));
    env.push(field("SERVICE_ACCOUNT", "spec.serviceAccountName"));
    env.push(field("HOST_IP", "status.hostIP"));
    env.push(resource("ISTIO_CPU_LIMIT", "limits.cpu"));
    env.push(literal("PROXY_CONFIG", &format!("{}\n", proxy_config_json(context))));
    env.push(literal("ISTIO_META_POD_PORTS", &pod_ports(context)));
    let apps: Vec<&str> = context.app_containers().filter_map(|c| c["name"].as_str()).collect();
    env.push(literal("ISTIO_META_APP_CONTAINERS", &apps.join(",")));
    env.push(resource("GOMEMLIMIT", "limits.memory"));
    env.push(resource("GOMAXPROCS", "limits.cpu"));
    let cluster = &global.multi_cluster.cluster_name;
    env.push(literal(
        "ISTIO_META_CLUSTER_ID",
        if cluster.is_empty() { "Kubernetes" } else { cluster },
    ));
    env.push(field("ISTIO_META_NODE_NAME", "spec.nodeName"));
    if role == Role::Sidecar {
        env.push(literal("ISTIO_META_INTERCEPTION_MODE", context.interception_mode()));
    }
    let network = context
        .labels
        .get("topology.istio.io/network")
        .unwrap_or(&global.network);
    if !network.is_empty() {
        env.push(literal("ISTIO_META_NETWORK", network));
    }
    if !context.owner.name.is_empty() {
        env.push(literal("ISTIO_META_WORKLOAD_NAME", &context.owner.name));
        env.push(literal("ISTIO_META_OWNER", &context.owner.uri()));
    }
    if let Some(config) = context.annotation("sidecar.istio.io/bootstrapOverride") {
        env.push(literal("ISTIO_BOOTSTRAP_OVERRIDE", config));
    }
    let trust_domain = context.config.mesh.trust_domain();
    let mesh_id = if global.mesh_id.is_empty() {
        &trust_domain
    } else {
        &global.mesh_id
    };
    env.push(literal("ISTIO_META_MESH_ID", mesh_id));
    env.push(literal("TRUST_DOMAIN", &trust_domain));
    for (name, value) in &context.proxy_config.proxy_metadata {
        env.push(literal(name, value));
    }
    // What the webhook's path says wins over all of the above.
    for (name, value) in context.env {
        env.retain(|e| e["name"] != name.as_str());
        env.push(literal(name, value));
    }
    Value::Array(env)
}

/// The settings that differ from the built-in defaults.
fn proxy_config_json(context: &Context<'_>) -> Value {
    let defaults = serde_json::to_value(mantlet_api::proxy_config::ProxyConfig::default()).unwrap_or_default();
    let mut raw = context.proxy_config_raw.clone();
    let global = &context.config.values.global;
    let own = mantlet_api::names::with_revision("istiod", &context.config.revision);
    if raw.get("discoveryAddress").is_none() && (own != "istiod" || global.istio_namespace != "istio-system") {
        raw["discoveryAddress"] = json!(format!("{own}.{}.svc:15012", global.istio_namespace));
    }
    let status_port = context.status_port();
    if raw.get("statusPort").is_some() || status_port != 15020 {
        raw["statusPort"] = json!(status_port);
    }
    if let Some(map) = raw.as_object_mut() {
        map.retain(|key, value| defaults.get(key) != Some(value));
    }
    raw
}

/// Ports of the app's containers as JSON.
fn pod_ports(context: &Context<'_>) -> String {
    let ports: Vec<String> = context
        .app_containers()
        .filter_map(|c| c.get("ports").and_then(Value::as_array))
        .flatten()
        .filter_map(Value::as_object)
        .map(|port| {
            let mut port = port.clone();
            port.entry("protocol").or_insert_with(|| json!("TCP"));
            Value::Object(port).to_string()
        })
        .collect();
    if ports.is_empty() {
        return "[\n]".into();
    }
    let lines: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(i, port)| {
            if i == 0 {
                format!("    {port}")
            } else {
                format!("    ,{port}")
            }
        })
        .collect();
    format!("[\n{}\n]", lines.join("\n"))
}
