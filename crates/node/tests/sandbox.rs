//! The sandbox seen from the host: nothing outside changes, ids are mapped away, everything inside ends with its launcher.
//! Needs root (for the launcher of root, and to become an ordinary user); fails without.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use mantlet_node::sandbox::{self, SandboxConfig};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some(sandbox::SUBCOMMAND) => return sandbox::sandbox_main(&args[2..]),
        Some("shell") => return shell(&args[2]),
        _ => {}
    }
    let cases: [(&str, fn()); 7] = [
        ("the_host_is_untouched", host_untouched),
        ("root_inside_is_nobody_outside", ids),
        ("the_launcher_takes_everything_with_it", launcher_killed),
        ("exit_codes_and_signals_pass_through", codes_and_signals),
        ("an_ordinary_user_has_a_cluster_too", ordinary_user),
        ("root_of_a_container_has_a_cluster_too", container_root),
        ("mistakes_are_named", mistakes),
    ];
    if args.iter().any(|arg| arg == "--list") {
        cases.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests need root: run them as root or in a container that has it"
    );
    let filter = args.iter().skip(1).find(|arg| !arg.starts_with("--"));
    let mut failed = 0;
    for (name, case) in cases
        .iter()
        .filter(|(name, _)| filter.is_none_or(|f| name.contains(f.as_str())))
    {
        let ok = std::panic::catch_unwind(case).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += usize::from(!ok);
    }
    ExitCode::from(u8::from(failed > 0))
}

/// Runs a shell script inside; the program that the sandbox starts.
fn shell(script: &str) -> ExitCode {
    let status = Command::new("sh").args(["-c", script]).status().expect("sh");
    ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(255))
}

fn program() -> PathBuf {
    std::env::current_exe().expect("own path")
}

fn config(state_dir: &Path, script: &str) -> SandboxConfig {
    SandboxConfig {
        state_dir: state_dir.to_owned(),
        program: program(),
        args: vec!["shell".into(), script.into()],
        read_only_dirs: vec![program().parent().expect("directory").to_owned()],
    }
}

fn start(state_dir: &Path, script: &str) -> Child {
    sandbox::command(&program(), &config(state_dir, script))
        .expect("command")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start")
}

