//! The space of requests, cut along the tests of some formulas.
//!
//! Every attribute is a dimension. All values that give the same results in all tests are one [`Cell`], with one value to
//! stand for it. A request is a choice of one cell per dimension, so a question about all requests is a question about
//! finitely many choices. The cells of a dimension are exact unless [`Dimension::exact`] says otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::super::matcher::Test;
use super::super::regexes::SPIFFE;
use super::super::{Atom, Attribute, HttpSample, Matcher, Sample};
use super::language::{Free, Guard, HeaderValue, Identity, Path, Pattern, combinations};
use super::{Peer, Universe};
use crate::http::PathNormalization;

/// Most cells of a dimension.
const MAX_CELLS: usize = 20_000;
/// Most cells of a dimension that has several values at a time.
const MAX_UNIONS: usize = 512;
/// Methods that examples use before others.
const METHODS: [&str; 7] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"];

/// What a dimension is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Axis {
    Peer,
    Source,
    Remote,
    Address,
    Port,
    Sni,
    Host,
    Method,
    Path,
    Header(String),
    Claim(Vec<String>),
    /// A test that nothing here decides: an external provider's answer.
    Opaque(u32),
}

/// A value of a dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Point {
    Absent,
    Text(String),
    Texts(Vec<String>),
    Address(IpAddr),
    Port(u16),
    /// Nothing that could be put into a request.
    Unknown,
}

/// Values that no test tells apart.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    /// Result of every test of the dimension, in the order of its `vars`.
    pub(super) holds: Vec<bool>,
    /// A value.
    pub(super) point: Point,
    /// How far it is from the ordinary; 0 is the default value.
    pub(super) cost: usize,
}

/// One attribute.
#[derive(Clone, Debug)]
pub(super) struct Dimension {
    pub(super) axis: Axis,
    /// Tests of it, by number.
    pub(super) vars: Vec<u32>,
    /// All cells; cheapest first.
    pub(super) cells: Vec<Cell>,
    /// Whether these are all cells, and each of them exists.
    pub(super) exact: bool,
}

/// What tests mean, and the dimensions they span.
pub(super) struct Space {
    pub(super) dimensions: Vec<Dimension>,
}

/// The dimension of an attribute; `None` for one that never holds.
pub(super) fn axis(attribute: &Attribute) -> Option<Axis> {
    Some(match attribute {
        Attribute::PeerUri | Attribute::PeerNamespace | Attribute::PeerServiceAccount | Attribute::PeerTrustDomain => {
            Axis::Peer
        }
        Attribute::SourceIp => Axis::Source,
        Attribute::RemoteIp => Axis::Remote,
        Attribute::DestinationIp => Axis::Address,
        Attribute::DestinationPort => Axis::Port,
        Attribute::Sni => Axis::Sni,
        Attribute::Host => Axis::Host,
        Attribute::Method => Axis::Method,
        Attribute::Path => Axis::Path,
        Attribute::Header(name) => match name.to_ascii_lowercase().as_str() {
            ":authority" | "host" => Axis::Host,
            ":method" => Axis::Method,
            name => Axis::Header(name.to_string()),
        },
        Attribute::Claim(path) => Axis::Claim(path.clone()),
        Attribute::Metadata(..) => return None,
    })
}

impl Space {
    /// The space of these tests (by number) in a universe.
    pub(super) fn new(atoms: &BTreeMap<u32, Atom>, opaque: &BTreeSet<u32>, universe: &Universe) -> Space {
        let mut by_axis: BTreeMap<Axis, Vec<u32>> = BTreeMap::new();
        for (var, atom) in atoms {
            if let Some(axis) = axis(&atom.attribute) {
                by_axis.entry(axis).or_default().push(*var);
            }
        }
        let mut dimensions: Vec<Dimension> = by_axis
            .into_iter()
            .map(|(axis, vars)| {
                let tests: Vec<&Atom> = vars.iter().filter_map(|v| atoms.get(v)).collect();
                Builder { universe, tests }.build(axis, vars)
            })
            .collect();
        for var in opaque {
            let cell = |holds: bool, cost: usize| Cell {
                holds: vec![holds],
                point: Point::Unknown,
                cost,
            };
            dimensions.push(Dimension {
                axis: Axis::Opaque(*var),
                vars: vec![*var],
                cells: vec![cell(true, 0), cell(false, 1)],
                exact: false,
            });
        }
        // Few cells first: choices there prune most.
        dimensions.sort_by_key(|d| d.cells.len());
        Space { dimensions }
    }
}

