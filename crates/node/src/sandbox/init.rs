//! Pid 1 inside the sandbox: root directory, network, and the care for the cluster's program.
//!
//! Called by the launcher in `sandbox.rs` only, in the last forked child.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mantlet_net::mount::{Attributes, set_attributes};
use mantlet_net::process::{self, Fork};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags};

use super::{SandboxConfig, SandboxError, Step};

/// The node's own address: on the loopback device, where the pods' routes end.
pub const NODE_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 244, 0, 1);
/// Service addresses; routed so that local connections get as far as the rule that translates them.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// The nft table of the node's own rules (pods that reach themselves through a Service).
pub const HAIRPIN_TABLE: &str = "mantlet_hairpin";

/// Directories of the host that programs need, read-only inside.
pub(crate) const SYSTEM_DIRS: [&str; 8] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc"];
/// Device nodes that are harmless and needed everywhere.
pub(crate) const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Kernel switches of the cluster's network namespace.
const SYSCTLS: [(&str, &str); 10] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    // Strict for each pod's interface, which takes this value when it is made: a pod cannot send from another's address.
    ("net/ipv4/conf/default/rp_filter", "1"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
];

/// Sets everything up, runs the program, returns its exit code.
pub(super) fn run(
    config: &SandboxConfig,
    dirs: &[(PathBuf, Option<OwnedFd>, bool)],
    lifeline: BorrowedFd<'_>,
    signals: SignalFd,
) -> Result<i32, SandboxError> {
    build_root(dirs)?;
    nix::unistd::sethostname("mantlet").step("setting the host name")?;
    set_up_network()?;
    let program = match process::fork().step("fork")? {
        Fork::Child => {
            let _ = SigSet::all().thread_unblock();
            process::close_on_exec_from(3).step("marking descriptors")?;
            let error = Command::new(&config.program).args(&config.args).exec();
            return Err(error).step(format!("running {}", config.program.display()));
        }
        Fork::Parent(pid) => pid,
    };
    watch(program, lifeline, &signals)
}

/// Reaps until the program ends; passes termination on; ends when the launcher is gone.
fn watch(program: i32, lifeline: BorrowedFd<'_>, signals: &SignalFd) -> Result<i32, SandboxError> {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        while let Some((pid, exit)) = process::reap().step("waiting for processes")? {
            if pid == program {
                return Ok(exit.code);
            }
        }
        let mut fds = [
            PollFd::from_borrowed_fd(lifeline, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).step("poll"),
        }
        if !fds[0].revents().is_empty() {
            // The launcher was killed. Returning ends pid 1, and with it everything inside.
            return Ok(128 + Signal::SIGKILL as i32);
        }
        if fds[1].revents().contains(PollFlags::IN)
            && let Some(info) = signals.read_signal().step("reading signals")?
            && info.ssi_signo != Signal::SIGCHLD as u32
        {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(program), Signal::SIGTERM);
        }
    }
}

fn build_root(dirs: &[(PathBuf, Option<OwnedFd>, bool)]) -> Result<(), SandboxError> {
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .step("making mounts private")?;
    // Any existing directory does that hides nothing of what is bound by its path below; the host's own directory is not
    // touched, since this mount exists only in here.
    let root = ["/mnt", "/tmp", "/srv", "/media", "/opt", "/run", "/var"]
        .iter()
        .map(Path::new)
        .find(|candidate| candidate.is_dir() && !dirs.iter().any(|(path, ..)| path.starts_with(candidate)))
        .ok_or_else(|| SandboxError::Arguments("no directory is free to build the root on".into()))?;
    mount_tmpfs(root, "mode=0755,size=256m")?;
    for name in SYSTEM_DIRS {
        bind_system_dir(Path::new("/"), root, name).step(format!("binding /{name}"))?;
    }
    for (path, mode) in [
        ("dev", 0o755),
        ("dev/pts", 0o755),
        ("dev/shm", 0o1777),
        ("proc", 0o555),
        ("sys", 0o555),
    ]
    .into_iter()
    .chain([
        ("tmp", 0o1777),
        ("run", 0o755),
        ("var", 0o755),
        ("var/tmp", 0o1777),
        ("root", 0o700),
    ]) {
        make_dir(&root.join(path), mode).step(format!("making /{path}"))?;
    }
    for name in DEVICES {
        let target = root.join("dev").join(name);
        std::fs::write(&target, b"").step(format!("making /dev/{name}"))?;
        rustix::mount::mount_bind(format!("/dev/{name}"), &target).step(format!("binding /dev/{name}"))?;
    }
    symlink("pts/ptmx", root.join("dev/ptmx")).step("linking /dev/ptmx")?;
    symlink("/proc/self/fd", root.join("dev/fd")).step("linking /dev/fd")?;
    mount(
        "devpts",
        &root.join("dev/pts"),
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620",
    )?;
    // Both need the host's own instance to be visible still, so they come before the change of root.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", &root.join("proc"), "proc", flags, "")?;
    mount("sysfs", &root.join("sys"), "sysfs", flags | MountFlags::RDONLY, "")?;
    for (path, fd, read_only) in dirs {
        let target = root.join(path.strip_prefix("/").unwrap_or(path));
        std::fs::create_dir_all(&target).step(format!("making {}", path.display()))?;
        match fd {
            Some(fd) => rustix::mount::move_mount(fd, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH),
            None => rustix::mount::mount_bind_recursive(path, &target),
        }
        .step(format!("binding {}", path.display()))?;
        let attributes = Attributes {
            read_only: *read_only,
            no_suid: true,
            no_dev: true,
            no_exec: false,
        };
        set_attributes(&target, attributes, true).step(format!("restricting {}", path.display()))?;
    }
    pivot(root)
}

