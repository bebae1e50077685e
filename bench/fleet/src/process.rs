//! What the kernel says of a process: memory and processor time.

use anyhow::{Context, Result};

/// Clock ticks of a second in `/proc/<pid>/stat`; the same on every Linux that programs are built for.
const TICKS: f64 = 100.0;

/// A value of `/proc/<pid>/status` in MB (`VmRSS`, `VmHWM`).
pub(crate) fn memory_mb(pid: u32, field: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    let kb: f64 = line
        .and_then(|l| l.split_whitespace().next())
        .with_context(|| format!("no {field}"))?
        .parse()?;
    Ok(kb / 1024.0)
}

/// Makes the kernel forget the peak of memory so far; where it does not let us, the peak stays that of the whole run.
pub(crate) fn forget_peak(pid: u32) {
    // Not allowed to ordinary users of some kernels; the peak is then only less precise.
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// User and system time so far, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the process is gone")?;
    // The name in parentheses may hold spaces.
    let rest = text.rsplit_once(')').context("bad stat")?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("bad stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / TICKS)
}

/// Load average of the last minute.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|l| l.parse().ok())
        .unwrap_or_default()
}
