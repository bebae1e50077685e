//! `istioctl proxy-status`: which proxies are connected and whether they accepted what was pushed.

use anyhow::{Context, Result};
use kube::{Client, ResourceExt};
use mantlet_model::query::{ProxyStatus, SyncState};

use super::{Output, Table, render, target};

/// Arguments of `proxy-status`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only this proxy (`pod[.namespace]`).
    pub proxy: Option<String>,
    /// Namespace of the control plane.
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system")]
    pub istio_namespace: String,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Asks every control plane and returns the printed table.
///
/// # Errors
/// No running control plane, or one that does not answer.
pub async fn run(client: &Client, args: &Args) -> Result<String> {
    let mut rows: Vec<ProxyStatus> = Vec::new();
    for pod in target::control_planes(client, &args.istio_namespace).await? {
        let answer = target::ask(
            client,
            &pod,
            "discovery",
            &["pilot-discovery", "request", "GET", "/debug/syncz"],
        )
        .await?;
        let part: Vec<ProxyStatus> = serde_json::from_slice(&answer)
            .with_context(|| format!("reading the answer of {} to /debug/syncz", pod.name_any()))?;
        rows.extend(part);
    }
    rows.sort_by(|a, b| a.proxy.cmp(&b.proxy));
    if let Some(wanted) = &args.proxy {
        rows.retain(|row| row.proxy == *wanted || row.proxy.split('.').next() == Some(wanted));
        anyhow::ensure!(
            !rows.is_empty(),
            "proxy \"{wanted}\" is not connected to the control plane"
        );
    }
    if args.output != Output::Short {
        return render(&rows, args.output);
    }
    Ok(table(&rows))
}

fn table(rows: &[ProxyStatus]) -> String {
    let mut table = Table::new(&[
        "NAME", "CLUSTER", "CDS", "LDS", "EDS", "RDS", "ECDS", "ISTIOD", "VERSION",
    ]);
    let mut errors = String::new();
    for row in rows {
        let state = |s: SyncState| match s {
            SyncState::NotSent => "NOT SENT",
            SyncState::Synced => "SYNCED",
            SyncState::Stale => "STALE",
            SyncState::Error => "ERROR",
        };
        table.row([
            row.proxy.as_str(),
            &row.cluster,
            state(row.cds),
            state(row.lds),
            state(row.eds),
            state(row.rds),
            state(row.ecds),
            &row.istiod,
            &row.version,
        ]);
        for error in &row.errors {
            errors.push_str(&format!("{}: {error}\n", row.proxy));
        }
    }
    format!("{table}{errors}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_show_states_and_errors() {
        let row = ProxyStatus {
            proxy: "sleep-1.default".into(),
            cluster: "Kubernetes".into(),
            cds: SyncState::Synced,
            lds: SyncState::Error,
            eds: SyncState::Stale,
            rds: SyncState::Synced,
            ecds: SyncState::NotSent,
            istiod: "istiod-1".into(),
            version: "0.1.0".into(),
            errors: vec!["LDS: unknown filter x".into()],
        };
        let text = table(&[row]);
        assert!(text.starts_with(
            "NAME              CLUSTER      CDS      LDS     EDS     RDS      ECDS       ISTIOD     VERSION\n"
        ));
        assert!(text.ends_with("sleep-1.default: LDS: unknown filter x\n"), "{text}");
    }
}
