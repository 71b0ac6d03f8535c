//! Any bytes as GGUF files.

#![no_main]

#[path = "../bodies/formats.rs"]
#[allow(dead_code)]
mod formats;

libfuzzer_sys::fuzz_target!(|data: &[u8]| formats::gguf(data));
