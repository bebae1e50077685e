//! Effective mTLS mode of a workload and its ports: which PeerAuthentication wins (SEMANTICS 1a).
//!
//! Called for the inbound side of a proxy and, per endpoint, for what its clients do (S1.61, S1.63).

use std::collections::BTreeMap;

use mantlet_api::PeerAuthentication;
use mantlet_api::peer_authentication::MutualTlsMode;
use serde::Serialize;

use crate::world::{Config, World};

/// What a port accepts, after all merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Mode {
    /// Plaintext only.
    Disable,
    /// Both.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

/// Modes of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Effective {
    /// Mode of every port that `ports` does not list.
    pub workload: Mode,
    /// Ports of the workload with a mode of their own; some may equal `workload`.
    pub ports: BTreeMap<u16, Mode>,
}

impl Effective {
    /// Mode of a workload port.
    pub fn port(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.workload)
    }
}

/// Which objects are looked at: those of today, or those that former kinds were converted to, which count where none of today's
/// does (S7.4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Age {
    Today,
    Former,
}

impl Age {
    fn of(policy: &Config<PeerAuthentication>) -> Age {
        match policy.meta.origin {
            Some(_) => Age::Former,
            None => Age::Today,
        }
    }
}

/// The mode that a namespace as a whole has, from its own policy and the mesh's; `None` when there is neither, which
/// servers treat as PERMISSIVE and clients as "mTLS where the endpoint can" (S1.6, S1.61).
pub fn namespace_mode(world: &World, namespace: &str) -> Option<Mode> {
    mode_of_age(world, namespace, Age::Today).or_else(|| mode_of_age(world, namespace, Age::Former))
}

fn mode_of_age(world: &World, namespace: &str, age: Age) -> Option<Mode> {
    let root = world.mesh().root_namespace.as_str();
    let mesh_policy = wide_policy(world, root, age);
    let mesh = mesh_policy.map(|p| mode(p).unwrap_or(Mode::Permissive));
    if namespace == root {
        return mesh;
    }
    match wide_policy(world, namespace, age) {
        Some(policy) => Some(mode(policy).or(mesh).unwrap_or(Mode::Permissive)),
        None => mesh,
    }
}

/// The modes of a workload with these labels.
pub fn effective(world: &World, namespace: &str, labels: &BTreeMap<String, String>) -> Effective {
    let today = mode_of_age(world, namespace, Age::Today).is_some()
        || workload_policy(world, namespace, labels, Age::Today).is_some();
    let age = if today { Age::Today } else { Age::Former };
    let inherited = mode_of_age(world, namespace, age).unwrap_or(Mode::Permissive);
    let Some(policy) = workload_policy(world, namespace, labels, age) else {
        return Effective {
            workload: inherited,
            ports: BTreeMap::new(),
        };
    };
    let workload = mode(policy).unwrap_or(inherited);
    let ports = policy
        .spec
        .port_level_mtls
        .iter()
        .filter_map(|(port, mtls)| {
            let port = u16::try_from(*port).ok().filter(|p| *p != 0)?;
            Some((port, explicit(mtls.mode).unwrap_or(workload)))
        })
        .collect();
    Effective { workload, ports }
}

/// The policy that decides for a workload, on the ports that it does not name if it says nothing else: the workload's, else the
/// namespace's, else the mesh's.
pub fn deciding<'a>(
    world: &'a World,
    namespace: &str,
    labels: &BTreeMap<String, String>,
) -> Option<&'a Config<PeerAuthentication>> {
    let root = world.mesh().root_namespace.as_str();
    let of_age = |age: Age| {
        workload_policy(world, namespace, labels, age)
            .or_else(|| wide_policy(world, namespace, age))
            .or_else(|| wide_policy(world, root, age))
    };
    of_age(Age::Today).or_else(|| of_age(Age::Former))
}

/// The oldest policy without selector (S1.2, S1.3). The list is sorted oldest first.
fn wide_policy<'a>(world: &'a World, namespace: &str, age: Age) -> Option<&'a Config<PeerAuthentication>> {
    world
        .peer_authentications(namespace)
        .iter()
        .map(|p| &**p)
        .find(|p| Age::of(p) == age && !p.spec.has_selector())
}

/// The oldest policy whose selector matches; policies of the root namespace with a selector count nowhere (S1.4, S1.10).
fn workload_policy<'a>(
    world: &'a World,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    age: Age,
) -> Option<&'a Config<PeerAuthentication>> {
    if namespace == world.mesh().root_namespace {
        return None;
    }
    world.peer_authentications(namespace).iter().map(|p| &**p).find(|p| {
        Age::of(p) == age && p.spec.has_selector() && p.spec.selector.as_ref().is_some_and(|s| s.matches(labels))
    })
}

/// The mode that a policy sets for all ports. One that cannot be read means STRICT: it was written to say
/// something about who may connect, and accepting plaintext could only be wrong in the dangerous direction.
fn mode(policy: &Config<PeerAuthentication>) -> Option<Mode> {
    if policy.broken.is_some() {
        return Some(Mode::Strict);
    }
    explicit(policy.spec.mode())
}

fn explicit(mode: MutualTlsMode) -> Option<Mode> {
    match mode {
        MutualTlsMode::Unset => None,
        MutualTlsMode::Disable => Some(Mode::Disable),
        MutualTlsMode::Permissive => Some(Mode::Permissive),
        MutualTlsMode::Strict => Some(Mode::Strict),
    }
}
