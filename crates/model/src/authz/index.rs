//! The rules of one filter, indexed.
//!
//! For every rule a *cover* is chosen: a set of positive conditions of which at least one holds whenever the rule does.
//! A conjunction is covered by any one of its conjuncts, a disjunction by the covers of all its members together, an
//! exact or prefix-like condition by itself; negations, expressions and presence have none. This is the disjunctive
//! normal form keyed by one atom per term, without ever spelling the form out, so nothing can explode. Among several
//! covers of a rule the one whose conditions occur least often over all rules is taken.
//!
//! The conditions of a cover are keys of one hash table. A request computes the hashes of what it has (its identity, its
//! path and the prefixes and suffixes of it at the lengths that occur, its addresses at the prefix lengths that occur)
//! and evaluates the rules found there in full. A colliding hash therefore costs time, never correctness. Rules without
//! a cover are the residual: they are evaluated on every request and counted by [`RuleSet::residual`].

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;

use super::matcher::{Address, Test, Text, address, any_claim, trust_domain};
use super::regexes::SPIFFE;
use super::{Action, Connection, Expr, HttpView, Rule, canonical};

/// Most keys that one rule may have in the table; a rule with more is residual.
const MAX_KEYS: usize = 16_384;
/// From this many on, alternatives that compare one attribute exactly are a hash set.
const SET_FROM: usize = 8;

/// Compiled and indexed rules of one filter.
#[derive(Debug)]
pub(super) struct RuleSet {
    /// Sorted by id, so that the lowest index is the id to report.
    rules: Vec<(Box<str>, Node)>,
    /// Rules without a key, ascending.
    residual: Vec<u32>,
    table: HashMap<u64, Vec<u32>, BuildHasherDefault<Ready>>,
    probes: Probes,
}

/// A compiled expression.
#[derive(Debug)]
enum Node {
    And(Vec<Node>),
    Or(Vec<Node>),
    Not(Box<Node>),
    Test(Test),
    /// Any of many exact values of one attribute, with a test that shows which attribute.
    OneOf(Test, std::collections::HashSet<Box<[u8]>>),
}

/// Hasher for keys that are hashes already.
#[derive(Debug, Default)]
struct Ready(u64);

impl Hasher for Ready {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 << 8) | u64::from(*byte);
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// Kinds of keys; part of the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Uri,
    UriPrefix,
    UriSuffix,
    Namespace,
    ServiceAccount,
    TrustDomain,
    Source,
    Remote,
    Destination,
    Port,
    Sni,
    Host,
    HostPrefix,
    HostSuffix,
    Method,
    Path,
    PathPrefix,
    PathSuffix,
    Header,
    Claim,
}

/// Number of kinds.
const KINDS: usize = Kind::Claim as usize + 1;

/// A running hash. It is built byte by byte, so that all prefixes of a text are hashed in one pass over it.
#[derive(Clone, Copy, Debug)]
struct Hash(u64);

