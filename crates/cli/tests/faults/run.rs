//! One fault after another against the same mesh under the same load, and the judgement after each.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::AFTERWARDS;
use crate::load::{Load, Odd, Outcomes, now};
use crate::mesh::Mesh;
use crate::soak::Sampler;
use crate::writer::{Writer, Written};

/// Failures that cannot be avoided, and when.
#[derive(Clone, Debug)]
pub(crate) struct Excuse {
    why: &'static str,
    from: f64,
    to: f64,
    pods: &'static [&'static str],
    kinds: &'static [&'static str],
    but: &'static [&'static str],
    saying: &'static str,
}

impl Excuse {
    /// Requests that were under way at the moment between `from` and `to`.
    pub(crate) fn in_flight(why: &'static str, from: f64, to: f64) -> Self {
        Self {
            why,
            from,
            to,
            pods: &[],
            kinds: &[],
            but: &[],
            saying: "",
        }
    }

    /// Requests of a time without redundancy.
    pub(crate) fn until(why: &'static str, from: f64, to: f64) -> Self {
        Self::in_flight(why, from, to)
    }

    /// Only of these callers.
    pub(crate) fn of_pods(self, pods: &'static [&'static str]) -> Self {
        Self { pods, ..self }
    }

    /// Only of these kinds.
    pub(crate) fn of_kinds(self, kinds: &'static [&'static str]) -> Self {
        Self { kinds, ..self }
    }

    /// Not of these kinds: the mesh can do something for them.
    pub(crate) fn but(self, but: &'static [&'static str]) -> Self {
        Self { but, ..self }
    }

    /// Only with this answer.
    pub(crate) fn saying(self, saying: &'static str) -> Self {
        Self { saying, ..self }
    }

    fn covers(&self, odd: &Odd) -> bool {
        let among = |list: &[&str], name: &str| list.is_empty() || list.contains(&name);
        odd.outcome == "failed"
            && odd.start <= self.to
            && odd.end >= self.from
            && among(self.pods, &odd.pod)
            && among(self.kinds, &odd.kind)
            && !self.but.contains(&odd.kind.as_str())
            && odd.reason.starts_with(self.saying)
    }
}

#[derive(Default)]
struct Totals {
    faults: u64,
    answered: u64,
    refused: u64,
    unavoidable: u64,
    failed: u64,
    wrongly_allowed: u64,
    wrongly_denied: u64,
    lost: u64,
    acknowledged: u64,
    unanswered: u64,
}

/// The run.
pub(crate) struct Run {
    pub(crate) load: Load,
    writer: Writer,
    totals: RefCell<Totals>,
    /// Seconds to go on for (`SOAK_SECONDS`), if this is a soak.
    pub(crate) soak: Option<f64>,
    sampler: Option<Sampler>,
    begin: Instant,
    // Last: the others use it to their end.
    pub(crate) mesh: Mesh,
}

impl Run {
    /// Starts callers and writer.
    pub(crate) fn start(mesh: Mesh) -> Self {
        let load = mesh.load();
        let writer = Writer::start(mesh.cluster.kubeconfig());
        let soak = std::env::var("SOAK_SECONDS").ok().filter(|text| !text.is_empty());
        let soak = soak.map(|text| text.parse().expect("SOAK_SECONDS is a number of seconds"));
        Self {
            load,
            writer,
            totals: RefCell::default(),
            soak,
            sampler: soak.map(|_| Sampler::start(mesh.broker())),
            begin: Instant::now(),
            mesh,
        }
    }

