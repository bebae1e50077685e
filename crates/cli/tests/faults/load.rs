//! What the callers report: every request's outcome, gathered from the logs of their pods.
//!
//! A caller never tries again and says for each request that did not end as expected when it began and ended
//! (`caller.py`), so that a failure can be set against the moment of a fault. Times are seconds since the epoch, of the
//! one clock that callers and tests share.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::common::Cluster;

/// The time of the callers' clock.
pub(crate) fn now() -> f64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs_f64()
}

/// A request with another outcome than expected.
#[derive(Clone, Debug)]
pub(crate) struct Odd {
    pub(crate) pod: String,
    pub(crate) kind: String,
    pub(crate) outcome: String,
    pub(crate) start: f64,
    pub(crate) end: f64,
    pub(crate) reason: String,
}

#[derive(Clone, Debug)]
struct Sum {
    at: f64,
    kind: String,
    outcome: String,
    count: u64,
    slowest: f64,
}

#[derive(Default)]
struct Seen {
    /// Last line by run of a caller.
    last: HashMap<String, u64>,
    sums: Vec<Sum>,
    odd: Vec<Odd>,
    /// By pod: every request that began before has been counted.
    floor: HashMap<String, f64>,
}

/// All callers' outcomes, as they come.
pub(crate) struct Load {
    pods: Vec<(String, String)>,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    readers: Vec<JoinHandle<()>>,
}

/// The outcomes of some time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcomes {
    /// Requests by kind and outcome.
    pub(crate) counts: BTreeMap<(String, String), u64>,
    /// What was not expected.
    pub(crate) odd: Vec<Odd>,
    /// Seconds of the slowest request.
    pub(crate) slowest: f64,
}

impl Outcomes {
    /// All requests with an outcome.
    pub(crate) fn count(&self, outcome: &str) -> u64 {
        self.counts
            .iter()
            .filter(|((_, o), _)| o == outcome)
            .map(|(_, n)| n)
            .sum()
    }

    /// Requests of a kind with an outcome.
    pub(crate) fn of(&self, kind: &str, outcome: &str) -> u64 {
        self.counts
            .get(&(kind.to_owned(), outcome.to_owned()))
            .copied()
            .unwrap_or_default()
    }
}

/// One reader's view of its pod, and the child that prints the log.
fn follow(cluster: &Follow, seen: &Mutex<Seen>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let Some(mut child) = cluster.logs() else { return };
        let out = BufReader::new(child.stdout.take().expect("piped"));
        for line in out.lines() {
            let Ok(line) = line else { break };
            if stop.load(Ordering::SeqCst) {
                break;
            }
            take(&cluster.pod, &line, seen);
        }
        let _ = child.kill();
        let _ = child.wait();
        // The pod or the API is away for now.
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct Follow {
    kubeconfig: std::path::PathBuf,
    home: std::path::PathBuf,
    namespace: String,
    pod: String,
}

impl Follow {
    fn logs(&self) -> Option<Child> {
        std::process::Command::new("kubectl")
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", &self.home)
            .args(["logs", "-f", "-n", &self.namespace, &self.pod, "-c", "load"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()
    }
}

fn take(pod: &str, line: &str, seen: &Mutex<Seen>) {
    // A line that was being written when its process was killed.
    let Ok(record) = serde_json::from_str::<Value>(line) else {
        return;
    };
    let (Some(run), Some(number)) = (record["run"].as_str(), record["number"].as_u64()) else {
        return;
    };
    let mut seen = seen.lock().expect("no reader panics");
    let last = seen.last.entry(format!("{pod} {run}")).or_default();
    if number <= *last {
        return;
    }
    *last = number;
    let seconds = |name: &str| record[name].as_f64().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if let Some(sums) = record["sum"].as_array() {
        let at = seconds("at");
        for sum in sums {
            seen.sums.push(Sum {
                at,
                kind: text(&sum[0]),
                outcome: text(&sum[1]),
                count: sum[2].as_u64().unwrap_or_default(),
                slowest: sum[3].as_f64().unwrap_or_default(),
            });
        }
        seen.floor.insert(pod.to_owned(), seconds("floor"));
    } else {
        seen.odd.push(Odd {
            pod: pod.to_owned(),
            kind: text(&record["kind"]),
            outcome: text(&record["odd"]),
            start: seconds("start"),
            end: seconds("end"),
            reason: text(&record["reason"]),
        });
    }
}

impl Load {
    /// Follows the callers in these pods (namespace, name).
    pub(crate) fn follow(cluster: &Cluster, pods: &[(&str, &str)]) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let readers = pods
            .iter()
            .map(|(namespace, pod)| {
                let (seen, stop) = (seen.clone(), stop.clone());
                let pod = Follow {
                    kubeconfig: cluster.kubeconfig(),
                    home: cluster.dir.path().to_owned(),
                    namespace: (*namespace).to_owned(),
                    pod: (*pod).to_owned(),
                };
                std::thread::spawn(move || follow(&pod, &seen, &stop))
            })
            .collect();
        Self {
            pods: pods.iter().map(|(n, p)| ((*n).to_owned(), (*p).to_owned())).collect(),
            seen,
            stop,
            readers,
        }
    }

    /// Waits until every request that began before `moment` has an outcome, whatever it is.
    pub(crate) fn settle(&self, moment: f64) {
        let start = Instant::now();
        loop {
            let behind: Vec<String> = {
                let seen = self.seen.lock().expect("no reader panics");
                let floor = |pod: &str| seen.floor.get(pod).copied().unwrap_or_default();
                let all = self.pods.iter().map(|(_, pod)| pod.clone());
                all.filter(|pod| floor(pod) <= moment).collect()
            };
            if behind.is_empty() {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(150),
                "no report of the requests before {moment} from {behind:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The outcomes of requests that ended between two moments.
    pub(crate) fn between(&self, from: f64, to: f64) -> Outcomes {
        let seen = self.seen.lock().expect("no reader panics");
        let mut outcomes = Outcomes::default();
        for sum in seen.sums.iter().filter(|sum| from <= sum.at && sum.at < to) {
            *outcomes
                .counts
                .entry((sum.kind.clone(), sum.outcome.clone()))
                .or_default() += sum.count;
            outcomes.slowest = outcomes.slowest.max(sum.slowest);
        }
        outcomes.odd = seen
            .odd
            .iter()
            .filter(|odd| from <= odd.end && odd.end < to)
            .cloned()
            .collect();
        outcomes
    }

    /// Waits until requests of every one of these kinds have had an outcome after `moment`.
    pub(crate) fn wait_for(&self, kinds: &[&str], outcome: &str, moment: f64) {
        let start = Instant::now();
        loop {
            let outcomes = self.between(moment, f64::MAX);
            let missing: Vec<_> = kinds.iter().filter(|kind| outcomes.of(kind, outcome) == 0).collect();
            if missing.is_empty() {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "no request of {missing:?} is {outcome} since {moment}; seen: {:?}, {:?}",
                outcomes.counts,
                outcomes.odd.last()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Each caller reports five times a second, so the readers see this soon; if not, they end with the process.
        let start = Instant::now();
        for reader in self.readers.drain(..) {
            while !reader.is_finished() && start.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
