//! House rules that the compiler does not check: module heads, file sizes, leftover marks, links in documents.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Hard limit of non-test lines in a Rust file.
const MAX_LINES: usize = 900;

/// All breaches, one line each, as `path:line: what`.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for folder in ["crates", "xtask", "bench", "fuzz", "tests"] {
        for file in files(&root.join(folder), "rs")? {
            rust_file(root, &file, &mut problems)?;
        }
    }
    for file in files(root, "md")? {
        markdown_file(root, &file, &mut problems)?;
    }
    Ok(problems)
}

pub(crate) fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut stack = vec![folder.to_path_buf()];
    while let Some(folder) = stack.pop() {
        if !folder.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if path.is_dir() {
                if !name.starts_with('.') && !["target", "node_modules", "results"].contains(&name) {
                    stack.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn rust_file(root: &Path, file: &Path, problems: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let shown = file.strip_prefix(root).unwrap_or(file).display();
    if !text.trim_start().starts_with("//!") {
        problems.push(format!(
            "{shown}:1: the file opens without `//!` (duty, callers, what it must not know)"
        ));
    }
    let is_test =
        file.components().any(|c| c.as_os_str() == "tests") || file.file_name().is_some_and(|n| n == "tests.rs");
    let code_lines = text.lines().take_while(|l| !l.starts_with("#[cfg(test)]")).count();
    if !is_test && code_lines > MAX_LINES {
        problems.push(format!(
            "{shown}:{MAX_LINES}: {code_lines} lines before the tests, limit {MAX_LINES}; split it"
        ));
    }
    // Assembled, so that this file does not accuse itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:")];
    for (number, line) in text.lines().enumerate() {
        if let Some(mark) = marks.iter().find(|mark| line.contains(*mark)) {
            problems.push(format!(
                "{shown}:{}: `{mark}` left in the code; file an issue instead",
                number + 1
            ));
        }
        if line.trim() == "#[ignore]" || line.trim().starts_with("#[ignore =") {
            problems.push(format!("{shown}:{}: ignored test", number + 1));
        }
    }
    Ok(())
}

fn markdown_file(root: &Path, file: &Path, problems: &mut Vec<String>) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let shown = file.strip_prefix(root).unwrap_or(file).display();
    for (number, line) in text.lines().enumerate() {
        for target in links(line) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") || path.starts_with("mailto:") {
                continue;
            }
            let base = file.parent().unwrap_or(root);
            if !base.join(path).exists() {
                problems.push(format!(
                    "{shown}:{}: the link target `{path}` does not exist",
                    number + 1
                ));
            }
        }
    }
    Ok(())
}

/// Targets of inline links `[text](target)` in a line.
fn links(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.find("](") {
        rest = &rest[start + 2..];
        if let Some(end) = rest.find(')') {
            found.push(&rest[..end]);
            rest = &rest[end..];
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_links() {
        assert_eq!(links("see [a](b.md) and [c](d/e.md#f)."), ["b.md", "d/e.md#f"]);
        assert!(links("no (link) here]").is_empty());
    }
}
