//! Compares what five sides say to one question, and counts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mantlet_differential::generate::{IDENTITIES, Plan, STRICT_IDENTITIES};
use mantlet_differential::naive::{Answer, Outcome, Reading, ask, headers, remote};
use mantlet_differential::world::{Connection, Request};
use mantlet_differential::{normalize, tokens};
use mantlet_model::authz::{Action, AuthzFilter, Connection as Facts, Decision, Engine, Expr, HttpView, Verdict};

use super::arena::{Answers, Counts, Did, Said, Translated};
use super::client::Reply;

/// A request as the engine sees it.
pub(crate) struct View<'a> {
    request: &'a Request,
    headers: Vec<(String, Vec<u8>)>,
    claims: Option<serde_json::Value>,
    path: String,
}

impl HttpView for View<'_> {
    fn method(&self) -> &str {
        &self.request.method
    }
    fn authority(&self) -> &str {
        &self.request.host
    }
    fn path(&self) -> &str {
        &self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let named = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.into_iter().any(|(_, value)| f(value.trim_ascii()))
    }
    fn claims(&self) -> Option<&serde_json::Value> {
        self.claims.as_ref()
    }
}

/// One question of a plan.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question<'a> {
    pub(crate) connection: &'a Connection,
    pub(crate) request: Option<&'a Request>,
}

impl<'a> Question<'a> {
    /// All questions of a plan, HTTP first.
    pub(crate) fn all(plan: &'a Plan) -> impl Iterator<Item = Question<'a>> {
        let http = plan.http.iter().flat_map(|(connection, requests)| {
            requests.iter().map(move |request| Question {
                connection,
                request: Some(request),
            })
        });
        let tcp = plan.tcp.iter().map(|connection| Question {
            connection,
            request: None,
        });
        http.chain(tcp)
    }
}

/// All questions of a plan, HTTP first, with what Envoy did (`None`: neither let through nor denied).
fn questions<'a>(plan: &'a Plan, answers: &Answers) -> Vec<(Question<'a>, Option<bool>)> {
    let mut out = Vec::new();
    for ((connection, requests), said) in plan.http.iter().zip(&answers.http) {
        for (request, [envoy, _]) in requests.iter().zip(said) {
            let verdict = match envoy.reply {
                Reply::Http { status: 200, .. } => Some(true),
                Reply::Http {
                    status: 403, ref body, ..
                } if body.starts_with("RBAC") => Some(false),
                _ => None,
            };
            let request = Some(request);
            out.push((Question { connection, request }, verdict));
        }
    }
    for (connection, [envoy, _]) in plan.tcp.iter().zip(&answers.tcp) {
        let request = None;
        out.push((Question { connection, request }, Some(envoy.passed)));
    }
    out
}

/// What the run found.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) cases: usize,
    pub(crate) allowed: usize,
    pub(crate) tcp: usize,
    pub(crate) refused: usize,
    /// Hits and misses of each kind of value.
    pub(crate) kinds: Counts,
    /// Uses of each deviation.
    pub(crate) deviations: BTreeMap<&'static str, usize>,
    pub(crate) differences: Vec<String>,
    /// Kinds whose inverted test in the naive reading changes an answer of Envoy's.
    pub(crate) found_naive: BTreeSet<String>,
    /// Atoms of the model that occur, and those whose inversion is found.
    pub(crate) atoms: BTreeSet<String>,
    pub(crate) found_atoms: BTreeSet<String>,
}

impl Tally {
    /// Takes one world in.
    pub(crate) fn add(&mut self, plan: &Plan, translated: &Translated, answers: &Answers) {
        let engines = [
            Engine::new(&translated.http),
            Engine::new(&translated.http_decoded),
            Engine::new(&translated.tcp),
            Engine::new(&translated.tcp_decoded),
        ];
        for ((connection, requests), said) in plan.http.iter().zip(&answers.http) {
            for (request, [envoy, proxy]) in requests.iter().zip(said) {
                let question = Question {
                    connection,
                    request: Some(request),
                };
                let (mantlet, mut wrong, deviation) = self.expect(plan, question, &engines[..2]);
                compare_http("Envoy", &mantlet, envoy, &mut wrong);
                match self.proxy_deviation(plan, question) {
                    None => {
                        compare_http("proxy", &mantlet, proxy, &mut wrong);
                        same_heads(envoy, proxy, &mut wrong);
                    }
                    Some("encoded-nul" | "path-unusual-characters") => expect_status(proxy, &[400], &mut wrong),
                    Some("jwt-good-and-bad") => expect_status(proxy, &[401, 403], &mut wrong),
                    Some(_) if proxy.reply == Reply::Closed => {}
                    Some(id) => wrong.push(format!("proxy: {proxy:?}, but {id} refuses the handshake")),
                }
                self.case(plan, question, &mantlet, wrong, deviation);
            }
        }
        for (connection, [envoy, proxy]) in plan.tcp.iter().zip(&answers.tcp) {
            let question = Question {
                connection,
                request: None,
            };
            let (mantlet, mut wrong, deviation) = self.expect(plan, question, &engines[2..]);
            compare_tcp("Envoy", &mantlet, envoy, &mut wrong);
            match self.proxy_deviation(plan, question) {
                None => compare_tcp("proxy", &mantlet, proxy, &mut wrong),
                Some(_) if !proxy.passed => {}
                Some(id) => wrong.push(format!("proxy: {proxy:?}, but {id} refuses the handshake")),
            }
            self.tcp += 1;
            self.case(plan, question, &mantlet, wrong, deviation);
        }
        self.seeded_bugs(plan, translated, answers);
    }

