//! What the CRDs of these kinds accept: the fields of the types, and whatever else was written, since the original kinds had no schema
//! and admission has to see a misspelt field in order to name it.

use serde_json::{Value, json};

/// Loosens the schema of a spec.
pub(crate) fn loosen(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    if map.get("type") == Some(&json!("object")) && !map.contains_key("additionalProperties") {
        map.insert("x-kubernetes-preserve-unknown-fields".into(), json!(true));
    }
    // The other spelling of a name may stand instead; admission knows both.
    map.remove("required");
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        for (name, inner) in properties.iter_mut() {
            loosen(inner);
            // `- mtls:` with nothing behind it (S7.8).
            if name == "mtls" {
                inner["nullable"] = json!(true);
            }
        }
    }
    if let Some(items) = map.get_mut("items") {
        loosen(items);
    }
}
