//! Strategic merge patch.
//!
//! Lists merge by key where the API says so; `$patch` (replace, delete, merge), `$setElementOrder/…`, `$deleteFromPrimitiveList/…`
//! and `$retainKeys` are directives, null removes. What is new must come out without directives.

use serde_json::{Map, Value};

use super::keys::{ListKind, strategic};
use crate::error::{ApiError, ApiResult};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVE: &str = "$deleteFromPrimitiveList/";

/// Applies a patch to an object of a kind.
pub(super) fn apply(kind: &str, current: &Value, patch: &Value) -> ApiResult<Value> {
    let empty = Map::new();
    let current = current.as_object().unwrap_or(&empty);
    let patch = patch
        .as_object()
        .ok_or_else(|| ApiError::bad_request("the patch must be an object"))?;
    let mut path = Vec::new();
    Ok(merge_map(kind, current, patch, &mut path)?.map_or(Value::Object(Map::new()), Value::Object))
}

fn bad(what: &str) -> ApiError {
    ApiError::bad_request(format!("strategic merge patch: {what}"))
}

/// `None`: the map is deleted.
fn merge_map<'a>(
    kind: &str,
    current: &Map<String, Value>,
    patch: &'a Map<String, Value>,
    path: &mut Vec<&'a str>,
) -> ApiResult<Option<Map<String, Value>>> {
    let mut out = match patch.get(PATCH) {
        None => current.clone(),
        Some(Value::String(s)) => match s.as_str() {
            "merge" => current.clone(),
            "replace" => Map::new(),
            "delete" => return Ok(None),
            other => return Err(bad(&format!("unknown patch type {other:?}"))),
        },
        Some(_) => return Err(bad("$patch must be a string")),
    };
    if let Some(retain) = patch.get(RETAIN) {
        let keep = retain.as_array().ok_or_else(|| bad("$retainKeys must be a list"))?;
        out.retain(|k, _| keep.iter().any(|x| x.as_str() == Some(k)));
    }
    for (name, value) in patch {
        if name == PATCH || name == RETAIN {
            continue;
        }
        if let Some(field) = name.strip_prefix(DELETE_PRIMITIVE) {
            let gone = value
                .as_array()
                .ok_or_else(|| bad("$deleteFromPrimitiveList must be a list"))?;
            if let Some(Value::Array(list)) = out.get_mut(field) {
                list.retain(|v| !gone.contains(v));
            }
            continue;
        }
        if name.starts_with(ORDER) {
            continue;
        }
        match value {
            Value::Null => {
                out.shift_remove(name);
            }
            Value::Object(inner) => {
                let empty = Map::new();
                let below = out.get(name).and_then(Value::as_object).unwrap_or(&empty);
                path.push(name);
                let merged = merge_map(kind, below, inner, path);
                path.pop();
                match merged? {
                    Some(m) => {
                        out.insert(name.clone(), Value::Object(m));
                    }
                    None => {
                        out.shift_remove(name);
                    }
                }
            }
            Value::Array(items) => {
                path.push(name);
                let order = patch.get(&format!("{ORDER}{name}"));
                let below = out
                    .get(name)
                    .and_then(Value::as_array)
                    .map(Vec::as_slice)
                    .unwrap_or_default();
                let merged = merge_list(kind, below, items, order, path);
                path.pop();
                out.insert(name.clone(), Value::Array(merged?));
            }
            other => {
                out.insert(name.clone(), other.clone());
            }
        }
    }
    // An order may come without changes to the list.
    for (name, order) in patch {
        if let Some(field) = name.strip_prefix(ORDER)
            && !patch.contains_key(field)
            && let Some(Value::Array(list)) = out.get(field)
        {
            path.push(field);
            let ordered = reorder(strategic(kind, path), list.clone(), list, order);
            path.pop();
            out.insert(field.to_owned(), Value::Array(ordered));
        }
    }
    Ok(Some(out))
}

fn merge_list<'a>(
    kind: &str,
    current: &[Value],
    patch: &'a [Value],
    order: Option<&Value>,
    path: &mut Vec<&'a str>,
) -> ApiResult<Vec<Value>> {
    let how = strategic(kind, path);
    let replace = patch
        .iter()
        .any(|p| p[PATCH] == "replace" && p.as_object().is_some_and(|m| m.len() == 1));
    let merged = match how {
        _ if replace => clean_items(kind, patch, path)?,
        ListKind::Atomic => clean_items(kind, patch, path)?,
        ListKind::Set => {
            let mut out = current.to_vec();
            for item in patch {
                if !out.contains(item) {
                    out.push(item.clone());
                }
            }
            out
        }
        ListKind::Map(keys) => {
            let key = keys[0];
            let mut out = current.to_vec();
            for item in patch {
                let map = item
                    .as_object()
                    .ok_or_else(|| bad(&format!("{}: items must be objects", path.join("."))))?;
                let id = map
                    .get(key)
                    .ok_or_else(|| bad(&format!("map: {item} does not contain declared merge key: {key}")))?;
                let at = out.iter().position(|c| c.get(key) == Some(id));
                let empty = Map::new();
                let below = at.and_then(|i| out[i].as_object()).unwrap_or(&empty);
                match (merge_map(kind, below, map, path)?, at) {
                    (Some(m), Some(i)) => out[i] = Value::Object(m),
                    (Some(m), None) => out.push(Value::Object(m)),
                    (None, Some(i)) => {
                        out.remove(i);
                    }
                    (None, None) => {}
                }
            }
            out
        }
    };
    Ok(match order {
        Some(order) if !matches!(how, ListKind::Atomic) => reorder(how, merged, current, order),
        _ => merged,
    })
}

/// Items of a list that is written whole, without directives.
fn clean_items<'a>(kind: &str, patch: &'a [Value], path: &mut Vec<&'a str>) -> ApiResult<Vec<Value>> {
    let mut out = Vec::with_capacity(patch.len());
    for item in patch {
        match item {
            Value::Object(map) if map.contains_key(PATCH) && map.len() == 1 => {}
            Value::Object(map) => {
                if let Some(m) = merge_map(kind, &Map::new(), map, path)? {
                    out.push(Value::Object(m));
                }
            }
            other => out.push(other.clone()),
        }
    }
    Ok(out)
}

/// Brings merged items into the wanted order; items that the order does not name keep their place relative to the server's.
fn reorder(how: ListKind<'_>, merged: Vec<Value>, server: &[Value], order: &Value) -> Vec<Value> {
    let Some(order) = order.as_array() else { return merged };
    let same = |a: &Value, b: &Value| match how {
        ListKind::Map(keys) => a.get(keys[0]).is_some() && a.get(keys[0]) == b.get(keys[0]),
        _ => a == b,
    };
    let place = |v: &Value| order.iter().position(|o| same(o, v));
    let at_server = |v: &Value| server.iter().position(|s| same(s, v));
    let (mut named, others): (Vec<Value>, Vec<Value>) = merged.into_iter().partition(|v| place(v).is_some());
    named.sort_by_key(|v| place(v));
    let mut out = Vec::new();
    let mut others = others.into_iter().peekable();
    for item in named {
        // Everything that stood before this item on the server and is not named stays before it.
        while let (Some(o), Some(here)) = (others.peek().and_then(&at_server), at_server(&item)) {
            if o >= here {
                break;
            }
            out.extend(others.next());
        }
        out.push(item);
    }
    out.extend(others);
    out
}

#[cfg(test)]
#[path = "strategic_tests.rs"]
mod tests;
