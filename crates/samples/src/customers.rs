//! The customers service: `GET /` answers with all customers, `POST /` with the body it was sent.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::json;

/// Largest body that `POST` echoes.
const MAX_BODY: usize = 1 << 20;

/// Answers one request.
pub(crate) async fn answer(request: Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method().clone(), request.uri().path()) {
        (Method::GET | Method::HEAD, "/" | "/customers") => json_response(StatusCode::OK, &customers()),
        (Method::GET, "/healthz") => json_response(StatusCode::OK, &json!({"status": "ok"})),
        (Method::POST, "/") => match Limited::new(request.into_body(), MAX_BODY).collect().await {
            Ok(body) => response(StatusCode::OK, "application/octet-stream", body.to_bytes()),
            Err(_) => json_response(
                StatusCode::PAYLOAD_TOO_LARGE,
                &json!({"error": "the body is larger than 1 MiB"}),
            ),
        },
        _ => json_response(StatusCode::NOT_FOUND, &json!({"error": "not found"})),
    }
}

fn customers() -> serde_json::Value {
    let list: Vec<_> = [
        (1, "Ada Brandt", "Harbour Street 3", "Bremen"),
        (2, "Tomasz Kowal", "Mill Lane 18", "Gdynia"),
        (3, "Ines Duarte", "Rua do Norte 41", "Porto"),
        (4, "Mbali Nkosi", "Long Walk 7", "Durban"),
        (5, "Saoirse Quill", "Canal Row 22", "Galway"),
        (6, "Viktor Halvorsen", "Fjellveien 9", "Bergen"),
    ]
    .into_iter()
    .map(|(id, name, street, city)| json!({"id": id, "name": name, "address": {"street": street, "city": city}}))
    .collect();
    serde_json::Value::Array(list)
}

fn json_response(status: StatusCode, value: &serde_json::Value) -> Response<Full<Bytes>> {
    response(status, "application/json", Bytes::from(value.to_string()))
}

pub(crate) fn response(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
