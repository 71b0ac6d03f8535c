//! The `bantam` binary.
fn main() {}
