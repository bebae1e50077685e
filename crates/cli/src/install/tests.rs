//! Objects of the profiles as goldens, settings and their errors, prompts.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::objects::{self, Group};
use super::spec::Spec;
use super::*;

mod chart;
mod cluster;
mod commands;

fn source(set: &[&str]) -> Source {
    Source {
        set: set.iter().map(|s| (*s).to_string()).collect(),
        ..Source::default()
    }
}

fn groups(set: &[&str]) -> Vec<Group> {
    let mut all = vec!["tag=test"];
    all.extend(set);
    objects::all(&Spec::resolve(&source(&all)).unwrap()).unwrap()
}

fn objects(set: &[&str]) -> Vec<Value> {
    groups(set).into_iter().flat_map(|g| g.objects).collect()
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|o| o["kind"] == kind && o["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn has(objects: &[Value], kind: &str, name: &str) -> bool {
    objects
        .iter()
        .any(|o| o["kind"] == kind && o["metadata"]["name"] == name)
}

fn golden(name: &str, text: &str) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/install/goldens")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == expected,
        "{} is out of date; run with UPDATE_GOLDEN=1 and review",
        path.display()
    );
}

#[test]
fn manifests_are_as_checked_in() {
    for (name, set) in [
        ("default.yaml", vec![]),
        ("demo.yaml", vec!["profile=demo"]),
        ("minimal-canary.yaml", vec!["profile=minimal", "revision=canary"]),
    ] {
        // CRDs have a golden of their own.
        let objects: Vec<Value> = self::objects(&set)
            .into_iter()
            .filter(|o| o["kind"] != "CustomResourceDefinition")
            .collect();
        golden(name, &yaml::write_all(&objects));
    }
}

#[test]
fn permissions_are_as_checked_in() {
    let all = objects(&[]);
    let rules: Vec<Value> = all
        .iter()
        .filter(|o| matches!(o["kind"].as_str(), Some("Role" | "ClusterRole")))
        .map(|o| json!({ "role": o["metadata"]["name"], "rules": o["rules"] }))
        .collect();
    golden("rbac.yaml", &yaml::write(&json!(rules)));
    for role in &rules {
        for rule in role["rules"].as_array().unwrap() {
            assert!(
                !rule["verbs"].as_array().unwrap().contains(&json!("*")),
                "{role}: all verbs"
            );
            assert!(
                !rule["apiGroups"].as_array().unwrap().contains(&json!("*")),
                "{role}: all groups"
            );
        }
    }
}

#[test]
fn order_is_what_admission_needs() {
    let all = objects(&["profile=demo"]);
    let at = |kind: &str| all.iter().position(|o| o["kind"] == kind).unwrap();
    let last = |kind: &str| all.iter().rposition(|o| o["kind"] == kind).unwrap();
    assert!(last("CustomResourceDefinition") < at("Namespace"));
    assert!(at("Namespace") < at("ServiceAccount"));
    assert!(at("ServiceAccount") < at("Deployment"));
    assert!(at("ConfigMap") < at("Deployment"));
    assert_eq!(
        all.iter().filter(|o| o["kind"] == "CustomResourceDefinition").count(),
        20
    );
}

