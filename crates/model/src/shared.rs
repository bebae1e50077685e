//! Maps by name whose copies share what they have in common.
//!
//! A control plane holds nearly the same thousands of resources for every proxy. A [`SharedMap`] is copied in constant time; a
//! change copies one small block; two copies are compared in the time that their differences take ([`SharedMap::diff`]). `translate` keeps
//! snapshots in it, `xds` encoded resources, `control` both per proxy. Nothing here knows what the values mean.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;
use std::ops::Index;
use std::sync::{Arc, Weak};

use crate::snapshot::ProxySnapshot;
use crate::{Cluster, Destinations, Endpoints, Listener, RouteTable, destinations};

/// Most entries of a block. Small, since a change copies the block.
const BLOCK: usize = 32;

/// Sorted by name, never empty.
type Block<T> = Vec<(Arc<str>, Arc<T>)>;
/// All blocks of a map.
type Blocks<T> = Vec<Arc<Block<T>>>;

/// A map from names to shared values, in the order of names.
pub struct SharedMap<T> {
    blocks: Arc<Blocks<T>>,
    len: usize,
}

/// One difference between two maps: the name, its value before, its value after.
pub type Difference<'a, T> = (&'a Arc<str>, Option<&'a Arc<T>>, Option<&'a Arc<T>>);

impl<T> Clone for SharedMap<T> {
    fn clone(&self) -> Self {
        SharedMap {
            blocks: self.blocks.clone(),
            len: self.len,
        }
    }
}

impl<T> Default for SharedMap<T> {
    fn default() -> Self {
        SharedMap {
            blocks: Arc::default(),
            len: 0,
        }
    }
}

impl<T> SharedMap<T> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the two are copies of one map that neither has changed since. `false` says nothing.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.blocks, &other.blocks) || (self.is_empty() && other.is_empty())
    }

    /// The block where a name is, or would be.
    fn block_of(&self, name: &str) -> usize {
        let after = self
            .blocks
            .partition_point(|block| block.first().is_some_and(|(first, _)| **first <= *name));
        after.saturating_sub(1)
    }

    fn find(&self, name: &str) -> Option<&(Arc<str>, Arc<T>)> {
        let block = self.blocks.get(self.block_of(name))?;
        let at = block.binary_search_by(|(n, _)| (**n).cmp(name)).ok()?;
        block.get(at)
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.find(name).map(|(_, value)| value)
    }

    /// The name as the map holds it, and its value.
    pub fn entry(&self, name: &str) -> Option<(&Arc<str>, &Arc<T>)> {
        self.find(name).map(|(name, value)| (name, value))
    }

    /// Whether there is such a name.
    pub fn contains_key(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Sets the value of a name; the former one is returned.
    pub fn insert(&mut self, name: impl Into<Arc<str>>, value: Arc<T>) -> Option<Arc<T>> {
        let name = name.into();
        let index = self.block_of(&name);
        let blocks = Arc::make_mut(&mut self.blocks);
        let Some(block) = blocks.get_mut(index) else {
            blocks.push(Arc::new(vec![(name, value)]));
            self.len = 1;
            return None;
        };
        let entries = Arc::make_mut(block);
        match entries.binary_search_by(|(n, _)| n.cmp(&name)) {
            Ok(at) => Some(std::mem::replace(&mut entries[at].1, value)),
            Err(at) => {
                entries.insert(at, (name, value));
                self.len += 1;
                if entries.len() > BLOCK {
                    // Names that come in order fill their blocks: only the last entry moves on.
                    let keep = if at + 1 == entries.len() { BLOCK } else { BLOCK / 2 };
                    let rest = entries.split_off(keep);
                    blocks.insert(index + 1, Arc::new(rest));
                }
                None
            }
        }
    }

    /// Takes a name out.
    pub fn remove(&mut self, name: &str) -> Option<Arc<T>> {
        let index = self.block_of(name);
        let at = self
            .blocks
            .get(index)?
            .binary_search_by(|(n, _)| (**n).cmp(name))
            .ok()?;
        let blocks = Arc::make_mut(&mut self.blocks);
        let entries = Arc::make_mut(&mut blocks[index]);
        let (_, value) = entries.remove(at);
        self.len -= 1;
        let left = entries.len();
        if left == 0 {
            blocks.remove(index);
        } else if let Some(next) = blocks.get(index + 1).cloned()
            && left + next.len() <= BLOCK / 2
        {
            Arc::make_mut(&mut blocks[index]).extend(next.iter().cloned());
            blocks.remove(index + 1);
        }
        Some(value)
    }

    /// All entries, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<T>)> {
        self.blocks.iter().flat_map(|block| block.iter()).map(|(n, v)| (n, v))
    }

    /// The entries whose names begin so, by name.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a Arc<str>, &'a Arc<T>)> {
        let start = self.block_of(prefix).min(self.blocks.len());
        self.blocks[start..]
            .iter()
            .flat_map(|block| block.iter())
            .skip_while(move |(name, _)| **name < *prefix)
            .take_while(move |(name, _)| name.starts_with(prefix))
            .map(|(n, v)| (n, v))
    }

    /// All names, in order.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<str>> {
        self.iter().map(|(name, _)| name)
    }

    /// All values, by name.
    pub fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.iter().map(|(_, value)| value)
    }

    /// What differs from `self` to `other`, by name. Values are the same when they are one value; equal copies of a value count as
    /// different. Blocks that the two share are not looked into.
    pub fn diff<'a>(&'a self, other: &'a Self) -> Vec<Difference<'a, T>> {
        let mut out = Vec::new();
        if self.is_same(other) {
            return out;
        }
        let (mut old, mut new) = (Cursor::new(self), Cursor::new(other));
        loop {
            if let (Some(a), Some(b)) = (old.at_block(), new.at_block())
                && Arc::ptr_eq(a, b)
            {
                old.skip_block();
                new.skip_block();
                continue;
            }
            match (old.entry(), new.entry()) {
                (None, None) => return out,
                (Some((name, value)), None) => {
                    out.push((name, Some(value), None));
                    old.step();
                }
                (None, Some((name, value))) => {
                    out.push((name, None, Some(value)));
                    new.step();
                }
                (Some((a, before)), Some((b, after))) => match a.cmp(b) {
                    Ordering::Less => {
                        out.push((a, Some(before), None));
                        old.step();
                    }
                    Ordering::Greater => {
                        out.push((b, None, Some(after)));
                        new.step();
                    }
                    Ordering::Equal => {
                        if !Arc::ptr_eq(before, after) {
                            out.push((b, Some(before), Some(after)));
                        }
                        old.step();
                        new.step();
                    }
                },
            }
        }
    }
}

