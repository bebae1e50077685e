//! When each key set is fetched, kept and dropped: a value that is told what happened and what time it is.
//!
//! The rules, per source and independent of every other source (S3.61–S3.65):
//!
//! * A source that is new is fetched at once, with one try. If that fails, a background attempt follows at once.
//! * A background attempt is up to [`TRIES`] tries, [`PAUSE`] apart, within the rule's timeout. If it fails, the next one is a minute later,
//!   then two, and so on up to an hour; after a success the interval is the usual one again.
//! * While fetches fail, the last good keys stay, but no longer than [`KEEP`].
//! * A proxy that met a token of an unknown key causes one extra try, not sooner than [`REFETCH`] after the last one. It moves no other time,
//!   so that strangers with made-up tokens neither delay nor multiply the regular fetches.
//! * A source that no rule names is not fetched, and forgotten after [`KEEP`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mantlet_identity::jws::{NO_KEYS, key_set_name};
use mantlet_translate::world::keys::KeySetNeed;
use mantlet_translate::world::{Effect, World};

use super::key_set::KeySet;
use super::{MAX_TIMEOUT, Source};

/// Tries of one background attempt.
pub const TRIES: u32 = 7;
/// Time between them.
pub const PAUSE: Duration = Duration::from_secs(1);
/// First wait after a failed attempt.
pub const BACKOFF: Duration = Duration::from_secs(60);
/// Longest wait after a failed attempt.
pub const MAX_BACKOFF: Duration = Duration::from_secs(3600);
/// How long keys live without use, or without a successful fetch.
pub const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// Least time between fetches that unknown keys cause.
pub const REFETCH: Duration = Duration::from_secs(10);
/// Most sources that are known at once. Beyond, new ones have no keys, and their tokens fail.
pub const MAX_SOURCES: usize = 4096;
/// Most fetches at once.
pub const MAX_RUNNING: usize = 256;
/// Most fetches at once from one server, so that one that never answers does not use up all places.
pub const MAX_PER_SERVER: usize = 4;

/// A fetch to be made now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// From where.
    pub source: Source,
    /// How long it may take.
    pub timeout: Duration,
}

/// What of a source changed for the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// The source.
    pub source: Source,
    /// Its keys now; `None` when there are none any more.
    pub keys: Option<KeySet>,
}

impl Update {
    /// Puts the keys into the world.
    pub fn apply(self, world: &mut World) -> Effect {
        world.set_key_set(&self.source.issuer, &self.source.jwks_uri, self.keys)
    }
}

/// A source, for the status page.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// Issuer.
    pub issuer: String,
    /// Address; empty for discovery.
    pub jwks_uri: String,
    /// Whether a rule names it.
    pub used: bool,
    /// Whether keys are held.
    pub keys: bool,
    /// Seconds since the last successful fetch.
    pub age_seconds: Option<u64>,
    /// Why the last fetch failed, if it did.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Entry {
    /// Whether a rule names it.
    needed: bool,
    timeout: Duration,
    /// Last time at which a rule named it.
    used: Instant,
    keys: Option<KeySet>,
    /// Name by which proxies speak of these keys.
    name: String,
    /// Last success.
    fetched: Option<Instant>,
    /// Whether its first try is over since it came into use.
    tried: bool,
    /// When the next regular try is due.
    due: Instant,
    /// When a try for an unknown key is due.
    probe: Option<Instant>,
    /// Start of the last try.
    started: Option<Instant>,
    running: Option<Running>,
    attempt: Option<Attempt>,
    backoff: Option<Duration>,
    error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Running {
    Regular,
    Probe,
}

/// A background attempt under way.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    tries: u32,
    end: Instant,
}

/// The schedule of all sources.
#[derive(Debug)]
pub struct Schedule {
    entries: BTreeMap<Source, Entry>,
    /// Name of the key set that proxies hold where there are no keys.
    no_keys: String,
    refresh: Duration,
    running: usize,
}

impl Schedule {
    /// No sources; good keys are fetched again after `refresh`.
    pub fn new(refresh: Duration) -> Schedule {
        Schedule {
            entries: BTreeMap::new(),
            no_keys: key_set_name(NO_KEYS.as_bytes()),
            refresh,
            running: 0,
        }
    }

