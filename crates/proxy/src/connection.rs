//! A new connection: original destination → listener → inspection → filter chain → TLS → its work.
//!
//! Called by `worker` for every accepted socket, whatever its direction. It decides nothing about requests.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use mantlet_identity::PeerCertificate;
use mantlet_model::authz::{Engine, Verdict};
use mantlet_model::ext_authz::{ExtAuthz, Then};
use mantlet_model::listener::{ConnectionFacts, Transport};
use mantlet_model::names::VIRTUAL_INBOUND;
use mantlet_net::sockopt::reset_on_close;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::StartHandshake;

use crate::config::{Chain, CompiledListener, Config};
use crate::http::life::{Fate, Life};
use crate::on_demand::{self, Held, Usage};
use crate::sniff::{self, Inspect, Kind};
use crate::stream::{ReadAhead, Stream};
use crate::telemetry::exchange::PeerLabels;
use crate::telemetry::record::ConnectionRecord;
use crate::worker::{Control, Phase, Worker};
use crate::{http, tcp};

/// What is known of a connection after inspection; a chain can be chosen anew from it when the configuration changes.
pub struct Facts {
    /// Name of the listener that accepted it.
    listener: Rc<str>,
    /// Original destination.
    pub destination: SocketAddr,
    /// Address of the TCP peer.
    pub source: SocketAddr,
    /// Transport found.
    transport: Transport,
    /// Server name of the ClientHello.
    pub sni: Option<String>,
    /// Application protocols found.
    protocols: Vec<String>,
}

impl Facts {
    /// Of a connection that was not looked into.
    fn unseen(listener: &Rc<str>, destination: SocketAddr, source: SocketAddr) -> Facts {
        Facts {
            listener: listener.clone(),
            destination,
            source,
            transport: Transport::Raw,
            sni: None,
            protocols: Vec::new(),
        }
    }

    fn view(&self) -> ConnectionFacts<'_> {
        ConnectionFacts {
            destination: self.destination,
            transport: self.transport,
            server_name: self.sni.as_deref(),
            application_protocols: &self.protocols,
        }
    }
}

/// The peer as its verified certificate shows it.
pub struct Peer {
    /// URI names; exactly one for mesh peers.
    pub uris: Vec<String>,
    /// The leaf.
    pub certificate: PeerCertificate,
}

/// A chain with the configuration that it belongs to.
pub struct Chosen {
    /// The whole configuration.
    pub config: Rc<Arc<Config>>,
    /// The chain.
    pub chain: Arc<Chain>,
    /// Its listener.
    pub listener: Arc<CompiledListener>,
}

/// A connection whose chain is known.
pub struct Downstream {
    /// Its worker.
    pub worker: Rc<Worker>,
    /// What inspection found.
    pub facts: Facts,
    /// The peer's certificate, if mTLS was terminated.
    pub peer: Option<Peer>,
    /// Own identity on this connection (`By=` of XFCC).
    pub own_uri: Option<String>,
    /// Whether TLS was terminated.
    pub tls: Option<TlsFacts>,
    /// When it was accepted.
    pub started: Instant,
    /// Asks the connection to end.
    pub control: Control,
    /// What it does, if it is HTTP.
    pub life: Life,
    /// Whether authorization has let a TCP connection in.
    pub admitted: Cell<bool>,
    /// External authorizers that let a TCP connection in.
    pub asked: RefCell<Vec<ExtAuthz>>,
    /// Whether the peer is a Mantlet proxy that puts the requests of many clients on this connection, and has been told who
    /// this workload is.
    pub shared_by: RefCell<Option<Shared>>,
    /// The request that has made the connection a tunnel, or may.
    pub tunnel: RefCell<Option<Box<http::upgrade::Asked>>>,
    chosen: RefCell<Option<Rc<Chosen>>>,
    /// Keeps the listener in use.
    _held: Option<Held>,
}

/// What the two proxies of a shared connection have said about themselves: once, not with every request.
#[derive(Default)]
pub struct Shared {
    /// The workload behind the peer.
    pub peer: Option<Rc<PeerLabels>>,
    /// Whether a response has carried this workload's metadata.
    pub told: bool,
}

