//! `validate`: what is wrong with files before they are applied, each finding with file, line and column.
//!
//! The frame is Istio's (`"file" is valid`, `Error: N errors occurred:`, exit code 1); the findings are those of
//! [`mantlet_api::strict`], which says at once what `kubectl`, the API server and the webhook would say one after the other. With `--fix`, [`fix`]
//! repairs what can be meant in one way only. It must not need a cluster.

mod fix;
#[cfg(test)]
mod tests;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::bail;
use mantlet_api::diagnostic::{Code, Diagnostic, Severity};
use mantlet_api::strict;

use crate::files::{self, Chunk};

/// Options of `validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files or directories to validate, - for standard input
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    filenames: Vec<PathBuf>,
    /// As --filename
    #[arg(value_name = "FILE")]
    more: Vec<PathBuf>,
    /// Enable structural validation for policy and telemetry; always on
    #[arg(short = 'x', long, hide = true)]
    referential: Option<Option<bool>>,
    /// Repair what can be meant in one way only, write the files and show what changed
    #[arg(long)]
    fix: bool,
    /// With --fix: show what would change, write nothing
    #[arg(long, requires = "fix")]
    dry_run: bool,
    /// How findings are shown
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// What is printed, where, and the exit code.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error.
    pub error: String,
    /// 0 if all files are valid, else 1.
    pub code: u8,
}

/// A finding with its place.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Located {
    /// The file.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// `Kind/namespace/name` of the object, as far as it has them.
    pub object: String,
    /// What.
    #[serde(flatten)]
    pub finding: Diagnostic,
}

impl Located {
    /// `file:line:column: field.path: message (allowed: …; did you mean …?)`.
    pub fn line(&self) -> String {
        let mut text = format!("{}:{}:{}: ", self.file, self.line, self.column);
        if !self.finding.path.is_empty() {
            let _ = write!(text, "{}: ", self.finding.path);
        }
        text + &self.finding.full()
    }
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<Answer> {
    let paths: Vec<PathBuf> = args.filenames.iter().chain(&args.more).cloned().collect();
    if paths.is_empty() {
        bail!("filename is required (see --filename)");
    }
    if args.fix {
        return fix::run(&paths, !args.dry_run, args.output == Output::Json);
    }
    let sources = files::texts(&paths)?;
    let mut all = Vec::new();
    for (file, text) in &sources {
        all.push((file.display().to_string(), findings(&files::split(file, text))));
    }
    Ok(match args.output {
        Output::Text => shown(&all),
        Output::Json => json(&all)?,
    })
}

/// The findings about the documents of a file, in the order of their places.
pub fn findings(chunks: &[Chunk]) -> Vec<Located> {
    let mut all = Vec::new();
    for chunk in chunks {
        match chunk.read() {
            Err(fault) => {
                let advice = syntax_advice(&chunk.text, fault.line - chunk.line);
                all.push(Located {
                    file: fault.file.display().to_string(),
                    line: fault.line,
                    column: fault.column,
                    object: String::new(),
                    finding: Diagnostic::new(Code::SYNTAX, Severity::Error, "", fault.message).with_hint(advice),
                });
            }
            Ok(documents) => {
                for document in documents {
                    let tree = document.tree();
                    let name = |key: &str| document.value["metadata"][key].as_str().unwrap_or_default();
                    let object = format!(
                        "{}/{}/{}",
                        document.value["kind"].as_str().unwrap_or_default(),
                        name("namespace"),
                        name("name")
                    );
                    for finding in strict::document(&document.value) {
                        let at = tree
                            .as_ref()
                            .map(|tree| tree.locate(&finding.path).0)
                            .unwrap_or_default();
                        all.push(Located {
                            file: document.file.display().to_string(),
                            line: document.line + at.line.max(1) - 1,
                            column: at.column.max(1),
                            object: object.clone(),
                            finding,
                        });
                    }
                }
            }
        }
    }
    all.sort_by(|a, b| (a.line, a.column).cmp(&(b.line, b.column)));
    all
}

/// What usually is behind a text that is no YAML.
fn syntax_advice(text: &str, line: usize) -> Option<mantlet_api::diagnostic::Hint> {
    let at = text.lines().nth(line).unwrap_or_default();
    let before = line
        .checked_sub(1)
        .and_then(|l| text.lines().nth(l))
        .unwrap_or_default();
    let indent = |line: &str| line.chars().take_while(|c| c.is_whitespace()).collect::<String>();
    let advice = if indent(at).contains('\t') || indent(before).contains('\t') {
        "YAML does not allow tabs in indentation: use blanks"
    } else if at.contains(['“', '”', '„', '‘', '’']) || before.contains(['“', '”', '„', '‘', '’']) {
        "typographic quotes are no quotes in YAML: use \" or '"
    } else if at.trim_start().starts_with('*') || at.contains(": *") || at.contains("[*") || at.contains("- *") {
        "a value that begins with * needs quotes"
    } else if at.contains(": ") && before.contains(": ") && indent(at).len() > indent(before).len() {
        "this line is indented deeper than the one before it, which already has a value"
    } else {
        return None;
    };
    Some(mantlet_api::diagnostic::Hint::Advice(advice.into()))
}

/// Istio's frame around the findings: a line for each file, the errors in one list at the end.
pub fn shown(all: &[(String, Vec<Located>)]) -> Answer {
    let mut answer = Answer::default();
    let mut errors = Vec::new();
    let mut repairable = false;
    for (file, found) in all {
        let (bad, warnings): (Vec<_>, Vec<_>) = found.iter().partition(|f| f.finding.severity == Severity::Error);
        if !warnings.is_empty() {
            let _ = writeln!(answer.text, "{file:?} has warnings:");
            for warning in &warnings {
                let _ = writeln!(answer.text, "\t* {}", warning.line());
            }
        } else if bad.is_empty() {
            let _ = writeln!(answer.text, "{file:?} is valid");
        }
        repairable |= bad.iter().any(|f| f.finding.fix.is_some());
        errors.extend(bad);
    }
    if !errors.is_empty() {
        answer.code = 1;
        let s = if errors.len() == 1 { "" } else { "s" };
        let _ = writeln!(answer.error, "Error: {} error{s} occurred:", errors.len());
        for error in &errors {
            let _ = writeln!(answer.error, "\t* {}", error.line());
        }
        if repairable {
            let _ = writeln!(
                answer.error,
                "\nWhat can be meant in one way only is repaired by: mantlet validate --fix -f FILE"
            );
        }
    }
    answer
}

/// The findings as a JSON list.
fn json(all: &[(String, Vec<Located>)]) -> anyhow::Result<Answer> {
    let flat: Vec<&Located> = all.iter().flat_map(|(_, found)| found).collect();
    let bad = flat.iter().any(|f| f.finding.severity == Severity::Error);
    Ok(Answer {
        text: serde_json::to_string_pretty(&flat)? + "\n",
        error: String::new(),
        code: u8::from(bad),
    })
}
