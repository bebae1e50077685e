//! Mantlet runtime.
