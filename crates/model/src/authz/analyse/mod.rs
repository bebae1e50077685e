//! Questions about all requests at once: who may, what may they, what does a change allow or deny?
//!
//! Pure and exact for the tests that policies are made of: requests are cut into classes that no test tells apart
//! ([`space`]), and a formula of what the filters permit ([`formula`]) is decided over the classes. Every request that an
//! answer names was checked with [`Engine`]. What cannot be decided here (an external provider, an expression, a walk that
//! was cut short) is said in the answer, never guessed.

mod formula;
mod language;
mod space;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::matcher::Test;
use super::{Action, Atom, Attribute, AuthzFilter, Engine, Expr, Matcher, Rule, Sample, Verdict, canonical, words};
use crate::ext_authz::{CustomStage, Then};
use crate::http::PathNormalization;
use formula::Formula;
use space::{Axis, Cell, Point, Space};

/// Most DENY rules of a row that are looked at one by one.
const MAX_RELEVANT: usize = 64;
/// Most partial choices of one question.
const MAX_CHOICES: usize = 200_000;

/// What decides about the requests of one chain.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policies<'a> {
    /// CUSTOM stages.
    pub custom: &'a [CustomStage],
    /// Authorization filters.
    pub filters: &'a [AuthzFilter],
}

/// Which requests a question is about.
#[derive(Clone, Debug)]
pub struct Universe {
    /// The ordinary request, from which examples differ as little as possible. Without `http`, connections.
    pub base: Sample,
    /// Whose.
    pub peer: Peer,
    /// Identities that examples use before others; they must be of the accepted trust domains.
    pub usual: Vec<String>,
    /// What else is as in `base`.
    pub fixed: Fixed,
    /// Issuers whose tokens are verified; `None` if nobody verifies tokens, empty for any issuer.
    pub issuers: Option<Vec<String>>,
    /// Paths that reach policies are normalised so.
    pub normalization: PathNormalization,
}

/// Identities that a question is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// None: plaintext.
    None,
    /// This one.
    Is(String),
    /// Every identity of these trust domains.
    Any(Vec<String>),
}

impl Peer {
    /// An identity for examples where no rule looks at it.
    fn example(&self, usual: &[String]) -> Option<String> {
        match self {
            Peer::None => None,
            Peer::Is(uri) => Some(uri.clone()),
            Peer::Any(domains) => Some(usual.first().cloned().unwrap_or_else(|| {
                let domain = domains.first().map_or("cluster.local", String::as_str);
                format!("spiffe://{domain}/ns/z/sa/z")
            })),
        }
    }
}

/// Attributes that are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Method.
    pub method: bool,
    /// Path.
    pub path: bool,
    /// Host.
    pub host: bool,
    /// Server name.
    pub sni: bool,
    /// Peer's address.
    pub source: bool,
    /// Client's address.
    pub remote: bool,
    /// Destination address.
    pub address: bool,
    /// Destination port.
    pub port: bool,
}

/// Whether some request does something.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// None does; all classes were looked at.
    Never,
    /// This one, as near to the ordinary as possible.
    Request(Box<Witness>),
    /// None was found, but not everything could be looked at; why.
    Unknown(String),
}

/// A request that shows something.
#[derive(Clone, Debug, PartialEq)]
pub struct Witness {
    /// The request.
    pub sample: Sample,
    /// External providers that have to agree for it.
    pub providers: Vec<String>,
}

/// Tests by number, and what formulas say about them.
#[derive(Default)]
struct Program {
    vars: BTreeMap<Atom, u32>,
    providers: BTreeMap<String, u32>,
    next: u32,
    http: bool,
}

