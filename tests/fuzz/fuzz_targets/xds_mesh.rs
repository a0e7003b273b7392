//! See `ztunnel_fuzz::xds_mesh`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::xds_mesh::run(data));
