//! Where does this connection go? Pure: a snapshot of the mesh, the source and the original destination in, a
//! plan out; or, of one that came through a tunnel, its pod and what was asked for in, an inbound target out.
//!
//! Knows the mesh. Does not know sockets, TLS, clocks or randomness: the caller passes in one random number.

pub mod balance;
pub mod gateway;
pub mod inbound_target;
pub mod meant;
pub mod plan;
pub mod same_node;

#[cfg(test)]
mod tests;
