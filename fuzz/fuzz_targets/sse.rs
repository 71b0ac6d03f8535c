//! Any bytes as the text of a streamed answer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_serve::fuzz::sse(data));
