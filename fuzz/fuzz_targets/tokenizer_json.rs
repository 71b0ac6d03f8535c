//! Any bytes as `tokenizer.json` files.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bantam_text::fuzz::tokenizer_json(data));
