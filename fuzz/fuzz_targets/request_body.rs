//! Any bytes as the body of a request.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bantam_serve::fuzz::request_body(data);
    bantam_serve::fuzz::query(data);
});