impl Hash {
    fn new(kind: Kind) -> Hash {
        Hash(0xcbf2_9ce4_8422_2325 ^ (kind as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
    fn byte(self, byte: u8) -> Hash {
        Hash((self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    }
    fn bytes(self, bytes: impl IntoIterator<Item = u8>) -> Hash {
        bytes.into_iter().fold(self, Hash::byte)
    }
    /// Mixed, because the table uses high and low bits.
    fn key(self) -> u64 {
        let mut h = self.0;
        h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^ (h >> 33)
    }
}

/// One condition of a cover.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    hash: u64,
    probe: Probe,
}

/// What a request must compute to find a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Probe {
    /// The whole value of the kind.
    Whole(Kind),
    /// Prefixes or suffixes of this length.
    Length(Kind, u16),
    /// The address at this prefix length.
    Net(Kind, u8),
    /// Values of this header.
    Header(Box<str>),
    /// Strings at this claim path.
    Claim(Box<[Box<str>]>),
}

/// All probes that the table needs.
#[derive(Debug, Default)]
struct Probes {
    /// One bit per kind.
    whole: u32,
    /// Ascending, by kind.
    lengths: [Vec<u16>; KINDS],
    /// Prefix lengths as [`net_code`] writes them, by kind.
    nets: [Vec<u8>; KINDS],
    headers: Vec<Box<str>>,
    claims: Vec<Box<[Box<str>]>>,
}

impl RuleSet {
    pub(super) fn new(rules: &[Rule], action: Action) -> RuleSet {
        let mut compiled: Vec<(Box<str>, Node)> = rules
            .iter()
            .map(|rule| {
                // What cannot be understood must not admit anything.
                let closed = || {
                    if action == Action::Allow {
                        Node::Or(Vec::new())
                    } else {
                        Node::And(Vec::new())
                    }
                };
                let node = compile(&canonical(&rule.expr)).unwrap_or_else(|_| closed());
                (rule.id.as_str().into(), node)
            })
            .collect();
        compiled.sort_by(|a, b| a.0.cmp(&b.0));

        let mut frequency: HashMap<u64, usize> = HashMap::new();
        for (_, node) in &compiled {
            count(node, &mut frequency);
        }
        let mut set = RuleSet {
            rules: Vec::new(),
            residual: Vec::new(),
            table: HashMap::default(),
            probes: Probes::default(),
        };
        let mut probes = BTreeSet::new();
        for (index, (_, node)) in (0u32..).zip(&compiled) {
            match cover(node, &frequency) {
                Some(cover) if cover.keys.len() <= MAX_KEYS => {
                    for key in cover.keys {
                        let list = set.table.entry(key.hash).or_default();
                        if list.last() != Some(&index) {
                            list.push(index);
                        }
                        probes.insert(key.probe);
                    }
                }
                _ => set.residual.push(index),
            }
        }
        for probe in probes {
            set.probes.add(probe);
        }
        set.rules = compiled;
        set
    }

    pub(super) fn len(&self) -> usize {
        self.rules.len()
    }

    pub(super) fn residual(&self) -> usize {
        self.residual.len()
    }

    /// How many rules a request has to evaluate at most, besides the residual ones.
    #[cfg(test)]
    pub(super) fn candidates(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> usize {
        let mut count = 0;
        self.probes.visit(connection, http, &mut |hash| {
            count += self.table.get(&hash.key()).map_or(0, Vec::len)
        });
        count
    }

    /// The rule that the fewest tests keep from matching, with their number; none if no rule could ever match.
    pub(super) fn nearest(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Option<(usize, &str)> {
        let mut best: Option<(usize, &str)> = None;
        for (id, node) in &self.rules {
            let Some(misses) = node.misses(true, connection, http) else {
                continue;
            };
            if best.is_none_or(|(least, _)| misses < least) {
                best = Some((misses, id));
                if misses <= 1 {
                    break;
                }
            }
        }
        best
    }

    /// The id of the first rule, in byte order of the ids, that matches.
    pub(super) fn first_match(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Option<&str> {
        let mut best = u32::MAX;
        let mut look = |hash: Hash| {
            if let Some(list) = self.table.get(&hash.key()) {
                for index in list {
                    if *index >= best {
                        break;
                    }
                    if self.rules[*index as usize].1.holds(connection, http) {
                        best = *index;
                        break;
                    }
                }
            }
        };
        if !self.table.is_empty() {
            self.probes.visit(connection, http, &mut look);
        }
        for index in &self.residual {
            if *index >= best {
                break;
            }
            if self.rules[*index as usize].1.holds(connection, http) {
                best = *index;
                break;
            }
        }
        self.rules.get(best as usize).map(|(id, _)| &**id)
    }
}

/// Compiles a canonical expression.
fn compile(expr: &Expr) -> Result<Node, String> {
    Ok(match expr {
        Expr::And(children) => Node::And(children.iter().map(compile).collect::<Result<_, _>>()?),
        Expr::Or(children) => Node::Or(group(children.iter().map(compile).collect::<Result<_, _>>()?)),
        Expr::Not(inner) => Node::Not(Box::new(compile(inner)?)),
        Expr::Atom(atom) => Node::Test(Test::new(atom)?),
    })
}

/// Joins many exact alternatives of one attribute.
fn group(children: Vec<Node>) -> Vec<Node> {
    type Members = Vec<(Test, Box<[u8]>)>;
    let mut sets: HashMap<std::mem::Discriminant<Test>, Members> = HashMap::new();
    let mut out = Vec::new();
    for child in children {
        match child {
            Node::Test(
                ref test @ (Test::Uri(Text::Exact(ref value))
                | Test::Path(Text::Exact(ref value))
                | Test::Sni(Text::Exact(ref value))
                | Test::Method(Text::Exact(ref value))),
            ) => {
                sets.entry(std::mem::discriminant(test))
                    .or_default()
                    .push((test.clone(), value.clone()));
            }
            other => out.push(other),
        }
    }
    for (_, members) in sets {
        if members.len() < SET_FROM {
            out.extend(members.into_iter().map(|(test, _)| Node::Test(test)));
        } else if let Some((test, _)) = members.first() {
            out.push(Node::OneOf(
                test.clone(),
                members.iter().map(|(_, value)| value.clone()).collect(),
            ));
        }
    }
    out
}

impl Node {
    /// The fewest tests to change so that the node is `wanted`; `None` if no change could do it.
    fn misses(&self, wanted: bool, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> Option<usize> {
        match self {
            Node::Not(inner) => inner.misses(!wanted, connection, http),
            Node::And(children) | Node::Or(children) => {
                let mut parts = children.iter().map(|c| c.misses(wanted, connection, http));
                if matches!(self, Node::And(_)) == wanted {
                    parts.try_fold(0, |sum, part| Some(sum + part?))
                } else {
                    parts.flatten().min()
                }
            }
            leaf => Some(usize::from(leaf.holds(connection, http) != wanted)),
        }
    }

    fn holds(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> bool {
        match self {
            Node::And(children) => children.iter().all(|c| c.holds(connection, http)),
            Node::Or(children) => children.iter().any(|c| c.holds(connection, http)),
            Node::Not(inner) => !inner.holds(connection, http),
            Node::Test(test) => test.holds(connection, http),
            Node::OneOf(Test::Uri(_), set) => connection.peer_uris.iter().any(|uri| set.contains(uri.as_bytes())),
            Node::OneOf(Test::Sni(_), set) => connection.sni.is_some_and(|sni| set.contains(sni.as_bytes())),
            Node::OneOf(Test::Method(_), set) => http.is_some_and(|h| set.contains(h.method().as_bytes())),
            Node::OneOf(Test::Path(_), set) => http.is_some_and(|h| set.contains(h.path().as_bytes())),
            // Only the attributes above are grouped.
            Node::OneOf(..) => false,
        }
    }
}

/// A cover with what it costs.
#[derive(Clone, Debug)]
struct Cover {
    keys: BTreeSet<Key>,
    /// Rules that the most crowded of its keys may bring up.
    crowd: usize,
}

fn count(node: &Node, frequency: &mut HashMap<u64, usize>) {
    for_each_test(node, &mut |test| {
        for key in keys(test) {
            *frequency.entry(key.hash).or_default() += 1;
        }
    });
}

fn for_each_test(node: &Node, f: &mut dyn FnMut(&Node)) {
    match node {
        Node::And(children) | Node::Or(children) => children.iter().for_each(|c| for_each_test(c, f)),
        Node::Not(inner) => for_each_test(inner, f),
        Node::Test(_) | Node::OneOf(..) => f(node),
    }
}

/// The cheapest cover of a rule; `None` if it has none.
fn cover(node: &Node, frequency: &HashMap<u64, usize>) -> Option<Cover> {
    match node {
        Node::And(children) => children
            .iter()
            .filter_map(|c| cover(c, frequency))
            .min_by_key(|c| (c.crowd, c.keys.len())),
        Node::Or(children) => {
            let mut all = Cover {
                keys: BTreeSet::new(),
                crowd: 0,
            };
            for child in children {
                let part = cover(child, frequency)?;
                all.crowd = all.crowd.max(part.crowd);
                all.keys.extend(part.keys);
            }
            Some(all)
        }
        Node::Not(_) => None,
        Node::Test(_) | Node::OneOf(..) => {
            let keys: BTreeSet<Key> = keys(node).into_iter().collect();
            let crowd = keys
                .iter()
                .map(|k| frequency.get(&k.hash).copied().unwrap_or(0))
                .max()?;
            Some(Cover { keys, crowd })
        }
    }
}

fn whole(kind: Kind, bytes: &[u8]) -> Vec<Key> {
    let hash = Hash::new(kind).bytes(bytes.iter().copied()).key();
    vec![Key {
        hash,
        probe: Probe::Whole(kind),
    }]
}

fn by_length(kind: Kind, bytes: impl ExactSizeIterator<Item = u8>) -> Vec<Key> {
    let Ok(length) = u16::try_from(bytes.len()) else {
        return Vec::new();
    };
    vec![Key {
        hash: Hash::new(kind).bytes(bytes).key(),
        probe: Probe::Length(kind, length),
    }]
}

/// Keys of a test: at least one is found by every request for which the test holds. Empty: not indexable.
fn keys(node: &Node) -> Vec<Key> {
    let test = match node {
        Node::Test(test) => test,
        Node::OneOf(test, set) => {
            let kind = match test {
                Test::Uri(_) => Kind::Uri,
                Test::Sni(_) => Kind::Sni,
                Test::Method(_) => Kind::Method,
                _ => Kind::Path,
            };
            return set.iter().flat_map(|value| whole(kind, value)).collect();
        }
        _ => return Vec::new(),
    };
    match test {
        Test::Uri(Text::Exact(s)) => whole(Kind::Uri, s),
        Test::Uri(Text::Prefix(s)) => by_length(Kind::UriPrefix, s.iter().copied()),
        Test::UriSuffix(s) => by_length(Kind::UriSuffix, s.bytes().rev()),
        Test::Namespace(parts) if parts.len() == 1 && !parts[0].contains('/') => {
            whole(Kind::Namespace, parts[0].as_bytes())
        }
        Test::ServiceAccount(ns, sa) => vec![Key {
            hash: account(ns, sa).key(),
            probe: Probe::Whole(Kind::ServiceAccount),
        }],
        Test::TrustDomain(td, None) => whole(Kind::TrustDomain, td.as_bytes()),
        Test::Cidr(which, net) => {
            let kind = address_kind(*which);
            vec![Key {
                hash: net_hash(kind, *net).key(),
                probe: Probe::Net(kind, net_code(*net)),
            }]
        }
        Test::Port(port) => whole(Kind::Port, &port.to_be_bytes()),
        Test::Sni(Text::Exact(s)) => whole(Kind::Sni, s),
        Test::Host(Text::Exact(s)) => whole(Kind::Host, &s.to_ascii_lowercase()),
        Test::Host(Text::Prefix(s)) => by_length(Kind::HostPrefix, s.to_ascii_lowercase().into_iter()),
        Test::Host(Text::Suffix(s)) => by_length(Kind::HostSuffix, s.to_ascii_lowercase().into_iter().rev()),
        Test::Method(Text::Exact(s)) => whole(Kind::Method, s),
        Test::Path(Text::Exact(s)) => whole(Kind::Path, s),
        Test::Path(Text::Prefix(s)) => by_length(Kind::PathPrefix, s.iter().copied()),
        Test::Path(Text::Suffix(s)) => by_length(Kind::PathSuffix, s.iter().rev().copied()),
        Test::Template(template) => by_length(Kind::PathPrefix, template.prefix().bytes()),
        Test::Header(name, Text::Exact(s)) => vec![Key {
            hash: named(Kind::Header, [&**name]).bytes(s.iter().copied()).key(),
            probe: Probe::Header(name.clone()),
        }],
        Test::Claim(path, Text::Exact(s)) => vec![Key {
            hash: named(Kind::Claim, path.iter().map(|p| &**p))
                .bytes(s.iter().copied())
                .key(),
            probe: Probe::Claim(path.clone()),
        }],
        _ => Vec::new(),
    }
}

/// A hash that starts with a name, whose end is marked.
fn named<'a>(kind: Kind, names: impl IntoIterator<Item = &'a str>) -> Hash {
    names
        .into_iter()
        .fold(Hash::new(kind), |h, name| h.bytes(name.bytes()).byte(0xff))
}

fn account(ns: &str, sa: &str) -> Hash {
    named(Kind::ServiceAccount, [ns, sa])
}

fn address_kind(which: Address) -> Kind {
    match which {
        Address::Source => Kind::Source,
        Address::Remote => Kind::Remote,
        Address::Destination => Kind::Destination,
    }
}

/// Prefix length and address family in one number: 0–32 for IPv4, 33–161 for IPv6.
fn net_code(net: IpNet) -> u8 {
    match net {
        IpNet::V4(net) => net.prefix_len(),
        IpNet::V6(net) => 33 + net.prefix_len(),
    }
}

fn net_hash(kind: Kind, net: IpNet) -> Hash {
    let hash = Hash::new(kind).byte(net_code(net));
    match net.network() {
        IpAddr::V4(ip) => hash.bytes(ip.octets()),
        IpAddr::V6(ip) => hash.bytes(ip.octets()),
    }
}

impl Probes {
    fn add(&mut self, probe: Probe) {
        match probe {
            Probe::Whole(kind) => self.whole |= 1 << kind as u32,
            // The probes come sorted, so the lengths are ascending.
            Probe::Length(kind, length) => self.lengths[kind as usize].push(length),
            Probe::Net(kind, code) => self.nets[kind as usize].push(code),
            Probe::Header(name) => self.headers.push(name),
            Probe::Claim(path) => self.claims.push(path),
        }
    }

    /// Calls `look` with every hash that a request may have in the table.
    fn visit(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>, look: &mut dyn FnMut(Hash)) {
        let has = |kind: Kind| self.whole & (1 << kind as u32) != 0;
        let exact = |kind, bytes: &[u8], look: &mut dyn FnMut(Hash)| {
            if has(kind) {
                look(Hash::new(kind).bytes(bytes.iter().copied()));
            }
        };
        for uri in connection.peer_uris {
            exact(Kind::Uri, uri.as_bytes(), look);
            self.running(Kind::UriPrefix, uri.bytes(), look);
            if let Some(rest) = uri.strip_prefix(SPIFFE) {
                self.running(Kind::UriSuffix, rest.bytes().rev(), look);
            }
            if let Some(td) = trust_domain(uri) {
                exact(Kind::TrustDomain, td.as_bytes(), look);
            }
            if has(Kind::Namespace) || has(Kind::ServiceAccount) {
                for ns in after(uri, "/ns/") {
                    exact(Kind::Namespace, ns.as_bytes(), look);
                    if has(Kind::ServiceAccount) {
                        for sa in after(uri, "/sa/") {
                            look(account(ns, sa));
                        }
                    }
                }
            }
        }
        for which in [Address::Source, Address::Remote, Address::Destination] {
            let kind = address_kind(which);
            let ip = address(which, connection);
            for code in &self.nets[kind as usize] {
                let length = match ip {
                    IpAddr::V4(_) if *code <= 32 => *code,
                    IpAddr::V6(_) if *code > 32 => *code - 33,
                    _ => continue,
                };
                if let Ok(net) = IpNet::new(ip, length) {
                    look(net_hash(kind, net));
                }
            }
        }
        exact(Kind::Port, &connection.destination.port().to_be_bytes(), look);
        if let Some(sni) = connection.sni {
            exact(Kind::Sni, sni.as_bytes(), look);
        }
        let Some(http) = http else {
            return;
        };
        exact(Kind::Method, http.method().as_bytes(), look);
        let path = http.path();
        exact(Kind::Path, path.as_bytes(), look);
        self.running(Kind::PathPrefix, path.bytes(), look);
        self.running(Kind::PathSuffix, path.bytes().rev(), look);
        let host = || http.authority().bytes().map(|b| b.to_ascii_lowercase());
        if has(Kind::Host) {
            look(Hash::new(Kind::Host).bytes(host()));
        }
        self.running(Kind::HostPrefix, host(), look);
        self.running(Kind::HostSuffix, host().rev(), look);
        for name in &self.headers {
            let mut each = |value: &[u8]| {
                look(named(Kind::Header, [&**name]).bytes(value.iter().copied()));
                false
            };
            match &**name {
                ":authority" => drop(each(http.authority().as_bytes())),
                name => drop(http.any_header(name, &mut each)),
            }
        }
        if let Some(claims) = http.claims() {
            for path in &self.claims {
                any_claim(claims, path, &mut |value| {
                    look(named(Kind::Claim, path.iter().map(|p| &**p)).bytes(value.bytes()));
                    false
                });
            }
        }
    }

    /// Hashes all prefixes at the lengths that occur, in one pass.
    fn running(&self, kind: Kind, bytes: impl Iterator<Item = u8>, look: &mut dyn FnMut(Hash)) {
        let mut wanted = self.lengths[kind as usize].iter().map(|n| usize::from(*n)).peekable();
        let mut hash = Hash::new(kind);
        for (index, byte) in bytes.enumerate() {
            let Some(next) = wanted.peek() else {
                break;
            };
            hash = hash.byte(byte);
            if *next == index + 1 {
                look(hash);
                wanted.next();
            }
        }
    }
}

/// Segments that follow a marker, overlapping markers included.
fn after<'a>(uri: &'a str, marker: &'a str) -> impl Iterator<Item = &'a str> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = from + uri.get(from..)?.find(marker)?;
        let start = at + marker.len();
        // The marker's own last slash may begin the next one.
        from = start - 1;
        let rest = &uri[start..];
        Some(rest.split('/').next().unwrap_or(rest))
    })
}
