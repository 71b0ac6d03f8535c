//! What a grader is: the kinds of OpenAI's graders, and the scores of those that need no model.

use serde::{Deserialize, Serialize};

use crate::text;

/// `string_check`: 1 if a text is, is not, or holds another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StringCheck {
    /// The grader's name.
    pub name: String,
    /// A template of the text.
    pub input: String,
    /// A template of what it is compared with.
    pub reference: String,
    /// How.
    pub operation: Operation,
}

/// How two texts are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// They are the same.
    Eq,
    /// They are not.
    #[serde(alias = "neq")]
    Ne,
    /// The reference is somewhere in the input.
    Like,
    /// The same, whatever the case of letters.
    Ilike,
}

impl Operation {
    /// 1 or 0.
    pub fn score(self, input: &str, reference: &str) -> f64 {
        let holds = match self {
            Operation::Eq => input == reference,
            Operation::Ne => input != reference,
            Operation::Like => input.contains(reference),
            Operation::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        };
        f64::from(u8::from(holds))
    }
}

/// `text_similarity`: how much one text is like another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextSimilarity {
    /// The grader's name.
    pub name: String,
    /// A template of the text.
    pub input: String,
    /// A template of what it is compared with.
    pub reference: String,
    /// By which metric.
    pub evaluation_metric: Similarity,
    /// The least score that passes, in evals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_threshold: Option<f64>,
    /// Whose vectors `cosine` compares; the first embedding model that is served, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// A metric of two texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Similarity {
    Cosine,
    FuzzyMatch,
    Bleu,
    Gleu,
    Meteor,
    #[serde(rename = "rouge_1")]
    Rouge1,
    #[serde(rename = "rouge_2")]
    Rouge2,
    #[serde(rename = "rouge_3")]
    Rouge3,
    #[serde(rename = "rouge_4")]
    Rouge4,
    #[serde(rename = "rouge_5")]
    Rouge5,
    RougeL,
}

impl Similarity {
    /// The score; `None` for the one that needs a model's vectors.
    pub fn score(self, answer: &str, reference: &str) -> Option<f64> {
        Some(match self {
            Similarity::Cosine => return None,
            Similarity::FuzzyMatch => text::fuzzy_match(answer, reference),
            Similarity::Bleu => text::bleu(answer, reference),
            Similarity::Gleu => text::gleu(answer, reference),
            Similarity::Meteor => text::meteor(answer, reference),
            Similarity::Rouge1 => text::rouge_n(answer, reference, 1),
            Similarity::Rouge2 => text::rouge_n(answer, reference, 2),
            Similarity::Rouge3 => text::rouge_n(answer, reference, 3),
            Similarity::Rouge4 => text::rouge_n(answer, reference, 4),
            Similarity::Rouge5 => text::rouge_n(answer, reference, 5),
            Similarity::RougeL => text::rouge_l(answer, reference),
        })
    }
}

/// The cosine of two vectors' angle; 0 if one has no length.
///
/// Panics if their lengths differ.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "vectors of one model have one length");
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter()
            .zip(y)
            .map(|(x, y)| f64::from(*x) * f64::from(*y))
            .sum()
    };
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 { 0.0 } else { dot(a, b) / norms }
}

/// `python`: a program with a function `grade(sample, item)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Python {
    /// The grader's name.
    pub name: String,
    /// The program.
    pub source: String,
    /// The environment it was written for; taken and shown, there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_tag: Option<String>,
    /// The least score that passes, in evals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_threshold: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations() {
        let score = |operation: Operation| operation.score("Rome, Italy", "rome");
        assert_eq!(
            [
                score(Operation::Eq),
                score(Operation::Ne),
                score(Operation::Like),
                score(Operation::Ilike)
            ],
            [0.0, 1.0, 0.0, 1.0]
        );
        assert_eq!(Operation::Eq.score("a", "a"), 1.0);
        assert_eq!(Operation::Like.score("a", ""), 1.0);
    }

    #[test]
    fn a_cosine() {
        assert_eq!(cosine(&[1.0, 0.0], &[2.0, 0.0]), 1.0);
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 0.0]), 0.0);
        assert!((cosine(&[1.0, 1.0], &[1.0, 0.0]) - 0.5_f64.sqrt()).abs() < 1e-12);
    }
}
