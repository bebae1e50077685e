//! Small helpers of the conversions: packing, well-known types, and strict reading.
//!
//! Strict reading works by taking: a decoder moves every field that it understands out of the message, and
//! [`done`] refuses what is left, by name. So a field that nobody handles cannot be overlooked, today or after an
//! update of the generated types.

use std::collections::HashMap;
use std::fmt::Debug;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, CidrRange, ConfigSource, SocketAddress, address,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{BoolValue, Duration, Struct, UInt32Value, Value};
use ipnet::IpNet;
use prost::{Message, Name};

use crate::Any;
use crate::decode::DecodeError;

pub(crate) type Result<T> = std::result::Result<T, DecodeError>;

/// An error at a place that the callers complete outwards.
pub(crate) fn fault<T>(path: impl Into<String>, problem: impl Into<String>) -> Result<T> {
    Err(DecodeError {
        path: path.into(),
        problem: problem.into(),
    })
}

/// Adds the outer part of the place to an error.
pub(crate) trait At<T> {
    fn at(self, outer: &str) -> Result<T>;
}

impl<T> At<T> for Result<T> {
    fn at(self, outer: &str) -> Result<T> {
        self.map_err(|mut error| {
            error.path = if error.path.is_empty() {
                outer.to_string()
            } else {
                format!("{outer}.{}", error.path)
            };
            error
        })
    }
}

/// Packs a message.
pub(crate) fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}

/// Unpacks a message of one type; another type, broken bytes and unknown fields are errors.
pub(crate) fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M> {
    if any.type_url != M::type_url() {
        return fault("", format!("type {} where {} is expected", any.type_url, M::type_url()));
    }
    let message = match M::decode(any.value.as_slice()) {
        Ok(message) => message,
        Err(error) => return fault("", format!("{}: {error}", M::full_name())),
    };
    // Unknown fields are dropped by the protobuf library; the length betrays them.
    if message.encoded_len() != any.value.len() {
        let field = unknown_field::<M>(&any.value).map_or_else(String::new, |tag| format!(" in field {tag}"));
        return fault(
            "",
            format!("{} has content{field} that is not understood", M::full_name()),
        );
    }
    Ok(message)
}

/// The number of the first top-level field whose content does not survive decoding.
fn unknown_field<M: Message + Default>(mut bytes: &[u8]) -> Option<u32> {
    while !bytes.is_empty() {
        let start = bytes;
        let (tag, wire_type) = prost::encoding::decode_key(&mut bytes).ok()?;
        prost::encoding::skip_field(wire_type, tag, &mut bytes, Default::default()).ok()?;
        let field = &start[..start.len() - bytes.len()];
        if M::decode(field).map_or(true, |m| m.encoded_len() != field.len()) {
            return Some(tag);
        }
    }
    None
}

/// Refuses a message of which something is left.
pub(crate) fn done<M: Message + Default + PartialEq + Debug>(message: M) -> Result<()> {
    let empty = M::default();
    if message == empty {
        return Ok(());
    }
    let fields = |m: &M| -> Vec<(String, String)> {
        // Pretty debug output has one field per group, four spaces in.
        let mut out: Vec<(String, String)> = Vec::new();
        for line in format!("{m:#?}").lines() {
            let top = line
                .strip_prefix("    ")
                .filter(|l| !l.starts_with([' ', '}', ']', ')']));
            match top.and_then(|l| l.split_once(':')) {
                Some((name, value)) => out.push((name.to_string(), value.to_string())),
                None => {
                    if let Some(last) = out.last_mut() {
                        last.1.push_str(line);
                    }
                }
            }
        }
        out
    };
    let empty = fields(&empty);
    let left: Vec<String> = fields(&message)
        .into_iter()
        .filter(|field| !empty.contains(field))
        .map(|(name, _)| name)
        .collect();
    fault("", format!("{} not supported", left.join(", ")))
}

/// Takes an optional message out; its absence is an error.
pub(crate) fn require<T>(field: &mut Option<T>, name: &str) -> Result<T> {
    match field.take() {
        Some(value) => Ok(value),
        None => fault(name, "missing"),
    }
}

/// Refuses a value that has no meaning in the model.
pub(crate) fn expect(holds: bool, name: &str, what: &str) -> Result<()> {
    if holds { Ok(()) } else { fault(name, what) }
}

