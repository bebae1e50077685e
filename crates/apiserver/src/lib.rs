//! Mantlet apiserver.