impl Program {
    fn new(universe: &Universe) -> Program {
        Program {
            http: universe.base.http.is_some(),
            ..Program::default()
        }
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    fn atom(&mut self, atom: &Atom) -> Formula {
        if (!self.http && atom.attribute.is_http()) || space::axis(&atom.attribute).is_none() {
            return Formula::Const(false);
        }
        if let Some(var) = self.vars.get(atom) {
            return Formula::Var(*var);
        }
        let var = self.number();
        self.vars.insert(atom.clone(), var);
        Formula::Var(var)
    }

    fn expr(&mut self, expr: &Expr) -> Formula {
        match expr {
            Expr::Atom(atom) => self.atom(atom),
            Expr::Not(inner) => self.expr(inner).not(),
            Expr::And(parts) => {
                let parts: Vec<Formula> = parts.iter().map(|p| self.expr(p)).collect();
                Formula::and(parts)
            }
            Expr::Or(parts) => {
                let parts: Vec<Formula> = parts.iter().map(|p| self.expr(p)).collect();
                Formula::or(parts)
            }
        }
    }

    /// When a rule matches. One that cannot be understood fails closed, as in the engine.
    fn rule(&mut self, rule: &Rule, action: Action) -> Formula {
        let expr = canonical(&rule.expr);
        if broken(&expr) {
            return Formula::Const(action != Action::Allow);
        }
        self.expr(&expr)
    }

    fn any(&mut self, rules: &[Rule], action: Action) -> Formula {
        let rules: Vec<Formula> = rules.iter().map(|r| self.rule(r, action)).collect();
        Formula::or(rules)
    }

    /// When policies let a request pass.
    fn permits(&mut self, policies: Policies<'_>) -> Formula {
        let mut all = Vec::new();
        for stage in policies.custom {
            let applies = self.any(&stage.rules, Action::Deny);
            match &stage.then {
                Then::Deny => all.push(applies.not()),
                Then::Ask(provider) => {
                    let var = match self.providers.get(&provider.provider) {
                        Some(var) => *var,
                        None => {
                            let var = self.number();
                            self.providers.insert(provider.provider.clone(), var);
                            var
                        }
                    };
                    all.push(Formula::or([applies.not(), Formula::Var(var)]));
                }
            }
        }
        for filter in policies.filters.iter().filter(|f| f.enforced) {
            match filter.action {
                Action::Log => {}
                Action::Deny => all.push(self.any(&filter.rules, Action::Deny).not()),
                Action::Allow => all.push(self.any(&filter.rules, Action::Allow)),
            }
        }
        Formula::and(all)
    }

    /// What holds for all requests that can arrive: a token with any claim has an accepted issuer.
    fn possible(&mut self, universe: &Universe) -> Formula {
        if universe.issuers.as_ref().is_none_or(Vec::is_empty) || !self.http {
            return Formula::Const(true);
        }
        let claims: BTreeSet<Vec<String>> = self
            .vars
            .keys()
            .filter_map(|a| match &a.attribute {
                Attribute::Claim(path) if path.as_slice() != ["iss"] => Some(path.clone()),
                _ => None,
            })
            .collect();
        let present = |path: Vec<String>| Atom {
            attribute: Attribute::Claim(path),
            matcher: Matcher::Present,
        };
        let all: Vec<Formula> = claims
            .into_iter()
            .map(|path| {
                let has = self.atom(&present(path));
                let issuer = self.atom(&present(vec!["iss".into()]));
                Formula::or([has.not(), issuer])
            })
            .collect();
        Formula::and(all)
    }

    fn space(&self, universe: &Universe) -> Space {
        let atoms = self.vars.iter().map(|(a, v)| (*v, a.clone())).collect();
        let opaque = self.providers.values().copied().collect();
        Space::new(&atoms, &opaque, universe)
    }

    fn find(&self, wanted: Formula, space: &Space, universe: &Universe) -> Finding {
        let mut search = Search {
            space,
            choices: 0,
            best: None,
            dead: HashSet::new(),
            path: Vec::new(),
        };
        let finished = search.go(0, wanted, 0);
        match search.best {
            Some((_, chosen)) => {
                let mut sample = universe.base.clone();
                if !universe.fixed.remote {
                    // Nobody forwarded the request unless a rule looks at that.
                    sample.remote = sample.source;
                }
                sample.peer = universe.peer.example(&universe.usual).into_iter().collect();
                let mut providers = Vec::new();
                for (dimension, cell) in chosen {
                    let dimension = &space.dimensions[dimension];
                    let cell = &dimension.cells[cell];
                    match &dimension.axis {
                        Axis::Opaque(var) if cell.holds == [true] => {
                            providers.extend(self.providers.iter().find(|(_, v)| *v == var).map(|(p, _)| p.clone()));
                        }
                        axis => space::put(&mut sample, axis, &cell.point),
                    }
                }
                Finding::Request(Box::new(Witness { sample, providers }))
            }
            None if !finished => Finding::Unknown(format!("more than {MAX_CHOICES} cases; not all were tried")),
            None => {
                let cut: Vec<String> = space
                    .dimensions
                    .iter()
                    .filter(|d| !d.exact && !matches!(d.axis, Axis::Opaque(_)))
                    .map(|d| format!("{:?}", d.axis).to_lowercase())
                    .collect();
                if cut.is_empty() {
                    Finding::Never
                } else {
                    Finding::Unknown(format!("not all values of these were tried: {}", cut.join(", ")))
                }
            }
        }
    }
}

fn broken(expr: &Expr) -> bool {
    match expr {
        Expr::And(parts) | Expr::Or(parts) => parts.iter().any(broken),
        Expr::Not(inner) => broken(inner),
        Expr::Atom(atom) => super::check(atom).is_err(),
    }
}

/// The cheapest choice of cells that makes a formula true.
struct Search<'s> {
    space: &'s Space,
    choices: usize,
    best: Option<(usize, Vec<(usize, usize)>)>,
    /// Formulas that no choice of the dimensions from some number on makes true.
    dead: HashSet<(usize, Formula)>,
    path: Vec<(usize, usize)>,
}

