//! Evaluation of single atoms.
