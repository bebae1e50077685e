//! Findings as text, in istioctl's forms.

use std::fmt::Write;

use anyhow::Result;
use mantlet_api::ISTIO_VERSION;
use mantlet_translate::analyze::{ANALYZERS, Finding, Message};
use serde::Serialize;

use crate::inspect;

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One line each.
    Log,
    /// A JSON array.
    Json,
    /// The same as YAML.
    Yaml,
}

/// A finding as it is printed; the field names of JSON are istioctl's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    code: &'static str,
    documentation_url: String,
    level: String,
    message: String,
    origin: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<String>,
}

impl Line {
    /// `reference` is the `file:line`, for objects of files.
    pub fn new(finding: &Finding, reference: Option<String>) -> Line {
        let code = finding.message.code;
        let lower = code.to_ascii_lowercase();
        Line {
            code,
            documentation_url: if code.starts_with("IST") {
                format!("{}/{lower}/", documentation())
            } else {
                format!("docs/messages.md#{lower}")
            },
            level: format!("{:?}", finding.message.level),
            message: finding.text.clone(),
            origin: if finding.kind.is_empty() {
                String::new()
            } else {
                finding.object()
            },
            reference,
        }
    }
}

/// Where Istio explains its messages.
pub fn documentation() -> String {
    let minor: Vec<&str> = ISTIO_VERSION.split('.').take(2).collect();
    format!("https://istio.io/v{}/docs/reference/config/analysis", minor.join("."))
}

/// All findings.
pub fn all(lines: &[Line], format: Format) -> Result<String> {
    Ok(match format {
        Format::Log => {
            let mut out = String::new();
            for line in lines {
                let mut place = line.origin.clone();
                if let Some(reference) = &line.reference {
                    if !place.is_empty() {
                        place.push(' ');
                    }
                    place.push_str(reference);
                }
                let place = if place.is_empty() {
                    String::new()
                } else {
                    format!(" ({place})")
                };
                writeln!(out, "{} [{}]{place} {}", line.level, line.code, line.message)?;
            }
            out
        }
        Format::Json => inspect::render(&lines, inspect::Output::Json)?,
        Format::Yaml => inspect::render(&lines, inspect::Output::Yaml)?,
    })
}

/// The list of analyzers.
pub fn analyzers() -> String {
    let mut out = String::new();
    for analyzer in ANALYZERS {
        let _ = writeln!(out, "* {}:\n    {}", analyzer.name, analyzer.description);
    }
    out
}

/// One message explained.
pub fn explanation(message: &Message) -> String {
    let security = if message.security { ", about security" } else { "" };
    format!(
        "{} {} ({:?}{security})\n\n{}\n\n{}\n",
        message.code, message.name, message.level, message.meaning, message.advice
    )
}
