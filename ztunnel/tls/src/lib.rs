//! Mutual TLS as the mesh speaks it: TLS 1.3, `h2`, SPIFFE certificates on both sides.
//!
//! [`trust`] says whom the node trusts and what was [revoked](revocation), [`grpc`] makes the connections to the
//! control plane. Owns the rustls configurations and the verification of a peer's certificate; only [`verify`] makes a
//! [`verify::VerifiedPeer`]. Does not know where certificates come from: [`ca`] is what whoever
//! issues them is asked.
//!
//! | Module | Owns | May import |
//! |---|---|---|
//! | `provider` | the cryptography of the process | |
//! | `validity` | from when to when something holds | |
//! | `verify` | who is at the other end; the only maker of a `VerifiedPeer` | |
//! | `revocation` | certificate revocation lists | provider |
//! | `trust` | the roots, and what of theirs is revoked | provider, revocation, verify |
//! | `verifiers` | what rustls asks about a peer's certificate | provider, trust, verify |
//! | `configs` | the rustls configurations, and the credentials of a workload | provider, trust, validity, verifiers, verify |
//! | `ca` | what an authority is asked, and answers | configs |
//! | `grpc` | connections to a control plane | provider, verify |
//! | `testing` | certificates made on the spot; only with the feature of that name | configs |
//! | `tests` | handshakes in memory | everything |

pub mod ca;
pub mod configs;
pub mod grpc;
pub mod provider;
pub mod revocation;
pub mod trust;
pub mod validity;
mod verifiers;
pub mod verify;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
