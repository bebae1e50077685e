//! Mantlet control.
