//! The node proxy of an ambient mesh.

pub mod admin;
pub mod enrol;
pub mod mesh;
pub mod model;
pub mod policy;
pub mod route;
pub mod shutdown;
pub mod telemetry;
