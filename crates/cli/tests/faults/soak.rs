//! Resources of every process over time: sampled while faults go round, judged at the end.
//!
//! A process may grow while it learns what it has to do; after that its memory, descriptors and threads must not have a
//! slope. The slope is that of least squares over the means of a few blocks, since neighbouring samples are no independent
//! measurements; it counts when it is larger than its own uncertainty and than a floor below which it means nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::processes::{Process, Usage, tree};

/// Between two samples.
const EVERY: Duration = Duration::from_secs(2);
/// A process warms up for this long.
const WARM_UP: f64 = 90.0;
/// Shorter observations say nothing about a slope.
const LEAST: f64 = 120.0;
/// Blocks of the observation.
const BLOCKS: usize = 8;
/// Student's t for 99.5 % and `BLOCKS - 2` degrees of freedom.
const STUDENT: f64 = 3.71;

type Samples = BTreeMap<(i32, u64), (Process, Vec<(f64, Usage)>)>;

/// Samples the processes below a broker until it is dropped.
pub(crate) struct Sampler {
    root: Arc<AtomicI32>,
    samples: Arc<Mutex<Samples>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Starts; `root` is the broker's process id.
    pub(crate) fn start(root: i32) -> Self {
        let root = Arc::new(AtomicI32::new(root));
        let samples = Arc::new(Mutex::new(Samples::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (root, samples, stop) = (root.clone(), samples.clone(), stop.clone());
            std::thread::spawn(move || {
                let begin = Instant::now();
                while !stop.load(Ordering::SeqCst) {
                    for process in tree(root.load(Ordering::SeqCst)) {
                        let Some(usage) = process.usage() else { continue };
                        let mut samples = samples.lock().expect("no sampler panics");
                        let entry = samples.entry((process.pid, process.started));
                        let (_, all) = entry.or_insert_with(|| (process, Vec::new()));
                        all.push((begin.elapsed().as_secs_f64(), usage));
                    }
                    std::thread::sleep(EVERY);
                }
            })
        };
        Self {
            root,
            samples,
            stop,
            thread: Some(thread),
        }
    }

    /// The cluster has been started anew.
    pub(crate) fn follow(&self, root: i32) {
        self.root.store(root, Ordering::SeqCst);
    }

    /// Prints the table of the processes that lived long enough; returns it, and what grows.
    pub(crate) fn judge(&self) -> (Vec<Value>, Vec<String>) {
        let samples = self.samples.lock().expect("no sampler panics");
        let mut table = Vec::new();
        let mut grown = Vec::new();
        println!(
            "{:<34} {:<16} {:>7} {:>9} {:>9} {:>22} {:>6} {:>18} {:>4} {:>16}",
            "place", "program", "s", "KiB first", "KiB last", "KiB/min", "files", "files/min", "thr", "threads/min"
        );
        for (process, all) in samples.values() {
            let ours = process.program.starts_with("mantlet") || process.program == "shim";
            let Some((begin, _)) = all.first() else { continue };
            let warm: Vec<&(f64, Usage)> = all.iter().filter(|(at, _)| at - begin > WARM_UP).collect();
            let (Some(first), Some(last)) = (warm.first(), warm.last()) else {
                continue;
            };
            let seconds = last.0 - first.0;
            if !ours || seconds < LEAST {
                continue;
            }
            let of = |what: fn(&Usage) -> u64| -> Slope {
                Slope::of(
                    &warm
                        .iter()
                        .map(|(at, usage)| (*at, what(usage) as f64))
                        .collect::<Vec<_>>(),
                )
            };
            let (rss, files, threads) = (of(|u| u.rss), of(|u| u.descriptors), of(|u| u.threads));
            println!(
                "{:<34} {:<16} {seconds:>7.0} {:>9} {:>9} {:>22} {:>6} {:>18} {:>4} {:>16}",
                process.place,
                process.program,
                first.1.rss,
                last.1.rss,
                rss.text(),
                last.1.descriptors,
                files.text(),
                last.1.threads,
                threads.text()
            );
            for (name, slope, floor) in [
                ("memory", &rss, 768.0),
                ("descriptors", &files, 4.0),
                ("threads", &threads, 0.9),
            ] {
                if slope.grows(seconds, floor) {
                    grown.push(format!(
                        "{name} of {} in {}: {} a minute",
                        process.program,
                        process.place,
                        slope.text()
                    ));
                }
            }
            table.push(json!({
                "place": process.place, "program": process.program, "seconds": seconds.round(),
                "rss_kib": { "first": first.1.rss, "last": last.1.rss, "slope_per_minute": rss.per_minute(), "noise": rss.noise() },
                "descriptors": { "last": last.1.descriptors, "slope_per_minute": files.per_minute(), "noise": files.noise() },
                "threads": { "last": last.1.threads, "slope_per_minute": threads.per_minute(), "noise": threads.noise() },
            }));
        }
        (table, grown)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A slope per second and its uncertainty.
struct Slope {
    slope: f64,
    uncertainty: f64,
}

impl Slope {
    fn of(samples: &[(f64, f64)]) -> Self {
        let size = samples.len().div_ceil(BLOCKS).max(1);
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            let all: Vec<f64> = values.collect();
            all.iter().sum::<f64>() / all.len().max(1) as f64
        };
        let blocks: Vec<(f64, f64)> = samples
            .chunks(size)
            .map(|block| {
                (
                    mean(&mut block.iter().map(|s| s.0)),
                    mean(&mut block.iter().map(|s| s.1)),
                )
            })
            .collect();
        let (x, y) = (
            mean(&mut blocks.iter().map(|b| b.0)),
            mean(&mut blocks.iter().map(|b| b.1)),
        );
        let spread: f64 = blocks.iter().map(|b| (b.0 - x).powi(2)).sum();
        let slope = blocks.iter().map(|b| (b.0 - x) * (b.1 - y)).sum::<f64>() / spread.max(f64::EPSILON);
        let rest: f64 = blocks.iter().map(|b| (b.1 - y - slope * (b.0 - x)).powi(2)).sum();
        let freedom = blocks.len().saturating_sub(2).max(1) as f64;
        Self {
            slope,
            uncertainty: STUDENT * (rest / freedom / spread.max(f64::EPSILON)).sqrt(),
        }
    }

    fn grows(&self, seconds: f64, floor: f64) -> bool {
        self.slope > self.uncertainty && self.slope * seconds > floor
    }

    fn per_minute(&self) -> f64 {
        (self.slope * 6000.0).round() / 100.0
    }

    fn noise(&self) -> f64 {
        (self.uncertainty * 6000.0).round() / 100.0
    }

    fn text(&self) -> String {
        format!("{:+.2} ± {:.2}", self.per_minute(), self.noise())
    }
}

/// A leak is seen through noise, and noise is none.
#[test]
fn slopes() {
    let noise = |n: usize| ((n * 7919) % 101) as f64 - 50.0;
    let samples = |leak: f64| -> Vec<(f64, f64)> {
        (0..200)
            .map(|n| (2.0 * n as f64, 20_000.0 + 5.0 * noise(n) + leak * n as f64))
            .collect()
    };
    assert!(!Slope::of(&samples(0.0)).grows(400.0, 768.0));
    assert!(Slope::of(&samples(8.0)).grows(400.0, 768.0));
    let step: Vec<(f64, f64)> = (0..200)
        .map(|n| (2.0 * n as f64, if n < 100 { 10.0 } else { 12.0 }))
        .collect();
    assert!(!Slope::of(&step).grows(400.0, 4.0));
}