/// Maps made of other maps, value by value, that share as much as these do: what was made of a block, or of a whole map, is
/// found again as long as anybody holds it. It keeps nothing alive.
#[derive(Debug)]
pub struct Derived<T, U> {
    maps: Memory<Blocks<T>, Blocks<U>>,
    blocks: Memory<Block<T>, Block<U>>,
}

impl<T, U> Default for Derived<T, U> {
    fn default() -> Self {
        Derived {
            maps: Memory::default(),
            blocks: Memory::default(),
        }
    }
}

impl<T, U> Derived<T, U> {
    /// The map of what `make` says for each entry. It must give equal values for one name and one value.
    pub fn of(&mut self, map: &SharedMap<T>, mut make: impl FnMut(&Arc<str>, &Arc<T>) -> Arc<U>) -> SharedMap<U> {
        let blocks = &mut self.blocks;
        let made = self.maps.get_or_make(&map.blocks, |all| {
            let block = |block: &Arc<Block<T>>| {
                blocks.get_or_make(block, |entries| {
                    entries
                        .iter()
                        .map(|(name, value)| (name.clone(), make(name, value)))
                        .collect()
                })
            };
            all.iter().map(block).collect()
        });
        SharedMap {
            blocks: made,
            len: map.len,
        }
    }
}

/// What was made of a value, by the value's place. The weak reference to it keeps the place from being used for another one, and the
/// value from being changed where it is.
#[derive(Debug)]
struct Memory<A, B> {
    made: HashMap<usize, (Weak<A>, Weak<B>)>,
    /// Size at which what is gone is cleared away.
    limit: usize,
}

impl<A, B> Default for Memory<A, B> {
    fn default() -> Self {
        Memory {
            made: HashMap::new(),
            limit: 0,
        }
    }
}

impl<A, B> Memory<A, B> {
    /// Entries below which nothing is cleared away.
    const SLACK: usize = 256;

    fn get_or_make(&mut self, of: &Arc<A>, make: impl FnOnce(&A) -> B) -> Arc<B> {
        let place = Arc::as_ptr(of).addr();
        if let Some(made) = self.made.get(&place).and_then(|(_, made)| made.upgrade()) {
            return made;
        }
        if self.made.len() >= self.limit {
            self.made
                .retain(|_, (of, made)| of.strong_count() > 0 && made.strong_count() > 0);
            self.limit = self.made.len() * 2 + Self::SLACK;
        }
        let made = Arc::new(make(of));
        self.made.insert(place, (Arc::downgrade(of), Arc::downgrade(&made)));
        made
    }
}

