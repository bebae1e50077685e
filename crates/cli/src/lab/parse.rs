//! Reads a lab's Markdown into steps. Pure but for reading the file; the format is described in `labs/README.md`.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::expect::Expectation;

/// A step without `limit` may take this long.
const DEFAULT_LIMIT: u64 = 30;
/// Largest walk-through that is read.
const MAX_SIZE: u64 = 4 << 20;

/// A walk-through.
#[derive(Clone, Debug)]
pub struct Lab {
    /// Where it is.
    pub dir: PathBuf,
    /// Its first heading.
    pub title: String,
    /// In the order of the text.
    pub steps: Vec<Step>,
}

/// One fenced block, with the expectations that follow it.
#[derive(Clone, Debug)]
pub struct Step {
    /// Unique within the lab.
    pub id: String,
    /// The heading it stands under.
    pub section: String,
    /// Runs at the end in any case.
    pub teardown: bool,
    /// How long it may take.
    pub limit: Duration,
    /// What to do.
    pub action: Action,
    /// What must come out.
    pub expectations: Vec<Expectation>,
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Action {
    /// Types a command.
    Type(Typed),
    /// Waits for a state of the cluster, one line each.
    Wait(Vec<String>),
    /// Looks again at the output of an earlier step.
    Look {
        /// That step.
        step: String,
    },
    /// Presses keys (`C-c`, `C-d`).
    Keys {
        /// Number of the terminal.
        terminal: u8,
        /// The keys.
        keys: Vec<String>,
        /// Done when this appears instead of the shell's prompt.
        until: Option<String>,
    },
}

/// A command as it is typed.
#[derive(Clone, Debug)]
pub struct Typed {
    /// The fence's content.
    pub text: String,
    /// Number of the terminal.
    pub terminal: u8,
    /// Done when this regular expression matches, instead of at the shell's prompt.
    pub until: Option<String>,
    /// What to type when the command asks.
    pub stdin: Option<String>,
    /// The question after which `stdin` is typed.
    pub at: String,
    /// Pods whose traffic is captured meanwhile: a label selector.
    pub capture: Option<String>,
}

impl Lab {
    /// Reads `dir/README.md`.
    ///
    /// # Errors
    /// The file cannot be read, or a fence is wrong; the message has the line.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("README.md");
        let size = std::fs::metadata(&path)
            .with_context(|| format!("{} is no lab", dir.display()))?
            .len();
        if size > MAX_SIZE {
            bail!("{} is larger than 4 MB", path.display());
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let (title, steps) = parse(&text).with_context(|| path.display().to_string())?;
        Ok(Self {
            dir: dir.to_owned(),
            title,
            steps,
        })
    }
}

struct Fence {
    line: usize,
    language: String,
    attributes: BTreeMap<String, String>,
    body: String,
}

/// Title and steps of a text.
///
/// # Errors
/// Names the line of a fence that is wrong.
pub fn parse(text: &str) -> Result<(String, Vec<Step>)> {
    let mut title = String::new();
    let mut section = String::new();
    let mut steps: Vec<Step> = Vec::new();
    let mut ids = HashSet::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(heading) = line.strip_prefix('#') {
            section = heading.trim_start_matches('#').trim().to_owned();
            if title.is_empty() {
                title.clone_from(&section);
            }
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let Some(info) = line.trim_start().strip_prefix("```") else {
            continue;
        };
        let mut body = String::new();
        let mut closed = false;
        for (_, line) in lines.by_ref() {
            if line.trim() == "```" {
                closed = true;
                break;
            }
            let skip = line.len() - line.trim_start().len();
            body.push_str(&line[indent.min(skip)..]);
            body.push('\n');
        }
        if !closed {
            bail!("line {}: the fence is not closed", number + 1);
        }
        let fence = read_fence(number + 1, info, body)?;
        if fence.language == "expect" {
            let expectations = Expectation::parse(&fence.body).with_context(|| format!("line {}", fence.line))?;
            if fence.attributes.contains_key("step") {
                steps.push(look(&fence, &section, expectations)?);
            } else {
                let last = steps
                    .last_mut()
                    .with_context(|| format!("line {}: nothing to expect from", fence.line))?;
                last.expectations.extend(expectations);
            }
        } else if let Some(step) = step(&fence, &section)? {
            steps.push(step);
        }
        if steps.len() > ids.len()
            && let Some(step) = steps.last()
            && !ids.insert(step.id.clone())
        {
            bail!("line {}: the id {:?} is used twice", number + 1, step.id);
        }
    }
    Ok((title, steps))
}

fn read_fence(line: usize, info: &str, body: String) -> Result<Fence> {
    let (language, rest) = info.split_once(' ').unwrap_or((info, ""));
    let mut attributes = BTreeMap::new();
    let mut rest = rest.trim_start();
    while !rest.is_empty() {
        let (name, value) = rest
            .split_once('=')
            .with_context(|| format!("line {line}: {rest:?} is no name=value"))?;
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => quoted
                .split_once('"')
                .with_context(|| format!("line {line}: a quote is not closed"))?,
            None => value.split_once(' ').unwrap_or((value, "")),
        };
        attributes.insert(name.trim().to_owned(), value.to_owned());
        rest = after.trim_start();
    }
    Ok(Fence {
        line,
        language: language.to_owned(),
        attributes,
        body,
    })
}