impl Search<'_> {
    /// Returns whether everything below was looked at or could not be better.
    fn go(&mut self, dimension: usize, formula: Formula, cost: usize) -> bool {
        match formula {
            Formula::Const(false) => return true,
            Formula::Const(true) => {
                if self.best.as_ref().is_none_or(|(best, _)| cost < *best) {
                    self.best = Some((cost, self.path.clone()));
                }
                return true;
            }
            _ => {}
        }
        if self.best.as_ref().is_some_and(|(best, _)| cost >= *best) {
            return true;
        }
        let space = self.space;
        let Some(found) = space.dimensions.get(dimension) else {
            return true;
        };
        let index: HashMap<u32, usize> = found.vars.iter().enumerate().map(|(i, v)| (*v, i)).collect();
        let mut concerned: BTreeSet<usize> = BTreeSet::new();
        formula.vars(&mut |var| concerned.extend(index.get(&var)));
        if concerned.is_empty() {
            return self.go(dimension + 1, formula, cost);
        }
        let key = (dimension, formula);
        if self.dead.contains(&key) {
            return true;
        }
        let had_best = self.best.is_some();
        let mut tried: HashSet<Formula> = HashSet::new();
        let mut seen: HashSet<Vec<bool>> = HashSet::new();
        let mut finished = true;
        for (number, cell) in found.cells.iter().enumerate() {
            // Cells come cheapest first: one that agrees with a former one in all that matters cannot be better.
            if !seen.insert(concerned.iter().filter_map(|i| cell.holds.get(*i).copied()).collect()) {
                continue;
            }
            self.choices += 1;
            if self.choices > MAX_CHOICES {
                return false;
            }
            let rest = key
                .1
                .assign(&|var| index.get(&var).and_then(|i| cell.holds.get(*i).copied()));
            if !tried.insert(rest.clone()) {
                continue;
            }
            self.path.push((dimension, number));
            finished &= self.go(dimension + 1, rest, cost + cell.cost);
            self.path.pop();
        }
        if finished && self.best.is_none() && !had_best {
            self.dead.insert(key);
        }
        finished
    }
}

