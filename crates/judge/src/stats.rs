//! Intervals and tests for scores: what may be said from this many rows.
//!
//! Every score here is a ratio of two sums over rows: a mean is `sum x / n`, micro-F1 is
//! `sum 2 tp / sum (predicted + expected)`. So one [`Part`] a row is all that the bootstrap and the jackknife need,
//! and both systems of a paired comparison are resampled by the same rows.
//!
//! Random numbers come from ChaCha8 under a stated seed: the same rows give the same interval on every machine.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

/// Confidence of every interval that Bantam states.
pub const CONFIDENCE: f64 = 0.95;
/// Resamples of every bootstrap that Bantam states.
pub const N_RESAMPLES: usize = 10_000;
/// Seed of every bootstrap that Bantam states.
pub const SEED: u64 = 0;

/// Two ends of an interval and how it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
    /// The method, for the reader of a report.
    pub method: String,
}

impl Interval {
    fn new(lo: f64, hi: f64, method: impl Into<String>) -> Interval {
        Interval {
            lo,
            hi,
            method: method.into(),
        }
    }

    /// Whether `value` lies within, ends included.
    pub fn contains(&self, value: f64) -> bool {
        self.lo <= value && value <= self.hi
    }

    /// Whether the two share no value.
    pub fn is_disjoint(&self, other: &Interval) -> bool {
        self.hi < other.lo || other.hi < self.lo
    }
}

/// One row's share of a score: the score of many rows is `sum num / sum den`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// Added up above the line.
    pub num: f64,
    /// Added up below the line.
    pub den: f64,
}

impl Part {
    /// A row of a plain mean.
    pub fn mean(value: f64) -> Part {
        Part {
            num: value,
            den: 1.0,
        }
    }
}

/// `sum num / sum den`; 0 where there is nothing below the line.
pub fn ratio(parts: &[Part]) -> f64 {
    let num: f64 = parts.iter().map(|part| part.num).sum();
    let den: f64 = parts.iter().map(|part| part.den).sum();
    divide(num, den)
}

fn divide(num: f64, den: f64) -> f64 {
    if den == 0.0 { 0.0 } else { num / den }
}

/// How a bootstrap is run.
#[derive(Debug, Clone, Copy)]
pub struct Bootstrap {
    /// Samples drawn.
    pub n_resamples: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// For example 0.95.
    pub confidence: f64,
    /// Which quantiles of the resampled scores are taken.
    pub kind: BootstrapKind,
}

/// Which quantiles of the resampled scores bound the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootstrapKind {
    /// The plain ones: (1 - confidence)/2 on each side.
    Percentile,
    /// Bias-corrected and accelerated: shifted for the bias and the skew of the score.
    Bca,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Bootstrap {
            n_resamples: N_RESAMPLES,
            seed: SEED,
            confidence: CONFIDENCE,
            kind: BootstrapKind::Bca,
        }
    }
}

/// The Wilson score interval of `n_right` out of `n`.
///
/// Math:   (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), clamped to [0, 1]; all of [0, 1] when n = 0
/// Source: Wilson 1927, JASA 22(158)
pub fn wilson(n_right: usize, n: usize, confidence: f64) -> Interval {
    let method = "wilson";
    if n == 0 {
        return Interval::new(0.0, 1.0, method);
    }
    let z = normal_quantile(0.5 + confidence / 2.0);
    let (n_rows, p) = (n as f64, n_right as f64 / n as f64);
    let centre = p + z * z / (2.0 * n_rows);
    let half = z * (p * (1.0 - p) / n_rows + z * z / (4.0 * n_rows * n_rows)).sqrt();
    let scale = 1.0 + z * z / n_rows;
    // At the ends the formula gives 0 and 1 exactly but for rounding.
    let lo = if n_right == 0 {
        0.0
    } else {
        ((centre - half) / scale).max(0.0)
    };
    let hi = if n_right == n {
        1.0
    } else {
        ((centre + half) / scale).min(1.0)
    };
    Interval::new(lo, hi, method)
}

/// The bootstrap interval of [`ratio`] over rows.
///
/// When every row scores all or every row scores nothing, resampling knows no spread and would claim certainty;
/// then the interval is Wilson's, on the share of such rows, and says so.
pub fn bootstrap(parts: &[Part], how: &Bootstrap) -> Interval {
    let n = parts.len();
    let all_one = parts.iter().all(|part| part.num == part.den);
    let all_zero = parts.iter().all(|part| part.num == 0.0);
    if n == 0 || all_one || all_zero {
        let mut interval = wilson(if all_zero { 0 } else { n }, n, how.confidence);
        interval.method = "wilson on rows (all rows alike)".into();
        return interval;
    }
    let point = ratio(parts);
    let num: f64 = parts.iter().map(|part| part.num).sum();
    let den: f64 = parts.iter().map(|part| part.den).sum();
    let without_one: Vec<f64> = parts
        .iter()
        .map(|part| divide(num - part.num, den - part.den))
        .collect();
    let draws = resample(n, how, |rows| {
        let (mut num, mut den) = (0.0, 0.0);
        for &row in rows {
            num += parts[row as usize].num;
            den += parts[row as usize].den;
        }
        divide(num, den)
    });
    let (lo, hi) = bounds(draws, point, &without_one, how);
    Interval::new(lo, hi, how.name("bootstrap"))
}