impl Fence {
    fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T> {
        match self.attributes.get(name) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .ok()
                .with_context(|| format!("line {}: {name}={text:?} is no number", self.line)),
        }
    }

    fn check(&self, known: &[&str]) -> Result<()> {
        for name in self.attributes.keys() {
            if !known.contains(&name.as_str()) {
                bail!(
                    "line {}: unknown attribute {name:?} (known: {})",
                    self.line,
                    known.join(", ")
                );
            }
        }
        Ok(())
    }

    fn base(&self, section: &str, action: Action, expectations: Vec<Expectation>) -> Result<Step> {
        Ok(Step {
            id: self
                .attributes
                .get("id")
                .cloned()
                .unwrap_or_else(|| format!("line-{}", self.line)),
            section: section.to_owned(),
            teardown: self.attributes.get("teardown").is_some_and(|value| value == "true"),
            limit: Duration::from_secs(self.number("limit", DEFAULT_LIMIT)?),
            action,
            expectations,
        })
    }
}

fn look(fence: &Fence, section: &str, expectations: Vec<Expectation>) -> Result<Step> {
    fence.check(&["id", "step", "limit"])?;
    let step = fence.attributes.get("step").cloned().unwrap_or_default();
    fence.base(section, Action::Look { step }, expectations)
}

/// A step out of a `bash`, `console`, `wait` or `keys` fence; fences of other languages are only text.
fn step(fence: &Fence, section: &str) -> Result<Option<Step>> {
    let action = match fence.language.as_str() {
        // A shell fence without an id is an example for the reader.
        "bash" | "console" | "sh" if fence.attributes.contains_key("id") => {
            fence.check(&["id", "term", "limit", "until", "stdin", "at", "capture", "teardown"])?;
            Action::Type(Typed {
                text: fence.body.trim_end_matches('\n').to_owned(),
                terminal: fence.number("term", 1)?,
                until: fence.attributes.get("until").cloned(),
                stdin: fence.attributes.get("stdin").cloned(),
                at: fence
                    .attributes
                    .get("at")
                    .cloned()
                    .unwrap_or_else(|| "(y/N)".to_owned()),
                capture: fence.attributes.get("capture").cloned(),
            })
        }
        "wait" => {
            fence.check(&["id", "limit", "teardown"])?;
            Action::Wait(
                fence
                    .body
                    .lines()
                    .map(str::trim)
                    .filter(|line| !line.is_empty())
                    .map(str::to_owned)
                    .collect(),
            )
        }
        "keys" => {
            fence.check(&["id", "term", "limit", "until", "teardown"])?;
            Action::Keys {
                terminal: fence.number("term", 1)?,
                keys: fence.body.split_whitespace().map(str::to_owned).collect(),
                until: fence.attributes.get("until").cloned(),
            }
        }
        _ => return Ok(None),
    };
    fence.base(section, action, Vec::new()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_byte_for_byte_and_indentation_is_the_fences() {
        let text = "# Lab\n\n## One\n\n1. Do it\n\n    ```bash id=a term=2 stdin=\"y\" limit=5\n    kubectl exec x -- \\\n      curl y\n    ```\n\n    ```expect\n    exit 56\n    ```\n";
        let (title, steps) = parse(text).expect("parses");
        assert_eq!(title, "Lab");
        assert_eq!(steps.len(), 1);
        let Action::Type(typed) = &steps[0].action else {
            panic!("a command")
        };
        assert_eq!(typed.text, "kubectl exec x -- \\\n  curl y");
        assert_eq!((typed.terminal, typed.stdin.as_deref()), (2, Some("y")));
        assert_eq!(steps[0].expectations.len(), 1);
        assert_eq!(steps[0].limit, Duration::from_secs(5));
    }

    #[test]
    fn mistakes_name_the_line() {
        for (text, message) in [
            ("```bash id=a\nx\n", "line 1: the fence is not closed"),
            ("\n```bash id=a foo=b\nx\n```\n", "line 2: unknown attribute"),
            ("```expect\nexit 0\n```\n", "line 1: nothing to expect from"),
            (
                "```bash id=a\nx\n```\n```bash id=a\ny\n```\n",
                "line 4: the id \"a\" is used twice",
            ),
            ("```bash id=a limit=x\nx\n```\n", "line 1: limit"),
            ("```bash id=a\nx\n```\n```expect\nfoo bar\n```\n", "line 4"),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.contains(message), "{error}");
        }
    }
}
