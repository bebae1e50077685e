//! Mantlet console.