    /// The rules' sources, all of them. Sources that are not listed are no longer used.
    pub fn need(&mut self, needs: &[KeySetNeed], now: Instant) {
        let listed: BTreeSet<Source> = needs.iter().map(source_of).collect();
        for (source, entry) in &mut self.entries {
            if entry.needed && !listed.contains(source) {
                entry.needed = false;
                entry.used = now;
            }
        }
        for need in needs {
            if let Some(entry) = self.enter(need, now) {
                entry.needed = true;
                entry.timeout = need.timeout.min(MAX_TIMEOUT);
            }
        }
    }

    /// A source that a rule is about to name.
    pub fn announce(&mut self, need: &KeySetNeed, now: Instant) {
        if let Some(entry) = self.enter(need, now)
            && !entry.needed
        {
            entry.timeout = need.timeout.min(MAX_TIMEOUT);
        }
    }

    /// The entry of a source; `None` when there are too many.
    fn enter(&mut self, need: &KeySetNeed, now: Instant) -> Option<&mut Entry> {
        let source = source_of(need);
        if !self.entries.contains_key(&source) && self.entries.len() >= MAX_SOURCES {
            let unused = self.entries.iter().filter(|(_, e)| !e.needed && e.running.is_none());
            let oldest = unused.min_by_key(|(_, e)| e.used).map(|(s, _)| s.clone());
            self.entries.remove(&oldest?);
        }
        let refresh = self.refresh;
        let entry = self.entries.entry(source).or_insert_with(|| Entry {
            needed: false,
            timeout: need.timeout.min(MAX_TIMEOUT),
            used: now,
            keys: None,
            name: String::new(),
            fetched: None,
            tried: false,
            due: now,
            probe: None,
            started: None,
            running: None,
            attempt: None,
            backoff: None,
            error: None,
        });
        // Keys that aged while nobody used them are as good as none: they are asked for before they count.
        let aged = entry.fetched.is_none_or(|at| now >= at + refresh);
        let rested = entry.started.is_none_or(|at| now >= at + REFETCH);
        if !entry.needed && entry.running.is_none() && aged && rested {
            entry.tried = false;
            entry.attempt = None;
            entry.backoff = None;
            entry.due = now;
        }
        entry.used = now;
        Some(entry)
    }

    /// Whether the first try of a source is over (or will never be made).
    pub fn settled(&self, source: &Source) -> bool {
        self.entries.get(source).is_none_or(|e| e.tried)
    }

    /// A proxy that holds the key set of this name met a token of a key that is not in it. Sources without keys are meant when it
    /// holds what stands in for them.
    pub fn unknown_key(&mut self, held: &str, now: Instant) {
        let no_keys = self.no_keys == held;
        for entry in self.entries.values_mut().filter(|e| e.needed && e.probe.is_none()) {
            let meant = match &entry.keys {
                Some(_) => entry.name == held,
                None => no_keys,
            };
            if meant {
                let earliest = entry.started.map_or(now, |at| at + REFETCH);
                entry.probe = Some(earliest.max(now));
            }
        }
    }