    /// The naive readings, checked against each other and against both engines.
    fn expect(&mut self, plan: &Plan, question: Question<'_>, engines: &[Engine]) -> (Answer, Vec<String>, bool) {
        let kinds = &mut self.kinds;
        let mut count = |kind: &str, hit: bool| {
            let entry = kinds.entry(kind.to_string()).or_default();
            entry[usize::from(!hit)] += 1;
        };
        let Question { connection, request } = question;
        let mut ignore = |_: &str, _: bool| {};
        let mantlet = ask(&plan.world, connection, request, Reading::Mantlet, None, &mut count);
        let istio = ask(&plan.world, connection, request, Reading::Istio, None, &mut ignore);
        let mut wrong = Vec::new();
        let deviates = istio.outcome != mantlet.outcome;
        if deviates {
            *self.deviations.entry("authz-unknown-key").or_default() += 1;
            if mantlet.outcome == Outcome::Allowed {
                wrong.push(format!("a deviation allows what Istio denies: {istio:?}"));
            }
        }
        if matches!(mantlet.outcome, Outcome::Allowed | Outcome::Denied) {
            for (name, engine) in ["decide", "decide after encode and decode"].into_iter().zip(engines) {
                with_decision(plan, question, engine, |decision| {
                    compare_decision(name, &mantlet, &decision, &mut wrong)
                });
            }
        }
        (mantlet, wrong, deviates)
    }

    /// The listed deviation that the proxy's wire side follows here, if any.
    fn proxy_deviation(&mut self, plan: &Plan, question: Question<'_>) -> Option<&'static str> {
        let strict = &IDENTITIES[..STRICT_IDENTITIES];
        let id = match &question.connection.peer {
            Some(uris) if uris.len() > 1 => "peer-several-uris",
            Some(uris) if !strict.iter().any(|s| s == uris) => "peer-spiffe-form",
            _ => {
                let target = &question.request?.target;
                let path = target.split(|b| matches!(b, b'#' | b'?')).next()?;
                let nul = path.windows(3).any(|w| w == b"%00");
                let unusual = path.iter().any(|b| b"<>`".contains(b));
                normalize::target(target, plan.world.normalization)?;
                match (nul, unusual) {
                    (_, true) => "path-unusual-characters",
                    (true, false) => "encoded-nul",
                    (false, false) if tokens::bad_beside_good(&plan.world, question.request?) => "jwt-good-and-bad",
                    (false, false) => return None,
                }
            }
        };
        *self.deviations.entry(id).or_default() += 1;
        Some(id)
    }

    fn case(&mut self, plan: &Plan, question: Question<'_>, mantlet: &Answer, wrong: Vec<String>, _: bool) {
        self.cases += 1;
        match mantlet.outcome {
            Outcome::Allowed => self.allowed += 1,
            Outcome::BadRequest | Outcome::Refused(_) => self.refused += 1,
            Outcome::Denied => {}
        }
        if !wrong.is_empty() {
            let request = question.request.map(|r| {
                let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                let headers: Vec<_> = r.headers.iter().map(|(n, v)| format!("{n}: {}", text(v))).collect();
                format!(
                    "{} {} host {} {headers:?} tokens {:?}",
                    r.method,
                    text(&r.target),
                    r.host,
                    r.tokens
                )
            });
            let world = &plan.world;
            let objects: Vec<String> = world.objects.iter().map(|o| o.to_string()).collect();
            self.differences.push(format!(
                "{}\n  expected {mantlet:?}\n  {:?}\n  {request:?}\n  namespace {} trust domain {} aliases {:?} normalization {:?}\n  {}",
                wrong.join("\n  "),
                question.connection,
                world.namespace,
                world.trust_domain,
                world.aliases,
                world.normalization,
                objects.join("\n  "),
            ));
        }
    }

    /// Inverts one kind of test after the other, in the naive reading and in the model, and looks whether Envoy's answers
    /// show it.
    fn seeded_bugs(&mut self, plan: &Plan, translated: &Translated, answers: &Answers) {
        let questions = questions(plan, answers);
        for (question, envoy) in &questions {
            let Some(envoy) = *envoy else { continue };
            let mut kinds = BTreeSet::new();
            let mut note = |kind: &str, _: bool| {
                kinds.insert(kind.to_string());
            };
            let Question { connection, request } = *question;
            ask(&plan.world, connection, request, Reading::Mantlet, None, &mut note);
            for kind in kinds {
                if self.found_naive.contains(&kind) {
                    continue;
                }
                let flip = Some(kind.as_str());
                let answer = ask(&plan.world, connection, request, Reading::Mantlet, flip, &mut |_, _| {});
                if (answer.outcome == Outcome::Allowed) != envoy {
                    self.found_naive.insert(kind);
                }
            }
        }
        for (filters, http) in [(&translated.http, true), (&translated.tcp, false)] {
            let mut here = BTreeSet::new();
            let rules = filters.iter().flat_map(|f| f.rules.iter().chain(&f.shadow));
            rules.for_each(|rule| atoms_of(&rule.expr, &mut here));
            self.atoms.extend(here.iter().cloned());
            for atom in here {
                if self.found_atoms.contains(&atom) {
                    continue;
                }
                let mutant = Engine::new(&inverted(filters, &atom));
                let found = questions.iter().any(|(question, envoy)| {
                    let Some(envoy) = *envoy else { return false };
                    let mut differs = false;
                    if question.request.is_some() == http {
                        with_decision(plan, *question, &mutant, |d| {
                            differs = (d.verdict == Verdict::Allowed) != envoy
                        });
                    }
                    differs
                });
                if found {
                    self.found_atoms.insert(atom);
                }
            }
        }
    }
}

/// What the engine is told of a connection.
pub(crate) struct OwnedFacts<'a> {
    connection: &'a Connection,
    remote: IpAddr,
    sni: Option<String>,
}

