//! The RBAC authorizer: roles and bindings, compiled into an index by subject and consulted on every request.
//!
//! Only allows; what no rule allows is denied. A role or binding that cannot be read grants nothing.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::Identity;
use crate::cache::Cached;
use crate::request::RequestInfo;
use crate::selector::LabelSelector;
use crate::store::{Store, StoreError};

const GROUP: &str = "rbac.authorization.k8s.io";

/// One policy rule.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rule {
    pub(crate) verbs: Vec<String>,
    pub(crate) groups: Vec<String>,
    pub(crate) resources: Vec<String>,
    pub(crate) names: Vec<String>,
    pub(crate) urls: Vec<String>,
}

/// What is asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attributes {
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Set for requests that address no resource.
    pub(crate) path: Option<String>,
}

impl From<&RequestInfo> for Attributes {
    fn from(info: &RequestInfo) -> Self {
        Self {
            verb: info.verb.clone(),
            group: info.group.clone(),
            resource: info.resource.clone(),
            subresource: info.subresource.clone(),
            namespace: info.namespace.clone().unwrap_or_default(),
            name: info.name.clone(),
            path: (!info.is_resource).then(|| info.path.clone()),
        }
    }
}

fn strings(v: &Value) -> Vec<String> {
    v.as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s.as_str().map(str::to_owned))
        .collect()
}

/// Rules of a role's `rules`.
pub(crate) fn rules_of(role: &Value) -> Vec<Rule> {
    role["rules"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|r| Rule {
            verbs: strings(&r["verbs"]),
            groups: strings(&r["apiGroups"]),
            resources: strings(&r["resources"]),
            names: strings(&r["resourceNames"]),
            urls: strings(&r["nonResourceURLs"]),
        })
        .collect()
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|x| x == "*" || x == wanted)
}

impl Rule {
    /// Whether this rule allows what is asked (the namespace is the binding's business).
    pub(crate) fn allows(&self, a: &Attributes) -> bool {
        if !has(&self.verbs, &a.verb) {
            return false;
        }
        if let Some(path) = &a.path {
            return self
                .urls
                .iter()
                .any(|u| u == "*" || u == path || u.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix)));
        }
        let resource = self.resources.iter().any(|r| {
            if r == "*" {
                return true;
            }
            match r.split_once('/') {
                None => a.subresource.is_empty() && *r == a.resource,
                Some((res, sub)) => {
                    (res == "*" || res == a.resource) && !a.subresource.is_empty() && sub == a.subresource
                }
            }
        });
        resource
            && has(&self.groups, &a.group)
            && (self.names.is_empty() || (!a.name.is_empty() && self.names.contains(&a.name)))
    }

    /// Whether this rule grants everything that `other` grants.
    fn covers(&self, other: &Rule) -> bool {
        let all = |own: &[String], wanted: &[String]| wanted.iter().all(|w| has(own, w));
        if !all(&self.verbs, &other.verbs) {
            return false;
        }
        if !other.urls.is_empty() {
            return other.urls.iter().all(|w| {
                self.urls
                    .iter()
                    .any(|u| u == "*" || u == w || u.strip_suffix('*').is_some_and(|p| w.starts_with(p)))
            });
        }
        all(&self.groups, &other.groups)
            && other.resources.iter().all(|w| {
                self.resources.iter().any(|r| {
                    r == "*"
                        || r == w
                        || r.strip_prefix("*/")
                            .is_some_and(|s| w.split_once('/').is_some_and(|(_, ws)| ws == s))
                })
            })
            && (self.names.is_empty()
                || (!other.names.is_empty() && other.names.iter().all(|n| self.names.contains(n))))
    }
}

#[derive(Debug)]
struct Binding {
    /// Namespace it is valid in; none: everywhere.
    namespace: Option<String>,
    rules: Arc<Vec<Rule>>,
    shown: String,
}

/// Roles and bindings, indexed by subject.
#[derive(Debug, Default)]
pub(crate) struct Index {
    by_user: HashMap<String, Vec<Arc<Binding>>>,
    by_group: HashMap<String, Vec<Arc<Binding>>>,
    roles: HashMap<String, Arc<Vec<Rule>>>,
}

