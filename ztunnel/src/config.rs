//! What was typed (flags and environment) → each module's own `Config`, checked once.
//!
//! Nobody else reads the environment or the command line, and nobody receives the whole.

pub mod env;
pub mod istio;
pub mod origin;
pub mod raw;
pub mod resolved;
