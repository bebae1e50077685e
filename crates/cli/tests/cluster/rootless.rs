//! The cluster of an ordinary user: what is missing is named with its command, ports below 1024 get stand-ins, and nothing
//! is left of it.
//!
//! Where the tests run as root, the user is `nobody`, who gets subordinate ids in a mount namespace of its own: the host's files
//! are not changed. Where they run as an ordinary user, it is that one.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Cluster, WEB, program, text, wait_for};

/// Mounts the ids given over those of the machine, does the rest of the preparation, and becomes the user.
const BECOME: &str = r#"
set -e
mount --bind "$IDS" /etc/subuid
mount --bind "$IDS" /etc/subgid
eval "$PREPARE"
exec setpriv --reuid 65534 --regid 65534 --clear-groups $OPTIONS -- "$@"
"#;
/// Runs a command in a user namespace in which the ids are the machine's.
const NESTED: &str = r#"
unshare --user sh -c 'until read -r map < /proc/self/uid_map; do sleep 0.02; done; exec "$@"' sh "$@" &
until [ "$(readlink /proc/$!/ns/user)" != "$(readlink /proc/self/ns/user)" ]; do sleep 0.02; done
echo 0 0 100000 > /proc/$!/gid_map
echo 0 0 100000 > /proc/$!/uid_map
wait $!
"#;
const NOBODY: u32 = 65_534;

/// Who runs the cluster, and with which programs.
#[derive(Clone)]
struct OrdinaryUser {
    ids: PathBuf,
    programs: PathBuf,
}

impl OrdinaryUser {
    /// Gives `home` to the user, with what it needs in it.
    fn new(home: &Path) -> Self {
        let own = program();
        let built = own.parent().expect("a directory").to_owned();
        if !nix::unistd::geteuid().is_root() {
            return Self {
                ids: PathBuf::new(),
                programs: built,
            };
        }
        let programs = home.join("bin");
        std::fs::create_dir(&programs).expect("a directory");
        for name in ["mantlet", "mantlet-samples"] {
            let (from, to) = (built.join(name), programs.join(name));
            // The build directory may be below a home that is closed to others.
            if std::fs::hard_link(&from, &to).is_err() {
                std::fs::copy(&from, &to).expect("copied");
            }
        }
        let this = Self {
            ids: home.join("ids"),
            programs,
        };
        let base = 1_000_000_000 + std::process::id() % 1000 * 65_536;
        this.give_ids(&format!("nobody:{base}:65536\n"));
        chown(home, Some(NOBODY), Some(NOBODY)).expect("root");
        this
    }

    fn give_ids(&self, text: &str) {
        std::fs::write(&self.ids, text).expect("writable");
        std::fs::set_permissions(&self.ids, std::fs::Permissions::from_mode(0o644)).expect("own file");
    }

    fn mantlet(&self) -> PathBuf {
        self.programs.join("mantlet")
    }