/// Every object decodes as the Kubernetes type it claims to be, with nothing left over.
#[test]
fn objects_are_valid_kubernetes() {
    fn check<T: serde::de::DeserializeOwned + serde::Serialize>(object: &Value) {
        let typed: T = serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{object}: {e}"));
        let back = serde_json::to_value(&typed).unwrap();
        let lost = lost(object, &back, "");
        assert!(
            lost.is_empty(),
            "{} {}: fields Kubernetes does not have: {lost:?}",
            object["kind"],
            object["metadata"]["name"]
        );
    }
    fn lost(a: &Value, b: &Value, path: &str) -> Vec<String> {
        match (a, b) {
            (Value::Object(a), Value::Object(b)) => a
                .iter()
                .flat_map(|(k, v)| match b.get(k) {
                    Some(other) => lost(v, other, &format!("{path}.{k}")),
                    None => vec![format!("{path}.{k}")],
                })
                .collect(),
            (Value::Array(a), Value::Array(b)) => a
                .iter()
                .zip(b)
                .enumerate()
                .flat_map(|(i, (x, y))| lost(x, y, &format!("{path}[{i}]")))
                .collect(),
            _ => vec![],
        }
    }
    use k8s_openapi::api::{admissionregistration, apps, autoscaling, core, policy, rbac};
    for object in objects(&["profile=demo", "values.pilot.autoscaleEnabled=true"]) {
        match object["kind"].as_str().unwrap() {
            "CustomResourceDefinition" => check::<
                k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
            >(&object),
            "Namespace" => check::<core::v1::Namespace>(&object),
            "ServiceAccount" => check::<core::v1::ServiceAccount>(&object),
            "ConfigMap" => check::<core::v1::ConfigMap>(&object),
            "Service" => check::<core::v1::Service>(&object),
            "Deployment" => check::<apps::v1::Deployment>(&object),
            "ClusterRole" => check::<rbac::v1::ClusterRole>(&object),
            "ClusterRoleBinding" => check::<rbac::v1::ClusterRoleBinding>(&object),
            "Role" => check::<rbac::v1::Role>(&object),
            "RoleBinding" => check::<rbac::v1::RoleBinding>(&object),
            "PodDisruptionBudget" => check::<policy::v1::PodDisruptionBudget>(&object),
            "HorizontalPodAutoscaler" => check::<autoscaling::v2::HorizontalPodAutoscaler>(&object),
            "MutatingWebhookConfiguration" => check::<admissionregistration::v1::MutatingWebhookConfiguration>(&object),
            "ValidatingWebhookConfiguration" => {
                check::<admissionregistration::v1::ValidatingWebhookConfiguration>(&object)
            }
            other => panic!("kind {other} is not checked"),
        }
    }
}

#[test]
fn selectors_match_their_pods() {
    for set in [vec!["profile=demo"], vec!["profile=demo", "revision=canary"]] {
        let all = objects(&set);
        for deployment in all.iter().filter(|o| o["kind"] == "Deployment") {
            let labels = &deployment["spec"]["template"]["metadata"]["labels"];
            for (key, value) in deployment["spec"]["selector"]["matchLabels"].as_object().unwrap() {
                assert_eq!(&labels[key], value, "{}", deployment["metadata"]["name"]);
            }
            let service = find(&all, "Service", deployment["metadata"]["name"].as_str().unwrap());
            for (key, value) in service["spec"]["selector"].as_object().unwrap() {
                assert_eq!(&labels[key], value, "{}", service["metadata"]["name"]);
            }
            let account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
                .as_str()
                .unwrap();
            assert!(has(&all, "ServiceAccount", account), "{account}");
        }
    }
}

#[test]
fn profiles_have_their_components() {
    let titles = |set: &[&str]| groups(set).iter().map(|g| g.component.title()).collect::<Vec<_>>();
    assert_eq!(titles(&[]), ["Istio core", "Istiod", "Ingress gateways"]);
    assert_eq!(
        titles(&["profile=demo"]),
        ["Istio core", "Istiod", "Egress gateways", "Ingress gateways"]
    );
    assert_eq!(titles(&["profile=minimal"]), ["Istio core", "Istiod"]);
    assert!(titles(&["profile=empty"]).is_empty());
    assert_eq!(
        titles(&[
            "components.ingressGateways[0].enabled=false",
            "components.egressGateways.[name:istio-egressgateway].enabled=true"
        ]),
        ["Istio core", "Istiod", "Egress gateways"]
    );
}