/// Whether policies let a request pass when every provider that is asked answers `providers_agree`.
pub fn permitted(policies: Policies<'_>, sample: &Sample, providers_agree: bool) -> bool {
    let connection = sample.connection();
    for stage in policies.custom {
        let selector = [stage.selector()];
        let applies = Engine::new(&selector).decide(&connection, sample.view()).verdict == Verdict::Denied;
        if applies && (stage.then == Then::Deny || !providers_agree) {
            return false;
        }
    }
    Engine::new(policies.filters).decide(&connection, sample.view()).verdict == Verdict::Allowed
}

/// A request that the policies let pass.
pub fn find_allowed(policies: Policies<'_>, universe: &Universe) -> Finding {
    find(policies, universe, true)
}

/// A request that the policies stop.
pub fn find_denied(policies: Policies<'_>, universe: &Universe) -> Finding {
    find(policies, universe, false)
}

fn find(policies: Policies<'_>, universe: &Universe, allowed: bool) -> Finding {
    let mut program = Program::new(universe);
    let permits = program.permits(policies);
    let wanted = if allowed { permits } else { permits.not() };
    let wanted = Formula::and([wanted, program.possible(universe)]);
    let space = program.space(universe);
    let found = program.find(wanted, &space, universe);
    checked(found, |w| {
        permitted(policies, &w.sample, allowed || !w.providers.is_empty()) == allowed
    })
}

/// What a change does.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// A request that passes now and did not before.
    pub allowed: Finding,
    /// A request that passed before and does not now.
    pub denied: Finding,
}

impl Change {
    /// Whether it is proven that nothing changes.
    pub fn is_none(&self) -> bool {
        self.allowed == Finding::Never && self.denied == Finding::Never
    }
}

/// The smallest requests that a change of policies newly allows and denies.
pub fn compare(old: Policies<'_>, new: Policies<'_>, universe: &Universe) -> Change {
    let mut program = Program::new(universe);
    let before = program.permits(old);
    let after = program.permits(new);
    if before == after {
        return Change {
            allowed: Finding::Never,
            denied: Finding::Never,
        };
    }
    let possible = program.possible(universe);
    let space = program.space(universe);
    let differs = |from: &Formula, to: &Formula| Formula::and([from.clone().not(), to.clone(), possible.clone()]);
    let found = program.find(differs(&before, &after), &space, universe);
    let allowed = checked(found, |w| {
        let agree = !w.providers.is_empty();
        !permitted(old, &w.sample, agree) && permitted(new, &w.sample, true)
    });
    let found = program.find(differs(&after, &before), &space, universe);
    let denied = checked(found, |w| {
        let agree = !w.providers.is_empty();
        permitted(old, &w.sample, true) && !permitted(new, &w.sample, agree)
    });
    Change { allowed, denied }
}

/// All differences of a change, one request per rule that makes one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Differences {
    /// Requests that pass now and did not before, the smallest first.
    pub allowed: Vec<Witness>,
    /// Requests that passed before and do not now.
    pub denied: Vec<Witness>,
    /// What could not be decided.
    pub undecided: Vec<String>,
    /// Whether there are more than were asked for.
    pub more: bool,
}

/// As [`compare`], and then again without the requests of the rules that made the difference, until nothing or `limit` is
/// reached in each direction.
pub fn differences(old: Policies<'_>, new: Policies<'_>, universe: &Universe, limit: usize) -> Differences {
    let mut program = Program::new(universe);
    let before = program.permits(old);
    let after = program.permits(new);
    let mut out = Differences::default();
    if before == after {
        return out;
    }
    let possible = program.possible(universe);
    let space = program.space(universe);
    for now_allowed in [true, false] {
        let (from, to) = if now_allowed {
            (&before, &after)
        } else {
            (&after, &before)
        };
        let mut wanted = Formula::and([from.clone().not(), to.clone(), possible.clone()]);
        loop {
            let found = checked(program.find(wanted.clone(), &space, universe), |w| {
                let agree = !w.providers.is_empty();
                let passes = |p, now: bool| permitted(p, &w.sample, now || agree);
                passes(new, now_allowed) == now_allowed && passes(old, !now_allowed) != now_allowed
            });
            let witness = match found {
                Finding::Never => break,
                Finding::Unknown(why) => {
                    out.undecided.push(why);
                    break;
                }
                Finding::Request(witness) => *witness,
            };
            let list = if now_allowed { &mut out.allowed } else { &mut out.denied };
            if list.len() >= limit {
                out.more = true;
                break;
            }
            // What admits it now, or kept it out before; what keeps it out now, or admitted it before.
            let (first, second) = if now_allowed {
                (Action::Allow, Action::Deny)
            } else {
                (Action::Deny, Action::Allow)
            };
            let mut rules = matching(new, first, &witness.sample);
            if rules.is_empty() {
                rules = matching(old, second, &witness.sample);
            }
            list.push(witness);
            if rules.is_empty() {
                break;
            }
            let rules: Vec<Formula> = rules
                .into_iter()
                .map(|rule| program.rule(rule, if now_allowed { first } else { second }))
                .collect();
            wanted = Formula::and([wanted, Formula::or(rules).not()]);
        }
    }
    out
}

