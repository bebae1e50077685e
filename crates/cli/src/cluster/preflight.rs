//! What `cluster up` needs of the machine, found out before anything is made, with the commands that provide it.
//!
//! What can be read is read first ([`missing`]). Then the namespaces are made for trial, with nothing in them; if that fails,
//! [`diagnose`] says which property of the machine is in the way. `up` calls [`check`]; nothing is left behind by it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use mantlet_net::userns::{ID_COUNT, subordinate_range};
use mantlet_node::sandbox::{self, SandboxConfig};

/// Programs and the Debian packages that hold them.
const PROGRAMS: [(&str, &str); 2] = [("ip", "iproute2"), ("nft", "nftables")];
const USER_PROGRAMS: [(&str, &str); 2] = [("newuidmap", "uidmap"), ("newgidmap", "uidmap")];
/// Kinds of namespaces that a cluster consists of, each with a limit in `/proc/sys/user`.
const NAMESPACES: [&str; 6] = ["user", "mnt", "net", "pid", "ipc", "uts"];
/// Below `/proc`, directories of the kernel that are always empty: what is mounted there hides nothing.
const EMPTY_IN_PROC: [&str; 2] = ["/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd"];

/// Something that is in the way, and the command that an administrator runs to change it, if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Missing {
    what: String,
    command: Option<String>,
}

fn missing_with(what: impl Into<String>, command: impl Into<String>) -> Missing {
    Missing {
        what: what.into(),
        command: Some(command.into()),
    }
}

/// Fails with everything that is missing.
///
/// # Errors
/// Something is missing; the text says what an administrator has to run.
pub fn check() -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let mut problems = missing(root);
    if problems.is_empty() {
        let Some(error) = trial()? else { return Ok(()) };
        problems = diagnose(&error, &Facts::read(root));
        problems.insert(
            0,
            Missing {
                what: error,
                command: None,
            },
        );
    }
    bail!("{}", explain(&problems));
}

fn explain(problems: &[Missing]) -> String {
    let mut text = "this machine cannot run a cluster yet:".to_owned();
    let mut said = BTreeSet::new();
    for problem in problems {
        text.push_str(&format!("\n  - {}", problem.what.replace('\n', "\n    ")));
        if let Some(command) = problem.command.as_ref().filter(|command| said.insert(*command)) {
            text.push_str(&format!("\n      sudo {command}"));
        }
    }
    if !said.is_empty() {
        text.push_str("\nThe commands are for an administrator; then run this again.");
    }
    text
}

/// What can be seen to be missing.
fn missing(root: bool) -> Vec<Missing> {
    let mut problems = Vec::new();
    for (program, package) in PROGRAMS.iter().chain(USER_PROGRAMS.iter().filter(|_| !root)) {
        if find(program).is_none() {
            problems.push(missing_with(
                format!("the program {program} is missing"),
                format!("apt-get install -y {package}"),
            ));
        }
    }
    for kind in NAMESPACES {
        if number(&format!("/proc/sys/user/max_{kind}_namespaces")) == Some(0) {
            problems.push(missing_with(
                format!("{kind} namespaces are switched off"),
                format!("sysctl -w user.max_{kind}_namespaces=15000"),
            ));
        }
    }
    if root {
        return problems;
    }
    if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        problems.push(missing_with(
            "only root may make user namespaces",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ));
    }
    let uid = nix::unistd::geteuid();
    let user = nix::unistd::User::from_uid(uid)
        .ok()
        .flatten()
        .map_or_else(|| uid.to_string(), |user| user.name);
    // Who comes from a directory service is in no file that usermod could look up.
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let local = accounts.lines().any(|line| line.split(':').next() == Some(&user));
    for (file, option) in [("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if subordinate_range(&text, &user, uid.as_raw()).is_none() {
            let first = free_range(&text);
            let command = if local {
                format!("usermod {option} {first}-{} {user}", first + ID_COUNT - 1)
            } else {
                format!("sh -c 'echo {user}:{first}:{ID_COUNT} >> {file}'")
            };
            problems.push(missing_with(
                format!(
                    "{file} gives {user} no range of {ID_COUNT} ids{}",
                    smaller(&text, &user)
                ),
                command,
            ));
        }
    }
    problems
}

/// ` (only 1000)` for a user whose ranges are too small.
fn smaller(text: &str, user: &str) -> String {
    let counts = text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        (fields.next()? == user)
            .then(|| fields.nth(1)?.parse::<u32>().ok())
            .flatten()
    });
    counts
        .max()
        .map_or_else(String::new, |count| format!(" (only {count})"))
}