    fn command(&self, program: &str) -> Command {
        if !nix::unistd::geteuid().is_root() {
            return Command::new(program);
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", BECOME, "sh", program]);
        command.env("IDS", &self.ids).env("PREPARE", "").env("OPTIONS", "");
        command
    }
}

/// A cluster, and the ordinary user whose it is.
fn of_ordinary_user(name: &str) -> (Cluster, OrdinaryUser) {
    let cluster = Cluster::new(name);
    let user = OrdinaryUser::new(cluster.dir.path());
    let runs = user.clone();
    let cluster = cluster.run_by(user.mantlet(), move |program| runs.command(program));
    (cluster, user)
}

/// Refuses to start, with all of `wanted` in its message, and leaves nothing behind.
fn refused((cluster, user): &(Cluster, OrdinaryUser), prepare: &str, options: &str, wanted: &[&str]) {
    let before = entries(cluster.dir.path());
    let mut command = Command::new("unshare");
    if prepare.contains("/proc/sys/user/") {
        // Limits of namespaces belong to a user namespace; the machine's stay as they are.
        command = Command::new("sh");
        command.args(["-c", NESTED, "sh", "unshare"]);
    }
    command.args(["--mount", "sh", "-c", BECOME, "sh"]);
    let output = command
        .arg(user.mantlet())
        .args(["cluster", "up", "--name", &cluster.name])
        .env("IDS", &user.ids)
        .env("PREPARE", prepare)
        .env("OPTIONS", options)
        .env("HOME", cluster.dir.path())
        .env("KUBECONFIG", cluster.kubeconfig())
        .env("MANTLET_STATE_DIR", cluster.dir.path().join("state"))
        .output()
        .expect("unshare and setpriv (package util-linux) are needed");
    let message = text(&output);
    assert_eq!(output.status.code(), Some(1), "{prepare} {options}: {message}");
    for part in wanted {
        assert!(
            message.contains(part),
            "{prepare} {options}: {part:?} is not in: {message}"
        );
    }
    assert_eq!(
        entries(cluster.dir.path()),
        before,
        "{prepare}: something is left behind"
    );
}

fn entries(dir: &Path) -> Vec<String> {
    let list = std::fs::read_dir(dir).expect("readable");
    let mut names: Vec<_> = list
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Every condition is real: a file is covered, a limit is set in a user namespace, ids are not given.
#[test]
fn what_an_ordinary_user_lacks_is_named_with_the_administrators_command() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test takes things away from a user, for which it needs root"
    );
    let cluster = of_ordinary_user("lacks");
    let user = &cluster.1;
    let found = Command::new("sh")
        .args(["-c", "readlink -f \"$(command -v newuidmap)\""])
        .output();
    let helper = text(&found.expect("a shell")).trim().to_owned();
    assert!(
        helper.starts_with('/'),
        "this test needs newuidmap: apt-get install uidmap"
    );

    refused(
        &cluster,
        &format!("mount --bind /dev/null {helper}"),
        "",
        &["the program newuidmap is missing", "sudo apt-get install -y uidmap"],
    );
    refused(
        &cluster,
        &format!(
            "cp {helper} /dev/shm/$$ && chmod 755 /dev/shm/$$ && mount --bind /dev/shm/$$ {helper} && rm /dev/shm/$$"
        ),
        "",
        &["newuidmap failed", &format!("sudo chmod u+s {helper}")],
    );
    refused(&cluster, "", "--no-new-privs", &["newgidmap failed", "no_new_privs"]);
    refused(
        &cluster,
        "mount -t tmpfs none /proc/tty",
        "",
        &["mounting proc", "hidden", "sudo umount /proc/tty"],
    );
    refused(
        &cluster,
        "echo 0 > /proc/sys/user/max_user_namespaces",
        "",
        &[
            "user namespaces are switched off",
            "sudo sysctl -w user.max_user_namespaces=15000",
        ],
    );
    refused(
        &cluster,
        "echo 0 > /proc/sys/user/max_net_namespaces",
        "",
        &[
            "net namespaces are switched off",
            "sudo sysctl -w user.max_net_namespaces=15000",
        ],
    );
    user.give_ids("somebody:100000:65536\n");
    refused(
        &cluster,
        "",
        "",
        &[
            "/etc/subuid gives nobody no range of 65536 ids\n",
            "sudo usermod --add-subuids 165536-231071 nobody",
            "sudo usermod --add-subgids 165536-231071 nobody",
        ],
    );
    user.give_ids("nobody:100000:1000\n");
    refused(
        &cluster,
        "",
        "",
        &[
            "no range of 65536 ids (only 1000)",
            "sudo usermod --add-subuids 165536-231071 nobody",
        ],
    );
}

