//! Broken variants of a lab: each changes something and names the step that must fail because of it.
//!
//! A mutant is a file `mutants/NAME.yaml`; one that does not fail, or fails elsewhere, shows that the lab would not notice.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::parse::{Action, Step};

/// One broken variant.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// From the file's name.
    #[serde(skip)]
    pub name: String,
    /// What is wrong.
    pub description: String,
    /// The step that must fail.
    pub fails: String,
    /// What is changed.
    pub edits: Vec<Edit>,
}

/// One change.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, untagged)]
pub enum Edit {
    /// A text in one of the lab's files.
    File {
        /// The file.
        file: String,
        /// What is there.
        replace: String,
        /// What is put there.
        with: String,
    },
    /// Another command for a step.
    Command {
        /// The step.
        step: String,
        /// What is typed instead.
        command: String,
    },
    /// A step that is left out.
    Skip {
        /// The step.
        skip: String,
    },
}

/// The names of a lab's mutants, sorted.
///
/// # Errors
/// The directory is there but cannot be read.
pub fn names(lab: &Path) -> Result<Vec<String>> {
    let dir = lab.join("mutants");
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| dir.display().to_string()),
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .into_string()
                .ok()?
                .strip_suffix(".yaml")
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

impl Mutant {
    /// Reads `mutants/NAME.yaml`.
    ///
    /// # Errors
    /// There is none of that name, or it is not understood.
    pub fn load(lab: &Path, name: &str) -> Result<Self> {
        let path = lab.join("mutants").join(format!("{name}.yaml"));
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "no mutant {name:?}; there are: {}",
                names(lab).unwrap_or_default().join(", ")
            )
        })?;
        let mut mutant: Self = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
        mutant.name = name.to_owned();
        Ok(mutant)
    }

    /// Changes the copy of the lab's files in `dir` and its steps.
    ///
    /// # Errors
    /// What is to be changed is not there: the mutant is out of date.
    pub fn apply(&self, dir: &Path, steps: &mut Vec<Step>) -> Result<()> {
        if !steps.iter().any(|step| step.id == self.fails) {
            bail!("mutant {:?}: there is no step {:?}", self.name, self.fails);
        }
        for edit in &self.edits {
            match edit {
                Edit::File { file, replace, with } => {
                    let path = dir.join(file);
                    let text =
                        std::fs::read_to_string(&path).with_context(|| format!("mutant {:?}: {file}", self.name))?;
                    if !text.contains(replace) {
                        bail!("mutant {:?}: {file} does not contain {replace:?}", self.name);
                    }
                    std::fs::write(&path, text.replace(replace, with))?;
                }
                Edit::Command { step, command } => {
                    let found = steps.iter_mut().find(|candidate| candidate.id == *step);
                    let Some(Step {
                        action: Action::Type(typed),
                        ..
                    }) = found
                    else {
                        bail!("mutant {:?}: there is no command {step:?}", self.name);
                    };
                    typed.text.clone_from(command);
                }
                Edit::Skip { skip } => {
                    let before = steps.len();
                    steps.retain(|step| step.id != *skip);
                    if steps.len() == before {
                        bail!("mutant {:?}: there is no step {skip:?}", self.name);
                    }
                }
            }
        }
        Ok(())
    }
}
