//! The guestbook: a page with what visitors have written, kept in Redis. Version 2 asks the analyzer for the tone of each message.
//!
//! The page works without scripts: the form posts, the answer leads back to the page. `GET /messages` gives the same as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::customers::response;
use crate::redis::Redis;
use crate::web_frontend::escape;

/// The list in Redis.
const KEY: &str = "guestbook";
/// Largest form.
const MAX_FORM: usize = 16 << 10;
/// Longest message, characters.
const MAX_MESSAGE: usize = 500;
/// Messages that the page shows.
const SHOWN: usize = 100;
/// Largest answer of the analyzer.
const MAX_ANSWER: usize = 64 << 10;
/// How long the analyzer may take.
const LIMIT: Duration = Duration::from_secs(5);
/// What stands beside a message whose tone is not known.
const NO_TONE: &str = "Error - unable to detect Tone from the Analyzer service";

/// See the module's documentation.
#[derive(Clone)]
pub(crate) struct Guestbook {
    redis: Redis,
    client: Client<HttpConnector, Full<Bytes>>,
    analyzer: Option<Uri>,
}

impl Guestbook {
    /// Without an analyzer's URL this is version 1.
    pub(crate) fn new(redis: &str, analyzer: Option<&str>) -> Result<Self> {
        let analyzer = analyzer
            .map(|url| -> Result<Uri> {
                let uri: Uri = url.parse().with_context(|| format!("ANALYZER_URL {url:?}"))?;
                anyhow::ensure!(
                    uri.scheme_str() == Some("http") && uri.host().is_some(),
                    "ANALYZER_URL {url:?} is no http URL"
                );
                Ok(uri)
            })
            .transpose()?;
        Ok(Self {
            redis: Redis::new(redis),
            client: Client::builder(TokioExecutor::new()).build_http(),
            analyzer,
        })
    }

    fn title(&self) -> &'static str {
        if self.analyzer.is_some() {
            "Guestbook - v2"
        } else {
            "Guestbook - v1"
        }
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method().clone(), request.uri().path()) {
            (Method::GET | Method::HEAD, "/") => match self.redis.last(KEY, SHOWN).await {
                Ok(entries) => html(StatusCode::OK, self.page(&entries, None)),
                Err(error) => html(StatusCode::BAD_GATEWAY, self.page(&[], Some(&format!("{error:#}")))),
            },
            (Method::GET, "/messages") => match self.redis.last(KEY, SHOWN).await {
                Ok(entries) => {
                    let list: Vec<Value> = entries.iter().map(|entry| read(entry)).collect();
                    response(
                        StatusCode::OK,
                        "application/json",
                        Bytes::from(Value::Array(list).to_string()),
                    )
                }
                Err(error) => response(
                    StatusCode::BAD_GATEWAY,
                    "application/json",
                    Bytes::from(json!({"error": format!("{error:#}")}).to_string()),
                ),
            },
            (Method::POST, "/messages") => match self.sign(request).await {
                Ok(()) => {
                    let mut answer = html(StatusCode::SEE_OTHER, String::new());
                    answer
                        .headers_mut()
                        .insert(header::LOCATION, http::HeaderValue::from_static("/"));
                    answer
                }
                Err(Refused { status, reason }) => html(status, self.page(&[], Some(&reason))),
            },
            (Method::GET, "/healthz") => html(StatusCode::OK, "ok\n".to_owned()),
            _ => html(StatusCode::NOT_FOUND, self.page(&[], Some("There is no such page."))),
        }
    }

    /// Takes a message of the form.
    async fn sign(&self, request: Request<Incoming>) -> Result<(), Refused> {
        let body = Limited::new(request.into_body(), MAX_FORM)
            .collect()
            .await
            .map_err(|_| Refused::new(StatusCode::PAYLOAD_TOO_LARGE, "The form is too large."))?;
        let text = field(&body.to_bytes(), "message").unwrap_or_default();
        let text = text.trim();
        if text.is_empty() || text.chars().count() > MAX_MESSAGE {
            return Err(Refused::new(
                StatusCode::BAD_REQUEST,
                "A message has 1 to 500 characters.",
            ));
        }
        let tone = match &self.analyzer {
            None => Value::Null,
            Some(url) => match self.tone(url, text).await {
                Ok(tone) => json!(tone),
                Err(error) => {
                    eprintln!("tone: {error:#}");
                    json!(NO_TONE)
                }
            },
        };
        let entry = json!({"text": text, "tone": tone}).to_string();
        self.redis
            .push(KEY, &entry)
            .await
            .map(|_| ())
            .map_err(|error| Refused::new(StatusCode::BAD_GATEWAY, &format!("{error:#}")))
    }

    /// The strongest tone of a text.
    async fn tone(&self, url: &Uri, text: &str) -> Result<String> {
        let question = json!({ "input_text": text }).to_string();
        let call = Request::post(url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(question)))?;
        let answer = async {
            let answer = self.client.request(call).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|error| anyhow::anyhow!(error))?
                .to_bytes();
            if !status.is_success() {
                bail!("{url} answered {status}: {}", String::from_utf8_lossy(&body));
            }
            let tones: Value = serde_json::from_slice(&body).context("the answer is no JSON")?;
            let name = tones[0]["tone_name"].as_str().context("the answer has no tone")?;
            Ok(name.to_owned())
        };
        tokio::time::timeout(LIMIT, answer)
            .await
            .with_context(|| format!("{url} does not answer"))?
    }

    fn page(&self, entries: &[String], problem: Option<&str>) -> String {
        let title = self.title();
        let mut list = String::new();
        for entry in entries {
            let entry = read(entry);
            let text = escape(entry["text"].as_str().unwrap_or_default());
            let _ = match entry["tone"].as_str() {
                Some(tone) => writeln!(list, "      <li>{text} <em class=\"tone\">{}</em></li>", escape(tone)),
                None => writeln!(list, "      <li>{text}</li>"),
            };
        }
        let problem = problem.map_or_else(String::new, |text| {
            format!("    <p class=\"problem\" role=\"alert\">{}</p>\n", escape(text))
        });
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n  <head>\n    <meta charset=\"utf-8\">\n    \
             <meta name=\"viewport\" content=\"width=device-width\">\n    <title>{title}</title>\n    <style>\n      \
             body {{ font-family: sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem; }}\n      \
             .tone {{ color: #555; }}\n      .problem {{ color: #a00; }}\n    </style>\n  </head>\n  <body>\n    \
             <h1>{title}</h1>\n{problem}    <form method=\"post\" action=\"/messages\">\n      \
             <label>Your message <input name=\"message\" maxlength=\"{MAX_MESSAGE}\" required autofocus></label>\n      \
             <button>Submit</button>\n    </form>\n    <ul id=\"guestbook-entries\">\n{list}    </ul>\n  </body>\n</html>\n"
        )
    }
}

