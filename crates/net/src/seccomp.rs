//! Seccomp filters. For containers everything is allowed but what can harm the kernel or escape a namespace; a daemon that
//! does such a thing is ended; a network server is allowed what it needs and nothing else.
//!
//! Called by the shim just before a container's program runs ([`install`]), and by [`crate::sandbox`] at the start of this
//! project's own servers. The list for containers follows what container runtimes deny by default; it is a second wall
//! behind capabilities and the user namespace, not the first.

mod calls;

use std::io;

use calls::{DENIED, FOREIGN, SERVER};

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARG0_LOW: u32 = 16;
const OFFSET_ARG1_LOW: u32 = 24;
const OFFSET_ARG2_LOW: u32 = 32;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xC000_00B7;

/// System calls of x32 carry this bit on x86_64; they would slip past comparisons by number.
const X32_BIT: u32 = 0x4000_0000;

/// Flags of `clone(2)` that make namespaces.
const CLONE_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Numbers of these system calls are small and positive on every architecture.
fn number(syscall: libc::c_long) -> u32 {
    syscall as u32
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: LOAD,
        jt: 0,
        jf: 0,
        k: offset,
    }
}

/// Goes on behind the next instruction unless the condition holds.
fn unless(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 1, k }
}

fn ret(value: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: value,
    }
}

fn errno(code: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | (code as u32 & libc::SECCOMP_RET_DATA)
}

/// Goes on behind the next `length` instructions unless the condition holds.
fn unless_over(code: u16, k: u32, length: u8) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: 0,
        jf: length,
        k,
    }
}

/// Ends the program for calls of a foreign convention, which has other numbers, with `foreign`; then the number is loaded.
fn prologue(foreign: u32) -> Vec<libc::sock_filter> {
    let mut code = vec![
        load(OFFSET_ARCH),
        libc::sock_filter {
            code: JUMP_EQ,
            jt: 1,
            jf: 0,
            k: AUDIT_ARCH,
        },
        ret(foreign),
        load(OFFSET_NR),
    ];
    if cfg!(target_arch = "x86_64") {
        code.extend([unless(JUMP_SET, X32_BIT), ret(foreign)]);
    }
    // glibc falls back to clone, whose flags can be read here; those of clone3 are behind a pointer.
    code.extend([unless(JUMP_EQ, number(libc::SYS_clone3)), ret(errno(libc::ENOSYS))]);
    code
}

fn each(code: &mut Vec<libc::sock_filter>, calls: &[libc::c_long], action: u32) {
    for syscall in calls {
        code.extend([unless(JUMP_EQ, number(*syscall)), ret(action)]);
    }
}

/// `clone` that makes namespaces meets `action`; what is left of `clone` meets `rest`.
fn clone(code: &mut Vec<libc::sock_filter>, action: u32, rest: &[libc::sock_filter]) {
    code.extend([
        unless_over(JUMP_EQ, number(libc::SYS_clone), 3 + rest.len() as u8),
        load(OFFSET_ARG0_LOW),
        unless(JUMP_SET, CLONE_NAMESPACES),
        ret(action),
    ]);
    code.extend(rest);
}

/// The call is allowed if the low half of an argument is one of the values, else EPERM.
fn one_of(code: &mut Vec<libc::sock_filter>, syscall: libc::c_long, argument: u32, values: &[u32]) {
    code.extend([
        unless_over(JUMP_EQ, number(syscall), values.len() as u8 + 3),
        load(argument),
    ]);
    for (index, value) in values.iter().enumerate() {
        code.push(libc::sock_filter {
            code: JUMP_EQ,
            jt: (values.len() - index) as u8,
            jf: 0,
            k: *value,
        });
    }
    code.extend([ret(errno(libc::EPERM)), ret(libc::SECCOMP_RET_ALLOW)]);
}

/// The call is allowed if the low half of an argument has none of these bits, else EPERM.
fn without_bits(code: &mut Vec<libc::sock_filter>, syscall: libc::c_long, argument: u32, bits: u32) {
    code.extend([
        unless_over(JUMP_EQ, number(syscall), 4),
        load(argument),
        unless(JUMP_SET, bits),
        ret(errno(libc::EPERM)),
        ret(libc::SECCOMP_RET_ALLOW),
    ]);
}

