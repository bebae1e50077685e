//! Roles and bindings: defaults, validation, and the check that nobody grants what they do not have.

use serde_json::{Value, json};

use super::{items_mut, set_default};
use crate::auth::Identity;
use crate::auth::rbac::{Attributes, Rule, rules_of};
use crate::error::{ApiError, ApiResult, Cause};
use crate::meta;
use crate::resources::Resource;
use crate::server::ApiServer;

const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn default(object: &mut Value) {
    if object["roleRef"].is_object() {
        set_default(&mut object["roleRef"], "apiGroup", GROUP);
    } else if let Some(map) = object.as_object_mut() {
        map.retain(|k, v| k != "roleRef" || !v.is_null());
    }
    for subject in items_mut(object, "subjects") {
        let group = match subject["kind"].as_str() {
            Some("User" | "Group") => GROUP,
            _ => continue,
        };
        set_default(subject, "apiGroup", group);
    }
}

pub(super) fn validate(r: &Resource, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    match r.kind.as_str() {
        "Role" | "ClusterRole" => {
            for (i, rule) in object["rules"].as_array().into_iter().flatten().enumerate() {
                let at = format!("rules[{i}]");
                let empty = |f: &str| rule[f].as_array().is_none_or(Vec::is_empty);
                if empty("verbs") {
                    causes.push(Cause::required(
                        format!("{at}.verbs"),
                        "verbs must contain at least one value",
                    ));
                }
                if !empty("nonResourceURLs") {
                    if r.kind == "Role" {
                        let why = "namespaced rules cannot apply to non-resource URLs";
                        causes.push(Cause::invalid(
                            format!("{at}.nonResourceURLs"),
                            &rule["nonResourceURLs"],
                            why,
                        ));
                    }
                    if !empty("apiGroups") || !empty("resources") {
                        let why = "rules cannot apply to both regular resources and non-resource URLs";
                        causes.push(Cause::invalid(
                            format!("{at}.nonResourceURLs"),
                            &rule["nonResourceURLs"],
                            why,
                        ));
                    }
                    continue;
                }
                if empty("apiGroups") {
                    causes.push(Cause::required(
                        format!("{at}.apiGroups"),
                        "resource rules must supply at least one api group",
                    ));
                }
                if empty("resources") {
                    causes.push(Cause::required(
                        format!("{at}.resources"),
                        "resource rules must supply at least one resource",
                    ));
                }
            }
        }
        _ => {
            let reference = &object["roleRef"];
            if reference["apiGroup"] != GROUP {
                causes.push(Cause::not_supported(
                    "roleRef.apiGroup",
                    &reference["apiGroup"],
                    &[GROUP],
                ));
            }
            let kinds: &[&str] = if r.kind == "RoleBinding" {
                &["ClusterRole", "Role"]
            } else {
                &["ClusterRole"]
            };
            if !kinds.contains(&reference["kind"].as_str().unwrap_or_default()) {
                causes.push(Cause::not_supported("roleRef.kind", &reference["kind"], kinds));
            }
            if reference["name"].as_str().unwrap_or_default().is_empty() {
                causes.push(Cause::required("roleRef.name", ""));
            }
            for (i, s) in object["subjects"].as_array().into_iter().flatten().enumerate() {
                let at = format!("subjects[{i}]");
                if s["name"].as_str().unwrap_or_default().is_empty() {
                    causes.push(Cause::required(format!("{at}.name"), ""));
                }
                match s["kind"].as_str() {
                    Some("ServiceAccount") => {
                        if r.kind == "ClusterRoleBinding" && s["namespace"].as_str().unwrap_or_default().is_empty() {
                            causes.push(Cause::required(format!("{at}.namespace"), ""));
                        }
                    }
                    Some("User" | "Group") => {}
                    _ => causes.push(Cause::not_supported(
                        format!("{at}.kind"),
                        &s["kind"],
                        &["Group", "ServiceAccount", "User"],
                    )),
                }
            }
            if let Some(old) = old
                && reference != &old["roleRef"]
            {
                causes.push(Cause::invalid("roleRef", reference, "cannot change roleRef"));
            }
        }
    }
}

/// Whoever writes a role or binding must hold what it grants, or be allowed to escalate or bind.
pub(super) fn check_escalation(
    server: &ApiServer,
    user: &Identity,
    r: &Resource,
    object: &Value,
    old: Option<&Value>,
) -> ApiResult<()> {
    if user.groups.iter().any(|g| g == "system:masters") {
        return Ok(());
    }
    let namespace = if r.namespaced { meta::namespace(object) } else { "" };
    let name = meta::name(object);
    let index = server.rbac()?;
    let may = |verb: &str, resource: &str, name: &str| {
        let ask = Attributes {
            verb: verb.into(),
            group: GROUP.into(),
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
            ..Attributes::default()
        };
        index.authorize(user, &ask).is_some()
    };
    let wanted: Vec<Rule> = match r.kind.as_str() {
        "Role" | "ClusterRole" => {
            if old.is_some_and(|o| o["rules"] == object["rules"] && o["aggregationRule"] == object["aggregationRule"])
                || may("escalate", &r.plural, name)
            {
                return Ok(());
            }
            if object["aggregationRule"].is_object() {
                // What it will aggregate is not known yet, so only those who have everything may.
                let star = vec!["*".to_owned()];
                vec![Rule {
                    verbs: star.clone(),
                    groups: star.clone(),
                    resources: star,
                    ..Rule::default()
                }]
            } else {
                rules_of(object)
            }
        }
        _ => {
            if old.is_some_and(|o| o["roleRef"] == object["roleRef"] && o["subjects"] == object["subjects"]) {
                return Ok(());
            }
            let reference = &object["roleRef"];
            let role = reference["name"].as_str().unwrap_or_default();
            let cluster = reference["kind"] == "ClusterRole";
            if may("bind", if cluster { "clusterroles" } else { "roles" }, role) {
                return Ok(());
            }
            let found = index
                .role(if cluster { None } else { Some(namespace) }, role)
                .ok_or_else(|| ApiError::not_found(GROUP, if cluster { "clusterroles" } else { "roles" }, role))?;
            found.to_vec()
        }
    };
    let missing = index.missing(user, namespace, &wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = missing
        .iter()
        .take(20)
        .map(|m| {
            if m.urls.is_empty() {
                format!(
                    "{{APIGroups:{}, Resources:{}, Verbs:{}}}",
                    json!(m.groups),
                    json!(m.resources),
                    json!(m.verbs)
                )
            } else {
                format!("{{NonResourceURLs:{}, Verbs:{}}}", json!(m.urls), json!(m.verbs))
            }
        })
        .collect();
    let groups = user
        .groups
        .iter()
        .map(|g| format!("{g:?}"))
        .collect::<Vec<_>>()
        .join(" ");
    let why = format!(
        "user {:?} (groups=[{groups}]) is attempting to grant RBAC permissions not currently held:\n{}",
        user.username,
        shown.join("\n")
    );
    Err(ApiError::forbidden(GROUP, &r.plural, name, &why))
}
