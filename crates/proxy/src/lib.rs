//! Mantlet proxy.
