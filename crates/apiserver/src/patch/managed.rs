//! Server-side apply: who owns which field.
//!
//! Ownership is a set of paths in the API's own form (`f:name`, `k:{"name":"x"}`, `v:1`, `.`), kept in `metadata.managedFields`.
//! Applying merges the intent, fails on fields that others own with another value (unless forced), and removes what the manager
//! owned before and no longer wants. Other writes give the fields that they changed to their manager.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::keys::{self, ListKind};
use crate::error::{ApiError, ApiResult};
use crate::meta;
use crate::resources::Resource;

/// A set of field paths; `here` says that the node itself is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Set {
    here: bool,
    children: BTreeMap<String, Set>,
}

impl Set {
    fn from_v1(v: &Value) -> Self {
        let mut set = Self::default();
        let Some(map) = v.as_object() else { return set };
        // An empty object stands for the field itself.
        set.here = map.is_empty();
        for (k, inner) in map {
            if k == "." {
                set.here = true;
            } else {
                set.children.insert(k.clone(), Self::from_v1(inner));
            }
        }
        set
    }

    fn to_v1(&self) -> Value {
        let mut map = Map::new();
        if self.here && !self.children.is_empty() {
            map.insert(".".into(), json!({}));
        }
        for (k, inner) in &self.children {
            map.insert(k.clone(), inner.to_v1());
        }
        Value::Object(map)
    }

    fn is_empty(&self) -> bool {
        !self.here && self.children.is_empty()
    }

    fn union(&mut self, other: &Self) {
        self.here |= other.here;
        for (k, inner) in &other.children {
            self.children.entry(k.clone()).or_default().union(inner);
        }
    }

    /// Removes what is in `other`.
    fn subtract(&mut self, other: &Self) {
        if other.here {
            self.here = false;
        }
        for (k, inner) in &other.children {
            if let Some(own) = self.children.get_mut(k) {
                own.subtract(inner);
                if own.is_empty() {
                    self.children.remove(k);
                }
            }
        }
    }

    fn intersection(&self, other: &Self) -> Self {
        let mut out = Self {
            here: self.here && other.here,
            children: BTreeMap::new(),
        };
        for (k, inner) in &self.children {
            if let Some(o) = other.children.get(k) {
                let both = inner.intersection(o);
                if !both.is_empty() {
                    out.children.insert(k.clone(), both);
                }
            }
        }
        out
    }

    fn paths(&self, at: &str, out: &mut Vec<String>) {
        if self.here {
            out.push(at.to_owned());
        }
        for (k, inner) in &self.children {
            let shown = match k.split_once(':') {
                Some(("f", name)) => format!("{at}.{name}"),
                Some(("k", key)) => {
                    let map: Value = serde_json::from_str(key).unwrap_or(Value::Null);
                    let parts: Vec<String> = map
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(k, v)| format!("{k}={v}"))
                        .collect();
                    format!("{at}[{}]", parts.join(","))
                }
                Some((_, v)) => format!("{at}[{v}]"),
                None => at.to_owned(),
            };
            inner.paths(&shown, out);
        }
    }
}

/// How lists and maps of a resource merge: from tables for built-in kinds, from the schema for custom ones.
struct Rules<'a> {
    resource: &'a Resource,
}

impl Rules<'_> {
    fn node(&self, path: &[&str]) -> Option<&Value> {
        let custom = self.resource.custom.as_ref()?;
        let mut at = &custom.schema;
        for step in path {
            if at["items"].is_object() {
                at = &at["items"];
            }
            at = match at["properties"].get(*step) {
                Some(n) => n,
                None => &at["additionalProperties"],
            };
        }
        Some(at)
    }

    fn list(&self, path: &[&str]) -> ListKind<'_> {
        if path.first() == Some(&"metadata") || self.resource.custom.is_none() {
            return keys::apply_list(&self.resource.kind, path);
        }
        match self.node(path).and_then(|n| n["x-kubernetes-list-type"].as_str()) {
            Some("set") => ListKind::Set,
            // Keys of one list are short; a static slice would need a second table.
            Some("map") => ListKind::Map(&[]),
            _ => ListKind::Atomic,
        }
    }

    fn keys_of(&self, path: &[&str], kind: ListKind<'_>) -> Vec<String> {
        match kind {
            ListKind::Map([]) => self
                .node(path)
                .and_then(|n| n["x-kubernetes-list-map-keys"].as_array())
                .into_iter()
                .flatten()
                .filter_map(|k| k.as_str().map(str::to_owned))
                .collect(),
            ListKind::Map(keys) => keys.iter().map(|k| (*k).to_owned()).collect(),
            _ => vec![],
        }
    }

    fn map_atomic(&self, path: &[&str]) -> bool {
        if path.first() == Some(&"metadata") {
            return false;
        }
        match self.node(path) {
            Some(n) => n["x-kubernetes-map-type"].as_str() == Some("atomic"),
            None => keys::apply_map_atomic(&self.resource.kind, path),
        }
    }
}

