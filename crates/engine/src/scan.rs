//! Passes over a row of logits, in vectors.

use std::cmp::Ordering;

use bantam_kernels::{Isa, ops};

/// Elements that are looked at together.
const CHUNK: usize = 512;
/// Independent sums and maxima within a chunk.
const LANES: usize = 16;

/// What a row of logits holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scan {
    /// The place of the greatest, the first among equals, and its value.
    Best(usize, f32),
    /// Nothing above minus infinity.
    Nothing,
    /// A NaN or plus infinity.
    Bad,
}

/// The greatest value and whether all are usable: finite or minus infinity.
pub(crate) fn scan(isa: Isa, values: &[f32]) -> Scan {
    if ops::all_finite(isa, values) {
        return match ops::argmax(isa, values) {
            Some(idx) => Scan::Best(idx, values[idx]),
            None => Scan::Nothing,
        };
    }
    // Minus infinity is where a mask forbids: the slower way tells it from what is wrong.
    let (mut best, mut best_chunk, mut bad) = (f32::NEG_INFINITY, 0, false);
    for (chunk_idx, chunk) in values.chunks(CHUNK).enumerate() {
        let (max, chunk_bad) = max_of(chunk);
        bad |= chunk_bad;
        if max > best {
            (best, best_chunk) = (max, chunk_idx);
        }
    }
    if bad {
        return Scan::Bad;
    }
    let start = best_chunk * CHUNK;
    match values[start..].iter().position(|&v| v == best) {
        Some(at) if best > f32::NEG_INFINITY => Scan::Best(start + at, best),
        _ => Scan::Nothing,
    }
}

