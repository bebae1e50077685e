//! The forked children of a shim: a container's first process, or a command in a running container.
//!
//! Every function here runs in a child that either becomes the program or ends. What goes wrong is sent over the status
//! socket; its end without a message means that the program runs.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use mantlet_net::{caps, fdpass, process, seccomp};
use nix::sched::CloneFlags;
use nix::sys::resource::Resource;
use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};

use super::proto::{ContainerSpec, Identity, StartError};
use crate::rootfs;

/// What a child sends before it becomes the program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Status {
    /// The frame brings the container's mount namespace.
    MountNamespace,
    /// The frame brings the master side of the terminal.
    Terminal,
    /// It did not work; the child ends.
    Failed(StartError),
}

/// Standard streams for a child.
pub(super) enum Streams {
    /// Given descriptors: input, output, error.
    Pipes(OwnedFd, OwnedFd, OwnedFd),
    /// A terminal of the container, whose master goes to the shim.
    Terminal,
}

fn send(status: &OwnedFd, message: &Status, fd: Option<&OwnedFd>) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    fdpass::send_frame(status, &body, &fds)
}

/// The container's first process; never returns.
pub(super) fn run_container(spec: &ContainerSpec, streams: Streams, status: &OwnedFd) -> ! {
    let error = match prepare_container(spec, streams, status) {
        Ok(()) => exec(&spec.argv, &spec.env),
        Err(error) => StartError::Setup(error),
    };
    let _ = send(status, &Status::Failed(error), None);
    process::exit_now(128)
}

/// A command in the container whose mount namespace is given; never returns.
pub(super) fn run_command(
    container: &ContainerSpec,
    namespace: &OwnedFd,
    argv: &[String],
    streams: Streams,
    status: &OwnedFd,
) -> ! {
    let terminal = matches!(streams, Streams::Terminal);
    let error = match prepare_command(container, namespace, streams, status) {
        Ok(()) => {
            let mut env = container.env.clone();
            if terminal && !env.iter().any(|(name, _)| name == "TERM") {
                env.push(("TERM".into(), "xterm".into()));
            }
            exec(argv, &env)
        }
        Err(error) => StartError::Setup(error),
    };
    let _ = send(status, &Status::Failed(error), None);
    process::exit_now(126)
}

fn prepare_container(spec: &ContainerSpec, streams: Streams, status: &OwnedFd) -> Result<(), String> {
    begin()?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("making a mount namespace: {e}"))?;
    rootfs::build(&spec.root).map_err(|e| e.to_string())?;
    let namespace = open_namespace()?;
    send(status, &Status::MountNamespace, Some(&namespace)).map_err(|e| format!("sending the namespace: {e}"))?;
    drop(namespace);
    std::fs::write("/proc/self/oom_score_adj", spec.oom_score_adj.to_string())
        // A value below the parent's needs a capability of the outer namespace; the default stays then.
        .or_else(|e| {
            if e.kind() == io::ErrorKind::PermissionDenied {
                Ok(())
            } else {
                Err(e)
            }
        })
        .map_err(|e| format!("setting oom_score_adj: {e}"))?;
    finish(&spec.cwd, &spec.identity, streams, status)
}

fn prepare_command(
    container: &ContainerSpec,
    namespace: &OwnedFd,
    streams: Streams,
    status: &OwnedFd,
) -> Result<(), String> {
    begin()?;
    nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS).map_err(|e| format!("entering the container: {e}"))?;
    finish(&container.cwd, &container.identity, streams, status)
}

fn begin() -> Result<(), String> {
    SigSet::all()
        .thread_unblock()
        .map_err(|e| format!("unblocking signals: {e}"))?;
    nix::unistd::setsid().map_err(|e| format!("setsid: {e}"))?;
    Ok(())
}

fn open_namespace() -> Result<OwnedFd, String> {
    std::fs::File::open("/proc/self/ns/mnt")
        .map(OwnedFd::from)
        .map_err(|e| format!("opening the mount namespace: {e}"))
}

