//! Pods at the level of the shim: network, processes, privileges, file system, logs, ends. Real namespaces, real programs.

mod support;

use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mantlet_net::caps::Caps;
use mantlet_net::process::Exit;
use mantlet_node::podnet::{self, AddressPool};
use mantlet_node::rootfs::{FileEntry, Program, ProgramSource, RootSpec};
use mantlet_node::shim::client::{Event, Shim, ShimError};
use mantlet_node::shim::proto::{ContainerSpec, ExecSpec, Identity, StartError};
use support::Context;
use tokio::sync::mpsc::UnboundedReceiver;

fn main() -> ExitCode {
    support::main(&[
        ("two_pods_reach_each_other_and_themselves", |c| Box::pin(two_pods(c))),
        ("output_and_exit_codes_are_kept", |c| Box::pin(output_and_exit_codes(c))),
        ("a_container_sees_nothing_of_the_host", |c| {
            Box::pin(nothing_of_the_host(c))
        }),
        ("an_ordinary_container_cannot_escalate", |c| {
            Box::pin(cannot_escalate(c))
        }),
        ("missing_programs_are_named", |c| Box::pin(missing_programs(c))),
        ("a_terminal_is_real", |c| Box::pin(terminal(c))),
        ("the_pod_ends_with_its_agent_and_with_its_shim", |c| {
            Box::pin(pod_ends(c))
        }),
        ("children_of_a_container_end_with_it", |c| Box::pin(children_end(c))),
        ("a_pod_cannot_send_from_another_address", |c| Box::pin(spoofing(c))),
        ("capture_follows_istios_rules", |c| Box::pin(capture(c))),
        ("sudo_needs_privileges_and_tcpdump_then_sees_packets", |c| {
            Box::pin(sudo_tcpdump(c))
        }),
    ])
}

struct Pod {
    shim: Shim,
    events: UnboundedReceiver<Event>,
    address: Ipv4Addr,
    dir: PathBuf,
}

impl Pod {
    async fn start(context: &Context, name: &str) -> Self {
        let uid = format!("{name}-{}", context.unique());
        let pods = context.state_dir.join("pods");
        let dir = pods.join(&uid);
        std::fs::create_dir_all(&dir).expect("pod directory");
        let address = AddressPool::load(&pods).assign(&uid, &dir).expect("address");
        let (shim, events) = Shim::start(&context.program, name, &dir.join("shim.log"))
            .await
            .expect("shim");
        podnet::attach(address, shim.pid()).expect("attach");
        shim.network(address).await.expect("pod network");
        Self {
            shim,
            events,
            address,
            dir,
        }
    }

    fn container(&self, id: &str, argv: &[&str]) -> ContainerSpec {
        let mountpoint = self.dir.join(id);
        std::fs::create_dir_all(&mountpoint).expect("mount point");
        let file = |path: &str, text: &str| FileEntry {
            path: path.into(),
            text: text.into(),
            mode: 0o644,
        };
        ContainerSpec {
            id: id.into(),
            root: RootSpec {
                mountpoint,
                size: 64 << 20,
                read_only: false,
                privileged: false,
                programs: Vec::new(),
                files: vec![
                    file(
                        "/etc/passwd",
                        "root:x:0:0::/root:/bin/sh\nistio-proxy:x:1337:1337::/home:/bin/sh\ntcpdump:x:104:104::/:/bin/false\n",
                    ),
                    file(
                        "/etc/group",
                        "root:x:0:\ntty:x:5:\nistio-proxy:x:1337:\ntcpdump:x:104:\n",
                    ),
                    file("/etc/hosts", "127.0.0.1 localhost\n"),
                ],
                home: ("/root".into(), 0, 0),
                working_dir: ("/".into(), 0, 0),
                binds: Vec::new(),
            },
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            env: vec![(
                "PATH".into(),
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            )],
            cwd: "/".into(),
            identity: Identity {
                caps: Caps::container_default(),
                no_new_privs: true,
                seccomp: true,
                ..Identity::default()
            },
            tty: false,
            log: self.dir.join(format!("{id}.log")),
            oom_score_adj: 0,
        }
    }

