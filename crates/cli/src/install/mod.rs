//! Installing the mesh: `install`, `uninstall`, `manifest generate`, `version`, `kube-inject`.
//!
//! [`spec`] turns profile, files and `--set` into one resolved [`spec::Spec`]; [`objects`] turns that into Kubernetes objects, in the
//! order they have to be applied; [`apply`] brings them to a cluster and waits. `manifest generate` prints what `install` applies.
//! `main` calls the `run_*` functions; progress goes to the writer they are given, the answer comes back.

mod apply;
mod kube_inject;
mod objects;
mod profiles;
mod set;
mod spec;
mod uninstall;
mod version;

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use mantlet_api::yaml;

pub(crate) use kube_inject::KubeInjectArgs;
pub(crate) use uninstall::UninstallArgs;
pub(crate) use version::VersionArgs;

/// Field manager of everything the installer applies.
pub(crate) const FIELD_MANAGER: &str = "istio-operator";

/// What to install; shared by `install`, `manifest generate` and `uninstall`.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Source {
    /// Path to a file containing an IstioOperator custom resource; repeatable, later files win
    #[arg(short = 'f', long = "filename")]
    pub filename: Vec<String>,
    /// Override an IstioOperator value, e.g. `profile=demo`, `values.global.proxy.privileged=true`, `meshConfig.accessLogFile=/dev/stdout`
    #[arg(short = 's', long = "set")]
    pub set: Vec<String>,
    /// Target control plane revision for the command
    #[arg(short = 'r', long)]
    pub revision: Option<String>,
    /// Specify a path to a directory of charts and profiles; the built-in ones are used instead
    #[arg(short = 'd', long = "manifests", hide = true)]
    pub manifests: Option<String>,
    /// Proceed even with validation errors
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `install`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct InstallArgs {
    /// What to install.
    #[command(flatten)]
    pub source: Source,
    /// Skip the confirmation prompt
    #[arg(short = 'y', long = "skip-confirmation")]
    pub skip_confirmation: bool,
    /// Maximum time to wait for components to be ready
    #[arg(long, default_value = "300s")]
    pub readiness_timeout: mantlet_api::Duration,
    /// Wait until all components are ready
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub verify: bool,
    /// Print what would be done, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Kubernetes configuration file
    #[arg(short = 'c', long)]
    pub kubeconfig: Option<String>,
    /// Context of the Kubernetes configuration
    #[arg(long)]
    pub context: Option<String>,
}

/// Arguments of `manifest`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ManifestArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ManifestCommand,
}

/// Subcommands of `manifest`.
#[derive(Debug, Clone, clap::Subcommand)]
pub(crate) enum ManifestCommand {
    /// Generate an install manifest, fit for `kubectl apply -f -`
    Generate(GenerateArgs),
}

/// Arguments of `manifest generate`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct GenerateArgs {
    /// What to generate.
    #[command(flatten)]
    pub source: Source,
    /// Only objects of these components (Base, Pilot, IngressGateways, EgressGateways)
    #[arg(long)]
    pub component: Vec<String>,
}

/// What a command leaves: a text for stdout and an exit code.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// For stdout.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

/// `manifest generate`.
///
/// # Errors
/// Unknown profile, file or field; values that do not fit.
pub(crate) fn run_manifest(args: &ManifestArgs) -> Result<Outcome> {
    let ManifestCommand::Generate(args) = &args.command;
    let spec = spec::Spec::resolve(&args.source)?;
    for warning in &spec.warnings {
        eprintln!("! {warning}");
    }
    let groups = objects::all(&spec)?;
    let mut wanted = Vec::new();
    for name in &args.component {
        let known: Vec<&str> = groups.iter().map(|g| g.component.id()).collect();
        if !known.contains(&name.as_str()) {
            bail!(
                "component {name:?} is not part of this installation; it has {}",
                known.join(", ")
            );
        }
        wanted.push(name.as_str());
    }
    let objects = groups
        .iter()
        .filter(|g| wanted.is_empty() || wanted.contains(&g.component.id()))
        .flat_map(|group| &group.objects);
    Ok(Outcome {
        text: yaml::write_all(objects),
        code: 0,
    })
}

