//! Does a lab's steps, one after the other, in terminals that stay open.
//!
//! A step is typed once. Where the cluster needs time, the walk-through says what to wait for; what a step prints after the
//! fact (a `tcpdump` that is still running) may be awaited, a command is never repeated.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use kube::Client;
use regex::Regex;

use super::capture::{self, Capture};
use super::expect::{Expectation, Observed};
use super::mutant::Mutant;
use super::parse::{Action, Lab, Step, Typed};
use super::report::{RunResult, StepResult};
use super::terminal::{End, Terminal};
use super::wait;
use crate::cluster::ports;

/// Runs a lab, or a broken variant of it; teardown steps are always done unless `keep`.
///
/// # Errors
/// The lab cannot be started at all.
pub fn run(lab: &Lab, mutant: Option<&Mutant>, keep: bool) -> Result<RunResult> {
    let begin = Instant::now();
    let work = tempfile::tempdir().context("a working directory")?;
    copy_files(&lab.dir, work.path())?;
    let mut steps = lab.steps.clone();
    if let Some(mutant) = mutant {
        mutant.apply(work.path(), &mut steps)?;
    }
    let mut runner = Runner::new(work.path())?;
    let mut results: Vec<StepResult> = Vec::new();
    let mut failed = false;
    for step in &steps {
        if step.teardown {
            continue;
        }
        if failed {
            break;
        }
        let result = runner.step(step);
        failed = !result.passed;
        results.push(result);
    }
    let failing = results
        .iter()
        .find(|result| !result.passed)
        .map(|result| result.id.clone());
    if !keep {
        // A terminal in which something still runs cannot be typed into.
        runner.terminals.clear();
        for step in steps.iter().filter(|step| step.teardown) {
            let result = runner.step(step);
            // A variant that has failed early may have left less to clean up than the text says.
            if mutant.is_none() || !result.passed && !failed {
                results.push(result);
            }
        }
    }
    let (passed, problem) = match (mutant, failing) {
        (None, _) => (results.iter().all(|result| result.passed), None),
        (Some(mutant), Some(step)) if step == mutant.fails => (true, None),
        (Some(mutant), Some(step)) => (
            false,
            Some(format!("must fail at step {:?}, but failed at {step:?}", mutant.fails)),
        ),
        (Some(mutant), None) => (
            false,
            Some(format!(
                "must fail at step {:?}, but did not fail: {}",
                mutant.fails, mutant.description
            )),
        ),
    };
    Ok(RunResult {
        lab: lab.title.clone(),
        mutant: mutant.map(|mutant| mutant.name.clone()),
        passed,
        problem,
        steps: results,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Copies the lab's own files, so that nothing that commands write stays behind.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_file() {
            std::fs::copy(entry.path(), target)?;
        } else if kind.is_dir() && entry.file_name() != "mutants" {
            std::fs::create_dir(&target)?;
            copy_files(&entry.path(), &target)?;
        }
    }
    Ok(())
}

struct Runner {
    directory: std::path::PathBuf,
    path: OsString,
    /// Holds the links to this program under its names, and the terminals' `.curlrc`.
    programs: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    client: Client,
    context: String,
    terminals: HashMap<u8, Terminal>,
    /// Step → its terminal and what it has produced.
    done: HashMap<String, (u8, Observed)>,
}

