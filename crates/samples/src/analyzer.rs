//! The analyzer: `POST /tone` with `{"input_text": "…"}` answers with the tones of the text, the strongest first.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::customers::response;

/// Largest text that is looked at.
const MAX_BODY: usize = 64 << 10;

/// Tones and the words that show them, by their beginnings.
const TONES: [(&str, &[&str]); 5] = [
    (
        "Joy",
        &[
            "happ",
            "glad",
            "joy",
            "love",
            "great",
            "wonderful",
            "nice",
            "thank",
            "fun",
            "good",
            "beautiful",
            "excellent",
        ],
    ),
    (
        "Sadness",
        &[
            "sad", "sorry", "miss", "lonely", "cry", "tear", "unhappy", "gloom", "grief",
        ],
    ),
    (
        "Anger",
        &["angry", "anger", "hate", "furious", "mad", "terrible", "awful", "annoy"],
    ),
    (
        "Fear",
        &["afraid", "fear", "scare", "worr", "anxious", "danger", "panic"],
    ),
    (
        "Analytical",
        &[
            "because",
            "therefore",
            "think",
            "reason",
            "measure",
            "compare",
            "why",
            "how",
        ],
    ),
];

/// Answers one request.
pub(crate) async fn answer(request: Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method().clone(), request.uri().path()) {
        (Method::POST, "/tone") => match Limited::new(request.into_body(), MAX_BODY).collect().await {
            Ok(body) => match serde_json::from_slice::<Value>(&body.to_bytes()) {
                Ok(question) => match question["input_text"].as_str() {
                    Some(text) => json_response(StatusCode::OK, &tones(text)),
                    None => error(StatusCode::BAD_REQUEST, "the field input_text is missing"),
                },
                Err(_) => error(StatusCode::BAD_REQUEST, "the body is no JSON"),
            },
            Err(_) => error(StatusCode::PAYLOAD_TOO_LARGE, "the text is too long"),
        },
        (Method::GET, "/tone") => json_response(
            StatusCode::OK,
            &json!({"tones": TONES.iter().map(|(name, _)| *name).collect::<Vec<_>>()}),
        ),
        (Method::GET, "/healthz") => json_response(StatusCode::OK, &json!({"status": "ok"})),
        _ => error(StatusCode::NOT_FOUND, "there is only /tone"),
    }
}

fn tones(text: &str) -> Value {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower
        .split(|c: char| !c.is_alphabetic())
        .filter(|word| !word.is_empty())
        .collect();
    let mut found: Vec<(usize, &str)> = TONES
        .iter()
        .map(|(name, beginnings)| {
            let hits = words
                .iter()
                .filter(|word| beginnings.iter().any(|beginning| word.starts_with(beginning)))
                .count();
            (hits, *name)
        })
        .filter(|(hits, _)| *hits > 0)
        .collect();
    found.sort_by_key(|(hits, _)| std::cmp::Reverse(*hits));
    let all: usize = found.iter().map(|(hits, _)| hits).sum();
    if all == 0 {
        return json!([{"tone_name": "Neutral", "score": "1.00"}]);
    }
    let percent = |hits: usize| (hits * 100).div_ceil(all);
    found
        .into_iter()
        .map(|(hits, name)| {
            let percent = percent(hits);
            json!({"tone_name": name, "score": format!("{}.{:02}", percent / 100, percent % 100)})
        })
        .collect()
}

fn json_response(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    response(status, "application/json", Bytes::from(value.to_string()))
}

fn error(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    json_response(status, &json!({ "error": message }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_tone_comes_first() {
        let name = |text: &str| tones(text)[0]["tone_name"].as_str().unwrap().to_owned();
        assert_eq!(name("I am so happy, what a wonderful day"), "Joy");
        assert_eq!(name("Happy? No: sad and lonely"), "Sadness");
        assert_eq!(name("42"), "Neutral");
        assert_eq!(name(""), "Neutral");
    }
}
