//! AuthorizationPolicy → authorization filters of one workload (SEMANTICS 2a–2f, 2i, 2j).
//!
//! Called for every inbound chain, once for HTTP and once for TCP. The fail direction is fixed here: a value that cannot
//! be understood narrows ALLOW (the rule goes) and widens everything else (the value goes); a policy that cannot be
//! read at all denies on its target. What was given up is told as a [`Problem`], for the policy's status and the log.

mod custom;
mod values;

use std::collections::BTreeMap;

use mantlet_api::authorization_policy::{Action as ApiAction, Condition, Operation, Rule as ApiRule, Source};
use mantlet_api::{AuthorizationPolicy, PolicyTargetReference, WorkloadSelector};
use mantlet_model::authz::{Action, Attribute, AuthzFilter, Expr, Rule};
use mantlet_model::ext_authz::ID_PREFIX;

use crate::world::{Config, World};
pub use custom::custom;
use values::{Bad, Values};

/// Label of gateway pods that belong to a Kubernetes Gateway (S2.5).
const GATEWAY_NAME_LABEL: &str = "gateway.networking.k8s.io/gateway-name";
/// Annotation that turns a policy into a trial run.
const DRY_RUN: &str = "istio.io/dry-run";

/// Which chain the filters are for (S2.83).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// HTTP: every field counts.
    Http,
    /// TCP: fields that exist only in HTTP are reduced (2f).
    Tcp,
}

/// The workload that is protected.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Whether it is a gateway; sidecars ignore policies with targets (S2.4).
    pub gateway: bool,
}

/// What could not be translated as written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Rule index, if one rule is meant.
    pub rule: Option<usize>,
    /// What, and what is done instead.
    pub message: String,
}

/// The filters of a workload, in the order AUDIT, DENY, ALLOW (S2.25). Empty when no policy is bound. CUSTOM policies come
/// before and apart: [`custom()`].
pub fn filters(world: &World, target: Target<'_>, form: Form) -> Vec<AuthzFilter> {
    let mut audit = Collected::default();
    let mut deny = Collected::default();
    let mut allow = Collected::default();

    for policy in bound(world, target) {
        if policy.broken.is_none() && policy.spec.action == ApiAction::Custom {
            continue;
        }
        let mut problems = Vec::new();
        let translated = translate(world, policy, form, &mut problems);
        let collected = match translated.action {
            Action::Log => &mut audit,
            Action::Deny => &mut deny,
            Action::Allow => &mut allow,
        };
        collected.bound = true;
        if translated.shadow {
            collected.shadow.extend(translated.rules);
        } else {
            collected.enforced = true;
            collected.rules.extend(translated.rules);
        }
    }

    let mut out = Vec::new();
    for (action, collected) in [(Action::Log, audit), (Action::Deny, deny)] {
        if !collected.rules.is_empty() || !collected.shadow.is_empty() {
            out.push(AuthzFilter {
                action,
                enforced: collected.enforced,
                rules: collected.rules,
                shadow: collected.shadow,
            });
        }
    }
    if allow.bound {
        // With trial runs only nothing is enforced, so everything passes (S2.132).
        out.push(AuthzFilter {
            action: Action::Allow,
            enforced: allow.enforced,
            rules: allow.rules,
            shadow: allow.shadow,
        });
    }
    out
}

/// What cannot be translated as written in a policy, for its status. Empty means: in force exactly as written.
pub fn problems(world: &World, policy: &Config<AuthorizationPolicy>) -> Vec<Problem> {
    let mut problems = Vec::new();
    translate(world, policy, Form::Http, &mut problems);
    if policy.broken.is_none() && policy.spec.action == ApiAction::Custom {
        custom::provider_problems(world, policy, &mut problems);
    }
    problems.sort();
    problems.dedup();
    problems
}

