//! Logging in Istio's format, with levels per scope that can be changed while running.
//!
//! A line is `2026-11-22T16:09:20.123456Z<tab>info<tab>scope<tab>message key=value`. The scope is the event's target:
//! either one of Istio's names (`target: "ads"`, `"ca"`, …) or the crate's name without `mantlet_`.

use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::writer::{Work, Writer};

/// Libraries that talk much; they stay at `warn` unless named.
const NOISY: &[&str] = &[
    "h2",
    "hyper",
    "hyper_util",
    "rustls",
    "tower",
    "kube_client",
    "kube_runtime",
    "tonic",
    "tokio",
];

/// Lines that may wait for the reader of standard output; more are dropped and counted.
const QUEUE: usize = 1024;
/// How long the end of the process waits for the last lines to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Why a level specification was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// A level that does not exist.
    #[error("unknown log level {level:?} for scope {scope:?}: use none, error, warn, info, debug or trace")]
    Level {
        /// The scope it was given for.
        scope: String,
        /// The text given.
        level: String,
    },
    /// Logging was set up already.
    #[error("logging is already initialised: {0}")]
    Initialised(String),
    /// There is no thread to write with.
    #[error("no thread for the log: {0}")]
    Thread(String),
}

/// How to log.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// `default:info,ads:debug`; a level without a scope is the default's (`--log_output_level`).
    pub levels: String,
    /// One JSON object per line (`--log_as_json`).
    pub json: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            levels: "default:info".to_owned(),
            json: false,
        }
    }
}

/// Changes levels while the process runs. Clones act on the same logger; when the last one is dropped, lines that still
/// wait are written, if somebody reads them.
#[derive(Clone)]
pub struct LogHandle {
    reload: reload::Handle<Targets, tracing_subscriber::Registry>,
    current: Arc<Mutex<String>>,
    _last_lines: Arc<LastLines>,
}

impl LogHandle {
    /// Replaces all levels; the text is as in [`LogOptions::levels`].
    pub fn set_levels(&self, levels: &str) -> Result<(), LogError> {
        let targets = parse_levels(levels)?;
        // Fails only when the subscriber is gone, that is at exit.
        let _ = self.reload.reload(targets);
        levels.clone_into(&mut self.current.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// The levels in force.
    pub fn levels(&self) -> String {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogHandle({})", self.levels())
    }
}

/// Installs the process-wide logger, writing to standard output from a thread of its own.
pub fn init(options: &LogOptions) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(parse_levels(&options.levels)?);
    let output = start(std::io::stdout()).map_err(|e| LogError::Thread(e.to_string()))?;
    let last_lines = LastLines(output.clone());
    let layer = IstioLayer {
        json: options.json,
        output,
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init()
        .map_err(|e| LogError::Initialised(e.to_string()))?;
    Ok(LogHandle {
        reload: handle,
        current: Arc::new(Mutex::new(options.levels.clone())),
        _last_lines: Arc::new(last_lines),
    })
}

/// The way to the writing thread. Whoever logs never waits: if nobody reads standard output, because the reader is stopped
/// or its disk is full, the pipe fills, and a worker that wrote into it would stand still with all of its connections.
fn start(mut sink: impl std::io::Write + Send + 'static) -> std::io::Result<Writer<String>> {
    Writer::start("log", QUEUE, move |work| {
        let line = match work {
            Work::Item(line) => line,
            Work::Lost(lines) => {
                let time = timestamp(OffsetDateTime::now_utc());
                format!("{time}\twarn\tlog\t{lines} lines were dropped, since nobody read the log\n")
            }
        };
        // A closed standard output is no reason to stop.
        let _ = sink.write_all(line.as_bytes());
    })
}

/// Writes what waits when the process ends.
struct LastLines(Writer<String>);

impl Drop for LastLines {
    fn drop(&mut self) {
        self.0.finish(LAST_LINES);
    }
}

fn parse_levels(text: &str) -> Result<Targets, LogError> {
    let mut default = LevelFilter::INFO;
    let mut scopes: Vec<(String, LevelFilter)> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (scope, level) = part.rsplit_once(':').unwrap_or(("default", part));
        let filter = match level {
            "none" | "off" => LevelFilter::OFF,
            "fatal" | "error" => LevelFilter::ERROR,
            "warn" | "warning" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            "debug" => LevelFilter::DEBUG,
            "trace" => LevelFilter::TRACE,
            _ => {
                return Err(LogError::Level {
                    scope: scope.to_owned(),
                    level: level.to_owned(),
                });
            }
        };
        match scope {
            "default" | "all" => default = filter,
            _ => scopes.push((scope.to_owned(), filter)),
        }
    }
    let mut targets = Targets::new().with_default(default);
    for noisy in NOISY {
        targets = targets.with_target(*noisy, default.min(LevelFilter::WARN));
    }
    for (scope, level) in scopes {
        targets = targets
            .with_target(format!("mantlet_{scope}"), level)
            .with_target(scope, level);
    }
    Ok(targets)
}

/// Formats and writes events.
struct IstioLayer {
    json: bool,
    output: Writer<String>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for IstioLayer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        self.output
            .send(format_event(event, OffsetDateTime::now_utc(), self.json));
    }
}

