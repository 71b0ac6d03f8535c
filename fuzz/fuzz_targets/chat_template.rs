//! Any bytes as chat templates.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_text::fuzz::chat_template(data));
