//! The embedded control plane: a mesh file and a built-in certificate authority, no server needed.
//!
//! [`authority`] issues the workloads' certificates.
//!
//! The mesh file is Kubernetes and Istio YAML. [`file`] reads it, [`decode`] makes typed [`objects`] of it,
//! [`translate`] turns those into the mesh model, and [`watch`] does so again whenever the files change.
//! Only [`file`] and [`watch`] know of files: any other source of the same objects can feed [`translate`].

pub mod authority;
pub mod decode;
pub mod diagnostic;
pub mod file;
pub mod objects;
pub mod translate;
pub mod watch;
pub mod yaml;
