//! A container's root directory: what it holds (pure) and how it is built (in the container's first process).
//!
//! The node agent makes a [`RootSpec`] from the pod; the shim's child calls [`build`] in a fresh mount namespace. The
//! skeleton is a tmpfs with read-only binds of the host's programs and libraries; what is not listed is not there, above
//! all no home directory, kubeconfig, cluster state or socket of the host.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use mantlet_net::mount::{Attributes, Kind, fd_path, open_beneath, open_in_root, open_target, set_attributes};
use rustix::mount::{MountFlags, MountPropagationFlags};
use serde::{Deserialize, Serialize};

use crate::sandbox::{self, SandboxError, Step};

/// Where programs of the image are put; shadows the host's directory of that name.
pub const PROGRAM_DIR: &str = "/usr/local/bin";
/// Their place in the skeleton before it is bound there.
const PROGRAM_STORE: &str = "opt/mantlet/bin";

/// Files and directories of the host's `/etc` that programs need and that say nothing about the host.
const ETC: [&str; 18] = [
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "magic",
    "magic.mime",
    "mime.types",
    "profile",
    "protocols",
    "rpc",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
];

/// Kernel files that a container may not change or read.
const READ_ONLY_PROC: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];
const MASKED_PROC: [&str; 7] = [
    "kcore",
    "keys",
    "latency_stats",
    "timer_list",
    "sched_debug",
    "acpi",
    "scsi",
];

/// A bind mount, for a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bind {
    /// Directory or file on the node.
    pub source: PathBuf,
    /// Path below `source`, resolved without leaving it.
    pub sub_path: Option<String>,
    /// Absolute path in the container.
    pub target: PathBuf,
    /// No writes.
    pub read_only: bool,
}

/// A file made in the skeleton.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Absolute path in the container.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// Permissions.
    pub mode: u32,
}

/// A program put into [`PROGRAM_DIR`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// File name there.
    pub name: String,
    /// What it is.
    pub source: ProgramSource,
}

/// Where a program comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ProgramSource {
    /// The node's file, bound read-only.
    Bind(PathBuf),
    /// A copy that belongs to the container's root and runs with its identity (set-user-id).
    SetUidCopy(PathBuf),
    /// A link to another program there.
    Link(String),
}

/// Everything about one container's root directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RootSpec {
    /// An empty directory on the node to mount on; in the container's own mount namespace only.
    pub mountpoint: PathBuf,
    /// Limit of what the container can write outside volumes, bytes.
    pub size: u64,
    /// No writes outside volumes.
    pub read_only: bool,
    /// Leaves `/proc` and `/sys` writable.
    pub privileged: bool,
    /// Programs of the image.
    pub programs: Vec<Program>,
    /// Generated files.
    pub files: Vec<FileEntry>,
    /// Home directory, made for the container's user: path, uid, gid.
    pub home: (PathBuf, u32, u32),
    /// The working directory, made when it is absent: path, uid, gid.
    pub working_dir: (PathBuf, u32, u32),
    /// Volumes, parents before children.
    pub binds: Vec<Bind>,
}

