//! `mantlet authz explain`: is this call allowed, by what, or what keeps it from being?

use std::fmt::Write;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use serde_json::Value;

use super::question::{self, Answer, Decision, Request};
use super::{Outcome, Source, target};
use crate::inspect::{Output, render};

/// Arguments of `authz explain`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # May the service account sleep of namespace default read /customers?
  mantlet authz explain --from default/sleep --to default/customers:80 --path /customers

  # The same question to files, before they are applied
  mantlet authz explain --from default/sleep --to default/customers:80 -f policies/

  # With a token, from a client without a sidecar
  mantlet authz explain --from plaintext --to foo/httpbin:8000 --path /headers --jwt @token.jwt")]
pub struct Args {
    /// The client: NAMESPACE/SERVICEACCOUNT, an IP address, or `plaintext` for one outside of the mesh
    #[arg(long, value_name = "CLIENT")]
    pub from: String,
    /// The server: NAMESPACE/SERVICE, SERVICE.NAMESPACE or deploy/NAME, with :PORT behind it where it has several
    #[arg(long, value_name = "SERVER")]
    pub to: String,
    /// Request method [default: GET]
    #[arg(long)]
    pub method: Option<String>,
    /// Request path [default: /]
    #[arg(long)]
    pub path: Option<String>,
    /// Host header [default: the service's name]
    #[arg(long)]
    pub host: Option<String>,
    /// Request header `NAME: VALUE`, repeatable
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,
    /// Token that the request carries: the token, `@FILE`, or its payload as JSON; its signature is taken as good
    #[arg(long)]
    pub jwt: Option<String>,
    /// Server name of the TLS connection
    #[arg(long)]
    pub sni: Option<String>,
    /// Address of the client, where policies look at it
    #[arg(long, value_name = "IP")]
    pub source_ip: Option<IpAddr>,
    /// Ask about a connection that carries bytes, not an HTTP request
    #[arg(long)]
    pub tcp: bool,
    /// Ask about plaintext, whatever the client would send
    #[arg(long)]
    pub plaintext: bool,
    /// Where to look.
    #[command(flatten)]
    pub source: Source,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Answers.
///
/// # Errors
/// Nothing of that name, or a source that cannot be read.
pub fn run(args: &Args) -> Result<Outcome> {
    let request = Request {
        method: args.method.clone(),
        path: args.path.as_deref().map(path).transpose()?,
        host: args.host.clone(),
        headers: args.headers.iter().map(|h| header(h)).collect::<Result<_>>()?,
        claims: args.jwt.as_deref().map(claims).transpose()?,
        sni: args.sni.clone(),
        source: args.source_ip,
        tcp: args.tcp,
        plaintext: args.plaintext,
        now: now(),
    };
    let (world, namespace) = args.source.load()?;
    let caller = target::caller(&world, &args.from, &namespace)?;
    let to = target::destination(&world, &args.to, &namespace)?;
    if to.pods.is_empty() {
        bail!("{} has no pods; nothing would answer", to.name);
    }
    let answers = question::ask(&world, &caller, &to, &request);
    if args.output != Output::Short {
        return render(&answers, args.output).map(Outcome::from);
    }
    let mut out = String::new();
    if answers.len() > to.ports.len() {
        out.push_str("The pods do not all answer alike:\n\n");
    }
    for (index, answer) in answers.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        print(answer, &args.from, &to.name, &mut out);
    }
    Ok(out.into())
}

/// Seconds since the epoch.
pub fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// A request's path without query and fragment, which policies do not see.
pub fn path(text: &str) -> Result<String> {
    if !text.starts_with('/') {
        bail!("path {text:?} must begin with /");
    }
    Ok(text.split(['?', '#']).next().unwrap_or(text).to_string())
}

/// `NAME: VALUE` or `NAME=VALUE`.
pub fn header(text: &str) -> Result<(String, String)> {
    let (name, value) = text
        .split_once(':')
        .or_else(|| text.split_once('='))
        .with_context(|| format!("--header {text:?}: expected `NAME: VALUE`"))?;
    Ok((name.trim().to_ascii_lowercase(), value.trim().to_string()))
}

/// The payload of a token: a JWT, `@FILE` with one, or the payload itself.
pub fn claims(text: &str) -> Result<Value> {
    let text = match text.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("reading {file}"))?,
        None => text.to_string(),
    };
    let text = text.trim();
    let text = text.strip_prefix("Bearer ").unwrap_or(text);
    let json = if text.starts_with('{') {
        text.as_bytes().to_vec()
    } else {
        let payload = text
            .split('.')
            .nth(1)
            .context("--jwt: neither a token of three parts, nor JSON, nor @FILE")?;
        base64::engine::general_purpose::URL_SAFE_NO_PAD
            .decode(payload.trim_end_matches('='))
            .context("--jwt: the payload is not base64url")?
    };
    let claims: Value = serde_json::from_slice(&json).context("--jwt: the payload is no JSON")?;
    if !claims.is_object() {
        bail!("--jwt: the payload is no JSON object");
    }
    Ok(claims)
}

fn print(answer: &Answer, from: &str, to: &str, out: &mut String) {
    // Writing to a String cannot fail.
    let word = match answer.decision {
        Decision::Allowed => "ALLOWED",
        Decision::Denied => "DENIED",
        Decision::Unauthorized => "UNAUTHORIZED",
        Decision::Reset => "REFUSED",
    };
    let _ = writeln!(out, "{word}  {from} -> {to}:{}", answer.service_port);
    let mut line = |name: &str, text: &str| {
        let _ = writeln!(out, "  {name:<12}{text}");
    };
    line("server", &format!("port {} of {}", answer.port, answer.pods.join(", ")));
    let client = match (&answer.from.principal, &answer.from.because) {
        (Some(principal), _) => format!("{} as {principal}", answer.from.transport),
        (None, Some(why)) => format!("{}: {why}", answer.from.transport),
        (None, None) => answer.from.transport.to_string(),
    };
    line("client", &client);
    if let Some(rule) = &answer.decided_by {
        line("policy", &format!("{} {}", rule.action, question::shown(rule)));
    }
    if !answer.reason.is_empty() {
        line("because", &answer.reason);
    }
    if let Some(miss) = &answer.nearest {
        line("nearest", &question::shown(&miss.rule));
        for failed in &miss.failed {
            line("", &format!("- {failed}"));
        }
    }
    if !answer.client_sees.is_empty() {
        line("client sees", &answer.client_sees);
    }
    for note in &answer.notes {
        line("note", note);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_in_every_form() {
        let payload = r#"{"iss":"a","sub":"b"}"#;
        let encoded = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(payload);
        for text in [
            payload.to_string(),
            format!("x.{encoded}.y"),
            format!("Bearer x.{encoded}.y\n"),
        ] {
            assert_eq!(claims(&text).expect("a token")["iss"], "a", "{text}");
        }
        for text in ["", "abc", "x.***.y", "[1]", "@/no/such/file"] {
            assert!(claims(text).is_err(), "{text}");
        }
    }

    #[test]
    fn headers_and_paths() {
        assert_eq!(
            header("X-Role: a:b").expect("a header"),
            ("x-role".into(), "a:b".into())
        );
        assert!(header("nothing").is_err());
        assert_eq!(path("/a?b#c").expect("a path"), "/a");
        assert!(path("a").is_err());
    }
}