    /// All sources.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        self.entries.keys()
    }

    /// The fetches that are due. Each is under way until [`Schedule::finished`].
    pub fn start(&mut self, now: Instant) -> Vec<Job> {
        let mut busy: BTreeMap<String, usize> = BTreeMap::new();
        for (source, _) in self.entries.iter().filter(|(_, e)| e.running.is_some()) {
            *busy.entry(server(source)).or_default() += 1;
        }
        // The longest waiting first, so that nobody waits forever behind others.
        let mut due: Vec<(Instant, Source)> = self
            .entries
            .iter()
            .filter_map(|(source, e)| Some((e.next()?, source.clone())))
            .filter(|(at, _)| *at <= now)
            .collect();
        due.sort();
        let mut out = Vec::new();
        for (_, source) in due {
            if self.running >= MAX_RUNNING {
                break;
            }
            let places = busy.entry(server(&source)).or_default();
            let Some(entry) = self.entries.get_mut(&source).filter(|_| *places < MAX_PER_SERVER) else {
                continue;
            };
            *places += 1;
            self.running += 1;
            entry.started = Some(now);
            // Any try answers what an unknown key asks.
            entry.probe = None;
            let mut timeout = entry.timeout;
            if entry.regular().is_some_and(|at| at <= now) {
                entry.running = Some(Running::Regular);
                if entry.tried {
                    let attempt = entry.attempt.get_or_insert(Attempt {
                        tries: 0,
                        end: now + timeout,
                    });
                    timeout = attempt.end.saturating_duration_since(now).max(Duration::from_millis(1));
                }
            } else {
                entry.running = Some(Running::Probe);
            }
            out.push(Job { source, timeout });
        }
        out
    }

    /// When [`Schedule::start`] or [`Schedule::sweep`] has something to do next; what waits for a place is not counted.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        let waiting = self.entries.values().filter_map(Entry::next).filter(|at| *at > now);
        let ends = self
            .entries
            .values()
            .filter(|e| e.running.is_none())
            .flat_map(Entry::end);
        waiting.chain(ends).min()
    }

    /// A fetch came to its end.
    pub fn finished(&mut self, source: &Source, result: Result<KeySet, String>, now: Instant) -> Option<Update> {
        self.running = self.running.saturating_sub(1);
        let refresh = self.refresh;
        let entry = self.entries.get_mut(source)?;
        let running = entry.running.take()?;
        match result {
            Ok(keys) => {
                entry.tried = true;
                entry.attempt = None;
                entry.backoff = None;
                entry.error = None;
                entry.fetched = Some(now);
                entry.due = now + refresh;
                (entry.keys.as_ref() != Some(&keys)).then(|| {
                    entry.name = key_set_name(keys.as_bytes());
                    entry.keys = Some(keys.clone());
                    Update {
                        source: source.clone(),
                        keys: Some(keys),
                    }
                })
            }
            Err(error) => {
                entry.error = Some(error);
                if running == Running::Regular {
                    entry.failed(now);
                }
                None
            }
        }
    }

    /// Drops keys that are too old and sources that nobody uses.
    pub fn sweep(&mut self, now: Instant) -> Vec<Update> {
        let mut out = Vec::new();
        let over: Vec<Source> = self
            .entries
            .iter()
            .filter(|(_, e)| e.running.is_none() && e.end().any(|at| at <= now))
            .map(|(s, _)| s.clone())
            .collect();
        for source in over {
            let Some(entry) = self.entries.get_mut(&source) else {
                continue;
            };
            if entry.keys.take().is_some() {
                entry.fetched = None;
                out.push(Update {
                    source: source.clone(),
                    keys: None,
                });
            }
            if !entry.needed {
                self.entries.remove(&source);
            }
        }
        out
    }

    /// For the status page.
    pub fn rows(&self, now: Instant) -> Vec<Row> {
        let row = |(source, e): (&Source, &Entry)| Row {
            issuer: source.issuer.clone(),
            jwks_uri: source.jwks_uri.clone(),
            used: e.needed,
            keys: e.keys.is_some(),
            age_seconds: e.fetched.map(|at| now.saturating_duration_since(at).as_secs()),
            error: e.error.clone(),
        };
        self.entries.iter().map(row).collect()
    }
}

impl Entry {
    /// When the next regular try is due; an unused source gets its announced first try only.
    fn regular(&self) -> Option<Instant> {
        (self.needed || !self.tried).then_some(self.due)
    }

    /// When it is to be fetched next.
    fn next(&self) -> Option<Instant> {
        if self.running.is_some() {
            return None;
        }
        let probe = self.probe.filter(|_| self.needed);
        self.regular().into_iter().chain(probe).min()
    }

    /// When it must be looked at by the sweep.
    fn end(&self) -> impl Iterator<Item = Instant> + use<> {
        let unused = (!self.needed).then_some(self.used + KEEP);
        let stale = self.fetched.filter(|_| self.keys.is_some()).map(|at| at + KEEP);
        unused.into_iter().chain(stale)
    }

    /// A regular try failed.
    fn failed(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.tried, true) {
            self.due = now;
            return;
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.tries += 1;
            if attempt.tries < TRIES && now + PAUSE < attempt.end {
                self.due = now + PAUSE;
                return;
            }
        }
        self.attempt = None;
        let wait = self.backoff.map_or(BACKOFF, |b| (b * 2).min(MAX_BACKOFF));
        self.backoff = Some(wait);
        self.due = now + wait;
    }
}

/// The source of a need.
pub fn source_of(need: &KeySetNeed) -> Source {
    Source {
        issuer: need.issuer.clone(),
        jwks_uri: need.jwks_uri.clone(),
    }
}

/// Scheme, host and port of where a source is fetched first.
fn server(source: &Source) -> String {
    let uri = if source.jwks_uri.is_empty() {
        &source.issuer
    } else {
        &source.jwks_uri
    };
    let after = uri.find("://").map_or(0, |at| at + 3);
    let end = uri[after..].find(['/', '?', '#']).map_or(uri.len(), |at| after + at);
    uri[..end].to_ascii_lowercase()
}

#[cfg(test)]
mod tests;