fn container() -> Vec<libc::sock_filter> {
    let mut code = prologue(errno(libc::ENOSYS));
    each(&mut code, DENIED, errno(libc::EPERM));
    clone(&mut code, errno(libc::EPERM), &[ret(libc::SECCOMP_RET_ALLOW)]);
    code.push(ret(libc::SECCOMP_RET_ALLOW));
    code
}

/// What ends the process in both of this project's own filters.
fn attacks() -> Vec<libc::sock_filter> {
    let mut code = prologue(libc::SECCOMP_RET_KILL_PROCESS);
    each(&mut code, DENIED, libc::SECCOMP_RET_KILL_PROCESS);
    each(&mut code, FOREIGN, libc::SECCOMP_RET_KILL_PROCESS);
    // Threads are made with CLONE_THREAD; anything else would be another process.
    let threads = [
        libc::sock_filter {
            code: JUMP_SET,
            jt: 1,
            jf: 0,
            k: libc::CLONE_THREAD as u32,
        },
        ret(libc::SECCOMP_RET_KILL_PROCESS),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    clone(&mut code, libc::SECCOMP_RET_KILL_PROCESS, &threads);
    code
}

fn daemon() -> Vec<libc::sock_filter> {
    let mut code = attacks();
    code.push(ret(libc::SECCOMP_RET_ALLOW));
    code
}

/// `PR_SET_VMA`, by which allocators name their mappings.
const PR_SET_VMA: u32 = 0x5356_4d41;

fn server(pid: u32) -> Vec<libc::sock_filter> {
    let mut code = attacks();
    each(&mut code, SERVER, libc::SECCOMP_RET_ALLOW);
    let families = [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX, libc::AF_NETLINK].map(|f| f as u32);
    one_of(&mut code, libc::SYS_socket, OFFSET_ARG0_LOW, &families);
    one_of(
        &mut code,
        libc::SYS_socketpair,
        OFFSET_ARG0_LOW,
        &[libc::AF_UNIX as u32],
    );
    let requests = [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::TCGETS].map(|r| r as u32);
    one_of(&mut code, libc::SYS_ioctl, OFFSET_ARG1_LOW, &requests);
    let options = [libc::PR_SET_NAME as u32, libc::PR_GET_NAME as u32, PR_SET_VMA];
    one_of(&mut code, libc::SYS_prctl, OFFSET_ARG0_LOW, &options);
    // Its own limits only, and signals to itself, which is how a program aborts.
    one_of(&mut code, libc::SYS_prlimit64, OFFSET_ARG0_LOW, &[0, pid]);
    one_of(&mut code, libc::SYS_tgkill, OFFSET_ARG0_LOW, &[pid]);
    // Memory is written or executed; what is loaded by now is all the code there will be.
    without_bits(&mut code, libc::SYS_mmap, OFFSET_ARG2_LOW, libc::PROT_EXEC as u32);
    without_bits(&mut code, libc::SYS_mprotect, OFFSET_ARG2_LOW, libc::PROT_EXEC as u32);
    code.push(ret(errno(libc::EPERM)));
    code
}

/// Which filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// For containers of anybody: what can harm the kernel or escape a namespace is refused with EPERM.
    Container,
    /// For a daemon: the same, other programs, other processes and other users end the process; the rest is allowed.
    Daemon,
    /// For a network server: what ends a daemon ends it; of the rest, what it needs is allowed, and EPERM is the answer else.
    Server,
}

/// Installs the container's filter on this thread for good. Needs no_new_privs or `CAP_SYS_ADMIN` in its user namespace.
///
/// # Errors
/// The kernel's: `EACCES` without either, `EINVAL` without seccomp in the kernel.
pub fn install() -> io::Result<()> {
    install_filter(Filter::Container)
}

