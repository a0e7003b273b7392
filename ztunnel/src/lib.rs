//! The node proxy of an ambient mesh.

pub mod enrol;
pub mod mesh;
pub mod model;
pub mod shutdown;
pub mod standalone;
