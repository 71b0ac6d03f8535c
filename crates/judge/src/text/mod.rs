//! How much one text is like another: the metrics of `text_similarity` graders, each between 0 and 1.
//!
//! | metric | what it compares | words | agrees with |
//! |---|---|---|---|
//! | `fuzzy_match` | characters in common order | none | rapidfuzz, `fuzz.ratio` / 100 |
//! | `bleu` | 1- to 4-grams, precision | 13a | sacrebleu, `sentence_bleu` / 100 |
//! | `gleu` | 1- to 4-grams, the lesser of precision and recall | 13a | nltk, `sentence_gleu` |
//! | `meteor` | words and their stems, in chunks | 13a, lowercased | nltk, `single_meteor_score` without WordNet |
//! | `rouge_1` .. `rouge_5` | n-grams, F-measure | `a-z0-9` | rouge-score, `use_stemmer=False` |
//! | `rouge_l` | longest common subsequence, F-measure | `a-z0-9` | rouge-score, `use_stemmer=False` |
//!
//! METEOR's third stage, synonyms, needs WordNet, which is not here: synonyms do not match.

mod meteor;
mod ngram;
mod rouge;
mod stem;
mod words;

pub use meteor::meteor;
pub use ngram::{bleu, gleu};
pub use rouge::{lcs_len, rouge_l, rouge_l_words, rouge_n, rouge_words};
pub use stem::stem;
pub use words::words_13a;

/// Twice the characters in common order, by the characters of both: `rapidfuzz.fuzz.ratio` / 100.
///
/// Math: 1 - indel / (n + m), where indel is the least number of insertions and deletions; 1 for two empty texts
pub fn fuzzy_match(answer: &str, reference: &str) -> f64 {
    rapidfuzz::distance::indel::normalized_similarity(answer.chars(), reference.chars())
}
