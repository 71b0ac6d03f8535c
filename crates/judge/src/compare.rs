//! One run's scores with an interval, and two runs over the same rows: is one better, and how sure is that?
//!
//! Rows that hang together (questions about one document, turns of one conversation) carry a group; then groups are
//! resampled, not rows, and a run with few groups says as little as it knows.
//!
//! Source of the clustered reading: Miller 2024, "Adding error bars to evals", arXiv:2411.00640, sections 2 and 4

use std::collections::HashMap;

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::stats::{self, Bootstrap, CONFIDENCE, Interval, McNemar, N_RESAMPLES, Part, SEED};

/// A score, between which bounds it lies, and from how much it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The mean of the rows' scores.
    pub mean: f64,
    /// 95% of such intervals hold the truth.
    pub interval: Interval,
    /// Rows.
    pub n: usize,
    /// Groups of rows, where rows carry groups.
    pub n_groups: Option<usize>,
}

/// The mean of rows' scores with its interval: Wilson's where every row scores 0 or 1 and none has a group, else a
/// bootstrap over rows or groups. `None` without rows.
///
/// Panics if there are groups, but not one a row.
pub fn score(rows: &[f64], groups: Option<&[String]>) -> Option<Score> {
    if rows.is_empty() {
        return None;
    }
    let parts = grouped(rows, groups);
    let mean = rows.iter().sum::<f64>() / rows.len() as f64;
    let interval = if groups.is_none() && is_binary(rows) {
        let n_right = rows.iter().filter(|row| **row == 1.0).count();
        stats::wilson(n_right, rows.len(), CONFIDENCE)
    } else {
        stats::bootstrap(&parts, &Bootstrap::default())
    };
    Some(Score {
        mean,
        interval,
        n: rows.len(),
        n_groups: groups.map(|_| parts.len()),
    })
}

fn is_binary(rows: &[f64]) -> bool {
    rows.iter().all(|row| *row == 0.0 || *row == 1.0)
}

/// One part a group, in the order in which groups first appear; one a row without groups.
fn grouped(rows: &[f64], groups: Option<&[String]>) -> Vec<Part> {
    let Some(groups) = groups else {
        return rows.iter().map(|row| Part::mean(*row)).collect();
    };
    assert_eq!(rows.len(), groups.len(), "a group a row");
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut parts: Vec<Part> = Vec::new();
    for (row, group) in rows.iter().zip(groups) {
        let at = *places.entry(group).or_insert_with(|| {
            parts.push(Part { num: 0.0, den: 0.0 });
            parts.len() - 1
        });
        parts[at].num += row;
        parts[at].den += 1.0;
    }
    parts
}

/// What may be said of two runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Ours scores higher, by the interval and by the test.
    Better,
    /// Ours scores lower.
    Worse,
    /// These rows do not tell them apart.
    Undecided,
}

/// Two runs over the same rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Rows that both have.
    pub n: usize,
    /// Groups of rows, where rows carry groups.
    pub n_groups: Option<usize>,
    /// The mean of ours less the mean of theirs.
    pub difference: f64,
    /// Of the difference.
    pub interval: Interval,
    /// How often two equals differ by so much or more.
    pub p_value: f64,
    /// Which test says so.
    pub test: String,
    /// Rows that only one has right, where rows are right or wrong and carry no group.
    pub mcnemar: Option<McNemar>,
    /// Which is better.
    pub verdict: Verdict,
    /// About how many rows more would tell them apart four times in five, if they differ by as much as it seems.
    /// Absent where they are told apart, and where no difference is seen.
    pub more_rows: Option<usize>,
}