pub(crate) fn boolean(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

pub(crate) fn take_bool(field: &mut Option<BoolValue>, default: bool) -> bool {
    field.take().map_or(default, |b| b.value)
}

pub(crate) fn uint(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(crate) fn take_uint(field: &mut Option<UInt32Value>) -> Option<u32> {
    field.take().map(|u| u.value)
}

/// A duration of milliseconds. Protobuf's limit of ten thousand years bounds it.
pub(crate) fn duration(ms: u64) -> Option<Duration> {
    const MAX_SECONDS: u64 = 315_576_000_000;
    Some(Duration {
        seconds: i64::try_from((ms / 1000).min(MAX_SECONDS)).unwrap_or_default(),
        nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or_default(),
    })
}

pub(crate) fn take_ms(field: &mut Option<Duration>, name: &str) -> Result<Option<u64>> {
    let Some(Duration { seconds, nanos }) = field.take() else {
        return Ok(None);
    };
    match (u64::try_from(seconds), u64::try_from(nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 && nanos % 1_000_000 == 0 => {
            Ok(Some(seconds.saturating_mul(1000) + nanos / 1_000_000))
        }
        _ => fault(name, "not a whole number of milliseconds"),
    }
}

pub(crate) fn port(value: u32, name: &str) -> Result<u16> {
    match u16::try_from(value) {
        Ok(port) => Ok(port),
        Err(_) => fault(name, format!("{value} is no port")),
    }
}

pub(crate) fn socket_address(address: String, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address,
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..SocketAddress::default()
        })),
    }
}

pub(crate) fn take_socket_address(field: &mut Option<Address>, name: &str) -> Result<(String, u16)> {
    match require(field, name)?.address {
        Some(address::Address::SocketAddress(address)) => plain_address(address).at(name),
        Some(address::Address::Pipe(_)) => fault(name, "pipe addresses are not supported"),
        Some(address::Address::EnvoyInternalAddress(_)) => fault(name, "internal addresses are not supported"),
        None => fault(name, "missing"),
    }
}

pub(crate) fn plain_address(mut address: SocketAddress) -> Result<(String, u16)> {
    let host = std::mem::take(&mut address.address);
    let value = match address.port_specifier.take() {
        Some(PortSpecifier::PortValue(value)) => value,
        Some(PortSpecifier::NamedPort(_)) => return fault("named_port", "not supported"),
        None => return fault("port_value", "missing"),
    };
    done(address)?;
    Ok((host, port(value, "port_value")?))
}

pub(crate) fn ip(text: &str, name: &str) -> Result<IpAddr> {
    match text.parse() {
        Ok(ip) => Ok(ip),
        Err(_) => fault(name, format!("{text:?} is no IP address")),
    }
}

pub(crate) fn cidr(net: IpNet) -> CidrRange {
    CidrRange {
        address_prefix: net.addr().to_string(),
        prefix_len: uint(net.prefix_len().into()),
    }
}

pub(crate) fn take_cidr(mut range: CidrRange) -> Result<IpNet> {
    let address = ip(&std::mem::take(&mut range.address_prefix), "address_prefix")?;
    let length = take_uint(&mut range.prefix_len).unwrap_or(0);
    match u8::try_from(length).map(|length| IpNet::new(address, length)) {
        Ok(Ok(net)) => Ok(net),
        _ => fault("prefix_len", format!("{length} is too long for {address}")),
    }
}

/// "By the aggregated stream that this message came on."
pub(crate) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    })
}

/// Accepts the aggregated stream only.
pub(crate) fn take_ads(field: &mut Option<ConfigSource>, name: &str) -> Result<()> {
    let mut source = require(field, name)?;
    source.initial_fetch_timeout = None;
    source.resource_api_version = 0;
    match source.config_source_specifier.take() {
        Some(ConfigSourceSpecifier::Ads(_)) => done(source).at(name),
        _ => fault(name, "only the aggregated stream (ads) is supported"),
    }
}

pub(crate) fn text(value: impl Into<String>) -> Value {
    Value {
        kind: Some(Kind::StringValue(value.into())),
    }
}

pub(crate) fn structure<K: Into<String>>(fields: impl IntoIterator<Item = (K, Value)>) -> Struct {
    Struct {
        fields: fields.into_iter().map(|(k, v)| (k.into(), v)).collect(),
    }
}

pub(crate) fn take_text(fields: &mut HashMap<String, Value>, key: &str) -> Result<Option<String>> {
    match fields.remove(key).map(|v| v.kind) {
        None => Ok(None),
        Some(Some(Kind::StringValue(text))) => Ok(Some(text)),
        Some(_) => fault(key, "not a string"),
    }
}
