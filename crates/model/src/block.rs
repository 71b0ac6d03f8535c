//! What the passes of training and inference share.

use crate::rope::RopeTable;
use crate::weights::Model;
use bantam_kernels::{Compute, Real, ops};

/// Rows that one task of a row operation takes.
pub(crate) const ROW_CHUNK: usize = 16;

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
}

/// `x += delta` by rows.
pub(crate) fn add_rows<R: Real>(compute: &Compute, x: &mut [R], delta: &[R], d: usize) {
    let len = 4 * ROW_CHUNK * d;
    compute.pool().chunks_mut(x, len, |i, rows| {
        ops::add_assign(compute.isa(), rows, &delta[i * len..][..rows.len()]);
    });
}