/// Streams, working directory and identity; afterwards this process can do no more than the program may.
fn finish(cwd: &Path, identity: &Identity, streams: Streams, status: &OwnedFd) -> Result<(), String> {
    let (stdin, stdout, stderr) = match streams {
        Streams::Pipes(stdin, stdout, stderr) => (stdin, stdout, stderr),
        Streams::Terminal => {
            let slave = open_terminal(status, identity)?;
            let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("duplicating the terminal: {e}"));
            (copy(&slave)?, copy(&slave)?, slave)
        }
    };
    process::set_stdio(&stdin, &stdout, &stderr).map_err(|e| format!("setting standard streams: {e}"))?;
    process::close_on_exec_from(3).map_err(|e| format!("marking descriptors: {e}"))?;
    // A core file would hold the keys of a proxy.
    process::set_limit(Resource::RLIMIT_CORE, 0).map_err(|e| format!("limiting core files: {e}"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    become_identity(identity)?;
    // As the container's user, so that it is refused what that user may not enter.
    std::env::set_current_dir(cwd).map_err(|e| format!("entering the working directory {}: {e}", cwd.display()))
}

fn open_terminal(status: &OwnedFd, identity: &Identity) -> Result<OwnedFd, String> {
    use rustix::pty::OpenptFlags;
    let fail = |e: rustix::io::Errno| format!("opening a terminal: {e}");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/ptmx", flags, rustix::fs::Mode::empty()).map_err(fail)?;
    rustix::pty::unlockpt(&master).map_err(fail)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .map_err(fail)?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(identity.uid)), None).map_err(fail)?;
    process::set_controlling_terminal(&slave).map_err(|e| format!("setting the controlling terminal: {e}"))?;
    send(status, &Status::Terminal, Some(&master)).map_err(|e| format!("sending the terminal: {e}"))?;
    Ok(slave)
}

fn become_identity(identity: &Identity) -> Result<(), String> {
    let (uid, gid) = (
        nix::unistd::Uid::from_raw(identity.uid),
        nix::unistd::Gid::from_raw(identity.gid),
    );
    let groups: Vec<_> = identity
        .groups
        .iter()
        .map(|id| nix::unistd::Gid::from_raw(*id))
        .collect();
    caps::limit_bounding_set(identity.caps).map_err(|e| format!("limiting capabilities: {e}"))?;
    if identity.no_new_privs {
        rustix::thread::set_no_new_privs(true).map_err(|e| format!("no_new_privs: {e}"))?;
    }
    if identity.seccomp {
        seccomp::install().map_err(|e| format!("installing the system call filter: {e}"))?;
    }
    nix::unistd::setgroups(&groups).map_err(|e| format!("setgroups: {e}"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(|e| format!("setgid {gid}: {e}"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(|e| format!("setuid {uid}: {e}"))?;
    let keep = if uid.is_root() {
        identity.caps
    } else {
        caps::Caps::default()
    };
    // Bits above the kernel's last capability cannot be had.
    let have = caps::effective().map_err(|e| format!("reading capabilities: {e}"))?;
    caps::set_current(caps::Caps(keep.0 & have.0)).map_err(|e| format!("dropping capabilities: {e}"))
}

/// Becomes the program, or says why not.
fn exec(argv: &[String], env: &[(String, String)]) -> StartError {
    let Some(name) = argv.first().filter(|name| !name.is_empty()) else {
        return StartError::Setup("no command".into());
    };
    let to_c = |text: &str| CString::new(text).map_err(|_| StartError::Setup(format!("{text:?} holds a NUL byte")));
    let args: Result<Vec<_>, _> = argv.iter().map(|arg| to_c(arg)).collect();
    let vars: Result<Vec<_>, _> = env
        .iter()
        .map(|(name, value)| to_c(&format!("{name}={value}")))
        .collect();
    let (args, vars) = match (args, vars) {
        (Ok(args), Ok(vars)) => (args, vars),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    let path = env
        .iter()
        .rev()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value);
    let candidates: Vec<_> = if name.contains('/') {
        vec![name.clone()]
    } else {
        path.split(':')
            .filter(|dir| !dir.is_empty())
            .map(|dir| format!("{dir}/{name}"))
            .collect()
    };
    let mut result = StartError::NotFound(name.clone());
    for candidate in candidates {
        let Ok(file) = CString::new(OsStr::new(&candidate).as_bytes()) else {
            continue;
        };
        match nix::unistd::execve(&file, &args, &vars) {
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => {}
            Err(nix::errno::Errno::EACCES) => result = StartError::NotExecutable(name.clone()),
            Err(error) => return StartError::Setup(format!("exec {candidate}: {error}")),
        }
    }
    result
}
