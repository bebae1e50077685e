//! `mantlet lab`: runs walk-throughs as tests.
//!
//! A lab is a directory with a `README.md` whose fenced commands are typed, byte for byte, into persistent terminals, and
//! whose `expect` blocks say what must come out (`labs/README.md` describes the format). [`parse`] reads it, [`mod@run`] does it,
//! [`report`] prints the table; [`mutant`] breaks a lab on purpose to see that it fails where it must. The runner uses the
//! cluster of the current kubeconfig, as the reader of the walk-through would.

mod capture;
mod expect;
pub mod mutant;
pub mod parse;
pub mod report;
pub mod run;
pub mod terminal;
mod wait;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// `mantlet lab …`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Run a lab against the current cluster
    Run {
        /// The lab's directory
        dir: PathBuf,
        /// Run a broken variant, which must fail at the step it names; `all` runs every one
        #[arg(long)]
        mutant: Option<String>,
        /// How to print the result
        #[arg(long, value_enum, default_value_t)]
        report: report::Format,
        /// Leave what the lab has made
        #[arg(long)]
        keep: bool,
    },
    /// List the labs
    List {
        /// Where the labs are
        #[arg(default_value = "labs")]
        dir: PathBuf,
    },
}

/// What a command has to say.
#[derive(Debug)]
pub struct Answer {
    /// Text for standard output.
    pub text: String,
    /// Exit code.
    pub code: u8,
}

/// Runs one subcommand.
///
/// # Errors
/// The lab cannot be read or started; a step that fails is no error but part of the answer.
pub fn run(args: Args) -> Result<Answer> {
    match args.command {
        Command::Run {
            dir,
            mutant,
            report,
            keep,
        } => {
            let lab = parse::Lab::load(&dir)?;
            let mutants = match mutant.as_deref() {
                None => vec![None],
                Some("all") => mutant::names(&dir)?.into_iter().map(Some).collect(),
                Some(name) => vec![Some(name.to_owned())],
            };
            let mut results = Vec::new();
            for name in mutants {
                let mutant = name.map(|name| mutant::Mutant::load(&dir, &name)).transpose()?;
                results.push(run::run(&lab, mutant.as_ref(), keep)?);
            }
            let code = u8::from(!results.iter().all(|result| result.passed));
            Ok(Answer {
                text: report::print(&results, report)?,
                code,
            })
        }
        Command::List { dir } => list(&dir),
    }
}

fn list(dir: &Path) -> Result<Answer> {
    let mut text = String::new();
    let entries = std::fs::read_dir(dir).with_context(|| format!("labs in {}", dir.display()))?;
    let mut dirs: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("README.md").is_file())
        .collect();
    dirs.sort();
    if dirs.is_empty() {
        bail!("there is no lab in {}", dir.display());
    }
    for dir in dirs {
        let lab = parse::Lab::load(&dir)?;
        let mutants = mutant::names(&dir)?;
        text.push_str(&format!(
            "{}  {} ({} steps, {} mutants)\n",
            dir.display(),
            lab.title,
            lab.steps.len(),
            mutants.len()
        ));
    }
    Ok(Answer { text, code: 0 })
}