/// What the handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// Whether HTTP/2 was negotiated; `None` if no protocol was.
    pub h2: Option<bool>,
}

impl Downstream {
    /// Whether a TCP connection or tunnel that was let in would be denied now. Requests are decided one by one; these may
    /// live for days, and must not outlive their permission.
    fn revoked(&self) -> bool {
        let Some(chosen) = self.chosen() else { return true };
        if let Some(tunnel) = &*self.tunnel.borrow() {
            return tunnel.denied(self, &chosen.chain);
        }
        if !self.admitted.get() || chosen.chain.tcp().is_none() {
            return false;
        }
        let denied = |engine: &Engine| engine.decide(&tcp::authz_view(self), None).verdict == Verdict::Denied;
        // Who was not asked, or would be asked otherwise now, has not let it in.
        let unasked = |then: &Then| match then {
            Then::Deny => true,
            Then::Ask(provider) => !self.asked.borrow().contains(provider),
        };
        let custom = &chosen.chain.custom;
        custom
            .iter()
            .any(|(engine, stage)| unasked(&stage.then) && denied(engine))
            || (chosen.chain.has_authz && denied(&chosen.chain.engine))
    }

    /// The chain in force now; `None` when the configuration has none for this connection any more.
    pub fn chosen(&self) -> Option<Rc<Chosen>> {
        self.chosen.borrow().clone()
    }
}

impl crate::worker::Connection for Downstream {
    fn sweep(&self, now: Instant, full: bool) {
        match self.life.sweep(now, &self.worker.shared.tuning, full) {
            Fate::Stay => {}
            Fate::Finish => self.control.close(),
            Fate::End => self.control.abort(),
        }
    }

    fn changed(&self, phase: Phase) {
        let old = self.chosen.borrow().clone();
        let Some(old) = old else { return };
        let config = self.worker.config();
        if config.version != old.config.version {
            let new = find(&config, &self.facts).filter(|(_, chain)| same_kind(&old.chain, chain));
            // Removed chains are drained at once (S1.56): what was allowed is no more.
            let gone = new.is_none();
            *self.chosen.borrow_mut() = new.map(|(listener, chain)| {
                Rc::new(Chosen {
                    config,
                    chain,
                    listener,
                })
            });
            if gone || self.revoked() {
                self.control.close();
            }
        }
        if phase >= Phase::Draining && self.tls.is_some_and(|t| t.h2 == Some(true)) {
            // GOAWAY loses no stream; HTTP/1.1 connections end with their next answer instead.
            self.control.close();
        }
    }
}

/// Whether a live connection can go on under another chain: the bytes on the wire must mean the same.
fn same_kind(old: &Chain, new: &Chain) -> bool {
    old.model.tls == new.model.tls && old.http().is_some() == new.http().is_some()
}

fn find(config: &Config, facts: &Facts) -> Option<(Arc<CompiledListener>, Arc<Chain>)> {
    let listener = listener_of(config, &facts.listener, facts.destination)?;
    let chain = listener.choose(&facts.view())?.clone();
    Some((listener, chain))
}

fn listener_of(config: &Config, name: &str, destination: SocketAddr) -> Option<Arc<CompiledListener>> {
    let accepted = config.listeners.get(name)?;
    let owner = if accepted.model.use_original_dst {
        config.listener_for(destination).unwrap_or(accepted)
    } else {
        accepted
    };
    Some(owner.clone())
}

