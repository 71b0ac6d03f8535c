//! The rows of a sequence as one vector, and a decoder's vectors by the mean of its rows.

use crate::cache::KvCache;
use crate::infer::{InferWorkspace, Span, Wants};
use crate::lora::Lora;
use crate::weights::Model;
use bantam_kernels::Compute;

/// Tokens that pass through the layers together, unless one sequence alone has more.
const PASS_TOKENS: usize = 1024;

/// Cuts sequences into passes of about [`PASS_TOKENS`]; which of them share a pass changes no bit.
pub(crate) fn passes<'a, 's>(sequences: &'a [&'s [u32]]) -> impl Iterator<Item = &'a [&'s [u32]]> {
    let mut rest = sequences;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|sequence| {
            tokens += sequence.len();
            tokens <= PASS_TOKENS
        });
        let n = fits.count().max(1).min(rest.len());
        let (pass, later) = rest.split_at(n);
        rest = later;
        (!pass.is_empty()).then_some(pass)
    })
}

/// A vector in the making, in f64 so that its length does not cost it a digit.
pub(crate) struct Pooled(Vec<f64>);

impl Pooled {
    /// The mean of rows of `d`.
    pub(crate) fn mean(rows: &[f32], d: usize) -> Self {
        let mut sum = vec![0.0; d];
        for row in rows.chunks_exact(d) {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += f64::from(x);
            }
        }
        let n = (rows.len() / d) as f64;
        sum.iter_mut().for_each(|x| *x /= n);
        Self(sum)
    }

    /// The first row.
    pub(crate) fn first(rows: &[f32], d: usize) -> Self {
        Self(rows[..d].iter().map(|&x| f64::from(x)).collect())
    }

    /// Scales to length 1; a vector of zeros stays one.
    pub(crate) fn normalize(&mut self) {
        let length = self.0.iter().map(|x| x * x).sum::<f64>().sqrt();
        if length > 0.0 {
            self.0.iter_mut().for_each(|x| *x /= length);
        }
    }

    pub(crate) fn into_f32(self) -> Vec<f32> {
        self.0.into_iter().map(|x| x as f32).collect()
    }
}

impl Model<f32> {
    /// One vector of length 1 a sequence: the mean of its rows behind the final norm, under `lora` if there is one.
    ///
    /// A vector's bits depend on its own sequence only.
    ///
    /// Panics if a sequence is empty or a token is outside the vocabulary.
    pub fn embed(
        &self,
        sequences: &[&[u32]],
        lora: Option<&Lora<f32>>,
        compute: &Compute,
    ) -> Vec<Vec<f32>> {
        let d = self.config.d_model;
        let mut vectors = Vec::with_capacity(sequences.len());
        for pass in passes(sequences) {
            let hidden = self.hidden(pass, lora, compute);
            let mut rows = hidden.as_slice();
            for sequence in pass {
                let (own, rest) = rows.split_at(sequence.len() * d);
                rows = rest;
                let mut vector = Pooled::mean(own, d);
                vector.normalize();
                vectors.push(vector.into_f32());
            }
        }
        vectors
    }

    /// Rows behind the final norm of whole sequences.
    ///
    /// Shapes: returns [T, D], the rows of the first sequence first
    fn hidden(
        &self,
        sequences: &[&[u32]],
        lora: Option<&Lora<f32>>,
        compute: &Compute,
    ) -> Vec<f32> {
        let fresh = || KvCache::new(&self.config);
        let mut caches: Vec<KvCache> = sequences.iter().map(|_| fresh()).collect();
        let spans = caches
            .iter_mut()
            .zip(sequences)
            .map(|(cache, tokens)| Span {
                cache,
                tokens,
                logits: Wants::All,
                lora,
            });
        let mut rows = Vec::new();
        let mut spans: Vec<_> = spans.collect();
        self.normed(
            &mut spans,
            &mut rows,
            &mut InferWorkspace::default(),
            compute,
        );
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_keep_every_sequence_in_order() {
        let lens = [1, 1000, 30, 5000, 2, 2, 1024, 1];
        let all: Vec<Vec<u32>> = lens.iter().map(|&n| vec![7; n]).collect();
        let all: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let cut: Vec<Vec<usize>> = passes(&all)
            .map(|p| p.iter().map(|s| s.len()).collect())
            .collect();
        let want: [&[usize]; 6] = [&[1, 1000], &[30], &[5000], &[2, 2], &[1024], &[1]];
        assert_eq!(cut, want);
        assert_eq!(passes(&[]).count(), 0);
    }

    #[test]
    fn a_mean_of_zeros_stays_zero() {
        let mut zero = Pooled::mean(&[0.0; 6], 3);
        zero.normalize();
        assert_eq!(zero.into_f32(), [0.0; 3]);
        let mut mean = Pooled::mean(&[1.0, 0.0, 5.0, 8.0], 2);
        mean.normalize();
        assert_eq!(mean.into_f32(), [0.6, 0.8]);
    }
}
