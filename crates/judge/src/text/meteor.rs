//! METEOR: words and stems in common, and in how few pieces.

use std::collections::HashMap;

use super::stem::stem;
use super::words::words_13a;

const ALPHA: f64 = 0.9;
const BETA: i32 = 3;
const GAMMA: f64 = 0.5;

/// A word and its place.
type Word = (usize, String);

/// METEOR of one text against one reference, by equal words, then by equal stems.
///
/// Math:   (1 - 0.5 (chunks / m)^3) · P R / (0.9 P + 0.1 R), m the words that are matched, P and R their share of
///         the answer's and the reference's words, chunks the runs of matches that are neighbours in both
/// Source: Lavie & Agarwal 2007, "METEOR: an automatic metric for MT evaluation with high levels of correlation with
///         human judgments", without the stage of synonyms
pub fn meteor(answer: &str, reference: &str) -> f64 {
    let words = |text: &str| -> Vec<Word> {
        let words = words_13a(text).into_iter().map(|word| word.to_lowercase());
        words.enumerate().collect()
    };
    let (answer, reference) = (words(answer), words(reference));
    let (n_answer, n_reference) = (answer.len() as f64, reference.len() as f64);
    let mut matches = Vec::new();
    let (answer, reference) = pair(answer, reference, &mut matches);
    let stems = |words: Vec<Word>| words.into_iter().map(|(at, word)| (at, stem(&word)));
    pair(
        stems(answer).collect(),
        stems(reference).collect(),
        &mut matches,
    );
    if matches.is_empty() {
        return 0.0;
    }
    matches.sort_unstable();
    let breaks = matches
        .windows(2)
        .filter(|two| two[1] != (two[0].0 + 1, two[0].1 + 1));
    let (m, chunks) = (matches.len() as f64, (breaks.count() + 1) as f64);
    let (precision, recall) = (m / n_answer, m / n_reference);
    let mean = precision * recall / (ALPHA * precision + (1.0 - ALPHA) * recall);
    (1.0 - GAMMA * (chunks / m).powi(BETA)) * mean
}

/// Matches equal words, from the last backwards, each with the last of its like that is free. What is left of both.
fn pair(
    answer: Vec<Word>,
    reference: Vec<Word>,
    matches: &mut Vec<(usize, usize)>,
) -> (Vec<Word>, Vec<Word>) {
    let mut places: HashMap<&str, Vec<usize>> = HashMap::new();
    for (at, word) in &reference {
        places.entry(word).or_default().push(*at);
    }
    let mut taken = Vec::new();
    let mut rest = Vec::new();
    for (at, word) in answer.iter().rev() {
        match places.get_mut(word.as_str()).and_then(Vec::pop) {
            Some(other) => {
                matches.push((*at, other));
                taken.push(other);
            }
            None => rest.push((*at, word.clone())),
        }
    }
    rest.reverse();
    let left = reference
        .into_iter()
        .filter(|(at, _)| !taken.contains(at))
        .collect();
    (rest, left)
}
