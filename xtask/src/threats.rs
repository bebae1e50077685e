//! The table of attacks in `docs/security.md`: each number of the list of threats that has a regression test `reg_<number>_…`, with the
//! tests and their files.
//!
//! `tidy` compares the table with the tests and knows which numbers must have one; `bounds` writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const DOCUMENT: &str = "docs/security.md";
const BEGIN: &str = "<!-- threats: begin (cargo run -p xtask -- bounds) -->";
const END: &str = "<!-- threats: end -->";

/// Numbers that must have a test: the most valuable ones, smuggling (42 to 55), and exhaustion (56 to 73).
const REQUIRED: [std::ops::RangeInclusive<u32>; 18] = [
    1..=5,
    9..=9,
    14..=18,
    20..=20,
    24..=26,
    28..=28,
    31..=33,
    40..=40,
    42..=55,
    56..=73,
    98..=98,
    100..=103,
    105..=105,
    118..=118,
    120..=121,
    127..=127,
    130..=132,
    135..=135,
];

/// Tests by number, each with its file.
type Tests = BTreeMap<u32, BTreeSet<(String, String)>>;

/// What of the document does not agree with the tests, and which tests are missing.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let tests = tests(root)?;
    let mut out: Vec<String> = REQUIRED
        .iter()
        .flat_map(Clone::clone)
        .filter(|number| !tests.contains_key(number))
        .map(|number| format!("crates: no test `reg_{number}_…` for this number of the list of threats"))
        .collect();
    let text = fs::read_to_string(root.join(DOCUMENT)).context(DOCUMENT)?;
    let (before, table, after) = crate::bounds::between(&text, DOCUMENT, BEGIN, END)?;
    let wanted = render(&tests);
    let (have, want): (BTreeSet<&str>, BTreeSet<&str>) =
        (table.trim().lines().collect(), wanted.trim().lines().collect());
    out.extend(want.difference(&have).map(|row| format!("{DOCUMENT}: missing: {row}")));
    out.extend(
        have.difference(&want)
            .map(|row| format!("{DOCUMENT}: no longer so: {row}")),
    );
    // Names in running text count too.
    for word in [before, after]
        .iter()
        .flat_map(|part| part.split('`'))
        .filter(|w| w.starts_with("reg_"))
    {
        if numbers(word).iter().any(|number| !tests.contains_key(number)) {
            out.push(format!("{DOCUMENT}: `{word}` is no test"));
        }
    }
    Ok(out)
}

/// Writes the table anew.
pub(crate) fn write(root: &Path) -> Result<()> {
    let path = root.join(DOCUMENT);
    let text = fs::read_to_string(&path).context(DOCUMENT)?;
    let (head, _, tail) = crate::bounds::between(&text, DOCUMENT, BEGIN, END)?;
    let table = render(&tests(root)?);
    fs::write(&path, format!("{head}{BEGIN}\n{}\n{END}{tail}", table.trim()))?;
    Ok(())
}

fn tests(root: &Path) -> Result<Tests> {
    let mut out = Tests::new();
    for file in crate::tidy::files(&root.join("crates"), "rs")? {
        let place = file.strip_prefix(root)?.display().to_string();
        for line in fs::read_to_string(&file)?.lines() {
            let Some((_, rest)) = line.split_once("fn reg_") else {
                continue;
            };
            let name = format!("reg_{}", rest.split('(').next().unwrap_or_default());
            for number in numbers(&name) {
                out.entry(number).or_default().insert((name.clone(), place.clone()));
            }
        }
    }
    Ok(out)
}

/// The numbers that a test's name begins with: `reg_66_67_hostile` is about two.
fn numbers(name: &str) -> Vec<u32> {
    let words = name.trim_start_matches("reg_").split('_');
    words.map_while(|word| word.parse().ok()).collect()
}

fn render(tests: &Tests) -> String {
    let mut out = String::from("| number | tests | in |\n|---|---|---|\n");
    for (number, tests) in tests {
        let mut files: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (name, file) in tests {
            files.entry(file).or_default().push(format!("`{name}`"));
        }
        for (file, names) in files {
            out.push_str(&format!("| {number} | {} | `{file}` |\n", names.join(", ")));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn names_begin_with_their_numbers() {
        assert_eq!(numbers("reg_66_67_hostile_upstreams"), [66, 67]);
        assert_eq!(numbers("reg_45_chunks_in_http_1_0"), [45]);
    }
}
