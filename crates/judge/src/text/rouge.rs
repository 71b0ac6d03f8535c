//! ROUGE: n-grams and the longest common subsequence of words.
//!
//! Words as the common implementation has them: lowercased, every run of other than `a-z` and `0-9` a gap, no
//! stemming. So text in other scripts has no words and scores 0.
//!
//! Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", sections 2 and 3, with beta = 1

use std::collections::HashMap;

/// The words of a text.
pub fn rouge_words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// ROUGE-N: the F-measure of n-grams in common, each counted as often as both have it.
///
/// Panics if `n` is 0.
pub fn rouge_n(answer: &str, reference: &str, n: usize) -> f64 {
    let (answer, reference) = (rouge_words(answer), rouge_words(reference));
    let mut open: HashMap<&[String], usize> = HashMap::new();
    for gram in reference.windows(n) {
        *open.entry(gram).or_default() += 1;
    }
    let mut right = 0;
    for gram in answer.windows(n) {
        if let Some(left) = open.get_mut(gram).filter(|left| **left > 0) {
            *left -= 1;
            right += 1;
        }
    }
    let all = answer.windows(n).len() + reference.windows(n).len();
    if all == 0 {
        0.0
    } else {
        2.0 * f64::from(right) / all as f64
    }
}

/// ROUGE-L of two texts.
pub fn rouge_l(answer: &str, reference: &str) -> f64 {
    rouge_l_words(&rouge_words(answer), &rouge_words(reference))
}

/// The F-measure of the longest common subsequence: `2 P R / (P + R)`; 0 when either has no words.
///
/// Math: P = lcs / n_answer, R = lcs / n_reference, hence F = 2 lcs / (n_answer + n_reference)
pub fn rouge_l_words(answer: &[String], reference: &[String]) -> f64 {
    if answer.is_empty() || reference.is_empty() {
        return 0.0;
    }
    2.0 * lcs_len(answer, reference) as f64 / (answer.len() + reference.len()) as f64
}

/// The length of the longest common subsequence.
pub fn lcs_len<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0_usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    row[b.len()]
}
