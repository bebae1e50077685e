//! Forking and ending processes from a single-threaded program.
//!
//! Called by the sandbox launcher and the shim, both re-executed before any runtime or thread exists. [`fork`] checks
//! that, so a caller cannot get the undefined behaviour of forking with threads.

use std::io;
use std::os::fd::OwnedFd;

use nix::unistd::Pid;

/// Which side of a [`fork`] runs.
#[derive(Debug)]
pub enum Fork {
    /// The caller; the child's process id as the caller's namespace sees it.
    Parent(i32),
    /// The new process.
    Child,
}

/// `fork(2)` for a process with one thread.
///
/// # Errors
/// The kernel's, and `Unsupported` when this process has (or may have) more than one thread.
pub fn fork() -> io::Result<Fork> {
    if thread_count()? != 1 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "fork needs a process with a single thread",
        ));
    }
    // SAFETY: the process has one thread (checked above, and no other thread exists that could start one), so no lock can be
    // held by a thread that is missing in the child; the child may therefore run any code.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Fork::Parent(child.as_raw())),
        nix::unistd::ForkResult::Child => Ok(Fork::Child),
    }
}

/// Threads of this process.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn thread_count() -> io::Result<usize> {
    match std::fs::read_dir("/proc/self/task") {
        Ok(dir) => Ok(dir.count()),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("counting threads in /proc/self/task: {error}; is /proc mounted?"),
        )),
    }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// Exit code; 128 + signal when a signal ended it (as shells and the CRI report it).
    pub code: i32,
    /// The signal, when one ended it.
    pub signal: Option<i32>,
}

/// Collects one ended child without waiting; `None` when none has ended (or none exists).
///
/// # Errors
/// The kernel's.
pub fn reap() -> io::Result<Option<(i32, Exit)>> {
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    loop {
        return match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => Ok(Some((pid.as_raw(), Exit { code, signal: None }))),
            Ok(WaitStatus::Signaled(pid, signal, _)) => Ok(Some((
                pid.as_raw(),
                Exit {
                    code: 128 + signal as i32,
                    signal: Some(signal as i32),
                },
            ))),
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => Ok(None),
            Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

/// Waits for one child.
///
/// # Errors
/// The kernel's; `ECHILD` when it is no child of ours.
pub fn wait(pid: i32) -> io::Result<Exit> {
    use nix::sys::wait::{WaitStatus, waitpid};
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(Exit { code, signal: None }),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return Ok(Exit {
                    code: 128 + signal as i32,
                    signal: Some(signal as i32),
                });
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A descriptor that stays bound to this very process, also when its number is used again.
///
/// # Errors
/// `ESRCH` when the process is gone.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Sends SIGKILL through a [`pidfd`].
///
/// # Errors
/// `ESRCH` when the process has ended.
pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    Ok(rustix::process::pidfd_send_signal(
        pidfd,
        rustix::process::Signal::KILL,
    )?)
}

/// Ends this process at once, running no destructor or exit handler: for a forked child.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions; that buffers are not flushed and destructors do not run is the purpose.
    unsafe { libc::_exit(code) }
}

/// Makes the terminal `fd` the controlling terminal of this (new) session.
///
/// # Errors
/// The kernel's; `EPERM` when the process is no session leader.
pub fn set_controlling_terminal(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(fd)?)
}

/// Puts the descriptors on 0, 1 and 2, clearing close-on-exec there.
///
/// # Errors
/// The kernel's.
pub fn set_stdio(stdin: &OwnedFd, stdout: &OwnedFd, stderr: &OwnedFd) -> io::Result<()> {
    // First copies above 2, so that placing one does not overwrite another.
    let copies = [stdin, stdout, stderr].map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3));
    let [stdin, stdout, stderr] = copies;
    rustix::stdio::dup2_stdin(stdin?)?;
    rustix::stdio::dup2_stdout(stdout?)?;
    rustix::stdio::dup2_stderr(stderr?)?;
    Ok(())
}

/// Marks every descriptor from `first` up close-on-exec (`close_range(2)`), whatever this process has inherited.
///
/// # Errors
/// The kernel's; `ENOSYS` before Linux 5.11.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: CLOEXEC only marks descriptors; none is closed now, so no owner loses its descriptor.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Limits a resource (soft and hard).
///
/// # Errors
/// `EPERM` when the hard limit would be raised without privilege.
pub fn set_limit(resource: nix::sys::resource::Resource, value: u64) -> io::Result<()> {
    Ok(nix::sys::resource::setrlimit(resource, value, value)?)
}

/// Takes all the descriptors that the administrator allows: the soft limit becomes the hard one. Returns the limit in force.
///
/// # Errors
/// The kernel's.
pub fn raise_descriptors() -> io::Result<u64> {
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forking_with_threads_is_refused() {
        // The test harness itself runs threads.
        let error = fork().expect_err("must refuse");
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
