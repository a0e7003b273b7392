//! The mesh: what there is, where a connection goes, and whether it may.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `model` | the vocabulary: plain immutable data | |
//! | `source` | what a source of pods says, and when what it takes away is believed | model |
//! | `store` | single writer of the mesh, snapshots for readers, questions for what it does not have | model |
//! | `policy` | pure: policies + verified facts → `Permit` or `Denial` | model |
//! | `dump` | the mesh as tools and people read and write it: the schema of `config_dump` | model, store |
//! | `route` | pure: snapshot + source + original destination → `Plan` | model, store |
//!
//! # Invariants
//!
//! * Nothing here opens a file or a socket, spawns a task or reads the clock of the system; `model`, `policy` and `route`
//!   never await. Time comes in as an argument, but for the waits of [`store::demand`] and [`store::lookup`].
//! * Only [`policy`] makes a `Permit`.
//! * A snapshot ([`store::index::Mesh`]) is whole and never changes: whoever decides takes one and asks it everything.
//!
//! Read [`store::index`] first, then [`route::plan`] and [`policy::authorize`].

pub mod dump;
pub mod model;
pub mod policy;
pub mod route;
pub mod source;
pub mod store;
