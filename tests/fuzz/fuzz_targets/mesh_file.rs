//! See `ztunnel_fuzz::mesh_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::mesh_file::run(data));
