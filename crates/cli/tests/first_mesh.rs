//! `docs/first-mesh.md` is no fiction: commands that need no cluster are run and compared line by line, the others must be steps of the first lab with
//! the same answers.

use std::path::{Path, PathBuf};
use std::process::Command;

struct Typed {
    line: usize,
    command: String,
    output: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What stands behind `$ ` in the page's console blocks, with the lines after it.
fn transcript(text: &str) -> Vec<Typed> {
    let mut all: Vec<Typed> = Vec::new();
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if let (true, Some(command)) = (inside, line.strip_prefix("$ ")) {
            all.push(Typed {
                line: number + 1,
                command: command.into(),
                output: Vec::new(),
            });
        } else if let (true, Some(last)) = (inside, all.last_mut()) {
            last.output.push(line.into());
        }
    }
    all
}

/// The lab's commands, each with the `contains` lines of the expectation behind it.
fn steps(text: &str) -> Vec<(String, Vec<String>)> {
    let mut all: Vec<(String, Vec<String>)> = Vec::new();
    let mut fence = String::new();
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some("") => fence.clear(),
            Some(info) => fence = info.into(),
            None if fence.starts_with("bash id=") => all.push((line.into(), Vec::new())),
            None if fence.starts_with("expect") => {
                if let (Some(text), Some(step)) = (line.strip_prefix("contains "), all.last_mut()) {
                    step.1.push(text.into());
                }
            }
            None => {}
        }
    }
    all
}

#[test]
fn the_page_says_what_is_printed() {
    let page = std::fs::read_to_string(root().join("docs/first-mesh.md")).expect("the page");
    let lab = root().join("labs/001-first-steps");
    let steps = steps(&std::fs::read_to_string(lab.join("README.md")).expect("the lab"));
    let work = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(work.path().join("article")).expect("a directory");
    for file in std::fs::read_dir(lab.join("article")).expect("the article") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), work.path().join("article").join(file.file_name())).expect("a copy");
    }
    let bin = work.path().join("bin");
    std::fs::create_dir(&bin).expect("a directory");
    for name in ["mantlet", "istioctl"] {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mantlet"), bin.join(name)).expect("a link");
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let (mut run, mut compared) = (0, 0);
    for typed in transcript(&page) {
        let words: Vec<&str> = typed.command.split(' ').collect();
        let alone = matches!(words[..2], ["cat" | "sed", _] | ["mantlet" | "istioctl", "validate"]);
        if alone {
            let output = Command::new("bash")
                .args(["-c", &format!("{} 2>&1", typed.command)])
                .current_dir(work.path())
                .env("PATH", &path)
                .output()
                .expect("bash");
            let printed = String::from_utf8_lossy(&output.stdout);
            assert_eq!(
                printed.trim_end(),
                typed.output.join("\n").trim_end(),
                "docs/first-mesh.md:{}: {}",
                typed.line,
                typed.command
            );
            run += 1;
        } else {
            let step = steps
                .iter()
                .find(|(command, _)| *command == typed.command)
                .unwrap_or_else(|| {
                    panic!(
                        "docs/first-mesh.md:{}: no step of the lab types {}",
                        typed.line, typed.command
                    )
                });
            for line in typed.output.iter().filter(|line| !line.is_empty()) {
                assert!(
                    step.1.iter().any(|expected| line.contains(expected.as_str())),
                    "docs/first-mesh.md:{}: the lab does not expect {line:?} of {}, but {:?}",
                    typed.line,
                    typed.command,
                    step.1
                );
            }
            compared += 1;
        }
    }
    assert!(run >= 6 && compared >= 8, "{run} commands run, {compared} compared");
}
