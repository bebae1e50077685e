//! Admission webhooks on port 15017: `/inject` for pods, `/validate` for Istio's objects (SEMANTICS 5a, 8a).
//!
//! The API server calls; nobody else needs to. Answers are decided by pure code (`translate::inject`, `api::validate`); this
//! module reads and writes AdmissionReviews over HTTPS and keeps the injector's configuration fresh. Whatever cannot be
//! read is refused: a pod that should have a sidecar must not start without one.

pub mod ca_bundle;
pub mod config;
mod review;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mantlet_runtime::task::Limit;
use mantlet_runtime::{Counter, CounterFamily, DrainWatch, Registry};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::auth::TlsIncoming;
use crate::ca::ServerCert;
use config::InjectorConfig;

/// Largest AdmissionReview; the API server's own objects are at most 3 MB, and a review holds two of them.
const MAX_BODY: usize = 8 << 20;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Time for a request to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The webhook server.
pub struct Webhooks {
    config: InjectorConfig,
    metrics: WebhookMetrics,
}

struct WebhookMetrics {
    requests: Counter,
    success: Counter,
    failures: Counter,
    skipped: Counter,
    passed: CounterFamily,
    failed: CounterFamily,
}

impl Webhooks {
    /// With the injector's configuration.
    pub fn new(config: InjectorConfig, registry: &Registry) -> Webhooks {
        let counter = |name: &str, help: &str| registry.counter(name, help, &[]).with(&[]);
        Webhooks {
            config,
            metrics: WebhookMetrics {
                requests: counter(
                    "sidecar_injection_requests_total",
                    "Total number of sidecar injection requests.",
                ),
                success: counter(
                    "sidecar_injection_success_total",
                    "Total number of successful sidecar injection requests.",
                ),
                failures: counter(
                    "sidecar_injection_failure_total",
                    "Total number of failed sidecar injection requests.",
                ),
                skipped: counter(
                    "sidecar_injection_skip_total",
                    "Total number of skipped sidecar injection requests.",
                ),
                passed: registry.counter(
                    "galley_validation_passed",
                    "Resource is valid.",
                    &["group", "version", "resource"],
                ),
                failed: registry.counter(
                    "galley_validation_failed",
                    "Resource validation failed.",
                    &["group", "version", "resource", "reason"],
                ),
            },
        }
    }

    /// Serves HTTPS with the control plane's certificate until the drain is announced.
    pub async fn serve(self, listener: TcpListener, cert: Arc<ServerCert>, mut drain: DrainWatch) {
        let this = Arc::new(self);
        let limit = Limit::new(MAX_CONNECTIONS);
        let mut incoming = TlsIncoming::new(listener, Arc::new(move || cert.webhook_config()));
        loop {
            let io = tokio::select! {
                next = incoming.next() => match next {
                    Some(Ok(io)) => io,
                    Some(Err(_)) => continue,
                    None => return,
                },
                () = drain.draining() => return,
            };
            let (this, mut drain) = (this.clone(), drain.clone());
            let spawned = limit.try_spawn(async move {
                let service = service_fn(move |request| {
                    let this = this.clone();
                    async move { Ok::<_, Infallible>(this.answer(request).await) }
                });
                let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                builder
                    .http1()
                    .timer(TokioTimer::new())
                    .header_read_timeout(BODY_TIMEOUT);
                builder.http2().timer(TokioTimer::new());
                let connection = builder.serve_connection(TokioIo::new(io), service);
                tokio::pin!(connection);
                // Errors are the peer's: a closed or malformed connection.
                tokio::select! {
                    _ = connection.as_mut() => return,
                    () = drain.draining() => connection.as_mut().graceful_shutdown(),
                }
                let _ = connection.await;
            });
            if spawned.is_err() {
                tracing::warn!(target: "webhook", "connection refused: {MAX_CONNECTIONS} are open");
            }
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_string();
        let inject = path == "/inject" || path.starts_with("/inject/");
        if !inject && path != "/validate" {
            return text(StatusCode::NOT_FOUND, "404 page not found\n");
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "POST an AdmissionReview\n");
        }
        let body = Limited::new(request.into_body(), MAX_BODY).collect();
        let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => {
                return text(StatusCode::PAYLOAD_TOO_LARGE, "the body is incomplete or too large\n");
            }
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time\n"),
        };
        let review: Value = match serde_json::from_slice(&body) {
            Ok(value) => value,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("no AdmissionReview: {error}\n")),
        };
        let Some(request) = review.get("request").filter(|r| r["uid"].is_string()) else {
            return text(StatusCode::BAD_REQUEST, "no AdmissionReview: request.uid is missing\n");
        };
        let version = review["apiVersion"].as_str().unwrap_or("admission.k8s.io/v1");
        let response = if inject {
            self.inject(request, &path)
        } else {
            self.validate(request)
        };
        let answer = response.into_review(version, request["uid"].as_str().unwrap_or_default());
        let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
        response.headers_mut().insert(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/json"),
        );
        response
    }

    fn inject(&self, request: &Value, path: &str) -> review::Answer {
        self.metrics.requests.inc();
        let outcome = match self.config.current() {
            Some(config) => review::inject(request, path, &config),
            None => Err("the injector has no configuration yet (ConfigMap istio-sidecar-injector)".to_string()),
        };
        match outcome {
            Ok(review::Injection::Patched(answer)) => {
                self.metrics.success.inc();
                answer
            }
            Ok(review::Injection::Skipped(answer)) => {
                self.metrics.skipped.inc();
                answer
            }
            Err(reason) => {
                self.metrics.failures.inc();
                tracing::error!(target: "webhook", "injection of {}: {reason}", review::subject(request));
                review::Answer::deny(500, reason)
            }
        }
    }

    fn validate(&self, request: &Value) -> review::Answer {
        let answer = review::validate(request);
        let label = |field: &str| request["resource"][field].as_str().unwrap_or_default();
        let (group, version, resource) = (label("group"), label("version"), label("resource"));
        if answer.allowed() {
            self.metrics.passed.with(&[group, version, resource]).inc();
        } else {
            let reason = "invalid_resource";
            self.metrics.failed.with(&[group, version, resource, reason]).inc();
        }
        answer
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}