/// Runs a connection to its end.
pub async fn handle(worker: Rc<Worker>, listener: &Rc<str>, tcp: TcpStream, source: SocketAddr) {
    let started = Instant::now();
    let _ = tcp.set_nodelay(true);
    let Ok(local) = tcp.local_addr() else { return };
    let destination = unmap((worker.shared.destination_of)(&tcp).unwrap_or(local));
    let source = unmap(source);
    let config = worker.config();
    let captured = config
        .listeners
        .get(&**listener)
        .is_some_and(|l| l.model.use_original_dst);
    if captured && on_demand::listener(&worker, destination).await.is_err() {
        // It is the mesh's, and nobody says how to reach it: never as it came.
        if let Some(accepted) = worker.config().listeners.get(&**listener) {
            let facts = Facts::unseen(listener, destination, source);
            ConnectionRecord::refused(&worker, accepted, &facts, started, "on_demand_timeout");
        }
        refuse(&tcp);
        return;
    }
    let config = worker.config();
    let Some(owner) = listener_of(&config, listener, destination) else {
        refuse(&tcp);
        return;
    };
    let held = owner.usage.as_ref().map(Usage::hold);

    let inspect = Inspect {
        tls: owner.model.tls_inspector.covers(destination.port()),
        http: owner.model.http_inspector.covers(destination.port()),
    };
    let mut tcp = tcp;
    let mut buffer = BytesMut::new();
    let limit = match owner.model.detection_timeout_ms {
        // For ever, says Istio; a client that is silent or slow would hold its place for ever (threats 73, 74).
        0 => worker.shared.tuning.header_timeout,
        ms => Duration::from_millis(ms),
    };
    let kind = match tokio::time::timeout(limit, sniff::sniff(&mut tcp, inspect, &mut buffer)).await {
        Ok(kind) => kind,
        // A server-first protocol: goes on as raw bytes (S1.46).
        Err(_) => Ok(Kind::Raw),
    };
    let Ok(kind) = kind else { return };
    let (transport, sni, protocols, accepted) = match kind {
        Kind::Tls {
            accepted,
            server_name,
            alpn,
        } => (Transport::Tls, server_name, alpn, accepted),
        Kind::Http1(name) => (Transport::Raw, None, vec![name.to_string()], None),
        Kind::Http2 => (Transport::Raw, None, vec!["h2c".to_string()], None),
        Kind::Raw => (Transport::Raw, None, Vec::new(), None),
    };
    let facts = Facts {
        listener: listener.clone(),
        destination,
        source,
        transport,
        sni,
        protocols,
    };
    // Inspection may have taken long; the newest configuration decides.
    let config = worker.config();
    let Some((owner, chain)) = find(&config, &facts) else {
        ConnectionRecord::refused(&worker, &owner, &facts, started, "filter_chain_not_found");
        refuse(&tcp);
        return;
    };

    let (mut stream, peer, own_uri, tls) = match (&chain.model.tls, accepted) {
        (None, _) => (Stream::plain(tcp, buffer.freeze()), None, None, None),
        (Some(context), accepted) => {
            let accepted = match accepted {
                Some(accepted) => *accepted,
                // Either the inspector did not run on this listener, or rustls could not read the hello.
                None => match read_hello(&worker, &mut tcp, &buffer).await {
                    Some(accepted) => accepted,
                    None => return,
                },
            };
            match handshake(&worker, context, accepted, tcp).await {
                Ok(done) => done,
                Err(reason) => {
                    ConnectionRecord::handshake_failed(&worker, &owner, &chain, &facts, started, &reason);
                    return;
                }
            }
        }
    };

    let is_http = chain.http().is_some();
    let h2 = match (is_http, tls.and_then(|t: TlsFacts| t.h2), facts.protocols.first()) {
        (false, ..) => false,
        (true, Some(h2), _) => h2,
        (true, None, Some(found)) if tls.is_none() => found == "h2c",
        (true, ..) => {
            let mut seen = BytesMut::new();
            let limit = worker.shared.tuning.header_timeout;
            match tokio::time::timeout(limit, sniff::is_http2(&mut stream, &mut seen)).await {
                Ok(Ok(h2)) => {
                    stream.unread(seen.freeze());
                    h2
                }
                _ => return,
            }
        }
    };
    if tls.is_none() && &*facts.listener == VIRTUAL_INBOUND {
        let telemetry = &worker.shared.telemetry;
        telemetry.plaintext.remember(facts.source, facts.destination.port());
    }
    let downstream = Rc::new(Downstream {
        worker: worker.clone(),
        facts,
        peer,
        own_uri,
        tls: tls.map(|t| TlsFacts { h2: t.h2.or(Some(h2)) }),
        started,
        control: Control::default(),
        life: Life::default(),
        admitted: Cell::new(false),
        asked: RefCell::default(),
        shared_by: RefCell::default(),
        tunnel: RefCell::default(),
        chosen: RefCell::new(Some(Rc::new(Chosen {
            config,
            chain,
            listener: owner,
        }))),
        _held: held,
    });
    let weak: Weak<dyn crate::worker::Connection> =
        Rc::downgrade(&(downstream.clone() as Rc<dyn crate::worker::Connection>));
    worker.register(weak);
    // A change may have come while the handshake ran.
    crate::worker::Connection::changed(&*downstream, worker.phase());
    if is_http {
        http::serve(downstream, stream, h2).await;
    } else {
        tcp::serve(downstream, stream).await;
    }
}

