//! What must come out of a step. Pure.

use anyhow::{Context, Result, bail};
use regex::Regex;

/// One line of an `expect` block.
#[derive(Clone, Debug)]
pub enum Expectation {
    /// The command's exit code; `None` for a command that may end either way.
    Exit(Option<i32>),
    /// A text that must be in the output.
    Contains(String),
    /// A text that must not be.
    Lacks(String),
    /// A regular expression that must match (`^` and `$` are those of lines).
    Matches(Regex),
    /// A text that must be in the captured packets.
    Captured(String),
    /// A text that must not be in the captured packets, of which there must be some.
    NotCaptured(String),
}

/// What a step has produced.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Output without terminal control.
    pub output: String,
    /// Exit code, when the command has ended.
    pub exit: Option<i32>,
    /// Raw packets, when some were captured.
    pub packets: Option<Vec<u8>>,
}

impl Expectation {
    /// Reads a block.
    ///
    /// # Errors
    /// A line is none of the known ones.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(Self::parse_line)
            .collect()
    }

    fn parse_line(line: &str) -> Result<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let rest = rest.trim();
        if rest.is_empty() {
            bail!("{line:?} says nothing");
        }
        Ok(match word {
            "exit" if rest == "any" => Self::Exit(None),
            "exit" => Self::Exit(Some(rest.parse().with_context(|| format!("{line:?}"))?)),
            "contains" => Self::Contains(rest.to_owned()),
            "lacks" => Self::Lacks(rest.to_owned()),
            "matches" => Self::Matches(Regex::new(&format!("(?m){rest}")).with_context(|| format!("{line:?}"))?),
            "captured" => Self::Captured(rest.to_owned()),
            "not-captured" => Self::NotCaptured(rest.to_owned()),
            _ => bail!("{line:?}: expected exit, contains, lacks, matches, captured or not-captured"),
        })
    }

    /// Whether it holds now.
    pub fn holds(&self, observed: &Observed) -> bool {
        let captured = |text: &str| {
            let packets = observed.packets.as_deref().unwrap_or_default();
            packets.windows(text.len()).any(|window| window == text.as_bytes())
        };
        match self {
            Self::Exit(None) => observed.exit.is_some(),
            Self::Exit(Some(code)) => observed.exit == Some(*code),
            Self::Contains(text) => observed.output.contains(text),
            Self::Lacks(text) => !observed.output.contains(text),
            Self::Matches(regex) => regex.is_match(&observed.output),
            Self::Captured(text) => captured(text),
            // Silence proves nothing: the file header alone is 24 bytes.
            Self::NotCaptured(text) => {
                observed.packets.as_ref().is_some_and(|packets| packets.len() > 200) && !captured(text)
            }
        }
    }

    /// Whether more output could still make it hold.
    pub fn may_come(&self) -> bool {
        matches!(self, Self::Contains(_) | Self::Matches(_))
    }
}

impl std::fmt::Display for Expectation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(None) => f.write_str("exit any"),
            Self::Exit(Some(code)) => write!(f, "exit {code}"),
            Self::Contains(text) => write!(f, "contains {text}"),
            Self::Lacks(text) => write!(f, "lacks {text}"),
            Self::Matches(regex) => write!(f, "matches {}", regex.as_str().trim_start_matches("(?m)")),
            Self::Captured(text) => write!(f, "captured {text}"),
            Self::NotCaptured(text) => write!(f, "not-captured {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_can_fail() {
        let observed = Observed {
            output: "one\ntwo 12\n".to_owned(),
            exit: Some(56),
            packets: Some(vec![b'x'; 300]),
        };
        let table = [
            ("exit 56", "exit 0"),
            ("contains two", "contains three"),
            ("lacks three", "lacks two"),
            (r"matches ^two \d+$", r"matches ^one \d+$"),
            ("captured xx", "captured xy"),
            ("not-captured xy", "not-captured xx"),
        ];
        for (good, bad) in table {
            assert!(Expectation::parse(good).expect("parses")[0].holds(&observed), "{good}");
            assert!(!Expectation::parse(bad).expect("parses")[0].holds(&observed), "{bad}");
        }
        let silent = Observed {
            packets: Some(vec![0; 24]),
            ..Observed::default()
        };
        assert!(!Expectation::parse("not-captured x").expect("parses")[0].holds(&silent));
        assert!(!Expectation::parse("not-captured x").expect("parses")[0].holds(&Observed::default()));
    }
}
