//! See `ztunnel_fuzz::zds`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ztunnel_fuzz::zds::run(data));
