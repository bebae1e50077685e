//! Tests of the CRDs and of unknown-field checks.

use super::*;
use crate::yaml;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/crds/all.yaml");

#[test]
fn golden_file_is_current() {
    let crds = all();
    let text = format!(
        "# CustomResourceDefinitions of Mantlet. Generated from crates/api; UPDATE_GOLDEN=1 cargo test -p mantlet-api golden rewrites it.\n{}",
        yaml::write_all(&crds)
    );
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(GOLDEN, &text).expect("writing the golden file");
    }
    let on_disk = std::fs::read_to_string(GOLDEN).expect("deploy/crds/all.yaml; UPDATE_GOLDEN=1 writes it");
    assert!(
        on_disk == text,
        "deploy/crds/all.yaml is out of date; run with UPDATE_GOLDEN=1 and review the difference"
    );
    assert_eq!(
        yaml::read_all(&on_disk).unwrap(),
        crds,
        "the file reads back as other objects"
    );
}

/// What Kubernetes demands of a structural schema, checked on every node of every kind.
#[test]
fn schemas_are_structural() {
    fn check(at: &str, schema: &Value) {
        let map = schema
            .as_object()
            .unwrap_or_else(|| panic!("{at}: not an object: {schema}"));
        assert!(map.get("type").is_some_and(Value::is_string), "{at}: no type: {schema}");
        for key in map.keys() {
            let known = [
                "type",
                "description",
                "properties",
                "items",
                "additionalProperties",
                "required",
                "enum",
                "format",
                "minimum",
                "maximum",
                "minLength",
                "maxLength",
                "minItems",
                "maxItems",
                "minProperties",
                "maxProperties",
                "pattern",
                "x-kubernetes-validations",
                "x-kubernetes-preserve-unknown-fields",
                "nullable",
            ];
            assert!(known.contains(&key.as_str()), "{at}: keyword {key} is not allowed");
        }
        let properties = map.get("properties").and_then(Value::as_object);
        assert!(
            !(properties.is_some() && map.contains_key("additionalProperties")),
            "{at}: properties and additionalProperties exclude each other"
        );
        for required in map.get("required").and_then(Value::as_array).into_iter().flatten() {
            assert!(
                properties.is_some_and(|p| p.contains_key(required.as_str().unwrap())),
                "{at}: {required} missing"
            );
        }
        for (name, inner) in properties.into_iter().flatten() {
            check(&format!("{at}.{name}"), inner);
        }
        if map["type"] == "array" {
            check(&format!("{at}[]"), &map["items"]);
        }
        if let Some(inner) = map.get("additionalProperties") {
            check(&format!("{at}{{}}"), inner);
        }
        if let Some(format) = map.get("format") {
            assert!(
                ["int32", "int64", "double", "float"].contains(&format.as_str().unwrap()),
                "{at}: {format}"
            );
        }
        for value in map.get("enum").and_then(Value::as_array).into_iter().flatten() {
            assert!(value.is_string(), "{at}: enum {value}");
        }
    }
    for crd in all() {
        for version in crd["spec"]["versions"].as_array().unwrap() {
            check(
                crd["metadata"]["name"].as_str().unwrap(),
                &version["schema"]["openAPIV3Schema"],
            );
        }
    }
    check("MeshConfig", mesh_config_schema());
}

#[test]
fn known_facts() {
    let find = |name: &str| all().into_iter().find(|c| c["metadata"]["name"] == name).unwrap();
    let pa = find("peerauthentications.security.istio.io");
    assert_eq!(pa["spec"]["names"]["shortNames"], json!(["pa"]));
    assert_eq!(
        pa["spec"]["names"]["categories"],
        json!(["istio-io", "security-istio-io"])
    );
    let v1 = &pa["spec"]["versions"][0];
    assert_eq!((&v1["name"], &v1["storage"]), (&json!("v1"), &json!(true)));
    let columns: Vec<_> = v1["additionalPrinterColumns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].clone())
        .collect();
    assert_eq!(columns, ["Mode", "Age"]);
    let spec = &v1["schema"]["openAPIV3Schema"]["properties"]["spec"];
    assert_eq!(
        spec["properties"]["mtls"]["properties"]["mode"]["enum"],
        json!(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"])
    );
    assert_eq!(spec["properties"]["portLevelMtls"]["minProperties"], json!(1));
    let ap = find("authorizationpolicies.security.istio.io");
    let spec = &ap["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    assert_eq!(
        spec["properties"]["action"]["enum"],
        json!(["ALLOW", "DENY", "AUDIT", "CUSTOM"])
    );
    assert_eq!(spec["properties"]["rules"]["maxItems"], json!(512));
    let dr = find("destinationrules.networking.istio.io");
    assert_eq!(dr["spec"]["versions"].as_array().unwrap().len(), 3);
    let spec = &dr["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    assert_eq!(spec["required"], json!(["host"]));
    assert!(
        spec["properties"]["trafficPolicy"]["properties"]["outlierDetection"]["properties"]["consecutive5xxErrors"]
            .is_object()
    );
}

#[test]
fn unknown_fields_are_found_at_depth() {
    let object = json!({"spec": {
        "selector": {"matchLabels": {"anything": "goes"}},
        "rules": [{"from": [{"source": {"principal": ["a"]}}], "wen": []}],
        "frobnicate": 1,
    }});
    let kind = &crate::kind::AUTHORIZATION_POLICY;
    let found: Vec<String> = unknown_fields_of(kind, &object)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        found,
        [
            "unknown field \"spec.rules[0].from[0].source.principal\" (did you mean \"principals\"?)",
            "unknown field \"spec.rules[0].wen\" (did you mean \"when\"?)",
            "unknown field \"spec.frobnicate\"",
        ]
    );
    let opaque = json!({"spec": {"configPatches": [{"applyTo": "CLUSTER", "x": {"y": null}}]}});
    assert!(unknown_fields_of(&crate::kind::ENVOY_FILTER, &opaque).is_empty());
}
