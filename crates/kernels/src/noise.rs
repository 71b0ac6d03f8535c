//! Numbers for tests: the same on every machine, spread evenly.

/// `n` numbers in [-1, 1).
pub(crate) fn unit(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// `n` numbers in [-2, 2).
pub(crate) fn wide(n: usize, seed: u32) -> Vec<f32> {
    unit(n, seed).into_iter().map(|x| 2.0 * x).collect()
}
