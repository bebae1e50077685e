//! `mantlet authz why`: the denials that a workload's proxies remember, with the rule, or what the nearest one missed by.

use std::fmt::Write;

use anyhow::{Context, Result};
use kube::ResourceExt;
use mantlet_model::authz::words::RuleId;
use mantlet_model::query::Denial;

use crate::inspect::{Mesh, Output, render, target};

/// Arguments of `authz why`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # What did the Deployment's pods deny lately?
  mantlet authz why deploy/customers

  # One pod, the last five, as JSON
  mantlet authz why customers-v1-6b7c9-x2x.default --limit 5 -o json")]
pub struct Args {
    /// `pod[.namespace]`, `deploy/NAME`, `sts/NAME` or `svc/NAME`
    pub workload: String,
    /// Namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Only the newest
    #[arg(long, default_value_t = 20)]
    pub limit: usize,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// A denial and the pod that decided it.
#[derive(Clone, Debug, serde::Serialize)]
struct Entry {
    pod: String,
    #[serde(flatten)]
    denial: Denial,
}

/// Asks the proxies.
///
/// # Errors
/// No such workload, or one without a proxy.
pub async fn run(mesh: &Mesh, args: &Args) -> Result<String> {
    let namespace = args.namespace.as_deref().unwrap_or(&mesh.namespace);
    let mut all = Vec::new();
    for pod in target::pods(&mesh.client, namespace, &args.workload).await? {
        let answer = target::ask_proxy(&mesh.client, &pod, "/mantlet/denials").await?;
        let denials: Vec<Denial> =
            serde_json::from_slice(&answer).with_context(|| format!("reading the denials of {}", pod.name_any()))?;
        all.extend(denials.into_iter().map(|denial| Entry {
            pod: pod.name_any(),
            denial,
        }));
    }
    all.sort_by(|a, b| a.denial.time.cmp(&b.denial.time));
    all.drain(..all.len().saturating_sub(args.limit));
    if args.output != Output::Short {
        return render(&all, args.output);
    }
    if all.is_empty() {
        return Ok(format!(
            "No denials are remembered by the proxies of {}.\n",
            args.workload
        ));
    }
    let mut out = String::new();
    for entry in &all {
        print(entry, &mut out);
    }
    Ok(out)
}

fn print(entry: &Entry, out: &mut String) {
    let denial = &entry.denial;
    let what = if denial.method.is_empty() {
        "connection".to_string()
    } else {
        format!("{} {}{}", denial.method, denial.host, denial.path)
    };
    let peer = match &denial.source_principal {
        Some(principal) => principal.strip_prefix("spiffe://").unwrap_or(principal),
        None => "no identity (plaintext)",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{}  {what}", denial.time);
    let _ = writeln!(out, "  {:<12}{peer}, {}", "client", denial.source);
    let _ = writeln!(out, "  {:<12}port {} of {}", "server", denial.port, entry.pod);
    let rule = match RuleId::find(&denial.details) {
        Some(id) if denial.details.contains(mantlet_model::ext_authz::ID_PREFIX) => format!("CUSTOM {id}"),
        Some(id) => format!("DENY {id}"),
        None if denial.details.contains("[none]") => "no rule of the ALLOW policies matches".into(),
        None => match denial.details.strip_prefix("jwt_authn_access_denied{") {
            Some(rest) => format!(
                "RequestAuthentication: {}",
                rest.trim_end_matches('}').replace('_', " ")
            ),
            None => denial.details.clone(),
        },
    };
    let _ = writeln!(out, "  {:<12}{rule}", "policy");
    if let Some(near) = &denial.nearest {
        let id = RuleId::find(&near.rule).map_or_else(|| near.rule.clone(), |id| id.to_string());
        let _ = writeln!(out, "  {:<12}{id}", "nearest");
        for failed in &near.failed {
            let _ = writeln!(out, "  {:<12}- {failed}", "");
        }
    }
}

#[cfg(test)]
mod tests {
    use mantlet_model::query::NearestRule;

    use super::*;

    #[test]
    fn a_denial_names_rule_and_miss() {
        let mut out = String::new();
        let denial = Denial {
            time: "2026-01-02T03:04:05.678Z".into(),
            source_principal: Some("spiffe://cluster.local/ns/a/sa/b".into()),
            source: "10.0.0.1".into(),
            port: 8080,
            method: "POST".into(),
            path: "/x".into(),
            host: "web".into(),
            details: "rbac_access_denied_matched_policy[none]".into(),
            nearest: Some(NearestRule {
                rule: "ns[a]-policy[p]-rule[2]".into(),
                failed: vec!["the method is \"POST\"; methods wants \"GET\"".into()],
            }),
        };
        print(
            &Entry {
                pod: "web-1".into(),
                denial,
            },
            &mut out,
        );
        assert_eq!(
            out,
            "2026-01-02T03:04:05.678Z  POST web/x\n  client      cluster.local/ns/a/sa/b, 10.0.0.1\n  server      port 8080 of web-1\n  \
             policy      no rule of the ALLOW policies matches\n  nearest     a/p, rule 2\n              - the method is \"POST\"; methods wants \"GET\"\n"
        );
    }
}
