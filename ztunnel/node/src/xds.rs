//! The mesh from a control plane: an incremental discovery session, and wire messages made into changes of the mesh.
//!
//! [`session`] decides (which requests to send, what to accept and reject, what was received) and knows no network;
//! [`client`] connects, reads, writes and waits; [`backoff`] says how long. [`convert`] is the only place that knows
//! what a message means. `cache` keeps the last good mesh in a file.
//!
//! # Use
//!
//! [`client::start`] takes a [`client::Config`] and the one [`MeshWriter`](ztunnel_mesh::store::MeshWriter), and gives back a
//! [`client::Status`] to watch. The mesh is complete enough to serve as soon as [`client::Status::synced`] is true: the
//! first response of every type was accepted, or the last good mesh of a process before was found. It never becomes
//! false again: when the control plane is lost the mesh stays as it was, and [`client::Status::stale_since`] says since
//! when.
//!
//! With [`client::start_on_demand`] only the node's own workloads come by themselves, and of the others those that are
//! asked for through [`mesh::demand`](ztunnel_mesh::store::demand), for as long as somebody uses them.

pub mod backoff;
mod cache;
pub mod client;
pub mod convert;
mod counts;
mod intern;
pub mod session;

#[cfg(feature = "fuzzing")]
pub(crate) use cache::contents as cached_mesh;