/// The bootstrap interval of `ratio(ours) - ratio(theirs)`, each resample drawing the same rows of both.
///
/// When no row tells the two apart, resampling would claim a certain tie; then the interval is what Wilson leaves
/// open for the share of rows that could differ, and says so.
///
/// Panics if the two have not the same rows.
pub fn paired_bootstrap(ours: &[Part], theirs: &[Part], how: &Bootstrap) -> Interval {
    assert_eq!(
        ours.len(),
        theirs.len(),
        "a paired comparison needs the same rows"
    );
    let n = ours.len();
    if ours == theirs {
        let room = wilson(0, n, how.confidence).hi;
        return Interval::new(-room, room, "wilson on rows (no row differs)");
    }
    let sums = |parts: &[Part]| {
        parts
            .iter()
            .fold((0.0, 0.0), |sum, part| (sum.0 + part.num, sum.1 + part.den))
    };
    let (a, b) = (sums(ours), sums(theirs));
    let point = divide(a.0, a.1) - divide(b.0, b.1);
    let without = |sum: (f64, f64), part: &Part| divide(sum.0 - part.num, sum.1 - part.den);
    let without_one: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(x, y)| without(a, x) - without(b, y))
        .collect();
    let draws = resample(n, how, |rows| {
        let (mut a, mut b) = ((0.0, 0.0), (0.0, 0.0));
        for &row in rows {
            let (x, y) = (ours[row as usize], theirs[row as usize]);
            a = (a.0 + x.num, a.1 + x.den);
            b = (b.0 + y.num, b.1 + y.den);
        }
        divide(a.0, a.1) - divide(b.0, b.1)
    });
    let (lo, hi) = bounds(draws, point, &without_one, how);
    if lo == hi {
        // Every row differs by the same amount: bounded by the share of rows that might not.
        let room = 1.0 - wilson(n, n, how.confidence).lo;
        let (lo, hi) = (
            (point - 2.0 * room).max(-1.0),
            (point + 2.0 * room).min(1.0),
        );
        return Interval::new(lo, hi, "wilson on rows (all rows differ alike)");
    }
    Interval::new(lo, hi, how.name("paired bootstrap"))
}

impl Bootstrap {
    fn name(&self, what: &str) -> String {
        let kind = match self.kind {
            BootstrapKind::Percentile => "percentile",
            BootstrapKind::Bca => "bca",
        };
        format!(
            "{kind} {what} over rows, {} resamples, seed {}",
            self.n_resamples, self.seed
        )
    }
}

/// Scores of `n_resamples` draws of `n` rows with replacement, sorted.
fn resample(n: usize, how: &Bootstrap, score: impl Fn(&[u32]) -> f64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(how.seed);
    let mut rows = vec![0_u32; n];
    let mut scores: Vec<f64> = (0..how.n_resamples)
        .map(|_| {
            for row in &mut rows {
                // Multiply-shift: off from uniform by at most n / 2^32.
                *row = ((u64::from(rng.next_u32()) * n as u64) >> 32) as u32;
            }
            score(&rows)
        })
        .collect();
    scores.sort_unstable_by(f64::total_cmp);
    scores
}

/// The interval's ends among the sorted scores.
///
/// Source: Efron & Tibshirani 1993, ch. 14: z0 from the share of draws below the point (ties count half), the
/// acceleration from the skew of the jackknife.
fn bounds(draws: Vec<f64>, point: f64, without_one: &[f64], how: &Bootstrap) -> (f64, f64) {
    let tail = (1.0 - how.confidence) / 2.0;
    let (mut lo, mut hi) = (tail, 1.0 - tail);
    if how.kind == BootstrapKind::Bca {
        let below = draws.partition_point(|draw| *draw < point) as f64;
        let not_above = draws.partition_point(|draw| *draw <= point) as f64;
        let share = (below + not_above) / 2.0 / draws.len() as f64;
        let z0 =
            normal_quantile(share.clamp(0.5 / draws.len() as f64, 1.0 - 0.5 / draws.len() as f64));
        let mean = without_one.iter().sum::<f64>() / without_one.len() as f64;
        let (mut squares, mut cubes) = (0.0, 0.0);
        for value in without_one {
            let off = mean - value;
            squares += off * off;
            cubes += off * off * off;
        }
        let acceleration = divide(cubes, 6.0 * squares.powf(1.5));
        let shifted = |p: f64| {
            let z = z0 + normal_quantile(p);
            normal_cdf(z0 + z / (1.0 - acceleration * z))
        };
        (lo, hi) = (shifted(lo), shifted(hi));
    }
    let at = |p: f64| draws[((p * draws.len() as f64) as usize).min(draws.len() - 1)];
    (at(lo), at(hi))
}

