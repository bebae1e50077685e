//! Developer tasks that keep the house in order: `layers`, `tidy`.
//!
//! Called by `.ci/run` and by hand (`cargo run -p xtask -- <task>`). It knows nothing of the product's code beyond file
//! names and cargo metadata.

mod layers;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let problems = match std::env::args().nth(1).as_deref() {
        Some("layers") => layers::check(&root),
        Some("tidy") => tidy::check(&root),
        other => {
            eprintln!(
                "unknown task {other:?}; tasks: layers (allowed dependencies), tidy (module heads, sizes, links)"
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