    async fn run(&self, spec: ContainerSpec) {
        self.shim.start_container(spec, None).await.expect("container starts");
    }

    /// Runs a command to its end: exit code, output and error output together.
    async fn exec(&self, context: &Context, container: &str, argv: &[&str]) -> (i32, String) {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let null: OwnedFd = std::fs::File::open("/dev/null").expect("null").into();
        let streams = [null, write.try_clone().expect("dup"), write];
        let spec = ExecSpec {
            id: format!("exec-{}", context.unique()),
            container: container.into(),
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            tty: false,
        };
        let session = self.shim.exec(spec, Some(streams)).await.expect("exec starts");
        let output = tokio::task::spawn_blocking(move || {
            let mut text = Vec::new();
            std::fs::File::from(read).read_to_end(&mut text).expect("read");
            String::from_utf8_lossy(&text).into_owned()
        });
        let exit = session.exit.await.expect("exit");
        (exit.code, output.await.expect("output"))
    }

    async fn expect_exit(&mut self, id: &str) -> Exit {
        match self.events.recv().await {
            Some(Event::Exited { id: got, exit }) if got == id => exit,
            other => panic!("expected the end of {id}, got {other:?}"),
        }
    }

    fn log(&self, id: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join(format!("{id}.log"))).expect("log");
        text.lines()
            .map(|line| line.split_once(' ').expect("fields").1.to_owned())
            .collect()
    }
}

async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !check().await {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "waited too long until {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn two_pods(context: Context) {
    let server = Pod::start(&context, "server").await;
    let client = Pod::start(&context, "client").await;
    server
        .run(server.container("web", &["/usr/bin/python3", "-m", "http.server", "80"]))
        .await;
    client.run(client.container("sleep", &["sleep", "infinity"])).await;
    let url = format!("http://{}/etc/hosts", server.address);
    until("the server answers", async || {
        client.exec(&context, "sleep", &["curl", "-sf", &url]).await.0 == 0
    })
    .await;
    let (code, text) = client.exec(&context, "sleep", &["curl", "-sS", &url]).await;
    assert_eq!((code, text.as_str()), (0, "127.0.0.1 localhost\n"));
    let (code, text) = server.exec(&context, "web", &["curl", "-sS", &url]).await;
    assert_eq!(
        (code, text.as_str()),
        (0, "127.0.0.1 localhost\n"),
        "a pod reaches its own address"
    );
    // From the node, as probes do.
    let stream = tokio::net::TcpStream::connect((server.address, 80))
        .await
        .expect("the node reaches the pod");
    drop(stream);
    let (code, text) = client.exec(&context, "sleep", &["ip", "-o", "addr", "show"]).await;
    assert_eq!(code, 0);
    assert!(text.contains(&format!("{}/32", client.address)), "{text}");
    assert!(!text.contains("inet6"), "IPv6 would be a way around capture: {text}");
    let (code, text) = client.exec(&context, "sleep", &["hostname"]).await;
    assert_eq!((code, text.as_str()), (0, "client\n"));
}

async fn output_and_exit_codes(context: Context) {
    let mut pod = Pod::start(&context, "out").await;
    pod.run(pod.container("a", &["sh", "-c", "echo one; echo two >&2; printf three; exit 7"]))
        .await;
    assert_eq!(pod.expect_exit("a").await, Exit { code: 7, signal: None });
    let mut log = pod.log("a");
    log.sort();
    assert_eq!(log, ["stderr F two", "stdout F one", "stdout P three"]);
    pod.run(pod.container("b", &["sh", "-c", "kill -SEGV $$"])).await;
    assert_eq!(
        pod.expect_exit("b").await,
        Exit {
            code: 139,
            signal: Some(11)
        }
    );
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    pod.shim.signal("c", 15, false).await.expect("signal");
    assert_eq!(
        pod.expect_exit("c").await,
        Exit {
            code: 143,
            signal: Some(15)
        }
    );
    let error = pod.shim.signal("c", 15, false).await.expect_err("it has ended");
    assert!(
        matches!(error, ShimError::Refused(StartError::NotRunning(_))),
        "{error}"
    );
}

