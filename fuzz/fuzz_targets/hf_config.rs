//! Any bytes as `config.json` and `tokenizer_config.json`.

#![no_main]

#[path = "../bodies/formats.rs"]
#[allow(dead_code)]
mod formats;

libfuzzer_sys::fuzz_target!(|data: &[u8]| formats::hf_config(data));
