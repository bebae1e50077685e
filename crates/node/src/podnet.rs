//! The pod network: addresses, and one routed veth pair per pod.
//!
//! Called by the node agent (addresses and the node's side) and by the shim (the pod's side). There is no bridge: each
//! pod has `eth0` with a /32, a default route through a link-local address that stands for the node's end of its pair, and
//! the node has one host route per pod. Hardware addresses are fixed, so no ARP is needed on either side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

use crate::sandbox::{HAIRPIN_TABLE, NODE_ADDRESS, SandboxError};

/// Next hop of every pod: no real address, only the key of a permanent neighbour entry.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Hardware address of the node's end of each pair.
const NODE_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// File in a pod's directory that holds its address.
const ADDRESS_FILE: &str = "ip";
/// First and last host number within 10.244.0.0/16 for pods; below are addresses of the node.
const FIRST: u32 = 0x0AF4_0002;
const LAST: u32 = 0x0AF4_FFFE;

/// Errors of addresses and interfaces.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Every address is taken.
    #[error("no free pod address in 10.244.0.0/16")]
    Exhausted,
    /// The pod's directory cannot be written.
    #[error("keeping the address of pod {uid}: {source}")]
    Persist {
        /// The pod.
        uid: String,
        /// The error.
        source: std::io::Error,
    },
    /// `ip` or `nft` refused.
    #[error("pod network: {0}")]
    Program(#[from] SandboxError),
}

/// Which pod has which address. A pod keeps its address as long as its directory exists, over restarts of the cluster.
#[derive(Debug, Default)]
pub struct AddressPool {
    by_pod: BTreeMap<String, Ipv4Addr>,
    taken: BTreeSet<Ipv4Addr>,
    next: u32,
}

impl AddressPool {
    /// Reads the addresses of all pods that have a directory below `pods_dir`.
    #[must_use]
    pub fn load(pods_dir: &Path) -> Self {
        let mut pool = Self {
            next: FIRST,
            ..Self::default()
        };
        for entry in std::fs::read_dir(pods_dir).into_iter().flatten().flatten() {
            let address = std::fs::read_to_string(entry.path().join(ADDRESS_FILE))
                .ok()
                .and_then(|t| t.trim().parse().ok());
            if let (Some(address), Ok(uid)) = (address, entry.file_name().into_string())
                && pool.taken.insert(address)
            {
                pool.next = pool.next.max(u32::from(address) + 1);
                pool.by_pod.insert(uid, address);
            }
        }
        pool
    }

    /// The pod's address, a new one at first. Addresses are given out in a circle, so that one is not soon used again by
    /// another pod while a client still has it in a cache.
    ///
    /// # Errors
    /// [`NetError::Exhausted`], or [`NetError::Persist`] when it cannot be written down.
    pub fn assign(&mut self, uid: &str, pod_dir: &Path) -> Result<Ipv4Addr, NetError> {
        if let Some(address) = self.by_pod.get(uid) {
            return Ok(*address);
        }
        let count = LAST - FIRST + 1;
        let start = self.next.clamp(FIRST, LAST) - FIRST;
        let address = (0..count)
            .map(|offset| Ipv4Addr::from(FIRST + (start + offset) % count))
            .find(|candidate| !self.taken.contains(candidate))
            .ok_or(NetError::Exhausted)?;
        std::fs::write(pod_dir.join(ADDRESS_FILE), format!("{address}\n")).map_err(|source| NetError::Persist {
            uid: uid.to_owned(),
            source,
        })?;
        self.next = u32::from(address) + 1;
        self.taken.insert(address);
        self.by_pod.insert(uid.to_owned(), address);
        Ok(address)
    }

    /// Frees a pod's address, once its processes and its directory are gone.
    pub fn release(&mut self, uid: &str) {
        if let Some(address) = self.by_pod.remove(uid) {
            self.taken.remove(&address);
        }
    }
}

/// Name of the node's end of a pod's pair: unique, since the address is.
#[must_use]
pub fn host_interface(address: Ipv4Addr) -> String {
    let [_, _, c, d] = address.octets();
    format!("pod{c}x{d}")
}

fn pod_mac(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Makes the pair, its far end as `eth0` in the network namespace of process `pid`, and the route. Runs in the node's
/// network namespace; blocking.
///
/// # Errors
/// [`NetError::Program`] with the message of `ip` or `nft`.
pub fn attach(address: Ipv4Addr, pid: i32) -> Result<(), NetError> {
    let name = host_interface(address);
    let mac = pod_mac(address);
    // A leftover of a sandbox that has just ended goes away by itself, but maybe not soon enough.
    let _ = crate::sandbox::run_with_input("ip", &["link", "del", &name], "");
    crate::sandbox::run_with_input(
        "ip",
        &["-batch", "-"],
        &format!(
            "link add {name} address {NODE_MAC} type veth peer name eth0 address {mac} netns {pid}\n\
             link set {name} up\n\
             neigh replace {address} lladdr {mac} dev {name} nud permanent\n\
             route replace {address}/32 dev {name} scope link src {NODE_ADDRESS}\n"
        ),
    )?;
    crate::sandbox::run_with_input(
        "nft",
        &["-f", "-"],
        &format!("add element ip {HAIRPIN_TABLE} pods {{ {address} . {address} }}\n"),
    )?;
    Ok(())
}

/// The pod's side: run by the shim in the pod's own namespaces once `eth0` is there.
///
/// # Errors
/// [`NetError::Program`] with the message of `ip`.
pub fn configure_pod(address: Ipv4Addr) -> Result<(), NetError> {
    crate::sandbox::run_with_input(
        "ip",
        &["-batch", "-"],
        &format!(
            "link set lo up\n\
             addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             neigh replace {GATEWAY} lladdr {NODE_MAC} dev eth0 nud permanent\n\
             route add {GATEWAY}/32 dev eth0 scope link\n\
             route add default via {GATEWAY} dev eth0 src {address}\n"
        ),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_keeps_its_address_over_a_restart_and_a_freed_one_is_not_given_out_at_once() {
        let dir = tempfile::tempdir().expect("dir");
        let pods = |uid: &str| {
            let path = dir.path().join(uid);
            std::fs::create_dir_all(&path).expect("mkdir");
            path
        };
        let mut pool = AddressPool::load(dir.path());
        let a = pool.assign("a", &pods("a")).expect("address");
        let b = pool.assign("b", &pods("b")).expect("address");
        assert_eq!(a, Ipv4Addr::new(10, 244, 0, 2));
        assert_ne!(a, b);
        assert_eq!(pool.assign("a", &pods("a")).expect("address"), a);
        std::fs::remove_dir_all(pods("b")).expect("remove");
        pool.release("b");
        assert_ne!(pool.assign("c", &pods("c")).expect("address"), b);
        let mut again = AddressPool::load(dir.path());
        assert_eq!(again.assign("a", &pods("a")).expect("address"), a);
    }

    #[test]
    fn a_full_pool_says_so() {
        let dir = tempfile::tempdir().expect("dir");
        let mut pool = AddressPool {
            next: FIRST,
            ..AddressPool::default()
        };
        pool.taken.extend((FIRST..=LAST).map(Ipv4Addr::from));
        assert!(matches!(pool.assign("a", dir.path()), Err(NetError::Exhausted)));
    }
}
