//! `mantlet mtls`: is the mesh ready for STRICT? Who still sends plaintext to whom, and what would break.
//!
//! [`collect`] asks the cluster and its proxies, [`readiness`] draws the conclusions from that alone, here they are printed. What was not
//! seen in traffic is not promised: telemetry tells about the life of the present pods only.

mod collect;
mod readiness;

use std::path::PathBuf;

use anyhow::{Result, bail};
use mantlet_translate::world::Kind;

use crate::files;
use crate::inspect::{self, Output, Table};
use readiness::{Facts, Report};

/// Exit code when a change would break something that was seen or is configured.
const WOULD_BREAK: u8 = 2;

/// Arguments of `mtls`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Who still sends plaintext to whom, the mode of every port, and what STRICT would break
    Report(Common),
    /// What would break if policies were applied; exit code 2 if anything that is seen or configured would
    DryRun {
        /// Files with PeerAuthentications (and DestinationRules); `-` is standard input
        #[arg(short, long = "filename", required = true)]
        filename: Vec<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// Only workloads of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Format
    #[arg(short, long, value_enum, default_value = "short")]
    output: Output,
    /// Namespace of the control plane
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system")]
    istio_namespace: String,
}

/// What is printed, and the exit code.
#[derive(Debug)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

/// Runs the command.
///
/// # Errors
/// No cluster, files that cannot be read or hold nothing to try.
pub fn run(args: &Args) -> Result<Answer> {
    match &args.command {
        Command::Report(common) => inspect::ask(async |mesh| {
            let facts = collect::facts(&mesh.client, &common.istio_namespace).await?;
            let report = readiness::report(&facts, common.namespace.as_deref());
            Ok(Answer {
                text: print_report(&report, &facts, common.output)?,
                code: 0,
            })
        }),
        Command::DryRun { filename, common } => {
            let documents = files::load(filename)?;
            inspect::ask(async |mesh| {
                let mut facts = collect::facts(&mesh.client, &common.istio_namespace).await?;
                let before = facts.world.clone();
                let mut tried = 0;
                for document in &documents {
                    let kind = document.value["kind"].as_str().unwrap_or_default();
                    let kind = match Kind::by_name(kind) {
                        Some(kind @ (Kind::PeerAuthentication | Kind::DestinationRule)) => kind,
                        _ => continue,
                    };
                    let mut object = document.value.clone();
                    if object
                        .pointer("/metadata/namespace")
                        .and_then(serde_json::Value::as_str)
                        .is_none()
                    {
                        let namespace = common.namespace.as_deref().unwrap_or(&mesh.namespace);
                        object["metadata"]["namespace"] = namespace.into();
                    }
                    facts.world.set_config(kind, &object);
                    tried += 1;
                }
                if tried == 0 {
                    bail!("the files hold no PeerAuthentication and no DestinationRule, so there is nothing to try");
                }
                let changes = readiness::changes(&before, &facts, common.namespace.as_deref());
                Ok(Answer {
                    text: print_changes(&changes, common.output)?,
                    code: if changes.breaks.is_empty() { 0 } else { WOULD_BREAK },
                })
            })
        }
    }
}

fn print_report(report: &Report, facts: &Facts, output: Output) -> Result<String> {
    if output != Output::Short {
        return inspect::render(report, output);
    }
    let mut table = Table::new(&[
        "WORKLOAD",
        "PORT",
        "SERVICE",
        "MODE",
        "PLAINTEXT",
        "MTLS",
        "READY FOR STRICT",
    ]);
    for port in &report.ports {
        let ready = if port.reasons.is_empty() { "yes" } else { "no" };
        table.row([
            port.workload.clone(),
            port.port.to_string(),
            port.service.clone().unwrap_or_else(|| "-".into()),
            port.mode.to_string(),
            port.plaintext.to_string(),
            port.mutual.to_string(),
            ready.to_string(),
        ]);
    }
    let mut out = table.to_string();
    section(
        &mut out,
        "Plaintext that was seen",
        report.plaintext.iter().map(ToString::to_string),
    );
    section(
        &mut out,
        "DestinationRules that break under STRICT",
        report.rules.iter().map(ToString::to_string),
    );
    section(
        &mut out,
        "Probes that break under STRICT",
        report.probes.iter().map(ToString::to_string),
    );
    section(
        &mut out,
        "Pods without sidecar, whose calls STRICT refuses",
        report.outside.iter().cloned(),
    );
    section(
        &mut out,
        "Proxies that did not answer, so nothing is known of them",
        facts.silent.iter().cloned(),
    );
    Ok(out)
}

fn print_changes(changes: &readiness::Changes, output: Output) -> Result<String> {
    if output != Output::Short {
        return inspect::render(changes, output);
    }
    let mut out = String::new();
    if changes.ports.is_empty() {
        out.push_str("No port changes its mode.\n");
    } else {
        let mut table = Table::new(&["WORKLOAD", "PORT", "NOW", "THEN"]);
        for port in &changes.ports {
            table.row([
                port.workload.clone(),
                port.port.to_string(),
                port.before.to_string(),
                port.after.to_string(),
            ]);
        }
        out.push_str(&table.to_string());
    }
    section(&mut out, "Would break", changes.breaks.iter().cloned());
    section(&mut out, "Could break, though not seen", changes.risks.iter().cloned());
    if changes.breaks.is_empty() {
        out.push_str("\nNothing that was seen or is configured would break.\n");
    }
    Ok(out)
}

fn section(out: &mut String, title: &str, lines: impl Iterator<Item = String>) {
    let lines: Vec<String> = lines.collect();
    if lines.is_empty() {
        return;
    }
    out.push_str(&format!("\n{title}:\n"));
    for line in lines {
        out.push_str(&format!("  {line}\n"));
    }
}
