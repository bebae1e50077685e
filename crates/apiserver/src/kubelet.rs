//! exec, attach, log and portforward: checked here, then handed to the node agent as they are.
//!
//! The node agent answers HTTP/1.1 on a Unix socket with the real kubelet's paths. An upgraded answer carries its connection in
//! the response's extensions; the edge joins it with the client's, in-process clients use it directly.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::auth::Identity;
use crate::error::{ApiError, ApiResult};
use crate::http::{Body, erase, full, read_body};
use crate::request::{Query, RequestInfo};
use crate::server::ApiServer;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Forwards one request.
pub(crate) async fn proxy(
    server: Arc<ApiServer>,
    user: Arc<Identity>,
    info: RequestInfo,
    query: Query,
    request: Request<Body>,
) -> ApiResult<Response<Body>> {
    let namespace = info.namespace.clone().unwrap_or_default();
    let name = &info.name;
    let (entry, _) = server.store().get(&format!("/core/pods/{namespace}/{name}"))?;
    let entry = entry.ok_or_else(|| ApiError::not_found("", "pods", name))?;
    let pod: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
    // A client on a certificate must still be allowed to create the stream when it uses GET to open it.
    if info.subresource != "log" && info.verb == "get" {
        let mut ask = crate::auth::rbac::Attributes::from(&info);
        ask.verb = "create".into();
        if server.rbac()?.authorize(&user, &ask).is_none() {
            return Err(ApiError::forbidden(
                "",
                "pods",
                name,
                &crate::auth::rbac::denial(&user, &ask),
            ));
        }
    }
    let node = pod["spec"]["nodeName"].as_str().unwrap_or_default();
    if node.is_empty() {
        return Err(match info.subresource.as_str() {
            // What kubectl logs shows for a pod that has no node yet.
            "log" => return Ok(crate::http::respond(200, "text/plain", "")),
            _ => ApiError::bad_request(format!("pod {name} does not have a host assigned")),
        });
    }
    let path = target(&pod, &info, &query, &namespace, &container(&pod, &info, &query)?)?;
    forward(&server, &path, request).await
}

/// The container that is meant.
fn container(pod: &Value, info: &RequestInfo, query: &Query) -> ApiResult<String> {
    if info.subresource == "portforward" {
        return Ok(String::new());
    }
    let name = &info.name;
    let names = |field: &str| -> Vec<String> {
        pod["spec"][field]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c["name"].as_str().map(str::to_owned))
            .collect()
    };
    let (normal, init, ephemeral) = (
        names("containers"),
        names("initContainers"),
        names("ephemeralContainers"),
    );
    match query.get("container") {
        Some(c) if normal.iter().chain(&init).chain(&ephemeral).any(|n| n == c) => Ok(c.to_owned()),
        Some(c) => Err(ApiError::bad_request(format!(
            "container {c} is not valid for pod {name}"
        ))),
        None => {
            // Only the client knows the default-container annotation's meaning when several could be meant.
            let annotated = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
            match (normal.as_slice(), annotated) {
                ([one], _) => Ok(one.clone()),
                (_, Some(a)) if info.subresource != "log" && normal.iter().any(|n| n == a) => Ok(a.to_owned()),
                (many, _) => {
                    let mut text = format!(
                        "a container name must be specified for pod {name}, choose one of: [{}]",
                        many.join(" ")
                    );
                    if !init.is_empty() {
                        text += &format!(" or one of the init containers: [{}]", init.join(" "));
                    }
                    Err(ApiError::bad_request(text))
                }
            }
        }
    }
}

