//! An independent reading of Istio's authorization API, and a generator of worlds and requests for it.
//!
//! The tests of this crate ask the product, a real Envoy and this reading the same questions and compare the answers.
//! Nothing here may depend on a crate of Mantlet: a mistake that is shared would not be seen. The evaluator is written
//! for being obviously right, not for speed: no index, no translation, policies as plain JSON, one pass per question.

pub mod generate;
pub mod naive;
pub mod normalize;
pub mod tokens;
pub mod world;
