//! One layer forward, shared by training and inference: they differ in where attention looks
//! and in what is kept.

use crate::lora::{Fused, Lora};
use crate::rope::RopeTable;
use crate::weights::{Layer, Model};
use bantam_kernels::{Compute, Real, ops};
use std::ops::Range;

/// Rows that one task of a row operation takes.
pub(crate) const ROW_CHUNK: usize = 16;

/// What one layer computed and its backward needs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saved<R> {
    /// Input `[T, D]`
    pub(crate) x: Vec<R>,
    /// `[T]`
    pub(crate) attn_rstd: Vec<R>,
    /// Rotated `[T, W]`
    pub(crate) qkv: Vec<R>,
    /// `[T, H Dh]`
    pub(crate) attn: Vec<R>,
    /// Input of the MLP half `[T, D]`
    pub(crate) x_mid: Vec<R>,
    /// `[T]`
    pub(crate) mlp_rstd: Vec<R>,
    /// `[T, 2F]`
    pub(crate) gate_up: Vec<R>,
    /// Hidden rows of the adapters of each fused map, `[T, P R]`
    pub(crate) lora_hidden: [Vec<R>; 4],
}

/// Buffers that every layer uses again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scratch<R> {
    /// `[T, D]`
    pub(crate) norm: Vec<R>,
    /// `[T, D]`
    pub(crate) delta: Vec<R>,
    /// `[T, F]`
    pub(crate) ffn: Vec<R>,
    /// Rounded activations of a bf16 product.
    pub(crate) words: Vec<u32>,
    pub(crate) rope: RopeTable<R>,
}

/// Which rows pass which adapter. Ranges are in order and cover the rows that have one.
pub(crate) type Adapters<'a, R> = [(Range<usize>, &'a Lora<R>)];

/// Sets the length without keeping or clearing the content.
pub(crate) fn size<R: Real>(buffer: &mut Vec<R>, len: usize) {
    buffer.resize(len, R::ZERO);
}