/// Builds the root and changes into it. Must run in a mount namespace of its own; on an error the process must end.
///
/// # Errors
/// [`SandboxError::Step`] naming the path.
pub fn build(spec: &RootSpec) -> Result<(), SandboxError> {
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .step("making mounts private")?;
    let root = spec.mountpoint.as_path();
    sandbox::mount_tmpfs(
        root,
        &format!("mode=0755,size={},nr_inodes=200000", spec.size.max(1 << 20)),
    )?;
    for name in sandbox::SYSTEM_DIRS.iter().filter(|name| **name != "etc") {
        sandbox::bind_system_dir(Path::new("/"), root, name).step(format!("binding /{name}"))?;
    }
    for (path, mode) in [
        ("dev", 0o755),
        ("etc", 0o755),
        ("etc/ssl", 0o755),
        ("home", 0o755),
        ("media", 0o755),
        ("mnt", 0o755),
        ("opt", 0o755),
        (PROGRAM_STORE, 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("run", 0o755),
        ("run/lock", 0o1777),
        ("srv", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("var", 0o755),
        ("var/cache", 0o755),
        ("var/lib", 0o755),
        ("var/log", 0o755),
        ("var/tmp", 0o1777),
    ] {
        sandbox::make_dir(&root.join(path), mode).step(format!("making /{path}"))?;
    }
    symlink("../run", root.join("var/run")).step("linking /var/run")?;
    build_dev(root)?;
    build_proc(root, spec.privileged)?;
    for name in ETC {
        bind_etc(root, name).step(format!("binding /etc/{name}"))?;
    }
    let root_fd = std::fs::File::open(root).step("opening the new root")?;
    install_programs(root, &spec.programs)?;
    for file in &spec.files {
        let path = root.join(file.path.strip_prefix("/").unwrap_or(&file.path));
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).step(format!("making {}", parent.display()))?;
        }
        std::fs::write(&path, &file.text)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(file.mode)))
            .step(format!("writing {}", file.path.display()))?;
    }
    let (home, uid, gid) = &spec.home;
    if home != Path::new("/") {
        make_owned(&root_fd, home, *uid, *gid).step(format!("making {}", home.display()))?;
    }
    for bind in &spec.binds {
        mount_volume(&root_fd, bind).step(format!("mounting a volume on {}", bind.target.display()))?;
    }
    // Only now, since a volume may lie within a read-only one and needs its mount point there. The order does not matter:
    // attributes are those of one mount.
    for bind in &spec.binds {
        protect_volume(&root_fd, bind).step(format!("protecting the volume on {}", bind.target.display()))?;
    }
    let (dir, uid, gid) = &spec.working_dir;
    make_owned(&root_fd, dir, *uid, *gid).step(format!("making the working directory {}", dir.display()))?;
    sandbox::pivot(root)?;
    if spec.read_only {
        set_attributes(
            Path::new("/"),
            Attributes {
                read_only: true,
                ..Attributes::default()
            },
            false,
        )
        .step("making the root read-only")?;
    }
    Ok(())
}

