//! Mantlet testkit.
