//! TCP chains: authorization when the first byte arrives, then bytes both ways until both sides are done.
//!
//! Called by `connection`. Half-closed connections stay half-closed: one side's end is passed on while the other flows.

use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use mantlet_model::authz::{Connection as AuthzConnection, Verdict};
use mantlet_model::ext_authz::Then;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::connection::{Chosen, Downstream};
use crate::ext_authz::{self, Outcome};
use crate::stream::{Stream, make_room};
use crate::telemetry::flags;
use crate::telemetry::record::ConnectionRecord;
use crate::upstream::{ActiveGuard, connect};

/// Bytes copied at a time. Large, since each turn costs two system calls and, with TLS, a record each 16 KiB.
const BUFFER: usize = 64 * 1024;
/// Idle time when a chain names none (S: one hour).
const DEFAULT_IDLE: Duration = Duration::from_secs(3600);

/// Runs a TCP connection to its end.
pub async fn serve(downstream: Rc<Downstream>, mut stream: Stream) {
    let Some(chosen) = downstream.chosen() else { return };
    let Some(manager) = chosen.chain.tcp() else { return };
    let worker = downstream.worker.clone();
    let record = ConnectionRecord::begin(&downstream, &chosen);

    let Some(cluster) = worker.upstreams.cluster(&manager.cluster) else {
        record.finish(flags::NO_CLUSTER, "cluster_not_found");
        return;
    };
    if cluster.active.get() >= cluster.model.limits.connections {
        record.finish(flags::UPSTREAM_OVERFLOW, "overflow");
        return;
    }
    let Some(endpoint) = cluster.choose(downstream.facts.destination, None) else {
        record.finish(flags::NO_HEALTHY_UPSTREAM, "no_healthy_upstream");
        return;
    };
    let _active = ActiveGuard::new(cluster.clone(), endpoint.clone());
    let tls = endpoint.tls.as_deref();
    let alpn = tls.map_or(&[][..], |t| &t.alpn[..]);
    let mut upstream = match connect::open(&worker, &cluster.model, endpoint.address, tls, alpn).await {
        Ok(upstream) => upstream,
        Err(error) => {
            record.upstream(&cluster, &endpoint);
            record.transport_failure(&error.to_string());
            record.finish(flags::UPSTREAM_CONNECTION_FAILURE, "upstream_connection_failure");
            return;
        }
    };

    endpoint.note_principal(&upstream);
    record.upstream(&cluster, &endpoint);
    // The decision waits for the client's first byte (S2.97); what the server says first may pass before.
    let mut first = BytesMut::new();
    if chosen.chain.has_authz || !chosen.chain.custom.is_empty() {
        let mut greeting = vec![0u8; 4096];
        loop {
            tokio::select! {
                biased;
                read = stream.read_buf(&mut first) => match read {
                    Ok(_) => break,
                    Err(_) => {
                        record.finish(flags::NONE, "-");
                        return;
                    }
                },
                read = upstream.read(&mut greeting) => match read {
                    Ok(0) | Err(_) => {
                        record.finish(flags::NONE, "-");
                        return;
                    }
                    Ok(n) => {
                        record.sent(n as u64);
                        if stream.write_all(&greeting[..n]).await.is_err() || stream.flush().await.is_err() {
                            record.finish(flags::NONE, "-");
                            return;
                        }
                    }
                },
                () = closing(&downstream) => {
                    record.finish(flags::NONE, "-");
                    return;
                }
            }
        }
        // The policies in force at this moment decide, not those at accept.
        let Some(mut chosen) = downstream.chosen() else { return };
        record.received(first.len() as u64);
        if !chosen.chain.custom.is_empty() {
            let refused = tokio::select! {
                asked = custom(&downstream, &chosen) => asked.err(),
                () = closing(&downstream) => Some(Refusal { flags: flags::NONE, details: "-".into() }),
            };
            if let Some(refusal) = refused {
                if refusal.details != "-" {
                    worker.shared.telemetry.denied_connection(&downstream, &refusal.details);
                }
                record.finish(refusal.flags, &refusal.details);
                let _ = stream.shutdown().await;
                return;
            }
            // Asking took time.
            match downstream.chosen() {
                Some(newest) => chosen = newest,
                None => return,
            }
        }
        let decision = chosen.chain.engine.decide(&authz_view(&downstream), None);
        worker.telemetry.tcp_decision(decision.verdict == Verdict::Allowed);
        worker.telemetry.tcp_trial(&decision);
        record.decision(&decision, chosen.chain.audits);
        if decision.verdict == Verdict::Denied {
            let details = format!("rbac_access_denied_matched_policy[{}]", decision.rule.unwrap_or("none"));
            worker.shared.telemetry.denied_connection(&downstream, &details);
            record.finish(flags::NONE, &details);
            let _ = stream.shutdown().await;
            return;
        }
        if first.is_empty() {
            // The client has nothing to say; its end is passed on below by the copy.
        } else {
            if upstream.write_all(&first).await.is_err() || upstream.flush().await.is_err() {
                record.finish(flags::UPSTREAM_CONNECTION_TERMINATION, "-");
                return;
            }
        }
    }

    // Let in, if only because nobody objected: a policy that comes later may.
    downstream.admitted.set(true);

    let idle = match manager.idle_timeout_ms {
        None => Some(DEFAULT_IDLE),
        Some(0) => None,
        Some(ms) => Some(Duration::from_millis(ms)),
    };
    let outcome = {
        let copy = relay(&mut stream, &mut upstream, &record, idle);
        tokio::select! {
            outcome = copy => outcome,
            () = closing(&downstream) => Relay::Ended,
        }
    };
    match outcome {
        Relay::Ended => record.finish(flags::NONE, "-"),
        Relay::Idle => record.finish(flags::STREAM_IDLE_TIMEOUT, "idle_timeout"),
    }
}