    /// Seconds since the start.
    pub(crate) fn seconds(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// One of the servers' pods.
    pub(crate) fn web(&self, number: usize) -> String {
        self.mesh.pods("shop", "app=web").swap_remove(number)
    }

    /// Brings a fault about and judges what became of requests and writes from its beginning to a while after its end.
    pub(crate) fn fault(&self, name: &str, fault: impl FnOnce(&Mesh) -> Vec<Excuse>) {
        let from = now();
        let excuses = fault(&self.mesh);
        // The mesh works again, for everybody, before it is judged.
        let over = now();
        self.mesh.answered(&self.load, over);
        std::thread::sleep(AFTERWARDS);
        let to = now();
        self.load.settle(to);
        let outcomes = self.load.between(from, to);
        let written = self.writer.verify();
        if let Some(sampler) = &self.sampler {
            sampler.follow(self.mesh.broker());
        }
        self.judge(name, to - from, &outcomes, &excuses, written);
    }

    fn judge(&self, name: &str, seconds: f64, outcomes: &Outcomes, excuses: &[Excuse], written: Written) {
        let failed: Vec<&Odd> = outcomes.odd.iter().filter(|odd| odd.outcome == "failed").collect();
        let (unavoidable, failures): (Vec<&Odd>, Vec<&Odd>) = failed
            .into_iter()
            .partition(|odd| excuses.iter().any(|excuse| excuse.covers(odd)));
        let answered = outcomes.count("allowed");
        let refused = outcomes.count("denied") + outcomes.count("refused");
        let wrongly_allowed = outcomes.count("wrongly-allowed");
        let wrongly_denied = outcomes.count("wrongly-denied");
        let mut totals = self.totals.borrow_mut();
        totals.faults += 1;
        totals.answered += answered;
        totals.refused += refused;
        totals.unavoidable += unavoidable.len() as u64;
        totals.failed += failures.len() as u64;
        totals.wrongly_allowed += wrongly_allowed;
        totals.wrongly_denied += wrongly_denied;
        totals.lost += written.lost;
        totals.acknowledged = written.acknowledged;
        totals.unanswered = written.unanswered;
        println!(
            "{name}: {seconds:.1} s, {answered} answered, {refused} refused as they must be, slowest {:.2} s; lost \
             acknowledged writes {}, wrongly allowed {wrongly_allowed}, wrongly denied {wrongly_denied}, failed {}{}",
            outcomes.slowest,
            written.lost,
            failures.len(),
            match excuses.first() {
                Some(excuse) if !unavoidable.is_empty() =>
                    format!(", unavoidable {} ({})", unavoidable.len(), excuse.why),
                _ => String::new(),
            }
        );
        let wrong: Vec<&Odd> = outcomes
            .odd
            .iter()
            .filter(|odd| odd.outcome.starts_with("wrongly"))
            .collect();
        assert!(
            wrong.is_empty(),
            "{name}: {} wrong decisions, first {:?}",
            wrong.len(),
            wrong[0]
        );
        assert!(
            failures.is_empty(),
            "{name}: {} requests failed that another replica could have answered; excuses {excuses:?}; first {:#?}",
            failures.len(),
            &failures[..failures.len().min(8)]
        );
        assert_eq!(written.lost, 0, "{name}: acknowledged writes are lost");
        assert!(
            answered > 50 && refused > 10,
            "{name}: too few requests to mean anything"
        );
    }

    /// Prints the sums.
    pub(crate) fn finish(&self) {
        let totals = self.totals.borrow();
        println!(
            "{} faults: {} requests answered, {} refused as they must be, {} writes acknowledged and {} not; lost acknowledged writes {}, \
             wrongly allowed requests {}, wrongly denied {}, failed requests where redundancy exists {}, unavoidable {}",
            totals.faults,
            totals.answered,
            totals.refused,
            totals.acknowledged,
            totals.unanswered,
            totals.lost,
            totals.wrongly_allowed,
            totals.wrongly_denied,
            totals.failed,
            totals.unavoidable,
        );
        if let Some(sampler) = &self.sampler {
            let (table, grown) = sampler.judge();
            let result = json!({
                "seconds": self.seconds().round(), "faults": totals.faults, "answered": totals.answered,
                "refused_as_they_must_be": totals.refused, "acknowledged_writes": totals.acknowledged,
                "lost_acknowledged_writes": totals.lost, "wrongly_allowed": totals.wrongly_allowed,
                "wrongly_denied": totals.wrongly_denied, "failed_where_redundancy_exists": totals.failed,
                "unavoidable": totals.unavoidable, "grown": grown, "processes": table,
            });
            let stamp = time::OffsetDateTime::now_utc().unix_timestamp();
            let results = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../bench/results");
            let path = results.join(format!("soak-{stamp}.json"));
            let text = serde_json::to_string_pretty(&result).expect("JSON");
            std::fs::write(&path, text + "\n").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            println!("written to bench/results/soak-{stamp}.json");
            assert!(!table.is_empty(), "no process lived long enough to be judged");
            assert!(grown.is_empty(), "{grown:#?}");
        }
        assert!(
            totals.acknowledged > 100,
            "too few writes to mean anything: {}",
            totals.acknowledged
        );
    }
}