/// Compares two runs row by row. A verdict needs both the interval without zero and a p-value below 0.05: McNemar's
/// exact test where rows are right or wrong, else a permutation test that swaps the runs row by row (or group by group).
/// `None` without rows.
///
/// Panics if the two have not the same rows, or if there are groups, but not one a row.
pub fn compare(ours: &[f64], theirs: &[f64], groups: Option<&[String]>) -> Option<Comparison> {
    assert_eq!(ours.len(), theirs.len(), "a comparison needs the same rows");
    if ours.is_empty() {
        return None;
    }
    let (a, b) = (grouped(ours, groups), grouped(theirs, groups));
    let difference = stats::ratio(&a) - stats::ratio(&b);
    let interval = stats::paired_bootstrap(&a, &b, &Bootstrap::default());
    let mcnemar = (groups.is_none() && is_binary(ours) && is_binary(theirs)).then(|| {
        let right = |rows: &[f64]| -> Vec<bool> { rows.iter().map(|row| *row == 1.0).collect() };
        stats::mcnemar(&right(ours), &right(theirs))
    });
    let gaps: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x.num - y.num).collect();
    let (p_value, test) = match &mcnemar {
        Some(test) => (test.p_value, "mcnemar, exact".to_string()),
        None => {
            let what = if groups.is_some() { "groups" } else { "rows" };
            let test = format!("permutation of {what}, {N_RESAMPLES} draws, seed {SEED}");
            (permutation(&gaps), test)
        }
    };
    let is_sure = p_value < 1.0 - CONFIDENCE && !interval.contains(0.0);
    let verdict = match (is_sure, difference > 0.0) {
        (false, _) => Verdict::Undecided,
        (true, true) => Verdict::Better,
        (true, false) => Verdict::Worse,
    };
    let more_rows = (verdict == Verdict::Undecided)
        .then(|| more_rows(&gaps, ours.len()))
        .flatten();
    Some(Comparison {
        n: ours.len(),
        n_groups: groups.map(|_| a.len()),
        difference,
        interval,
        p_value,
        test,
        mcnemar,
        verdict,
        more_rows,
    })
}

/// How often the sum of the gaps is as far from zero when each gap's sign is a coin's.
///
/// Math: p = (1 + #{draws with |sum| >= |observed|}) / (1 + draws)
fn permutation(gaps: &[f64]) -> f64 {
    let gaps: Vec<f64> = gaps.iter().copied().filter(|gap| *gap != 0.0).collect();
    // A sum in another order may differ in its last bits and is as far from zero all the same.
    let slack = gaps.iter().map(|gap| gap.abs()).sum::<f64>() * 1e-12;
    let seen = gaps.iter().sum::<f64>().abs() - slack;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let as_far = (0..N_RESAMPLES)
        .filter(|_| {
            let (mut sum, mut bits) = (0.0, 0_u32);
            for (i, gap) in gaps.iter().enumerate() {
                if i % 32 == 0 {
                    bits = rng.next_u32();
                }
                sum += if bits >> (i % 32) & 1 == 1 {
                    *gap
                } else {
                    -gap
                };
            }
            f64::abs(sum) >= seen
        })
        .count();
    (1 + as_far) as f64 / (1 + N_RESAMPLES) as f64
}