struct Builder<'a> {
    universe: &'a Universe,
    tests: Vec<&'a Atom>,
}

impl Builder<'_> {
    fn build(&self, axis: Axis, vars: Vec<u32>) -> Dimension {
        let universe = self.universe;
        let base = &universe.base;
        let http = base.http.as_ref();
        let (mut cells, exact) = match &axis {
            Axis::Peer => match &universe.peer {
                Peer::None => (vec![self.cell(&axis, Point::Absent)], true),
                Peer::Is(uri) => (vec![self.cell(&axis, Point::Text(uri.clone()))], true),
                Peer::Any(trust_domains) => {
                    let usual = universe.usual.iter();
                    let mut cells: Vec<Cell> = usual.map(|uri| self.cell(&axis, Point::Text(uri.clone()))).collect();
                    let (found, exact) = self.texts(&axis, &Identity::new(trust_domains));
                    // Without anything usual the plainest identity of all is, so that it costs nothing.
                    cells.extend(found);
                    (cells, exact)
                }
            },
            Axis::Source | Axis::Remote | Axis::Address => self.addresses(&axis),
            Axis::Port => {
                let port = base.destination.port();
                if universe.fixed.port {
                    (vec![self.cell(&axis, Point::Port(port))], true)
                } else {
                    let mut ports: BTreeSet<u16> = BTreeSet::from([port]);
                    for atom in &self.tests {
                        if let Matcher::Port(port) = atom.matcher {
                            ports.extend([port, port.wrapping_add(1).max(1)]);
                        }
                    }
                    (
                        ports.into_iter().map(|p| self.cell(&axis, Point::Port(p))).collect(),
                        true,
                    )
                }
            }
            Axis::Sni => match (&base.sni, universe.fixed.sni) {
                (sni, true) => (vec![self.cell(&axis, optional(sni.as_deref()))], true),
                (sni, false) => {
                    let (mut cells, exact) = self.texts(&axis, &Free::host());
                    cells.insert(0, self.cell(&axis, Point::Absent));
                    if let Some(sni) = sni {
                        cells.insert(0, self.cell(&axis, Point::Text(sni.clone())));
                    }
                    (cells, exact)
                }
            },
            Axis::Host | Axis::Method | Axis::Path | Axis::Header(_) | Axis::Claim(_) if http.is_none() => {
                (vec![self.cell(&axis, Point::Absent)], true)
            }
            Axis::Host => self.http_text(
                &axis,
                http.map(|h| h.host.as_str()),
                universe.fixed.host,
                &Free::host(),
                &[],
            ),
            Axis::Method => {
                let method = http.map(|h| h.method.as_str());
                self.http_text(&axis, method, universe.fixed.method, &Free::method(), &METHODS)
            }
            Axis::Path => {
                let guard = Path {
                    normal: universe.normalization != PathNormalization::None,
                    merged: matches!(
                        universe.normalization,
                        PathNormalization::MergeSlashes | PathNormalization::DecodeAndMergeSlashes
                    ),
                };
                self.http_text(&axis, http.map(|h| h.path.as_str()), universe.fixed.path, &guard, &[])
            }
            Axis::Header(name) => {
                let given: Vec<String> = http
                    .into_iter()
                    .flat_map(|h| &h.headers)
                    .filter(|(n, _)| n == name)
                    .map(|(_, v)| v.clone())
                    .collect();
                if given.is_empty() {
                    let (cells, exact) = self.texts(&axis, &HeaderValue);
                    self.unions(&axis, cells, exact)
                } else {
                    (vec![self.cell(&axis, Point::Texts(given))], true)
                }
            }
            Axis::Claim(path) => match (&universe.issuers, http.and_then(|h| h.claims.as_ref())) {
                (_, Some(claims)) => {
                    let found = path.iter().try_fold(claims, |v, key| v.get(key));
                    let point = match found {
                        Some(Value::String(one)) => Point::Texts(vec![one.clone()]),
                        Some(Value::Array(list)) => {
                            Point::Texts(list.iter().filter_map(|v| v.as_str().map(String::from)).collect())
                        }
                        _ => Point::Absent,
                    };
                    (vec![self.cell(&axis, point)], true)
                }
                // Nobody verifies tokens: there are no claims.
                (None, None) => (vec![self.cell(&axis, Point::Absent)], true),
                (Some(issuers), None) if path.as_slice() == ["iss"] && !issuers.is_empty() => {
                    let mut cells = vec![self.cell(&axis, Point::Absent)];
                    cells.extend(issuers.iter().map(|i| self.cell(&axis, Point::Texts(vec![i.clone()]))));
                    (cells, true)
                }
                (Some(_), None) => {
                    let (cells, exact) = self.texts(&axis, &Free::claim());
                    if path.len() == 1 && matches!(path[0].as_str(), "iss" | "sub") {
                        let mut cells: Vec<Cell> = cells
                            .into_iter()
                            .map(|c| Cell {
                                point: several(c.point),
                                ..c
                            })
                            .collect();
                        cells.insert(0, self.cell(&axis, Point::Absent));
                        (cells, exact)
                    } else {
                        self.unions(&axis, cells, exact)
                    }
                }
            },
            Axis::Opaque(_) => (Vec::new(), false),
        };
        // One cell per combination, the cheapest; the default value's first.
        for (index, cell) in cells.iter_mut().enumerate() {
            cell.cost = match (&cell.point, index) {
                (_, 0) => 0,
                (Point::Text(text), _) => 100 + text.len(),
                (Point::Texts(texts), _) => 100 + 20 * texts.len() + texts.iter().map(String::len).sum::<usize>(),
                _ => 100,
            };
        }
        cells.sort_by_key(|c| c.cost);
        let mut seen = BTreeSet::new();
        cells.retain(|c| seen.insert(c.holds.clone()));
        let exact =
            exact && cells.len() <= MAX_CELLS && !self.tests.iter().any(|t| matches!(t.matcher, Matcher::Regex(_)));
        cells.truncate(MAX_CELLS);
        Dimension {
            axis,
            vars,
            cells,
            exact,
        }
    }

    fn cell(&self, axis: &Axis, point: Point) -> Cell {
        Cell {
            holds: self.holds(axis, &point),
            point,
            cost: 0,
        }
    }

    /// The tests' own results for a value.
    fn holds(&self, axis: &Axis, point: &Point) -> Vec<bool> {
        let mut sample = self.universe.base.clone();
        // Tests of the other attributes are not asked, so a sample with this one value will do.
        put(&mut sample, axis, point);
        self.tests
            .iter()
            .map(|atom| Test::new(atom).is_ok_and(|t| t.holds(&sample.connection(), sample.view())))
            .collect()
    }

    /// A text of the request: what is given, what people use, and a shortest value of every other combination.
    fn http_text(
        &self,
        axis: &Axis,
        given: Option<&str>,
        fixed: bool,
        guard: &dyn Guard,
        usual: &[&str],
    ) -> (Vec<Cell>, bool) {
        let mut cells: Vec<Cell> = given
            .into_iter()
            .map(|text| self.cell(axis, Point::Text(text.to_string())))
            .collect();
        if fixed {
            return (cells, true);
        }
        cells.extend(usual.iter().map(|text| self.cell(axis, Point::Text(text.to_string()))));
        let (found, exact) = self.texts(axis, guard);
        cells.extend(found);
        (cells, exact)
    }

    /// One cell per combination of tests that some text has.
    fn texts(&self, axis: &Axis, guard: &dyn Guard) -> (Vec<Cell>, bool) {
        let patterns: Vec<Vec<Pattern>> = self.tests.iter().map(|atom| patterns(atom)).collect();
        let (found, mut complete) = combinations(&patterns, guard);
        let mut cells = Vec::new();
        for combination in found {
            match String::from_utf8(combination.value) {
                // The tests themselves have the last word.
                Ok(text) => cells.push(self.cell(axis, Point::Text(text))),
                Err(_) => complete = false,
            }
        }
        (cells, complete)
    }

    /// Several values at a time: a test holds if it does for one of them. None at all is the first cell.
    fn unions(&self, axis: &Axis, single: Vec<Cell>, mut exact: bool) -> (Vec<Cell>, bool) {
        let mut out = vec![self.cell(axis, Point::Absent)];
        let mut seen: BTreeSet<Vec<bool>> = BTreeSet::new();
        let mut layer: Vec<Vec<String>> = vec![Vec::new()];
        let values: Vec<String> = single
            .into_iter()
            .filter_map(|c| match c.point {
                Point::Text(text) => Some(text),
                _ => None,
            })
            .collect();
        while !layer.is_empty() {
            let mut next = Vec::new();
            for had in &layer {
                for value in &values {
                    let mut texts = had.clone();
                    texts.push(value.clone());
                    let cell = self.cell(axis, Point::Texts(texts.clone()));
                    if seen.contains(&cell.holds) {
                        continue;
                    }
                    if seen.len() >= MAX_UNIONS {
                        exact = false;
                        return (out, exact);
                    }
                    seen.insert(cell.holds.clone());
                    next.push(texts);
                    out.push(cell);
                }
            }
            layer = next;
        }
        (out, exact)
    }

    fn addresses(&self, axis: &Axis) -> (Vec<Cell>, bool) {
        let universe = self.universe;
        let (given, fixed) = match axis {
            Axis::Source => (universe.base.source, universe.fixed.source),
            Axis::Remote => (universe.base.remote, universe.fixed.remote),
            _ => (universe.base.destination.ip(), universe.fixed.address),
        };
        let mut all = vec![given];
        if !fixed {
            // Results change only where a range begins or has just ended.
            for atom in &self.tests {
                let Matcher::Cidr(net) = &atom.matcher else { continue };
                all.push(net.network());
                all.extend(after(net));
                all.push(match net {
                    IpNet::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                    IpNet::V6(_) => IpAddr::from([0u8; 16]),
                });
            }
        }
        (
            all.into_iter().map(|ip| self.cell(axis, Point::Address(ip))).collect(),
            true,
        )
    }
}