/// `install`.
///
/// # Errors
/// Bad settings, no cluster, an object the API server refuses, or components that do not get ready in time.
pub(crate) async fn run_install(
    args: &InstallArgs,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
) -> Result<Outcome> {
    let spec = spec::Spec::resolve(&args.source)?;
    for warning in &spec.warnings {
        writeln!(output, "! {warning}")?;
    }
    let groups = objects::all(&spec)?;
    let what = format!(
        "Istio {} \"{}\" profile (with components: {})",
        spec.version(),
        spec.profile,
        english_list(&groups.iter().map(|g| g.component.title()).collect::<Vec<_>>()),
    );
    if args.dry_run {
        let count: usize = groups.iter().map(|g| g.objects.len()).sum();
        return Ok(Outcome {
            text: format!("Dry run: would install the {what}, {count} objects\n"),
            code: 0,
        });
    }
    // Before the question, so that nobody answers it for nothing.
    let client = client(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    apply::check_server(&client).await?;
    if !args.skip_confirmation
        && !confirm(
            &format!("This will install the {what} into the cluster. Proceed? (y/N) "),
            input,
            output,
        )?
    {
        return Ok(Outcome {
            text: "Cancelled.\n".into(),
            code: 1,
        });
    }
    let applier = apply::Applier::new(client, args.readiness_timeout.0, args.verify);
    for group in &groups {
        applier.install(&spec, group, output).await?;
        writeln!(output, "✔ {} installed", group.component.title())?;
        output.flush()?;
    }
    applier.prune(&spec, &groups, output).await?;
    let mut text = String::from("✔ Installation complete\n");
    if spec.is_default {
        text.push_str("Made this installation the default for cluster-wide operations.\n");
    }
    Ok(Outcome { text, code: 0 })
}

/// `uninstall`.
///
/// # Errors
/// No cluster, nothing said about what to remove, or an object that cannot be deleted.
pub(crate) async fn run_uninstall(
    args: &UninstallArgs,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
) -> Result<Outcome> {
    uninstall::run(args, input, output).await
}

/// `version`.
///
/// # Errors
/// A cluster that cannot be asked (with `--remote`).
pub(crate) async fn run_version(args: &VersionArgs) -> Result<Outcome> {
    version::run(args).await
}

/// `kube-inject`.
///
/// # Errors
/// A file that cannot be read, a configuration that does not decode, or a pod that is refused.
pub(crate) async fn run_kube_inject(args: &KubeInjectArgs) -> Result<Outcome> {
    kube_inject::run(args).await
}

/// Runs a future on a runtime of its own; for callers that are not async.
///
/// # Errors
/// The future's own.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(future)
}

/// A client for the given or current context.
pub(crate) async fn client(kubeconfig: Option<&str>, context: Option<&str>) -> Result<kube::Client> {
    let config = if kubeconfig.is_none() && context.is_none() {
        kube::Config::infer()
            .await
            .context("reading the kubeconfig; start a cluster with `mantlet cluster up`")?
    } else {
        let options = kube::config::KubeConfigOptions {
            context: context.map(str::to_string),
            ..Default::default()
        };
        match kubeconfig {
            Some(path) => {
                let file = kube::config::Kubeconfig::read_from(path).with_context(|| format!("reading {path}"))?;
                kube::Config::from_custom_kubeconfig(file, &options)
                    .await
                    .with_context(|| format!("using {path}"))?
            }
            None => kube::Config::from_kubeconfig(&options)
                .await
                .context("reading the kubeconfig")?,
        }
    };
    kube::Client::try_from(config).context("building a client from the kubeconfig")
}

/// Asks a question; only `y` and `yes` are yes. The end of input is no.
fn confirm(question: &str, input: &mut dyn BufRead, output: &mut dyn Write) -> Result<bool> {
    write!(output, "{question}")?;
    output.flush()?;
    let mut answer = String::new();
    input.read_line(&mut answer).context("reading the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn english_list(items: &[&str]) -> String {
    match items {
        [] => "nothing".into(),
        [one] => (*one).to_string(),
        [one, two] => format!("{one} and {two}"),
        [head @ .., last] => format!("{}, and {last}", head.join(", ")),
    }
}

#[cfg(test)]
mod tests;
