//! Why a decision came out as it did, for operators.
//!
//! The command line and the admin interface call this, never the request path: it goes over all rules and allocates.
//! It evaluates the same [`Test`]s as the engine, so what is explained is what is enforced.

use serde::{Deserialize, Serialize};

use super::matcher::Test;
use super::{Action, Atom, AuthzFilter, Connection, Decision, Engine, Expr, HttpView, Rule, Verdict, canonical};

/// An explained decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Whether the request goes on.
    pub allowed: bool,
    /// Response code details, if denied.
    pub details: Option<String>,
    /// The filters in order of evaluation, up to the one that decided.
    pub filters: Vec<FilterExplanation>,
}

/// One filter's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterExplanation {
    /// Action of the filter.
    pub action: Action,
    /// Whether it enforces.
    pub enforced: bool,
    /// The rules that matched, by id.
    pub matched: Vec<String>,
    /// Dry-run rules that matched, by id.
    pub shadow_matched: Vec<String>,
    /// The rule that came closest, if none matched.
    pub nearest: Option<NearMiss>,
}

/// A rule that did not match, and what would have had to be different.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearMiss {
    /// Id of the rule.
    pub rule: String,
    /// The fewest tests whose result had to change for the rule to match.
    pub failed: Vec<FailedTest>,
}

/// A test that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedTest {
    /// The test.
    pub atom: Atom,
    /// Whether it had to hold (`false` for tests under a negation, which held but must not).
    pub wanted: bool,
    /// Why it could not be evaluated, if so.
    pub problem: Option<String>,
}

/// Explains what [`Engine::decide`] decides.
pub fn explain(filters: &[AuthzFilter], connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Explanation {
    let engine = Engine::new(filters);
    let decision: Decision<'_> = engine.decide(connection, http);
    let mut sorted: Vec<&AuthzFilter> = filters.iter().collect();
    sorted.sort_by_key(|f| f.action);
    let mut out = Vec::new();
    for filter in sorted {
        let part = explain_filter(filter, connection, http);
        let ends = filter.enforced
            && match filter.action {
                Action::Log => false,
                Action::Deny => !part.matched.is_empty(),
                Action::Allow => part.matched.is_empty(),
            };
        out.push(part);
        if ends {
            break;
        }
    }
    Explanation {
        allowed: decision.verdict == Verdict::Allowed,
        details: decision.details(),
        filters: out,
    }
}

fn explain_filter(filter: &AuthzFilter, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> FilterExplanation {
    let mut matched = Vec::new();
    let mut nearest: Option<NearMiss> = None;
    for rule in &filter.rules {
        let failed = rule_misses(rule, filter.action, connection, http);
        if failed.is_empty() {
            matched.push(rule.id.clone());
        } else if nearest
            .as_ref()
            .is_none_or(|n| (distance(&failed), &rule.id) < (distance(&n.failed), &n.rule))
        {
            nearest = Some(NearMiss {
                rule: rule.id.clone(),
                failed,
            });
        }
    }
    let shadow = filter
        .shadow
        .iter()
        .filter(|r| rule_misses(r, filter.action, connection, http).is_empty());
    let mut shadow_matched: Vec<String> = shadow.map(|r| r.id.clone()).collect();
    matched.sort();
    shadow_matched.sort();
    FilterExplanation {
        action: filter.action,
        enforced: filter.enforced,
        nearest: if matched.is_empty() { nearest } else { None },
        matched,
        shadow_matched,
    }
}

/// What an enforced ALLOW rule missed by: its expression in canonical form and the fewest tests to change. `None` if there is no
/// such rule, or if it matches.
pub fn miss(
    filters: &[AuthzFilter],
    rule: &str,
    connection: &Connection<'_>,
    http: Option<&dyn HttpView>,
) -> Option<(Expr, Vec<FailedTest>)> {
    let rule = filters
        .iter()
        .filter(|f| f.action == Action::Allow && f.enforced)
        .flat_map(|f| &f.rules)
        .find(|r| r.id == rule)?;
    let failed = rule_misses(rule, Action::Allow, connection, http);
    (!failed.is_empty()).then(|| (canonical(&rule.expr), failed))
}

/// How far a rule is from matching; one that never could is farther than all others.
fn distance(failed: &[FailedTest]) -> usize {
    if failed.iter().any(|f| f.problem.is_some()) {
        usize::MAX
    } else {
        failed.len()
    }
}

/// The tests that keep a rule from matching; empty if it matches. A rule that cannot be understood fails closed.
fn rule_misses(
    rule: &Rule,
    action: Action,
    connection: &Connection<'_>,
    http: Option<&dyn HttpView>,
) -> Vec<FailedTest> {
    let expr = canonical(&rule.expr);
    if let Some((atom, problem)) = broken(&expr) {
        return match action {
            Action::Allow => vec![FailedTest {
                atom,
                wanted: true,
                problem: Some(problem),
            }],
            Action::Deny | Action::Log => Vec::new(),
        };
    }
    misses(&expr, true, connection, http).unwrap_or_else(|| {
        // `Or []`: there is nothing that could be different.
        vec![FailedTest {
            atom: Atom {
                attribute: super::Attribute::PeerUri,
                matcher: super::Matcher::Present,
            },
            wanted: true,
            problem: Some("this rule never matches".into()),
        }]
    })
}

fn broken(expr: &Expr) -> Option<(Atom, String)> {
    match expr {
        Expr::And(children) | Expr::Or(children) => children.iter().find_map(broken),
        Expr::Not(inner) => broken(inner),
        Expr::Atom(atom) => super::check(atom).err().map(|problem| (atom.clone(), problem)),
    }
}

/// The fewest tests to change so that the expression is `wanted`; `None` if no change could do it.
fn misses(
    expr: &Expr,
    wanted: bool,
    connection: &Connection<'_>,
    http: Option<&dyn HttpView>,
) -> Option<Vec<FailedTest>> {
    match expr {
        Expr::Not(inner) => misses(inner, !wanted, connection, http),
        // Under a negation, a conjunction is a choice and the other way round.
        Expr::And(children) | Expr::Or(children) => {
            let parts = children.iter().map(|c| misses(c, wanted, connection, http));
            if matches!(expr, Expr::And(_)) == wanted {
                let all: Option<Vec<_>> = parts.collect();
                all.map(|all| all.into_iter().flatten().collect())
            } else {
                parts.flatten().min_by_key(Vec::len)
            }
        }
        Expr::Atom(atom) => {
            let test = Test::new(atom);
            let holds = test.as_ref().is_ok_and(|t| t.holds(connection, http));
            if holds == wanted {
                return Some(Vec::new());
            }
            Some(vec![FailedTest {
                atom: atom.clone(),
                wanted,
                problem: test.err(),
            }])
        }
    }
}