impl<R: Real> Model<R> {
    /// `x [T, D]`: the embedding rows of the tokens.
    pub(crate) fn embed_rows<'t>(
        &self,
        compute: &Compute,
        x: &mut Vec<R>,
        tokens: impl Iterator<Item = &'t u32>,
    ) {
        let tokens: Vec<u32> = tokens.copied().collect();
        let d = self.config.d_model;
        size(x, tokens.len() * d);
        compute.pool().chunks_mut(x, ROW_CHUNK * d, |i, rows| {
            for (row, &token) in rows.chunks_exact_mut(d).zip(&tokens[i * ROW_CHUNK..]) {
                self.embed.row(row, token as usize);
            }
        });
    }

    /// Layer `layer_idx` on `x [T, D]`, in place. `attend` fills `saved.attn` from `saved.qkv`.
    pub(crate) fn layer_forward(
        &self,
        compute: &Compute,
        layer_idx: usize,
        adapters: &Adapters<'_, R>,
        positions: &[usize],
        x: &mut [R],
        saved: &mut Saved<R>,
        scratch: &mut Scratch<R>,
        attend: impl FnOnce(&mut [R], &[R]),
    ) {
        let (config, layer, t) = (&self.config, &self.layers[layer_idx], positions.len());
        let heads = config.heads();
        saved.x.clear();
        saved.x.extend_from_slice(x);
        size(&mut saved.qkv, t * heads.qkv_width());
        size(&mut saved.attn, t * heads.out_width());
        size(&mut saved.gate_up, t * 2 * config.d_ffn);
        size(&mut scratch.norm, x.len());
        size(&mut scratch.delta, x.len());
        size(&mut scratch.ffn, t * config.d_ffn);
        let map =
            |fused, y: &mut [R], input: &[R], hidden: &mut [Vec<R>; 4], words: &mut Vec<u32>| {
                layer.map(
                    compute,
                    (layer_idx, fused),
                    adapters,
                    y,
                    input,
                    hidden,
                    words,
                );
            };

        self.norm(
            compute,
            &mut scratch.norm,
            &mut saved.attn_rstd,
            x,
            &layer.attn_norm,
        );
        map(
            Fused::Qkv,
            &mut saved.qkv,
            &scratch.norm,
            &mut saved.lora_hidden,
            &mut scratch.words,
        );
        self.rotate(compute, &mut saved.qkv, positions, &scratch.rope, R::ONE);
        attend(&mut saved.attn, &saved.qkv);
        map(
            Fused::O,
            &mut scratch.delta,
            &saved.attn,
            &mut saved.lora_hidden,
            &mut scratch.words,
        );
        add_rows(compute, x, &scratch.delta, config.d_model);

        saved.x_mid.clear();
        saved.x_mid.extend_from_slice(x);
        self.norm(
            compute,
            &mut scratch.norm,
            &mut saved.mlp_rstd,
            x,
            &layer.mlp_norm,
        );
        map(
            Fused::GateUp,
            &mut saved.gate_up,
            &scratch.norm,
            &mut saved.lora_hidden,
            &mut scratch.words,
        );
        self.activate(compute, &mut scratch.ffn, &saved.gate_up);
        map(
            Fused::Down,
            &mut scratch.delta,
            &scratch.ffn,
            &mut saved.lora_hidden,
            &mut scratch.words,
        );
        add_rows(compute, x, &scratch.delta, config.d_model);
    }

    /// Normalises rows and keeps their `rstd`.
    pub(crate) fn norm(
        &self,
        compute: &Compute,
        out: &mut [R],
        rstd: &mut Vec<R>,
        x: &[R],
        w: &[R],
    ) {
        let d = w.len();
        size(rstd, x.len() / d);
        let eps = R::from_f64(self.config.rms_norm_eps);
        compute
            .pool()
            .chunks_mut2((out, ROW_CHUNK * d), (rstd, ROW_CHUNK), |i, out, rstd| {
                ops::rms_norm(
                    compute.isa(),
                    out,
                    rstd,
                    &x[i * ROW_CHUNK * d..][..rstd.len() * d],
                    w,
                    eps,
                );
            });
    }

    /// Rotates queries and keys to their positions (`sign` 1) or back (-1).
    pub(crate) fn rotate(
        &self,
        compute: &Compute,
        qkv: &mut [R],
        positions: &[usize],
        table: &RopeTable<R>,
        sign: R,
    ) {
        let heads = self.config.heads();
        let (w, rotated) = (
            heads.qkv_width(),
            heads.out_width() + heads.n_kv_heads * heads.head_dim,
        );
        compute.pool().chunks_mut(qkv, ROW_CHUNK * w, |i, rows| {
            for (row, &pos) in rows.chunks_exact_mut(w).zip(&positions[i * ROW_CHUNK..]) {
                let (cos, sin) = table.at(pos);
                ops::rope(compute.isa(), &mut row[..rotated], cos, sin, sign);
            }
        });
    }

    /// `out [T, F] = silu(gate) up`
    pub(crate) fn activate(&self, compute: &Compute, out: &mut [R], gate_up: &[R]) {
        let f = self.config.d_ffn;
        compute.pool().chunks_mut(out, ROW_CHUNK * f, |i, out| {
            let gate_up = &gate_up[2 * i * ROW_CHUNK * f..][..2 * out.len()];
            ops::swiglu(compute.isa(), out, gate_up, f);
        });
    }
}

impl<R: Real> Layer<R> {
    /// The frozen map and, on the rows that have one, the adapter.
    fn map(
        &self,
        compute: &Compute,
        (layer_idx, fused): (usize, Fused),
        adapters: &Adapters<'_, R>,
        y: &mut [R],
        x: &[R],
        hidden: &mut [Vec<R>; 4],
        words: &mut Vec<u32>,
    ) {
        let linear = self.fused(fused);
        linear.forward(compute, y, x, words);
        for (rows, lora) in adapters {
            let group = lora.group(layer_idx, fused);
            let hidden = &mut hidden[fused as usize];
            size(hidden, rows.len() * group.width());
            let y = &mut y[rows.start * linear.n_out..rows.end * linear.n_out];
            group.forward(
                compute,
                y,
                hidden,
                &x[rows.start * linear.n_in..rows.end * linear.n_in],
            );
        }
    }
}

/// `x += delta` by rows.
pub(crate) fn add_rows<R: Real>(compute: &Compute, x: &mut [R], delta: &[R], d: usize) {
    let len = 4 * ROW_CHUNK * d;
    compute.pool().chunks_mut(x, len, |i, rows| {
        ops::add_assign(compute.isa(), rows, &delta[i * len..][..rows.len()]);
    });
}
