//! A seccomp filter for containers: everything is allowed but what can harm the kernel or escape a namespace.
//!
//! Called by the shim just before a container's program runs. The list follows what container runtimes deny by default;
//! it is a second wall behind capabilities and the user namespace, not the first.

use std::io;

/// Offsets in `struct seccomp_data`.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARG0_LOW: u32 = 16;

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

/// Refused with EPERM.
const DENIED: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_name_to_handle_at,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

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

fn program() -> Vec<libc::sock_filter> {
    let mut code = vec![
        load(OFFSET_ARCH),
        libc::sock_filter {
            code: JUMP_EQ,
            jt: 1,
            jf: 0,
            k: AUDIT_ARCH,
        },
        // A foreign calling convention has other numbers: none of it is let through.
        ret(errno(libc::ENOSYS)),
        load(OFFSET_NR),
    ];
    if cfg!(target_arch = "x86_64") {
        code.extend([unless(JUMP_SET, X32_BIT), ret(errno(libc::ENOSYS))]);
    }
    // glibc falls back to clone, whose flags can be read here; those of clone3 are behind a pointer.
    code.extend([unless(JUMP_EQ, number(libc::SYS_clone3)), ret(errno(libc::ENOSYS))]);
    for syscall in DENIED {
        code.extend([unless(JUMP_EQ, number(*syscall)), ret(errno(libc::EPERM))]);
    }
    code.extend([
        libc::sock_filter {
            code: JUMP_EQ,
            jt: 0,
            jf: 3,
            k: number(libc::SYS_clone),
        },
        load(OFFSET_ARG0_LOW),
        unless(JUMP_SET, CLONE_NAMESPACES),
        ret(errno(libc::EPERM)),
        ret(libc::SECCOMP_RET_ALLOW),
    ]);
    code
}

/// Installs the filter on this process for good. Needs no_new_privs or `CAP_SYS_ADMIN` in its user namespace.
///
/// # Errors
/// The kernel's: `EACCES` without either, `EINVAL` without seccomp in the kernel.
pub fn install() -> io::Result<()> {
    let mut code = program();
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
    use super::*;

    /// A seccomp filter is for one thread, so a test thread of its own shows it without harm to others.
    #[test]
    fn namespaces_and_mounts_are_refused_and_ordinary_work_goes_on() {
        std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).expect("no_new_privs");
            install().expect("install");
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
        })
        .join()
        .expect("thread with filter");
    }
}