/// What McNemar's test saw.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct McNemar {
    /// Rows that only ours has right.
    pub only_ours: usize,
    /// Rows that only theirs has right.
    pub only_theirs: usize,
    /// Exact two-sided p-value: how often a fair coin splits these rows so unevenly.
    pub p_value: f64,
}

/// McNemar's exact test of two systems on the same rows.
///
/// Math: with n = b + c discordant rows, p = min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n)
///
/// Panics if the two have not the same rows.
pub fn mcnemar(ours: &[bool], theirs: &[bool]) -> McNemar {
    assert_eq!(
        ours.len(),
        theirs.len(),
        "a paired comparison needs the same rows"
    );
    let only_ours = ours.iter().zip(theirs).filter(|(a, b)| **a && !**b).count();
    let only_theirs = ours.iter().zip(theirs).filter(|(a, b)| !**a && **b).count();
    let n = only_ours + only_theirs;
    // In logarithms: 2^-n underflows beyond a thousand discordant rows.
    let mut ln_choose = 0.0_f64;
    let mut tail = 0.0_f64;
    for i in 0..=only_ours.min(only_theirs) {
        if i > 0 {
            ln_choose += ((n - i + 1) as f64 / i as f64).ln();
        }
        tail += (ln_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    McNemar {
        only_ours,
        only_theirs,
        p_value: (2.0 * tail).min(1.0),
    }
}

/// The nearest-rank percentile: the smallest value that at least `percent` of the values do not exceed.
///
/// `None` when there are no values. `values` need not be sorted.
pub fn percentile(values: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The standard normal distribution function.
///
/// Numerics: within 1e-15 for |x| <= 7, beyond which it is 0 or 1
/// Source:   Marsaglia 2004, J. Stat. Software 11(4): the series of odd powers over odd factorials
fn normal_cdf(x: f64) -> f64 {
    if x.abs() > 7.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while sum + term != sum {
        odd += 2.0;
        term *= x * x / odd;
        sum += term;
    }
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    (0.5 + density * sum).clamp(0.0, 1.0)
}

/// The inverse of [`normal_cdf`], by bisection: it is called a handful of times an interval.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    let (mut lo, mut hi) = (-7.0_f64, 7.0_f64);
    for _ in 0..64 {
        let mid = 0.5 * (lo + hi);
        if normal_cdf(mid) < p {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    0.5 * (lo + hi)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance, "{a} is not {b}");
    }

    /// A uniform number in [0, 1).
    fn uniform(rng: &mut ChaCha8Rng) -> f64 {
        (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    #[test]
    fn the_normal_distribution() {
        near(normal_cdf(0.0), 0.5, 1e-15);
        near(normal_cdf(1.0), 0.841_344_746_068_542_9, 1e-14);
        near(normal_cdf(-3.0), 0.001_349_898_031_630_094_6, 1e-14);
        near(normal_quantile(0.975), 1.959_963_984_540_054, 1e-12);
        for p in [1e-6, 0.01, 0.3, 0.5, 0.9, 0.999] {
            near(normal_cdf(normal_quantile(p)), p, 1e-13);
        }
    }

    #[test]
    fn wilson_at_known_values() {
        let interval = wilson(8, 10, 0.95);
        near(interval.lo, 0.490_162_5, 1e-6);
        near(interval.hi, 0.943_317_8, 1e-6);
        let none = wilson(0, 10, 0.95);
        assert_eq!(none.lo, 0.0);
        near(none.hi, 0.277_533, 1e-6);
        assert_eq!(wilson(10, 10, 0.95).hi, 1.0);
        assert_eq!((wilson(0, 0, 0.95).lo, wilson(0, 0, 0.95).hi), (0.0, 1.0));
    }

    #[test]
    fn mcnemar_at_known_values() {
        let pairs = |b: usize, c: usize, both: usize| {
            let ours: Vec<bool> = (0..b + c + both).map(|i| i < b || i >= b + c).collect();
            let theirs: Vec<bool> = (0..b + c + both).map(|i| i >= b).collect();
            mcnemar(&ours, &theirs)
        };
        let test = pairs(9, 1, 30);
        assert_eq!((test.only_ours, test.only_theirs), (9, 1));
        near(test.p_value, 22.0 / 1024.0, 1e-12);
        assert_eq!(pairs(0, 0, 5).p_value, 1.0);
        assert_eq!(pairs(4, 4, 0).p_value, 1.0);
        // 2^-n alone underflows here.
        let p = pairs(2100, 1900, 0).p_value;
        assert!(p > 0.001 && p < 0.002, "{p}");
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let values = [15.0, 20.0, 35.0, 40.0, 50.0];
        let at = |p| percentile(&values, p).unwrap();
        assert_eq!(
            [at(5.0), at(30.0), at(40.0), at(50.0), at(95.0), at(100.0)],
            [15.0, 20.0, 20.0, 35.0, 50.0, 50.0]
        );
        assert_eq!(percentile(&[7.0], 0.0), Some(7.0));
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn the_bootstrap_repeats_and_does_not_claim_certainty() {
        let parts: Vec<Part> = (0..40)
            .map(|i| Part {
                num: f64::from(i % 3),
                den: 2.0,
            })
            .collect();
        let first = bootstrap(&parts, &Bootstrap::default());
        assert_eq!(first, bootstrap(&parts, &Bootstrap::default()));
        assert!(first.contains(ratio(&parts)));
        assert!(
            first
                .method
                .contains("bca bootstrap over rows, 10000 resamples, seed 0")
        );

        let all = bootstrap(&[Part::mean(1.0); 20], &Bootstrap::default());
        assert!(all.lo < 0.9 && all.hi == 1.0 && all.method.contains("all rows alike"));
        let tie = paired_bootstrap(&parts, &parts, &Bootstrap::default());
        assert!(tie.lo < 0.0 && tie.hi > 0.0);
        let sweep = paired_bootstrap(
            &[Part::mean(1.0); 20],
            &[Part::mean(0.0); 20],
            &Bootstrap::default(),
        );
        assert!(sweep.lo > 0.5 && sweep.hi == 1.0);
    }

    /// The share of 1,000 simulated experiments whose interval holds the truth.
    fn coverage(truth: f64, mut experiment: impl FnMut(&mut ChaCha8Rng) -> Interval) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(20);
        let n_covered = (0..1000)
            .filter(|_| experiment(&mut rng).contains(truth))
            .count();
        n_covered as f64 / 1000.0
    }

    fn quick(kind: BootstrapKind) -> Bootstrap {
        Bootstrap {
            n_resamples: 1000,
            kind,
            ..Bootstrap::default()
        }
    }

    #[test]
    fn wilson_covers() {
        let share = coverage(0.8, |rng| {
            let n_right = (0..150).filter(|_| uniform(rng) < 0.8).count();
            wilson(n_right, 150, 0.95)
        });
        assert!((0.93..=0.97).contains(&share), "{share}");
    }

    /// Rows of one to four fields, each right with probability 0.7: tp of as many predicted as expected.
    fn f1_row(rng: &mut ChaCha8Rng, p: f64) -> Part {
        let n_fields = 1 + rng.next_u32() % 4;
        let tp = (0..n_fields).filter(|_| uniform(rng) < p).count();
        Part {
            num: 2.0 * tp as f64,
            den: 2.0 * f64::from(n_fields),
        }
    }

    #[test]
    fn the_bootstrap_of_micro_f1_covers() {
        for kind in [BootstrapKind::Bca, BootstrapKind::Percentile] {
            let share = coverage(0.7, |rng| {
                let parts: Vec<Part> = (0..80).map(|_| f1_row(rng, 0.7)).collect();
                bootstrap(&parts, &quick(kind))
            });
            assert!((0.93..=0.97).contains(&share), "{kind:?}: {share}");
        }
    }

    #[test]
    fn the_paired_bootstrap_covers() {
        // Both systems see rows of the same difficulty, so their scores hang together as real ones do.
        let share = coverage(0.2, |rng| {
            let (ours, theirs): (Vec<Part>, Vec<Part>) = (0..80)
                .map(|_| {
                    let luck = uniform(rng);
                    let hit = |p: f64| Part::mean(if luck < p { 1.0 } else { 0.0 });
                    (
                        hit(0.8),
                        if uniform(rng) < 0.5 {
                            hit(0.7)
                        } else {
                            Part::mean(f64::from(uniform(rng) < 0.5))
                        },
                    )
                })
                .unzip();
            paired_bootstrap(&ours, &theirs, &quick(BootstrapKind::Bca))
        });
        assert!((0.93..=0.97).contains(&share), "{share}");
    }

    #[test]
    fn a_null_difference_is_seldom_called() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let n_called = (0..1000)
            .filter(|_| {
                let ours: Vec<bool> = (0..100).map(|_| uniform(&mut rng) < 0.6).collect();
                let theirs: Vec<bool> = (0..100).map(|_| uniform(&mut rng) < 0.6).collect();
                mcnemar(&ours, &theirs).p_value < 0.05
            })
            .count();
        assert!(n_called <= 50, "{n_called}");
    }
}