/// A place in a map.
struct Cursor<'a, T> {
    blocks: &'a [Arc<Block<T>>],
    at: usize,
}

impl<'a, T> Cursor<'a, T> {
    fn new(map: &'a SharedMap<T>) -> Self {
        Cursor {
            blocks: &map.blocks,
            at: 0,
        }
    }

    /// The block whose first entry is next.
    fn at_block(&self) -> Option<&'a Arc<Block<T>>> {
        self.blocks.first().filter(|_| self.at == 0)
    }

    fn skip_block(&mut self) {
        self.blocks = self.blocks.get(1..).unwrap_or_default();
        self.at = 0;
    }

    fn entry(&self) -> Option<(&'a Arc<str>, &'a Arc<T>)> {
        let (name, value) = self.blocks.first()?.get(self.at)?;
        Some((name, value))
    }

    fn step(&mut self) {
        self.at += 1;
        if self.blocks.first().is_some_and(|block| self.at >= block.len()) {
            self.skip_block();
        }
    }
}

impl<T> Index<&str> for SharedMap<T> {
    type Output = Arc<T>;

    /// # Panics
    /// There is no such name.
    fn index(&self, name: &str) -> &Arc<T> {
        match self.get(name) {
            Some(value) => value,
            None => panic!("no entry {name}"),
        }
    }
}

impl<T: PartialEq> PartialEq for SharedMap<T> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len
            && self
                .diff(other)
                .into_iter()
                .all(|(_, a, b)| a.is_some() && a.map(|v| &**v) == b.map(|v| &**v))
    }
}

impl<T: fmt::Debug> fmt::Debug for SharedMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<N: Into<Arc<str>>, T> FromIterator<(N, Arc<T>)> for SharedMap<T> {
    fn from_iter<I: IntoIterator<Item = (N, Arc<T>)>>(entries: I) -> Self {
        let mut map = SharedMap::default();
        for (name, value) in entries {
            map.insert(name, value);
        }
        map
    }
}

/// [`ProxySnapshot`] over [`SharedMap`]s: what the control plane holds per proxy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SharedSnapshot {
    /// Listeners by name.
    pub listeners: SharedMap<Listener>,
    /// Route tables by name.
    pub routes: SharedMap<RouteTable>,
    /// Clusters by name.
    pub clusters: SharedMap<Cluster>,
    /// Endpoints by cluster name.
    pub endpoints: SharedMap<Endpoints>,
    /// What is served in the mesh, by name of the list.
    pub destinations: SharedMap<Destinations>,
}

impl SharedSnapshot {
    /// The same with maps of its own.
    pub fn to_snapshot(&self) -> ProxySnapshot {
        fn own<T>(map: &SharedMap<T>) -> std::collections::BTreeMap<String, Arc<T>> {
            map.iter().map(|(n, v)| (n.to_string(), v.clone())).collect()
        }
        ProxySnapshot {
            listeners: own(&self.listeners),
            routes: own(&self.routes),
            clusters: own(&self.clusters),
            endpoints: own(&self.endpoints),
            destinations: own(&self.destinations),
            virtual_hosts: std::collections::BTreeMap::new(),
        }
    }
}

