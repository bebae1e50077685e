//! `istioctl x authz check POD`: the policies in the configuration that the pod's proxy runs.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use mantlet_model::authz::words::RuleId;
use mantlet_model::authz::{Action, AuthzFilter, Rule};
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::listener::Filters;
use mantlet_model::names::{Direction, VIRTUAL_INBOUND};
use mantlet_model::query::ConfigDump;

use crate::inspect::{Mesh, Table, target};

/// Arguments of `authz check`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # Policies of one pod
  istioctl x authz check httpbin-88ddbcfdd-nt5jb

  # Of a Deployment's pod in another namespace
  mantlet authz check deploy/httpbin -n foo

  # From a configuration that was saved with `pilot-agent request GET config_dump`
  mantlet authz check -f config_dump.json")]
pub struct Args {
    /// `pod[.namespace]` or `deploy/NAME`
    #[arg(required_unless_present = "file")]
    pub pod: Option<String>,
    /// A saved configuration instead of a pod's
    #[arg(short, long)]
    pub file: Option<std::path::PathBuf>,
    /// Namespace
    #[arg(short, long)]
    pub namespace: Option<String>,
}

/// Asks the proxy, or reads the file.
///
/// # Errors
/// No such pod or file, or a pod without a proxy.
pub fn run(args: &Args) -> Result<String> {
    match &args.file {
        Some(file) => {
            let dump = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            show(&dump)
        }
        None => crate::inspect::ask(async |mesh| ask(mesh, args).await),
    }
}

async fn ask(mesh: &Mesh, args: &Args) -> Result<String> {
    let namespace = args.namespace.as_deref().unwrap_or(&mesh.namespace);
    let pod = target::pod(&mesh.client, namespace, args.pod.as_deref().unwrap_or_default()).await?;
    show(&target::ask_proxy(&mesh.client, &pod, "/config_dump").await?)
}

fn show(dump: &[u8]) -> Result<String> {
    let dump: ConfigDump = serde_json::from_slice(dump).context("reading the proxy's configuration")?;
    Ok(table(&dump).to_string())
}

/// Rows in Istio's order of actions; policies by name.
fn table(dump: &ConfigDump) -> Table {
    // Chains carry the same rules; on TCP chains some are missing, so all are put together.
    let mut rules: BTreeMap<(u8, &'static str, String), BTreeSet<String>> = BTreeMap::new();
    let mut note = |order: u8, action: &'static str, rule: &Rule| {
        let policy = match RuleId::find(&rule.id) {
            Some(id) => format!("{}.{}", id.policy, id.namespace),
            None => rule.id.clone(),
        };
        rules
            .entry((order, action, policy))
            .or_default()
            .insert(rule.id.clone());
    };
    let mut chain = |custom: &[CustomStage], filters: &[AuthzFilter]| {
        for rule in custom.iter().flat_map(|s| &s.rules) {
            note(0, "CUSTOM", rule);
        }
        for filter in filters {
            let (order, action, shadow) = match filter.action {
                Action::Deny => (1, "DENY", "DENY (dry run)"),
                Action::Allow => (2, "ALLOW", "ALLOW (dry run)"),
                Action::Log => (3, "LOG", "LOG (dry run)"),
            };
            for rule in &filter.rules {
                note(order, action, rule);
            }
            for rule in &filter.shadow {
                note(order, shadow, rule);
            }
        }
    };
    let inbound = dump
        .snapshot
        .listeners
        .values()
        .filter(|l| l.name == VIRTUAL_INBOUND || (l.direction == Direction::Outbound && is_gateway(dump)));
    for listener in inbound {
        for found in listener.all_chains() {
            match &found.filters {
                Filters::Http(http) => chain(&http.custom, &http.authz),
                Filters::Tcp(tcp) => chain(&tcp.custom, &tcp.authz),
            }
        }
    }
    let mut table = Table::new(&["ACTION", "AuthorizationPolicy", "RULES"]);
    for ((_, action, policy), ids) in &rules {
        table.row([action.to_string(), policy.clone(), ids.len().to_string()]);
    }
    table
}

fn is_gateway(dump: &ConfigDump) -> bool {
    dump.node.starts_with("router~")
}

#[cfg(test)]
mod tests {
    use mantlet_translate::world::World;
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_istios() {
        let policy = |name: &str, spec: serde_json::Value| {
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
        };
        let (world, problems) = World::of_objects(
            &[
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop", "labels": {"a": "b"}},
                    "spec": {"containers": []}}),
                policy(
                    "allow",
                    json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}, {"to": [{"operation": {"ports": ["80"]}}]}]}),
                ),
                policy(
                    "deny",
                    json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}),
                ),
            ],
            "shop",
        );
        assert_eq!(problems, []);
        let node =
            mantlet_translate::node::ProxyNode::parse("sidecar~10.0.0.1~web.shop~shop.svc.cluster.local", &json!({}))
                .expect("a node");
        let dump = ConfigDump {
            node: node.id.clone(),
            snapshot: mantlet_translate::translate(&world, &node),
            ..ConfigDump::default()
        };
        assert_eq!(
            table(&dump).to_string(),
            "ACTION   AuthorizationPolicy   RULES\nDENY     deny.shop             1\nALLOW    allow.shop            2\n"
        );
    }
}
