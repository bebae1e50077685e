//! `validate --fix`: writes repaired files, shows what changed, tells what is left.
//!
//! Which repair is safe is decided by [`mantlet_api::repair`], one object at a time. Here stands what can only be seen across objects: a
//! repaired name must not be another object's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use mantlet_api::repair::{self, Repair};
use mantlet_api::yaml;

use super::{Answer, Located, findings, shown};
use crate::files::{self, Chunk};

/// A file before and after.
pub(super) struct Fixed {
    /// The file.
    pub(super) file: PathBuf,
    /// Its new text.
    pub(super) text: String,
    /// Its old text.
    old: String,
    /// What was done or not, with lines of the old text.
    notes: Vec<(usize, String)>,
}

/// Repairs files and answers with the difference, the notes and what `validate` says of the result.
pub(super) fn run(paths: &[PathBuf], write: bool, json: bool) -> anyhow::Result<Answer> {
    let mut all = Vec::new();
    let mut diff = String::new();
    let mut error = String::new();
    let piped = paths.iter().any(|path| path.as_os_str() == "-");
    for fixed in fix(files::texts(paths)?) {
        let name = fixed.file.display().to_string();
        let stdin = name == "-";
        if fixed.text != fixed.old && !json {
            let changes = similar::TextDiff::from_lines(&fixed.old, &fixed.text);
            if !stdin {
                let _ = write!(
                    diff,
                    "{}",
                    changes.unified_diff().header(&name, &format!("{name} (repaired)"))
                );
            }
        }
        for (line, note) in &fixed.notes {
            let _ = writeln!(error, "{name}:{line}: {note}");
        }
        if stdin {
            // Standard input is answered with the repaired text.
            diff.push_str(&fixed.text);
        } else if write && fixed.text != fixed.old {
            replace(&fixed.file, &fixed.text)?;
        }
        let left: Vec<Located> = findings(&files::split(&fixed.file, &fixed.text));
        all.push((name, left));
    }
    let mut answer = if json { super::json(&all)? } else { shown(&all) };
    if piped {
        // What is written there must be the repaired text alone.
        answer.error = std::mem::take(&mut answer.text) + &answer.error;
    }
    if !json || piped {
        answer.text = diff + &answer.text;
    }
    answer.error = error + &answer.error;
    Ok(answer)
}

/// Repairs the documents of files, as far as no two objects get the same name by it.
pub(super) fn fix(sources: Vec<(PathBuf, String)>) -> Vec<Fixed> {
    let mut work: Vec<(usize, Chunk, Repair)> = Vec::new();
    for (index, (file, text)) in sources.iter().enumerate() {
        for chunk in files::split(file, text) {
            let repair = repair::document(&chunk.text);
            work.push((index, chunk, repair));
        }
    }
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (_, _, repair) in &work {
        if let Some(name) = identity(&repair.text) {
            *names.entry(name).or_default() += 1;
        }
    }
    for (_, chunk, repair) in &mut work {
        let renamed = identity(&repair.text).filter(|new| identity(&chunk.text).as_ref() != Some(new));
        if let Some(name) = renamed.filter(|name| names.get(name).is_some_and(|count| *count > 1)) {
            *repair = Repair {
                text: chunk.text.to_string(),
                changes: Vec::new(),
                refused: vec![format!("not repaired, because another object is called {name} as well")],
            };
        }
    }
    let mut all: Vec<Fixed> = Vec::new();
    for (index, (file, old)) in sources.into_iter().enumerate() {
        let mut fixed = Fixed {
            file,
            text: String::with_capacity(old.len() + 64),
            old,
            notes: Vec::new(),
        };
        let mut at = 0;
        for (_, chunk, repair) in work.iter().filter(|(i, ..)| *i == index) {
            fixed.text.push_str(&fixed.old[at..chunk.offset]);
            fixed.text.push_str(&repair.text);
            at = chunk.offset + chunk.text.len();
            let refused = repair.refused.iter().map(|why| format!("not repaired: {why}"));
            for note in repair
                .changes
                .iter()
                .map(|what| format!("repaired: {what}"))
                .chain(refused)
            {
                fixed.notes.push((chunk.line, note));
            }
        }
        fixed.text.push_str(&fixed.old[at..]);
        all.push(fixed);
    }
    all
}

/// `Kind namespace/name` of a document, if it has a name.
fn identity(text: &str) -> Option<String> {
    let value = yaml::read_one(text).ok()?;
    let at = |pointer: &str| value.pointer(pointer).and_then(serde_json::Value::as_str);
    Some(format!(
        "{} {}/{}",
        at("/kind")?,
        at("/metadata/namespace").unwrap_or_default(),
        at("/metadata/name")?
    ))
}

/// Replaces a file as a whole: a crash leaves the old or the new text. Permissions stay.
fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    // A link is followed, so that it stays one.
    let target = std::fs::canonicalize(file).with_context(|| format!("cannot find {}", file.display()))?;
    let doing = || format!("cannot write {}", file.display());
    let directory = target.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(directory).with_context(doing)?;
    temporary.write_all(text.as_bytes()).with_context(doing)?;
    let permissions = std::fs::metadata(&target).with_context(doing)?.permissions();
    temporary.as_file().set_permissions(permissions).with_context(doing)?;
    temporary.as_file().sync_all().with_context(doing)?;
    temporary.persist(&target).with_context(doing)?;
    Ok(())
}