/// Enforced rules of an action that match a request.
fn matching<'a>(policies: Policies<'a>, action: Action, sample: &Sample) -> Vec<&'a Rule> {
    fn holds(expr: &Expr, sample: &Sample) -> bool {
        match expr {
            Expr::And(parts) => parts.iter().all(|p| holds(p, sample)),
            Expr::Or(parts) => parts.iter().any(|p| holds(p, sample)),
            Expr::Not(inner) => !holds(inner, sample),
            Expr::Atom(atom) => Test::new(atom).is_ok_and(|t| t.holds(&sample.connection(), sample.view())),
        }
    }
    policies
        .filters
        .iter()
        .filter(|f| f.enforced && f.action == action)
        .flat_map(|f| &f.rules)
        .filter(|r| holds(&canonical(&r.expr), sample))
        .collect()
}

/// A witness that the engine does not confirm is none.
fn checked(found: Finding, confirms: impl Fn(&Witness) -> bool) -> Finding {
    match found {
        Finding::Request(witness) if !confirms(&witness) => Finding::Unknown(
            "the policies look at values in a way that is not analysed (expressions, overlapping claims)".into(),
        ),
        other => other,
    }
}

/// Identities that a chain treats alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Those of the asked identities that belong here.
    pub known: Vec<String>,
    /// Other identities that belong here, in words; empty if there are none.
    pub others: Vec<String>,
    /// One identity of the row; `None` is plaintext.
    pub example: Option<String>,
    /// Whether some request of theirs passes.
    pub allowed: Finding,
    /// Whether some request of theirs is stopped.
    pub denied: Finding,
    /// Rules that let requests pass: id and what remains to be fulfilled.
    pub allows: Vec<(String, String)>,
    /// Rules that stop requests: id and the condition; CUSTOM rules name the provider in the id.
    pub denies: Vec<(String, String)>,
    /// Whether an ALLOW policy is bound: without one everything passes that `denies` does not stop.
    pub default_deny: bool,
}

impl Row {
    /// Nothing passes.
    pub fn is_never(&self) -> bool {
        self.allowed == Finding::Never
    }

    /// Everything passes.
    pub fn is_always(&self) -> bool {
        self.denied == Finding::Never
    }
}

