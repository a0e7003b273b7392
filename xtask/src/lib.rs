//! What the project's commands share with the harness in `tests`: the command lines of its programs, what the benchmark
//! measures, where things are, and what an image holds.
//!
//! `cargo xtask` is what runs first on a fresh machine, and has to be there in seconds: whatever it depends on is
//! compiled before the first word is printed. So the harness depends on this and never the other way round, and what
//! needs the harness (`demo`, `bench`) is a program of its own in `tests/src/bin`, built when it is asked for.

pub mod arguments;
pub mod contents;
pub mod places;
pub mod rows;
