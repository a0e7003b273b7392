//! See `ztunnel_fuzz::arrival`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::arrival::run(data));
