//! Where does this connection go? Pure: a snapshot of the mesh, the source and the original destination in, a
//! plan out.
//!
//! Knows the mesh. Does not know sockets, TLS, clocks or randomness: the caller passes in one random number.

pub mod balance;
pub mod plan;

#[cfg(test)]
mod tests;
