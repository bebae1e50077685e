//! Figures beside istiod's and the budgets: a table for people, JSON for `bench/results`.

use serde_json::{Value, json};

use crate::objects::Plan;
use crate::process;
use crate::sidecar::Mode;

/// Name, figure, istiod's, budget (with whether less is better).
type Row = (&'static str, f64, &'static str, Option<(f64, bool)>);

/// Figures of one control plane. Times of policies and endpoints are all samples, in milliseconds.
pub(crate) struct Round {
    plan: Plan,
    sidecars: usize,
    mode: Mode,
    /// Start of the process until it is ready.
    pub(crate) ready_s: f64,
    /// Memory before any sidecar.
    pub(crate) rss_empty_mb: f64,
    /// All sidecars at once until all hold everything.
    pub(crate) first_sync_s: f64,
    /// Processor time of it.
    pub(crate) first_sync_cpu_s: f64,
    /// Peak of memory until then.
    pub(crate) first_sync_peak_mb: f64,
    /// Bytes of responses per proxy, thousands.
    pub(crate) kb_per_proxy: f64,
    /// Memory after the policies.
    pub(crate) rss_mb: f64,
    /// Policy write in one namespace until all its proxies have answered.
    pub(crate) policy_one_ms: Vec<f64>,
    /// Mesh-wide policy write until all proxies have answered.
    pub(crate) policy_all_ms: Vec<f64>,
    /// Endpoint changes a second, of those asked for.
    pub(crate) churn_steady_per_s: f64,
    /// Their latency.
    pub(crate) churn_steady_ms: Vec<f64>,
    /// Endpoint changes a second, as many as the API server takes.
    pub(crate) churn_per_s: f64,
    /// Their latency.
    pub(crate) churn_ms: Vec<f64>,
    /// Processors that the control plane used meanwhile.
    pub(crate) churn_cpu: f64,
    /// Certificates a second.
    pub(crate) csr_per_s: f64,
    /// Processor time of one, milliseconds.
    pub(crate) csr_cpu_ms: f64,
    /// All sidecars drop and come back, until all are in sync.
    pub(crate) storm_s: f64,
    /// Processor time of it.
    pub(crate) storm_cpu_s: f64,
    /// Peak of memory in it.
    pub(crate) storm_peak_mb: f64,
    /// Memory at the end.
    pub(crate) rss_end_mb: f64,
    /// Streams that failed and were opened again.
    pub(crate) again: u64,
    /// Load average of the machine at the end.
    pub(crate) load_average: f64,
}

impl Round {
    /// Nothing measured yet.
    pub(crate) fn new(plan: Plan, sidecars: usize, mode: Mode) -> Round {
        Round {
            plan,
            sidecars,
            mode,
            ready_s: 0.0,
            rss_empty_mb: 0.0,
            first_sync_s: 0.0,
            first_sync_cpu_s: 0.0,
            first_sync_peak_mb: 0.0,
            kb_per_proxy: 0.0,
            rss_mb: 0.0,
            policy_one_ms: Vec::new(),
            policy_all_ms: Vec::new(),
            churn_steady_per_s: 0.0,
            churn_steady_ms: Vec::new(),
            churn_per_s: 0.0,
            churn_ms: Vec::new(),
            churn_cpu: 0.0,
            csr_per_s: 0.0,
            csr_cpu_ms: 0.0,
            storm_s: 0.0,
            storm_cpu_s: 0.0,
            storm_peak_mb: 0.0,
            rss_end_mb: 0.0,
            again: 0,
            load_average: 0.0,
        }
    }

