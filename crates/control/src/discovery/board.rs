//! What every connected proxy was sent, accepted and refused: the data of `proxy-status`, `wait` and `config_dump`.
//!
//! Written by the hub (pushes) and by the streams (events), read by the debug endpoints. One short lock, no I/O under it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mantlet_model::query::{ProxyStatus, SyncState};
use mantlet_translate::node::ProxyNode;
use mantlet_xds::ResourceType;
use mantlet_xds::server::StreamEvent;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::watch;

use super::metrics::{PilotMetrics, StreamGuard};

/// Messages of refusals that are kept per proxy.
const MAX_ERRORS: usize = 5;
/// Characters of a refusal that are shown.
const MAX_ERROR_TEXT: usize = 2000;

/// Number of a stream, unique in a process.
pub type StreamId = u64;

/// The board.
#[derive(Clone)]
pub struct Board {
    inner: Arc<Mutex<BTreeMap<StreamId, Row>>>,
    /// Kind → highest resource version that was handed to the hub.
    seen: Arc<Mutex<BTreeMap<&'static str, u64>>>,
    metrics: PilotMetrics,
    identifier: Arc<str>,
    progress: watch::Sender<()>,
}

struct Row {
    node: Arc<ProxyNode>,
    connected: OffsetDateTime,
    /// Revision of the world that the last computed configuration is of.
    computed: u64,
    /// Revision that the proxy runs, as far as it has told.
    acked: u64,
    /// When it told so.
    acked_at: Option<OffsetDateTime>,
    /// When the last push was queued.
    pushed_at: Option<OffsetDateTime>,
    types: BTreeMap<ResourceType, TypeState>,
    errors: Vec<String>,
    _stream: StreamGuard,
}

#[derive(Default)]
struct TypeState {
    subscribed: bool,
    /// The last revision that changed this type, until the stream has looked at it: it may have nothing to send of it.
    waiting: Option<u64>,
    /// Nonce on its way.
    sent: Option<String>,
    refused: bool,
    answered: bool,
}

/// Where a proxy stands, in numbers.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Distribution {
    /// `pod.namespace`.
    pub proxy: String,
    /// Revision of its last computed configuration.
    pub computed: u64,
    /// Revision that it runs.
    pub acked: u64,
    /// When the last push was queued, RFC 3339.
    pub pushed_at: Option<String>,
    /// When it was accepted, RFC 3339.
    pub acked_at: Option<String>,
    /// When the stream was opened, RFC 3339.
    pub connected_at: String,
}

