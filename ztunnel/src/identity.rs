//! Certificates of the workloads on this node: asked for, renewed in time, and handed to whoever connects.
//!
//! One task ([`worker`]) owns them all; everybody else holds [`worker::Identities`], which reads without a lock.
//! Does not know how a certificate is made: that is a [`ca::CertificateAuthority`]'s.

pub mod ca;
pub mod crl;
pub mod inheritance;
pub mod istiod;
mod schedule;
pub mod worker;
