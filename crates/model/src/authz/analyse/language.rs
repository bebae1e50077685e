//! Which combinations of text tests one value can satisfy together, with a shortest value for each.
//!
//! Every test of text (exact, prefix, suffix, presence, glob, template, an identity's parts) is a small set of patterns over
//! bytes. All patterns run side by side as one automaton over all values that the attribute can have ([`Guard`]); a breadth-first
//! walk finds every reachable combination and, because it is breadth-first, a shortest value of it. Bytes that no pattern
//! mentions behave alike, so one of each sort stands for the rest. The walk is bounded; a walk that was cut short says so.

use std::collections::HashMap;

use super::super::template::is_segment_byte;

/// Most states of one walk.
const MAX_STATES: usize = 60_000;
/// Most positions that one walk may touch, over all steps.
const MAX_WORK: usize = 40_000_000;

/// One step of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Byte(u8),
    /// The byte in either case.
    AnyCase(u8),
    /// Any one byte.
    One,
    /// Any bytes, also none.
    Many,
    /// Any bytes but `/`, also none.
    ManyInSegment,
    /// A byte that `{*}` of a template stands for.
    OneOfTemplate,
    /// Such bytes, also none.
    ManyOfTemplate,
    /// Bytes that `{**}` of a template stands for, also none.
    AnyOfTemplate,
}

/// A pattern: steps that together match a whole value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pattern(Vec<Step>);

impl Pattern {
    pub(super) fn new() -> Pattern {
        Pattern::default()
    }
    pub(super) fn text(mut self, text: &[u8]) -> Pattern {
        self.0.extend(text.iter().map(|b| Step::Byte(*b)));
        self
    }
    pub(super) fn text_any_case(mut self, text: &[u8]) -> Pattern {
        self.0
            .extend(text.iter().map(|b| Step::AnyCase(b.to_ascii_lowercase())));
        self
    }
    /// `.*`
    pub(super) fn many(mut self) -> Pattern {
        self.0.push(Step::Many);
        self
    }
    /// `.+`
    pub(super) fn some(mut self) -> Pattern {
        self.0.extend([Step::One, Step::Many]);
        self
    }
    /// `[^/]*`
    pub(super) fn many_in_segment(mut self) -> Pattern {
        self.0.push(Step::ManyInSegment);
        self
    }
    /// `{*}`
    pub(super) fn one_of_template(mut self) -> Pattern {
        self.0.extend([Step::OneOfTemplate, Step::ManyOfTemplate]);
        self
    }
    /// `{**}`
    pub(super) fn any_of_template(mut self) -> Pattern {
        self.0.push(Step::AnyOfTemplate);
        self
    }
}

/// All values that an attribute can have, as a deterministic automaton, and how its bytes sort.
pub(super) trait Guard {
    /// The state before the first byte.
    fn start(&self) -> u32;
    /// The state after a byte; `None` if no value goes on so.
    fn step(&self, state: u32, byte: u8) -> Option<u32>;
    /// Whether a value may end here.
    fn accepts(&self, state: u32) -> bool;
    /// Bytes that it tells apart from others of their sort, and one byte or more of every sort, the nicest first.
    fn alphabet(&self) -> Vec<Vec<u8>>;
    /// Bytes that behave as any other unless a pattern names them: walked only then.
    fn rare(&self) -> Vec<u8> {
        Vec::new()
    }
}

/// A reachable combination of tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Combination {
    /// Which tests hold, by their index.
    pub(super) holds: Vec<bool>,
    /// A shortest value.
    pub(super) value: Vec<u8>,
}

