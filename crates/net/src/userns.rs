//! User namespaces: choosing and writing id maps.
//!
//! Called by the sandbox launcher, and by the preflight check for reading ranges. Root writes the maps itself, from the ids that
//! its own user namespace has; an ordinary user goes through `newuidmap` and `newgidmap`, which check `/etc/subuid` and
//! `/etc/subgid`.

use std::io;
use std::path::Path;
use std::process::Command;

/// Ids inside a cluster's user namespace: 0 to 65535, as in a container.
pub const ID_COUNT: u32 = 65_536;
/// First host id that root uses for clusters: above what distributions give out, below systemd's foreign range.
const ROOT_BASE: u32 = 0x7000_0000;
/// Distinct ranges for clusters of root.
const ROOT_SLOTS: u32 = 1024;

/// Errors of choosing or writing a map, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The caller may not use subordinate ids.
    #[error(
        "user {user} has no range of {ID_COUNT} ids in {file}; add one with `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
    )]
    NoSubordinateIds {
        /// The user's name.
        user: String,
        /// The file without an entry.
        file: &'static str,
    },
    /// Root of a user namespace (a container) that has too few ids itself.
    #[error(
        "this root is that of a user namespace without the ids 0 to {} (see {file}); give it more: containers of an ordinary user have as many as the user's ranges in /etc/subuid and /etc/subgid",
        ID_COUNT - 1
    )]
    TooFewIds {
        /// The map that shows it.
        file: &'static str,
    },
    /// `newuidmap` or `newgidmap` is missing or refused.
    #[error("{program} failed: {reason}; install the package uidmap and check /etc/subuid and /etc/subgid")]
    Helper {
        /// The program.
        program: &'static str,
        /// Its message.
        reason: String,
    },
    /// The kernel refused.
    #[error("writing {path}: {source}")]
    Write {
        /// The file below /proc.
        path: String,
        /// The kernel's error.
        source: io::Error,
    },
}

/// How ids inside map to ids on the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum IdMap {
    /// Root: 0.. inside is `base`.. on the host. Root on the host is nobody inside.
    Shifted {
        /// First host id.
        base: u32,
    },
    /// Root of a user namespace with too few ids to shift any: each inside is the same outside. The pieces (first, count) are
    /// those of the namespace's own map, since the kernel wants each line of a map within one of its parent's.
    Same {
        /// User ids.
        uids: Vec<(u32, u32)>,
        /// Group ids.
        gids: Vec<(u32, u32)>,
    },
    /// An ordinary user: 0 inside is the user, 1.. are the subordinate ids.
    Subordinate {
        /// The user's id.
        uid: u32,
        /// The user's group id.
        gid: u32,
        /// First subordinate user id.
        sub_uid: u32,
        /// First subordinate group id.
        sub_gid: u32,
    },
}

impl IdMap {
    /// The map for root's cluster with its state in `state_dir`: the same directory always gives the same range.
    ///
    /// # Errors
    /// [`MapError::TooFewIds`] for root of a small user namespace.
    pub fn for_root(state_dir: &Path) -> Result<Self, MapError> {
        let read = |file| std::fs::read_to_string(file).unwrap_or_default();
        Self::within(state_dir, &read("/proc/self/uid_map"), &read("/proc/self/gid_map"))
    }

    /// As [`IdMap::for_root`], with the texts of the caller's own maps.
    fn within(state_dir: &Path, uid_map: &str, gid_map: &str) -> Result<Self, MapError> {
        use std::os::unix::ffi::OsStrExt;
        // FNV-1a: stable across versions of the standard library, since files on disk are owned by these ids.
        let hash = state_dir
            .as_os_str()
            .as_bytes()
            .iter()
            .fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193));
        let base = ROOT_BASE + (hash % ROOT_SLOTS) * ID_COUNT;
        // In a namespace of its own, root may still have a second range.
        for base in [base, ID_COUNT] {
            if covers(uid_map, base) && covers(gid_map, base) {
                return Ok(Self::Shifted { base });
            }
        }
        let same = |text, file| pieces(text).ok_or(MapError::TooFewIds { file });
        Ok(Self::Same {
            uids: same(uid_map, "/proc/self/uid_map")?,
            gids: same(gid_map, "/proc/self/gid_map")?,
        })
    }

    /// The map for an ordinary user, from `/etc/subuid` and `/etc/subgid`.
    ///
    /// # Errors
    /// [`MapError::NoSubordinateIds`].
    pub fn for_user(uid: u32, gid: u32, user: &str) -> Result<Self, MapError> {
        let find = |file: &'static str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            subordinate_range(&text, user, uid).ok_or_else(|| MapError::NoSubordinateIds {
                user: user.to_owned(),
                file,
            })
        };
        Ok(Self::Subordinate {
            uid,
            gid,
            sub_uid: find("/etc/subuid")?,
            sub_gid: find("/etc/subgid")?,
        })
    }

    /// Writes the maps of process `pid`, which has just made its user namespace.
    ///
    /// # Errors
    /// [`MapError::Write`] (root) or [`MapError::Helper`] (others).
    pub fn write(&self, pid: i32) -> Result<(), MapError> {
        let write = |name: &str, text: String| {
            let path = format!("/proc/{pid}/{name}");
            std::fs::write(&path, text).map_err(|source| MapError::Write { path, source })
        };
        match *self {
            Self::Shifted { base } => {
                write("gid_map", format!("0 {base} {ID_COUNT}\n"))?;
                write("uid_map", format!("0 {base} {ID_COUNT}\n"))
            }
            Self::Same { ref uids, ref gids } => {
                let lines = |pieces: &[(u32, u32)]| -> String {
                    let line = |(first, count): &(u32, u32)| format!("{first} {first} {count}\n");
                    pieces.iter().map(line).collect()
                };
                write("gid_map", lines(gids))?;
                write("uid_map", lines(uids))
            }
            Self::Subordinate {
                uid,
                gid,
                sub_uid,
                sub_gid,
            } => {
                helper("newgidmap", pid, gid, sub_gid)?;
                helper("newuidmap", pid, uid, sub_uid)
            }
        }
    }
}