impl Runner {
    fn new(directory: &Path) -> Result<Self> {
        let programs = tempfile::tempdir()?;
        let own = std::env::current_exe()?;
        for name in ["mantlet", "istioctl"] {
            std::os::unix::fs::symlink(&own, programs.path().join(name))?;
        }
        let old = std::env::var_os("PATH").unwrap_or_default();
        let path =
            std::env::join_paths(std::iter::once(programs.path().to_owned()).chain(std::env::split_paths(&old)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let config =
            kube::config::Kubeconfig::read().context("no kubeconfig; start a cluster with `mantlet cluster up`")?;
        let context = config.current_context.clone().unwrap_or_default();
        let client = runtime.block_on(async {
            let options = kube::config::KubeConfigOptions::default();
            anyhow::Ok(Client::try_from(
                kube::Config::from_custom_kubeconfig(config, &options).await?,
            )?)
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            path,
            programs,
            runtime,
            client,
            context,
            terminals: HashMap::new(),
            done: HashMap::new(),
        })
    }

    fn terminal(&mut self, number: u8) -> Result<&mut Terminal> {
        match self.terminals.entry(number) {
            std::collections::hash_map::Entry::Occupied(known) => Ok(known.into_mut()),
            std::collections::hash_map::Entry::Vacant(slot) => {
                let environment: [(&str, &OsStr); 2] = [
                    ("PATH", self.path.as_os_str()),
                    ("CURL_HOME", self.programs.path().as_os_str()),
                ];
                Ok(slot.insert(Terminal::open(&self.directory, environment)?))
            }
        }
    }

    fn step(&mut self, step: &Step) -> StepResult {
        let begin = Instant::now();
        let command = describe(&step.action);
        eprintln!(
            "  {} {}: {}",
            if step.teardown { "…" } else { ">" },
            step.id,
            command.lines().next().unwrap_or_default()
        );
        let outcome = self.act(step);
        let (passed, observed) = match outcome {
            Ok(observed) => {
                let failed: Vec<_> = step
                    .expectations
                    .iter()
                    .filter(|expectation| !expectation.holds(&observed))
                    .collect();
                (failed.is_empty(), summary(&observed, &failed))
            }
            Err(error) => (false, format!("{error:#}")),
        };
        let seconds = begin.elapsed().as_secs_f64();
        if !passed {
            eprintln!("    FAILED after {seconds:.1} s: {observed}");
        }
        StepResult {
            id: step.id.clone(),
            section: step.section.clone(),
            command,
            expected: expected(step),
            observed,
            passed,
            seconds,
        }
    }

    fn act(&mut self, step: &Step) -> Result<Observed> {
        match &step.action {
            Action::Type(typed) => self.type_command(step, typed),
            Action::Wait(lines) => {
                for line in lines {
                    let waited = async { tokio::time::timeout(step.limit, wait::wait(&self.client, line)).await };
                    let waited = self.runtime.block_on(waited);
                    waited.with_context(|| format!("{line}: not within {} s", step.limit.as_secs()))??;
                }
                Ok(Observed {
                    output: "observed".to_owned(),
                    ..Observed::default()
                })
            }
            Action::Look { step: earlier } => {
                let (terminal, before) = self
                    .done
                    .get(earlier)
                    .with_context(|| format!("there is no step {earlier:?} before this"))?;
                let (terminal, mut observed) = (*terminal, before.clone());
                if observed.exit.is_none() {
                    // It still runs: what is expected may be on its way.
                    let deadline = Instant::now() + step.limit;
                    let terminal = self.terminal(terminal)?;
                    loop {
                        let seen = terminal.len();
                        observed.output = terminal.output();
                        let missing = step
                            .expectations
                            .iter()
                            .any(|one| one.may_come() && !one.holds(&observed));
                        if !missing || Instant::now() >= deadline {
                            break;
                        }
                        terminal.wait_for_more(seen, deadline);
                    }
                }
                Ok(observed)
            }
            Action::Keys { terminal, keys, until } => {
                let until = until.as_deref().map(Regex::new).transpose()?;
                let limit = step.limit;
                let (output, end) = self.terminal(*terminal)?.keys(keys, until.as_ref(), limit)?;
                Ok(Observed {
                    output,
                    exit: exit_of(&end),
                    packets: None,
                })
            }
        }
    }

    /// Leads the terminals' curl to what stands in for ports below 1024 where these are for root only, so that the walk-through's
    /// commands are the same for everybody. A cluster of another kind has no such ports.
    fn lead_curl(&self) -> Result<()> {
        let ports = self.runtime.block_on(ports::list(&self.client)).unwrap_or_default();
        let path = self.programs.path().join(".curlrc");
        std::fs::write(&path, ports::curlrc(&ports)).with_context(|| path.display().to_string())
    }

    fn type_command(&mut self, step: &Step, typed: &Typed) -> Result<Observed> {
        let until = typed.until.as_deref().map(Regex::new).transpose()?;
        let capture = match &typed.capture {
            Some(selector) => {
                let addresses = self.runtime.block_on(capture::addresses(&self.client, selector))?;
                Some(Capture::start(&addresses, capture::sandboxed_process(&self.context)?)?)
            }
            None => None,
        };
        self.lead_curl()?;
        let reply = typed.stdin.as_deref().map(|answer| (typed.at.as_str(), answer));
        let result = self
            .terminal(typed.terminal)?
            .command(&typed.text, until.as_ref(), reply, step.limit);
        let packets = capture.map(Capture::stop).transpose()?;
        let (output, end) = result?;
        let observed = Observed {
            output,
            exit: exit_of(&end),
            packets,
        };
        self.done.insert(step.id.clone(), (typed.terminal, observed.clone()));
        // A command without an expected exit code must succeed; one that goes on has none yet.
        let says_exit = step
            .expectations
            .iter()
            .any(|expectation| matches!(expectation, Expectation::Exit(_)));
        if !says_exit && let Some(code) = observed.exit.filter(|code| *code != 0) {
            anyhow::bail!("exit code {code}: {}", last_lines(&observed.output, 3));
        }
        Ok(observed)
    }
}

fn exit_of(end: &End) -> Option<i32> {
    match end {
        End::Prompt(code) => Some(*code),
        End::Seen => None,
    }
}

fn describe(action: &Action) -> String {
    match action {
        Action::Type(typed) => typed.text.clone(),
        Action::Wait(lines) => format!("wait: {}", lines.join("; ")),
        Action::Look { step } => format!("look at {step}"),
        Action::Keys { keys, .. } => format!("press {}", keys.join(" ")),
    }
}

fn expected(step: &Step) -> Vec<String> {
    let mut expected: Vec<_> = step.expectations.iter().map(ToString::to_string).collect();
    let says_exit = step
        .expectations
        .iter()
        .any(|expectation| matches!(expectation, Expectation::Exit(_)));
    if let Action::Type(typed) = &step.action
        && !says_exit
        && typed.until.is_none()
    {
        expected.push("exit 0".to_owned());
    }
    expected
}

fn summary(observed: &Observed, failed: &[&Expectation]) -> String {
    let mut parts = Vec::new();
    if !failed.is_empty() {
        let list: Vec<_> = failed.iter().map(ToString::to_string).collect();
        parts.push(format!("not: {}", list.join("; ")));
    }
    if let Some(code) = observed.exit {
        parts.push(format!("exit {code}"));
    }
    if let Some(packets) = &observed.packets {
        parts.push(format!("{} bytes captured", packets.len()));
    }
    let text = last_lines(&observed.output, if failed.is_empty() { 1 } else { 6 });
    if !text.is_empty() {
        parts.push(text);
    }
    parts.join(", ")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let start = lines.len().saturating_sub(count);
    let text = lines[start..].join(" / ");
    text.chars().take(600).collect()
}
