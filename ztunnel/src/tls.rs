//! Mutual TLS as the mesh speaks it: TLS 1.3, `h2`, SPIFFE certificates on both sides.
//!
//! [`trust`] says whom the node trusts and what was [revoked](revocation), [`grpc`] makes the connections to the
//! control plane. Owns the rustls configurations and the verification of a peer's certificate; only [`verify`] makes a
//! [`verify::VerifiedPeer`]. Does not know where certificates come from (see [`crate::identity`]).

pub mod configs;
pub mod files;
pub mod grpc;
pub mod revocation;
pub mod trust;
pub mod validity;
pub mod verify;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod tests;
