//! See `ztunnel_fuzz::local_mesh`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::local_mesh::run(data));
