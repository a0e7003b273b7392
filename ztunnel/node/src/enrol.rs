//! Who is enrolled on this node.
//!
//! Owns the life of an enrolled pod as a pure state machine and knows nothing of sockets or the kernel:
//! the sources that feed it (a mesh file, a node agent) only say which pods there are.

pub mod pods;
pub mod zds;
