//! The fuzz targets' checks over their corpora, and over mutations of them with a fixed seed: what `make fuzz` looks for at
//! length, every run looks for shortly.

#[path = "../../../fuzz/bodies.rs"]
mod bodies;

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Mutations of each file.
const MUTATIONS: usize = 200;

fn run(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() > 2, "{} is nearly empty", folder.display());
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    let mut random = StdRng::seed_from_u64(7);
    for (file, bytes) in files.iter().zip(&corpus) {
        println!("{}", file.display());
        check(bytes);
        for _ in 0..MUTATIONS {
            check(&mutated(bytes, &corpus, &mut random));
        }
    }
}

/// A few bytes replaced, removed, repeated, or taken from another file.
fn mutated(bytes: &[u8], corpus: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=out.len());
        let end = (at + random.random_range(0..8)).min(out.len());
        match random.random_range(0..4) {
            0 => out[at..end].fill_with(|| random.random()),
            1 => drop(out.drain(at..end)),
            2 => {
                let piece = out[at..end].to_vec();
                out.splice(at..at, piece);
            }
            _ => {
                let other = &corpus[random.random_range(0..corpus.len())];
                let from = random.random_range(0..=other.len());
                let to = (from + random.random_range(0..32)).min(other.len());
                out.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    out
}

#[test]
fn policies() {
    run("policies", bodies::policies);
}

#[test]
fn token() {
    run("token", bodies::token);
}

#[test]
fn path() {
    run("path", bodies::path);
}

#[test]
fn wire() {
    run("wire", bodies::wire);
}

#[test]
fn hello() {
    run("hello", bodies::hello);
}
