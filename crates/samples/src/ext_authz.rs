//! The external authorizer of the CUSTOM lab: says yes to whoever sends `x-ext-authz: allow`, over HTTP and over gRPC.
//!
//! Ports, header names and texts are those of Istio's sample, so that its documentation can be followed with it. Each answer
//! over HTTP tells in a header what was asked, and each question is one line on the standard output.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue as Header, HeaderValueOption};
use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse};
use envoy_types::pb::envoy::r#type::v3::{HttpStatus, StatusCode as EnvoyStatus};
use envoy_types::pb::google::rpc::Status as RpcStatus;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::signal::unix::{SignalKind, signal};

use crate::server;

const CHECK_HEADER: &str = "x-ext-authz";
const ALLOWED_VALUE: &str = "allow";
const RESULT_HEADER: &str = "x-ext-authz-check-result";
const RECEIVED_HEADER: &str = "x-ext-authz-check-received";
const OVERRIDE_HEADER: &str = "x-ext-authz-additional-header-override";
const OVERRIDE_VALUE: &str = "grpc-additional-header-override-value";
const DENIED_BODY: &str = "denied by ext_authz for not found header `x-ext-authz: allow` in the request";
/// Largest body that is looked at.
const MAX_BODY: usize = 1 << 20;
/// Longest report of what was asked; headers have bounds.
const MAX_REPORT: usize = 2048;

/// Serves HTTP and gRPC until SIGTERM.
pub(crate) async fn run(http: SocketAddr, grpc: SocketAddr) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let grpc_server = tonic::transport::Server::builder()
        .add_service(AuthorizationServer::new(Authorizer))
        .serve_with_shutdown(grpc, async move {
            terminate.recv().await;
        });
    let grpc_server = async { grpc_server.await.with_context(|| format!("gRPC on {grpc}")) };
    tokio::try_join!(server::run(http, answer), grpc_server)?;
    Ok(())
}

fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_REPORT)
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
        .collect()
}

async fn answer(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    if head.uri.path() == "/healthz" {
        return Response::new(Full::new(Bytes::from_static(b"ok\n")));
    }
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(_) => String::from("(too large)"),
    };
    let allowed = head.headers.get(CHECK_HEADER).is_some_and(|v| v == ALLOWED_VALUE);
    let report = printable(&format!(
        "{} {}, headers: {:?}, body: [{body}]",
        head.method, head.uri, head.headers
    ));
    println!("[HTTP][{}]: {report}", if allowed { "allowed" } else { "denied" });
    let mut response = if allowed {
        Response::new(Full::default())
    } else {
        let mut response = Response::new(Full::new(Bytes::from_static(DENIED_BODY.as_bytes())));
        *response.status_mut() = StatusCode::FORBIDDEN;
        response
    };
    let fields = response.headers_mut();
    fields.insert(
        RESULT_HEADER,
        HeaderValue::from_static(if allowed { "allowed" } else { "denied" }),
    );
    if let Some(value) = head.headers.get(OVERRIDE_HEADER) {
        fields.insert(OVERRIDE_HEADER, value.clone());
    }
    if let Ok(value) = HeaderValue::from_str(&report) {
        fields.insert(RECEIVED_HEADER, value);
    }
    response
}

struct Authorizer;

#[tonic::async_trait]
impl Authorization for Authorizer {
    async fn check(
        &self,
        request: tonic::Request<CheckRequest>,
    ) -> std::result::Result<tonic::Response<CheckResponse>, tonic::Status> {
        let attributes = request.into_inner().attributes.unwrap_or_default();
        let source = attributes
            .source
            .as_ref()
            .map(|s| s.principal.clone())
            .unwrap_or_default();
        let http = attributes.request.and_then(|r| r.http);
        let (allowed, report) = match &http {
            // A connection: who has a name may come in.
            None => (!source.is_empty(), format!("connection from {source:?}")),
            Some(http) => (
                http.headers.get(CHECK_HEADER).is_some_and(|v| v == ALLOWED_VALUE),
                format!(
                    "{} {}{} from {source:?}, body: [{}]",
                    http.method, http.host, http.path, http.body
                ),
            ),
        };
        let report = printable(&report);
        println!("[gRPCv3][{}]: {report}", if allowed { "allowed" } else { "denied" });
        let header = |key: &str, value: &str| HeaderValueOption {
            header: Some(Header {
                key: key.into(),
                value: value.into(),
                ..Header::default()
            }),
            ..HeaderValueOption::default()
        };
        let headers = |result: &str| {
            vec![
                header(RESULT_HEADER, result),
                header(RECEIVED_HEADER, &report),
                header(OVERRIDE_HEADER, OVERRIDE_VALUE),
            ]
        };
        let (code, answer) = if allowed {
            let ok = OkHttpResponse {
                headers: headers("allowed"),
                ..OkHttpResponse::default()
            };
            (tonic::Code::Ok, HttpResponse::OkResponse(ok))
        } else {
            let denied = DeniedHttpResponse {
                status: Some(HttpStatus {
                    code: EnvoyStatus::Forbidden.into(),
                }),
                headers: headers("denied"),
                body: DENIED_BODY.into(),
            };
            (tonic::Code::PermissionDenied, HttpResponse::DeniedResponse(denied))
        };
        Ok(tonic::Response::new(CheckResponse {
            status: Some(RpcStatus {
                code: code.into(),
                ..RpcStatus::default()
            }),
            http_response: Some(answer),
            ..CheckResponse::default()
        }))
    }
}