fn run(state_dir: &Path, script: &str) -> String {
    let output = start(state_dir, script).wait_with_output().expect("run");
    assert!(
        output.status.success(),
        "{:?}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits for the line `up`.
fn wait_up(child: &mut Child) {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("stdout"))
        .read_line(&mut line)
        .expect("read");
    assert_eq!(line, "up\n");
}

fn until(what: &str, mut check: impl FnMut() -> bool) {
    let start = Instant::now();
    while !check() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "waited too long until {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything of the host that a cluster could change by mistake.
fn host_facts() -> Vec<String> {
    let text = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().expect(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    vec![
        text("nft", &["list", "tables"]),
        text("ip", &["-o", "link"])
            .lines()
            .map(|l| l.split(':').nth(1).unwrap_or("").to_owned())
            .collect(),
        text("ip", &["route"]),
        file("/proc/sys/net/ipv4/ip_forward"),
        file("/proc/sys/net/ipv6/conf/all/disable_ipv6"),
        file("/proc/sys/net/ipv4/ip_unprivileged_port_start"),
        file("/proc/sys/kernel/hostname"),
        // Without the numbers of mounts.
        file("/proc/self/mountinfo")
            .lines()
            .map(|l| l.split(' ').skip(3).collect::<Vec<_>>().join(" ") + "\n")
            .collect(),
    ]
}

fn host_untouched() {
    let state = tempfile::tempdir().expect("dir");
    let before = host_facts();
    let mut child = start(
        state.path(),
        "nft add table inet inside; ip link add dumdum type veth; echo up; exec sleep 60",
    );
    wait_up(&mut child);
    let during = host_facts();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .expect("kill");
    child.wait().expect("wait");
    assert_eq!(before, during, "while a cluster runs");
    assert_eq!(before, host_facts(), "afterwards");
}

fn ids() {
    let state = tempfile::tempdir().expect("dir");
    std::fs::write(state.path().join("mine"), "of root").expect("write");
    let script = format!(
        "cd {0} && cat mine && touch made && id -u && ls /root /home | wc -l; cat /etc/shadow; \
         echo x > /proc/sys/kernel/core_pattern; echo 1 > /proc/sys/vm/drop_caches; touch /usr/bin/x; ls -A / | tr '\\n' ' '; cat /proc/1/comm; \
         cat /proc/sys/net/ipv4/ip_forward",
        state.path().display()
    );
    let text = run(state.path(), &script);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "of root0", "{text}");
    assert!(lines.last() == Some(&"1"), "forwarding is on inside: {text}");
    assert!(!text.contains("root:"), "the host's shadow file stays closed: {text}");
    let uid = std::fs::metadata(state.path().join("made")).expect("made").uid();
    assert!(uid >= 0x7000_0000, "root inside is {uid} outside");
    assert_ne!(
        std::fs::read_to_string("/proc/sys/kernel/core_pattern").expect("read"),
        "x\n"
    );
    assert!(!Path::new("/usr/bin/x").exists());
}

fn children_of(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|w| w.parse().ok())
        .flat_map(|p| [vec![p], children_of(p)].concat())
        .collect()
}

fn launcher_killed() {
    let state = tempfile::tempdir().expect("dir");
    let mut child = start(state.path(), "setsid sleep 61 & echo up; exec sleep 60");
    wait_up(&mut child);
    let inside = children_of(child.id());
    assert!(inside.len() >= 3, "init, program and its children: {inside:?}");
    child.kill().expect("kill -9");
    child.wait().expect("wait");
    until("everything inside has ended", || {
        inside.iter().all(|pid| {
            // A zombie has ended; who reaps it is not ours to say.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        })
    });
}

fn codes_and_signals() {
    let state = tempfile::tempdir().expect("dir");
    let status = start(state.path(), "exit 37").wait().expect("wait");
    assert_eq!(status.code(), Some(37));
    let mut child = start(
        state.path(),
        "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done",
    );
    wait_up(&mut child);
    // To the program alone goes what the launcher gets; its shell ends by the signal.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .expect("kill");
    let status = child.wait().expect("wait");
    assert_eq!(status.code(), Some(143), "the program ended by SIGTERM");
}

/// In a mount namespace of its own, `nobody` gets subordinate ids; the host's files are not changed.
fn ordinary_user() {
    let state = tempfile::tempdir().expect("dir");
    let ids = state.path().join("ids");
    std::fs::write(&ids, "nobody:1000000:65536\n").expect("write");
    std::fs::set_permissions(&ids, std::fs::Permissions::from_mode(0o644)).expect("mode");
    std::fs::set_permissions(state.path(), std::fs::Permissions::from_mode(0o755)).expect("mode");
    let dir = state.path().join("cluster");
    std::fs::create_dir(&dir).expect("mkdir");
    std::os::unix::fs::chown(&dir, Some(65_534), Some(65_534)).expect("chown");
    let script = format!(
        "id -u; touch {0}/a {0}/b; chown 1337 {0}/b; ip link add v type veth && nft add table ip t && echo net",
        dir.display()
    );
    let json = serde_json::to_string(&config(&dir, &script)).expect("json");
    let user = |program: &str, bind: bool| {
        let mount = if bind {
            "mount --bind \"$1\" /etc/subuid && mount --bind \"$1\" /etc/subgid && "
        } else {
            ""
        };
        Command::new("unshare")
            .args([
                "-m",
                "sh",
                "-c",
                &format!("{mount}exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$2\" sandbox \"$3\""),
            ])
            .arg("sh")
            .arg(&ids)
            .arg(program)
            .arg(&json)
            .output()
            .expect("unshare (package util-linux)")
    };
    let binary = program().display().to_string();
    let output = user(&binary, true);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text, "0\nnet\n", "{}", String::from_utf8_lossy(&output.stderr));
    let owner = |name: &str| std::fs::metadata(dir.join(name)).expect("file").uid();
    assert_eq!((owner("a"), owner("b")), (65_534, 1_000_000 + 1336));
    let output = user(&binary, false);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("user nobody has no range of 65536 ids in /etc/subuid; add one with `usermod"),
        "{text}"
    );
}

/// Runs the sandbox as root of a user namespace with the first `$1` ids of the machine.
const NESTED: &str = r#"
count=$1; shift
unshare --user sh -c 'until read -r map < /proc/self/uid_map; do sleep 0.02; done; exec "$@"' sh "$@" &
until [ "$(readlink /proc/$!/ns/user)" != "$(readlink /proc/self/ns/user)" ]; do sleep 0.02; done
echo 0 0 $count > /proc/$!/gid_map
echo 0 0 $count > /proc/$!/uid_map
wait $!
"#;

fn container_root() {
    let run = |count: u32, own_mounts: bool| {
        let state = tempfile::tempdir().expect("dir");
        let script = format!(
            "id -u; touch {0}/a {0}/b; chown 1337 {0}/b; ip link add v type veth && nft add table ip t && echo net",
            state.path().display()
        );
        let json = serde_json::to_string(&config(state.path(), &script)).expect("json");
        let mut command = Command::new("sh");
        command.args(["-c", NESTED, "sh"]).arg(count.to_string());
        if own_mounts {
            command.args(["unshare", "--mount"]);
        }
        let output = command
            .arg(program())
            .args([sandbox::SUBCOMMAND, &json])
            .output()
            .expect("unshare (package util-linux)");
        let owner = |name: &str| std::fs::metadata(state.path().join(name)).map(|file| file.uid()).ok();
        let owners = (owner("a"), owner("b"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (text, String::from_utf8_lossy(&output.stderr).into_owned(), owners)
    };
    for own_mounts in [true, false] {
        let (text, errors, owners) = run(100_000, own_mounts);
        assert_eq!(text, "0\nnet\n", "{errors}");
        assert_eq!(
            owners,
            (Some(0), Some(1337)),
            "one range of ids: they are the same inside"
        );
    }
    let (_, errors, owners) = run(131_072, true);
    assert_eq!(
        owners,
        (Some(65_536), Some(65_536 + 1337)),
        "two ranges: the second is used; {errors}"
    );
    let (text, errors, _) = run(1000, true);
    assert_eq!(text, "");
    assert!(
        errors.contains("without the ids 0 to 65535 (see /proc/self/uid_map)"),
        "{errors}"
    );
}

fn mistakes() {
    let state = tempfile::tempdir().expect("dir");
    let relative = SandboxConfig {
        program: "sh".into(),
        ..config(state.path(), "true")
    };
    let error = sandbox::command(&program(), &relative).expect_err("must be refused");
    assert_eq!(error.to_string(), "sandbox: bad arguments: sh is not an absolute path");
    let absent = SandboxConfig {
        program: "/nonexistent".into(),
        ..config(state.path(), "true")
    };
    let output = sandbox::command(&program(), &absent)
        .expect("command")
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(125));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("running /nonexistent: No such file or directory"),
        "{text}"
    );
    let output = Command::new(program())
        .args([sandbox::SUBCOMMAND, "{}"])
        .output()
        .expect("run");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("bad arguments: missing field"),
        "{output:?}"
    );
}
