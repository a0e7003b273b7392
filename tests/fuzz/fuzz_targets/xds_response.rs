//! See `ztunnel_fuzz::xds_response`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::xds_response::run(data));
