//! Mantlet translate.