/// The first id above everybody's ranges, from 100000 on, in steps of a range.
fn free_range(text: &str) -> u32 {
    let ends = text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':').skip(1);
        let (start, count): (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        start.checked_add(count)
    });
    let end = ends.max().unwrap_or(0).max(100_000);
    100_000 + (end - 100_000).div_ceil(ID_COUNT) * ID_COUNT
}

/// Makes an empty sandbox; the answer is why that failed.
fn trial() -> Result<Option<String>> {
    let state = tempfile::tempdir().context("a directory for a trial of the namespaces")?;
    let config = SandboxConfig {
        state_dir: state.path().to_owned(),
        program: "/bin/true".into(),
        args: Vec::new(),
        read_only_dirs: Vec::new(),
    };
    let output = sandbox::command(&std::env::current_exe()?, &config)?
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output()
        .context("trying to make the namespaces")?;
    if output.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().trim_start_matches("mantlet: ");
    Ok(Some(if text.is_empty() {
        format!("the namespaces cannot be made ({})", output.status)
    } else {
        text.to_owned()
    }))
}

/// Properties of the machine and of this process that are known to be in the way of namespaces.
#[derive(Clone, Debug, Default)]
struct Facts {
    apparmor: bool,
    no_new_privs: bool,
    system_call_filter: bool,
    /// `newuidmap` and `newgidmap` that run with no more rights than their caller.
    powerless: Vec<PathBuf>,
    /// Those on a mount that takes such rights away, with the mount.
    nosuid: Vec<(PathBuf, String)>,
    /// What is mounted over parts of `/proc`.
    hidden: Vec<String>,
    proc_read_only: bool,
    no_sysfs: bool,
}

impl Facts {
    fn read(root: bool) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned()).unwrap_or_default()
        };
        let mounts = mounts(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
        // Root writes the maps itself.
        let helpers = USER_PROGRAMS
            .iter()
            .filter(|_| !root)
            .filter_map(|(program, _)| find(program));
        let helpers: Vec<PathBuf> = helpers.filter_map(|path| path.canonicalize().ok()).collect();
        let proc_mount = mounts.iter().rev().find(|mount| mount.target == "/proc");
        Self {
            apparmor: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1),
            no_new_privs: field("NoNewPrivs") == "1",
            system_call_filter: field("Seccomp") == "2",
            nosuid: helpers
                .iter()
                .filter_map(|path| {
                    let mount = mounts.iter().rev().filter(|mount| path.starts_with(&mount.target));
                    let mount = mount.max_by_key(|mount| mount.target.len())?;
                    mount.has("nosuid").then(|| (path.clone(), mount.target.clone()))
                })
                .collect(),
            powerless: helpers.into_iter().filter(|path| !has_power(path)).collect(),
            hidden: mounts
                .iter()
                .map(|mount| mount.target.clone())
                .filter(|target| target.starts_with("/proc/") && !EMPTY_IN_PROC.contains(&target.as_str()))
                .collect(),
            proc_read_only: proc_mount.is_some_and(|mount| mount.has("ro")),
            no_sysfs: !mounts.iter().any(|mount| mount.kind == "sysfs"),
        }
    }
}

/// Set-user-id root, or with file capabilities.
fn has_power(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let set_uid = std::fs::metadata(path).is_ok_and(|file| file.uid() == 0 && file.mode() & 0o4000 != 0);
    let mut value = [0u8; 64];
    set_uid || rustix::fs::getxattr(path, "security.capability", &mut value).is_ok_and(|length| length > 0)
}

struct Mount {
    target: String,
    options: String,
    kind: String,
}

impl Mount {
    fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|one| one == option)
    }
}

/// Lines of `/proc/self/mountinfo`.
fn mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let mut fields = line.split(' ').skip(4);
        let (target, options) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let kind = fields.skip_while(|field| *field != "-").nth(1)?.to_owned();
        Some(Mount { target, options, kind })
    };
    text.lines().filter_map(parse).collect()
}

