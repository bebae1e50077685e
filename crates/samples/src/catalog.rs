//! The catalog: `GET /api/catalog` lists items, `GET /api/catalog/N` is one of them, `GET /api/prices` is what not everybody should see.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::customers::response;

const ITEMS: [&str; 3] = ["lantern", "compass", "sextant"];

/// Answers one request.
pub(crate) async fn answer(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let item = path.strip_prefix("/api/catalog/").and_then(|n| n.parse::<usize>().ok());
    let (status, body) = match (request.method(), path, item) {
        (&Method::GET, "/healthz", _) => (StatusCode::OK, json!({"status": "ok"})),
        (&Method::GET, "/api/catalog", _) => (StatusCode::OK, json!(ITEMS)),
        (&Method::GET, "/api/prices", _) => (StatusCode::OK, json!({"lantern": 12, "compass": 40, "sextant": 310})),
        (&Method::GET, _, Some(n)) if n < ITEMS.len() => (StatusCode::OK, json!({"item": ITEMS[n]})),
        _ => (StatusCode::NOT_FOUND, json!({"error": "not found"})),
    };
    reply(status, &body)
}

fn reply(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    response(status, "application/json", Bytes::from(format!("{body}\n")))
}
