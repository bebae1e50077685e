//! What a server gives up at its start: capabilities, the gaining of any, system calls and files that its work does not need.
//!
//! Called by the programs of this project before they make their first thread; which files they need is theirs to say. It is
//! for good: nothing here can be taken back by the process, whoever controls it by then.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use nix::sys::resource::{Resource, setrlimit};

use crate::caps::{self, Caps};
use crate::process;
use crate::seccomp::{self, Filter};

/// The newest rules that are asked for; an older kernel enforces those of them that it knows.
const RULES: ABI = ABI::V6;

/// Files that stay reachable; everything else is closed for reading and writing alike, as far as the kernel has Landlock.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Files, and directories with all that is in them, to read. What does not exist is left out.
    pub read: Vec<PathBuf>,
    /// The same to read, write and make files in.
    pub write: Vec<PathBuf>,
}

/// What is left of a process's rights.
#[derive(Clone, Debug)]
pub struct Policy {
    /// System calls.
    pub filter: Filter,
    /// Files; `None` leaves them to users and modes.
    pub files: Option<Files>,
}

/// How much of a [`Policy`] the kernel enforces. Capabilities, no_new_privs and system calls always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enforced {
    /// Whether files are closed.
    pub files: FilesClosed,
    /// Whether the bounding set is empty: only a process with `CAP_SETPCAP` can empty it. Without, the set is as before,
    /// and no_new_privs keeps it from being used.
    pub bounding_set: bool,
}

/// What Landlock does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilesClosed {
    /// All that was asked for.
    Fully,
    /// The kernel knows a part of the rules.
    Partly,
    /// The kernel has no Landlock, or it is switched off.
    Not,
    /// Nothing was asked for.
    NotAsked,
}

/// Why a process cannot be confined. It must not go on: it would do so with all of its rights.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {reason}")]
pub struct SandboxError {
    step: &'static str,
    reason: String,
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> SandboxError {
    move |error| SandboxError {
        step,
        reason: error.to_string(),
    }
}

/// Confines this process, and all threads that it makes from now on.
///
/// # Errors
/// When there are other threads already (they would keep their rights), and when the kernel refuses a step.
pub fn enter(policy: &Policy) -> Result<Enforced, SandboxError> {
    match process::thread_count() {
        Ok(1) => {}
        Ok(count) => {
            return Err(SandboxError {
                step: "threads",
                reason: format!("{count} threads exist already"),
            });
        }
        Err(error) => return Err(failed("threads")(error)),
    }
    // Memory holds keys, and a core dump is a file.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| failed("core dumps")(e.into()))?;
    let bounding_set = match caps::limit_bounding_set(Caps::default()) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => bounding_set_is_empty(),
        Err(error) => return Err(failed("bounding set")(error)),
    };
    caps::set_current(Caps::default()).map_err(failed("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(|e| failed("no_new_privs")(e.into()))?;
    let files = match &policy.files {
        Some(files) => close_files(files).map_err(|error| SandboxError {
            step: "Landlock",
            reason: error.to_string(),
        })?,
        None => FilesClosed::NotAsked,
    };
    // Last, since it refuses what the steps before need.
    seccomp::install_filter(policy.filter).map_err(failed("system call filter"))?;
    Ok(Enforced { files, bounding_set })
}

fn bounding_set_is_empty() -> bool {
    (0..64u32).all(|bit| {
        let capability = rustix::thread::CapabilitySet::from_bits_retain(1 << bit);
        // Above the kernel's last capability there is an error.
        rustix::thread::capability_is_in_bounding_set(capability) != Ok(true)
    })
}

fn close_files(files: &Files) -> Result<FilesClosed, landlock::RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(RULES))?
        .scope(Scope::from_all(RULES))?
        .create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write =
        read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::RemoveFile | AccessFs::Truncate;
    for (paths, access) in [(&files.read, read), (&files.write, write)] {
        for path in paths {
            if let Some((file, access)) = opened(path, access) {
                rules = rules.add_rule(PathBeneath::new(file, access))?;
            }
        }
    }
    // An inode of `/proc` lives as long as somebody holds it, and the rule with it: this descriptor stays open.
    if let Some((own, access)) = opened(Path::new("/proc/self"), read) {
        rules = rules.add_rule(PathBeneath::new(&own, access))?;
        std::mem::forget(own);
    }
    let status = rules.restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => FilesClosed::Fully,
        RulesetStatus::PartiallyEnforced => FilesClosed::Partly,
        RulesetStatus::NotEnforced => FilesClosed::Not,
    })
}

/// The file and what of the access it can have; `None` for what is not there or not this user's to see.
fn opened(path: &Path, access: BitFlags<AccessFs>) -> Option<(OwnedFd, BitFlags<AccessFs>)> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).ok()?;
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file).ok()?.st_mode);
    let access = if kind.is_dir() {
        access
    } else {
        access & (AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate)
    };
    Some((file, access))
}
