//! Names and numbers that nobody should guess twice: request ids, seeds, the time.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

/// A number from the system's randomness.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// `prefix` and 24 random hexadecimal digits.
pub(crate) fn random(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", random_u64(), random_u64() as u32)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The seed of one of several answers to a request: the first has the request's own, the others
/// are mixed (splitmix64), so that they do not meet those of the next seed.
pub(crate) fn choice_seed(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let x = seed.wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
