//! Mantlet api.
