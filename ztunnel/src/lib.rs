//! The node proxy of an ambient mesh.

pub mod enrol;
pub mod hbone;
pub mod identity;
pub mod mesh;
pub mod model;
pub mod net;
pub mod policy;
pub mod proxy;
pub mod route;
pub mod shutdown;
pub mod standalone;
pub mod telemetry;
pub mod tls;