/// Math: n' = ((z_0.975 + z_0.8) s / d)^2, s the deviation of the gaps, d their mean, in rows
fn more_rows(gaps: &[f64], n_rows: usize) -> Option<usize> {
    let n = gaps.len() as f64;
    let mean = gaps.iter().sum::<f64>() / n;
    if n < 2.0 || mean == 0.0 {
        return None;
    }
    let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let z = stats::normal_quantile(0.5 + CONFIDENCE / 2.0) + stats::normal_quantile(0.8);
    let wanted = z * z * variance / (mean * mean) * n_rows as f64 / n;
    // Beyond a hundred million, "more" is no advice.
    (wanted < 1e8).then(|| (wanted.ceil() as usize).saturating_sub(n_rows).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uniform(rng: &mut ChaCha8Rng) -> f64 {
        (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    #[test]
    fn a_clear_difference_is_called_and_a_faint_one_is_not() {
        let ours: Vec<f64> = (0..100).map(|i| f64::from(i % 10 != 0)).collect();
        let theirs: Vec<f64> = (0..100).map(|i| f64::from(i % 2 == 0)).collect();
        let clear = compare(&ours, &theirs, None).unwrap();
        assert_eq!(clear.verdict, Verdict::Better);
        assert!(clear.mcnemar.is_some() && clear.more_rows.is_none());
        let back = compare(&theirs, &ours, None).unwrap();
        assert_eq!(back.verdict, Verdict::Worse);
        assert!((back.difference + 0.4).abs() < 1e-12);

        let mut close = ours.clone();
        close[1] = 0.0;
        close[3] = 0.0;
        let faint = compare(&ours, &close, None).unwrap();
        assert_eq!(faint.verdict, Verdict::Undecided);
        // 2 of 100 rows differ: (2.8)^2 · 0.0198 / 0.02^2 = 388 rows.
        assert!(faint.more_rows.is_some_and(|n| (270..310).contains(&n)));
        let same = compare(&ours, &ours, None).unwrap();
        assert_eq!((same.verdict, same.more_rows), (Verdict::Undecided, None));
        assert!(compare(&[], &[], None).is_none());
    }

    #[test]
    fn rows_of_a_group_count_as_one() {
        // Ten groups of twenty rows that are all alike: what looks like 200 rows is ten.
        let groups: Vec<String> = (0..200).map(|i| (i / 20).to_string()).collect();
        let rows: Vec<f64> = (0..200).map(|i| f64::from((i / 20) % 2 == 0)).collect();
        let alone = score(&rows, None).unwrap().interval;
        let together = score(&rows, Some(&groups)).unwrap();
        assert!(together.interval.hi - together.interval.lo > 3.0 * (alone.hi - alone.lo));
        assert_eq!(together.n_groups, Some(10));
        let theirs: Vec<f64> = (0..200).map(|i| f64::from((i / 20) % 5 == 0)).collect();
        let naive = compare(&rows, &theirs, None).unwrap();
        let honest = compare(&rows, &theirs, Some(&groups)).unwrap();
        assert_eq!(naive.verdict, Verdict::Better);
        assert_eq!(honest.verdict, Verdict::Undecided);
        assert!(honest.test.contains("groups"));
    }

    /// Two runs of equals, a thousand times: how often one is called the winner.
    fn false_wins(mut runs: impl FnMut(&mut ChaCha8Rng) -> Comparison) -> usize {
        let mut rng = ChaCha8Rng::seed_from_u64(2026);
        (0..1000)
            .filter(|_| runs(&mut rng).verdict != Verdict::Undecided)
            .count()
    }

    #[test]
    fn equals_are_seldom_told_apart() {
        let binary = false_wins(|rng| {
            let mut run = || -> Vec<f64> {
                let rows = (0..80).map(|_| f64::from(uniform(rng) < 0.7));
                rows.collect()
            };
            let (ours, theirs) = (run(), run());
            compare(&ours, &theirs, None).unwrap()
        });
        let graded = false_wins(|rng| {
            let mut run = || -> Vec<f64> { (0..40).map(|_| uniform(rng).powi(3)).collect() };
            let (ours, theirs) = (run(), run());
            compare(&ours, &theirs, None).unwrap()
        });
        let clustered = false_wins(|rng| {
            let groups: Vec<String> = (0..120).map(|i| (i / 6).to_string()).collect();
            let mut run = || -> Vec<f64> {
                let mut rows = Vec::new();
                for _ in 0..20 {
                    let p = uniform(rng);
                    rows.extend((0..6).map(|_| f64::from(uniform(rng) < p)));
                }
                rows
            };
            let (ours, theirs) = (run(), run());
            compare(&ours, &theirs, Some(&groups)).unwrap()
        });
        println!(
            "false wins in 1,000: {binary} right or wrong, {graded} graded, {clustered} clustered"
        );
        assert!(binary <= 50, "{binary}");
        assert!(graded <= 50, "{graded}");
        assert!(clustered <= 50, "{clustered}");
    }
}
