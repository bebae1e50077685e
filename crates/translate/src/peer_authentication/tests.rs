//! Placeholder until the tables are written below.
