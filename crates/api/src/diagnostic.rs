//! What is wrong with an object, as data: number, severity, field path, message and a hint.
//!
//! Produced by validation here and by `translate`'s analysis; printed by the CLI, joined into an admission answer by
//! `control`, written into status. It must not know how it is shown.

use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub enum Severity {
    /// Worth knowing; nothing is refused.
    Info,
    /// Accepted, but probably not what was meant. Shown as admission warning.
    Warning,
    /// Refused.
    Error,
}

/// The number of a kind of finding, stable across releases. `IST…` numbers are Istio's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct Code(pub &'static str);

impl Code {
    /// The object does not fulfil its kind's rules.
    pub const SCHEMA_VALIDATION: Code = Code("IST0106");
    /// The object is accepted, but a rule of its kind advises against it.
    pub const SCHEMA_WARNING: Code = Code("IST0133");
    /// A field that its kind does not have.
    pub const UNKNOWN_FIELD: Code = Code("MNT0001");
    /// The object cannot be decoded at all: wrong type, unknown enum value, malformed duration.
    pub const DECODE: Code = Code("MNT0002");
    /// The kind or its version is not known.
    pub const UNKNOWN_KIND: Code = Code("MNT0003");
    /// A name or namespace that Kubernetes does not take.
    pub const NAME: Code = Code("MNT0004");
    /// The text is no YAML.
    pub const SYNTAX: Code = Code("MNT0005");
    /// A value between typographic quotes, which are part of it.
    pub const TYPOGRAPHIC_QUOTES: Code = Code("MNT0006");
    /// The indentation got lost.
    pub const INDENTATION: Code = Code("MNT0007");
    /// A principal that is written as a URI and so never matches.
    pub const PRINCIPAL_WITH_SCHEME: Code = Code("MNT0101");
    /// A `*` that is no wildcard where it stands.
    pub const LITERAL_WILDCARD: Code = Code("MNT0102");
    /// A path or method that no request has.
    pub const NEVER_MATCHES: Code = Code("MNT0107");
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Hint {
    /// The nearest known name to a misspelt one.
    DidYouMean(String),
    /// Advice in words.
    Advice(String),
}

/// One finding about one object.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Diagnostic {
    /// Its number.
    pub code: Code,
    /// Its weight.
    pub severity: Severity,
    /// Where, from the object's root: `spec.rules[0].from`. Empty for the object as a whole.
    pub path: String,
    /// What, in Istio's words where Istio has them.
    pub message: String,
    /// What to do, if more can be said.
    pub hint: Option<Hint>,
    /// What could stand there instead, if that is a short list.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub allowed: Box<[String]>,
    /// The repair, if there is only one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<Fix>,
}

/// A repair that a program may do by itself, because nothing else can have been meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Fix {
    /// The key at the path becomes what [`Hint::DidYouMean`] says.
    RenameKey,
    /// The text at the path becomes what [`Hint::DidYouMean`] says.
    Text,
    /// What is at the path becomes the only item of a list.
    Wrap,
    /// What is at the path becomes a text, as it is written.
    Quote,
}