/// All combinations of these tests (each a union of patterns); false if the walk was cut short.
pub(super) fn combinations(tests: &[Vec<Pattern>], guard: &dyn Guard) -> (Vec<Combination>, bool) {
    let machine = Machine::new(tests);
    let alphabet = machine.alphabet(guard);

    let mut ids: HashMap<(u32, Box<[u32]>), usize> = HashMap::new();
    let mut states: Vec<(u32, Box<[u32]>)> = Vec::new();
    // The byte by which a state was first reached, and from where.
    let mut parents: Vec<(usize, u8)> = Vec::new();
    let mut found: HashMap<Vec<bool>, usize> = HashMap::new();
    let mut order: Vec<(Vec<bool>, usize)> = Vec::new();

    let start = (guard.start(), machine.start());
    ids.insert(start.clone(), 0);
    states.push(start);
    parents.push((0, 0));
    let mut work = 0;
    let mut complete = true;
    let mut next = 0;
    'walk: while next < states.len() {
        let (guard_state, active) = states[next].clone();
        if guard.accepts(guard_state) {
            let holds = machine.holds(&active);
            if !found.contains_key(&holds) {
                found.insert(holds.clone(), next);
                order.push((holds, next));
            }
        }
        for byte in &alphabet {
            let Some(guarded) = guard.step(guard_state, *byte) else {
                continue;
            };
            work += active.len() + 1;
            let state = (guarded, machine.step(&active, *byte));
            if ids.contains_key(&state) {
                continue;
            }
            if states.len() >= MAX_STATES || work > MAX_WORK {
                complete = false;
                break 'walk;
            }
            ids.insert(state.clone(), states.len());
            states.push(state);
            parents.push((next, *byte));
        }
        next += 1;
    }
    let value = |mut at: usize| {
        let mut out = Vec::new();
        while at != 0 {
            let (parent, byte) = parents[at];
            out.push(byte);
            at = parent;
        }
        out.reverse();
        out
    };
    let combinations = order
        .into_iter()
        .map(|(holds, at)| Combination {
            holds,
            value: value(at),
        })
        .collect();
    (combinations, complete)
}

/// All patterns as one automaton; its states are sets of positions.
struct Machine {
    steps: Vec<Option<Step>>,
    /// First position of every pattern.
    starts: Vec<u32>,
    /// Test of every final position.
    finals: HashMap<u32, usize>,
    tests: usize,
}

impl Machine {
    fn new(tests: &[Vec<Pattern>]) -> Machine {
        let mut machine = Machine {
            steps: Vec::new(),
            starts: Vec::new(),
            finals: HashMap::new(),
            tests: tests.len(),
        };
        for (index, patterns) in tests.iter().enumerate() {
            for pattern in patterns {
                machine.starts.push(machine.position());
                machine.steps.extend(pattern.0.iter().map(|s| Some(*s)));
                machine.finals.insert(machine.position(), index);
                machine.steps.push(None);
            }
        }
        machine
    }

    fn position(&self) -> u32 {
        u32::try_from(self.steps.len()).unwrap_or(u32::MAX)
    }

    fn start(&self) -> Box<[u32]> {
        let mut out = Vec::new();
        for position in &self.starts {
            self.add(*position, &mut out);
        }
        finish(out)
    }

    /// Adds a position and those that can be reached without a byte.
    fn add(&self, mut position: u32, out: &mut Vec<u32>) {
        out.push(position);
        while let Some(Some(Step::Many | Step::ManyInSegment | Step::ManyOfTemplate | Step::AnyOfTemplate)) =
            self.steps.get(position as usize)
        {
            position += 1;
            out.push(position);
        }
    }

    fn step(&self, active: &[u32], byte: u8) -> Box<[u32]> {
        let mut out = Vec::with_capacity(active.len());
        for position in active {
            let Some(Some(step)) = self.steps.get(*position as usize) else {
                continue;
            };
            match step {
                Step::Byte(b) if *b == byte => self.add(position + 1, &mut out),
                Step::AnyCase(b) if *b == byte.to_ascii_lowercase() => self.add(position + 1, &mut out),
                Step::One => self.add(position + 1, &mut out),
                Step::OneOfTemplate if is_segment_byte(byte) => self.add(position + 1, &mut out),
                Step::ManyOfTemplate if is_segment_byte(byte) => self.add(*position, &mut out),
                Step::AnyOfTemplate if byte == b'/' || is_segment_byte(byte) => self.add(*position, &mut out),
                Step::Many => self.add(*position, &mut out),
                Step::ManyInSegment if byte != b'/' => self.add(*position, &mut out),
                _ => {}
            }
        }
        finish(out)
    }

    fn holds(&self, active: &[u32]) -> Vec<bool> {
        let mut out = vec![false; self.tests];
        for position in active {
            if let Some(test) = self.finals.get(position) {
                out[*test] = true;
            }
        }
        out
    }

    /// Bytes to walk with: those that patterns name, and one of every sort that they do not.
    fn alphabet(&self, guard: &dyn Guard) -> Vec<u8> {
        let mut named = [false; 256];
        for step in self.steps.iter().flatten() {
            match step {
                Step::Byte(b) => named[*b as usize] = true,
                Step::AnyCase(b) => {
                    named[*b as usize] = true;
                    named[b.to_ascii_uppercase() as usize] = true;
                }
                Step::ManyInSegment | Step::OneOfTemplate | Step::ManyOfTemplate => named[usize::from(b'/')] = true,
                _ => {}
            }
        }
        let mut out = Vec::new();
        for sort in guard.alphabet() {
            let mut other = sort.iter().find(|b| !named[**b as usize]).copied();
            for byte in &sort {
                if named[*byte as usize] || other == Some(*byte) {
                    out.push(*byte);
                    if other == Some(*byte) {
                        other = None;
                    }
                }
            }
        }
        out.extend(guard.rare().into_iter().filter(|b| named[*b as usize]));
        out
    }
}