impl OwnedFacts<'_> {
    pub(crate) fn borrow(&self) -> Facts<'_> {
        Facts {
            peer_uris: self.connection.peer.as_deref().unwrap_or_default(),
            source: self.connection.source,
            remote: self.remote,
            destination: self.connection.destination,
            sni: self.sni.as_deref(),
        }
    }
}

pub(crate) fn facts(question: Question<'_>) -> OwnedFacts<'_> {
    let Question { connection, request } = question;
    OwnedFacts {
        connection,
        remote: remote(connection, request),
        sni: connection.sni.as_ref().map(|s| s.to_ascii_lowercase()),
    }
}

/// The request as the engine sees it, `Some(None)` on TCP; `None` for requests that no policy gets to see.
pub(crate) fn view_of<'a>(plan: &Plan, question: Question<'a>) -> Option<Option<View<'a>>> {
    let Some(request) = question.request else {
        return Some(None);
    };
    let (path, _) = normalize::target(&request.target, plan.world.normalization)?;
    let verified = tokens::verify(&plan.world, request).ok()?;
    Some(Some(View {
        request,
        headers: headers(request, &verified),
        claims: verified.claims,
        path: String::from_utf8_lossy(&path).into_owned(),
    }))
}

/// Asks an engine; requests that no policy gets to see are not asked.
fn with_decision(plan: &Plan, question: Question<'_>, engine: &Engine, f: impl FnOnce(Decision<'_>)) {
    if let Some(view) = view_of(plan, question) {
        let facts = facts(question);
        f(engine.decide(&facts.borrow(), view.as_ref().map(|v| v as &dyn HttpView)));
    }
}

fn compare_decision(name: &str, expected: &Answer, decision: &Decision<'_>, wrong: &mut Vec<String>) {
    let allowed = decision.verdict == Verdict::Allowed;
    let shadow = |s: &Option<mantlet_model::authz::Shadow<'_>>| {
        s.map(|s| (s.verdict == Verdict::Denied, s.rule.map(str::to_string)))
    };
    let same = allowed == (expected.outcome == Outcome::Allowed)
        && (allowed || decision.rule == expected.denied_by.as_deref())
        && decision.audited == (expected.audited == Some(true))
        && shadow(&decision.shadow_deny) == expected.shadow_deny
        && shadow(&decision.shadow_allow) == expected.shadow_allow;
    if !same {
        wrong.push(format!("{name}: {decision:?}"));
    }
}

/// `details` of a denial; Envoy numbers further policies of one rule.
fn denial(expected: &Answer) -> String {
    format!(
        "rbac_access_denied_matched_policy[{}]",
        expected.denied_by.as_deref().unwrap_or("none")
    )
}