fn optional(text: Option<&str>) -> Point {
    text.map_or(Point::Absent, |t| Point::Text(t.to_string()))
}

fn several(point: Point) -> Point {
    match point {
        Point::Text(text) => Point::Texts(vec![text]),
        other => other,
    }
}

/// The address after a range.
fn after(net: &IpNet) -> Option<IpAddr> {
    match net.broadcast() {
        IpAddr::V4(ip) => u32::from(ip).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(ip) => u128::from(ip).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

/// Puts a value into a sample.
pub(super) fn put(sample: &mut Sample, axis: &Axis, point: &Point) {
    match (axis, point) {
        (Axis::Peer, Point::Text(uri)) => sample.peer = vec![uri.clone()],
        (Axis::Peer, _) => sample.peer.clear(),
        (Axis::Source, Point::Address(ip)) => sample.source = *ip,
        (Axis::Remote, Point::Address(ip)) => sample.remote = *ip,
        (Axis::Address, Point::Address(ip)) => sample.destination.set_ip(*ip),
        (Axis::Port, Point::Port(port)) => sample.destination.set_port(*port),
        (Axis::Sni, Point::Text(sni)) => sample.sni = Some(sni.clone()),
        (Axis::Sni, _) => sample.sni = None,
        (axis, point) => {
            if let Some(http) = &mut sample.http {
                put_http(http, axis, point);
            }
        }
    }
}

fn put_http(http: &mut HttpSample, axis: &Axis, point: &Point) {
    match (axis, point) {
        (Axis::Host, Point::Text(text)) => http.host.clone_from(text),
        (Axis::Method, Point::Text(text)) => http.method.clone_from(text),
        (Axis::Path, Point::Text(text)) => http.path.clone_from(text),
        (Axis::Header(name), point) => {
            http.headers.retain(|(n, _)| n != name);
            let values = match point {
                Point::Text(one) => std::slice::from_ref(one),
                Point::Texts(all) => all,
                _ => &[],
            };
            http.headers.extend(values.iter().map(|v| (name.clone(), v.clone())));
        }
        (Axis::Claim(path), point) => {
            let value = match point {
                Point::Text(one) => json!(one),
                Point::Texts(all) => match all.as_slice() {
                    // A lone text with blanks would be split in some claims; a list never is.
                    [one] if !one.contains(' ') => json!(one),
                    all => json!(all),
                },
                _ => return,
            };
            let mut at = http.claims.get_or_insert_with(|| json!({}));
            for key in path {
                if !at.is_object() {
                    *at = json!({});
                }
                at = &mut at[key.as_str()];
            }
            *at = value;
        }
        _ => {}
    }
}

/// A test of text as patterns; none for a test that is no text, or that cannot be walked (expressions).
fn patterns(atom: &Atom) -> Vec<Pattern> {
    let new = Pattern::new;
    let any_case = atom.attribute == Attribute::Host;
    let lit = |p: Pattern, text: &str| {
        if any_case {
            p.text_any_case(text.as_bytes())
        } else {
            p.text(text.as_bytes())
        }
    };
    match (&atom.attribute, &atom.matcher) {
        (Attribute::PeerUri, Matcher::Suffix(text)) => vec![new().text(SPIFFE.as_bytes()).many().text(text.as_bytes())],
        (Attribute::PeerNamespace, Matcher::Exact(text) | Matcher::Glob(text)) => {
            let glob = matches!(atom.matcher, Matcher::Glob(_));
            let mut pattern = new().many().text(b"/ns/");
            let parts: Vec<&str> = if glob { text.split('*').collect() } else { vec![text] };
            for (index, part) in parts.iter().enumerate() {
                if index > 0 {
                    pattern = pattern.many();
                }
                pattern = pattern.text(part.as_bytes());
            }
            vec![pattern.text(b"/").many()]
        }
        (Attribute::PeerServiceAccount, Matcher::Exact(name)) => {
            let Some((ns, sa)) = name.split_once('/') else {
                return Vec::new();
            };
            // `spiffe://.+/ns/NS/(.+/|)sa/SA(/.+)?`
            let head = || {
                new()
                    .text(SPIFFE.as_bytes())
                    .some()
                    .text(b"/ns/")
                    .text(ns.as_bytes())
                    .text(b"/")
            };
            let account = |p: Pattern| p.text(b"sa/").text(sa.as_bytes());
            let further = |p: Pattern| p.some().text(b"/");
            vec![
                account(head()),
                account(head()).text(b"/").some(),
                account(further(head())),
                account(further(head())).text(b"/").some(),
            ]
        }
        (Attribute::PeerTrustDomain, Matcher::Glob(text)) if text == "*" => vec![new().text(SPIFFE.as_bytes()).many()],
        (Attribute::PeerTrustDomain, Matcher::Exact(text) | Matcher::Glob(text)) => {
            let glob = matches!(atom.matcher, Matcher::Glob(_));
            let mut pattern = new().text(SPIFFE.as_bytes());
            match text.split_once('*').filter(|_| glob) {
                Some((before, after)) => {
                    pattern = pattern.text(before.as_bytes()).many_in_segment().text(after.as_bytes());
                }
                None => pattern = pattern.text(text.as_bytes()),
            }
            vec![pattern.text(b"/").many()]
        }
        (_, Matcher::Exact(text)) => vec![lit(new(), text)],
        (_, Matcher::Prefix(text)) => vec![lit(new(), text).many()],
        (_, Matcher::Suffix(text)) => vec![lit(new().many(), text)],
        // A header's presence holds for the empty value too; other texts must not be empty.
        (Attribute::Header(_) | Attribute::Host | Attribute::Method, Matcher::Present) => vec![new().many()],
        (_, Matcher::Present) => vec![new().some()],
        (_, Matcher::Template(text)) => template(text),
        _ => Vec::new(),
    }
}

fn template(text: &str) -> Vec<Pattern> {
    let mut pattern = Pattern::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("{**}") {
            pattern = pattern.any_of_template();
            rest = after;
        } else if let Some(after) = rest.strip_prefix("{*}") {
            pattern = pattern.one_of_template();
            rest = after;
        } else {
            let end = rest.find('{').filter(|at| *at > 0).unwrap_or(rest.len());
            pattern = pattern.text(&rest.as_bytes()[..end]);
            rest = &rest[end..];
        }
    }
    vec![pattern]
}