/// The key of a list item, as a path element. Defaults of keys (the protocol) are filled in.
fn item_key(keys: &[String], item: &Value) -> String {
    let mut map = BTreeMap::new();
    for k in keys {
        let v = match item.get(k) {
            Some(v) => v.clone(),
            None if k == "protocol" => json!("TCP"),
            None => continue,
        };
        map.insert(k.clone(), v);
    }
    format!("k:{}", serde_json::to_string(&map).unwrap_or_default())
}

/// Fields of a document as a set. Maps that merge are entered; atomic ones, lists and scalars are leaves.
fn fields<'a>(rules: &Rules<'_>, value: &'a Value, path: &mut Vec<&'a str>) -> Set {
    let mut set = Set::default();
    match value {
        Value::Object(map) if !map.is_empty() && !rules.map_atomic(path) => {
            for (k, v) in map {
                path.push(k);
                set.children.insert(format!("f:{k}"), fields(rules, v, path));
                path.pop();
            }
        }
        Value::Array(items) => match rules.list(path) {
            ListKind::Atomic => set.here = true,
            ListKind::Set => {
                for item in items {
                    set.children.insert(
                        format!("v:{item}"),
                        Set {
                            here: true,
                            ..Set::default()
                        },
                    );
                }
                set.here = items.is_empty();
            }
            kind => {
                let keys = rules.keys_of(path, kind);
                for item in items {
                    let mut inner = fields(rules, item, path);
                    inner.here = true;
                    set.children.insert(item_key(&keys, item), inner);
                }
                set.here = items.is_empty();
            }
        },
        _ => set.here = true,
    }
    set
}

/// What nobody can own.
fn strip(set: &mut Set) {
    for f in ["f:apiVersion", "f:kind"] {
        set.children.remove(f);
    }
    if let Some(m) = set.children.get_mut("f:metadata") {
        for f in [
            "name",
            "namespace",
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "managedFields",
            "selfLink",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generateName",
        ] {
            m.children.remove(&format!("f:{f}"));
        }
        m.here = false;
        if m.is_empty() {
            set.children.remove("f:metadata");
        }
    }
}

fn owned(rules: &Rules<'_>, value: &Value) -> Set {
    let mut set = fields(rules, value, &mut Vec::new());
    strip(&mut set);
    set
}

/// Fields whose value differs between two documents: those of `new` that are new or changed.
fn changed<'a>(rules: &Rules<'_>, new: &'a Value, old: &'a Value, path: &mut Vec<&'a str>) -> Set {
    let mut set = Set::default();
    if new == old {
        return set;
    }
    match (new, old) {
        (Value::Object(n), Value::Object(o)) if !rules.map_atomic(path) => {
            for (k, v) in n {
                path.push(k);
                let inner = match o.get(k) {
                    Some(before) => changed(rules, v, before, path),
                    None => fields(rules, v, path),
                };
                path.pop();
                if !inner.is_empty() {
                    set.children.insert(format!("f:{k}"), inner);
                }
            }
        }
        (Value::Array(n), Value::Array(o)) => match rules.list(path) {
            ListKind::Atomic => set.here = true,
            ListKind::Set => {
                for item in n.iter().filter(|i| !o.contains(i)) {
                    set.children.insert(
                        format!("v:{item}"),
                        Set {
                            here: true,
                            ..Set::default()
                        },
                    );
                }
            }
            kind => {
                let keys = rules.keys_of(path, kind);
                for item in n {
                    let key = item_key(&keys, item);
                    let inner = match o.iter().find(|x| item_key(&keys, x) == key) {
                        Some(before) => changed(rules, item, before, path),
                        None => {
                            let mut s = fields(rules, item, path);
                            s.here = true;
                            s
                        }
                    };
                    if !inner.is_empty() {
                        set.children.insert(key, inner);
                    }
                }
            }
        },
        _ => return fields(rules, new, path),
    }
    set
}