impl From<&ProxySnapshot> for SharedSnapshot {
    /// A snapshot that says nothing of what is served is asked for it.
    fn from(snapshot: &ProxySnapshot) -> Self {
        fn shared<T>(map: &std::collections::BTreeMap<String, Arc<T>>) -> SharedMap<T> {
            map.iter().map(|(n, v)| (n.as_str(), v.clone())).collect()
        }
        SharedSnapshot {
            listeners: shared(&snapshot.listeners),
            routes: shared(&snapshot.routes),
            clusters: shared(&snapshot.clusters),
            endpoints: shared(&snapshot.endpoints),
            destinations: if snapshot.destinations.is_empty() {
                let listeners = snapshot.listeners.values().map(|listener| &**listener);
                let routes = snapshot.routes.values().map(|table| &**table);
                let lists = destinations::of_snapshot(listeners, routes).into_iter();
                lists.map(|(name, list)| (name, Arc::new(list))).collect()
            } else {
                shared(&snapshot.destinations)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// What was there before and after.
    type Change = (Option<Arc<usize>>, Option<Arc<usize>>);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against a plain map: contents, order, and differences between any two states of one history.
        #[test]
        fn it_is_a_map_and_its_differences_are_all_and_only_those(
            steps in prop::collection::vec((0u16..300, any::<bool>(), any::<bool>()), 1..400),
        ) {
            let mut plain: BTreeMap<String, Arc<usize>> = BTreeMap::new();
            let mut map = SharedMap::default();
            let mut kept = vec![(plain.clone(), map.clone())];
            for (at, (name, add, keep)) in steps.into_iter().enumerate() {
                let name = format!("n{name}");
                if add {
                    let value = Arc::new(at);
                    prop_assert_eq!(map.insert(name.as_str(), value.clone()), plain.insert(name, value));
                } else {
                    prop_assert_eq!(map.remove(&name), plain.remove(&name));
                }
                prop_assert_eq!(map.len(), plain.len());
                if keep {
                    kept.push((plain.clone(), map.clone()));
                }
            }
            let entries = |m: &SharedMap<usize>| m.iter().map(|(n, v)| (n.to_string(), v.clone())).collect::<Vec<_>>();
            prop_assert_eq!(entries(&map), plain.clone().into_iter().collect::<Vec<_>>());
            for name in 0..300 {
                let name = format!("n{name}");
                prop_assert_eq!(map.get(&name), plain.get(&name));
                let begun = map.with_prefix(&name).map(|(n, _)| n.to_string()).collect::<Vec<_>>();
                let wanted = plain.keys().filter(|n| n.starts_with(&name)).cloned().collect::<Vec<_>>();
                prop_assert_eq!(begun, wanted);
            }
            for (old_plain, old) in &kept {
                let mut wanted: BTreeMap<String, Change> = BTreeMap::new();
                for name in old_plain.keys().chain(plain.keys()) {
                    let (before, after) = (old_plain.get(name).cloned(), plain.get(name).cloned());
                    if before != after {
                        wanted.insert(name.clone(), (before, after));
                    }
                }
                let found: Vec<_> = old
                    .diff(&map)
                    .into_iter()
                    .map(|(n, a, b)| (n.to_string(), (a.cloned(), b.cloned())))
                    .collect();
                prop_assert_eq!(*old == map, found.is_empty());
                prop_assert_eq!(found, wanted.into_iter().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_made_of_shared_blocks_is_shared() {
        let one: SharedMap<usize> = (0..1000).map(|n| (format!("n{n:04}"), Arc::new(n))).collect();
        let mut derived = Derived::default();
        let mut calls = 0;
        let mut of = |map: &SharedMap<usize>, calls: &mut usize| {
            derived.of(map, |_, value| {
                *calls += 1;
                Arc::new(format!("{value}"))
            })
        };
        let made = of(&one, &mut calls);
        assert_eq!((made.len(), calls), (1000, 1000));
        assert!(
            one.iter()
                .zip(made.iter())
                .all(|((n, v), (m, t))| n == m && v.to_string() == **t)
        );
        assert!(of(&one.clone(), &mut calls).is_same(&made));

        let mut two = one.clone();
        two.insert("n0500", Arc::new(7));
        calls = 0;
        let next = of(&two, &mut calls);
        assert!(calls <= BLOCK, "{calls} calls");
        assert_eq!(**next.get("n0500").unwrap(), "7");
        assert_eq!(made.diff(&next).len(), calls);

        // A value that takes the place of one that is gone is not taken for it.
        for round in 0..100 {
            let map: SharedMap<usize> = [("x", Arc::new(round))].into_iter().collect();
            assert_eq!(**of(&map, &mut calls).get("x").unwrap(), round.to_string());
        }
    }

    #[test]
    fn copies_share_all_but_the_block_that_changed() {
        let mut map: SharedMap<usize> = (0..1000).map(|n| (format!("n{n:04}"), Arc::new(n))).collect();
        let blocks = map.blocks.len();
        assert!(blocks <= 1000 / BLOCK + 1, "{blocks} blocks");
        let before = map.clone();
        assert!(before.is_same(&map));
        map.insert("n0500", Arc::new(7));
        assert!(!before.is_same(&map));
        let shared = map
            .blocks
            .iter()
            .filter(|b| before.blocks.iter().any(|o| Arc::ptr_eq(o, b)))
            .count();
        assert_eq!(shared, blocks - 1);
        for n in 0..1000 {
            map.remove(&format!("n{n:04}"));
        }
        assert!(map.is_empty() && map.blocks.is_empty());
        assert_eq!(before.len(), 1000);
    }
}