struct Refused {
    status: StatusCode,
    reason: String,
}

impl Refused {
    fn new(status: StatusCode, reason: &str) -> Refused {
        Refused {
            status,
            reason: reason.to_owned(),
        }
    }
}

fn html(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/html; charset=utf-8", Bytes::from(body))
}

/// An entry as it is kept; what others have put into the list is a text.
fn read(entry: &str) -> Value {
    match serde_json::from_str::<Value>(entry) {
        Ok(value) if value["text"].is_string() => value,
        _ => json!({"text": entry, "tone": null}),
    }
}

/// A field of a URL-encoded form.
fn field(form: &[u8], name: &str) -> Option<String> {
    form.split(|b| *b == b'&').find_map(|pair| {
        let at = pair.iter().position(|b| *b == b'=')?;
        (decode(&pair[..at]) == name).then(|| decode(&pair[at + 1..]))
    })
}

fn decode(text: &[u8]) -> String {
    let hex = |b: u8| (b as char).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let escaped = (text[at] == b'%' && at + 2 < text.len())
            .then(|| Some(hex(text[at + 1])? << 4 | hex(text[at + 2])?))
            .flatten();
        match escaped {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if text[at] == b'+' { b' ' } else { text[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded() {
        assert_eq!(
            field(b"a=1&message=caf%C3%A9+%26+tea", "message").as_deref(),
            Some("café & tea")
        );
        assert_eq!(field(b"message=100%25%", "message").as_deref(), Some("100%%"));
        assert_eq!(field(b"other=1", "message"), None);
        assert_eq!(field(b"message=%zz", "message").as_deref(), Some("%zz"));
    }

    #[test]
    fn what_visitors_write_cannot_become_markup() {
        let book = Guestbook::new("redis:6379", Some("http://analyzer/tone")).unwrap();
        let page = book.page(
            &[
                r#"{"text": "<script>alert(1)</script>", "tone": "<b>"}"#.into(),
                "<i>".into(),
            ],
            None,
        );
        assert!(
            !page.contains("<script>") && !page.contains("<b>") && !page.contains("<i>"),
            "{page}"
        );
        assert!(page.contains("&lt;script&gt;") && page.contains("Guestbook - v2"));
    }

    #[test]
    fn version_one_knows_no_analyzer() {
        let book = Guestbook::new("redis:6379", None).unwrap();
        assert!(book.page(&[], None).contains("Guestbook - v1"));
        assert!(Guestbook::new("redis:6379", Some("ftp://x")).is_err());
    }
}
