//! Endpoints that come and go: EndpointSlices are changed by many clients at once, and a sidecar tells when it has got what.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube::Client;
use tokio::sync::mpsc;

use crate::objects::{self, Plan};
use crate::sidecar::Fleet;

/// Turn → service and beginning of the write.
type Pending = HashMap<String, Vec<(usize, Instant)>>;

/// How addresses begin that the churn puts in, and no pod has.
pub(crate) const PREFIX: &str = "172.";

/// What the churn was like.
pub(crate) struct Churn {
    /// Changes that the API server acknowledged in a second.
    pub(crate) events_per_second: f64,
    /// From the beginning of a write until the probe had it or something newer of the same service, milliseconds.
    pub(crate) latencies: Vec<f64>,
}

fn address(turn: usize) -> String {
    format!("{PREFIX}{}.{}.{}", 16 + (turn >> 16), (turn >> 8) & 255, turn & 255)
}

fn turn_of(address: &str) -> Option<usize> {
    let mut parts = address.strip_prefix(PREFIX)?.split('.').map(str::parse::<usize>);
    let (a, b, c) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    Some((a.checked_sub(16)? << 16) | (b << 8) | c)
}

/// Changes slices of `services` for a while, as fast as `writers` clients can, or at `rate` events a second.
pub(crate) async fn run(
    client: &Client,
    plan: Plan,
    fleet: &Arc<Fleet>,
    (services, writers, seconds): (Vec<usize>, usize, f64),
    rate: Option<f64>,
    turns: &Arc<AtomicUsize>,
) -> Result<Churn> {
    let (tx, mut rx) = mpsc::unbounded_channel();
    *fleet.probe.lock().unwrap_or_else(PoisonError::into_inner) = Some(tx);
    let pending: Arc<Mutex<Pending>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..writers {
        let (client, pending, stop, turns) = (client.clone(), pending.clone(), stop.clone(), turns.clone());
        let own: Vec<usize> = services.iter().copied().skip(writer).step_by(writers).collect();
        let pause = rate.map(|rate| Duration::from_secs_f64(writers as f64 / rate));
        tasks.spawn(async move {
            let mut done = 0usize;
            let mut tick = pause.map(tokio::time::interval);
            while !stop.load(Ordering::Relaxed) && !own.is_empty() {
                if let Some(tick) = &mut tick {
                    tick.tick().await;
                }
                let service = own[done % own.len()];
                let turn = turns.fetch_add(1, Ordering::Relaxed);
                let cluster = format!(
                    "outbound|80||svc-{service:04}.{}.svc.cluster.local",
                    plan.namespace(service)
                );
                pending
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .entry(cluster)
                    .or_default()
                    .push((turn, Instant::now()));
                objects::apply(&client, "endpointslices", &plan.slice(service, Some(&address(turn)))).await?;
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let mut latencies = Vec::new();
    let mut take = |(cluster, address, at): (String, String, Instant)| {
        let Some(turn) = turn_of(&address) else { return };
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(list) = pending.get_mut(&cluster) else { return };
        list.retain(|(wanted, since)| {
            let there = *wanted <= turn;
            if there {
                latencies.push(at.saturating_duration_since(*since).as_secs_f64() * 1e3);
            }
            !there
        });
    };
    let end = tokio::time::Instant::now() + Duration::from_secs_f64(seconds);
    while let Ok(Some(found)) = tokio::time::timeout_at(end, rx.recv()).await {
        take(found);
    }
    stop.store(true, Ordering::Relaxed);
    let mut events = 0;
    while let Some(done) = tasks.join_next().await {
        events += done??;
    }
    let written = began.elapsed().as_secs_f64();
    // Whatever was written must arrive.
    let limit = tokio::time::Instant::now() + Duration::from_secs(120);
    loop {
        let open = pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Vec::len)
            .sum::<usize>();
        if open == 0 {
            break;
        }
        let found = tokio::time::timeout_at(limit, rx.recv()).await;
        take(
            found
                .with_context(|| format!("{open} changes of endpoints never arrived"))?
                .context("the probe is gone")?,
        );
    }
    *fleet.probe.lock().unwrap_or_else(PoisonError::into_inner) = None;
    Ok(Churn {
        events_per_second: events as f64 / written,
        latencies,
    })
}
