//! Certificates of the workloads on this node: asked for, renewed in time, and handed to whoever connects.
//!
//! One task ([`worker`]) owns them all; everybody else holds [`worker::Identities`], which reads without a lock.
//! [`istiod`] asks an authority somewhere else, [`crl`] watches what it has revoked, and [`inheritance`] is what a
//! daemon leaves to the next. Does not know how a certificate is made: that is a [`ca::CertificateAuthority`]'s.

pub mod ca;
mod clock;
pub mod crl;
pub mod inheritance;
pub mod istiod;
mod schedule;
pub mod worker;
