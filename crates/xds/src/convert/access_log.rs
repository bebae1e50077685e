//! Access logs to files.

use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog as Proto, access_log};
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::envoy::config::core::v3::{DataSource, SubstitutionFormatString};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::file_access_log::AccessLogFormat;
use envoy_types::pb::google::protobuf::value::Kind;
use mantlet_model::listener::AccessLog;

use crate::wire::{At, Result, done, fault, pack, structure, text, unpack};

const NAME: &str = "envoy.access_loggers.file";

pub(crate) fn encode(log: &AccessLog) -> Proto {
    let format = if !log.json.is_empty() {
        let fields = log.json.iter().map(|(k, v)| (k.clone(), text(v.clone())));
        Some(Format::JsonFormat(structure(fields)))
    } else if !log.format.is_empty() {
        Some(Format::TextFormatSource(DataSource {
            specifier: Some(Specifier::InlineString(log.format.clone())),
            ..DataSource::default()
        }))
    } else {
        None
    };
    let file = FileAccessLog {
        path: log.path.clone(),
        access_log_format: format.map(|format| {
            AccessLogFormat::LogFormat(SubstitutionFormatString {
                format: Some(format),
                ..SubstitutionFormatString::default()
            })
        }),
    };
    Proto {
        name: NAME.into(),
        filter: None,
        config_type: Some(access_log::ConfigType::TypedConfig(pack(&file))),
    }
}

/// At most one file log; JSON fields come back sorted by name, because a protobuf map has no order.
pub(crate) fn decode(logs: Vec<Proto>) -> Result<Option<AccessLog>> {
    let mut logs = logs.into_iter();
    let Some(mut log) = logs.next() else {
        return Ok(None);
    };
    if logs.next().is_some() {
        return fault("access_log", "more than one log is not supported");
    }
    log.name.clear();
    let Some(access_log::ConfigType::TypedConfig(any)) = log.config_type.take() else {
        return fault("access_log", "without configuration");
    };
    done(log).at("access_log")?;
    let mut file: FileAccessLog = unpack(&any).at("access_log")?;
    let mut out = AccessLog {
        path: std::mem::take(&mut file.path),
        format: String::new(),
        json: Vec::new(),
    };
    if let Some(format) = file.access_log_format.take() {
        let AccessLogFormat::LogFormat(mut format) = format else {
            return fault("access_log.access_log_format", "only log_format is supported");
        };
        match format.format.take() {
            None => {}
            Some(Format::TextFormat(text)) => out.format = text,
            Some(Format::TextFormatSource(source)) => match source.specifier {
                Some(Specifier::InlineString(text)) => out.format = text,
                _ => return fault("access_log.text_format_source", "only inline_string is supported"),
            },
            Some(Format::JsonFormat(fields)) => {
                for (name, value) in fields.fields {
                    let Some(Kind::StringValue(value)) = value.kind else {
                        return fault(format!("access_log.json_format.{name}"), "only strings are supported");
                    };
                    out.json.push((name, value));
                }
                out.json.sort();
            }
        }
        done(format).at("access_log.log_format")?;
    }
    Ok(Some(out))
}