fn finish(mut positions: Vec<u32>) -> Box<[u32]> {
    positions.sort_unstable();
    positions.dedup();
    positions.into()
}

/// Values of bytes of some sorts, of at least some length.
pub(super) struct Free {
    /// Sorts of bytes.
    pub(super) sorts: Vec<Vec<u8>>,
    /// Whether the empty text is a value.
    pub(super) empty: bool,
    /// Whether values may have characters beyond ASCII.
    pub(super) beyond_ascii: bool,
}

impl Free {
    fn allows(&self, byte: u8) -> bool {
        self.sorts.iter().flatten().any(|b| *b == byte) || (self.beyond_ascii && byte >= 0x80)
    }

    /// HTTP methods.
    pub(super) fn method() -> Free {
        let mut sorts = vec![(b'A'..=b'Z').rev().chain(b'a'..=b'z').collect::<Vec<u8>>()];
        sorts[0].extend(b"0123456789!#$%&'*+-.^_`|~");
        Free {
            sorts,
            empty: false,
            beyond_ascii: false,
        }
    }

    /// `:authority` and server names.
    pub(super) fn host() -> Free {
        let mut all: Vec<u8> = (b'a'..=b'z').rev().collect();
        all.extend(b"0123456789");
        all.extend(b'A'..=b'Z');
        all.extend(b"-._~:[]!$&'()*+,;=%");
        Free {
            sorts: vec![all],
            empty: false,
            beyond_ascii: false,
        }
    }

    /// Claims: text.
    pub(super) fn claim() -> Free {
        let mut all: Vec<u8> = (b'a'..=b'z').rev().collect();
        all.extend((b' '..=b'~').filter(|b| !b.is_ascii_lowercase()));
        Free {
            sorts: vec![all],
            empty: true,
            beyond_ascii: true,
        }
    }
}

impl Guard for Free {
    fn start(&self) -> u32 {
        0
    }
    fn step(&self, _: u32, byte: u8) -> Option<u32> {
        self.allows(byte).then_some(1)
    }
    fn accepts(&self, state: u32) -> bool {
        state == 1 || self.empty
    }
    fn alphabet(&self) -> Vec<Vec<u8>> {
        self.sorts.clone()
    }
    fn rare(&self) -> Vec<u8> {
        if self.beyond_ascii {
            (0x80..=0xff).collect()
        } else {
            Vec::new()
        }
    }
}

/// Header values: visible characters and blanks between them.
pub(super) struct HeaderValue;

impl Guard for HeaderValue {
    fn start(&self) -> u32 {
        0
    }
    fn step(&self, state: u32, byte: u8) -> Option<u32> {
        match (state, byte) {
            (0, b' ') => None,
            (_, b' ') => Some(2),
            (_, 0x21..=0x7e | 0x80..=0xff) => Some(1),
            _ => None,
        }
    }
    fn rare(&self) -> Vec<u8> {
        (0x80..=0xff).collect()
    }
    fn accepts(&self, state: u32) -> bool {
        state != 2
    }
    fn alphabet(&self) -> Vec<Vec<u8>> {
        let mut visible: Vec<u8> = (b'a'..=b'z').rev().collect();
        visible.extend((0x21..=0x7e_u8).filter(|b| !b.is_ascii_lowercase()));
        vec![visible, vec![b' ']]
    }
}

/// Paths in normal form.
pub(super) struct Path {
    /// Whether dot segments and backslashes were removed before.
    pub(super) normal: bool,
    /// Whether `//` was.
    pub(super) merged: bool,
}

/// States of [`Path`]: 0 before, 1 after a slash, 2 after `/.`, 3 after `/..`, 4 in a segment; then percent signs.
const PERCENT: u32 = 5;

