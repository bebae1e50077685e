//! Protocol switches (WebSocket): after both sides have agreed with 101, bytes flow both ways untouched.

use std::rc::Rc;

use http::Response;
use http::response::Parts;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional_with_sizes;

use super::body::{ResponseBody, SourceLease};
use super::request::Exchange;
use crate::telemetry::record::Account;
use crate::upstream::ActiveGuard;

/// Passes the 101 on and starts the tunnel, which ends with its connection.
pub fn tunnel(
    exchange: &mut Exchange,
    mut head: Parts,
    body: Incoming,
    active: ActiveGuard,
    lease: SourceLease,
    mut account: Box<Account>,
) -> Response<ResponseBody> {
    let upstream = head.extensions.remove::<OnUpgrade>();
    let client = exchange.upgrade.take();
    let downstream = Rc::clone(&exchange.downstream);
    tokio::task::spawn_local(async move {
        let _held = (active, lease, body);
        let (Some(upstream), Some(client)) = (upstream, client) else {
            account.finish(false);
            return;
        };
        let (Ok(upstream), Ok(client)) = tokio::join!(upstream, client) else {
            account.finish(false);
            return;
        };
        let (mut upstream, mut client) = (TokioIo::new(upstream), TokioIo::new(client));
        let copy = copy_bidirectional_with_sizes(&mut client, &mut upstream, 16 * 1024, 16 * 1024);
        let closing = std::future::poll_fn(|cx| {
            if downstream.control.poll(cx) {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        });
        tokio::select! {
            copied = copy => {
                if let Ok((up, down)) = copied {
                    account.progress.received.set(account.progress.received.get() + up);
                    account.sent += down;
                }
            }
            () = closing => {}
        }
        account.finish(true);
    });
    Response::from_parts(head, ResponseBody::switched())
}