/// Removes the fields of a set from a document. `keep` holds what others own.
fn remove(rules: &Rules<'_>, value: &mut Value, set: &Set, keep: &Set, path: &mut Vec<String>) {
    let borrowed: Vec<&str> = path.iter().map(String::as_str).collect();
    match value {
        Value::Object(map) => {
            for (k, inner) in &set.children {
                let Some(name) = k.strip_prefix("f:") else { continue };
                let none = Set::default();
                let kept = keep.children.get(k).unwrap_or(&none);
                if inner.here && inner.children.is_empty() {
                    if kept.is_empty() {
                        map.shift_remove(name);
                    }
                } else if let Some(v) = map.get_mut(name) {
                    path.push(name.to_owned());
                    remove(rules, v, inner, kept, path);
                    path.pop();
                    let empty = v.as_object().is_some_and(Map::is_empty) || v.as_array().is_some_and(Vec::is_empty);
                    if empty && kept.is_empty() {
                        map.shift_remove(name);
                    }
                }
            }
        }
        Value::Array(items) => {
            let kind = rules.list(&borrowed);
            let keys = rules.keys_of(&borrowed, kind);
            drop(borrowed);
            let mut out = Vec::new();
            for mut item in std::mem::take(items) {
                let key = match kind {
                    ListKind::Set => format!("v:{item}"),
                    _ => item_key(&keys, &item),
                };
                let Some(inner) = set.children.get(&key) else {
                    out.push(item);
                    continue;
                };
                let none = Set::default();
                let kept = keep.children.get(&key).unwrap_or(&none);
                if inner.here && kept.is_empty() {
                    continue;
                }
                remove(rules, &mut item, inner, kept, path);
                out.push(item);
            }
            *items = out;
        }
        _ => {}
    }
}

/// Merges an intent into a document.
fn merge<'a>(rules: &Rules<'_>, current: &mut Value, intent: &'a Value, path: &mut Vec<&'a str>) {
    match (&mut *current, intent) {
        (Value::Object(c), Value::Object(i)) if !rules.map_atomic(path) => {
            for (k, v) in i {
                path.push(k);
                match c.get_mut(k) {
                    Some(below) => merge(rules, below, v, path),
                    None => {
                        c.insert(k.clone(), v.clone());
                    }
                }
                path.pop();
            }
        }
        (Value::Array(c), Value::Array(i)) => match rules.list(path) {
            ListKind::Atomic => *current = intent.clone(),
            ListKind::Set => {
                for item in i {
                    if !c.contains(item) {
                        c.push(item.clone());
                    }
                }
            }
            kind => {
                let keys = rules.keys_of(path, kind);
                for item in i {
                    let key = item_key(&keys, item);
                    match c.iter().position(|x| item_key(&keys, x) == key) {
                        Some(at) => merge(rules, &mut c[at], item, path),
                        None => c.push(item.clone()),
                    }
                }
            }
        },
        _ => *current = intent.clone(),
    }
}

struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    set: Set,
    time: String,
    api_version: String,
}

fn read(object: &Value) -> Vec<Entry> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|e| Entry {
            manager: text(&e["manager"]),
            operation: text(&e["operation"]),
            subresource: text(&e["subresource"]),
            set: Set::from_v1(&e["fieldsV1"]),
            time: text(&e["time"]),
            api_version: text(&e["apiVersion"]),
        })
        .collect()
}

fn write(object: &mut Value, entries: Vec<Entry>) {
    let list: Vec<Value> = entries
        .into_iter()
        .filter(|e| !e.set.is_empty())
        .map(|e| {
            let mut v = json!({
                "manager": e.manager, "operation": e.operation, "apiVersion": e.api_version, "time": e.time,
                "fieldsType": "FieldsV1", "fieldsV1": e.set.to_v1(),
            });
            if !e.subresource.is_empty() {
                v["subresource"] = e.subresource.into();
            }
            v
        })
        .collect();
    if let Ok(m) = meta::metadata(object) {
        if list.is_empty() {
            m.shift_remove("managedFields");
        } else {
            m.insert("managedFields".into(), list.into());
        }
    }
}

