//! The usual `process_*` metrics, read from /proc at scrape time.

use super::Registry;

/// Adds `process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds` and
/// `process_start_time_seconds`.
pub fn register_process_metrics(registry: &Registry) {
    let cpu = registry
        .gauge(
            "process_cpu_seconds_total",
            "Total user and system CPU time spent in seconds.",
            &[],
        )
        .with(&[]);
    let memory = registry
        .gauge("process_resident_memory_bytes", "Resident memory size in bytes.", &[])
        .with(&[]);
    let files = registry
        .gauge("process_open_fds", "Number of open file descriptors.", &[])
        .with(&[]);
    let start = registry
        .gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            &[],
        )
        .with(&[]);
    if let Ok(now) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
        start.set(now.as_secs_f64());
    }
    registry.on_collect(move || {
        if let Some(seconds) = cpu_seconds() {
            cpu.set(seconds);
        }
        if let Some(bytes) = resident_bytes() {
            memory.set(bytes);
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            files.set(entries.count() as f64);
        }
    });
}

/// Sum over all tasks, from /proc/self/schedstat's nanoseconds (finer than stat's clock ticks).
fn cpu_seconds() -> Option<f64> {
    let mut nanoseconds = 0u64;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        nanoseconds += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(nanoseconds as f64 / 1e9)
}

fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024.0)
}
