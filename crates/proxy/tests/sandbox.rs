//! What code that runs inside of the proxy's process can still do. The process is the real program under its real filter; the
//! test takes the place of the attacker by making its main thread call the kernel, as an exploit would.
//!
//! Each attack runs a second time with `MANTLET_SANDBOX=off` and must then succeed.

mod common;

use std::time::Duration;

use common::program::Program;
use mantlet_testkit::eventually;
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// How a system call ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Value(i64),
    Refused(Errno),
    Killed,
    /// The process has become another program.
    Exec,
}

/// An argument of a system call.
enum Arg<'a> {
    Number(u64),
    Text(&'a str),
}

use Arg::{Number, Text};

/// Makes the main thread of the process do one system call in the place where it waits for events.
fn inject(pid: Pid, call: libc::c_long, arguments: &[Arg<'_>]) -> End {
    let saved = loop {
        ptrace::attach(pid).unwrap();
        assert!(matches!(
            waitpid(pid, None),
            Ok(WaitStatus::Stopped(_, Signal::SIGSTOP))
        ));
        let saved = ptrace::getregs(pid).unwrap();
        // It waits in epoll_wait, so the instruction before is `syscall`; unless it has just been woken.
        let word = ptrace::read(pid, (saved.rip - 2) as *mut libc::c_void).unwrap();
        if word & 0xffff == 0x050f {
            break saved;
        }
        ptrace::detach(pid, None).unwrap();
    };
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACEEXEC).unwrap();
    let instruction = saved.rip - 2;
    let mut registers = saved;
    registers.rip = instruction;
    registers.rax = call as u64;
    registers.orig_rax = u64::MAX;
    // Below the red zone of the stack.
    let mut scratch = saved.rsp - 8192;
    let mut values = [0; 6];
    for (value, argument) in values.iter_mut().zip(arguments) {
        *value = match argument {
            Number(number) => *number,
            Text(text) => {
                let mut bytes = text.as_bytes().to_vec();
                bytes.resize(text.len() / 8 * 8 + 8, 0);
                for (index, chunk) in bytes.chunks(8).enumerate() {
                    let word = i64::from_ne_bytes(chunk.try_into().unwrap());
                    ptrace::write(pid, (scratch + 8 * index as u64) as *mut libc::c_void, word).unwrap();
                }
                let start = scratch;
                scratch += bytes.len() as u64;
                start
            }
        };
    }
    [
        registers.rdi,
        registers.rsi,
        registers.rdx,
        registers.r10,
        registers.r8,
        registers.r9,
    ] = values;
    ptrace::setregs(pid, registers).unwrap();
    ptrace::step(pid, None).unwrap();
    // Only looked at, so that an end is still there for the owner of the process.
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(pid), look).unwrap() {
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => return End::Killed,
        WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..) => {}
        other => panic!("{other:?}"),
    }
    match waitpid(pid, None).unwrap() {
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
        WaitStatus::PtraceEvent(..) => {
            ptrace::detach(pid, None).unwrap();
            return End::Exec;
        }
        other => panic!("{other:?}"),
    }
    let result = ptrace::getregs(pid).unwrap().rax as i64;
    ptrace::setregs(pid, saved).unwrap();
    ptrace::detach(pid, None).unwrap();
    if (-4095..0).contains(&result) {
        End::Refused(Errno::from_raw(-result as i32))
    } else {
        End::Value(result)
    }
}

const HERE: u64 = libc::AT_FDCWD as u64;
const CREATE: u64 = (libc::O_WRONLY | libc::O_CREAT) as u64;

async fn program(sandbox: &str) -> Program {
    let program = Program::start("sidecar", "web", None, &[("MANTLET_SANDBOX", sandbox)]).await;
    // The event loop is where the attacker's code is put.
    eventually("the main thread waits", Duration::from_secs(20), || async {
        match std::fs::read_to_string(program.proc("syscall")).unwrap() {
            text if text.starts_with(&format!("{} ", libc::SYS_epoll_wait)) => Ok(()),
            other => Err(other),
        }
    })
    .await;
    program
}

fn pid(program: &Program) -> Pid {
    Pid::from_raw(program.process.id().cast_signed())
}