impl Guard for Path {
    fn start(&self) -> u32 {
        0
    }
    fn step(&self, state: u32, byte: u8) -> Option<u32> {
        if state >= PERCENT {
            // Two hexadecimal digits; those of unreserved characters and of NUL never remain.
            let digit = char::from(byte).to_digit(16)?;
            return if state == PERCENT {
                Some(PERCENT + 1 + digit)
            } else {
                let decoded = u8::try_from((state - PERCENT - 1) * 16 + digit).ok()?;
                let unreserved = decoded.is_ascii_alphanumeric() || b"-._~".contains(&decoded);
                (decoded != 0 && !(self.normal && unreserved)).then_some(4)
            };
        }
        match (state, byte) {
            (0, b'/') => Some(1),
            (0, _) => None,
            (1, b'/') if self.merged => None,
            (2 | 3, b'/') if self.normal => None,
            (_, b'/') => Some(1),
            (1, b'.') => Some(2),
            (2, b'.') => Some(3),
            (_, b'%') => Some(PERCENT),
            (_, b'\\') if self.normal => None,
            (_, b'#' | b'?' | b'<' | b'>' | b'`') => None,
            (_, 0x21..=0x7e | 0x80..=0xff) => Some(4),
            _ => None,
        }
    }
    fn accepts(&self, state: u32) -> bool {
        match state {
            0 => false,
            2 | 3 => !self.normal,
            state => state < PERCENT,
        }
    }
    fn alphabet(&self) -> Vec<Vec<u8>> {
        let mut plain: Vec<u8> = (b'a'..=b'z').rev().collect();
        plain.extend(b"0123456789");
        plain.extend(b'A'..=b'Z');
        plain.extend((0x21..=0x7e_u8).filter(|b| !b.is_ascii_alphanumeric() && !b"/.%#?".contains(b)));
        // Templates tell these from others.
        let (plain, odd) = plain.into_iter().partition(|b| is_segment_byte(*b));
        vec![plain, vec![b'/'], vec![b'.'], odd]
    }
    fn rare(&self) -> Vec<u8> {
        (0x80..=0xff).chain([b'%']).collect()
    }
}

/// Identities of workloads: `spiffe://TD/ns/NS/sa/SA` with one of some trust domains.
pub(super) struct Identity {
    /// States by number; the first is the start.
    nodes: Vec<HashMap<u8, u32>>,
    accepts: Vec<bool>,
}

impl Identity {
    pub(super) fn new(trust_domains: &[String]) -> Identity {
        let mut guard = Identity {
            nodes: vec![HashMap::new()],
            accepts: vec![false],
        };
        // Namespace: 1 + a letter or digit at both ends; account the same, with dots.
        let namespace = guard.node(false);
        for domain in trust_domains {
            guard.literal(0, format!("spiffe://{domain}/ns/").as_bytes(), namespace);
        }
        let account = guard.node(false);
        let inside = guard.name(namespace, b"-", false);
        guard.literal(inside, b"/sa/", account);
        guard.name(account, b"-.", true);
        guard
    }

    fn node(&mut self, accepts: bool) -> u32 {
        self.nodes.push(HashMap::new());
        self.accepts.push(accepts);
        u32::try_from(self.nodes.len() - 1).unwrap_or(u32::MAX)
    }

    fn literal(&mut self, from: u32, text: &[u8], to: u32) {
        let mut at = from;
        for (index, byte) in text.iter().enumerate() {
            let last = index + 1 == text.len();
            at = match self.nodes[at as usize].get(byte) {
                Some(next) if !last => *next,
                _ => {
                    let next = if last { to } else { self.node(false) };
                    self.nodes[at as usize].insert(*byte, next);
                    next
                }
            };
        }
    }

    /// A DNS name from a state on; returns the state in which it may end.
    fn name(&mut self, from: u32, punctuation: &[u8], accepts: bool) -> u32 {
        let end = self.node(accepts);
        let middle = self.node(false);
        for byte in (b'a'..=b'z').chain(b'0'..=b'9') {
            for state in [from, end, middle] {
                self.nodes[state as usize].insert(byte, end);
            }
        }
        for byte in punctuation {
            self.nodes[end as usize].insert(*byte, middle);
            if *byte == b'-' {
                self.nodes[middle as usize].insert(*byte, middle);
            }
        }
        end
    }
}