fn helper(program: &'static str, pid: i32, own: u32, sub: u32) -> Result<(), MapError> {
    let args = [
        pid.to_string(),
        "0".into(),
        own.to_string(),
        "1".into(),
        "1".into(),
        sub.to_string(),
    ];
    let output = Command::new(program)
        .args(args)
        .arg((ID_COUNT - 1).to_string())
        .output()
        .map_err(|error| MapError::Helper {
            program,
            reason: error.to_string(),
        })?;
    if output.status.success() {
        Ok(())
    } else {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(MapError::Helper { program, reason })
    }
}

/// First id and count of each line of a `uid_map`, as the namespace itself sees them.
fn extents(map: &str) -> impl Iterator<Item = (u32, u32)> {
    map.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?.parse().ok()?, fields.nth(1)?.parse().ok()?))
    })
}

/// Whether one line of the map has [`ID_COUNT`] ids from `base`.
fn covers(map: &str, base: u32) -> bool {
    extents(map).any(|(first, count)| {
        first <= base && u64::from(first) + u64::from(count) >= u64::from(base) + u64::from(ID_COUNT)
    })
}

/// The ids below [`ID_COUNT`] in the pieces of the map, if all are there.
fn pieces(map: &str) -> Option<Vec<(u32, u32)>> {
    let mut all: Vec<_> = extents(map).collect();
    all.sort_unstable();
    let mut next = 0;
    let mut pieces = Vec::new();
    for (first, count) in all {
        if first != next || next == ID_COUNT {
            break;
        }
        let count = count.min(ID_COUNT - next);
        pieces.push((first, count));
        next += count;
    }
    (next == ID_COUNT).then_some(pieces)
}

/// The first range of at least [`ID_COUNT`] - 1 ids for the user (by name or number) in the text of `/etc/subuid`.
pub fn subordinate_range(text: &str, user: &str, uid: u32) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, start, count) = (fields.next()?, fields.next()?, fields.next()?);
        let ours = name == user || name.parse() == Ok(uid);
        (ours && count.parse::<u32>().ok()? >= ID_COUNT - 1)
            .then(|| start.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ranges_are_found_by_name_and_number_and_must_be_large_enough() {
        let text = "alice:100000:65536\n1001:200000:65536\nbob:300000:1000\nbroken\n";
        assert_eq!(subordinate_range(text, "alice", 1000), Some(100_000));
        assert_eq!(subordinate_range(text, "carol", 1001), Some(200_000));
        assert_eq!(subordinate_range(text, "bob", 1002), None);
        assert_eq!(subordinate_range(text, "dave", 1003), None);
    }

    const ALL: &str = "         0          0 4294967295\n";

    #[test]
    fn roots_range_is_stable_and_stays_below_the_foreign_range() {
        let map = |dir: &str| IdMap::within(Path::new(dir), ALL, ALL).expect("all ids are there");
        let one = map("/var/lib/a");
        assert_eq!(one, map("/var/lib/a"));
        let IdMap::Shifted { base } = one else {
            panic!("root gets a shifted map")
        };
        assert!(base >= ROOT_BASE && base.checked_add(ID_COUNT).is_some_and(|end| end <= 0x7FFE_0000));
    }

    #[test]
    fn root_of_a_container_uses_the_ids_that_are_there() {
        let map = |text: &str| IdMap::within(Path::new("/a"), text, text);
        let enough = "0 1000 1\n1 100000 65536\n";
        let pieces = vec![(0, 1), (1, 65_535)];
        assert_eq!(
            map(enough).expect("65537 ids"),
            IdMap::Same {
                uids: pieces.clone(),
                gids: pieces
            }
        );
        let two = "0 100000 131072\n";
        assert_eq!(map(two).expect("two ranges"), IdMap::Shifted { base: ID_COUNT });
        for few in [
            "0 1000 1\n",
            "1 100000 65536\n",
            "0 1000 1\n2 100000 65536\n",
            "",
            "junk",
        ] {
            let error = map(few).expect_err("too few").to_string();
            assert!(error.contains("0 to 65535 (see /proc/self/uid_map)"), "{error}");
        }
    }
}
