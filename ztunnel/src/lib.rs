//! The node proxy of an ambient mesh.

pub mod capture;
pub mod enrol;
pub mod mesh;
pub mod model;
pub mod net;
pub mod shutdown;
