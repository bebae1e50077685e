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
mod properties;
mod threats;
mod tokens;

use std::path::Path;
use std::sync::Arc;
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
    let mint = Arc::new(tokens::Mint::new());
    let keys = mint.key_sets();
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut first = 0;
    while tally.cases < cases {
        let left = (cases - tally.cases).div_ceil(SIZE.connections * SIZE.requests + SIZE.tcp);
        let plans: Vec<_> = (first..first + left.min(ROUND))
            .map(|index| {
                let (http, tcp) = addresses(index);
                let own = seed.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                plan(own, http, tcp, SIZE, &keys)
            })
            .collect();
        let worlds: Vec<_> = plans.iter().map(|p| translate(&p.world)).collect();
        let answers = arena::run(&plans, &worlds, first, &mint);
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
    if !tally.differences.is_empty() {
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("differences.txt");
        std::fs::write(&all, tally.differences.join("\n\n")).unwrap();
        println!("all of them: {}", all.display());
    }
    println!("{} differences", tally.differences.len());
    assert_eq!(tally.differences.len(), 0, "the sides disagree; see above");

    // The run must be able to find something.
    assert!(
        (30.0..=70.0).contains(&share),
        "{share:.1}% allowed: too one-sided to tell"
    );
    let listed = listed_deviations();
    let used: Vec<&str> = tally.deviations.keys().copied().collect();
    assert_eq!(
        used, listed,
        "deviations that the run used, and those listed for it in docs/deviations.toml"
    );
    let mut both: std::collections::BTreeMap<String, [usize; 2]> = std::collections::BTreeMap::new();
    for (kind, [hits, misses]) in &tally.kinds {
        let count = both.entry(positive(kind)).or_default();
        count[0] += hits;
        count[1] += misses;
    }
    let rare: Vec<_> = both
        .iter()
        .filter(|(_, count)| count.iter().any(|n| *n < 100))
        .collect();
    println!("kinds of values that are hit or missed fewer than 100 times: {rare:?}");
    let never: Vec<_> = both
        .iter()
        .filter(|(kind, [hits, misses])| (*hits == 0 && can_hit(kind)) || (*misses == 0 && can_miss(kind)))
        .collect();
    assert!(
        never.is_empty(),
        "kinds of values that are never hit or never missed: {never:?}"
    );
    let unseen: Vec<_> = both
        .keys()
        .filter(|kind| can_hit(kind) && can_miss(kind))
        .filter(|kind| !tally.found_naive.iter().any(|found| positive(found) == **kind))
        .collect();
    println!("kinds of values whose inverted test is not seen: {unseen:?}");
    let unseen: Vec<_> = tally.atoms.difference(&tally.found_atoms).collect();
    assert!(
        unseen.is_empty(),
        "an inverted atom of these kinds is not seen: {unseen:?}"
    );
}

/// The kind without regard to negation: `from.notIpBlocks` tests what `from.ipBlocks` does.
fn positive(kind: &str) -> String {
    if let Some(rest) = kind.strip_prefix("when.not.") {
        return format!("when.{rest}");
    }
    match kind.split_once(".not") {
        Some((section, rest)) => format!("{section}.{}{}", rest[..1].to_lowercase(), &rest[1..]),
        None => kind.to_string(),
    }
}

/// Nobody writes metadata that `experimental.` keys look at.
fn can_hit(kind: &str) -> bool {
    !kind.starts_with("when.experimental")
}

/// Every request has a host, a method and a path.
fn can_miss(kind: &str) -> bool {
    !matches!(kind, "to.hosts present" | "to.methods present" | "to.paths present")
}

/// Deviations that are marked for this run, in order.
fn listed_deviations() -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/deviations.toml");
    let text = std::fs::read_to_string(file).unwrap();
    let marked = text
        .split("[[deviation]]")
        .filter(|entry| entry.contains("\ndifferential = true"));
    let id = |entry: &str| entry.split("id = \"").nth(1)?.split('"').next().map(str::to_string);
    let mut out: Vec<String> = marked.filter_map(id).collect();
    out.sort();
    out
}
