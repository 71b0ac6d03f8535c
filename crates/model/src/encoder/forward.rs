//! Tokens to vectors. A sequence's bits do not depend on the ones it is computed with.

use super::{Encoder, Map, Norm};
use crate::block::ROW_CHUNK;
use crate::pool::{Pooled, passes};
use bantam_formats::hf::Pooling;
use bantam_kernels::{Compute, encoder as ops};

impl Map {
    /// `y [T, n] = x [T, k] W^T`; the bias goes with what follows.
    fn forward(&self, compute: &Compute, y: &mut Vec<f32>, x: &[f32], rows: usize) {
        y.resize(rows * self.bias.len(), 0.0);
        self.weight.matmul(compute, y, x, rows);
    }
}

impl Encoder {
    /// One vector a sequence, in order, each of `d_model` numbers.
    ///
    /// Sequences are what the tokenizer gives, special tokens included. A vector's bits depend on its own
    /// sequence only.
    ///
    /// Panics if a sequence is empty or longer than the table of positions, or if a token is outside the
    /// vocabulary.
    pub fn embed(&self, sequences: &[&[u32]], compute: &Compute) -> Vec<Vec<f32>> {
        let d = self.config.d_model;
        let mut vectors = Vec::with_capacity(sequences.len());
        for pass in passes(sequences) {
            let hidden = self.hidden(pass, compute);
            let mut rows = hidden.as_slice();
            for sequence in pass {
                let (own, rest) = rows.split_at(sequence.len() * d);
                rows = rest;
                let mut vector = match self.config.pooling {
                    Pooling::Mean => Pooled::mean(own, d),
                    Pooling::Cls => Pooled::first(own, d),
                };
                if self.config.normalize {
                    vector.normalize();
                }
                vectors.push(vector.into_f32());
            }
        }
        vectors
    }

    /// The last layer's rows of packed sequences.
    ///
    /// Shapes: returns [T, D], the rows of the first sequence first
    ///
    /// Panics as [`Encoder::embed`] does.
    pub fn hidden(&self, sequences: &[&[u32]], compute: &Compute) -> Vec<f32> {
        let (config, d) = (&self.config, self.config.d_model);
        let (mut seqs, mut tokens) = (Vec::new(), Vec::new());
        for sequence in sequences {
            assert!(
                (1..=config.positions).contains(&sequence.len()),
                "a sequence has 1 to {} tokens",
                config.positions
            );
            assert!(
                sequence
                    .iter()
                    .all(|&token| (token as usize) < config.vocab),
                "tokens are in the vocabulary"
            );
            let start = tokens.len();
            let placed = sequence.iter().enumerate();
            tokens.extend(placed.map(|(pos, &token)| (token as usize, pos)));
            seqs.push(start..tokens.len());
        }
        let t = tokens.len();
        let (mut x, mut delta) = (vec![0.0; t * d], vec![0.0; t * d]);
        self.embed_rows(compute, &mut x, &mut delta, &tokens);
        let (mut qkv, mut attn, mut ffn) = (Vec::new(), vec![0.0; t * d], Vec::new());
        let head_dim = d / config.n_heads;
        for layer in &self.layers {
            layer.qkv.forward(compute, &mut qkv, &x, t);
            let (bias, chunk) = (&layer.qkv.bias, ROW_CHUNK * 3 * d);
            compute.pool().chunks_mut(&mut qkv, chunk, |_, rows| {
                bantam_kernels::ops::add_bias(compute.isa(), rows, bias);
            });
            ops::attention(compute, &mut attn, &qkv, &seqs, config.n_heads, head_dim);
            layer.out.forward(compute, &mut delta, &attn, t);
            self.add_and_norm(compute, &mut x, &delta, &layer.out.bias, &layer.attn_norm);
            layer.up.forward(compute, &mut ffn, &x, t);
            let (bias, chunk) = (&layer.up.bias, ROW_CHUNK * config.d_ffn);
            compute.pool().chunks_mut(&mut ffn, chunk, |_, rows| {
                ops::bias_gelu(compute.isa(), rows, bias);
            });
            layer.down.forward(compute, &mut delta, &ffn, t);
            self.add_and_norm(compute, &mut x, &delta, &layer.down.bias, &layer.ffn_norm);
        }
        x
    }

    /// Rows of words, types and positions, normalised.
    fn embed_rows(
        &self,
        compute: &Compute,
        x: &mut [f32],
        delta: &mut [f32],
        tokens: &[(usize, usize)],
    ) {
        let d = self.config.d_model;
        let rows = x.chunks_exact_mut(d).zip(delta.chunks_exact_mut(d));
        for ((x, delta), &(token, pos)) in rows.zip(tokens) {
            x.copy_from_slice(&self.words[token * d..][..d]);
            delta.copy_from_slice(&self.positions[pos * d..][..d]);
        }
        self.add_and_norm(compute, x, delta, &self.first_type, &self.norm);
    }

    fn add_and_norm(
        &self,
        compute: &Compute,
        x: &mut [f32],
        delta: &[f32],
        bias: &[f32],
        norm: &Norm,
    ) {
        let (chunk, eps) = (ROW_CHUNK * self.config.d_model, self.config.norm_eps);
        compute.pool().chunks_mut(x, chunk, |i, rows| {
            let delta = &delta[i * chunk..][..rows.len()];
            let (gain, shift) = (&norm.gain, &norm.shift);
            ops::add_and_norm(compute.isa(), rows, delta, bias, (gain, shift), eps);
        });
    }
}