impl Index {
    fn build(store: &dyn Store) -> Result<Self, StoreError> {
        let read = |plural: &str| -> Result<Vec<Value>, StoreError> {
            let snapshot = store.range(&format!("/{GROUP}/{plural}/"), None, 0)?;
            Ok(snapshot
                .entries
                .iter()
                .filter_map(|e| serde_json::from_slice(&e.value).ok())
                .collect())
        };
        let cluster_roles = read("clusterroles")?;
        let mut index = Self::default();
        for role in &cluster_roles {
            let rules = effective_rules(role, &cluster_roles);
            index
                .roles
                .insert(role_key(None, crate::meta::name(role)), Arc::new(rules));
        }
        for role in read("roles")? {
            let key = role_key(Some(crate::meta::namespace(&role)), crate::meta::name(&role));
            index.roles.insert(key, Arc::new(rules_of(&role)));
        }
        for (plural, namespaced) in [("clusterrolebindings", false), ("rolebindings", true)] {
            for binding in read(plural)? {
                let namespace = namespaced.then(|| crate::meta::namespace(&binding).to_owned());
                let reference = &binding["roleRef"];
                let role_name = reference["name"].as_str().unwrap_or_default();
                let key = match (reference["kind"].as_str(), &namespace) {
                    (Some("ClusterRole"), _) => role_key(None, role_name),
                    (Some("Role"), Some(ns)) => role_key(Some(ns), role_name),
                    _ => continue,
                };
                let Some(rules) = index.roles.get(&key) else { continue };
                let shown = format!(
                    "{} {:?} of {} {role_name:?}",
                    if namespaced {
                        "RoleBinding"
                    } else {
                        "ClusterRoleBinding"
                    },
                    if let Some(ns) = &namespace {
                        format!("{}/{ns}", crate::meta::name(&binding))
                    } else {
                        crate::meta::name(&binding).to_owned()
                    },
                    reference["kind"].as_str().unwrap_or_default(),
                );
                let compiled = Arc::new(Binding {
                    namespace: namespace.clone(),
                    rules: rules.clone(),
                    shown,
                });
                for subject in binding["subjects"].as_array().into_iter().flatten() {
                    let name = subject["name"].as_str().unwrap_or_default();
                    match subject["kind"].as_str() {
                        Some("User") => index.by_user.entry(name.to_owned()).or_default().push(compiled.clone()),
                        Some("Group") => index
                            .by_group
                            .entry(name.to_owned())
                            .or_default()
                            .push(compiled.clone()),
                        Some("ServiceAccount") => {
                            let ns = subject["namespace"]
                                .as_str()
                                .or(namespace.as_deref())
                                .unwrap_or_default();
                            let user = format!("system:serviceaccount:{ns}:{name}");
                            index.by_user.entry(user).or_default().push(compiled.clone());
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(index)
    }

    fn bindings<'a>(&'a self, user: &'a Identity) -> impl Iterator<Item = &'a Arc<Binding>> {
        let by_user = self.by_user.get(&user.username).into_iter().flatten();
        by_user.chain(user.groups.iter().filter_map(|g| self.by_group.get(g)).flatten())
    }

    /// Whether the user may; the text says why if so.
    pub(crate) fn authorize(&self, user: &Identity, a: &Attributes) -> Option<String> {
        if user.groups.iter().any(|g| g == "system:masters") {
            return Some(String::new());
        }
        self.bindings(user)
            .filter(|b| match &b.namespace {
                None => true,
                Some(ns) => a.path.is_none() && !a.namespace.is_empty() && *ns == a.namespace,
            })
            .find(|b| b.rules.iter().any(|r| r.allows(a)))
            .map(|b| format!("RBAC: allowed by {} to {:?}", b.shown, user.username))
    }

    /// All rules that hold for the user in a namespace.
    pub(crate) fn rules_for(&self, user: &Identity, namespace: &str) -> Vec<Rule> {
        let mut out: Vec<Rule> = self
            .bindings(user)
            .filter(|b| b.namespace.as_deref().is_none_or(|ns| ns == namespace))
            .flat_map(|b| b.rules.iter().cloned())
            .collect();
        if user.groups.iter().any(|g| g == "system:masters") {
            let star = || vec!["*".to_owned()];
            out.push(Rule {
                verbs: star(),
                groups: star(),
                resources: star(),
                ..Rule::default()
            });
            out.push(Rule {
                verbs: star(),
                urls: star(),
                ..Rule::default()
            });
        }
        out
    }

    /// Rules of a role that a binding refers to.
    pub(crate) fn role(&self, namespace: Option<&str>, name: &str) -> Option<Arc<Vec<Rule>>> {
        self.roles.get(&role_key(namespace, name)).cloned()
    }

    /// What of `wanted` the user does not have in the namespace; empty means that nothing escalates. Each single verb, group
    /// and resource is looked for alone, so that several small grants add up.
    pub(crate) fn missing(&self, user: &Identity, namespace: &str, wanted: &[Rule]) -> Vec<Rule> {
        let owned = self.rules_for(user, namespace);
        let one = |s: &String| vec![s.clone()];
        let mut missing = Vec::new();
        for rule in wanted {
            for verb in &rule.verbs {
                for url in &rule.urls {
                    let atom = Rule {
                        verbs: one(verb),
                        urls: one(url),
                        ..Rule::default()
                    };
                    if !owned.iter().any(|o| o.covers(&atom)) {
                        missing.push(atom);
                    }
                }
                for group in &rule.groups {
                    for resource in &rule.resources {
                        let names: Vec<Vec<String>> = if rule.names.is_empty() {
                            vec![vec![]]
                        } else {
                            rule.names.iter().map(one).collect()
                        };
                        for names in names {
                            let atom = Rule {
                                verbs: one(verb),
                                groups: one(group),
                                resources: one(resource),
                                names,
                                ..Rule::default()
                            };
                            if !owned.iter().any(|o| o.covers(&atom)) {
                                missing.push(atom);
                            }
                        }
                    }
                }
            }
        }
        missing
    }
}

fn role_key(namespace: Option<&str>, name: &str) -> String {
    format!("{}/{name}", namespace.unwrap_or_default())
}

/// Rules of a cluster role; an aggregated one is the union of those it selects.
pub(crate) fn effective_rules(role: &Value, all: &[Value]) -> Vec<Rule> {
    let selectors = role["aggregationRule"]["clusterRoleSelectors"].as_array();
    let Some(selectors) = selectors else {
        return rules_of(role);
    };
    let selectors: Vec<LabelSelector> = selectors
        .iter()
        .filter_map(|s| LabelSelector::from_object(s).ok())
        .collect();
    all.iter()
        .filter(|r| crate::meta::name(r) != crate::meta::name(role) && selectors.iter().any(|s| s.matches(r)))
        .flat_map(|r| effective_rules_once(r, all))
        .collect()
}

/// Default roles aggregate in a chain (view → edit → admin); two levels are followed, which a loop cannot exceed.
fn effective_rules_once(role: &Value, all: &[Value]) -> Vec<Rule> {
    let Some(selectors) = role["aggregationRule"]["clusterRoleSelectors"].as_array() else {
        return rules_of(role);
    };
    let selectors: Vec<LabelSelector> = selectors
        .iter()
        .filter_map(|s| LabelSelector::from_object(s).ok())
        .collect();
    let mut rules = rules_of(role);
    for r in all
        .iter()
        .filter(|r| crate::meta::name(r) != crate::meta::name(role) && selectors.iter().any(|s| s.matches(r)))
    {
        rules.extend(rules_of(r));
        if let Some(deeper) = r["aggregationRule"]["clusterRoleSelectors"].as_array() {
            let deeper: Vec<LabelSelector> = deeper
                .iter()
                .filter_map(|s| LabelSelector::from_object(s).ok())
                .collect();
            for d in all
                .iter()
                .filter(|d| d["aggregationRule"].is_null() && deeper.iter().any(|s| s.matches(d)))
            {
                rules.extend(rules_of(d));
            }
        }
    }
    rules
}

/// The index as a cache over the store.
pub(crate) fn cache() -> Cached<Index> {
    let prefixes = ["clusterroles", "roles", "clusterrolebindings", "rolebindings"];
    Cached::new(
        prefixes.iter().map(|p| format!("/{GROUP}/{p}/")).collect(),
        Index::build,
    )
}

/// The text of a denial, after `... is forbidden: `.
pub(crate) fn denial(user: &Identity, a: &Attributes) -> String {
    if let Some(path) = &a.path {
        return format!("User {:?} cannot {} path {path:?}", user.username, a.verb);
    }
    let resource = if a.subresource.is_empty() {
        a.resource.clone()
    } else {
        format!("{}/{}", a.resource, a.subresource)
    };
    let scope = if a.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", a.namespace)
    };
    format!(
        "User {:?} cannot {} resource {resource:?} in API group {:?} {scope}",
        user.username, a.verb, a.group
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> Rule {
        let own = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect();
        Rule {
            verbs: own(verbs),
            groups: own(groups),
            resources: own(resources),
            names: own(names),
            urls: vec![],
        }
    }

    fn ask(verb: &str, resource: &str, sub: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            resource: resource.into(),
            subresource: sub.into(),
            name: name.into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn rules_match_as_documented() {
        let r = rule(&["get"], &[""], &["pods", "*/scale"], &[]);
        assert!(r.allows(&ask("get", "pods", "", "x")));
        assert!(!r.allows(&ask("get", "pods", "log", "x")));
        assert!(r.allows(&ask("get", "deployments", "scale", "x")));
        assert!(!r.allows(&ask("list", "pods", "", "")));
        let named = rule(&["*"], &["*"], &["*"], &["a"]);
        assert!(named.allows(&ask("get", "secrets", "", "a")));
        assert!(!named.allows(&ask("get", "secrets", "", "b")));
        assert!(!named.allows(&ask("list", "secrets", "", "")));
        let url = Rule {
            verbs: vec!["get".into()],
            urls: vec!["/healthz*".into()],
            ..Rule::default()
        };
        let path = |p: &str| Attributes {
            verb: "get".into(),
            path: Some(p.into()),
            ..Attributes::default()
        };
        assert!(url.allows(&path("/healthz/etcd")) && !url.allows(&path("/metrics")));
        assert!(!rule(&["*"], &["*"], &["*"], &[]).allows(&path("/metrics")));
    }

    #[test]
    fn coverage_for_escalation() {
        let own = rule(&["get", "list"], &["", "apps"], &["pods", "deployments"], &[]);
        assert!(own.covers(&rule(&["get"], &["apps"], &["deployments"], &["x"])));
        assert!(!own.covers(&rule(&["delete"], &["apps"], &["deployments"], &[])));
        let named = rule(&["get"], &[""], &["secrets"], &["a"]);
        assert!(!named.covers(&rule(&["get"], &[""], &["secrets"], &[])));
    }
}
