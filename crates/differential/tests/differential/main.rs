//! The same questions to five sides: a naive reading of Istio's objects, the engine on the translated model, the engine
//! after the wire, a real Envoy, and Mantlet's proxy.
//!
//! `MANTLET_DIFFERENTIAL_CASES` and `MANTLET_DIFFERENTIAL_SEED` (a number, or `random`) choose size and seed.

mod arena;
mod client;
mod judge;
#[allow(dead_code, reason = "shared with the tests of `xds`, which use more of it")]
#[path = "../../../xds/tests/envoy/launch.rs"]
mod launch;
mod pki;

use std::time::Instant;

use mantlet_differential::generate::{Size, plan};

use arena::{ROUND, addresses, translate};
use judge::Tally;

/// Questions to one world.
const SIZE: Size = Size {
    connections: 8,
    requests: 6,
    tcp: 6,
};
/// What CI runs.
const CASES: usize = 20_000;

fn seed() -> u64 {
    match std::env::var("MANTLET_DIFFERENTIAL_SEED").as_deref() {
        Err(_) | Ok("") => 1,
        Ok("random") => rand_seed(),
        Ok(text) => text.parse().expect("MANTLET_DIFFERENTIAL_SEED is a number or `random`"),
    }
}

fn rand_seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    now.as_nanos() as u64
}

#[test]
fn five_sides_agree() {
    let cases: usize = match std::env::var("MANTLET_DIFFERENTIAL_CASES") {
        Err(_) => CASES,
        Ok(text) if text.is_empty() => CASES,
        Ok(text) => text.parse().expect("MANTLET_DIFFERENTIAL_CASES is a number"),
    };
    let seed = seed();
    println!("seed {seed}");
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut first = 0;
    while tally.cases < cases {
        let left = (cases - tally.cases).div_ceil(SIZE.connections * SIZE.requests + SIZE.tcp);
        let plans: Vec<_> = (first..first + left.min(ROUND))
            .map(|index| {
                let (http, tcp) = addresses(index);
                let own = seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                plan(own, http, tcp, SIZE)
            })
            .collect();
        let worlds: Vec<_> = plans.iter().map(|p| translate(&p.world)).collect();
        let answers = arena::run(&plans, &worlds, first);
        for ((plan, world), answers) in plans.iter().zip(&worlds).zip(&answers) {
            tally.add(plan, world, answers);
        }
        first += plans.len();
        println!(
            "{} cases, {} differences, {:.0?}",
            tally.cases,
            tally.differences.len(),
            started.elapsed()
        );
        if tally.differences.len() > 1000 {
            break;
        }
    }
    report(&tally);
}

fn report(tally: &Tally) {
    for (kind, [hits, misses]) in &tally.kinds {
        println!("  {kind:55} {hits:7} hits {misses:7} misses");
    }
    for (id, uses) in &tally.deviations {
        println!("  deviation {id:45} {uses:7} cases");
    }
    let share = 100.0 * tally.allowed as f64 / tally.cases as f64;
    println!(
        "{} cases ({} TCP), {share:.1}% allowed, {} refused before policy, {} kinds of values, {} kinds of atoms",
        tally.cases,
        tally.tcp,
        tally.refused,
        tally.kinds.len(),
        tally.atoms.len()
    );
    println!(
        "seeded bugs found: {} of {} in values, {} of {} in atoms",
        tally.found_naive.len(),
        tally.kinds.len(),
        tally.found_atoms.len(),
        tally.atoms.len()
    );
    // A few of each sort: one mistake shows in many cases.
    let mut shown: std::collections::BTreeMap<&str, usize> = std::collections::BTreeMap::new();
    for difference in &tally.differences {
        let sort = difference
            .split("rule")
            .next()
            .and_then(|text| text.get(..60))
            .unwrap_or_default();
        let count = shown.entry(sort).or_default();
        *count += 1;
        if *count <= 4 {
            println!("DIFFERENCE {difference}\n");
        }
    }
    println!("{} differences", tally.differences.len());
    assert_eq!(tally.differences.len(), 0, "the sides disagree; see above");
}