/// Makes `root` the root directory of this mount namespace and detaches the old one.
pub(crate) fn pivot(root: &Path) -> Result<(), SandboxError> {
    rustix::process::chdir(root).step("entering the new root")?;
    rustix::process::pivot_root(".", ".").step("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("detaching the old root")?;
    rustix::process::chdir("/").step("entering the new root")
}

pub(crate) fn make_dir(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Binds `name` of `from` read-only into `root`, or repeats it where it is a link (as /bin is on merged systems).
pub(crate) fn bind_system_dir(from: &Path, root: &Path, name: &str) -> std::io::Result<()> {
    let source = from.join(name);
    let Ok(metadata) = std::fs::symlink_metadata(&source) else {
        return Ok(());
    };
    let target = root.join(name);
    if metadata.is_symlink() {
        return symlink(std::fs::read_link(&source)?, target);
    }
    make_dir(&target, 0o755)?;
    rustix::mount::mount_bind_recursive(&source, &target)?;
    set_attributes(
        &target,
        Attributes {
            read_only: true,
            no_suid: true,
            no_dev: true,
            no_exec: false,
        },
        true,
    )
}

pub(crate) fn mount(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> Result<(), SandboxError> {
    let data = std::ffi::CString::new(data).map_err(|_| SandboxError::Arguments("NUL in mount data".into()))?;
    rustix::mount::mount(source, target, kind, flags, data.as_c_str())
        .step(format!("mounting {kind} on {}", target.display()))
}

pub(crate) fn mount_tmpfs(target: &Path, data: &str) -> Result<(), SandboxError> {
    mount("tmpfs", target, "tmpfs", MountFlags::NODEV, data)
}

fn set_up_network() -> Result<(), SandboxError> {
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        match std::fs::write(&path, value) {
            // A kernel without IPv6 has nothing to switch off.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && name.contains("ipv6") => {}
            other => other.step(format!("writing {path}"))?,
        }
    }
    run_with_input(
        "ip",
        &["-batch", "-"],
        &format!(
            "link set lo up\naddr add {NODE_ADDRESS}/32 dev lo\nroute add {SERVICE_RANGE} dev lo src {NODE_ADDRESS}\n"
        ),
    )?;
    // A pod that reaches itself through a Service must see another source, or it would answer itself directly.
    run_with_input(
        "nft",
        &["-f", "-"],
        &format!(
            "table ip {HAIRPIN_TABLE} {{\n set pods {{ type ipv4_addr . ipv4_addr; }}\n chain postrouting {{\n  type nat hook postrouting priority 100; policy accept;\n  ip saddr . ip daddr @pods masquerade\n }}\n}}\n"
        ),
    )
}

/// Runs a program with text on its standard input; its messages become the error.
pub(crate) fn run_with_input(program: &'static str, args: &[&str], input: &str) -> Result<(), SandboxError> {
    let failed = |message: String| SandboxError::Program { program, message };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("{error}; install the packages iproute2 and nftables")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A broken pipe means that the program has ended; its message says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
