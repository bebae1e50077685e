//! Developer tasks that keep the house in order: `layers`, `tidy`, `bounds`.
//!
//! Called by `.ci/run` and by hand (`cargo run -p xtask -- <task>`). It knows nothing of the product's code beyond file
//! names and cargo metadata.

mod bounds;
mod layers;
mod threats;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let problems = match std::env::args().nth(1).as_deref() {
        Some("layers") => layers::check(&root),
        Some("tidy") => tidy::check(&root).and_then(|mut problems| {
            problems.extend(bounds::check(&root)?);
            problems.extend(threats::check(&root)?);
            Ok(problems)
        }),
        Some("bounds") => bounds::write(&root).and_then(|problems| {
            threats::write(&root)?;
            Ok(problems)
        }),
        other => {
            eprintln!(
                "unknown task {other:?}; tasks: layers (allowed dependencies), tidy (module heads, sizes, links, bounds, \
                 attacks), bounds (writes the tables of bounds and attacks)"
            );
            return ExitCode::from(2);
        }
    };
    match problems {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            for problem in &problems {
                eprintln!("{problem}");
            }
            eprintln!("{} problem(s)", problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
