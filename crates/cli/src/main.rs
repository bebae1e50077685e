//! The `mantlet` command line, also known as `istioctl`.
//!
//! Only the command tree, the dispatch of re-executed children (before any runtime or thread exists) and the printing are
//! here; each command lives in its own module and returns data.

#![expect(
    unreachable_pub,
    reason = "a program has no public interface: `pub` marks what a module offers to its siblings"
)]

mod analyze;
mod authz;
mod cluster;
mod files;
mod inspect;
mod install;
mod lab;
mod migrate;
mod mtls;
mod validate;
mod world;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

/// The cluster process lives for weeks with many threads, and each of the C library's arenas keeps what its thread has
/// freed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Zero-trust service mesh that speaks Istio's API.
#[derive(Debug, Parser)]
#[command(name = "mantlet", disable_version_flag = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run an embedded Kubernetes cluster on this machine
    Cluster(cluster::Args),
    /// Run walk-throughs as tests
    Lab(lab::Args),
    /// Apply an Istio manifest, installing or reconfiguring Istio on a cluster
    Install(Box<install::InstallArgs>),
    /// Uninstall Istio from a cluster
    Uninstall(Box<install::UninstallArgs>),
    /// Commands related to Istio manifests
    Manifest(Box<install::ManifestArgs>),
    /// Inject sidecar into Kubernetes pod resources
    KubeInject(Box<install::KubeInjectArgs>),
    /// Validate Istio policy and rules files, with file, line and column of each finding
    #[command(visible_alias = "v")]
    Validate(validate::Args),
    /// Print version information
    Version(install::VersionArgs),
    /// Retrieve the synchronization status of each proxy in the mesh
    #[command(visible_alias = "ps")]
    ProxyStatus(inspect::proxy_status::Args),
    /// Retrieve information about proxy configuration
    #[command(visible_alias = "pc")]
    ProxyConfig(inspect::proxy_config::Args),
    /// Describe what the mesh configuration means for a pod or service
    Describe(inspect::describe::Args),
    /// Analyze Istio configuration and print validation messages
    Analyze(Box<analyze::Args>),
    /// Ask what authorization policies mean: explain, check, why, test
    #[command(visible_alias = "az")]
    Authz(authz::Args),
    /// Interact with Istio authentication policies
    Authn(inspect::tls_check::Args),
    /// Write objects of Istio's former security kinds as modern ones
    Migrate(migrate::Args),
    /// Is the mesh ready for STRICT mutual TLS: who sends plaintext, what would break
    Mtls(mtls::Args),
    /// Commands that Istio calls experimental
    #[command(visible_alias = "x", visible_alias = "exp")]
    Experimental {
        #[command(subcommand)]
        command: Experimental,
    },
}

#[derive(Debug, clap::Subcommand)]
enum Experimental {
    /// Describe what the mesh configuration means for a pod or service
    #[command(visible_alias = "des")]
    Describe(inspect::describe::Args),
    /// Inspect and interact with authorization policies
    Authz(authz::Args),
}

/// What a command leaves to be printed.
struct Printed {
    text: String,
    code: u8,
}

impl From<String> for Printed {
    fn from(text: String) -> Printed {
        Printed { text, code: 0 }
    }
}

impl From<authz::Outcome> for Printed {
    fn from(outcome: authz::Outcome) -> Printed {
        Printed {
            text: outcome.text,
            code: outcome.code,
        }
    }
}

impl From<migrate::Outcome> for Printed {
    fn from(outcome: migrate::Outcome) -> Printed {
        Printed {
            text: outcome.text,
            code: outcome.code,
        }
    }
}

impl From<install::Outcome> for Printed {
    fn from(outcome: install::Outcome) -> Printed {
        Printed {
            text: outcome.text,
            code: outcome.code,
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    // Children of ours: single-threaded, so before anything else.
    if let Some((word, rest)) = args.get(1..).and_then(<[String]>::split_first) {
        match word.as_str() {
            cluster::broker::SUBCOMMAND => return cluster::broker::main(rest),
            cluster::process::SUBCOMMAND => return cluster::process::main(rest),
            lab::terminal::SUBCOMMAND => return lab::terminal::child_main(),
            mantlet_node::sandbox::SUBCOMMAND => return mantlet_node::sandbox::sandbox_main(rest),
            mantlet_node::shim::SUBCOMMAND => return mantlet_node::shim::shim_main(rest),
            _ => {}
        }
    }
    match run(Cli::parse()) {
        Ok(printed) => {
            // A closed pipe (`| head`) is not an error of ours.
            let _ = std::io::stdout().lock().write_all(printed.text.as_bytes());
            ExitCode::from(printed.code)
        }
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Printed> {
    match cli.command {
        Command::Cluster(args) => {
            let answer = cluster::run(args)?;
            Ok(Printed {
                text: answer.text,
                code: answer.code,
            })
        }
        Command::Lab(args) => {
            let answer = lab::run(args)?;
            Ok(Printed {
                text: answer.text,
                code: answer.code,
            })
        }
        Command::Install(args) => install::block_on(async {
            install::run_install(&args, &mut std::io::stdin().lock(), &mut std::io::stdout()).await
        })
        .map(Printed::from),
        Command::Uninstall(args) => install::block_on(async {
            install::run_uninstall(&args, &mut std::io::stdin().lock(), &mut std::io::stdout()).await
        })
        .map(Printed::from),
        Command::Manifest(args) => install::run_manifest(&args).map(Printed::from),
        Command::KubeInject(args) => install::block_on(install::run_kube_inject(&args)).map(Printed::from),
        Command::Validate(args) => {
            let answer = validate::run(&args)?;
            // What is valid before what is not, also where both end up in one terminal.
            let _ = std::io::stdout().lock().write_all(answer.text.as_bytes());
            let _ = std::io::stderr().lock().write_all(answer.error.as_bytes());
            Ok(Printed {
                text: String::new(),
                code: answer.code,
            })
        }
        Command::Authn(args) => {
            inspect::ask(async |mesh| inspect::tls_check::run(mesh, &args).await).map(Printed::from)
        }
        Command::Migrate(args) => install::block_on(migrate::run(&args)).map(Printed::from),
        Command::Version(args) => install::block_on(install::run_version(&args)).map(Printed::from),
        Command::ProxyStatus(args) => {
            inspect::ask(async |mesh| inspect::proxy_status::run(&mesh.client, &args).await).map(Printed::from)
        }
        Command::ProxyConfig(args) => {
            inspect::ask(async |mesh| inspect::proxy_config::run(&mesh.client, &mesh.namespace, &args).await)
                .map(Printed::from)
        }
        Command::Authz(args)
        | Command::Experimental {
            command: Experimental::Authz(args),
        } => authz::run(&args).map(Printed::from),
        Command::Mtls(args) => {
            let answer = mtls::run(&args)?;
            Ok(Printed {
                text: answer.text,
                code: answer.code,
            })
        }
        Command::Analyze(args) => {
            let answer = analyze::run(&args)?;
            eprint!("{}", answer.errors);
            Ok(Printed {
                text: answer.text,
                code: answer.code,
            })
        }
        Command::Describe(args)
        | Command::Experimental {
            command: Experimental::Describe(args),
        } => inspect::ask(async |mesh| inspect::describe::run(&mesh.client, &mesh.namespace, &args).await)
            .map(Printed::from),
    }
}
