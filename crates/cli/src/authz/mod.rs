//! `mantlet authz`: what the policies in force, or those of files, mean for a call, and why a call was denied.
//!
//! [`question`] asks the translated configuration with the proxy's own engine; the commands only parse and print. Whoever can read
//! the mesh's objects can ask; nothing here changes the cluster.

mod check;
mod classes;
mod diff;
mod explain;
mod question;
mod target;
mod test;
mod who_can;
mod why;

use std::path::PathBuf;

use anyhow::Result;

use crate::world::{self, Loaded};

/// Arguments of `authz`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What to ask.
    #[command(subcommand)]
    pub command: Command,
}

/// Questions.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// List the AuthorizationPolicies that a pod's proxy runs
    Check(check::Args),
    /// Say whether a call is allowed, by which policy and rule, or what keeps it from being
    Explain(Box<explain::Args>),
    /// Show recent denials of a workload and what they missed by
    Why(why::Args),
    /// Say who may call a service
    WhoCan(who_can::WhoArgs),
    /// Say what a client may call
    WhatCan(who_can::WhatArgs),
    /// Show the smallest requests that a change of files newly allows or denies
    Diff(diff::Args),
    /// Run table tests of policies
    Test(test::Args),
    /// Write RBAC objects of Istio 1.3 and before as AuthorizationPolicies (see also `mantlet migrate`)
    Convert(crate::migrate::ConvertArgs),
}

/// What a command leaves: a text for stdout and an exit code.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// For stdout.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

impl From<String> for Outcome {
    fn from(text: String) -> Outcome {
        Outcome { text, code: 0 }
    }
}

/// Runs a question.
///
/// # Errors
/// Nothing to ask, objects that are not there, or a file or cluster that cannot be read.
pub fn run(args: &Args) -> Result<Outcome> {
    match &args.command {
        Command::Check(args) => check::run(args).map(Outcome::from),
        Command::Explain(args) => explain::run(args),
        Command::Why(args) => crate::inspect::ask(async |mesh| why::run(mesh, args).await).map(Outcome::from),
        Command::WhoCan(args) => who_can::who(args),
        Command::WhatCan(args) => who_can::what(args),
        Command::Diff(args) => diff::run(args),
        Command::Test(args) => test::run(args),
        Command::Convert(args) => {
            let outcome = crate::install::block_on(crate::migrate::convert(args))?;
            Ok(Outcome {
                text: outcome.text,
                code: outcome.code,
            })
        }
    }
}

/// Where configuration is taken from.
#[derive(Clone, Debug, clap::Args)]
pub struct Source {
    /// Files and directories to ask instead of the cluster; `-` is stdin, repeatable
    #[arg(short = 'f', long = "filename", value_name = "PATH")]
    pub filename: Vec<PathBuf>,
    /// Namespace of names without one, and of objects in files without one
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Namespace of the control plane
    #[arg(short = 'i', long = "istioNamespace", default_value = world::ISTIO_NAMESPACE)]
    pub istio_namespace: String,
}

impl Source {
    /// Reads the world, and the namespace that names without one belong to. Problems of files go to stderr.
    fn load(&self) -> Result<(Loaded, String)> {
        if !self.filename.is_empty() {
            let namespace = self
                .namespace
                .clone()
                .unwrap_or_else(|| world::DEFAULT_NAMESPACE.into());
            let loaded = world::from_files(&self.filename, &namespace)?;
            for problem in &loaded.problems {
                eprintln!("warning: {problem}; the object is left out");
            }
            return Ok((loaded, namespace));
        }
        let mut found = None;
        crate::inspect::ask(async |mesh| {
            let world = world::from_client(&mesh.client, &self.istio_namespace).await?;
            found = Some((Loaded::from(world), mesh.namespace.clone()));
            Ok(String::new())
        })?;
        let (loaded, namespace) = found.ok_or_else(|| anyhow::anyhow!("the cluster gave no answer"))?;
        Ok((loaded, self.namespace.clone().unwrap_or(namespace)))
    }
}