fn format_event(event: &Event<'_>, now: OffsetDateTime, json: bool) -> String {
    let level = match *event.metadata().level() {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let scope = scope_of(event.metadata().target());
    let time = timestamp(now);
    if json {
        let mut visitor = JsonVisitor::default();
        event.record(&mut visitor);
        let mut object = Map::new();
        object.insert("level".to_owned(), level.into());
        object.insert("time".to_owned(), time.into());
        object.insert("scope".to_owned(), scope.into());
        object.insert("msg".to_owned(), visitor.message.into());
        for (key, value) in visitor.fields {
            object.entry(key).or_insert(value);
        }
        return format!("{}\n", Value::Object(object));
    }
    let mut visitor = TextVisitor::default();
    event.record(&mut visitor);
    format!("{time}\t{level}\t{scope}\t{}{}\n", visitor.message, visitor.fields)
}

/// `mantlet_proxy::inbound` → `proxy`; a plain name stays.
fn scope_of(target: &str) -> &str {
    let first = target.split("::").next().unwrap_or(target);
    first.strip_prefix("mantlet_").unwrap_or(first)
}

fn timestamp(now: OffsetDateTime) -> String {
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
        now.microsecond()
    )
}

/// Line breaks and other controls in foreign text must not forge a log line.
fn push_clean(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

#[derive(Default)]
struct TextVisitor {
    message: String,
    fields: String,
}

impl Visit for TextVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            push_clean(&mut self.message, &text);
        } else {
            let _ = write!(self.fields, "\t{}=", field.name());
            push_clean(&mut self.fields, &text);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            push_clean(&mut self.message, value);
        } else {
            let _ = write!(self.fields, "\t{}=", field.name());
            push_clean(&mut self.fields, value);
        }
    }
}

#[derive(Default)]
struct JsonVisitor {
    message: String,
    fields: Vec<(String, Value)>,
}

impl JsonVisitor {
    fn push(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        } else {
            self.fields.push((field.name().to_owned(), value));
        }
    }
}

impl Visit for JsonVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Capture {
        lines: Arc<Mutex<Vec<String>>>,
        json: bool,
    }

    impl<S: Subscriber> Layer<S> for Capture {
        fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
            self.lines
                .lock()
                .unwrap()
                .push(format_event(event, OffsetDateTime::UNIX_EPOCH, self.json));
        }
    }

    fn capture(levels: &str, json: bool, emit: impl FnOnce(&dyn Fn(&str))) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (filter, handle) = reload::Layer::new(parse_levels(levels).unwrap());
        let subscriber = tracing_subscriber::registry().with(
            Capture {
                lines: lines.clone(),
                json,
            }
            .with_filter(filter),
        );
        tracing::subscriber::with_default(subscriber, || {
            emit(&|levels| handle.reload(parse_levels(levels).unwrap()).unwrap());
        });
        let lines = lines.lock().unwrap();
        lines.clone()
    }

    /// Whoever logs goes on while nobody reads; the reader learns later how much it missed.
    #[test]
    fn a_log_that_nobody_reads_holds_nobody_up() {
        let (read, write) = std::io::pipe().unwrap();
        let output = start(write).unwrap();
        let lines = 10 * QUEUE;
        for number in 0..lines {
            output.send(format!("{number} {}\n", "x".repeat(100)));
        }
        let mut got = 0;
        let mut missed = 0;
        for line in std::io::BufRead::lines(std::io::BufReader::new(read)) {
            let line = line.unwrap();
            match line.split_once("\tlog\t") {
                Some((_, note)) => missed += note.split(' ').next().unwrap().parse::<usize>().unwrap(),
                None => got += 1,
            }
            if got + missed == lines {
                break;
            }
        }
        assert!(got >= QUEUE && missed > 0, "{got} read, {missed} missed");
    }

    #[test]
    fn lines_look_like_istios() {
        let lines = capture("info", false, |_| {
            tracing::info!(target: "ads", proxy = "a.b", "push done");
            tracing::warn!("two\nlines");
        });
        assert_eq!(
            lines[0],
            "1970-01-01T00:00:00.000000Z\tinfo\tads\tpush done\tproxy=\"a.b\"\n".replace("\"a.b\"", "a.b")
        );
        assert_eq!(lines[1], "1970-01-01T00:00:00.000000Z\twarn\truntime\ttwo\\nlines\n");
    }

    #[test]
    fn json_lines_are_objects() {
        let lines = capture("info", true, |_| tracing::info!(target: "ca", n = 3, "signed"));
        let value: Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(value["scope"], "ca");
        assert_eq!(value["msg"], "signed");
        assert_eq!(value["n"], 3);
    }

    #[test]
    fn levels_change_at_run_time_and_per_scope() {
        let lines = capture("default:warn,ads:debug", false, |set| {
            tracing::info!(target: "ca", "not yet");
            tracing::debug!(target: "ads", "1");
            tracing::debug!(target: "h2", "never");
            set("default:debug");
            tracing::info!(target: "ca", "2");
            tracing::debug!(target: "h2", "never");
            set("none");
            tracing::error!(target: "ca", "silent");
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
    }

    #[test]
    fn unknown_levels_are_refused_with_the_choices() {
        let error = parse_levels("ads:loud").unwrap_err();
        assert!(
            error.to_string().contains("\"loud\"") && error.to_string().contains("debug"),
            "{error}"
        );
    }
}