/// Which identities may do what: one row per class of identities that the policies treat alike, the asked ones sorted into
/// them. Exact for all identities of the universe; false if some class may be missing.
pub fn who_can(policies: Policies<'_>, universe: &Universe, asked: &[String]) -> (Vec<Row>, bool) {
    let mut program = Program::new(universe);
    let permits = program.permits(policies);
    let space = program.space(universe);
    let peers = space.dimensions.iter().find(|d| d.axis == Axis::Peer);
    let (cells, exact): (Vec<Cell>, bool) = match peers {
        Some(dimension) => (dimension.cells.clone(), dimension.exact),
        // No rule looks at identities: all are alike.
        None => {
            let point = universe
                .peer
                .example(&universe.usual)
                .map_or(Point::Absent, Point::Text);
            let cell = Cell {
                holds: Vec::new(),
                point,
                cost: 0,
            };
            (vec![cell], true)
        }
    };
    let vars: &[u32] = peers.map_or(&[], |d| &d.vars);
    let atoms: Vec<&Atom> = vars
        .iter()
        .filter_map(|v| program.vars.iter().find(|(_, var)| *var == v).map(|(a, _)| a))
        .collect();
    let index: HashMap<u32, usize> = vars.iter().enumerate().map(|(i, v)| (*v, i)).collect();

    // Classes by what remains of the formula.
    let mut classes: Vec<(Formula, Vec<&Cell>)> = Vec::new();
    let mut by_rest: HashMap<Formula, usize> = HashMap::new();
    for cell in &cells {
        let rest = permits.assign(&|var| index.get(&var).and_then(|i| cell.holds.get(*i).copied()));
        let at = *by_rest.entry(rest.clone()).or_insert_with(|| {
            classes.push((rest, Vec::new()));
            classes.len() - 1
        });
        classes[at].1.push(cell);
    }
    let sorted: Vec<(String, Vec<bool>)> = asked
        .iter()
        .map(|uri| {
            let sample = Sample {
                peer: vec![uri.clone()],
                ..universe.base.clone()
            };
            (uri.clone(), results(&atoms, &sample))
        })
        .collect();

    let mut rows = Vec::new();
    for (_, members) in &classes {
        let Some(first) = members.first() else { continue };
        let known: Vec<String> = sorted
            .iter()
            .filter(|(_, holds)| members.iter().any(|c| c.holds == *holds))
            .map(|(uri, _)| uri.clone())
            .collect();
        let example = known.first().cloned().or(match &first.point {
            Point::Text(uri) => Some(uri.clone()),
            _ => None,
        });
        let mut own = universe.clone();
        own.peer = match &example {
            Some(uri) => Peer::Is(uri.clone()),
            None => Peer::None,
        };
        let others = match universe.peer {
            Peer::Any(_) => members.iter().filter_map(|c| describe(c, &atoms, &known)).collect(),
            _ => Vec::new(),
        };
        let (allows, mut denies, default_deny) = remains(policies, &own, example.as_deref());
        if denies.len() <= MAX_RELEVANT {
            denies.retain(|(id, _)| takes_away(policies, id, &own));
        }
        rows.push(Row {
            known,
            others,
            allowed: find_allowed(policies, &own),
            denied: find_denied(policies, &own),
            example,
            allows,
            denies,
            default_deny,
        });
    }
    (rows, exact)
}

/// Whether a DENY or CUSTOM rule concerns a request that the ALLOW policies let pass.
fn takes_away(policies: Policies<'_>, id: &str, universe: &Universe) -> bool {
    let mut program = Program::new(universe);
    let allow: Vec<Formula> = policies
        .filters
        .iter()
        .filter(|f| f.enforced && f.action == Action::Allow)
        .map(|f| program.any(&f.rules, Action::Allow))
        .collect();
    let denying = policies
        .filters
        .iter()
        .filter(|f| f.enforced && f.action == Action::Deny);
    let rules: Vec<Formula> = policies
        .custom
        .iter()
        .flat_map(|s| &s.rules)
        .chain(denying.flat_map(|f| &f.rules))
        .filter(|r| r.id == id)
        .map(|r| program.rule(r, Action::Deny))
        .collect();
    let wanted = Formula::and([Formula::and(allow), Formula::or(rules)]);
    let wanted = Formula::and([wanted, program.possible(universe)]);
    let space = program.space(universe);
    program.find(wanted, &space, universe) != Finding::Never
}

fn results(atoms: &[&Atom], sample: &Sample) -> Vec<bool> {
    atoms
        .iter()
        .map(|a| Test::new(a).is_ok_and(|t| t.holds(&sample.connection(), sample.view())))
        .collect()
}

