//! Protocol switches (WebSocket): after both sides have agreed with 101, bytes flow both ways untouched.

use std::net::IpAddr;
use std::rc::Rc;

use http::response::Parts;
use http::{HeaderValue, Response};
use hyper_util::rt::TokioIo;
use mantlet_model::authz::Verdict;
use tokio::io::copy_bidirectional_with_sizes;

use super::body::{ResponseBody, UpstreamBody};
use super::jwt::Verified;
use super::request::{Exchange, View};
use crate::config::Chain;
use crate::connection::Downstream;
use crate::telemetry::record::Account;
use crate::upstream::ActiveGuard;
use crate::upstream::pool::Lease;

/// Keeps what decides about a request that wants a tunnel, as it was before the upstream's rewriting: the tunnel must not
/// outlive its permission.
pub fn remember(exchange: &Exchange) {
    let asked = Asked {
        head: super::forward::clone_head(&exchange.parts),
        authority: exchange.authority.clone(),
        remote: exchange.remote,
        token: exchange.token.clone(),
    };
    *exchange.downstream.tunnel.borrow_mut() = Some(Box::new(asked));
}

/// A request whose connection has become a tunnel, or is about to.
pub struct Asked {
    head: http::request::Parts,
    authority: HeaderValue,
    remote: IpAddr,
    token: Option<Rc<Verified>>,
}

impl Asked {
    /// Whether the policies of a chain would refuse it now.
    pub fn denied(&self, downstream: &Downstream, chain: &Chain) -> bool {
        let mut connection = crate::tcp::authz_view(downstream);
        connection.remote = self.remote;
        let view = View::new(&self.head, &self.authority, self.token.as_deref());
        chain.has_authz && chain.engine.decide(&connection, Some(&view)).verdict == Verdict::Denied
    }
}

/// Passes the 101 on and starts the tunnel, which ends with its connection.
pub fn tunnel(
    exchange: &mut Exchange,
    head: Parts,
    body: UpstreamBody,
    active: ActiveGuard,
    lease: Lease,
    mut account: Box<Account>,
) -> Response<ResponseBody> {
    // Ends the exchange; the connection is the tunnel's from here on.
    drop(body);
    let upstream = match lease {
        Lease::Http1(lease) => lease.into_stream(),
        Lease::Http2(_) => None,
    };
    let client = exchange.upgrade.take();
    let downstream = Rc::clone(&exchange.downstream);
    tokio::task::spawn_local(async move {
        let _held = active;
        let (Some(mut upstream), Some(client)) = (upstream, client) else {
            account.finish(false);
            return;
        };
        let Ok(client) = client.await else {
            account.finish(false);
            return;
        };
        let mut client = TokioIo::new(client);
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