/// Policies that bind a workload: of the root namespace first, then of its own, each oldest first (S2.1–S2.10). Those that former
/// roles were converted to are left out where a policy of today allows something (S7.48).
pub fn bound<'a>(world: &'a World, target: Target<'a>) -> impl Iterator<Item = &'a Config<AuthorizationPolicy>> {
    let root = world.mesh().root_namespace.as_str();
    let own = (target.namespace != root).then_some(target.namespace);
    let all = std::iter::once(root)
        .chain(own)
        .flat_map(|namespace| world.authorization_policies(namespace))
        .map(|policy| &**policy)
        .filter(move |policy| binds(policy, target));
    let of_role = |policy: &Config<AuthorizationPolicy>| policy.meta.origin.as_ref().is_some_and(|o| o.is_rbac());
    let replaced = all.clone().any(crate::legacy::is_modern_allow);
    all.filter(move |policy| !(replaced && of_role(policy)))
}

fn binds(policy: &Config<AuthorizationPolicy>, target: Target<'_>) -> bool {
    binds_by(
        &policy.meta.namespace,
        policy.spec.selector.as_ref(),
        policy.spec.target_ref.as_ref(),
        &policy.spec.target_refs,
        target,
    )
}

/// Whether an object of this namespace with this selector or these targets is for the workload (S2.1–S2.10).
pub(crate) fn binds_by(
    namespace: &str,
    selector: Option<&WorkloadSelector>,
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
    target: Target<'_>,
) -> bool {
    let single = target_ref.filter(|_| target_refs.is_empty());
    let mut references = target_refs.iter().chain(single).peekable();
    if references.peek().is_none() {
        return mantlet_api::selector::selects(selector, target.labels);
    }
    let Some(gateway) = target.labels.get(GATEWAY_NAME_LABEL).filter(|_| target.gateway) else {
        return false;
    };
    namespace == target.namespace
        && references.any(|r| {
            r.group == "gateway.networking.k8s.io"
                && r.kind == "Gateway"
                && r.name == *gateway
                && (r.namespace.is_empty() || r.namespace == target.namespace)
        })
}

#[derive(Default)]
struct Collected {
    bound: bool,
    enforced: bool,
    rules: Vec<Rule>,
    shadow: Vec<Rule>,
}

struct Translated {
    action: Action,
    shadow: bool,
    rules: Vec<Rule>,
}

fn translate(
    world: &World,
    policy: &Config<AuthorizationPolicy>,
    form: Form,
    problems: &mut Vec<Problem>,
) -> Translated {
    let (namespace, name) = (&policy.meta.namespace, &policy.meta.name);
    let id = |index: usize| format!("ns[{namespace}]-policy[{name}]-rule[{index}]");
    if let Some(error) = &policy.broken {
        problems.push(Problem {
            rule: None,
            message: format!("the policy cannot be read ({error}); everything is denied on what it selects"),
        });
        return Translated {
            action: Action::Deny,
            shadow: false,
            rules: vec![Rule {
                id: id(0),
                expr: Expr::always(),
            }],
        };
    }
    let dry_run = policy
        .meta
        .annotations
        .get(DRY_RUN)
        .and_then(|text| match parse_bool(text) {
            Some(on) => Some(on),
            None => {
                problems.push(Problem {
                    rule: None,
                    message: format!("annotation {DRY_RUN}: {text:?} is no boolean; the policy is enforced"),
                });
                None
            }
        });
    let (action, shadow) = match policy.spec.action {
        ApiAction::Allow => (Action::Allow, dry_run == Some(true)),
        ApiAction::Deny => (Action::Deny, dry_run == Some(true)),
        ApiAction::Audit => (Action::Log, false),
        ApiAction::Custom => {
            if dry_run == Some(true) {
                problems.push(Problem {
                    rule: None,
                    message: format!(
                        "annotation {DRY_RUN} has no meaning for CUSTOM; requests that match its rules are denied"
                    ),
                });
            }
            (Action::Deny, dry_run == Some(true))
        }
    };
    let context = Context {
        values: Values {
            trust_domains: world.mesh().trust_domains(),
            namespace,
        },
        form,
        allow: action == Action::Allow,
    };
    let mut rules = Vec::new();
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        let Some(expr) = context.rule(index, rule, problems) else {
            continue;
        };
        let id = match policy.spec.action {
            // The provider's name stands in the id, by which Envoy finds out whom to ask (S2.93, S2.140).
            ApiAction::Custom => match custom::provider_of(policy) {
                "" => format!("{ID_PREFIX}-{}", id(index)),
                provider => format!("{ID_PREFIX}-{provider}-{}", id(index)),
            },
            _ => id(index),
        };
        rules.push(Rule { id, expr });
    }
    if rules.is_empty() && action == Action::Allow && policy.spec.rules.is_empty() {
        // Matches nothing, and so denies what no other policy allows (table in 2b).
        rules.push(Rule {
            id: id(0),
            expr: Expr::never(),
        });
    }
    Translated { action, shadow, rules }
}

/// Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

struct Context<'a> {
    values: Values<'a>,
    form: Form,
    allow: bool,
}

/// The rule cannot be expressed and goes (ALLOW only).
struct Dropped;

impl Context<'_> {
    /// One rule; `None` when it is dropped.
    fn rule(&self, index: usize, rule: &ApiRule, problems: &mut Vec<Problem>) -> Option<Expr> {
        self.try_rule(index, rule, problems).ok()
    }

    fn try_rule(&self, index: usize, rule: &ApiRule, problems: &mut Vec<Problem>) -> Result<Expr, Dropped> {
        let mut all = Vec::new();
        if !rule.from.is_empty() {
            let mut any = Vec::new();
            for from in &rule.from {
                let mut fields = Vec::new();
                if let Some(source) = &from.source {
                    self.source(index, source, &mut fields, problems)?;
                }
                any.push(Expr::And(fields));
            }
            all.push(Expr::Or(any));
        }
        if !rule.to.is_empty() {
            let mut any = Vec::new();
            for to in &rule.to {
                let mut fields = Vec::new();
                if let Some(operation) = &to.operation {
                    self.operation(index, operation, &mut fields, problems)?;
                }
                any.push(Expr::And(fields));
            }
            all.push(Expr::Or(any));
        }
        for condition in &rule.when {
            self.condition(index, condition, &mut all, problems)?;
        }
        Ok(Expr::And(all))
    }

    fn source(
        &self,
        index: usize,
        source: &Source,
        out: &mut Vec<Expr>,
        problems: &mut Vec<Problem>,
    ) -> Result<(), Dropped> {
        let v = &self.values;
        let mut field = |name: &str, yes: &[String], no: &[String], read: &dyn Fn(&str) -> Result<Expr, Bad>| {
            self.pair(index, name, yes, no, read, out, problems)
        };
        field("principals", &source.principals, &source.not_principals, &|s| {
            v.principal(s)
        })?;
        field(
            "requestPrincipals",
            &source.request_principals,
            &source.not_request_principals,
            &|s| v.request_principal(s),
        )?;
        field("namespaces", &source.namespaces, &source.not_namespaces, &|s| {
            v.peer_namespace(s)
        })?;
        field(
            "serviceAccounts",
            &source.service_accounts,
            &source.not_service_accounts,
            &|s| v.service_account(s),
        )?;
        field("trustDomains", &source.trust_domains, &source.not_trust_domains, &|s| {
            v.trust_domain(s)
        })?;
        field("ipBlocks", &source.ip_blocks, &source.not_ip_blocks, &|s| {
            v.cidr(Attribute::SourceIp, s)
        })?;
        field(
            "remoteIpBlocks",
            &source.remote_ip_blocks,
            &source.not_remote_ip_blocks,
            &|s| v.cidr(Attribute::RemoteIp, s),
        )
    }

    fn operation(
        &self,
        index: usize,
        operation: &Operation,
        out: &mut Vec<Expr>,
        problems: &mut Vec<Problem>,
    ) -> Result<(), Dropped> {
        let v = &self.values;
        let mut field = |name: &str, yes: &[String], no: &[String], read: &dyn Fn(&str) -> Result<Expr, Bad>| {
            self.pair(index, name, yes, no, read, out, problems)
        };
        field("hosts", &operation.hosts, &operation.not_hosts, &|s| v.host(s))?;
        field("methods", &operation.methods, &operation.not_methods, &|s| {
            Ok(v.text(Attribute::Method, s))
        })?;
        field("paths", &operation.paths, &operation.not_paths, &|s| v.path(s))?;
        field("ports", &operation.ports, &operation.not_ports, &|s| v.port(s))
    }

    fn condition(
        &self,
        index: usize,
        condition: &Condition,
        out: &mut Vec<Expr>,
        problems: &mut Vec<Problem>,
    ) -> Result<(), Dropped> {
        let name = format!("when[{}]", condition.key);
        match self.values.condition(&condition.key) {
            Ok(read) => self.pair(
                index,
                &name,
                &condition.values,
                &condition.not_values,
                &*read,
                out,
                problems,
            ),
            Err(Bad(reason)) => self.give_up(index, &name, &reason, problems),
        }
    }

    /// A field with its `not` twin: OR over values, NOT(OR) over the others.
    #[expect(clippy::too_many_arguments, reason = "one private helper of all fields")]
    fn pair(
        &self,
        index: usize,
        name: &str,
        yes: &[String],
        no: &[String],
        read: &dyn Fn(&str) -> Result<Expr, Bad>,
        out: &mut Vec<Expr>,
        problems: &mut Vec<Problem>,
    ) -> Result<(), Dropped> {
        let any = self.values_of(index, name, yes, read, problems)?;
        if !any.is_empty() {
            out.push(Expr::Or(any));
        }
        let none = self.values_of(index, name, no, read, problems)?;
        if !none.is_empty() {
            out.push(Expr::Or(none).not());
        }
        Ok(())
    }

    fn values_of(
        &self,
        index: usize,
        name: &str,
        values: &[String],
        read: &dyn Fn(&str) -> Result<Expr, Bad>,
        problems: &mut Vec<Problem>,
    ) -> Result<Vec<Expr>, Dropped> {
        let mut out = Vec::new();
        for value in values {
            match read(value).and_then(checked) {
                Ok(expr) if self.form == Form::Tcp && is_http(&expr) => {
                    // S2.80, S2.81: on TCP such a value drops the rule (ALLOW) or is left out (all others).
                    if self.allow {
                        return Err(Dropped);
                    }
                }
                Ok(expr) => out.push(expr),
                Err(Bad(reason)) => self.give_up(index, name, &format!("{value:?}: {reason}"), problems)?,
            }
        }
        Ok(out)
    }

    fn give_up(&self, index: usize, name: &str, reason: &str, problems: &mut Vec<Problem>) -> Result<(), Dropped> {
        let consequence = if self.allow {
            "the rule is dropped and allows nothing"
        } else {
            "the value is ignored, so that the rule matches more"
        };
        problems.push(Problem {
            rule: Some(index),
            message: format!("rule {index}, {name}: {reason}; {consequence}"),
        });
        if self.allow { Err(Dropped) } else { Ok(()) }
    }
}

/// What the engine could not evaluate is no better than what cannot be read.
fn checked(expr: Expr) -> Result<Expr, Bad> {
    fn walk(expr: &Expr) -> Result<(), String> {
        match expr {
            Expr::Atom(atom) => mantlet_model::authz::check(atom),
            Expr::Not(inner) => walk(inner),
            Expr::And(children) | Expr::Or(children) => children.iter().try_for_each(walk),
        }
    }
    match walk(&expr) {
        Ok(()) => Ok(expr),
        Err(reason) => Err(Bad(reason)),
    }
}

fn is_http(expr: &Expr) -> bool {
    match expr {
        Expr::Atom(atom) => atom.attribute.is_http(),
        Expr::Not(inner) => is_http(inner),
        Expr::And(children) | Expr::Or(children) => children.iter().any(is_http),
    }
}

#[cfg(test)]
mod tests;