fn escape(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for b in s.bytes() {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~') {
            out.push(b as char);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

fn target(pod: &Value, info: &RequestInfo, query: &Query, namespace: &str, container: &str) -> ApiResult<String> {
    let name = &info.name;
    let mut parts: Vec<(&str, String)> = Vec::new();
    let base = match info.subresource.as_str() {
        "log" => {
            for key in ["follow", "previous", "timestamps"] {
                if query.flag(key) {
                    parts.push((key, "true".into()));
                }
            }
            for key in ["tailLines", "sinceSeconds", "limitBytes"] {
                if let Some(v) = query.get(key) {
                    let n: i64 = v
                        .parse()
                        .map_err(|_| ApiError::bad_request(format!("{key} must be a number")))?;
                    if n < i64::from(key != "tailLines") {
                        return Err(ApiError::bad_request(format!(
                            "{key} must be greater than or equal to {}",
                            i64::from(key != "tailLines")
                        )));
                    }
                    parts.push((key, v.to_owned()));
                }
            }
            if let Some(v) = query.get("sinceTime") {
                parts.push(("sinceTime", v.to_owned()));
            }
            waiting(pod, container, name, query.flag("previous"))?;
            format!("/containerLogs/{namespace}/{name}/{container}")
        }
        "portforward" => {
            for p in query.all("ports") {
                parts.push(("port", p.to_owned()));
            }
            format!("/portForward/{namespace}/{name}")
        }
        sub => {
            for command in query.all("command").filter(|_| sub == "exec") {
                parts.push(("command", command.to_owned()));
            }
            for (ours, theirs) in [
                ("stdin", "input"),
                ("stdout", "output"),
                ("stderr", "error"),
                ("tty", "tty"),
            ] {
                if query.flag(ours) {
                    parts.push((theirs, "1".into()));
                }
            }
            if sub == "exec" && !parts.iter().any(|(k, _)| *k == "command") {
                return Err(ApiError::bad_request(
                    "you must specify at least 1 command for the container",
                ));
            }
            format!("/{sub}/{namespace}/{name}/{container}")
        }
    };
    let text: Vec<String> = parts.into_iter().map(|(k, v)| format!("{k}={}", escape(&v))).collect();
    Ok(if text.is_empty() {
        base
    } else {
        format!("{base}?{}", text.join("&"))
    })
}

/// Logs of a container that never ran are refused with its state.
fn waiting(pod: &Value, container: &str, name: &str, previous: bool) -> ApiResult<()> {
    for field in ["containerStatuses", "initContainerStatuses"] {
        for cs in pod["status"][field]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|c| c["name"].as_str() == Some(container))
        {
            let last = cs["lastState"]["terminated"].is_object();
            if previous && !last {
                return Err(ApiError::bad_request(format!(
                    "previous terminated container {container:?} in pod {name:?} not found"
                )));
            }
            if !previous && !last && cs["state"]["waiting"].is_object() {
                let reason = cs["state"]["waiting"]["reason"].as_str().unwrap_or_default();
                return Err(ApiError::bad_request(match reason {
                    "" | "PodInitializing" | "ContainerCreating" => {
                        format!(
                            "container {container:?} in pod {name:?} is waiting to start: {}",
                            if reason.is_empty() { "ContainerCreating" } else { reason }
                        )
                    }
                    why => format!("container {container:?} in pod {name:?} is waiting to start: {why}"),
                }));
            }
        }
    }
    Ok(())
}

async fn forward(server: &Arc<ApiServer>, path: &str, request: Request<Body>) -> ApiResult<Response<Body>> {
    let socket = &server.config().kubelet_socket;
    let unreachable = |why: String| ApiError::internal(format!("error dialing backend: {why}"));
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(socket))
        .await
        .map_err(|_| unreachable("the node agent does not accept connections".into()))?
        .map_err(|e| unreachable(format!("dial unix {}: {e}", socket.display())))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| unreachable(e.to_string()))?;
    tokio::spawn(async move {
        if let Err(e) = connection.with_upgrades().await {
            tracing::debug!(error = %e, "connection to the node agent ended");
        }
    });
    let (parts, body) = request.into_parts();
    let upgrading = parts.headers.contains_key(header::UPGRADE);
    let body = if upgrading {
        bytes::Bytes::new()
    } else {
        read_body(body).await?
    };
    let mut out = Request::builder()
        .method(parts.method)
        .uri(path)
        .body(full(body))
        .map_err(ApiError::internal)?;
    copy_headers(&parts.headers, out.headers_mut(), upgrading);
    out.headers_mut()
        .insert(header::HOST, header::HeaderValue::from_static("kubelet"));
    let response = tokio::time::timeout(ANSWER_TIMEOUT, sender.send_request(out))
        .await
        .map_err(|_| unreachable("the node agent did not answer in time".into()))?
        .map_err(|e| unreachable(e.to_string()))?;
    if upgrading && response.status() != StatusCode::SWITCHING_PROTOCOLS && response.status().is_success() {
        return Err(ApiError::internal(
            "unable to upgrade connection: the node agent did not switch protocols",
        ));
    }
    let (mut parts, body) = response.into_parts();
    let body = erase(body);
    if parts.status != StatusCode::SWITCHING_PROTOCOLS {
        parts.headers.remove(header::CONNECTION);
        parts.headers.remove(header::TRANSFER_ENCODING);
        if !parts.status.is_success()
            && parts
                .headers
                .get(header::CONTENT_TYPE)
                .is_none_or(|v| v != "application/json")
        {
            let code = parts.status.as_u16();
            let bytes = read_body(body).await?;
            let text = String::from_utf8_lossy(&bytes).trim().to_owned();
            let reason = match code {
                404 => "NotFound",
                400 => "BadRequest",
                _ => "InternalError",
            };
            return Err(ApiError::new(code, reason, text));
        }
    }
    // The connection stays open as long as the body or the upgraded stream is in use.
    Ok(Response::from_parts(parts, body))
}

/// Copies what concerns the stream itself; credentials stay here.
fn copy_headers(from: &HeaderMap, to: &mut HeaderMap, upgrading: bool) {
    for (name, value) in from {
        let text = name.as_str();
        let wanted = text.starts_with("sec-websocket-")
            || text == "x-stream-protocol-version"
            || matches!(text, "content-type" | "accept" | "origin")
            || (upgrading && matches!(text, "upgrade" | "connection"));
        // A token may travel as a websocket protocol; it is not the node agent's to see.
        if wanted {
            if text == "sec-websocket-protocol" {
                let kept: Vec<&str> = value
                    .to_str()
                    .unwrap_or_default()
                    .split(',')
                    .map(str::trim)
                    .filter(|p| !p.starts_with("base64url.bearer."))
                    .collect();
                if let Ok(v) = header::HeaderValue::from_str(&kept.join(", ")) {
                    to.append(name.clone(), v);
                }
            } else {
                to.append(name.clone(), value.clone());
            }
        }
    }
}
