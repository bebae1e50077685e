//! The conversions, one module per kind of resource, each with both directions side by side.

#![expect(deprecated, reason = "older control planes still write the deprecated spellings")]

pub(crate) mod access_log;
pub(crate) mod authz;
pub(crate) mod cluster;
pub(crate) mod destinations;
pub(crate) mod endpoint;
pub(crate) mod ext_authz;
pub(crate) mod http;
pub(crate) mod jwt;
pub(crate) mod listener;
pub(crate) mod route;
pub(crate) mod secret;
pub(crate) mod strings;
pub(crate) mod tls;