/// Installs a filter on this thread, and all that it makes, for good. Needs what [`install`] needs.
///
/// # Errors
/// As [`install`].
pub fn install_filter(filter: Filter) -> io::Result<()> {
    let mut code = match filter {
        Filter::Container => container(),
        Filter::Daemon => daemon(),
        Filter::Server => server(std::process::id()),
    };
    let length = u16::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let prog = libc::sock_fprog {
        len: length,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: `prog` points to `code`, which lives until after the call; the kernel copies and checks the program.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const prog) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    /// A seccomp filter is for one thread, so a test thread of its own shows it without harm to others.
    fn filtered(filter: Filter, work: impl FnOnce() + Send + 'static) {
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).expect("no_new_privs");
            install_filter(filter).expect("install");
            work();
        })
        .join()
        .expect("thread with filter");
    }

    #[test]
    fn namespaces_and_mounts_are_refused_and_ordinary_work_goes_on() {
        filtered(Filter::Container, || {
            assert_eq!(
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER),
                Err(nix::errno::Errno::EPERM)
            );
            assert_eq!(
                rustix::mount::mount("none", "/", "tmpfs", rustix::mount::MountFlags::empty(), None),
                Err(rustix::io::Errno::PERM)
            );
            // Making a thread uses clone3 or clone without namespace flags.
            std::thread::spawn(|| std::fs::read("/proc/self/status").expect("read"))
                .join()
                .expect("thread");
        });
    }

    #[test]
    fn a_server_has_sockets_threads_and_memory_and_nothing_beyond() {
        use nix::errno::Errno;
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        filtered(Filter::Server, || {
            std::thread::spawn(|| std::fs::read("/proc/self/status").expect("read"))
                .join()
                .expect("thread");
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
            listener.set_nonblocking(true).expect("ioctl FIONBIO");
            let raw = |family, kind| socket(family, kind, SockFlag::empty(), None).map(|_| ());
            assert_eq!(raw(AddressFamily::Packet, SockType::Raw), Err(Errno::EPERM));
            assert_eq!(raw(AddressFamily::Alg, SockType::SeqPacket), Err(Errno::EPERM));
            assert_eq!(raw(AddressFamily::Inet6, SockType::Datagram), Ok(()));
            let map = |protection: libc::c_int| {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                // SAFETY: a new anonymous mapping that nobody uses.
                unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) != libc::MAP_FAILED }
            };
            assert!(map(libc::PROT_READ | libc::PROT_WRITE));
            assert!(!map(libc::PROT_READ | libc::PROT_EXEC));
            let parent = nix::unistd::getppid();
            assert_eq!(nix::sys::signal::kill(parent, None), Err(Errno::EPERM));
            assert_eq!(nix::sys::prctl::set_dumpable(true), Err(Errno::EPERM));
        });
    }

    /// In a process of its own, since it does not survive: this test starts itself again and says by a variable what to do.
    #[test]
    fn attacks_end_the_process() {
        const ATTACK: &str = "MANTLET_TEST_ATTACK";
        if let Ok(attack) = std::env::var(ATTACK) {
            let filter = if attack.ends_with("daemon") {
                Filter::Daemon
            } else {
                Filter::Server
            };
            filtered(filter, move || {
                let outcome = match attack.split(' ').next() {
                    Some("exec") => std::process::Command::new("true")
                        .status()
                        .map(|_| ())
                        .map_err(|e| e.to_string()),
                    Some("ptrace") => nix::sys::ptrace::traceme().map_err(|e| e.to_string()),
                    Some("unshare") => {
                        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).map_err(|e| e.to_string())
                    }
                    Some("setuid") => nix::unistd::setuid(nix::unistd::getuid()).map_err(|e| e.to_string()),
                    _ => Err("unknown".into()),
                };
                panic!("survived {attack}: {outcome:?}");
            });
        }
        for attack in ["exec", "ptrace", "unshare", "setuid"] {
            for filter in ["daemon", "server"] {
                let child = std::process::Command::new(std::env::current_exe().expect("own path"))
                    .args(["--exact", "seccomp::tests::attacks_end_the_process"])
                    .env(ATTACK, format!("{attack} {filter}"))
                    .output()
                    .expect("the test again");
                assert_eq!(
                    child.status.signal(),
                    Some(libc::SIGSYS),
                    "{attack} {filter}: {child:?}"
                );
            }
        }
    }
}