/// Why a connection was not let in.
struct Refusal {
    flags: u32,
    details: String,
}

/// The CUSTOM stages: those that apply deny, or ask their provider (S2.24, S2.146).
async fn custom(downstream: &Rc<Downstream>, chosen: &Chosen) -> Result<(), Refusal> {
    let telemetry = &downstream.worker.telemetry;
    for (engine, stage) in &chosen.chain.custom {
        let decision = engine.decide(&authz_view(downstream), None);
        if decision.verdict == Verdict::Allowed {
            continue;
        }
        let Then::Ask(provider) = &stage.then else {
            telemetry.tcp_decision(false);
            return Err(Refusal {
                flags: flags::NONE,
                details: decision.details().unwrap_or_default(),
            });
        };
        let refusal = |details: &str| Refusal {
            flags: flags::UNAUTHORIZED_EXTERNAL_SERVICE,
            details: details.into(),
        };
        match ext_authz::check_connection(downstream, provider).await {
            Outcome::Allowed(_) => telemetry.tcp_ext_authz.ok.inc(),
            Outcome::Denied(_) => {
                telemetry.tcp_ext_authz.denied.inc();
                return Err(refusal("ext_authz_denied"));
            }
            Outcome::Failed(failed) => {
                telemetry.tcp_ext_authz.error.inc();
                if failed.timeout {
                    telemetry.tcp_ext_authz.timeout.inc();
                }
                tracing::debug!(target: "ext_authz", "provider {}: {}", provider.provider, failed.reason);
                if !provider.fail_open {
                    return Err(refusal("ext_authz_error"));
                }
                telemetry.tcp_ext_authz.failure_mode_allowed.inc();
            }
        }
        downstream.asked.borrow_mut().push((**provider).clone());
    }
    Ok(())
}

/// What authorization sees of a connection.
pub fn authz_view(downstream: &Downstream) -> AuthzConnection<'_> {
    AuthzConnection {
        peer_uris: downstream.peer.as_ref().map_or(&[], |p| &p.uris),
        source: downstream.facts.source.ip(),
        remote: downstream.facts.source.ip(),
        destination: downstream.facts.destination,
        sni: downstream.facts.sni.as_deref(),
    }
}

async fn closing(downstream: &Rc<Downstream>) {
    std::future::poll_fn(|cx| {
        if downstream.control.poll(cx) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

enum Relay {
    Ended,
    Idle,
}

async fn relay(client: &mut Stream, server: &mut Stream, record: &ConnectionRecord, idle: Option<Duration>) -> Relay {
    let (mut client_read, mut client_write) = tokio::io::split(client);
    let (mut server_read, mut server_write) = tokio::io::split(server);
    let last = std::cell::Cell::new(tokio::time::Instant::now());
    let up = copy(&mut client_read, &mut server_write, |n| {
        last.set(tokio::time::Instant::now());
        record.received(n);
    });
    let down = copy(&mut server_read, &mut client_write, |n| {
        last.set(tokio::time::Instant::now());
        record.sent(n);
    });
    let both = async {
        // An error on one side ends both; an orderly end is passed on and waits for the other direction.
        let _ = tokio::try_join!(up, down);
    };
    let Some(idle) = idle else {
        both.await;
        return Relay::Ended;
    };
    let watchdog = async {
        while last.get().elapsed() < idle {
            tokio::time::sleep_until(last.get() + idle).await;
        }
    };
    tokio::select! {
        () = both => Relay::Ended,
        () = watchdog => Relay::Idle,
    }
}

/// Copies one direction; the buffer grows with the traffic, so that an idle connection stays small.
async fn copy<R, W>(from: &mut R, to: &mut W, count: impl Fn(u64)) -> std::io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut size = 8 * 1024;
    let mut buffer = BytesMut::new();
    loop {
        make_room(&mut buffer, size);
        let read = from.read_buf(&mut (&mut buffer).limit(size)).await?;
        if read == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        to.write_all(&buffer).await?;
        to.flush().await?;
        buffer.clear();
        count(read as u64);
        if read == size && size < BUFFER {
            size *= 2;
        }
    }
}
