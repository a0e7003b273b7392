//! See `ztunnel_fuzz::mesh_cache`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::mesh_cache::run(data));
