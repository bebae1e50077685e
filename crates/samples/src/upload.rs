//! The upload service: `POST /upload` keeps a file, `GET /files` lists them, `GET /files/NAME` gives one back. A profile with a
//! picture stands beside it (`GET /profile`, `POST /profile/picture`), and `GET /search` has nothing to do with either.
//!
//! It trusts whatever reaches it, on purpose: who may upload is for the mesh to say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::customers::response;

/// Largest request body.
const MAX_BODY: usize = 1 << 20;
/// Most files that are kept.
const MAX_FILES: usize = 64;
/// Longest name of a file.
const MAX_NAME: usize = 128;

/// The files, shared between connections.
#[derive(Clone, Default)]
pub(crate) struct Upload {
    files: Arc<Mutex<BTreeMap<String, Bytes>>>,
}

impl Upload {
    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        match (&parts.method, path) {
            (&Method::GET, "/healthz") => json_response(StatusCode::OK, &json!({"status": "ok"})),
            (&Method::GET, "/" | "/files") => json_response(StatusCode::OK, &json!({"files": self.names()})),
            (&Method::GET, "/profile") => {
                let picture = self.get("profile-picture").map(|p| p.len());
                json_response(StatusCode::OK, &json!({"name": "Ada Brandt", "picture": picture}))
            }
            (&Method::GET, "/search") => json_response(StatusCode::OK, &json!({"results": ["Ada Brandt"]})),
            (&Method::GET, path) if path.starts_with("/files/") => match self.get(&path["/files/".len()..]) {
                Some(content) => response(StatusCode::OK, "application/octet-stream", content),
                None => error(StatusCode::NOT_FOUND, "no such file"),
            },
            (&Method::POST, "/upload" | "/profile/picture") => {
                let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
                    return error(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than 1 MiB");
                };
                let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
                let boundary = kind.and_then(boundary);
                let part = match boundary {
                    Some(boundary) => first_file(&body.to_bytes(), boundary),
                    None => Some(("upload".to_string(), body.to_bytes())),
                };
                let Some((name, content)) = part else {
                    return error(StatusCode::BAD_REQUEST, "no file in the form");
                };
                let name = if path == "/upload" {
                    name
                } else {
                    "profile-picture".into()
                };
                self.keep(name, content)
            }
            _ => error(StatusCode::NOT_FOUND, "not found"),
        }
    }

    fn names(&self) -> Vec<String> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Option<Bytes> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.get(name).cloned()
    }

    fn keep(&self, name: String, content: Bytes) -> Response<Full<Bytes>> {
        let good = !name.is_empty()
            && name.len() <= MAX_NAME
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !good {
            return error(StatusCode::BAD_REQUEST, "the file's name is not allowed");
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() >= MAX_FILES && !files.contains_key(&name) {
            return error(StatusCode::INSUFFICIENT_STORAGE, "too many files");
        }
        let answer = json!({"stored": name, "bytes": content.len()});
        files.insert(name, content);
        json_response(StatusCode::CREATED, &answer)
    }
}

/// The boundary of a form (RFC 7578).
fn boundary(content_type: &str) -> Option<&str> {
    let parameters = content_type.strip_prefix("multipart/form-data")?;
    let value = parameters.split(';').find_map(|p| p.trim().strip_prefix("boundary="))?;
    Some(value.trim_matches('"')).filter(|b| !b.is_empty())
}

/// Name and content of the first part that is a file.
fn first_file(body: &Bytes, boundary: &str) -> Option<(String, Bytes)> {
    let find = |from: usize, what: &[u8]| {
        body.get(from..)?
            .windows(what.len())
            .position(|w| w == what)
            .map(|at| from + at)
    };
    let delimiter = format!("--{boundary}\r\n");
    let end = format!("\r\n--{boundary}");
    let mut at = find(0, delimiter.as_bytes())? + delimiter.len();
    loop {
        let content = find(at, b"\r\n\r\n")? + 4;
        let head = String::from_utf8_lossy(&body[at..content]).into_owned();
        let stop = find(content, end.as_bytes())?;
        let name = head.split("filename=\"").nth(1).and_then(|rest| rest.split('"').next());
        if let Some(name) = name {
            return Some((name.to_string(), body.slice(content..stop)));
        }
        at = stop + end.len() + 2;
    }
}

fn error(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    json_response(status, &json!({ "error": text }))
}

fn json_response(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    response(status, "application/json", Bytes::from(value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_forms() {
        let kind = "multipart/form-data; boundary=----abc";
        assert_eq!(boundary(kind), Some("----abc"));
        assert_eq!(boundary("multipart/form-data; boundary=\"x y\""), Some("x y"));
        assert_eq!(boundary("text/plain"), None);
        let body = Bytes::from_static(
            b"--x\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nhello\r\n\
              --x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"cat.txt\"\r\n\r\nmeow\r\nmeow\r\n--x--\r\n",
        );
        assert_eq!(
            first_file(&body, "x"),
            Some(("cat.txt".into(), Bytes::from_static(b"meow\r\nmeow")))
        );
        for bad in [
            "",
            "--x\r\n",
            "--x\r\n\r\n",
            "--x\r\nA: b\r\n\r\nend",
            "--x\r\nA: b\r\n\r\n\r\n--x",
        ] {
            assert_eq!(first_file(&Bytes::from_static(bad.as_bytes()), "x"), None, "{bad:?}");
        }
    }

    #[test]
    fn names_and_numbers_are_bounded() {
        let upload = Upload::default();
        for bad in ["", "../etc", ".hidden", "a/b", "a b"] {
            assert_eq!(upload.keep(bad.into(), Bytes::new()).status(), StatusCode::BAD_REQUEST);
        }
        for n in 0..MAX_FILES {
            assert_eq!(upload.keep(format!("f{n}"), Bytes::new()).status(), StatusCode::CREATED);
        }
        assert_eq!(
            upload.keep("one-more".into(), Bytes::new()).status(),
            StatusCode::INSUFFICIENT_STORAGE
        );
        assert_eq!(
            upload.keep("f0".into(), Bytes::from_static(b"new")).status(),
            StatusCode::CREATED
        );
        assert_eq!(upload.get("f0").unwrap(), "new");
    }
}