/// The greatest of a chunk, and whether it holds a NaN or plus infinity.
#[inline]
fn max_of(chunk: &[f32]) -> (f32, bool) {
    let mut max = [f32::NEG_INFINITY; LANES];
    // Counted rather than flagged, which compiles to a compare and a subtraction.
    let mut bad = [0i32; LANES];
    let mut lanes = chunk.chunks_exact(LANES);
    for part in &mut lanes {
        for i in 0..LANES {
            max[i] = if part[i] > max[i] { part[i] } else { max[i] };
            bad[i] += i32::from(!is_usable(part[i]));
        }
    }
    for (i, &v) in lanes.remainder().iter().enumerate() {
        max[i] = if v > max[i] { v } else { max[i] };
        bad[i] += i32::from(!is_usable(v));
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (max, bad.iter().any(|&n| n > 0))
}

/// Below plus infinity, which a NaN is not.
#[inline]
fn is_usable(v: f32) -> bool {
    v < f32::INFINITY
}

/// Weights below this are nothing: no token is drawn that is so unlikely, nor one that a mask forbids.
pub(crate) const WEIGHT_MIN: f32 = 1e-30;

/// Makes probabilities of logits, in place: `exp((logits - max) * scale)` over their sum. The
/// greatest of them, which is one over that sum.
pub(crate) fn weigh(isa: Isa, logits: &mut [f32], max: f32, scale: f32) -> f32 {
    // Before the scale, which may be so large that what is equal would no longer be.
    logits.iter_mut().for_each(|l| *l -= max);
    ops::softmax(isa, logits, logits.len(), scale).1
}

/// The sum of all weights, the same that [`pick`] finds.
pub(crate) fn total(weights: &[f32]) -> f64 {
    weights.chunks(CHUNK).map(sum).sum()
}

/// The sum of a chunk, in lanes.
fn sum(weights: &[f32]) -> f64 {
    let mut sums = [0.0f32; LANES];
    let mut lanes = weights.chunks_exact(LANES);
    for part in &mut lanes {
        for i in 0..LANES {
            sums[i] += part[i];
        }
    }
    let rest: f64 = lanes.remainder().iter().map(|&w| f64::from(w)).sum();
    sums.iter().map(|&s| f64::from(s)).sum::<f64>() + rest
}

/// The place where the running sum of the weights passes `left`; the last that has any weight if
/// rounding leaves a crumb at the end.
pub(crate) fn pick(weights: &[f32], mut left: f64) -> usize {
    let mut last = 0;
    for (chunk_idx, chunk) in weights.chunks(CHUNK).enumerate() {
        let chunk_sum = sum(chunk);
        if chunk_sum == 0.0 {
            continue;
        }
        if left >= chunk_sum {
            left -= chunk_sum;
            if let Some(i) = chunk.iter().rposition(|&w| w > WEIGHT_MIN) {
                last = chunk_idx * CHUNK + i;
            }
            continue;
        }
        let mut found = None;
        for (i, &weight) in chunk.iter().enumerate() {
            if weight > WEIGHT_MIN {
                left -= f64::from(weight);
                found = Some(chunk_idx * CHUNK + i);
                if left < 0.0 {
                    break;
                }
            }
        }
        // At the end of its chunk the sum may be short of the chunk's own by a rounding.
        if let Some(idx) = found {
            return idx;
        }
    }
    last
}

/// The `k` greatest values above minus infinity with their places, the lower place among equals;
/// in no order.
pub(crate) fn likeliest(values: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    if k == 0 {
        return;
    }
    let room = (4 * k).max(256);
    let mut floor = f32::NEG_INFINITY;
    for (chunk_idx, chunk) in values.chunks(64).enumerate() {
        if !chunk.iter().fold(false, |any, &v| any | (v > floor)) {
            continue;
        }
        for (i, &value) in chunk.iter().enumerate() {
            // One that equals the floor comes later than `k` others, so it is not among them.
            if value > floor {
                out.push(((chunk_idx * 64 + i) as u32, value));
                if out.len() == room {
                    floor = cut(out, k);
                }
            }
        }
    }
    if out.len() > k {
        cut(out, k);
    }
}

/// Leaves the `k` first; the least of them.
fn cut(out: &mut Vec<(u32, f32)>, k: usize) -> f32 {
    let order =
        |a: &(u32, f32), b: &(u32, f32)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    let (_, least, _) = out.select_nth_unstable_by(k - 1, order);
    let floor = least.1;
    out.truncate(k);
    floor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isa() -> Isa {
        Isa::detect()
    }

    fn noise(n: usize) -> Vec<f32> {
        let hash = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32;
        (0..n as u32).map(|i| hash(i) * 20.0 - 15.0).collect()
    }

    #[test]
    fn the_greatest_is_the_first_of_equals_at_any_length() {
        for n in [1, 15, 16, 17, 511, 512, 513, 2000] {
            let mut values = noise(n);
            let best = (0..n).fold(0, |b, i| if values[i] > values[b] { i } else { b });
            assert_eq!(scan(isa(), &values), Scan::Best(best, values[best]));
            values[n - 1] = 99.0;
            values[n / 2] = 99.0;
            assert_eq!(scan(isa(), &values), Scan::Best(n / 2, 99.0));
            for bad in [f32::NAN, f32::INFINITY] {
                values[n / 3] = bad;
                assert_eq!(scan(isa(), &values), Scan::Bad);
            }
            assert_eq!(scan(isa(), &vec![f32::NEG_INFINITY; n]), Scan::Nothing);
        }
        assert_eq!(scan(isa(), &[]), Scan::Nothing);
    }

    #[test]
    fn the_likeliest_are_those_of_a_sort() {
        let mut values = noise(3000);
        values[7] = f32::NEG_INFINITY;
        values[100..140].fill(3.0);
        let mut sorted: Vec<(u32, f32)> = (0..).zip(values.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for k in [0, 1, 5, 64, 900, 2999, 4000] {
            let mut got = Vec::new();
            likeliest(&values, k, &mut got);
            got.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            assert_eq!(got, sorted[..k.min(2999)]);
        }
    }

    #[test]
    fn a_pick_is_where_the_running_sum_passes() {
        let values = noise(1500);
        let mut weights = values;
        weights[9] = f32::NEG_INFINITY;
        let best = weigh(isa(), &mut weights, 5.0, 1.0);
        assert!(best > 0.0 && weights.iter().all(|&w| w <= best));
        let total = total(&weights);
        assert!((total - 1.0).abs() < 1e-5);
        assert_ne!(pick(&weights, 0.0), 9);
        let mut running = 0.0;
        for (i, &weight) in weights.iter().enumerate() {
            // The middle of the token's share, where rounding does not matter.
            if f64::from(weight) > total * 1e-4 {
                assert_eq!(pick(&weights, running + f64::from(weight) / 2.0), i);
            }
            running += f64::from(weight);
        }
        assert_eq!(pick(&[0.5, 0.0, 0.5, 0.0], 2.0), 2);
    }
}
