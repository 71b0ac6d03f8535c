//! Texts to vectors: a sentence encoder, or the mean of a generating model's hidden rows.

use std::sync::Arc;

use bantam_kernels::Compute;
use bantam_model::encoder::Encoder;
use bantam_model::{Lora, Model};
use bantam_text::{Tokenizer, WordPiece};
use thiserror::Error;

/// Why a text has no vector.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EmbedError {
    /// Longer than the model reads; nothing is cut off in silence.
    #[error(
        "input {index} has {tokens} tokens, and the model reads at most {max}; cut the text into parts"
    )]
    TooLong {
        /// Which input, from 0.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// [`Embedder::max_tokens`].
        max: usize,
    },
    /// No tokens.
    #[error("input {index} is empty")]
    Empty {
        /// Which input, from 0.
        index: usize,
    },
    /// A token id that the model does not have.
    #[error("input {index}: token {token} is not in the model's vocabulary of {vocab}")]
    UnknownToken {
        /// Which input, from 0.
        index: usize,
        /// The token.
        token: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
}

/// A model that turns texts into vectors. Shared between threads; a call needs no state.
pub trait Embedder: Send + Sync {
    /// Numbers in a vector.
    fn dims(&self) -> usize;

    /// The longest input, special tokens included.
    fn max_tokens(&self) -> usize;

    /// One more than the largest token id.
    fn vocab(&self) -> usize;

    /// The tokens of a text, with the special ones that the model reads around it.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// One vector an input that has passed [`check`], in order. Its bits depend on its own input only.
    fn vectors(&self, inputs: &[&[u32]]) -> Vec<Vec<f32>>;

    /// One vector an input, in order; an error names the first input that has none, and nothing is computed.
    fn embed(&self, inputs: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let inputs: Vec<&[u32]> = inputs.iter().map(Vec::as_slice).collect();
        check(&inputs, self.max_tokens(), self.vocab())?;
        Ok(self.vectors(&inputs))
    }
}

/// Whether every input has 1 to `max` tokens below `vocab`.
pub fn check(inputs: &[&[u32]], max: usize, vocab: usize) -> Result<(), EmbedError> {
    for (index, input) in inputs.iter().enumerate() {
        if input.is_empty() {
            return Err(EmbedError::Empty { index });
        }
        if input.len() > max {
            let tokens = input.len();
            return Err(EmbedError::TooLong { index, tokens, max });
        }
        if let Some(&token) = input.iter().find(|&&token| token as usize >= vocab) {
            return Err(EmbedError::UnknownToken {
                index,
                token,
                vocab,
            });
        }
    }
    Ok(())
}

/// The first `dims` numbers of a vector, scaled to length 1 again; a vector of zeros stays one.
///
/// Only vectors of models that were trained for it keep their meaning when shortened far.
pub fn shorten(vector: &mut Vec<f32>, dims: usize) {
    if dims >= vector.len() {
        return;
    }
    vector.truncate(dims);
    let squares: f64 = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let length = squares.sqrt();
    if length > 0.0 {
        for x in vector {
            *x = (f64::from(*x) / length) as f32;
        }
    }
}

/// The cosine of the angle between two vectors, 0 if one of them is zeros. Panics if their lengths differ.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "the vectors are of one space");
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a), f64::from(b));
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    let lengths = (aa * bb).sqrt();
    if lengths > 0.0 { ab / lengths } else { 0.0 }
}

/// An encoder of the BERT family.
#[derive(Debug, Clone)]
pub struct SentenceEncoder {
    encoder: Arc<Encoder>,
    tokenizer: Arc<WordPiece>,
    compute: Compute,
}

impl SentenceEncoder {
    /// An encoder with its tokenizer; the error says that they do not belong together.
    pub fn new(
        encoder: Arc<Encoder>,
        tokenizer: Arc<WordPiece>,
        compute: Compute,
    ) -> Result<Self, String> {
        let (known, rows) = (tokenizer.vocab_size(), encoder.config().vocab);
        if known > rows {
            return Err(format!(
                "the tokenizer has {known} tokens, the model {rows}"
            ));
        }
        Ok(Self {
            encoder,
            tokenizer,
            compute,
        })
    }
}

impl Embedder for SentenceEncoder {
    fn dims(&self) -> usize {
        self.encoder.config().d_model
    }

    fn max_tokens(&self) -> usize {
        self.encoder.config().max_tokens
    }

    fn vocab(&self) -> usize {
        self.encoder.config().vocab
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text)
    }

    fn vectors(&self, inputs: &[&[u32]]) -> Vec<Vec<f32>> {
        self.encoder.embed(inputs, &self.compute)
    }
}

/// A generating model whose hidden rows are averaged, under its adapter if it has one.
#[derive(Debug, Clone)]
pub struct DecoderEmbedder {
    model: Arc<Model<f32>>,
    lora: Option<Arc<Lora<f32>>>,
    tokenizer: Arc<Tokenizer>,
    compute: Compute,
}

impl DecoderEmbedder {
    /// The model that also generates, its adapter and its tokenizer.
    pub fn new(
        model: Arc<Model<f32>>,
        lora: Option<Arc<Lora<f32>>>,
        tokenizer: Arc<Tokenizer>,
        compute: Compute,
    ) -> Self {
        Self {
            model,
            lora,
            tokenizer,
            compute,
        }
    }
}

impl Embedder for DecoderEmbedder {
    fn dims(&self) -> usize {
        self.model.config().d_model
    }

    fn max_tokens(&self) -> usize {
        self.model.config().max_context
    }

    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        let bos = self.tokenizer.bos().filter(|_| self.tokenizer.add_bos());
        bos.into_iter()
            .chain(self.tokenizer.encode_plain(text))
            .collect()
    }

    fn vectors(&self, inputs: &[&[u32]]) -> Vec<Vec<f32>> {
        self.model
            .embed(inputs, self.lora.as_deref(), &self.compute)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_vector_is_named() {
        let say = |inputs: &[&[u32]]| check(inputs, 3, 10).unwrap_err().to_string();
        assert_eq!(check(&[&[0], &[9, 9, 9]], 3, 10), Ok(()));
        assert_eq!(
            say(&[&[1], &[1, 2, 3, 4]]),
            "input 1 has 4 tokens, and the model reads at most 3; cut the text into parts"
        );
        assert_eq!(say(&[&[]]), "input 0 is empty");
        assert_eq!(
            say(&[&[1], &[2], &[10]]),
            "input 2: token 10 is not in the model's vocabulary of 10"
        );
    }

    #[test]
    fn a_shortened_vector_has_length_one_again() {
        let mut vector = vec![3.0, 4.0, 12.0];
        shorten(&mut vector, 3);
        assert_eq!(vector, [3.0, 4.0, 12.0]);
        shorten(&mut vector, 2);
        assert_eq!(vector, [0.6, 0.8]);
        let mut zeros = vec![0.0; 3];
        shorten(&mut zeros, 2);
        assert_eq!(zeros, [0.0; 2]);
    }

    #[test]
    fn cosines_are_those_of_the_angle() {
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 2.0]), 0.0);
        assert_eq!(cosine(&[3.0, 4.0], &[-6.0, -8.0]), -1.0);
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), 0.0);
        assert!((cosine(&[1.0, 1.0], &[1.0, 0.0]) - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
