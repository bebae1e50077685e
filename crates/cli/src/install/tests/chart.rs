//! The Helm chart under `deploy/helm` is the default profile with registry, tag and namespace left open; this keeps it so.

use super::*;

const NAMESPACE: &str = "mantlet-chart-namespace";
const HUB: &str = "mantlet-chart-hub";
const TAG: &str = "mantlet-chart-tag";

#[test]
fn chart_is_the_default_profile() {
    let set = [
        format!("tag={TAG}"),
        format!("hub={HUB}"),
        format!("namespace={NAMESPACE}"),
        // Helm's releases do not wait for a metrics server.
        "values.pilot.autoscaleEnabled=false".into(),
        "values.gateways.istio-ingressgateway.autoscaleEnabled=false".into(),
    ];
    let spec = Spec::resolve(&Source {
        set: set.to_vec(),
        ..Source::default()
    })
    .unwrap();
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/helm/mantlet");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let check = |path: PathBuf, text: &str| {
        if update {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            text == expected,
            "{} is out of date; run with UPDATE_GOLDEN=1 and review",
            path.display()
        );
    };
    for group in objects::all(&spec).unwrap() {
        let (crds, rest): (Vec<Value>, Vec<Value>) = group
            .objects
            .into_iter()
            .partition(|o| o["kind"] == "CustomResourceDefinition");
        if !crds.is_empty() {
            // Helm installs what is in `crds/` first and never deletes it. Labels of one release would be wrong on them.
            check(chart.join("crds/all.yaml"), &yaml::write_all(&mantlet_api::crd::all()));
        }
        let rest: Vec<&Value> = rest.iter().filter(|o| o["kind"] != "Namespace").collect();
        let plain = yaml::write_all(rest.iter().copied());
        assert!(!plain.contains("{{"), "the objects hold template syntax of their own");
        let text = plain
            .replace(NAMESPACE, "{{ .Release.Namespace }}")
            // A whole value: quoted, for a tag may look like a number.
            .replace(&format!(": {TAG}\n"), ": {{ .Values.global.tag | quote }}\n")
            .replace(HUB, "{{ .Values.global.hub }}")
            .replace(TAG, "{{ .Values.global.tag }}");
        // What Helm fills in is YAML again, also where it stands at the start of a value.
        let filled = text
            .replace("{{ .Release.Namespace }}", "istio-system")
            .replace("{{ .Values.global.hub }}", "registry.example/mantlet")
            .replace("{{ .Values.global.tag | quote }}", "\"1.5\"")
            .replace("{{ .Values.global.tag }}", "1.5");
        assert_eq!(yaml::read_all(&filled).unwrap().len(), rest.len());
        check(
            chart.join(format!("templates/{}.yaml", group.component.id().to_lowercase())),
            &text,
        );
    }
}
