//! The node proxy of an ambient mesh.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | [`model`] | the vocabulary: plain immutable data | – |
//! | [`shutdown`] | the drain signal, its deadline, and where tasks are spawned | – |
//! | [`mesh`] | the one writer of the mesh, and snapshots for readers | `model` |
//! | [`enrol`] | which pods of this node are to be captured | `model`, `shutdown` |

pub mod enrol;
pub mod mesh;
pub mod model;
pub mod shutdown;