fn without_managed(object: &Value) -> Value {
    let mut v = object.clone();
    if let Some(m) = v["metadata"].as_object_mut() {
        m.shift_remove("managedFields");
    }
    v
}

/// Most managers that are told apart by updates; older ones are joined, as in kube-apiserver.
const MAX_UPDATERS: usize = 10;

/// Gives the fields that an ordinary write changed to its manager.
pub(crate) fn track_update(
    resource: &Resource,
    old: Option<&Value>,
    object: &mut Value,
    manager: &str,
    subresource: &str,
) {
    let rules = Rules { resource };
    // A client that empties the list resets all ownership; anything else it sends is not believed.
    let reset = object["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|l| l.is_empty() || l == &[json!({})]);
    let mut entries = match old {
        Some(old) if !reset => read(old),
        _ => vec![],
    };
    let new = without_managed(object);
    let mut set = match old {
        Some(old) => changed(&rules, &new, &without_managed(old), &mut Vec::new()),
        None => fields(&rules, &new, &mut Vec::new()),
    };
    strip(&mut set);
    if let Some(old) = old {
        // Fields that are gone belong to nobody.
        let mut gone = owned(&rules, old);
        gone.subtract(&owned(&rules, &new));
        for e in &mut entries {
            e.set.subtract(&gone);
        }
    }
    if reset && old.is_some() {
        write(object, vec![]);
        return;
    }
    if !set.is_empty() {
        for e in &mut entries {
            if !(e.manager == manager && e.operation == "Update" && e.subresource == subresource) {
                e.set.subtract(&set);
            }
        }
        let api_version = resource.api_version();
        let now = meta::now();
        match entries
            .iter_mut()
            .find(|e| e.manager == manager && e.operation == "Update" && e.subresource == subresource)
        {
            Some(e) => {
                e.set.union(&set);
                e.time = now;
            }
            None => entries.push(Entry {
                manager: manager.to_owned(),
                operation: "Update".into(),
                subresource: subresource.to_owned(),
                set,
                time: now,
                api_version,
            }),
        }
        while entries.iter().filter(|e| e.operation == "Update").count() > MAX_UPDATERS {
            let mut updaters = entries
                .iter()
                .enumerate()
                .filter(|(_, e)| e.operation == "Update")
                .map(|(i, _)| i);
            let (Some(first), Some(second)) = (updaters.next(), updaters.next()) else {
                break;
            };
            let joined = entries.remove(first);
            let into = &mut entries[second - 1];
            into.set.union(&joined.set);
            into.manager = "ancient-changes".into();
        }
    }
    write(object, entries);
}

/// Applies an intent; `live` is none when the object is to be created.
///
/// # Errors
/// 409 with one cause per field that another manager owns with another value.
pub(crate) fn apply(
    resource: &Resource,
    live: Option<&Value>,
    intent: &Value,
    manager: &str,
    force: bool,
    subresource: &str,
) -> ApiResult<Value> {
    let rules = Rules { resource };
    let mut intent = intent.clone();
    if let Some(m) = intent["metadata"].as_object_mut() {
        m.shift_remove("managedFields");
        m.shift_remove("resourceVersion");
        m.shift_remove("uid");
        m.shift_remove("creationTimestamp");
    }
    let wanted = owned(&rules, &intent);
    let mut entries = live.map(read).unwrap_or_default();
    let base = live.map_or_else(|| json!({}), without_managed);
    let mut merged = base.clone();
    merge(&rules, &mut merged, &intent, &mut Vec::new());

    // Conflicts: fields of the intent that change a value which somebody else owns.
    let mut changes = changed(&rules, &merged, &base, &mut Vec::new());
    strip(&mut changes);
    let mut conflicts = Vec::new();
    for e in entries
        .iter_mut()
        .filter(|e| !(e.manager == manager && e.operation == "Apply" && e.subresource == subresource))
    {
        let overlap = e.set.intersection(&changes).intersection(&wanted);
        if overlap.is_empty() {
            continue;
        }
        if force {
            e.set.subtract(&overlap);
        } else {
            let mut paths = Vec::new();
            overlap.paths("", &mut paths);
            let by = if e.operation == "Apply" {
                format!("conflict with {:?}", e.manager)
            } else {
                let sub = if e.subresource.is_empty() {
                    String::new()
                } else {
                    format!(" with subresource {:?}", e.subresource)
                };
                format!("conflict with {:?}{sub} using {}", e.manager, e.api_version)
            };
            conflicts.extend(paths.into_iter().map(|p| (by.clone(), p)));
        }
    }
    if !conflicts.is_empty() {
        return Err(conflict_error(&conflicts));
    }

    // What this manager owned and does not want any more, and nobody else owns, goes away.
    if let Some(at) = entries
        .iter()
        .position(|e| e.manager == manager && e.operation == "Apply" && e.subresource == subresource)
    {
        let mut dropped = entries[at].set.clone();
        dropped.subtract(&wanted);
        let mut keep = wanted.clone();
        for (i, e) in entries.iter().enumerate() {
            if i != at {
                keep.union(&e.set);
            }
        }
        remove(&rules, &mut merged, &dropped, &keep, &mut Vec::new());
        if entries[at].set != wanted {
            entries[at].set = wanted;
            entries[at].time = meta::now();
        }
    } else {
        entries.push(Entry {
            manager: manager.to_owned(),
            operation: "Apply".into(),
            subresource: subresource.to_owned(),
            set: wanted,
            time: meta::now(),
            api_version: resource.api_version(),
        });
    }
    write(&mut merged, entries);
    Ok(merged)
}

fn conflict_error(conflicts: &[(String, String)]) -> ApiError {
    let causes: Vec<Value> = conflicts
        .iter()
        .map(|(by, field)| json!({"reason": "FieldManagerConflict", "message": by, "field": field}))
        .collect();
    let message = match conflicts {
        [(by, field)] => format!("Apply failed with 1 conflict: {by}: {field}"),
        many => {
            let mut groups: Vec<(String, Vec<String>)> = Vec::new();
            for (by, field) in many {
                match groups.iter_mut().find(|(b, _)| b == by) {
                    Some((_, fields)) => fields.push(field.clone()),
                    None => groups.push((by.clone(), vec![field.clone()])),
                }
            }
            let shown: Vec<String> = groups
                .into_iter()
                .map(|(by, mut fields)| {
                    fields.sort();
                    format!("{by}:\n- {}", fields.join("\n- "))
                })
                .collect();
            format!("Apply failed with {} conflicts: {}", many.len(), shown.join("\n"))
        }
    };
    let mut e = ApiError::new(409, "Conflict", message);
    e.details = Some(Box::new(json!({"causes": causes})));
    e
}

/// Removes from an intent what the checked document (pruned against the schema) no longer has.
pub(crate) fn drop_unknown(intent: &mut Value, checked: &Value) {
    match (intent, checked) {
        (Value::Object(i), Value::Object(c)) => {
            i.retain(|k, v| c.contains_key(k) || matches!(k.as_str(), "stringData") || v.is_null());
            i.retain(|_, v| !v.is_null());
            for (k, v) in i.iter_mut() {
                if let Some(inner) = c.get(k) {
                    drop_unknown(v, inner);
                }
            }
        }
        (Value::Array(i), Value::Array(c)) if i.len() == c.len() => {
            for (a, b) in i.iter_mut().zip(c) {
                drop_unknown(a, b);
            }
        }
        _ => {}
    }
}

/// Whether two versions are the same but for versions, times of ownership and the like: such a write is not made.
pub(crate) fn same(new: &Value, old: &Value) -> bool {
    let plain = |v: &Value| {
        let mut v = v.clone();
        if let Some(m) = v["metadata"].as_object_mut() {
            m.shift_remove("resourceVersion");
            for e in m
                .get_mut("managedFields")
                .and_then(Value::as_array_mut)
                .into_iter()
                .flatten()
            {
                e["time"] = Value::Null;
            }
        }
        v
    };
    plain(new) == plain(old)
}

#[cfg(test)]
mod tests;
