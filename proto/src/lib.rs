//! The wire formats of an Istio control plane and of its node agent, generated from `protos/*.proto`.
//!
//! Three modules of the daemon import this, and nothing else does: each translates what it receives into the
//! vocabulary of the mesh at once. The feature `server` adds the control plane's side, for tests that play it.

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