/// Plaintext at a STRICT port: the peer sees a reset, as with Envoy (S1.42).
fn refuse(tcp: &TcpStream) {
    let _ = reset_on_close(tcp);
}

fn unmap(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

async fn read_hello(worker: &Rc<Worker>, tcp: &mut TcpStream, seen: &BytesMut) -> Option<rustls::server::Accepted> {
    if !seen.is_empty() {
        // Already read and not understood: not a ClientHello that this end can answer.
        return None;
    }
    let only_tls = Inspect { tls: true, http: false };
    let mut buffer = BytesMut::new();
    let limit = worker.shared.tuning.handshake_timeout;
    match tokio::time::timeout(limit, sniff::sniff(tcp, only_tls, &mut buffer)).await {
        Ok(Ok(Kind::Tls {
            accepted: Some(accepted),
            ..
        })) => Some(*accepted),
        _ => None,
    }
}

/// Ends a connection so that the peer can still read the alert: a close with bytes unread would be a reset, which
/// throws the alert away.
async fn linger(mut tcp: ReadAhead) {
    let _ = tcp.shutdown().await;
    let mut rest = [0u8; 1024];
    let drain = async { while tcp.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), drain).await;
}

type Secured = (Stream, Option<Peer>, Option<String>, Option<TlsFacts>);

async fn handshake(
    worker: &Rc<Worker>,
    context: &mantlet_model::tls::ServerTls,
    accepted: rustls::server::Accepted,
    tcp: TcpStream,
) -> Result<Secured, String> {
    let start = StartHandshake::from_parts(accepted, ReadAhead::new(tcp));
    let made = worker.tls.borrow_mut().server(&worker.shared.secrets, context);
    let tls = match made {
        Ok(tls) => tls,
        Err(error) => {
            // S4.118: a listener without its secret resets connections.
            return Err(error.to_string());
        }
    };
    let own_uri = worker
        .shared
        .secrets
        .load()
        .identity
        .as_ref()
        .and_then(|i| i.spiffe_id())
        .map(|id| id.as_str().to_string());
    let config = tls.for_client(start.client_hello().alpn());
    let limit = worker.shared.tuning.handshake_timeout;
    let stream = match tokio::time::timeout(limit, start.into_stream(config).into_fallible()).await {
        Ok(Ok(stream)) => stream,
        Ok(Err((error, tcp))) => {
            tokio::task::spawn_local(linger(tcp));
            return Err(crate::upstream::connect::tls_reason(&error));
        }
        Err(_) => return Err("handshake timeout".to_string()),
    };
    let connection = stream.get_ref().1;
    let h2 = connection.alpn_protocol().and_then(|p| match p {
        b"h2" => Some(true),
        b"http/1.1" => Some(false),
        _ => None,
    });
    let peer = match connection.peer_certificates().and_then(|chain| chain.first()) {
        None => None,
        Some(leaf) => {
            let certificate = PeerCertificate::parse(leaf).map_err(|e| e.to_string())?;
            // The verifier has checked trust domains; finer lists are checked here (S1.25).
            let sans = &context.client_sans;
            let mut names = certificate.uris.iter().chain(&certificate.dns_names);
            if !sans.is_empty() && !names.any(|name| sans.iter().any(|san| san.matches(name))) {
                return Err("client certificate's names are not accepted".to_string());
            }
            Some(Peer {
                uris: certificate.uris.clone(),
                certificate,
            })
        }
    };
    if peer.is_none() && context.require_client_certificate {
        return Err("peer did not return a certificate".to_string());
    }
    Ok((Stream::server(stream), peer, own_uri, Some(TlsFacts { h2 })))
}