async fn nothing_of_the_host(context: Context) {
    let pod = Pod::start(&context, "hidden").await;
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    let state = context.state_dir.display().to_string();
    for path in [
        &state,
        "/root/.kube",
        "/etc/shadow",
        "/etc/kubernetes",
        "/proc/1/root/root/.ssh",
        "/var/run/docker.sock",
    ] {
        let (code, text) = pod.exec(&context, "c", &["ls", path]).await;
        assert_ne!(code, 0, "{path} must not be visible: {text}");
    }
    let (_, text) = pod
        .exec(&context, "c", &["ls", "-A", "/root", "/home", "/run", "/srv"])
        .await;
    assert_eq!(text, "/home:\n\n/root:\n\n/run:\nlock\n\n/srv:\n");
    let (_, text) = pod
        .exec(&context, "c", &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"])
        .await;
    assert!(
        text.trim().parse::<u32>().expect("count") < 8,
        "only the pod's processes are visible: {text}"
    );
    let (code, _) = pod
        .exec(&context, "c", &["sh", "-c", "echo x > /usr/bin/mantlet-test"])
        .await;
    assert_ne!(code, 0, "the host's programs are read-only");
    let (code, _) = pod
        .exec(&context, "c", &["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
        .await;
    assert_ne!(code, 0, "kernel switches are read-only");
}

async fn cannot_escalate(context: Context) {
    let pod = Pod::start(&context, "caps").await;
    pod.run(pod.container("root", &["sleep", "infinity"])).await;
    let mut user = pod.container("user", &["sleep", "infinity"]);
    user.identity = Identity {
        uid: 1000,
        gid: 1000,
        groups: vec![2000],
        no_new_privs: true,
        seccomp: true,
        ..Identity::default()
    };
    pod.run(user).await;
    let (_, text) = pod.exec(&context, "user", &["id"]).await;
    assert_eq!(text, "uid=1000 gid=1000 groups=1000,2000\n");
    let (_, text) = pod
        .exec(
            &context,
            "user",
            &["grep", "-E", "^(Cap|NoNewPrivs|Seccomp:)", "/proc/self/status"],
        )
        .await;
    let zero = "0000000000000000";
    let expected = format!(
        "CapInh:\t{zero}\nCapPrm:\t{zero}\nCapEff:\t{zero}\nCapBnd:\t{zero}\nCapAmb:\t{zero}\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    );
    assert_eq!(text, expected);
    for command in [
        "unshare -Ur true",
        "mount -t tmpfs x /mnt",
        "ip link add d type veth",
        "tcpdump -c1 -i eth0",
        "chroot /proc/1/root ls /root/.kube",
    ] {
        let (code, text) = pod.exec(&context, "root", &["sh", "-c", command]).await;
        assert_ne!(code, 0, "{command} must fail for root of a container: {text}");
    }
    // A shell of the node's own init would be visible here, were the namespaces shared.
    let (code, _) = pod.exec(&context, "root", &["nsenter", "-t", "1", "-m", "ls"]).await;
    assert_ne!(code, 0);
}

async fn missing_programs(context: Context) {
    let pod = Pod::start(&context, "missing").await;
    let error = pod
        .shim
        .start_container(pod.container("a", &["no-such-program"]), None)
        .await
        .expect_err("must fail");
    assert_eq!(
        error.to_string(),
        "exec: \"no-such-program\": executable file not found in $PATH"
    );
    let error = pod
        .shim
        .start_container(pod.container("b", &["/etc/passwd"]), None)
        .await
        .expect_err("must fail");
    assert_eq!(error.to_string(), "exec: \"/etc/passwd\": permission denied");
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    let spec = ExecSpec {
        id: "x".into(),
        container: "gone".into(),
        argv: vec!["ls".into()],
        tty: true,
    };
    let error = pod.shim.exec(spec, None).await.expect_err("must fail");
    assert_eq!(error.to_string(), "container gone is not running");
}

async fn terminal(context: Context) {
    let pod = Pod::start(&context, "tty").await;
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    let spec = ExecSpec {
        id: "t".into(),
        container: "c".into(),
        argv: ["sh", "-c", "tty; stty size; read line; echo got $line"]
            .map(str::to_owned)
            .to_vec(),
        tty: true,
    };
    let session = pod.shim.exec(spec, None).await.expect("exec");
    let master = session.terminal.expect("terminal");
    let mut file = std::fs::File::from(master.try_clone().expect("dup"));
    std::io::Write::write_all(&mut file, b"hello\n").expect("write");
    let text = tokio::task::spawn_blocking(move || {
        let mut text = Vec::new();
        let mut buffer = [0u8; 1024];
        // EIO at the end: the other side is closed.
        while let Ok(count) = file.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    })
    .await
    .expect("read");
    assert!(text.contains("/dev/pts/0\r\n"), "{text}");
    assert!(text.contains("got hello"), "{text}");
    assert_eq!(session.exit.await.expect("exit").code, 0);
}

async fn pod_ends(context: Context) {
    let pod = Pod::start(&context, "ends").await;
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    let pid = pod.shim.pid();
    let gone = |pid: i32| !PathBuf::from(format!("/proc/{pid}")).exists();
    assert!(!gone(pid));
    drop(pod);
    until("the pod has ended with its agent's socket", async || gone(pid)).await;

    let mut pod = Pod::start(&context, "killed").await;
    pod.run(pod.container("c", &["sleep", "infinity"])).await;
    let pidfd = mantlet_net::process::pidfd(pod.shim.pid()).expect("pidfd");
    mantlet_net::process::kill(&pidfd).expect("kill");
    assert_eq!(pod.events.recv().await, Some(Event::Gone));
    let error = pod.shim.signal("c", 15, false).await.expect_err("gone");
    assert!(matches!(error, ShimError::Gone), "{error}");
}

async fn children_end(context: Context) {
    let mut pod = Pod::start(&context, "children").await;
    pod.run(pod.container("other", &["sleep", "4242"])).await;
    pod.run(pod.container("c", &["sh", "-c", "setsid sleep 4343 & sleep 0.1; exit 0"]))
        .await;
    assert_eq!(pod.expect_exit("c").await.code, 0);
    let (_, text) = pod
        .exec(
            &context,
            "other",
            &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"],
        )
        .await;
    assert!(text.contains("sleep 4242"), "{text}");
    assert!(
        !text.contains("sleep 4343"),
        "a child in another session must end with its container: {text}"
    );
}

async fn sudo_tcpdump(context: Context) {
    let sudo = context
        .program
        .parent()
        .and_then(std::path::Path::parent)
        .expect("target")
        .join("mantlet-sudo");
    assert!(
        sudo.exists(),
        "{} is missing; run `cargo build -p mantlet-net --bin mantlet-sudo`",
        sudo.display()
    );
    let pod = Pod::start(&context, "sudo").await;
    let with_sudo = |id: &str| {
        let mut spec = pod.container(id, &["sleep", "infinity"]);
        spec.root.programs = vec![Program {
            name: "sudo".into(),
            source: ProgramSource::SetUidCopy(sudo.clone()),
        }];
        spec.identity = Identity {
            uid: 1337,
            gid: 1337,
            no_new_privs: true,
            seccomp: true,
            ..Identity::default()
        };
        spec
    };
    pod.run(with_sudo("plain")).await;
    let (code, text) = pod.exec(&context, "plain", &["sudo", "id"]).await;
    assert_eq!(code, 1);
    assert!(
        text.starts_with("sudo: The \"no new privileges\" flag is set"),
        "{text}"
    );
    let mut privileged = with_sudo("privileged");
    privileged.identity = Identity {
        uid: 1337,
        gid: 1337,
        caps: Caps::ALL,
        ..Identity::default()
    };
    pod.run(privileged).await;
    let (code, text) = pod.exec(&context, "privileged", &["sudo", "id", "-u"]).await;
    assert_eq!((code, text.as_str()), (0, "0\n"));
    let address = pod.address;
    let filter = format!("((dst port 3000) and (net {address}))");
    let capture = async {
        pod.exec(
            &context,
            "privileged",
            &[
                "timeout", "10", "sudo", "tcpdump", "-c", "1", "-vvvv", "-A", "-i", "eth0", &filter,
            ],
        )
        .await
    };
    let traffic = async {
        // A connection from the node to a closed port is a packet on eth0.
        loop {
            let _ = tokio::net::TcpStream::connect((address, 3000)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (code, text) = tokio::select! {
        result = capture => result,
        () = traffic => unreachable!("it runs until the capture has ended"),
    };
    assert_eq!(code, 0, "{text}");
    assert!(text.contains(".3000: Flags [S]"), "{text}");
}

/// `curl` in a container: exit code and what came back.
async fn curl(context: &Context, pod: &Pod, container: &str, args: &[&str]) -> (i32, String) {
    let argv = [["curl", "-s", "-m", "3"].as_slice(), args].concat();
    pod.exec(context, container, &argv).await
}

async fn spoofing(context: Context) {
    let server = Pod::start(&context, "target").await;
    let victim = Pod::start(&context, "victim").await;
    let pod = Pod::start(&context, "spoofer").await;
    let receive = "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('',5000))\nprint('up',flush=True)\n\
        while True: d,a=s.recvfrom(99); print(a[0],d.decode(),flush=True)";
    server
        .run(server.container("udp", &["python3", "-u", "-c", receive]))
        .await;
    let mut admin = pod.container("admin", &["sleep", "infinity"]);
    admin.identity.caps = Caps::container_default().with("NET_ADMIN").expect("known");
    pod.run(admin).await;
    until("the server listens", async || server.log("udp") == ["stdout F up"]).await;
    let foreign = victim.address.to_string();
    let (code, text) = pod
        .exec(
            &context,
            "admin",
            &["ip", "addr", "add", &format!("{foreign}/32"), "dev", "eth0"],
        )
        .await;
    assert_eq!(code, 0, "{text}");
    let send = async |from: &str, word: &str| {
        let script = format!(
            "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('{from}',0))\ns.sendto(b'{word}',('{}',5000))",
            server.address
        );
        let (code, text) = pod.exec(&context, "admin", &["python3", "-c", &script]).await;
        assert_eq!(code, 0, "{text}");
    };
    send(&foreign, "spoofed").await;
    send(&pod.address.to_string(), "honest").await;
    until("the honest packet has arrived", async || server.log("udp").len() > 1).await;
    // It was sent later on the same way, so the other one would be there.
    assert_eq!(server.log("udp")[1..], [format!("stdout F {} honest", pod.address)]);
}

/// A server on `port` that answers every connection with its name and the original destination.
fn listener(name: &str, port: u16) -> String {
    format!(
        "import socket,struct\n\
         s=socket.create_server(('',{port}))\n\
         while True:\n\
         \x20 c,_=s.accept()\n\
         \x20 try: d=c.getsockopt(0,80,16); n=c.getsockname(); o=socket.inet_ntoa(d[4:8])+':'+str(struct.unpack('>H',d[2:4])[0]); o='direct' if o==n[0]+':'+str(n[1]) else o\n\
         \x20 except OSError: o='direct'\n\
         \x20 c.recv(65536); b=('{name} '+o).encode()\n\
         \x20 c.sendall(b'HTTP/1.0 200 OK\\r\\nContent-Length: '+str(len(b)).encode()+b'\\r\\n\\r\\n'+b); c.close()\n"
    )
}

/// The rules of the injected init container in a real pod, seen by real connections.
async fn capture(context: Context) {
    let outside = Pod::start(&context, "outside").await;
    outside
        .run(outside.container("web", &["python3", "-c", &listener("outside", 80)]))
        .await;
    let mut pod = Pod::start(&context, "meshed").await;
    let flags = [
        "-p",
        "15001",
        "-z",
        "15006",
        "-u",
        "1337",
        "-m",
        "REDIRECT",
        "-i",
        "*",
        "-x",
        "",
        "-b",
        "*",
        "-d",
        "15090,15021,15020",
    ];
    let rules = mantlet_net::capture::plan(&mantlet_net::capture::Config::from_args(&flags).expect("flags"));
    let mut init = pod.container("init", &["nft", "-f", "/etc/rules"]);
    init.root.files.push(FileEntry {
        path: "/etc/rules".into(),
        text: rules,
        mode: 0o644,
    });
    init.identity.caps = Caps(0)
        .with("NET_ADMIN")
        .and_then(|c| c.with("NET_RAW"))
        .expect("known");
    pod.run(init).await;
    let exit = pod.expect_exit("init").await;
    assert_eq!(exit.code, 0, "{:?}", pod.log("init"));
    for (name, port) in [("out", 15001), ("in", 15006), ("app", 8080), ("status", 15021)] {
        pod.run(pod.container(name, &["python3", "-c", &listener(name, port)]))
            .await;
    }
    let mut proxy = pod.container("proxy", &["sleep", "infinity"]);
    proxy.identity = Identity {
        uid: 1337,
        gid: 1337,
        no_new_privs: true,
        seccomp: true,
        ..Identity::default()
    };
    pod.run(proxy).await;
    outside.run(outside.container("sleep", &["sleep", "infinity"])).await;
    let (own, other) = (pod.address, outside.address);
    until("all listeners are up", async || {
        let mut up = curl(&context, &outside, "sleep", &["http://127.0.0.1/"]).await.0 == 0;
        for port in [15001, 15006, 8080, 15021] {
            up &= curl(&context, &pod, "proxy", &[&format!("http://127.0.0.1:{port}/")])
                .await
                .0
                == 0;
        }
        up
    })
    .await;
    let cases: [(&Pod, &str, String, String); 9] = [
        (&pod, "app", format!("http://{other}/"), format!("out {other}:80")),
        (
            &pod,
            "app",
            "http://192.0.2.1:4321/".into(),
            "out 192.0.2.1:4321".into(),
        ),
        // The proxy's own traffic leaves; to its own address it comes in again, as for a call to the pod's own Service.
        (&pod, "proxy", format!("http://{other}/"), "outside direct".into()),
        (&pod, "proxy", format!("http://{own}:8080/"), format!("in {own}:8080")),
        // The application reaches itself without the proxy.
        (&pod, "app", "http://127.0.0.1:8080/".into(), "app direct".into()),
        (&pod, "app", format!("http://{own}:8080/"), "app direct".into()),
        (
            &outside,
            "sleep",
            format!("http://{own}:8080/"),
            format!("in {own}:8080"),
        ),
        (
            &outside,
            "sleep",
            format!("http://{own}:15021/"),
            "status direct".into(),
        ),
        (
            &outside,
            "sleep",
            format!("http://{own}:1234/"),
            format!("in {own}:1234"),
        ),
    ];
    for (from, container, url, expected) in cases {
        let (code, text) = curl(&context, from, container, &[&url]).await;
        assert_eq!((code, text), (0, expected), "{container} to {url}");
    }
    // What the inbound listener sends on, from 127.0.0.6, arrives at the application.
    let args = ["--interface", "127.0.0.6", &format!("http://{own}:8080/")];
    assert_eq!(curl(&context, &pod, "proxy", &args).await, (0, "app direct".into()));
}
