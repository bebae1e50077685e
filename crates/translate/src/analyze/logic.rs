//! Rules without effect: contradictory, covered by another rule of the same action, or denied before they are looked at.
//!
//! Works on what translation made of the policies, so that it speaks about what is enforced. Implication between rules is tested
//! structurally: what is said to be covered is covered; not everything that is covered is found.

use std::collections::{BTreeMap, BTreeSet};

use mantlet_model::authz::{Action, Atom, Attribute, AuthzFilter, Expr, Matcher, Rule};

use super::authz::target;
use super::input::{Input, Resource};
use super::{Report, table};
use crate::authz::{self, Form, Target};

/// Most rules of one action that are compared with each other; beyond that only equal ones are found.
const MAX_COMPARED: usize = 1500;

/// What is known of a rule over all workloads that it is bound to.
#[derive(Default)]
struct Seen {
    bound: usize,
    never: bool,
    shadowed: Vec<String>,
    denied: Vec<String>,
}

pub(super) fn run(input: &Input, out: &mut Report) {
    let mut rules: BTreeMap<String, Seen> = BTreeMap::new();
    let mut done: BTreeSet<Vec<String>> = BTreeSet::new();
    let mut look = |of: Target<'_>| {
        let names: Vec<String> = authz::bound(&input.world, of)
            .map(|p| format!("{}/{}", p.meta.namespace, p.meta.name))
            .collect();
        // Workloads with the same policies have the same rules.
        if !names.is_empty() && done.insert(names) {
            filters(&authz::filters(&input.world, of, Form::Http), &mut rules);
        }
    };
    for workload in input.workloads.iter().filter(|w| w.meshed) {
        look(target(workload));
    }
    // Policies that select nothing that is known are looked at as if their selector were a workload.
    let policies: Vec<_> = input.typed::<mantlet_api::AuthorizationPolicy>();
    for (resource, policy) in &policies {
        let labels = policy
            .selector
            .as_ref()
            .map(|s| s.match_labels.clone())
            .unwrap_or_default();
        look(Target {
            namespace: &resource.namespace,
            labels: &labels,
            gateway: false,
        });
    }
    let known: BTreeMap<(&str, &str), (&Resource, usize)> = policies
        .iter()
        .map(|(r, p)| ((r.namespace.as_str(), r.name.as_str()), (*r, p.rules.len())))
        .collect();
    for (id, seen) in &rules {
        let Some((namespace, name, index)) = parse(id) else {
            continue;
        };
        let Some((resource, count)) = known.get(&(namespace, name)) else {
            continue;
        };
        if index >= *count {
            // Stands for "no rules at all".
            continue;
        }
        let path = format!("spec.rules[{index}]");
        if seen.never {
            out.add(
                &table::RULE_NEVER_MATCHES,
                resource,
                path,
                "The conditions of this rule contradict each other: no request meets all of them.",
            );
        } else if seen.denied.len() == seen.bound {
            let (by, rule) = named(&seen.denied[0]);
            out.add(
                &table::ALLOW_DENIED,
                resource,
                path,
                format!("Everything that this rule allows is denied by rule {rule} of {by}."),
            );
        } else if seen.shadowed.len() == seen.bound {
            let (by, rule) = named(&seen.shadowed[0]);
            out.add(
                &table::RULE_SHADOWED,
                resource,
                path,
                format!("This rule has no effect: rule {rule} of {by} matches everything that it matches."),
            );
        }
    }
}

fn named(id: &str) -> (String, usize) {
    parse(id).map_or_else(
        || (id.to_string(), 0),
        |(namespace, name, index)| (format!("{namespace}/{name}"), index),
    )
}

/// Namespace, name and index of `ns[…]-policy[…]-rule[…]`.
fn parse(id: &str) -> Option<(&str, &str, usize)> {
    let rest = id.strip_prefix("ns[")?;
    let (namespace, rest) = rest.split_once("]-policy[")?;
    let (name, rest) = rest.split_once("]-rule[")?;
    Some((namespace, name, rest.strip_suffix(']')?.parse().ok()?))
}

fn filters(all: &[AuthzFilter], out: &mut BTreeMap<String, Seen>) {
    let of = |action: Action| {
        all.iter()
            .filter(move |f| f.action == action && f.enforced)
            .flat_map(|f| &f.rules)
            .collect::<Vec<&Rule>>()
    };
    let (deny, allow) = (of(Action::Deny), of(Action::Allow));
    for list in [&deny, &allow] {
        let mut equal: BTreeMap<&Expr, usize> = BTreeMap::new();
        for (index, rule) in list.iter().enumerate() {
            let seen = out.entry(rule.id.clone()).or_default();
            seen.bound += 1;
            if never(&rule.expr) {
                seen.never = true;
                continue;
            }
            let first = *equal.entry(&rule.expr).or_insert(index);
            let shadow = if first != index {
                Some(first)
            } else if list.len() <= MAX_COMPARED {
                list.iter().enumerate().position(|(other, rival)| {
                    other != index
                        && implies(&rule.expr, &rival.expr)
                        && !never(&rival.expr)
                        // Of two that cover each other, the first counts.
                        && (other < index || !implies(&rival.expr, &rule.expr))
                })
            } else {
                None
            };
            if let Some(by) = shadow {
                seen.shadowed.push(list[by].id.clone());
            }
        }
    }
    if deny.len().saturating_mul(allow.len()) > MAX_COMPARED * MAX_COMPARED {
        return;
    }
    for rule in &allow {
        let denied = deny.iter().find(|d| implies(&rule.expr, &d.expr));
        if let (Some(by), Some(seen)) = (denied, out.get_mut(&rule.id)) {
            seen.denied.push(by.id.clone());
        }
    }
}

