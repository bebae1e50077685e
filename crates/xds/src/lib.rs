//! Mantlet xds.
