//! Any bytes as JSON schemas to hold answers to.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_text::fuzz::json_schema(data));
