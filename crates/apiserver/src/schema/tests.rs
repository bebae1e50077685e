//! Structural schemas: pruning, validation, defaults.

use serde_json::json;

use super::*;

fn sample() -> Value {
    json!({
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": {
            "type": "object",
            "required": ["mode"],
            "properties": {
                "mode": {"type": "string", "enum": ["STRICT", "PERMISSIVE"]},
                "port": {"type": "integer", "minimum": 1, "maximum": 65535, "default": 80},
                "host": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
                "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "target": {"x-kubernetes-int-or-string": true},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "list": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                    "items": {"type": "object", "properties": {"name": {"type": "string"}, "weight": {"type": "integer", "default": 1}}}},
                "either": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
                    "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}
            }
        }}
    })
}

fn errors(value: &Value) -> Vec<String> {
    let schema = sample();
    let mut causes = Vec::new();
    validate(value, Schema::new(&schema), "", &mut causes);
    causes
        .into_iter()
        .map(|c| format!("{}: {}", c.field, c.message))
        .collect()
}

#[test]
fn prune_and_default() {
    let schema = sample();
    let mut value = json!({"spec": {"mode": "STRICT", "oops": 1, "any": {"x": {"y": 1}}, "labels": {"k": "v"},
        "list": [{"name": "a", "wieght": 3}], "port": null}});
    let mut unknown = Vec::new();
    prune(&mut value, Schema::new(&schema), "", &mut unknown);
    apply_defaults(&mut value, Schema::new(&schema));
    assert_eq!(unknown, ["spec.list[0].wieght", "spec.oops"]);
    assert_eq!(
        value,
        json!({"spec": {"mode": "STRICT", "any": {"x": {"y": 1}}, "labels": {"k": "v"},
        "list": [{"name": "a", "weight": 1}], "port": 80}})
    );
    assert_eq!(
        did_you_mean("wieght", &siblings(Schema::new(&schema), "spec.list[0].wieght")).as_deref(),
        Some("weight")
    );
}

#[test]
fn texts_of_the_api() {
    assert_eq!(errors(&json!({})), ["spec: Required value"]);
    assert_eq!(
        errors(&json!({"spec": {"mode": "strict"}})),
        ["spec.mode: Unsupported value: \"strict\": supported values: \"PERMISSIVE\", \"STRICT\""]
    );
    assert_eq!(
        errors(&json!({"spec": {"mode": 1}})),
        ["spec.mode: Invalid value: \"integer\": spec.mode in body must be of type string: \"integer\""]
    );
    assert_eq!(
        errors(&json!({"spec": {"mode": "STRICT", "port": 70000}})),
        ["spec.port: Invalid value: 70000: spec.port in body should be less than or equal to 65535"]
    );
    assert_eq!(
        errors(&json!({"spec": {"mode": "STRICT", "host": "A"}})),
        ["spec.host: Invalid value: \"A\": spec.host in body should match '^[a-z]+$'"]
    );
    assert_eq!(
        errors(&json!({"spec": {"mode": "STRICT", "list": [{"name": "a"}, {"name": "a"}]}})),
        ["spec.list[1]: Duplicate value: {\"name\":\"a\"}"]
    );
    assert_eq!(errors(&json!({"spec": {"mode": "STRICT", "list": [1, 2, 3]}})).len(), 6);
    assert_eq!(
        errors(&json!({"spec": {"mode": "STRICT", "either": {"a": "x", "b": "y"}}})),
        [
            "<nil>: Invalid value: \"\": \"spec.either\" must validate one and only one schema (oneOf). Found 2 valid alternatives"
        ]
    );
    assert!(errors(&json!({"spec": {"mode": "STRICT", "target": "http", "either": {"a": "x"}}})).is_empty());
    assert_eq!(errors(&json!({"spec": {"mode": "STRICT", "target": true}})).len(), 1);
}