#[test]
fn ports_below_1024_are_reached_where_they_are_printed() {
    let (cluster, _) = of_ordinary_user("ports");
    let said = cluster.up();
    let first: u16 = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .expect("a kernel with IPv4")
        .trim()
        .parse()
        .expect("a number");
    let mapped = first > 80;
    assert_eq!(said.contains("80 to 8080"), mapped, "{said}");
    cluster.apply(WEB);
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    cluster.kubectl(&[
        "wait",
        "--for=jsonpath={.status.loadBalancer.ingress}",
        "--timeout=60s",
        "service/web",
    ]);
    let address = cluster.kubectl(&[
        "get",
        "service",
        "web",
        "-o",
        "jsonpath={.status.loadBalancer.ingress[0].ip}",
    ]);
    let table = text(&cluster.mantlet(&["ports"]));
    let host = if mapped {
        format!("{address}:8080")
    } else {
        format!("{address}:80")
    };
    let row = table.lines().find(|line| line.contains(&host)).unwrap_or_default();
    assert!(row.starts_with("default/web   80 "), "{table}");
    let answer = |command: &mut Command| text(&command.output().expect("curl is needed"));
    let direct = answer(Command::new("curl").args(["-s", "--max-time", "20", &format!("http://{host}/")]));
    assert!(direct.contains("Saoirse"), "{direct}");
    // With the lines for ~/.curlrc the Service's own port does, as for root.
    let lines = cluster.mantlet(&["ports", "--curl"]);
    std::fs::write(cluster.dir.path().join(".curlrc"), &lines.stdout).expect("writable");
    let led = answer(Command::new("curl").env("CURL_HOME", cluster.dir.path()).args([
        "-s",
        "--max-time",
        "20",
        &format!("http://{address}/"),
    ]));
    assert!(led.contains("Saoirse"), "{led}");
    let reasons = || cluster.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"]);
    if mapped {
        wait_for("an event says so", || reasons().contains("HostPortMapped"));
    } else {
        assert!(!reasons().contains("HostPortMapped"));
    }
}

const WRITER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: writer}
spec:
  securityContext: {runAsUser: 1337, runAsGroup: 1337}
  containers:
  - name: writer
    image: sh
    command: [sh, -c, "mkdir -p -m 700 /data/deep && echo x > /data/deep/file; sleep infinity"]
    readinessProbe: {exec: {command: [cat, /data/deep/file]}, periodSeconds: 1}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;

/// A process and all that descend from it: number and start time, so that a number that is used again is not taken for it.
fn family(pid: i32) -> Vec<(i32, String)> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut found = vec![(pid, started(pid))];
    found.extend(
        children
            .split_whitespace()
            .flat_map(|child| family(child.parse().expect("a number"))),
    );
    found
}

/// Start time of a process, empty when it has ended (a zombie has).
fn started(pid: i32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    match fields.as_slice() {
        ["Z", ..] | [] => String::new(),
        fields => fields.get(19).map(|field| (*field).to_owned()).unwrap_or_default(),
    }
}

fn is_mounted_anywhere(dir: &Path) -> bool {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let dir = dir.to_string_lossy();
    processes
        .filter_map(|process| std::fs::read_to_string(process.path().join("mountinfo")).ok())
        .any(|mounts| mounts.contains(dir.as_ref()))
}

#[test]
fn nothing_is_left_of_a_users_cluster_however_it_is_killed() {
    let (cluster, _) = of_ordinary_user("killed");
    let pid = |field: &str| {
        let status = cluster.status().expect("runs");
        i32::try_from(status[field].as_i64().expect("a number")).expect("a process id")
    };
    let first_child = |pid: i32| family(pid).get(1).expect("a child").0;
    let victims: [(&str, &dyn Fn() -> i32); 3] = [
        ("broker", &|| pid("broker_pid")),
        ("launcher", &|| pid("sandbox_pid")),
        ("init", &|| first_child(pid("sandbox_pid"))),
    ];
    for (name, victim) in victims {
        cluster.up();
        cluster.apply(WRITER);
        cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/writer"]);
        let all = family(pid("broker_pid"));
        assert!(
            all.len() >= 6,
            "broker, launcher, init, cluster, shim, container: {all:?}"
        );
        kill(Pid::from_raw(victim()), Signal::SIGKILL).expect("it lives");
        wait_for(&format!("all has ended with the {name}"), || {
            all.iter().all(|(pid, start)| started(*pid) != *start)
        });
        assert!(cluster.status().is_none(), "{name}");
        assert!(!is_mounted_anywhere(&cluster.state()), "{name}: a mount is left");
    }
    assert!(cluster.state().join("pods").exists(), "there is something to delete");
    let down = cluster.mantlet(&["down", "--purge"]);
    assert!(down.status.success(), "{}", text(&down));
    assert!(!cluster.state().exists(), "files are left: {}", text(&down));
}
