//! See `ztunnel_fuzz::proxy_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::proxy_config::run(data));
