//! Mantlet net.
