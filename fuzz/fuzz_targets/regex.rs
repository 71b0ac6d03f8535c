//! Any bytes as regexes to hold answers to.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_text::fuzz::regex(data));
