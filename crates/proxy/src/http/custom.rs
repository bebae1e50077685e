//! CUSTOM authorization of a request: which stages apply, what their providers are shown, what becomes of the answers.
//!
//! One step of [`super::request`], before everything that looks at tokens (S2.22): the changes that a provider asks for are
//! seen by all later steps.

use std::cell::Cell;

use http::StatusCode;
use http::uri::PathAndQuery;
use mantlet_model::authz::{Connection as AuthzConnection, Verdict};
use mantlet_model::ext_authz::{BodyInCheck, ExtAuthz, Then};

use super::body::{ReadAhead, RequestBody};
use super::reply::Reply;
use super::request::{Exchange, View};
use crate::ext_authz::{self, Changes, Outcome, ShownBody};
use crate::telemetry::flags;
use crate::telemetry::record::Account;

/// Most bytes of bodies that one worker holds for providers at once; requests beyond are turned away, so that
/// providers that never answer cannot fill the memory.
const MAX_HELD: usize = 64 << 20;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// A share of the memory for bodies, given back when dropped.
struct Share(usize);

impl Share {
    fn take(bytes: usize) -> Option<Share> {
        HELD.with(|held| {
            let sum = held.get().checked_add(bytes).filter(|sum| *sum <= MAX_HELD)?;
            held.set(sum);
            Some(Share(bytes))
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        HELD.with(|held| held.set(held.get().saturating_sub(self.0)));
    }
}

/// Runs the stages; the first refusal ends the request.
///
/// # Errors
/// The answer to give.
pub async fn authorize(exchange: &mut Exchange, body: &mut RequestBody, account: &mut Account) -> Result<(), Reply> {
    let chosen = exchange.chosen.clone();
    for (engine, stage) in &chosen.chain.custom {
        let downstream = exchange.downstream.clone();
        let connection = AuthzConnection {
            peer_uris: downstream.peer.as_ref().map_or(&[], |p| &p.uris),
            source: downstream.facts.source.ip(),
            remote: exchange.remote,
            destination: downstream.facts.destination,
            sni: downstream.facts.sni.as_deref(),
        };
        // The rules are a DENY filter: "denied" says that the stage applies to this request.
        let decision = engine.decide(&connection, Some(&View::of(exchange)));
        if decision.verdict == Verdict::Allowed {
            continue;
        }
        let details = decision.details().unwrap_or_default();
        let id = decision.rule.unwrap_or_default();
        match &stage.then {
            Then::Deny => {
                downstream.worker.telemetry.http_decision(false);
                downstream.worker.shared.telemetry.denied_request(exchange, &details);
                account.denied = true;
                return Err(Reply::new(
                    StatusCode::FORBIDDEN,
                    "RBAC: access denied",
                    details,
                    flags::NONE,
                ));
            }
            Then::Ask(provider) => {
                account.note_custom(id);
                ask(exchange, provider, body, account).await?;
            }
        }
    }
    Ok(())
}

async fn ask(
    exchange: &mut Exchange,
    provider: &ExtAuthz,
    body: &mut RequestBody,
    account: &mut Account,
) -> Result<(), Reply> {
    let mut share = None;
    let shown = match provider.body {
        // What follows a protocol switch has no end that could be waited for (S2.159).
        Some(settings) if !exchange.switching() => show(exchange, settings, body, &mut share).await?,
        _ => None,
    };
    let outcome = ext_authz::check_request(exchange, provider, shown).await;
    let telemetry = &exchange.downstream.worker.telemetry;
    match outcome {
        Outcome::Allowed(changes) => {
            telemetry.ext_authz.ok.inc();
            change(exchange, changes)
        }
        Outcome::Denied(denial) => {
            telemetry.ext_authz.denied.inc();
            refuse(exchange, account, "ext_authz_denied");
            let mut reply = Reply::new(
                denial.status,
                denial.body,
                "ext_authz_denied",
                flags::UNAUTHORIZED_EXTERNAL_SERVICE,
            );
            reply.headers = denial.headers;
            Err(reply)
        }
        Outcome::Failed(failed) => {
            telemetry.ext_authz.error.inc();
            if failed.timeout {
                telemetry.ext_authz.timeout.inc();
            }
            tracing::debug!(target: "ext_authz", "provider {}: {}", provider.provider, failed.reason);
            if provider.fail_open {
                telemetry.ext_authz.failure_mode_allowed.inc();
                return Ok(());
            }
            refuse(exchange, account, "ext_authz_error");
            if let Some(answer) = failed.answer {
                let mut reply = Reply::new(
                    answer.status,
                    answer.body,
                    "ext_authz_error",
                    flags::UNAUTHORIZED_EXTERNAL_SERVICE,
                );
                reply.headers = answer.headers;
                return Err(reply);
            }
            let status = provider
                .status_on_error
                .and_then(|code| StatusCode::from_u16(code).ok())
                .unwrap_or(StatusCode::FORBIDDEN);
            Err(Reply::new(
                status,
                "",
                "ext_authz_error",
                flags::UNAUTHORIZED_EXTERNAL_SERVICE,
            ))
        }
    }
}

fn refuse(exchange: &Exchange, account: &mut Account, details: &str) {
    exchange
        .downstream
        .worker
        .shared
        .telemetry
        .denied_request(exchange, details);
    account.denied = true;
}

/// Reads the body as far as the provider sees it.
async fn show(
    exchange: &mut Exchange,
    settings: BodyInCheck,
    body: &mut RequestBody,
    share: &mut Option<Share>,
) -> Result<Option<ShownBody>, Reply> {
    if body.is_empty() {
        return Ok(None);
    }
    let max = settings.max_bytes as usize;
    // A length that is told in advance needs no more than itself.
    let told = usize::try_from(hyper::body::Body::size_hint(body).upper().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    if told != usize::MAX && told > max && !settings.allow_partial {
        return Err(too_large(exchange));
    }
    *share = Share::take(told.min(max));
    if share.is_none() {
        return Err(Reply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "overflow",
            "ext_authz_error",
            flags::UNAUTHORIZED_EXTERNAL_SERVICE,
        ));
    }
    let patience = exchange.downstream.worker.shared.tuning.header_timeout;
    match body.read_ahead(max, patience).await {
        Ok(ReadAhead::Whole(bytes)) => Ok(Some(ShownBody { bytes, partial: false })),
        Ok(ReadAhead::Part(bytes)) if settings.allow_partial => Ok(Some(ShownBody { bytes, partial: true })),
        // Also with failOpen: what was not shown was not judged (S2.158).
        Ok(ReadAhead::Part(_)) => Err(too_large(exchange)),
        Err(None) => Err(Reply::new(
            StatusCode::REQUEST_TIMEOUT,
            "stream timeout",
            "stream_idle_timeout",
            flags::STREAM_IDLE_TIMEOUT,
        )),
        Err(Some(_)) => Err(Reply::new(
            StatusCode::BAD_REQUEST,
            "Bad Request",
            "downstream_remote_disconnect",
            flags::DOWNSTREAM_CONNECTION_TERMINATION,
        )),
    }
}

fn too_large(exchange: &mut Exchange) -> Reply {
    // The rest of the body is not worth waiting for.
    exchange.close = true;
    Reply::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "Payload Too Large",
        "request_payload_too_large",
        flags::NONE,
    )
}

fn change(exchange: &mut Exchange, mut changes: Changes) -> Result<(), Reply> {
    ext_authz::apply(&mut exchange.parts.headers, &changes.request);
    exchange.to_client.append(&mut changes.response);
    if changes.query_set.is_empty() && changes.query_remove.is_empty() {
        return Ok(());
    }
    let query = rewrite(exchange.parts.uri.query().unwrap_or_default(), &changes);
    let path = exchange.parts.uri.path();
    let target = match query.as_str() {
        "" => path.to_string(),
        query => format!("{path}?{query}"),
    };
    match PathAndQuery::from_maybe_shared(target) {
        Ok(target) => {
            exchange.parts.uri = target.into();
            Ok(())
        }
        Err(_) => Err(Reply::new(
            StatusCode::FORBIDDEN,
            "",
            "ext_authz_error",
            flags::UNAUTHORIZED_EXTERNAL_SERVICE,
        )),
    }
}

/// The query string with parameters set and removed; the rest stays as it was sent.
fn rewrite(query: &str, changes: &Changes) -> String {
    let name = |pair: &str| pair.split_once('=').map_or(pair, |(n, _)| n).to_string();
    let mut pairs: Vec<String> = query
        .split('&')
        .filter(|p| !p.is_empty())
        .filter(|p| !changes.query_remove.contains(&name(p)))
        .filter(|p| !changes.query_set.iter().any(|(n, _)| *n == name(p)))
        .map(str::to_string)
        .collect();
    pairs.extend(changes.query_set.iter().map(|(n, v)| format!("{n}={v}")));
    pairs.join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_for_bodies_is_bounded() {
        let half = Share::take(MAX_HELD / 2).unwrap();
        let rest = Share::take(MAX_HELD / 2).unwrap();
        assert!(Share::take(1).is_none());
        drop(half);
        assert!(Share::take(usize::MAX).is_none());
        let again = Share::take(1).unwrap();
        drop((rest, again));
        assert!(Share::take(MAX_HELD).is_some());
    }

    #[test]
    fn queries_keep_what_is_not_named() {
        let changes = Changes {
            query_set: vec![("q".into(), "new".into())],
            query_remove: vec!["r".into()],
            ..Changes::default()
        };
        assert_eq!(rewrite("q=1&r=2&q=3&x&y=%20", &changes), "x&y=%20&q=new");
        assert_eq!(rewrite("", &changes), "q=new");
    }
}
