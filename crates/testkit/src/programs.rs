//! Programs of the machine that tests run for real. A missing one fails the test with the package to install.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Debian packages of programs whose name differs from the package's.
const PACKAGES: &[(&str, &str)] = &[
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("ss", "iproute2"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("h2load", "nghttp2-client"),
    ("nghttp", "nghttp2-client"),
    ("newuidmap", "uidmap"),
    ("redis-server", "redis-server"),
    ("etcd", "etcd-server"),
    ("nc", "netcat-openbsd"),
    ("dig", "bind9-dnsutils"),
    ("kubectl", "kubernetes-client"),
];

/// The path of a program. Looks in `PATH` and in the directories for administrators.
///
/// # Panics
/// When it is missing, naming the Debian package.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| {
            let package = PACKAGES
                .iter()
                .find(|(program, _)| *program == name)
                .map_or(name, |(_, package)| package);
            panic!("this test needs the program {name}: apt-get install {package}")
        })
}

/// The path of an Envoy binary: `$ENVOY`, or the one that `bench/get-envoy` keeps in the clone (it is fetched on first
/// use, so ask once before entering a network namespace, from which nothing can be fetched).
///
/// # Panics
/// When it cannot be had, saying why.
pub fn envoy() -> PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(find_envoy).clone()
}

fn find_envoy() -> PathBuf {
    if let Some(path) = std::env::var_os("ENVOY") {
        return PathBuf::from(path);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let script = root.join("bench/get-envoy");
    let out = Command::new(&script)
        .output()
        .unwrap_or_else(|e| panic!("this test needs Envoy; {} cannot be run: {e}", script.display()));
    let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
    assert!(
        out.status.success() && path.is_file(),
        "this test needs Envoy; {} failed: {}",
        script.display(),
        String::from_utf8_lossy(&out.stderr)
    );
    path
}