/// No request matches.
fn never(expr: &Expr) -> bool {
    match expr {
        Expr::Or(any) => any.iter().all(never),
        Expr::And(all) => {
            all.iter().any(never)
                || all
                    .iter()
                    .enumerate()
                    .any(|(i, a)| all[i + 1..].iter().any(|b| excludes(a, b)))
        }
        Expr::Not(inner) => always(inner),
        Expr::Atom(_) => false,
    }
}

/// Every request matches.
fn always(expr: &Expr) -> bool {
    match expr {
        Expr::Or(any) => any.iter().any(always),
        Expr::And(all) => all.iter().all(always),
        Expr::Not(inner) => never(inner),
        Expr::Atom(_) => false,
    }
}

/// Whatever matches `a` matches `b`. False means: not shown.
fn implies(a: &Expr, b: &Expr) -> bool {
    match (a, b) {
        (_, Expr::And(all)) => all.iter().all(|b| implies(a, b)),
        (Expr::Or(any), _) => any.iter().all(|a| implies(a, b)),
        (_, Expr::Or(any)) if any.iter().any(|b| implies(a, b)) => true,
        (_, Expr::Not(inner)) => excludes(a, inner),
        (Expr::And(all), _) => all.iter().any(|a| implies(a, b)),
        (Expr::Atom(a), Expr::Atom(b)) => a.attribute == b.attribute && narrower(a, b),
        _ => false,
    }
}

/// Nothing matches both. False means: not shown.
fn excludes(a: &Expr, b: &Expr) -> bool {
    match (a, b) {
        (Expr::Or(any), _) => any.iter().all(|a| excludes(a, b)),
        (_, Expr::Or(any)) => any.iter().all(|b| excludes(a, b)),
        (Expr::Not(inner), _) if implies(b, inner) => true,
        (_, Expr::Not(inner)) if implies(a, inner) => true,
        (Expr::And(all), _) if all.iter().any(|a| excludes(a, b)) => true,
        (_, Expr::And(all)) => all.iter().any(|b| excludes(a, b)),
        (Expr::Atom(a), Expr::Atom(b)) => a.attribute == b.attribute && disjoint(a, b),
        _ => false,
    }
}

fn text(attribute: &Attribute, value: &str) -> String {
    match attribute {
        // The only attribute that is compared without case.
        Attribute::Host => value.to_ascii_lowercase(),
        _ => value.to_string(),
    }
}

/// Values that `a` accepts are accepted by `b`; both test the same attribute.
fn narrower(a: &Atom, b: &Atom) -> bool {
    if a.matcher == b.matcher {
        return true;
    }
    let norm = |value: &str| text(&a.attribute, value);
    match (&a.matcher, &b.matcher) {
        (Matcher::Exact(v) | Matcher::Prefix(v) | Matcher::Suffix(v), Matcher::Present) => !v.is_empty(),
        (Matcher::Exact(v), Matcher::Exact(w)) => norm(v) == norm(w),
        (Matcher::Exact(v) | Matcher::Prefix(v), Matcher::Prefix(w)) => norm(v).starts_with(&norm(w)),
        (Matcher::Exact(v) | Matcher::Suffix(v), Matcher::Suffix(w)) => norm(v).ends_with(&norm(w)),
        (Matcher::Cidr(v), Matcher::Cidr(w)) => w.contains(v),
        _ => false,
    }
}

/// No value is accepted by both; only for attributes that have one value.
fn disjoint(a: &Atom, b: &Atom) -> bool {
    let single = matches!(
        a.attribute,
        Attribute::Method
            | Attribute::Path
            | Attribute::Host
            | Attribute::DestinationPort
            | Attribute::DestinationIp
            | Attribute::SourceIp
            | Attribute::RemoteIp
            | Attribute::Sni
    );
    if !single {
        return false;
    }
    let norm = |value: &str| text(&a.attribute, value);
    match (&a.matcher, &b.matcher) {
        (Matcher::Exact(v), Matcher::Exact(w)) => norm(v) != norm(w),
        (Matcher::Exact(v), Matcher::Prefix(w)) | (Matcher::Prefix(w), Matcher::Exact(v)) => {
            !norm(v).starts_with(&norm(w))
        }
        (Matcher::Exact(v), Matcher::Suffix(w)) | (Matcher::Suffix(w), Matcher::Exact(v)) => {
            !norm(v).ends_with(&norm(w))
        }
        (Matcher::Prefix(v), Matcher::Prefix(w)) => {
            let (v, w) = (norm(v), norm(w));
            !v.starts_with(&w) && !w.starts_with(&v)
        }
        (Matcher::Port(v), Matcher::Port(w)) => v != w,
        (Matcher::Cidr(v), Matcher::Cidr(w)) => !v.contains(w) && !w.contains(v),
        _ => false,
    }
}