impl Board {
    /// An empty board of the control plane of this name.
    pub fn new(metrics: PilotMetrics, identifier: &str) -> Board {
        Board {
            inner: Arc::default(),
            seen: Arc::default(),
            metrics,
            identifier: identifier.into(),
            progress: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StreamId, Row>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The world has changed, whether or not a proxy has to hear of it.
    pub fn moved(&self) {
        self.progress.send_replace(());
    }

    /// A watch has handed an object of this version to the hub.
    pub fn saw(&self, what: &'static str, resource_version: Option<&str>) {
        // Versions are numbers in every API server there is, and comparable by contract since Kubernetes 1.35.
        if let Some(version) = resource_version.and_then(|version| version.parse::<u64>().ok()) {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let known = seen.entry(what).or_default();
            *known = version.max(*known);
        }
    }

    /// Kind → highest resource version that the hub was handed.
    pub fn seen(&self) -> BTreeMap<&'static str, u64> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A stream was admitted.
    pub fn opened(&self, id: StreamId, node: Arc<ProxyNode>) {
        let row = Row {
            _stream: self.metrics.stream(&node.version),
            node,
            connected: OffsetDateTime::now_utc(),
            computed: 0,
            acked: 0,
            acked_at: None,
            pushed_at: None,
            types: BTreeMap::new(),
            errors: Vec::new(),
        };
        self.lock().insert(id, row);
    }

    /// A stream ended.
    pub fn closed(&self, id: StreamId) {
        let gone = self.lock().remove(&id);
        self.progress.send_replace(());
        for kind in gone.iter().flat_map(Row::refused) {
            self.count_refusals(kind);
        }
    }

    /// The hub computed the configuration of a revision; `changed` are types that the stream has to send.
    pub fn computed(&self, id: StreamId, revision: u64, changed: &BTreeSet<ResourceType>) {
        let mut rows = self.lock();
        let Some(row) = rows.get_mut(&id) else { return };
        row.computed = revision;
        if !changed.is_empty() {
            row.pushed_at = Some(OffsetDateTime::now_utc());
        }
        for kind in changed {
            let state = row.types.entry(*kind).or_default();
            state.waiting = state.subscribed.then_some(revision);
        }
        row.settle();
        drop(rows);
        self.progress.send_replace(());
    }

    /// A revision of the world changes nothing for these proxies.
    pub fn unaffected(&self, ids: &[StreamId], revision: u64) {
        let mut rows = self.lock();
        for id in ids {
            if let Some(row) = rows.get_mut(id) {
                row.computed = revision;
                row.settle();
            }
        }
        drop(rows);
        self.progress.send_replace(());
    }

    /// How many proxies run at least `revision`, and how many there are.
    pub fn confirmed(&self, revision: u64) -> (usize, usize) {
        let rows = self.lock();
        (rows.values().filter(|row| row.acked >= revision).count(), rows.len())
    }

    /// Changes whenever an answer of [`Board::confirmed`] may have changed.
    pub fn progress(&self) -> watch::Receiver<()> {
        self.progress.subscribe()
    }

    /// An event of a stream.
    pub fn event(&self, id: StreamId, event: StreamEvent) {
        let mut rows = self.lock();
        let Some(row) = rows.get_mut(&id) else { return };
        let answered = match &event {
            StreamEvent::Acked { kind, .. } | StreamEvent::Nacked { kind, .. } => Some(*kind),
            _ => None,
        };
        let refused = |row: &Row| answered.is_some_and(|kind| row.types.get(&kind).is_some_and(|t| t.refused));
        let before = refused(row);
        match event {
            StreamEvent::Subscribed { kind } => {
                row.types.entry(kind).or_default().subscribed = true;
            }
            StreamEvent::Sent { kind, nonce, .. } => {
                row.types.entry(kind).or_default().sent = Some(nonce);
                self.metrics.pushed(kind);
            }
            StreamEvent::Acked { kind, nonce } => {
                let state = row.types.entry(kind).or_default();
                if state.sent.as_ref() == Some(&nonce) {
                    state.sent = None;
                }
                state.refused = false;
                state.answered = true;
                row.settle();
            }
            StreamEvent::Nacked { kind, nonce, message } => {
                let state = row.types.entry(kind).or_default();
                if state.sent.as_ref() == Some(&nonce) {
                    state.sent = None;
                }
                state.refused = true;
                state.answered = true;
                let text: String = message.chars().take(MAX_ERROR_TEXT).collect();
                tracing::warn!(target: "ads", "{}: ACK ERROR {} {text}", kind.short(), row.node.display_name());
                row.errors.push(format!("{}: {text}", kind.short()));
                if row.errors.len() > MAX_ERRORS {
                    row.errors.remove(0);
                }
                self.metrics.rejected(kind);
            }
            StreamEvent::Looked { revision, idle } => {
                for kind in idle {
                    let state = row.types.entry(kind).or_default();
                    state.waiting = state.waiting.filter(|waiting| *waiting > revision);
                }
                row.settle();
            }
            StreamEvent::UnknownType { url } => {
                tracing::debug!(target: "ads", "{} asks for unknown type {url}", row.node.display_name());
            }
            // The key resolver is told by the stream.
            StreamEvent::UnknownKeys { .. } | StreamEvent::Closed => {}
        }
        let changed = refused(row) != before;
        drop(rows);
        self.progress.send_replace(());
        if changed {
            answered.into_iter().for_each(|kind| self.count_refusals(kind));
        }
    }

    fn count_refusals(&self, kind: ResourceType) {
        let rows = self.lock();
        let refusing = rows.values().filter(|r| r.refused().any(|k| k == kind)).count();
        self.metrics.refusing(kind, refusing);
    }

    /// Rows of `proxy-status`, sorted by proxy.
    pub fn rows(&self) -> Vec<ProxyStatus> {
        let rows = self.lock();
        let mut out: Vec<ProxyStatus> = rows
            .values()
            .map(|row| {
                let state = |kind| row.types.get(&kind).map_or(SyncState::NotSent, TypeState::shown);
                ProxyStatus {
                    proxy: row.node.display_name(),
                    cluster: row.node.cluster.clone(),
                    cds: state(ResourceType::Cluster),
                    lds: state(ResourceType::Listener),
                    eds: state(ResourceType::Endpoints),
                    rds: state(ResourceType::Routes),
                    ecds: SyncState::NotSent,
                    istiod: self.identifier.to_string(),
                    version: row.node.version.clone(),
                    errors: row.errors.clone(),
                }
            })
            .collect();
        out.sort_by(|a, b| a.proxy.cmp(&b.proxy));
        out
    }

    /// Where every proxy stands, sorted by proxy.
    pub fn distribution(&self) -> Vec<Distribution> {
        let text = |t: OffsetDateTime| {
            t.format(&time::format_description::well_known::Rfc3339)
                .unwrap_or_default()
        };
        let rows = self.lock();
        let mut out: Vec<Distribution> = rows
            .values()
            .map(|row| Distribution {
                proxy: row.node.display_name(),
                computed: row.computed,
                acked: row.acked,
                pushed_at: row.pushed_at.map(text),
                acked_at: row.acked_at.map(text),
                connected_at: text(row.connected),
            })
            .collect();
        out.sort_by(|a, b| a.proxy.cmp(&b.proxy));
        out
    }
}

impl Row {
    /// Types that the proxy refuses at the moment.
    fn refused(&self) -> impl Iterator<Item = ResourceType> {
        self.types.iter().filter(|(_, t)| t.refused).map(|(kind, _)| *kind)
    }

    /// When nothing is on its way and nothing was refused, the proxy runs what was computed last.
    fn settle(&mut self) {
        let quiet = self
            .types
            .values()
            .all(|t| t.waiting.is_none() && t.sent.is_none() && !t.refused);
        let started = self.types.get(&ResourceType::Listener).is_some_and(|t| t.answered);
        if quiet && started && self.acked < self.computed {
            self.acked = self.computed;
            self.acked_at = Some(OffsetDateTime::now_utc());
        }
    }
}

impl TypeState {
    fn shown(&self) -> SyncState {
        if self.waiting.is_some() || self.sent.is_some() {
            SyncState::Stale
        } else if self.refused {
            SyncState::Error
        } else if self.answered {
            SyncState::Synced
        } else {
            SyncState::NotSent
        }
    }
}
