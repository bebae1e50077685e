//! The resolver's settings: Istio's environment variables (S3.60, S3.63, S3.67, S3.68), read once.

use std::path::PathBuf;
use std::time::Duration;

use super::guard::{self, Guard};
use crate::ca::OptionError;

/// Settings of the resolver.
#[derive(Clone, Debug)]
pub struct JwksOptions {
    /// Time between fetches of good keys (`PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
    pub refresh: Duration,
    /// What may be dialled (`BLOCKED_CIDRS_IN_JWKS_URIS`).
    pub guard: Guard,
    /// Whether certificates of issuers are not verified (`JWKS_RESOLVER_INSECURE_SKIP_VERIFY`).
    pub skip_verify: bool,
    /// Trust anchors beside the system's.
    pub extra_roots: PathBuf,
}

impl Default for JwksOptions {
    fn default() -> Self {
        JwksOptions {
            refresh: Duration::from_secs(20 * 60),
            guard: Guard::default(),
            skip_verify: false,
            extra_roots: PathBuf::from("/cacerts/extra.pem"),
        }
    }
}

impl JwksOptions {
    /// Changed by these environment variables. An address range that cannot be read is an error: leaving it out would open what
    /// the operator meant to close.
    ///
    /// # Errors
    /// The first variable that cannot be read.
    pub fn with_env(mut self, get: impl Fn(&str) -> Option<String>) -> Result<JwksOptions, OptionError> {
        let given = |name: &str| get(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let error = |name: &str, value: &str, reason: &str| OptionError {
            name: name.into(),
            value: value.into(),
            reason: reason.into(),
        };
        let name = "PILOT_JWT_PUB_KEY_REFRESH_INTERVAL";
        if let Some(text) = given(name) {
            let refresh = crate::ca::duration::parse(&text).and_then(|d| Duration::try_from(d).ok());
            self.refresh = refresh
                .filter(|d| *d >= Duration::from_secs(1))
                .ok_or_else(|| error(name, &text, "must be a duration of at least 1s, such as 20m"))?;
        }
        let name = "BLOCKED_CIDRS_IN_JWKS_URIS";
        if let Some(text) = given(name) {
            let ranges: Result<Vec<_>, String> = text
                .split(',')
                .map(str::trim)
                .filter(|range| !range.is_empty())
                .map(guard::range)
                .collect();
            self.guard = Guard::new(ranges.map_err(|reason| error(name, &text, &reason))?);
        }
        let name = "JWKS_RESOLVER_INSECURE_SKIP_VERIFY";
        if let Some(text) = given(name) {
            self.skip_verify = match text.as_str() {
                "true" | "1" | "t" | "T" | "TRUE" | "True" => true,
                "false" | "0" | "f" | "F" | "FALSE" | "False" => false,
                _ => return Err(error(name, &text, "must be true or false")),
            };
        }
        let name = "PILOT_JWT_ENABLE_REMOTE_JWKS";
        if let Some(text) = given(name)
            && !matches!(text.to_ascii_lowercase().as_str(), "false" | "istiod")
        {
            tracing::warn!(
                target: "jwks",
                "{name}={text}: key sets are always fetched by the control plane, as with {name}=istiod"
            );
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<JwksOptions, OptionError> {
        let vars: std::collections::HashMap<String, String> =
            vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        JwksOptions::default().with_env(|name| vars.get(name).cloned())
    }

    #[test]
    fn istios_variables_are_read() {
        let options = read(&[
            ("PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", "90s"),
            ("BLOCKED_CIDRS_IN_JWKS_URIS", "10.0.0.0/8, 192.168.0.0/16,"),
            ("JWKS_RESOLVER_INSECURE_SKIP_VERIFY", "true"),
        ])
        .unwrap();
        assert_eq!(options.refresh, Duration::from_secs(90));
        assert!(options.skip_verify);
        assert!(options.guard.check("10.1.2.3".parse().unwrap()).is_err());
        assert!(options.guard.check("192.168.1.1".parse().unwrap()).is_err());
        assert!(options.guard.check("11.1.2.3".parse().unwrap()).is_ok());
        assert_eq!(read(&[]).unwrap().refresh, Duration::from_secs(1200));
    }

    #[test]
    fn a_range_that_cannot_be_read_is_an_error_and_not_an_open_door() {
        for (name, value) in [
            ("BLOCKED_CIDRS_IN_JWKS_URIS", "10.0.0.0/8,internal"),
            ("PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", "often"),
            ("PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", "0"),
            ("JWKS_RESOLVER_INSECURE_SKIP_VERIFY", "maybe"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert_eq!(error.name, name);
        }
    }
}
