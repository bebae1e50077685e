//! What the process gives up before it serves: everything but its sockets, its threads and the files that it must read.
//!
//! `cli` calls [`enter`] before the log's thread and the runtime exist, and [`report`] when there is a log. How it is done is
//! `mantlet_net::sandbox`'s; which files a proxy needs is said here. Ports are bound later, so no capability may be
//! needed for them.

use std::path::{Path, PathBuf};

use mantlet_net::sandbox::{self, Enforced, Files, FilesClosed, Policy, SandboxError};
use mantlet_net::seccomp::Filter;

use crate::settings::Settings;

/// What name resolution, the roots of the operating system, and Istio's mounts are read from. `/etc` itself is not among
/// them: it holds more than a proxy's business.
const READ: [&str; 17] = [
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/ssl",
    "/etc/pki",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/etc/certs",
    "/etc/istio",
    "/var/run/secrets",
    "/dev/null",
    "/dev/urandom",
    "/sys/devices/system/cpu",
];

/// Where logs and copies of certificates may go.
const WRITE: [&str; 4] = ["/etc/istio/proxy", "/var/lib/istio/data", "/var/log", "/dev/null"];

/// Directories of many programs. A file in one of them is opened by itself, not with its neighbours.
const COMMON: [&str; 12] = [
    "/", "/bin", "/dev", "/etc", "/home", "/lib", "/root", "/run", "/tmp", "/usr", "/var", "/var/run",
];

/// Gives up what the process does not need. `None`: the settings say not to (`MANTLET_SANDBOX=off`).
///
/// # Errors
/// When the kernel refuses; the process must not go on.
pub fn enter(settings: &Settings) -> Result<Option<Enforced>, SandboxError> {
    if !settings.sandbox.on {
        return Ok(None);
    }
    if let Some(directory) = &settings.output_certs {
        // Only what exists can be left open. Whoever writes there says what is wrong with it.
        let _ = std::fs::create_dir_all(directory);
    }
    let policy = Policy {
        filter: Filter::Server,
        files: Some(files(settings)),
    };
    sandbox::enter(&policy).map(Some)
}

/// Says in the log what holds, once.
pub fn report(enforced: Option<Enforced>) {
    match enforced {
        None => tracing::warn!(
            target: "sandbox",
            "MANTLET_SANDBOX=off: the process keeps its capabilities, its system calls and its view of files"
        ),
        Some(Enforced {
            files: FilesClosed::Not,
            ..
        }) => tracing::warn!(
            target: "sandbox",
            "this kernel has no Landlock: files are protected by users and modes only; capabilities and system calls are gone"
        ),
        Some(enforced) => tracing::debug!(target: "sandbox", "{enforced:?}"),
    }
}

fn files(settings: &Settings) -> Files {
    let mut read: Vec<PathBuf> = READ.map(PathBuf::from).into();
    for file in [
        &settings.xds_root,
        &settings.ca_root,
        &settings.mesh_root,
        &settings.token,
    ] {
        read.push(around(file));
    }
    read.extend(settings.sandbox.read.iter().cloned());
    let mut write: Vec<PathBuf> = WRITE.map(PathBuf::from).into();
    write.extend(settings.output_certs.iter().cloned());
    write.extend(settings.sandbox.write.iter().cloned());
    Files { read, write }
}

/// The directory of a file: renewal puts a new file into its place, and mounted secrets are links beside it.
fn around(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !COMMON.iter().any(|common| Path::new(common) == parent) => parent.to_path_buf(),
        _ => file.to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_everybody_are_not_opened_for_one_file() {
        assert_eq!(
            around(Path::new("/var/run/secrets/tokens/t")),
            Path::new("/var/run/secrets/tokens")
        );
        for alone in ["/etc/root.pem", "/tmp/token", "/root.pem"] {
            assert_eq!(around(Path::new(alone)), Path::new(alone));
        }
    }
}
