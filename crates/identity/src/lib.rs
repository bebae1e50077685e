//! Mantlet identity.
