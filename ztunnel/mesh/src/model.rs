//! The vocabulary of the mesh: plain, immutable data.
//!
//! Knows no runtime, no wire format and no serialisation. Everything that arrives from
//! outside (a mesh file, a control plane) is translated into these types once, at the door,
//! and everything that decides works on them alone.

pub mod addr;
pub mod identity;
pub mod policy;
pub mod refused;
pub mod service;
pub mod workload;
