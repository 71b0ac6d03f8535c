//! Any bytes as grammars to hold answers to.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_text::fuzz::lark(data));
