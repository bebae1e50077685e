//! Laws of authorization, on generated worlds, without a network.

use mantlet_differential::generate::{another_policy, plan};
use mantlet_differential::world::World;
use mantlet_model::authz::{Action, AuthzFilter, Engine, Verdict, explain};

use super::arena::{addresses, translate};
use super::judge::{Question, facts, view_of};
use super::{SIZE, tokens};

/// Worlds per law.
const WORLDS: usize = 150;

/// Adds a policy to each world and calls `check` with the verdicts of each question before and after, where the chain was as
/// `applies` wants it. Returns how many were asked and how many changed.
fn with_one_more(
    action: &str,
    applies: impl Fn(&[AuthzFilter]) -> bool,
    check: impl Fn(bool, bool) -> bool,
) -> [usize; 2] {
    let keys = tokens::Mint::new().key_sets();
    let (mut asked, mut changed) = (0, 0);
    for index in 0..WORLDS {
        let (http, tcp) = addresses(index);
        let plan = plan(7_000 + index as u64, http, tcp, SIZE, &keys);
        let mut more = plan.world.clone();
        more.objects
            .push(another_policy(99 + index as u64, &plan.world, http.ip(), action));
        let filters = |world: &World| {
            let all = translate(world);
            [all.http, all.tcp]
        };
        let (before, after) = (filters(&plan.world), filters(&more));
        let engines = |f: &[Vec<AuthzFilter>; 2]| [Engine::new(&f[0]), Engine::new(&f[1])];
        let (old, new) = (engines(&before), engines(&after));
        for question in Question::all(&plan) {
            let side = usize::from(question.request.is_none());
            if !applies(&before[side]) {
                continue;
            }
            let Some(view) = view_of(&plan, question) else {
                continue;
            };
            let facts = facts(question);
            let allows = |engine: &Engine| {
                engine.decide(&facts.borrow(), view.as_ref().map(|v| v as _)).verdict == Verdict::Allowed
            };
            let (was, is) = (allows(&old[side]), allows(&new[side]));
            assert!(
                check(was, is),
                "world {index}: {question:?}: {was} became {is}\n{:#?}",
                after[side]
            );
            asked += 1;
            changed += usize::from(was != is);
        }
    }
    println!("{asked} questions, {changed} answers changed");
    [asked, changed]
}

#[test]
fn one_more_deny_never_allows_more() {
    let [_, changed] = with_one_more("DENY", |_| true, |was, is| was || !is);
    assert!(changed > 0, "the policies that were added matter");
}

/// Where an ALLOW policy is in force; the first one denies everything that it does not name.
#[test]
fn one_more_allow_beside_others_never_denies_more() {
    let guarded = |filters: &[AuthzFilter]| filters.iter().any(|f| f.action == Action::Allow && f.enforced);
    let [asked, changed] = with_one_more("ALLOW", guarded, |was, is| !was || is);
    assert!(asked > 1000 && changed > 0, "the policies that were added matter");
}

#[test]
fn explain_agrees_with_decide() {
    let keys = tokens::Mint::new().key_sets();
    let (mut asked, mut denied) = (0, 0);
    for index in 0..WORLDS {
        let (http, tcp) = addresses(index);
        let plan = plan(9_000 + index as u64, http, tcp, SIZE, &keys);
        let world = translate(&plan.world);
        for question in Question::all(&plan) {
            let filters = if question.request.is_some() {
                &world.http
            } else {
                &world.tcp
            };
            let Some(view) = view_of(&plan, question) else {
                continue;
            };
            let facts = facts(question);
            let view = view.as_ref().map(|v| v as _);
            let engine = Engine::new(filters);
            let decision = engine.decide(&facts.borrow(), view);
            let explanation = explain(filters, &facts.borrow(), view);
            let allowed = decision.verdict == Verdict::Allowed;
            assert_eq!(explanation.allowed, allowed, "{question:?}");
            assert_eq!(explanation.details, decision.details(), "{question:?}");
            asked += 1;
            denied += usize::from(!allowed);
        }
    }
    println!("{asked} questions, {denied} denied");
    assert!(
        denied > 0 && denied < asked,
        "{denied} of {asked} denied: too one-sided"
    );
}
