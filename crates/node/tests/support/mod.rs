//! A test program that enters a cluster sandbox of its own and runs its cases there, one after the other.
//!
//! It needs no harness of cargo, because the shim and the sandbox launcher are this very binary re-executed before any
//! thread exists. Without the right to make namespaces it fails; it never skips.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mantlet_node::{sandbox, shim};

/// What each case gets.
#[derive(Clone)]
pub(crate) struct Context {
    /// Writable, the cluster's state directory.
    pub(crate) state_dir: PathBuf,
    /// This binary, which is also the shim.
    pub(crate) program: PathBuf,
    pub(crate) counter: Arc<AtomicU32>,
}

impl Context {
    /// A number that no other case has.
    pub(crate) fn unique(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }
}

pub(crate) type Case = (&'static str, fn(Context) -> Pin<Box<dyn Future<Output = ()>>>);

/// Runs `cases`; call it first thing in `main`.
pub(crate) fn main(cases: &[Case]) -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(shim::SUBCOMMAND) => return shim::shim_main(&args[2..]),
        Some(sandbox::SUBCOMMAND) => return sandbox::sandbox_main(&args[2..]),
        Some("inside") => return inside(cases, &args[2], args.get(3).map(String::as_str)),
        _ => {}
    }
    if args.iter().any(|arg| arg == "--list") {
        for (name, _) in cases {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let filter = args.iter().skip(1).find(|arg| !arg.starts_with("--")).cloned();
    let state = tempfile::tempdir().expect("a temporary directory");
    let program = std::env::current_exe().expect("own path");
    let bin_dir = program.parent().map(Path::to_owned).expect("own directory");
    // Mantlet's programs are beside the `deps` directory of the tests.
    let programs = bin_dir.parent().map(Path::to_owned).expect("target directory");
    let config = sandbox::SandboxConfig {
        state_dir: state.path().to_owned(),
        program: program.clone(),
        args: ["inside".to_owned(), state.path().display().to_string()]
            .into_iter()
            .chain(filter)
            .collect(),
        read_only_dirs: vec![programs],
    };
    let status = sandbox::command(&program, &config)
        .expect("command")
        .status()
        .expect("start the sandbox");
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn inside(cases: &[Case], state_dir: &str, filter: Option<&str>) -> ExitCode {
    let context = Context {
        state_dir: PathBuf::from(state_dir),
        program: std::env::current_exe().expect("own path"),
        counter: Arc::new(AtomicU32::new(1)),
    };
    let mut failed = Vec::new();
    for (name, case) in cases.iter().filter(|(name, _)| filter.is_none_or(|f| name.contains(f))) {
        print!("test {name} ... ");
        let context = context.clone();
        let started = std::time::Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("runtime")
                .block_on(async { tokio::time::timeout(std::time::Duration::from_secs(90), case(context)).await })
                .expect("the case took longer than 90 s");
        }));
        match result {
            Ok(()) => println!("ok ({} ms)", started.elapsed().as_millis()),
            Err(_) => {
                println!("FAILED");
                failed.push(*name);
            }
        }
    }
    if failed.is_empty() {
        println!("\ntest result: ok");
        ExitCode::SUCCESS
    } else {
        println!("\ntest result: FAILED: {}", failed.join(", "));
        ExitCode::from(101)
    }
}