fn build_dev(root: &Path) -> Result<(), SandboxError> {
    let dev = root.join("dev");
    sandbox::mount("tmpfs", &dev, "tmpfs", MountFlags::NOSUID, "mode=0755,size=64k")?;
    for name in sandbox::DEVICES {
        let target = dev.join(name);
        std::fs::write(&target, b"").step(format!("making /dev/{name}"))?;
        rustix::mount::mount_bind(format!("/dev/{name}"), &target).step(format!("binding /dev/{name}"))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlink(target, dev.join(name)).step(format!("linking /dev/{name}"))?;
    }
    let no = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for name in ["pts", "shm"] {
        sandbox::make_dir(&dev.join(name), 0o755).step(format!("making /dev/{name}"))?;
    }
    // Terminals get the group tty, as everywhere.
    sandbox::mount(
        "devpts",
        &dev.join("pts"),
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    sandbox::mount("tmpfs", &dev.join("shm"), "tmpfs", no, "mode=1777,size=64m")
}

fn build_proc(root: &Path, privileged: bool) -> Result<(), SandboxError> {
    let no = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let proc = root.join("proc");
    sandbox::mount("proc", &proc, "proc", no, "")?;
    let sys = root.join("sys");
    // Read-only for privileged containers too: the sandbox has no writable one, and the kernel lets none be made then.
    sandbox::mount("sysfs", &sys, "sysfs", no | MountFlags::RDONLY, "")?;
    if privileged {
        return Ok(());
    }
    for name in READ_ONLY_PROC {
        let path = proc.join(name);
        if path.exists() {
            rustix::mount::mount_bind(&path, &path)
                .map_err(io::Error::from)
                .and_then(|()| {
                    set_attributes(
                        &path,
                        Attributes {
                            read_only: true,
                            ..Attributes::default()
                        },
                        false,
                    )
                })
                .step(format!("protecting /proc/{name}"))?;
        }
    }
    for name in MASKED_PROC {
        let path = proc.join(name);
        match std::fs::symlink_metadata(&path) {
            Err(_) => {}
            Ok(metadata) if metadata.is_dir() => {
                sandbox::mount("tmpfs", &path, "tmpfs", no | MountFlags::RDONLY, "size=0")?
            }
            Ok(_) => rustix::mount::mount_bind("/dev/null", &path).step(format!("masking /proc/{name}"))?,
        }
    }
    Ok(())
}

fn bind_etc(root: &Path, name: &str) -> io::Result<()> {
    let source = Path::new("/etc").join(name);
    let Ok(metadata) = std::fs::symlink_metadata(&source) else {
        return Ok(());
    };
    let target = root.join("etc").join(name);
    if metadata.is_symlink() {
        return symlink(std::fs::read_link(&source)?, target);
    }
    if metadata.is_dir() {
        sandbox::make_dir(&target, 0o755)?;
    } else {
        std::fs::write(&target, b"")?;
    }
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

fn install_programs(root: &Path, programs: &[Program]) -> Result<(), SandboxError> {
    let store = root.join(PROGRAM_STORE);
    for program in programs {
        let target = store.join(&program.name);
        let step = format!("installing {}", program.name);
        match &program.source {
            ProgramSource::Bind(source) => {
                std::fs::write(&target, b"").step(&step)?;
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).step(&step)?;
                rustix::mount::mount_bind(source, &target).step(format!("{step} from {}", source.display()))?;
                let attributes = Attributes {
                    read_only: true,
                    no_suid: true,
                    no_dev: true,
                    no_exec: false,
                };
                set_attributes(&target, attributes, false).step(&step)?;
            }
            ProgramSource::SetUidCopy(source) => {
                std::fs::copy(source, &target).step(format!("{step} from {}", source.display()))?;
                std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o4755)).step(&step)?;
            }
            ProgramSource::Link(to) => symlink(to, &target).step(&step)?,
        }
    }
    // The directory exists wherever /usr/local does; it is read-only, so it cannot be made here.
    let target = root.join(PROGRAM_DIR.trim_start_matches('/'));
    rustix::mount::mount_bind_recursive(&store, &target).step(format!("putting programs into {PROGRAM_DIR}"))
}

fn make_owned(root: &std::fs::File, path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let exists = relative.as_os_str().is_empty() || root_has(root, relative);
    let fd = open_target(root, path, Kind::Directory)?;
    if !exists {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        rustix::fs::chownat(fd, "", Some(uid), Some(gid), rustix::fs::AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

fn root_has(root: &std::fs::File, relative: &Path) -> bool {
    open_in_root(root, relative).is_ok()
}

fn mount_volume(root: &std::fs::File, bind: &Bind) -> io::Result<()> {
    let mut source = rustix::fs::open(
        &bind.source,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    if let Some(sub_path) = bind.sub_path.as_deref().filter(|path| !path.is_empty()) {
        source = match open_beneath(&source, Path::new(sub_path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                open_target(&source, Path::new(sub_path), Kind::Directory)?
            }
            other => other?,
        };
    }
    let is_dir = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(source.as_fd())?.st_mode).is_dir();
    let target = open_target(root, &bind.target, if is_dir { Kind::Directory } else { Kind::File })?;
    // Not recursive: what is mounted within a source would escape the attributes that follow.
    Ok(rustix::mount::mount_bind(fd_path(&source), fd_path(&target))?)
}

/// Takes from a mounted volume what its pod must not do there.
fn protect_volume(root: &std::fs::File, bind: &Bind) -> io::Result<()> {
    let relative = bind.target.strip_prefix("/").unwrap_or(&bind.target);
    let mounted = open_in_root(root, relative)?;
    let attributes = Attributes {
        read_only: bind.read_only,
        no_suid: true,
        no_dev: true,
        no_exec: false,
    };
    set_attributes(Path::new(&fd_path(&mounted)), attributes, false)
}
