//! The web frontend: a page with the customers it has fetched, or an error page with status 500.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::customers::response;

/// Largest list of customers that is rendered.
const MAX_BODY: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(10);
/// What a tracing system needs to join the two calls; a workload must hand it on itself.
const TRACE_HEADERS: [&str; 9] = [
    "x-request-id",
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
];

/// See the module's documentation.
#[derive(Clone)]
pub(crate) struct Frontend {
    client: Client<HttpConnector, Empty<Bytes>>,
    customers: Uri,
}

impl Frontend {
    pub(crate) fn new(url: &str) -> Result<Self> {
        let customers: Uri = url.parse().with_context(|| format!("CUSTOMER_SERVICE_URL {url:?}"))?;
        anyhow::ensure!(
            customers.scheme_str() == Some("http") && customers.host().is_some(),
            "CUSTOMER_SERVICE_URL {url:?} is no http URL"
        );
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            customers,
        })
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let html = |status, body: String| response(status, "text/html; charset=utf-8", Bytes::from(body));
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/") => match self.fetch(&request).await {
                Ok(customers) => html(StatusCode::OK, page("Customers", &table(&customers))),
                Err(error) => {
                    let text = format!(
                        "<p class=\"error\">The customers could not be loaded: {}</p>",
                        escape(&format!("{error:#}"))
                    );
                    html(StatusCode::INTERNAL_SERVER_ERROR, page("Something went wrong", &text))
                }
            },
            (&Method::GET, "/healthz") => html(StatusCode::OK, "ok\n".to_owned()),
            _ => html(
                StatusCode::NOT_FOUND,
                page("Not found", "<p>There is no such page.</p>"),
            ),
        }
    }

    async fn fetch(&self, request: &Request<Incoming>) -> Result<Vec<serde_json::Value>> {
        let mut call = Request::get(self.customers.clone()).header(header::ACCEPT, "application/json");
        for name in TRACE_HEADERS {
            if let Some(value) = request.headers().get(name) {
                call = call.header(name, value);
            }
        }
        let answer = async {
            let answer = self.client.request(call.body(Empty::new())?).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_BODY)
                .collect()
                .await
                .map_err(|error| anyhow::anyhow!(error))?;
            let body = body.to_bytes();
            if !status.is_success() {
                let text = String::from_utf8_lossy(&body);
                anyhow::bail!(
                    "{} answered {status}: {}",
                    self.customers,
                    text.chars().take(200).collect::<String>()
                );
            }
            serde_json::from_slice(&body).context("the answer is no list")
        };
        tokio::time::timeout(LIMIT, answer)
            .await
            .with_context(|| format!("{} does not answer", self.customers))?
    }
}

fn table(customers: &[serde_json::Value]) -> String {
    let mut rows = String::new();
    for customer in customers {
        let field = |path: &str| {
            let value = customer.pointer(path);
            escape(&value.map_or_else(String::new, |value| {
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            }))
        };
        let _ = writeln!(
            rows,
            "      <tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            field("/id"),
            field("/name"),
            field("/address/street"),
            field("/address/city")
        );
    }
    format!("<table>\n      <tr><th>#</th><th>Name</th><th>Street</th><th>City</th></tr>\n{rows}    </table>")
}

fn page(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n  <head>\n    <meta charset=\"utf-8\">\n    <title>{title}</title>\n  </head>\n  \
         <body>\n    <h1>{title}</h1>\n    {body}\n  </body>\n</html>\n"
    )
}

pub(crate) fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_customer_is_called_cannot_become_markup() {
        let customers = [serde_json::json!({"id": 1, "name": "<script>", "address": {"city": "A & B"}})];
        let html = table(&customers);
        assert!(
            html.contains("&lt;script&gt;") && html.contains("A &amp; B") && !html.contains("<script>"),
            "{html}"
        );
    }

    #[test]
    fn only_http_urls_are_taken() {
        assert!(Frontend::new("http://customers.default").is_ok());
        assert!(Frontend::new("customers").is_err());
        assert!(Frontend::new("https://customers").is_err());
    }
}
