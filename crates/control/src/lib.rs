//! Mantlet control.

pub mod auth;
pub mod ca;
