//! ROUGE-L: the longest common subsequence of words.
//!
//! Words as the common implementation has them: lowercased, every run of other than `a-z` and `0-9` a gap, no
//! stemming. So text in other scripts has no words and scores 0; such rows are counted.
//!
//! Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3, with beta = 1

/// The words of a text.
pub(super) fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The F-measure of the longest common subsequence: `2 P R / (P + R)`; 0 when either has no words.
///
/// Math: P = lcs / n_answer, R = lcs / n_expected, hence F = 2 lcs / (n_answer + n_expected)
pub(super) fn rouge_l(answer: &[String], expected: &[String]) -> f64 {
    if answer.is_empty() || expected.is_empty() {
        return 0.0;
    }
    2.0 * lcs(answer, expected) as f64 / (answer.len() + expected.len()) as f64
}

fn lcs(a: &[String], b: &[String]) -> usize {
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