impl Diagnostic {
    /// A violated rule of the kind.
    pub fn error(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Code::SCHEMA_VALIDATION, Severity::Error, path, message)
    }

    /// Accepted, but advised against.
    pub fn warning(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Code::SCHEMA_WARNING, Severity::Warning, path, message)
    }

    /// A finding of any number.
    pub fn new(code: Code, severity: Severity, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code,
            severity,
            path: path.into(),
            message: message.into(),
            hint: None,
            allowed: Box::default(),
            fix: None,
        }
    }

    /// Adds what could stand there.
    pub fn with_allowed<S: Into<String>>(mut self, allowed: impl IntoIterator<Item = S>) -> Self {
        self.allowed = allowed.into_iter().map(Into::into).collect();
        self
    }

    /// Adds the repair.
    pub fn with_fix(mut self, fix: Option<Fix>) -> Self {
        self.fix = fix;
        self
    }

    /// The message and where in the object, for readers who have no file at hand: the webhook's answer, a status.
    pub fn located(&self) -> String {
        if self.path.is_empty() || self.message.contains(&self.path) {
            self.to_string()
        } else {
            format!("{self} (at {})", self.path)
        }
    }

    /// The message with everything that helps: `message (allowed: …; did you mean …?)`.
    pub fn full(&self) -> String {
        let mut notes = Vec::new();
        if !self.allowed.is_empty() {
            notes.push(format!("allowed: {}", self.allowed.join(", ")));
        }
        match &self.hint {
            Some(Hint::DidYouMean(name)) => notes.push(format!("did you mean {name:?}?")),
            Some(Hint::Advice(text)) => notes.push(text.clone()),
            None => {}
        }
        if notes.is_empty() {
            self.message.clone()
        } else {
            format!("{} ({})", self.message, notes.join("; "))
        }
    }

    /// Adds the hint.
    pub fn with_hint(mut self, hint: Option<Hint>) -> Self {
        self.hint = hint;
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(Hint::DidYouMean(name)) => write!(f, " (did you mean {name:?}?)"),
            Some(Hint::Advice(text)) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// Joins the errors of a list as Go's multi-error does, which is what kubectl users see (S8.3).
pub fn join_errors(findings: &[Diagnostic]) -> Option<String> {
    let errors: Vec<String> = findings
        .iter()
        .filter(|f| f.severity == Severity::Error)
        .map(Diagnostic::located)
        .collect();
    match errors.as_slice() {
        [] => None,
        [one] => Some(one.clone()),
        many => {
            let mut text = format!("{} errors occurred:\n", many.len());
            for error in many {
                text.push_str(&format!("\t* {error}\n"));
            }
            text.push('\n');
            Some(text)
        }
    }
}

/// The candidate nearest to `name`, if near enough to be a plausible slip (edit distance at most a third of its length,
/// case ignored).
pub fn did_you_mean<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<Hint> {
    nearest(name, candidates).map(|(near, _)| Hint::DidYouMean(near.to_string()))
}

/// Longest name that is compared with others, bytes.
const MAX_MISSPELT: usize = 128;

/// As [`did_you_mean`]; true if no other candidate is as near, so that a repair may take it.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<(&'a str, bool)> {
    // Nobody misspells at such length, and the distance costs the product of both lengths.
    if name.len() > MAX_MISSPELT {
        return None;
    }
    let lower = name.to_lowercase();
    let mut near: Vec<(usize, &str)> = candidates
        .into_iter()
        .map(|candidate| {
            (
                strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()),
                candidate,
            )
        })
        .filter(|(distance, candidate)| *distance <= 1.max(name.chars().count().min(candidate.chars().count()) / 3))
        .collect();
    near.sort();
    near.dedup();
    let (distance, best) = *near.first()?;
    Some((best, near.get(1).is_none_or(|(next, _)| *next > distance)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_name() {
        let names = ["selector", "action", "rules"];
        assert_eq!(did_you_mean("rule", names), Some(Hint::DidYouMean("rules".into())));
        assert_eq!(
            did_you_mean("Selctor", names),
            Some(Hint::DidYouMean("selector".into()))
        );
        assert_eq!(did_you_mean("frobnicate", names), None);
    }

    #[test]
    fn joined_like_go() {
        let e = |m: &str| Diagnostic::error("", m);
        assert_eq!(join_errors(&[Diagnostic::warning("", "w")]), None);
        assert_eq!(join_errors(&[e("a")]).as_deref(), Some("a"));
        assert_eq!(
            join_errors(&[e("a"), e("b")]).as_deref(),
            Some("2 errors occurred:\n\t* a\n\t* b\n\n")
        );
        let at = Diagnostic::error("spec.a", "c").with_hint(Some(Hint::DidYouMean("d".into())));
        assert_eq!(
            join_errors(&[at]).as_deref(),
            Some("c (did you mean \"d\"?) (at spec.a)")
        );
        assert_eq!(
            join_errors(&[Diagnostic::error("spec.a", "error decoding configuration: spec.a: x")]).as_deref(),
            Some("error decoding configuration: spec.a: x")
        );
    }
}
