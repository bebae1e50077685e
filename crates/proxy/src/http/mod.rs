//! HTTP: serving downstream connections, and the one ordered request function in [`request`].

pub mod body;
pub mod custom;
pub mod forward;
pub mod framing;
pub mod headers;
pub mod jwt;
pub mod life;
pub mod meter;
pub mod reply;
pub mod request;
pub mod upgrade;
pub mod watched;

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use self::life::Busy;
use self::watched::Watched;
use crate::connection::Downstream;
use crate::stream::Stream;
use crate::upstream::multiplex;
use crate::worker::LocalExec;

/// Largest head of a request (Envoy's 60 KiB).
const MAX_HEAD: usize = 60 * 1024;
/// What a client without a certificate may send on all streams of a connection before we have read it.
const STRANGER_WINDOW: u32 = 4 << 20;
/// Most headers of a request.
const MAX_HEADERS: usize = 100;

/// How long a peer may take to answer an HTTP/2 PING.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves the requests of a connection until it ends.
pub async fn serve(downstream: Rc<Downstream>, stream: Stream, h2: bool) {
    let tuning = downstream.worker.shared.tuning.clone();
    let conn = downstream.clone();
    let follower = framing::SharedFollower::default();
    let followed = (!h2).then(|| follower.clone());
    let service = service_fn(move |request| {
        let busy = Busy::begin(&conn);
        let (conn, followed) = (conn.clone(), followed.clone());
        // Called in here: a future that is kept in a variable is carried, and copied, twice.
        async move {
            let mut response = request::handle(conn, followed, request).await?;
            response.body_mut().hold(busy);
            Ok::<_, Infallible>(response)
        }
    });
    let result = if h2 {
        // Other proxies of the mesh put many clients on one connection, and none of these may hold up the rest; strangers
        // speak for themselves.
        let window = match downstream.peer {
            Some(_) => multiplex::CONNECTION_WINDOW,
            None => STRANGER_WINDOW,
        };
        let meter = Rc::new(RefCell::new(meter::Meter::new(tuning.max_empty_frames)));
        downstream.life.http2(meter.clone());
        let io = TokioIo::new(Watched::new(stream, meter));
        let connection = pin!(
            http2::Builder::new(LocalExec)
                .timer(TokioTimer::new())
                .max_concurrent_streams(tuning.max_streams)
                .initial_stream_window_size(multiplex::STREAM_WINDOW)
                .initial_connection_window_size(window)
                .max_frame_size(multiplex::MAX_FRAME)
                .max_send_buf_size(1 << 20)
                .max_header_list_size(MAX_HEAD as u32)
                .max_pending_accept_reset_streams(tuning.max_pending_resets)
                .max_local_error_reset_streams(tuning.max_provoked_resets)
                .keep_alive_interval(tuning.ping_interval)
                .keep_alive_timeout(PING_TIMEOUT)
                .auto_date_header(false)
                .serve_connection(io, service)
        );
        drive(&downstream, connection, |c| c.graceful_shutdown()).await
    } else {
        downstream.life.http1(follower.clone());
        let io = TokioIo::new(Watched::new(stream, follower));
        let connection = pin!(
            http1::Builder::new()
                // Slow heads are the worker's sweep's (`life`): a timer here would cost every request, and end idle
                // connections as early as slow ones.
                .header_read_timeout(None)
                .max_headers(MAX_HEADERS)
                .max_buf_size(MAX_HEAD)
                .half_close(false)
                .auto_date_header(false)
                .serve_connection(io, service)
                .with_upgrades()
        );
        drive(&downstream, connection, |c| c.graceful_shutdown()).await
    };
    if let Some(Err(error)) = result {
        tracing::debug!(target: "http", "connection from {} ended: {error}", downstream.facts.source);
    }
}

/// Drives a connection; when asked to close, lets it finish what it has begun. Nothing comes of one that was aborted.
async fn drive<C: Future>(
    downstream: &Downstream,
    mut connection: std::pin::Pin<&mut C>,
    shutdown: impl Fn(std::pin::Pin<&mut C>),
) -> Option<C::Output> {
    let mut told = false;
    poll_fn(|cx| {
        if !told && downstream.control.poll(cx) {
            told = true;
            shutdown(connection.as_mut());
        }
        match connection.as_mut().poll(cx) {
            Poll::Ready(out) => Poll::Ready(Some(out)),
            // What it had to say is on its way, GOAWAY for one.
            Poll::Pending if downstream.control.aborted() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
