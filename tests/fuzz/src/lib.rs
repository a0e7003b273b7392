//! What the daemon reads from others, and what must hold whatever it is: one module per fuzz target.
//!
//! "It does not panic" is the least of it. Each target says what else is promised, and checks it against the plainest
//! way to say the same: an index against a look at everything, a policy against three-valued logic, a file against the
//! list of what was written to it. And what a text costs in memory has to do with how long it is: see [`memory`].
//!
//! The seeds in `corpus/` are what runs have found, cut down to what adds coverage. `cargo xtask fuzz` starts from them
//! and keeps what it finds under `target/`.

pub mod arrival;
pub mod connect;
pub mod crl;
pub mod local_mesh;
pub mod memory;
pub mod mesh_cache;
pub mod mesh_file;
pub mod policy;
pub mod proxy_config;
pub mod proxy_header;
pub mod wire;
pub mod xds_mesh;
pub mod xds_response;
pub mod zds;
