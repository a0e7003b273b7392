//! The composition root.
pub mod handover;