#[tokio::test]
async fn nothing_is_left_to_gain() {
    let confined = program("on").await;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(confined.status(set), "0000000000000000", "{set}");
    }
    assert_eq!(
        [confined.status("NoNewPrivs"), confined.status("Seccomp")],
        ["1", "2"],
        "{}",
        confined.log()
    );
    // Every thread: workers and writers of logs were made after it.
    for task in std::fs::read_dir(confined.proc("task")).unwrap() {
        let text = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(
            text.contains("Seccomp:\t2") && text.contains("CapEff:\t0000000000000000"),
            "{text}"
        );
    }
    let limits = std::fs::read_to_string(confined.proc("limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
    assert!(core.split_whitespace().nth(4) == Some("0"), "{core}");

    let open = program("off").await;
    assert_eq!([open.status("NoNewPrivs"), open.status("Seccomp")], ["0", "0"]);
    assert_ne!(open.status("CapEff"), "0000000000000000");
    assert!(open.log().contains("MANTLET_SANDBOX=off"), "{}", open.log());
}

#[tokio::test]
async fn files_of_others_are_out_of_reach() {
    let (confined, open) = (program("on").await, program("off").await);
    let outside = tempfile::tempdir().unwrap();
    let new = outside.path().join("new").display().to_string();
    let token = confined.directory.path().join("token").display().to_string();
    for (path, flags) in [
        ("/etc/shadow", 0),
        ("/etc/passwd", 0),
        ("/root", 0),
        (new.as_str(), CREATE),
    ] {
        let open_at = [Number(HERE), Text(path), Number(flags), Number(0o600)];
        let end = inject(pid(&confined), libc::SYS_openat, &open_at);
        assert_eq!(end, End::Refused(Errno::EACCES), "{path}");
        let end = inject(pid(&open), libc::SYS_openat, &open_at);
        assert!(matches!(end, End::Value(0..)), "{path} without the sandbox: {end:?}");
    }
    // What it needs is there, to read; the token is not its to change.
    for path in ["/etc/resolv.conf", "/proc/self/status", token.as_str()] {
        let end = inject(
            pid(&confined),
            libc::SYS_openat,
            &[Number(HERE), Text(path), Number(0), Number(0)],
        );
        assert!(matches!(end, End::Value(0..)), "{path}: {end:?}");
    }
    let end = inject(
        pid(&confined),
        libc::SYS_openat,
        &[Number(HERE), Text(&token), Number(1), Number(0)],
    );
    assert_eq!(end, End::Refused(Errno::EACCES), "writing {token}");
    // The process has gone on with its work.
    let stream = confined.net.run(|| std::net::TcpStream::connect("127.0.0.1:15021"));
    assert!(stream.is_ok());
}

#[tokio::test]
async fn other_processes_and_kernel_interfaces_are_out_of_reach() {
    let (confined, open) = (program("on").await, program("off").await);
    let victim = std::process::id();
    let packets = [
        Number(libc::AF_PACKET as u64),
        Number(libc::SOCK_RAW as u64),
        Number(0x0300),
    ];
    let signal = [Number(victim.into()), Number(0)];
    let pages = [
        Number(0),
        Number(4096),
        Number(7),
        Number(0x22),
        Number(u64::MAX),
        Number(0),
    ];
    for (call, arguments) in [
        (libc::SYS_socket, packets.as_slice()),
        (libc::SYS_kill, &signal),
        (libc::SYS_mmap, &pages),
    ] {
        let end = inject(pid(&confined), call, arguments);
        assert_eq!(end, End::Refused(Errno::EPERM), "system call {call}");
        let end = inject(pid(&open), call, arguments);
        assert!(
            matches!(end, End::Value(_)),
            "system call {call} without the sandbox: {end:?}"
        );
    }
}

#[tokio::test]
async fn what_only_an_attacker_calls_ends_the_process() {
    let namespaces = [Number(libc::CLONE_NEWUTS as u64)];
    let child = [Number(libc::SIGCHLD as u64), Number(0), Number(0), Number(0), Number(0)];
    let calls: [(&str, libc::c_long, &[Arg<'_>]); 5] = [
        ("ptrace", libc::SYS_ptrace, &[Number(libc::PTRACE_TRACEME.into())]),
        ("unshare", libc::SYS_unshare, &namespaces),
        (
            "keyctl",
            libc::SYS_keyctl,
            &[Number(0), Number(u64::MAX - 2), Number(0)],
        ),
        ("io_uring_setup", libc::SYS_io_uring_setup, &[Number(1), Number(0)]),
        ("clone of a process", libc::SYS_clone, &child),
    ];
    for (name, call, arguments) in calls {
        let confined = program("on").await;
        assert_eq!(inject(pid(&confined), call, arguments), End::Killed, "{name}");
    }
    let exec = [Text("/bin/true"), Number(0), Number(0)];
    let confined = program("on").await;
    assert_eq!(inject(pid(&confined), libc::SYS_execve, &exec), End::Killed);
    // Without the sandbox, the process is another program from then on.
    let mut open = program("off").await;
    assert_eq!(inject(pid(&open), libc::SYS_unshare, &namespaces), End::Value(0));
    assert_eq!(inject(pid(&open), libc::SYS_execve, &exec), End::Exec);
    let status = open.process.wait(Duration::from_secs(20)).expect("/bin/true ends");
    assert!(status.success(), "{status:?}");
}