/// Removes the number of a rule's part: `id#1` is the second part of `id`.
fn whole_rule(text: &str) -> String {
    match text.split_once('#') {
        Some((id, rest)) => format!("{id}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => text.to_string(),
    }
}

fn expect_status(said: &Said, expected: &[u16], wrong: &mut Vec<String>) {
    if !matches!(said.reply, Reply::Http { status, .. } if expected.contains(&status)) {
        wrong.push(format!("proxy: {said:?} instead of {expected:?}"));
    }
}

fn compare_http(side: &str, expected: &Answer, said: &Said, wrong: &mut Vec<String>) {
    let status = match expected.outcome {
        Outcome::Allowed => 200,
        Outcome::Denied => 403,
        Outcome::BadRequest => 400,
        Outcome::Refused(status) => status,
    };
    let Reply::Http { status: got, .. } = &said.reply else {
        wrong.push(format!("{side}: {said:?}"));
        return;
    };
    // Which of two refusals is reported is Envoy's to say; the proxy must say the same ([`same_heads`]).
    let refused = matches!(expected.outcome, Outcome::Refused(_)) && matches!(got, 401 | 403);
    if *got != status && !refused {
        wrong.push(format!("{side}: {said:?}"));
        return;
    }
    let field = |index: usize| said.log.get(index).map_or("", String::as_str);
    match expected.outcome {
        Outcome::Denied if whole_rule(field(0)) != denial(expected) => {
            wrong.push(format!(
                "{side}: details {:?} instead of {}",
                said.log,
                denial(expected)
            ));
        }
        Outcome::BadRequest | Outcome::Refused(_) => return,
        _ => {}
    }
    if side != "Envoy" {
        return;
    }
    let text = |b: Option<bool>| b.map_or("-", |b| if b { "true" } else { "false" }).to_string();
    let result = |s: &Option<(bool, Option<String>)>| match s {
        None => ["-".to_string(), "-".to_string()],
        Some((denied, rule)) => [
            if *denied { "denied" } else { "allowed" }.to_string(),
            rule.clone().unwrap_or("-".into()),
        ],
    };
    let mut want = vec![text(expected.audited)];
    want.extend(result(&expected.shadow_deny));
    want.extend(result(&expected.shadow_allow));
    let got: Vec<String> = said.log.iter().skip(1).map(|f| whole_rule(f)).collect();
    // A trial policy without rules that survive is seen only where nothing is enforced.
    if expected.shadow_allow.is_none() && got.get(3..) == Some(&["denied".to_string(), "-".to_string()]) {
        want.truncate(3);
        want.extend(["denied".to_string(), "-".to_string()]);
    }
    if got != want {
        wrong.push(format!("{side}: audit and dry run {got:?} instead of {want:?}"));
    }
}

fn same_heads(envoy: &Said, proxy: &Said, wrong: &mut Vec<String>) {
    if let (
        Reply::Http {
            status: 200 | 401 | 403,
            ..
        },
        false,
    ) = (&envoy.reply, envoy.reply == proxy.reply)
    {
        wrong.push(format!("Envoy says {:?}, the proxy {:?}", envoy.reply, proxy.reply));
    }
}

fn compare_tcp(side: &str, expected: &Answer, did: &Did, wrong: &mut Vec<String>) {
    let allowed = expected.outcome == Outcome::Allowed;
    if did.passed != allowed || (!allowed && whole_rule(&did.details) != denial(expected)) {
        wrong.push(format!("{side}: {did:?}"));
    }
}

/// Attribute and matcher of an atom, without their values.
fn atom_name(atom: &mantlet_model::authz::Atom) -> String {
    let head = |text: String| text.split(['(', ' ']).next().unwrap_or_default().to_string();
    format!(
        "{} {}",
        head(format!("{:?}", atom.attribute)),
        head(format!("{:?}", atom.matcher))
    )
}

fn atoms_of(expr: &Expr, out: &mut BTreeSet<String>) {
    match expr {
        Expr::And(children) | Expr::Or(children) => children.iter().for_each(|c| atoms_of(c, out)),
        Expr::Not(inner) => atoms_of(inner, out),
        Expr::Atom(atom) => {
            out.insert(atom_name(atom));
        }
    }
}

/// The filters with every atom of this name negated.
fn inverted(filters: &[AuthzFilter], name: &str) -> Vec<AuthzFilter> {
    fn walk(expr: &Expr, name: &str) -> Expr {
        match expr {
            Expr::And(children) => Expr::And(children.iter().map(|c| walk(c, name)).collect()),
            Expr::Or(children) => Expr::Or(children.iter().map(|c| walk(c, name)).collect()),
            Expr::Not(inner) => walk(inner, name).not(),
            Expr::Atom(atom) if atom_name(atom) == name => expr.clone().not(),
            Expr::Atom(_) => expr.clone(),
        }
    }
    let mut out = filters.to_vec();
    for filter in out.iter_mut().filter(|f| f.action != Action::Log) {
        for rule in &mut filter.rules {
            rule.expr = walk(&rule.expr, name);
        }
    }
    out
}