impl Guard for Identity {
    fn start(&self) -> u32 {
        0
    }
    fn step(&self, state: u32, byte: u8) -> Option<u32> {
        self.nodes.get(state as usize)?.get(&byte).copied()
    }
    fn accepts(&self, state: u32) -> bool {
        self.accepts.get(state as usize).copied().unwrap_or(false)
    }
    fn alphabet(&self) -> Vec<Vec<u8>> {
        // The literals of the form itself must be walked byte by byte.
        let mut literal: Vec<u8> = Vec::new();
        for (state, next) in self.nodes.iter().enumerate() {
            if next.len() <= 3 || state == 0 {
                literal.extend(next.keys());
            }
        }
        literal.extend(b"/sans:pife");
        literal.sort_unstable();
        literal.dedup();
        let mut sorts: Vec<Vec<u8>> = vec![
            (b'a'..=b'z')
                .rev()
                .chain(b'0'..=b'9')
                .filter(|b| !literal.contains(b))
                .collect(),
        ];
        sorts.extend(literal.iter().map(|b| vec![*b]));
        for byte in b"-.:_" {
            if !literal.contains(byte) {
                sorts.push(vec![*byte]);
            }
        }
        // Letters first, so that stand-ins read well.
        sorts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(c: &Combination) -> &str {
        std::str::from_utf8(&c.value).unwrap()
    }

    #[test]
    fn shortest_paths_of_all_combinations() {
        let prefix = Pattern::new().text(b"/api/").many();
        let suffix = Pattern::new().many().text(b".html");
        let exact = Pattern::new().text(b"/api/a.html");
        let guard = Path {
            normal: true,
            merged: false,
        };
        let (found, complete) = combinations(&[vec![prefix], vec![suffix], vec![exact]], &guard);
        assert!(complete);
        let mut shown: Vec<(&str, &[bool])> = found.iter().map(|c| (text(c), c.holds.as_slice())).collect();
        shown.sort();
        assert_eq!(
            shown,
            [
                ("/", &[false, false, false][..]),
                ("/.html", &[false, true, false]),
                ("/api/", &[true, false, false]),
                ("/api/.html", &[true, true, false]),
                ("/api/a.html", &[true, true, true]),
            ]
        );
    }

    #[test]
    fn dot_segments_and_double_slashes_are_no_values_where_they_are_removed() {
        let dots = Pattern::new().text(b"/a/../").many();
        let double = Pattern::new().text(b"/a//").many();
        let percent = Pattern::new().text(b"/%41");
        let all = [vec![dots], vec![double], vec![percent]];
        for (normal, merged, reachable) in [(false, false, 4), (true, false, 2), (true, true, 1)] {
            let (found, _) = combinations(&all, &Path { normal, merged });
            assert_eq!(found.len(), reachable, "{normal} {merged} {found:?}");
        }
    }

    #[test]
    fn characters_beyond_ascii_are_walked_where_a_pattern_names_them() {
        let exact = Pattern::new().text("/caf\u{e9}".as_bytes());
        let suffix = Pattern::new().many().text("\u{e9}".as_bytes());
        let guard = Path {
            normal: true,
            merged: true,
        };
        let (found, complete) = combinations(&[vec![exact], vec![suffix]], &guard);
        assert!(complete);
        let mut shown: Vec<&str> = found.iter().map(text).collect();
        shown.sort_unstable();
        assert_eq!(shown, ["/", "/caf\u{e9}", "/\u{e9}"]);
    }

    #[test]
    fn identities_are_well_formed() {
        let namespace = Pattern::new().many().text(b"/ns/prod").many().text(b"/").many();
        let account = Pattern::new().text(b"spiffe://td/ns/prod/sa/web");
        let domain = Pattern::new().text(b"spiffe://td/").many();
        let guard = Identity::new(&["td".into(), "old-td".into()]);
        let (found, complete) = combinations(&[vec![namespace], vec![account], vec![domain]], &guard);
        assert!(complete);
        let mut shown: Vec<&str> = found.iter().map(text).collect();
        shown.sort_unstable();
        assert_eq!(shown.len(), 5, "{shown:?}");
        assert!(shown.contains(&"spiffe://td/ns/prod/sa/web"));
        for id in shown {
            let parts: Vec<&str> = id.split('/').collect();
            assert!(
                matches!(parts.as_slice(), ["spiffe:", "", "td" | "old-td", "ns", ns, "sa", sa] if !ns.is_empty() && !sa.is_empty()),
                "{id}"
            );
        }
    }

    #[test]
    fn hosts_ignore_case_where_the_pattern_does() {
        let loose = Pattern::new().text_any_case(b"ab");
        let strict = Pattern::new().text(b"AB");
        let (found, _) = combinations(&[vec![loose], vec![strict]], &Free::host());
        let mut shown: Vec<Vec<bool>> = found.iter().map(|c| c.holds.clone()).collect();
        shown.sort();
        assert_eq!(shown, [vec![false, false], vec![true, false], vec![true, true]]);
    }
}
