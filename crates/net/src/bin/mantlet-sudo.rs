//! A minimal `sudo COMMAND…` for the proxy's container: runs a command as the container's root.
//!
//! It is installed set-user-id root (root of the cluster's user namespace) in the container's own file system. Whether
//! it works is the kernel's decision: with no_new_privs, as in every container that is not allowed to escalate, the
//! set-user-id bit does not count and this program refuses. It reads no configuration and passes no environment on but a
//! fixed path, the terminal and the language.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;

const SEARCH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn main() {
    let (code, message) = run();
    eprintln!("sudo: {message}");
    std::process::exit(code);
}

/// Returns only on failure.
fn run() -> (i32, String) {
    let args: Vec<CString> = std::env::args_os()
        .skip(1)
        .filter_map(|arg| CString::new(arg.into_vec()).ok())
        .collect();
    if !nix::unistd::geteuid().is_root() {
        let reason = match rustix::thread::no_new_privs() {
            Ok(true) => {
                "The \"no new privileges\" flag is set, which prevents sudo from running as root.\n\
                 sudo: If sudo is running in a container, you may need to adjust the container configuration to disable the flag."
            }
            _ => "/usr/bin/sudo must be owned by uid 0 and have the setuid bit set",
        };
        return (1, reason.to_owned());
    }
    let Some(command) = args.first() else {
        return (1, "usage: sudo command [argument …]".to_owned());
    };
    let name = command.to_string_lossy().into_owned();
    if name.starts_with('-') {
        return (
            1,
            format!("option {name} is not supported; usage: sudo command [argument …]"),
        );
    }
    let root = nix::unistd::Uid::from_raw(0);
    let group = nix::unistd::Gid::from_raw(0);
    let become_root = nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setresgid(group, group, group))
        .and_then(|()| nix::unistd::setresuid(root, root, root));
    if let Err(error) = become_root {
        return (1, format!("unable to change to root: {error}"));
    }
    let mut env: Vec<CString> = ["TERM", "LANG", "LC_ALL"]
        .iter()
        .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)))
        .chain([
            format!("PATH={SEARCH}"),
            "HOME=/root".into(),
            "USER=root".into(),
            "LOGNAME=root".into(),
        ])
        .filter_map(|pair| CString::new(pair).ok())
        .collect();
    env.sort();
    let candidates: Vec<String> = if name.contains('/') {
        vec![name.clone()]
    } else {
        SEARCH.split(':').map(|dir| format!("{dir}/{name}")).collect()
    };
    let mut problem = format!("{name}: command not found");
    for candidate in candidates {
        let Ok(path) = CString::new(candidate) else { continue };
        match nix::unistd::execve(&path, &args, &env) {
            Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => {}
            Err(error) => problem = format!("unable to execute {}: {error}", path.to_string_lossy()),
        }
    }
    (1, problem)
}
