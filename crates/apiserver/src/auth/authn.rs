//! Identities from client certificates and from `Authorization` headers.
//!
//! The TLS edge has verified a client certificate's chain before this reads its subject; tokens are verified here.

use http::{HeaderMap, header};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Identity;
use crate::error::{ApiError, ApiResult};
use crate::server::ApiServer;

/// The identity of a verified client certificate: common name is the user, organisations are groups.
///
/// # Errors
/// A text when the certificate cannot be read or has no common name.
pub(crate) fn from_certificate(der: &[u8]) -> Result<Identity, String> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| format!("client certificate is not readable: {e}"))?;
    let subject = cert.subject();
    let texts = |list: Vec<&x509_parser::x509::AttributeTypeAndValue<'_>>| -> Vec<String> {
        list.iter().filter_map(|a| a.as_str().ok()).map(str::to_owned).collect()
    };
    let username = texts(subject.iter_common_name().collect())
        .into_iter()
        .next()
        .filter(|n| !n.is_empty())
        .ok_or("client certificate has no common name")?;
    let mut groups = texts(subject.iter_organization().collect());
    groups.push("system:authenticated".into());
    Ok(Identity {
        username,
        groups,
        ..Identity::default()
    })
}

/// The identity of a request without a client certificate. No credentials at all is anonymous; wrong ones are refused.
pub(crate) fn from_headers(server: &ApiServer, headers: &HeaderMap) -> ApiResult<Identity> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Ok(Identity::anonymous());
    };
    let text = value.to_str().map_err(|_| ApiError::unauthorized())?;
    let token = match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => return Err(ApiError::unauthorized()),
    };
    if token.is_empty() || token.len() > 16 << 10 {
        return Err(ApiError::unauthorized());
    }
    match super::token::authenticate(server, token, &server.config().api_audiences) {
        Ok((identity, _)) => Ok(identity),
        Err(why) => {
            tracing::debug!(reason = %why, "bearer token refused");
            Err(ApiError::unauthorized())
        }
    }
}
