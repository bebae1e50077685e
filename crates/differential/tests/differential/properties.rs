//! Laws of authorization, on generated worlds, without a network.

use mantlet_differential::generate::{another_policy, plan};
use mantlet_differential::world::World;
use mantlet_model::authz::{AuthzFilter, Engine, Verdict, explain};

use super::arena::{addresses, translate};
use super::judge::{Question, facts, view_of};
use super::{SIZE, tokens};

/// Worlds per law.
const WORLDS: usize = 150;

/// Calls `check` with a world, its plan's questions and the verdicts before and after `change`.
fn before_and_after(change: impl Fn(usize, &World) -> Option<World>, check: impl Fn(bool, bool) -> bool) -> [usize; 2] {
    let keys = tokens::Mint::new().key_sets();
    let (mut asked, mut changed) = (0, 0);
    for index in 0..WORLDS {
        let (http, tcp) = addresses(index);
        let plan = plan(7_000 + index as u64, http, tcp, SIZE, &keys);
        let Some(after) = change(index, &plan.world) else {
            continue;
        };
        let filters = |world: &World| {
            let all = translate(world);
            [all.http, all.tcp]
        };
        let (before, after) = (filters(&plan.world), filters(&after));
        let engines = |f: &[Vec<AuthzFilter>; 2]| [Engine::new(&f[0]), Engine::new(&f[1])];
        let (old, new) = (engines(&before), engines(&after));
        for question in Question::all(&plan) {
            let side = usize::from(question.request.is_none());
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
    [asked, changed]
}

fn with(world: &World, index: usize, action: &str) -> World {
    let mut out = world.clone();
    let policy = another_policy(99 + index as u64, world, addresses(index).0.ip(), action);
    out.objects.push(policy);
    out
}

#[test]
fn one_more_deny_never_allows_more() {
    let [asked, changed] = before_and_after(|i, w| Some(with(w, i, "DENY")), |was, is| was || !is);
    println!("{asked} questions, {changed} answers changed");
    assert!(changed > 0, "the policies that were added matter");
}

#[test]
fn one_more_allow_beside_others_never_denies_more() {
    let change = |index: usize, world: &World| Some(with(&with(world, index + 1000, "ALLOW"), index, "ALLOW"));
    // The first of the two only makes sure that there is one.
    let first = |index: usize, world: &World| with(world, index + 1000, "ALLOW");
    let keys = tokens::Mint::new().key_sets();
    let (mut asked, mut changed) = (0, 0);
    for index in 0..WORLDS {
        let (http, tcp) = addresses(index);
        let plan = plan(8_000 + index as u64, http, tcp, SIZE, &keys);
        let (before, after) = (
            translate(&first(index, &plan.world)),
            translate(&change(index, &plan.world).unwrap()),
        );
        let old = [Engine::new(&before.http), Engine::new(&before.tcp)];
        let new = [Engine::new(&after.http), Engine::new(&after.tcp)];
        for question in Question::all(&plan) {
            let side = usize::from(question.request.is_none());
            let Some(view) = view_of(&plan, question) else {
                continue;
            };
            let facts = facts(question);
            let allows = |engine: &Engine| {
                engine.decide(&facts.borrow(), view.as_ref().map(|v| v as _)).verdict == Verdict::Allowed
            };
            let (was, is) = (allows(&old[side]), allows(&new[side]));
            assert!(!was || is, "world {index}: {question:?} was allowed");
            asked += 1;
            changed += usize::from(was != is);
        }
    }
    println!("{asked} questions, {changed} answers changed");
    assert!(changed > 0, "the policies that were added matter");
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
