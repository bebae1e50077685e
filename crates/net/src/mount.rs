//! Mount helpers that rustix lacks: attributes of whole mount trees, and targets that cannot escape a root directory.
//!
//! Called by the sandbox and by the shim while it builds a container's root file system.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Attributes that [`set_attributes`] adds to a mount.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Attributes {
    /// No writes through this mount.
    pub read_only: bool,
    /// Set-user-id bits and file capabilities do not count.
    pub no_suid: bool,
    /// Device nodes do not work.
    pub no_dev: bool,
    /// Nothing can be executed.
    pub no_exec: bool,
}

/// Adds attributes to the mount at `path`; with `recursive` to all mounts below as well (`mount_setattr(2)`, Linux 5.12).
/// Unlike a remount it never clears a flag, so it also works on mounts that are locked by an outer user namespace.
///
/// # Errors
/// The kernel's, and `InvalidInput` for a path with a NUL byte.
pub fn set_attributes(path: &Path, attributes: Attributes, recursive: bool) -> io::Result<()> {
    let mut bits = 0u64;
    for (on, bit) in [
        (attributes.read_only, libc::MOUNT_ATTR_RDONLY),
        (attributes.no_suid, libc::MOUNT_ATTR_NOSUID),
        (attributes.no_dev, libc::MOUNT_ATTR_NODEV),
        (attributes.no_exec, libc::MOUNT_ATTR_NOEXEC),
    ] {
        if on {
            bits |= bit;
        }
    }
    let attr = libc::mount_attr {
        attr_set: bits,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is NUL-terminated and `attr` outlives the call; the size passed is that of the struct.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What [`open_target`] makes when the path does not exist.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// An empty regular file, to bind a file on.
    File,
}

/// Opens (and makes, with its parents) `path` below `root`, resolving every symbolic link inside `root`: what a container
/// has put into a volume cannot lead a mount outside.
///
/// # Errors
/// The kernel's; `ELOOP` and `EXDEV` where a path tries to leave.
pub fn open_target(root: impl AsFd, path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let components: Vec<_> = path
        .components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut current = open_within(
        &root,
        Path::new("."),
        OFlags::PATH | OFlags::DIRECTORY,
        ResolveFlags::IN_ROOT,
    )?;
    let mut walked = std::path::PathBuf::from("/");
    for (index, name) in components.iter().enumerate() {
        let last = index + 1 == components.len();
        walked.push(name);
        let flags = if last {
            OFlags::PATH
        } else {
            OFlags::PATH | OFlags::DIRECTORY
        };
        let open = || open_within(&root, &walked, flags, ResolveFlags::IN_ROOT);
        current = match open() {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => {
                if last && kind == Kind::File {
                    rustix::fs::openat(
                        &current,
                        *name,
                        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                        Mode::from_raw_mode(0o644),
                    )?;
                } else {
                    rustix::fs::mkdirat(&current, *name, Mode::from_raw_mode(0o755))?;
                }
                open()?
            }
            Err(error) => return Err(error.into()),
        };
    }
    Ok(current)
}

/// Opens an existing `path` below `root` without ever leaving it (for `subPath`).
///
/// # Errors
/// The kernel's.
pub fn open_beneath(root: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    Ok(open_within(root, relative, OFlags::PATH, resolve)?)
}

/// Opens an existing `path` as seen by a process whose root is `root`: no symbolic link leads outside.
///
/// # Errors
/// The kernel's.
pub fn open_in_root(root: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    Ok(open_within(root, path, OFlags::PATH, ResolveFlags::IN_ROOT)?)
}

/// `openat2` confined to `root`. The kernel answers `EAGAIN` when any mount or rename on the machine happens while it walks a `..`
/// (openat2(2)), which is common where several pods start at once: the walk is repeated, for as long as chance can
/// explain the failures.
fn open_within(root: impl AsFd, path: &Path, flags: OFlags, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    const ATTEMPTS: usize = 1000;
    for _ in 1..ATTEMPTS {
        match rustix::fs::openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(rustix::io::Errno::AGAIN) => std::thread::yield_now(),
            other => return other,
        }
    }
    rustix::fs::openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// The `/proc` path of a descriptor, for mount calls that want a path.
#[must_use]
pub fn fd_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_cannot_lead_a_target_outside_its_root() {
        let outside = tempfile::tempdir().expect("dir");
        let root = tempfile::tempdir().expect("dir");
        std::os::unix::fs::symlink(outside.path(), root.path().join("evil")).expect("link");
        let fd = std::fs::File::open(root.path()).expect("open");
        // Resolved inside the root, the link points to a path that does not exist there; nothing is made outside.
        assert!(open_target(&fd, Path::new("/evil/made"), Kind::Directory).is_err());
        assert!(std::fs::read_dir(outside.path()).expect("list").next().is_none());
        assert!(open_beneath(&fd, Path::new("evil")).is_err());
        let made = open_target(&fd, Path::new("/a/b/c.txt"), Kind::File).expect("make");
        assert_eq!(std::fs::metadata(fd_path(&made)).expect("stat").len(), 0);
        assert!(root.path().join("a/b/c.txt").is_file());
    }
}
