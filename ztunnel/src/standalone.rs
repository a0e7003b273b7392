//! The embedded control plane: a mesh file and a built-in certificate authority, no server needed.
//!
//! [`authority`] issues the workloads' certificates.
//!
//! The mesh file is Kubernetes and Istio YAML. [`mod@file`] reads it, [`decode`] makes typed [`objects`] of it,
//! [`translate`] turns those into the mesh model, [`watch`] does so again whenever the files change, and [`changes`]
//! keeps back what has errors or looks as if everything were gone.
//! Only [`mod@file`] and [`watch`] know of files: any other source of the same objects can feed [`translate`].
//!
//! Beside a control plane a mesh may be written as `config_dump` shows it, which [`local`] reads.
//!
//! # What a mesh file may hold
//!
//! * `v1` Namespace: label `istio.io/dataplane-mode: ambient` enrols its pods.
//! * `v1` Pod: labels (its own `istio.io/dataplane-mode`, `ambient` or `none`, wins over its namespace's),
//!   `spec.nodeName`, `spec.serviceAccountName`, container ports, `status`. Two annotations are ours:
//!   `ztunnel.io/netns`, the network namespace to capture, as an absolute path or as a name under `/run/netns`;
//!   and `ztunnel.io/ips`, addresses separated by commas, for a pod whose `status` has none. An enrolled pod is
//!   captured by the node that `spec.nodeName` names; without that, by each node that reads the annotation
//!   `ztunnel.io/netns`.
//! * `v1` Service with a selector.
//! * `security.istio.io/v1` (or `v1beta1`) PeerAuthentication and AuthorizationPolicy.
//! * `v1` ConfigMap `istio` of namespace `istio-system`: `trustDomain` and `rootNamespace` of its `data.mesh`.
//! * Lists of these, as `kubectl get -o yaml` prints them. Other kinds are named and skipped.

pub mod authority;
pub mod changes;
pub mod decode;
pub mod diagnostic;
pub mod file;
pub mod local;
pub mod objects;
pub mod translate;
pub mod watch;
pub mod yaml;
