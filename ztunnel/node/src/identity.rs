//! Certificates of the workloads on this node: asked for, renewed in time, and handed to whoever connects.
//!
//! One task ([`worker`]) owns them all; everybody else holds [`worker::Identities`], which reads without a lock.
//! [`istiod`] asks an authority somewhere else, [`crl`] watches what it has revoked, [`inheritance`] is what a
//! daemon leaves to the next, and [`kept`] the file in which that lies where an operator wants one. Does not know
//! how a certificate is made: that is a [`CertificateAuthority`](ztunnel_tls::ca::CertificateAuthority)'s.

mod clock;
pub mod crl;
pub mod inheritance;
pub mod istiod;
pub mod kept;
mod schedule;
pub mod worker;
