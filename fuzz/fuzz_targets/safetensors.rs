//! Any bytes as safetensors files.

#![no_main]

#[path = "../bodies/formats.rs"]
#[allow(dead_code)]
mod formats;

libfuzzer_sys::fuzz_target!(|data: &[u8]| formats::safetensors(data));
