//! Mantlet model.
