//! What `cluster up` needs of the machine, checked before anything is started, with the commands that provide it.

use std::path::Path;

use anyhow::{Result, bail};

/// Programs and the Debian packages that hold them.
const PROGRAMS: [(&str, &str); 2] = [("ip", "iproute2"), ("nft", "nftables")];
const USER_PROGRAMS: [(&str, &str); 2] = [("newuidmap", "uidmap"), ("newgidmap", "uidmap")];

/// Fails with a list of everything that is missing.
///
/// # Errors
/// Something is missing; the text says what an administrator has to run.
pub fn check() -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let mut problems = Vec::new();
    let mut commands = Vec::new();
    let mut packages = Vec::new();
    let wanted = PROGRAMS.iter().chain(USER_PROGRAMS.iter().filter(|_| !root));
    for (program, package) in wanted {
        if find(program).is_none() {
            problems.push(format!("the program {program} is missing"));
            if !packages.contains(package) {
                packages.push(*package);
            }
        }
    }
    if !packages.is_empty() {
        commands.push(format!("apt-get install -y {}", packages.join(" ")));
    }
    if number("/proc/sys/user/max_user_namespaces") == Some(0) {
        problems.push("user namespaces are switched off".to_owned());
        commands.push("sysctl -w user.max_user_namespaces=15000".to_owned());
    }
    if !root {
        if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
            problems.push("only root may make user namespaces".to_owned());
            commands.push("sysctl -w kernel.unprivileged_userns_clone=1".to_owned());
        }
        if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
            problems.push("AppArmor restricts user namespaces".to_owned());
            commands.push("sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned());
        }
        let uid = nix::unistd::geteuid();
        let user = nix::unistd::User::from_uid(uid)
            .ok()
            .flatten()
            .map_or_else(|| uid.to_string(), |user| user.name);
        for (file, option) in [("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")] {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            if !has_range(&text, &user, uid.as_raw()) {
                problems.push(format!("{file} gives {user} no range of 65536 ids"));
                commands.push(format!("usermod {option} 100000-165535 {user}"));
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!(
        "this machine cannot run a cluster yet:\n  - {}\nAn administrator can change that with:\n  {}",
        problems.join("\n  - "),
        commands
            .iter()
            .map(|command| format!("sudo {command}"))
            .collect::<Vec<_>>()
            .join("\n  ")
    );
}

/// The caller's search path, and the directories of administration programs, which ordinary users often lack.
pub fn search_path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into))
        .collect();
    std::env::join_paths(dirs).unwrap_or(path)
}

fn find(program: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&search_path())
        .map(|dir| dir.join(program))
        .find(|candidate| Path::is_file(candidate))
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn has_range(text: &str, user: &str, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next();
        let count = fields.nth(1).and_then(|count| count.parse::<u64>().ok());
        (owner == Some(user) || owner == Some(uid.to_string().as_str())) && count.is_some_and(|count| count >= 65536)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_name_and_by_id() {
        assert!(has_range("alice:100000:65536\n", "alice", 1000));
        assert!(has_range("1000:100000:65536\n", "alice", 1000));
        assert!(!has_range("alice:100000:1000\n", "alice", 1000));
        assert!(!has_range("bob:100000:65536\nalice\n", "alice", 1000));
    }
}
