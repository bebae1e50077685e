//! Mantlet node.
