//! BLEU and GLEU: n-grams in common.

use std::collections::HashMap;

use super::words::words_13a;

/// The longest n-grams that count.
const ORDER: usize = 4;

/// How often each n-gram of a length occurs.
fn counts(words: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_insert(0) += 1;
    }
    counts
}

/// N-grams of a length that both have, each as often as the one that has it less often.
fn common(a: &[String], b: &[String], n: usize) -> usize {
    let theirs = counts(b, n);
    let shared = counts(a, n)
        .into_iter()
        .map(|(gram, k)| k.min(theirs.get(gram).copied().unwrap_or(0)));
    shared.sum()
}

fn n_grams(words: &[String], n: usize) -> usize {
    (words.len() + 1).saturating_sub(n)
}

/// BLEU of one sentence against one reference.
///
/// Math:   exp(min(0, 1 - r/c)) · (prod_n p_n)^(1/N), N the longest length that the answer has n-grams of; where none
///         of a length is right, p_n is 1 / (2^k times their number), k counting such lengths; 0 if no word is right
/// Source: Papineni et al. 2002; Chen & Cherry 2014, smoothing 3; as `sacrebleu.sentence_bleu` has it, divided by 100
pub fn bleu(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (words_13a(answer), words_13a(reference));
    let right: Vec<usize> = (1..=ORDER)
        .map(|n| common(&answer, &reference, n))
        .collect();
    if right.iter().all(|n| *n == 0) {
        return 0.0;
    }
    let (mut logs, mut orders, mut smooth) = (0.0, 0, 1.0);
    for (i, right) in right.iter().enumerate() {
        let all = n_grams(&answer, i + 1);
        if all == 0 {
            break;
        }
        let precision = if *right == 0 {
            smooth *= 2.0;
            1.0 / (smooth * all as f64)
        } else {
            *right as f64 / all as f64
        };
        logs += precision.ln();
        orders += 1;
    }
    let (c, r) = (answer.len() as f64, reference.len() as f64);
    let brevity = if c < r { 1.0 - r / c } else { 0.0 };
    (brevity + logs / f64::from(orders)).exp()
}

/// GLEU, the metric of Google's translator: n-grams in common by those of whichever text has more.
///
/// Source: Wu et al. 2016, arXiv:1609.08144, section 4.1
pub fn gleu(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (words_13a(answer), words_13a(reference));
    let all = |words: &[String]| (1..=ORDER).map(|n| n_grams(words, n)).sum::<usize>();
    let most = all(&answer).max(all(&reference));
    if most == 0 {
        return 0.0;
    }
    let right: usize = (1..=ORDER).map(|n| common(&answer, &reference, n)).sum();
    right as f64 / most as f64
}
