//! Prints what a lab has shown.

use anyhow::Result;
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A table: step, command, expected, observed, pass.
    #[default]
    Table,
    /// JSON.
    Json,
}

/// What one run has shown.
#[derive(Clone, Debug, Serialize)]
pub struct RunResult {
    /// The lab's title.
    pub lab: String,
    /// Which broken variant, if one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mutant: Option<String>,
    /// Everything as it must be: without a mutant every step passes, with one exactly the step that it names fails.
    pub passed: bool,
    /// What was wrong, when it is not about a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The steps that were done.
    pub steps: Vec<StepResult>,
    /// How long it took.
    pub seconds: f64,
}

/// What one step has shown.
#[derive(Clone, Debug, Serialize)]
pub struct StepResult {
    /// The step.
    pub id: String,
    /// The heading it stands under.
    pub section: String,
    /// Its command, or what it waits for.
    pub command: String,
    /// What was expected.
    pub expected: Vec<String>,
    /// What came.
    pub observed: String,
    /// Whether it is what was expected.
    pub passed: bool,
    /// How long it took.
    pub seconds: f64,
}

/// The text of all results.
///
/// # Errors
/// Never for real values; JSON of them always works.
pub fn print(results: &[RunResult], format: Format) -> Result<String> {
    match format {
        Format::Json => Ok(serde_json::to_string_pretty(results)? + "\n"),
        Format::Table => Ok(results.iter().map(table).collect::<Vec<_>>().join("\n")),
    }
}

fn table(result: &RunResult) -> String {
    let header = ["STEP", "COMMAND", "EXPECTED", "OBSERVED", "PASS"].map(str::to_owned);
    let mut rows = vec![header];
    for step in &result.steps {
        rows.push([
            step.id.clone(),
            short(&step.command, 56),
            short(&step.expected.join("; "), 44),
            short(&step.observed, 44),
            if step.passed { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    let good = result.steps.iter().filter(|step| step.passed).count();
    let name = result.mutant.as_ref().map_or_else(
        || result.lab.clone(),
        |mutant| format!("{} [mutant {mutant}]", result.lab),
    );
    text.push_str(&format!(
        "{name}: {good} of {} steps pass, {:.1} s: {}\n",
        result.steps.len(),
        result.seconds,
        if result.passed { "PASS" } else { "FAIL" }
    ));
    if let Some(problem) = &result.problem {
        text.push_str(&format!("  {problem}\n"));
    }
    for step in result.steps.iter().filter(|step| !step.passed) {
        text.push_str(&format!(
            "  {}: expected {}; observed: {}\n",
            step.id,
            step.expected.join("; "),
            step.observed
        ));
    }
    text
}

fn short(text: &str, width: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= width {
        return line;
    }
    line.chars().take(width - 1).chain(['…']).collect()
}
