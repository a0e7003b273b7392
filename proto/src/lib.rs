//! The wire formats of an Istio control plane, of its node agent and of profiles, generated from `protos/*.proto`.
//!
//! Few modules of the daemon import this (the table in its documentation names them), and nothing else does: each
//! translates what it receives into the vocabulary of the mesh at once. The feature `server` adds the control plane's
//! side, for tests that play it.

pub use prost;
pub use prost_types;

/// A message of any type, `google.protobuf.Any`; its bytes are those it was received in, not a copy.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// Which type: `type.googleapis.com/<package>.<message>`.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message, encoded.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: bytes::Bytes,
}

/// Workloads and services.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::use_self,
    unused_qualifications,
    reason = "generated"
)]
pub mod workload {
    tonic::include_proto!("istio.workload");

    /// Pods, from the node agent.
    pub mod zds {
        tonic::include_proto!("istio.workload.zds");
    }
}

/// Authorization policies.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::use_self,
    unused_qualifications,
    reason = "generated"
)]
pub mod security {
    tonic::include_proto!("istio.security");
}

/// The certificate authority.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::use_self,
    unused_qualifications,
    reason = "generated"
)]
pub mod auth {
    tonic::include_proto!("istio.v1.auth");
}

/// Incremental discovery.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::use_self,
    unused_qualifications,
    reason = "generated"
)]
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}

/// Profiles as pprof reads them.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::clone_on_ref_ptr,
    clippy::use_self,
    unused_qualifications,
    reason = "generated"
)]
pub mod profile {
    tonic::include_proto!("perftools.profiles");
}