    fn rows(&self) -> Vec<Row> {
        // The budgets are for 2,000 services with ten endpoints each and 100 sidecars; istiod's figures too.
        let stated = self.plan.services * self.plan.endpoints == 20_000 && self.sidecars == 100;
        let budget = |limit: f64, less: bool| stated.then_some((limit, less));
        let istiod = |text: &'static str| if stated { text } else { "" };
        let per_proxy = (self.mode == Mode::OnDemand).then_some((100.0, true));
        vec![
            ("start to ready, s", self.ready_s, "", None),
            ("RSS without sidecars, MB", self.rss_empty_mb, "", None),
            ("first sync, s", self.first_sync_s, istiod("19.6"), budget(3.0, true)),
            ("  processor time, s", self.first_sync_cpu_s, "", None),
            ("  peak RSS, MB", self.first_sync_peak_mb, istiod("766"), None),
            (
                "kB per proxy",
                self.kb_per_proxy,
                istiod("4900"),
                per_proxy.filter(|_| stated),
            ),
            ("RSS, MB", self.rss_mb, istiod("306"), budget(80.0, true)),
            (
                "policy, one namespace, p50 ms",
                percentile(&self.policy_one_ms, 0.5),
                "",
                None,
            ),
            (
                "policy, one namespace, p99 ms",
                percentile(&self.policy_one_ms, 0.99),
                "",
                budget(30.0, true),
            ),
            (
                "policy, mesh-wide, p50 ms",
                percentile(&self.policy_all_ms, 0.5),
                istiod("179"),
                None,
            ),
            (
                "policy, mesh-wide, p99 ms",
                percentile(&self.policy_all_ms, 0.99),
                "",
                budget(30.0, true),
            ),
            (
                "endpoint changes at a steady rate, /s",
                self.churn_steady_per_s,
                "",
                None,
            ),
            ("  p50 ms", percentile(&self.churn_steady_ms, 0.5), "", None),
            ("  p99 ms", percentile(&self.churn_steady_ms, 0.99), "", None),
            ("endpoint changes without pause, /s", self.churn_per_s, "", None),
            ("  p50 ms", percentile(&self.churn_ms, 0.5), "", None),
            ("  p99 ms", percentile(&self.churn_ms, 0.99), "", None),
            ("  processors used", self.churn_cpu, "", None),
            ("certificates, /s", self.csr_per_s, "101", Some((2000.0, false))),
            ("  processor time each, ms", self.csr_cpu_ms, "2.7", None),
            ("all drop and come back, s", self.storm_s, "", None),
            ("  processor time, s", self.storm_cpu_s, "", None),
            ("  peak RSS, MB", self.storm_peak_mb, "", None),
            ("RSS at the end, MB", self.rss_end_mb, "", None),
            ("streams that failed", self.again as f64, "", None),
        ]
    }
}

/// A percentile of samples; 0 for none.
pub(crate) fn percentile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or_default()
}

/// Prints a round as a table.
pub(crate) fn print(round: &Round) {
    println!(
        "\n{} services x {} endpoints, {} sidecars, {:?} (load average {:.1})",
        round.plan.services, round.plan.endpoints, round.sidecars, round.mode, round.load_average
    );
    println!("{:<40} {:>10} {:>8} {:>10}", "", "mantletd", "istiod", "budget");
    for (name, figure, istiod, budget) in round.rows() {
        let verdict = budget.map_or_else(String::new, |(limit, less)| {
            let reached = if less { figure <= limit } else { figure >= limit };
            let sign = if less { "<" } else { ">" };
            format!(
                "{:>10} {}",
                format!("{sign} {limit}"),
                if reached { "reached" } else { "NOT reached" }
            )
        });
        println!("{name:<40} {figure:>10.2} {istiod:>8} {verdict}");
    }
}

/// All rounds, for the record.
pub(crate) fn json(rounds: &[Round]) -> Value {
    let round = |r: &Round| {
        let figures: serde_json::Map<String, Value> = r
            .rows()
            .into_iter()
            .scan(String::new(), |of, (name, figure, _, _)| {
                // Indented rows are about the one above.
                let name = match name.strip_prefix("  ") {
                    Some(rest) => format!("{of}: {rest}"),
                    None => {
                        *of = name.to_string();
                        name.to_string()
                    }
                };
                Some((name, json!((figure * 1000.0).round() / 1000.0)))
            })
            .collect();
        json!({
            "services": r.plan.services, "endpoints": r.plan.endpoints, "namespaces": r.plan.namespaces,
            "sidecars": r.sidecars, "mode": format!("{:?}", r.mode), "load_average": r.load_average, "figures": figures,
        })
    };
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    json!({
        "processors": processors,
        "load_average": process::load_average(),
        "rounds": rounds.iter().map(round).collect::<Vec<_>>(),
    })
}