/// The facts that explain why the trial has failed, each with what changes it.
fn diagnose(error: &str, facts: &Facts) -> Vec<Missing> {
    let mut problems = Vec::new();
    if facts.apparmor {
        problems.push(missing_with(
            "AppArmor restricts user namespaces",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ));
    }
    if facts.no_new_privs {
        problems.push(Missing {
            what: "this process may not gain privileges (no_new_privs), so newuidmap cannot work: start it from a session without \
                   that (containers: --security-opt no-new-privileges=false; systemd: NoNewPrivileges=no)"
                .to_owned(),
            command: None,
        });
    }
    for (program, mount) in &facts.nosuid {
        problems.push(missing_with(
            format!("{} is on {mount}, which is mounted with nosuid", program.display()),
            format!("mount -o remount,suid {mount}"),
        ));
    }
    for program in &facts.powerless {
        problems.push(missing_with(
            format!("{} is not set-user-id root", program.display()),
            format!("chmod u+s {}", program.display()),
        ));
    }
    if !facts.hidden.is_empty() {
        let hidden = facts.hidden.join(" ");
        problems.push(missing_with(
            format!("parts of /proc are hidden, so the kernel lets no new one be mounted: {hidden} (containers: --security-opt systempaths=unconfined)"),
            format!("umount {hidden}"),
        ));
    }
    if facts.proc_read_only {
        problems.push(missing_with("/proc is read-only", "mount -o remount,rw /proc"));
    }
    if facts.no_sysfs {
        problems.push(missing_with("there is no /sys", "mount -t sysfs sysfs /sys"));
    }
    if error.contains("making namespaces") && error.contains("No space left on device") {
        problems.extend(NAMESPACES.iter().filter_map(|kind| {
            let limit = number(&format!("/proc/sys/user/max_{kind}_namespaces"))?;
            (limit < 1000).then(|| {
                missing_with(
                    format!("there may be only {limit} {kind} namespaces"),
                    format!("sysctl -w user.max_{kind}_namespaces=15000"),
                )
            })
        }));
    }
    if error.contains("making namespaces") && facts.system_call_filter {
        problems.push(Missing {
            what: "a system call filter (seccomp) is in force, which may forbid it: containers need --security-opt seccomp=unconfined"
                .to_owned(),
            command: None,
        });
    }
    problems
}

/// The caller's search path, and the directories of administration programs, which ordinary users often lack.
pub fn search_path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into))
        .collect();
    std::env::join_paths(dirs).unwrap_or(path)
}

fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|dir| dir.join(program))
        .find(|candidate| Path::is_file(candidate))
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_proposed_that_nobody_has() {
        assert_eq!(free_range(""), 100_000);
        assert_eq!(free_range("alice:100000:65536\n"), 165_536);
        assert_eq!(
            free_range("alice:100000:65536\nbob:165536:10\nroot:0:5\nbroken\n"),
            231_072
        );
        assert_eq!(smaller("alice:100000:1000\nalice:5:9\n", "alice"), " (only 1000)");
        assert_eq!(smaller("bob:100000:1000\n", "alice"), "");
    }

    #[test]
    fn each_obstacle_has_its_command_and_each_command_is_said_once() {
        let facts = Facts {
            apparmor: true,
            no_new_privs: true,
            system_call_filter: true,
            powerless: vec!["/usr/bin/newuidmap".into()],
            nosuid: vec![("/usr/bin/newgidmap".into(), "/usr".into())],
            hidden: vec!["/proc/bus".into(), "/proc/acpi".into()],
            proc_read_only: true,
            no_sysfs: true,
        };
        let text = explain(&diagnose("making namespaces: Operation not permitted", &facts));
        for command in [
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            "sudo chmod u+s /usr/bin/newuidmap",
            "sudo mount -o remount,suid /usr",
            "sudo umount /proc/bus /proc/acpi",
            "sudo mount -o remount,rw /proc",
            "sudo mount -t sysfs sysfs /sys",
            "seccomp=unconfined",
            "NoNewPrivileges=no",
        ] {
            assert!(text.contains(command), "{command}: {text}");
        }
        assert!(diagnose("nft failed", &Facts::default()).is_empty());
        let twice = [
            missing_with("a is missing", "get b"),
            missing_with("c is missing", "get b"),
        ];
        assert_eq!(explain(&twice).matches("sudo get b").count(), 1);
    }

    #[test]
    fn mounts_are_read_with_and_without_optional_fields() {
        let text =
            "22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw\n30 22 0:30 / /proc/bus ro,relatime - tmpfs none rw\n";
        let mounts = mounts(text);
        assert_eq!(mounts.len(), 2);
        assert!(mounts[0].has("nosuid") && mounts[0].kind == "proc" && !mounts[0].has("ro"));
        assert!(mounts[1].has("ro") && mounts[1].target == "/proc/bus" && mounts[1].kind == "tmpfs");
    }
}