#[test]
fn settings_reach_their_objects() {
    let all = objects(&[
        "values.global.proxy.privileged=true",
        "meshConfig.accessLogFile=/dev/stdout",
        "meshConfig.defaultConfig.holdApplicationUntilProxyStarts=true",
        "values.global.hub=registry.example/m",
        "values.pilot.env.FOO=7",
        "values.gateways.istio-ingressgateway.type=NodePort",
        "values.sidecarInjectorWebhook.enableNamespacesByDefault=true",
    ]);
    let injector = find(&all, "ConfigMap", "istio-sidecar-injector");
    let mesh = find(&all, "ConfigMap", "istio")["data"]["mesh"]
        .as_str()
        .unwrap()
        .to_string();
    let data = &injector["data"];
    let config = mantlet_translate::inject::InjectConfig::read(
        data["config"].as_str().unwrap(),
        data["values"].as_str().unwrap(),
        &mesh,
        "",
    )
    .unwrap();
    assert!(config.values.global.proxy.privileged);
    assert_eq!(
        config.values.image("proxyv2", "", ""),
        "registry.example/m/proxyv2:test"
    );
    assert_eq!(config.mesh.access_log_file, "/dev/stdout");
    assert_eq!(
        config.mesh.default_config.hold_application_until_proxy_starts,
        Some(true)
    );
    let istiod = find(&all, "Deployment", "istiod");
    let container = &istiod["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["image"], "registry.example/m/pilot:test");
    assert!(
        container["env"]
            .as_array()
            .unwrap()
            .contains(&json!({"name": "FOO", "value": "7"}))
    );
    let gateway = find(&all, "Deployment", "istio-ingressgateway");
    assert_eq!(
        gateway["spec"]["template"]["spec"]["containers"][0]["image"],
        "registry.example/m/proxyv2:test"
    );
    assert_eq!(
        find(&all, "Service", "istio-ingressgateway")["spec"]["type"],
        "NodePort"
    );
    let webhooks = find(&all, "MutatingWebhookConfiguration", "istio-sidecar-injector")["webhooks"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(webhooks, 5);
}

#[test]
fn a_file_is_read_and_set_wins_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("iop.yaml");
    std::fs::write(
        &path,
        "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec:\n  profile: minimal\n  meshConfig: {trustDomain: a.example, accessLogFile: /x}\n  \
         components: {ingressGateways: [{name: istio-ingressgateway, enabled: true}, {name: second, enabled: true, namespace: edge, label: {x: z}}]}\n",
    )
    .unwrap();
    let mut source = source(&["meshConfig.accessLogFile=/dev/stdout"]);
    source.filename = vec![path.to_string_lossy().into_owned()];
    let spec = Spec::resolve(&source).unwrap();
    assert_eq!(spec.profile, "minimal");
    assert_eq!(
        (
            spec.mesh_config.trust_domain.as_str(),
            spec.mesh_config.access_log_file.as_str()
        ),
        ("a.example", "/dev/stdout")
    );
    let all: Vec<Value> = objects::all(&spec)
        .unwrap()
        .into_iter()
        .flat_map(|g| g.objects)
        .collect();
    let second = find(&all, "Deployment", "second");
    assert_eq!(second["metadata"]["namespace"], "edge");
    assert_eq!(
        second["spec"]["selector"]["matchLabels"],
        json!({"app": "second", "istio": "second", "x": "z"})
    );
    assert!(has(&all, "Namespace", "edge"));

    for (text, part) in [
        ("kind: Pod\napiVersion: v1\n", "expected kind IstioOperator"),
        ("a: [", "invalid YAML"),
        (
            "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec: []\n",
            "must be an object",
        ),
        (
            "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec: {meshConfg: {}}\n",
            "did you mean \"meshConfig\"",
        ),
        (
            "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec: {values: {global: {proxy: {privileged: 3}}}}\n",
            "values.global.proxy.privileged",
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = format!("{:#}", Spec::resolve(&source).unwrap_err());
        assert!(error.contains(part), "{text}: {error}");
    }
    source.filename = vec!["/nonexistent/x.yaml".into()];
    assert!(format!("{:#}", Spec::resolve(&source).unwrap_err()).contains("/nonexistent/x.yaml"));
}

#[test]
fn bad_settings_are_named() {
    for (set, part) in [
        ("profile=dmeo", "did you mean \"demo\"?"),
        ("profile=x", "have default, demo, minimal, empty"),
        (
            "values.global.proxy.priviledged=true",
            "did you mean \"values.global.proxy.privileged\"?",
        ),
        ("values.proxy.privileged=true", "unknown field \"values.proxy\""),
        (
            "meshConfig.acessLogFile=x",
            "did you mean \"meshConfig.accessLogFile\"?",
        ),
        ("values.global.proxy.privileged=sure", "is not of type boolean"),
        ("meshConfig.trustDomain=a b", "trustDomain"),
        ("meshConfig.outboundTrafficPolicy.mode=NEVER", "NEVER"),
        ("revision=No_Way", "must be a DNS-1123 label"),
        ("components.cni.enabled=true", "component cni is not available"),
        ("components.ingressGateways[0].name=A", "must be a DNS-1123 label"),
        ("values.global.proxy.privileged", "use path=value"),
    ] {
        let error = format!("{:#}", Spec::resolve(&source(&[set])).map(|_| ()).unwrap_err());
        assert!(error.contains(part), "{set}: {error}");
    }
}

#[test]
fn prompt() {
    let ask = |answer: &str| {
        let mut out = Vec::new();
        let yes = confirm("Proceed? (y/N) ", &mut answer.as_bytes(), &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "Proceed? (y/N) ");
        yes
    };
    assert!(ask("y\n") && ask("Y\n") && ask("yes\n") && ask("y"));
    assert!(!ask("\n") && !ask("") && !ask("n\n") && !ask("yep\n"));
    assert_eq!(english_list(&["a", "b", "c"]), "a, b, and c");
    assert_eq!(english_list(&["a", "b"]), "a and b");
}

#[test]
fn a_second_installation_keeps_what_the_control_plane_wrote() {
    let all = objects(&[]);
    let mut object = find(&all, "MutatingWebhookConfiguration", "istio-sidecar-injector").clone();
    let mut existing = object.clone();
    for webhook in existing["webhooks"].as_array_mut().unwrap() {
        webhook["clientConfig"]["caBundle"] = json!("QUJD");
        webhook["failurePolicy"] = json!("Ignore");
    }
    existing["webhooks"][1]["clientConfig"]["service"]["name"] = json!("istiod-old");
    apply::keep_runtime_fields(&mut object, &existing);
    assert_eq!(object["webhooks"][0]["clientConfig"]["caBundle"], "QUJD");
    assert_eq!(object["webhooks"][0]["failurePolicy"], "Ignore");
    assert!(object["webhooks"][1]["clientConfig"].get("caBundle").is_none());
    assert_eq!(object["webhooks"][1]["failurePolicy"], "Fail");
}

#[test]
fn generate_selects_components() {
    let args = |component: &[&str]| ManifestArgs {
        command: ManifestCommand::Generate(GenerateArgs {
            source: source(&["profile=demo"]),
            component: component.iter().map(|c| (*c).to_string()).collect(),
        }),
    };
    let out = run_manifest(&args(&["IngressGateways"])).unwrap();
    let objects = yaml::read_all(&out.text).unwrap();
    assert!(
        objects
            .iter()
            .all(|o| o["metadata"]["labels"]["operator.istio.io/component"] == "IngressGateways")
    );
    assert!(!objects.is_empty());
    let error = run_manifest(&args(&["Pilots"])).unwrap_err().to_string();
    assert!(
        error.contains("Base, Pilot, EgressGateways, IngressGateways"),
        "{error}"
    );
}
