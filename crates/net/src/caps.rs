//! Capabilities: names, sets and the drop before a container's program runs.
//!
//! Called by the node agent (names to sets) and by the shim (apply). The kernel's numbers are the bits.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Names of `capability.h`, the index being the bit.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities as a bit mask.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Caps(pub u64);

impl Caps {
    /// Every capability that this crate knows.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// What a container gets when it asks for nothing: Docker's defaults without `NET_RAW` (and without `MKNOD`, which a
    /// user namespace does not honour anyway).
    #[must_use]
    pub fn container_default() -> Self {
        [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ]
        .iter()
        .fold(Self(0), |set, name| set.with(name).unwrap_or(set))
    }

    /// The bit of a name, with or without `CAP_`; `ALL` is every bit. `None` for an unknown name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" {
            return Some(Self::ALL);
        }
        NAMES.iter().position(|n| *n == bare).map(|bit| Self(1 << bit))
    }

    /// This set and the named capability.
    #[must_use]
    pub fn with(self, name: &str) -> Option<Self> {
        Self::parse(name).map(|other| Self(self.0 | other.0))
    }

    /// This set without the named capability.
    #[must_use]
    pub fn without(self, name: &str) -> Option<Self> {
        Self::parse(name).map(|other| Self(self.0 & !other.0))
    }

    /// Whether all bits of `other` are in this set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Takes everything outside `keep` out of the bounding set of this thread; nothing run from it can get it back.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn limit_bounding_set(keep: Caps) -> io::Result<()> {
    for bit in 0..64u32 {
        let cap = CapabilitySet::from_bits_retain(1u64 << bit);
        if keep.0 & (1u64 << bit) != 0 {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(cap) {
            Ok(()) => {}
            // Above the kernel's last capability.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sets permitted and effective to `keep`, inheritable and ambient to nothing. For a process that is not root this has
/// already happened by changing its user id.
///
/// # Errors
/// `EPERM` when `keep` holds more than the thread has.
pub fn set_current(keep: Caps) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let set = CapabilitySet::from_bits_retain(keep.0);
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: set,
            permitted: set,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

/// The effective set of this thread.
///
/// # Errors
/// The kernel's.
pub fn effective() -> io::Result<Caps> {
    Ok(Caps(rustix::thread::capabilities(None)?.effective.bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels_bits() {
        assert_eq!(Caps::parse("NET_ADMIN"), Some(Caps(1 << 12)));
        assert_eq!(Caps::parse("cap_net_raw"), Some(Caps(1 << 13)));
        assert_eq!(Caps::parse("CHECKPOINT_RESTORE"), Some(Caps(1 << 40)));
        assert_eq!(Caps::parse("NET_EVERYTHING"), None);
    }

    #[test]
    fn the_default_set_can_neither_sniff_nor_change_the_network() {
        let set = Caps::container_default();
        for name in ["NET_RAW", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "BPF"] {
            assert!(!set.contains(Caps::parse(name).expect("known")), "{name}");
        }
        assert!(set.contains(Caps::parse("NET_BIND_SERVICE").expect("known")));
    }
}