/// The identities of a cell in words; `None` if the only one is known already.
fn describe(cell: &Cell, atoms: &[&Atom], known: &[String]) -> Option<String> {
    let positive: Vec<&&Atom> = atoms
        .iter()
        .zip(&cell.holds)
        .filter(|(_, holds)| **holds)
        .map(|(a, _)| a)
        .collect();
    let exactly = positive
        .iter()
        .any(|a| a.attribute == Attribute::PeerUri && matches!(a.matcher, Matcher::Exact(_)));
    if exactly {
        let Point::Text(uri) = &cell.point else { return None };
        return (!known.contains(uri)).then(|| uri.strip_prefix("spiffe://").unwrap_or(uri).to_string());
    }
    if positive.is_empty() {
        return Some("any other identity".into());
    }
    let conditions: Vec<String> = positive
        .iter()
        .map(|a| format!("{} {}", words::field(&a.attribute), words::value(a)))
        .collect();
    Some(format!("any other with {}", conditions.join(" and ")))
}

type Conditions = Vec<(String, String)>;

/// What remains of the rules for one identity and all that is fixed.
fn remains(policies: Policies<'_>, universe: &Universe, peer: Option<&str>) -> (Conditions, Conditions, bool) {
    let mut sample = universe.base.clone();
    sample.peer = peer.into_iter().map(String::from).collect();
    let fixed = universe.fixed;
    let http = sample.http.is_some();
    let no_claims = universe.issuers.is_none() || sample.http.as_ref().is_some_and(|h| h.claims.is_some());
    let known = |atom: &Atom| -> Option<bool> {
        let decided = match space::axis(&atom.attribute) {
            None => return Some(false),
            Some(_) if atom.attribute.is_http() && !http => return Some(false),
            Some(Axis::Peer) => true,
            Some(Axis::Source) => fixed.source,
            Some(Axis::Remote) => fixed.remote,
            Some(Axis::Address) => fixed.address,
            Some(Axis::Port) => fixed.port,
            Some(Axis::Sni) => fixed.sni,
            Some(Axis::Host) => fixed.host,
            Some(Axis::Method) => fixed.method,
            Some(Axis::Path) => fixed.path,
            Some(Axis::Claim(_)) => no_claims,
            Some(Axis::Header(name)) => sample
                .http
                .as_ref()
                .is_some_and(|h| h.headers.iter().any(|(n, _)| *n == name)),
            Some(Axis::Opaque(_)) => false,
        };
        decided.then(|| Test::new(atom).is_ok_and(|t| t.holds(&sample.connection(), sample.view())))
    };
    let condition = |rule: &Rule, action: Action| -> Option<String> {
        let expr = canonical(&rule.expr);
        let rest = if broken(&expr) {
            if action == Action::Allow {
                Expr::never()
            } else {
                Expr::always()
            }
        } else {
            canonical(&partial(&expr, &known))
        };
        (rest != Expr::never()).then(|| words::condition(&rest))
    };
    let mut allows = Vec::new();
    let mut denies = Vec::new();
    let mut default_deny = false;
    for stage in policies.custom {
        for rule in &stage.rules {
            if let Some(text) = condition(rule, Action::Deny) {
                denies.push((rule.id.clone(), text));
            }
        }
    }
    for filter in policies.filters.iter().filter(|f| f.enforced) {
        default_deny |= filter.action == Action::Allow;
        for rule in &filter.rules {
            let Some(text) = condition(rule, filter.action) else {
                continue;
            };
            match filter.action {
                Action::Allow => allows.push((rule.id.clone(), text)),
                Action::Deny => denies.push((rule.id.clone(), text)),
                Action::Log => {}
            }
        }
    }
    (allows, denies, default_deny)
}

fn partial(expr: &Expr, known: &dyn Fn(&Atom) -> Option<bool>) -> Expr {
    match expr {
        Expr::And(parts) => Expr::And(parts.iter().map(|p| partial(p, known)).collect()),
        Expr::Or(parts) => Expr::Or(parts.iter().map(|p| partial(p, known)).collect()),
        Expr::Not(inner) => partial(inner, known).not(),
        Expr::Atom(atom) => match known(atom) {
            Some(true) => Expr::always(),
            Some(false) => Expr::never(),
            None => expr.clone(),
        },
    }
}

#[cfg(test)]
mod tests;
