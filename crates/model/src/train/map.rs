//! One linear map of a layer in training: the frozen weight, its adapters and the gradients.
//!
//! With bf16 weights every product of the map runs on bf16 operands and sums in f32: inputs and
//! output gradients are rounded once, and the frozen product, the adapters' and the weight
//! gradients all read them. The adapters' share of an output is a few more columns of the frozen
//! product. In full precision each product is a plain one.

use crate::linear::Linear;
use crate::lora::{Fused, Group, Lora};
use bantam_kernels::bf16::{self, Outer, PackedBf16, Pairs, STACK_PANEL, Tail, Thin, WIDE_PANEL};
use bantam_kernels::gemm::{Call, Dims, View, Write};
use bantam_kernels::{Compute, Real};

/// Rows that one task of a row operation takes.
const CHUNK: usize = 8;

/// Activations or gradients `[T, n]`: as they are, or rounded to pairs of bf16, or both.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows<R> {
    pub(super) plain: Vec<R>,
    pub(super) words: Vec<u32>,
}

impl<R: Real> Rows<R> {
    /// Makes `[t, n]` by chunks: `fill(first row, rows)`. Only what the products read is kept:
    /// the rounded rows if `rounded`, else the plain ones.
    pub(super) fn make(
        &mut self,
        compute: &Compute,
        (t, n): (usize, usize),
        rounded: bool,
        fill: impl Fn(usize, &mut [R]) + Sync,
    ) {
        if rounded {
            self.words.resize(t * n / 2, 0);
            compute
                .pool()
                .chunks_mut(&mut self.words, CHUNK * n / 2, |i, words| {
                    let mut rows = vec![R::ZERO; 2 * words.len()];
                    fill(i * CHUNK, &mut rows);
                    round(compute, words, &rows, n);
                });
        } else {
            self.plain.resize(t * n, R::ZERO);
            compute
                .pool()
                .chunks_mut(&mut self.plain, CHUNK * n, |i, rows| fill(i * CHUNK, rows));
        }
    }
}

/// Works on rows in place, by chunks, and leaves them rounded in `words` too if `rounded`.
pub(super) fn in_place<R: Real>(
    compute: &Compute,
    rows: &mut [R],
    n: usize,
    words: &mut Vec<u32>,
    rounded: bool,
    work: impl Fn(usize, &mut [R]) + Sync,
) {
    if rounded {
        words.resize(rows.len() / 2, 0);
        let both = ((rows, CHUNK * n), (words.as_mut_slice(), CHUNK * n / 2));
        compute
            .pool()
            .chunks_mut2(both.0, both.1, |i, rows, words| {
                work(i * CHUNK, rows);
                round(compute, words, rows, n);
            });
    } else {
        compute
            .pool()
            .chunks_mut(rows, CHUNK * n, |i, rows| work(i * CHUNK, rows));
    }
}

fn round<R: Real>(compute: &Compute, words: &mut [u32], rows: &[R], n: usize) {
    let rows = R::as_f32(rows).expect("only f32 is rounded");
    for (words, row) in words.chunks_exact_mut(n / 2).zip(rows.chunks_exact(n)) {
        bantam_kernels::ops::round_to_bf16_pairs(compute.isa(), words, row);
    }
}

/// Rows that a product reads: one of the two is empty.
#[derive(Clone, Copy)]
pub(super) struct In<'a, R> {
    pub(super) plain: &'a [R],
    pub(super) words: &'a [u32],
}

impl<'a, R> In<'a, R> {
    pub(super) fn new(plain: &'a [R], words: &'a [u32]) -> Self {
        Self { plain, words }
    }
}

impl<'a, R> From<&'a Rows<R>> for In<'a, R> {
    fn from(rows: &'a Rows<R>) -> Self {
        Self::new(&rows.plain, &rows.words)
    }
}

/// The adapters of one fused map as its bf16 products read them. `B` is scaled by `alpha / R`.
#[derive(Clone, Debug)]
pub(super) struct PackedGroup {
    /// `A [P R, n_in]`
    a: PackedBf16,
    /// Each part's `B^T [R, n_out]`
    b: Vec<PackedBf16>,
    /// `B` behind the columns of `W`.
    b_tail: Tail,
    /// `A^T` behind the columns of `W^T`.
    a_tail: Tail,
}

impl Default for PackedGroup {
    fn default() -> Self {
        Self {
            a: empty(),
            b: Vec::new(),
            b_tail: Tail::default(),
            a_tail: Tail::default(),
        }
    }
}

fn empty() -> PackedBf16 {
    PackedBf16::pack_rows(0, 0, |_, _| {})
}

impl PackedGroup {
    /// Packs what `params` hold now.
    fn pack<R: Real>(&mut self, group: &Group<R>, params: &[R]) {
        let Some(params) = R::as_f32(params) else {
            return;
        };
        let (rank, n_in, width) = (group.rank, group.n_in, group.width());
        let (a, scale) = (&params[group.a.clone()], group.scale.to_f64() as f32);
        self.a.repack(width, n_in, |i, j| a[i * n_in + j]);
        self.a_tail
            .pack(n_in, width, &[(0..n_in, 0..width)], |i, j| a[j * n_in + i]);
        self.b.resize_with(group.parts.len(), empty);
        let mut blocks = Vec::new();
        for (i, (part, packed)) in group.parts.iter().zip(&mut self.b).enumerate() {
            let b = &params[part.b.clone()];
            packed.repack(rank, part.n_out, |r, j| scale * b[j * rank + r]);
            let outputs = part.out_start..part.out_start + part.n_out;
            blocks.push((outputs, i * rank..(i + 1) * rank));
        }
        let value = |row: usize, col: usize| {
            let part = &group.parts[col / rank];
            scale * params[part.b.start + (row - part.out_start) * rank + col % rank]
        };
        let n_out = group.n_out;
        self.b_tail.pack(n_out, width, &blocks, value);
    }
}

/// Packs every adapter of `lora`, by layers.
pub(super) fn pack_adapters<R: Real>(
    compute: &Compute,
    packed: &mut Vec<[PackedGroup; 4]>,
    lora: &Lora<R>,
    n_layers: usize,
) {
    packed.resize_with(n_layers, Default::default);
    compute.pool().chunks_mut(packed, 1, |layer, groups| {
        for (fused, packed) in Fused::ALL.into_iter().zip(&mut groups[0]) {
            packed.pack(lora.group(layer, fused), &lora.params);
        }
    });
}

/// Where the gradients of a map's own weight and bias begin in the flat gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) weight: usize,
    pub(super) bias: Option<usize>,
}

/// A map with what is trained of it.
pub(super) struct Map<'a, R> {
    pub(super) linear: &'a Linear<R>,
    /// The adapters and the flat vector that holds them.
    pub(super) group: Option<(&'a Group<R>, &'a [R])>,
    /// Where products are bf16: the same, packed.
    pub(super) packed: Option<&'a PackedGroup>,
    /// Where the weight itself is trained.
    pub(super) place: Option<Place>,
    pub(super) rounded: bool,
}

/// Buffers of [`Map::backward`].
#[derive(Clone, Debug, Default)]
pub(super) struct MapWork<R> {
    words: Vec<u32>,
    d_hidden: Rows<R>,
    stacked: [Vec<u32>; 4],
}

impl<R: Real> Map<'_, R> {
    /// The adapters, where there are any.
    fn group(&self) -> Option<(&Group<R>, &[R])> {
        self.group.filter(|(group, _)| group.width() > 0)
    }

    /// `y [T, n_out] = x W^T + b + s h B^T` with `h = x A^T`, which is kept.
    pub(super) fn forward(
        &self,
        compute: &Compute,
        y: &mut [R],
        x: In<'_, R>,
        hidden: &mut Rows<R>,
        work: &mut MapWork<R>,
    ) {
        let t = y.len() / self.linear.n_out;
        if self.rounded {
            self.hidden(compute, t, x, hidden);
            let tail = self.tail(|packed| &packed.b_tail, &hidden.words);
            let (w, x) = (self.weight(), Pairs::new(x.words, self.linear.n_in / 2));
            w.matmul_pairs(compute, f32s(y), x, t, tail);
            self.linear.add_bias(compute, y);
        } else {
            self.linear.forward(compute, y, x.plain, &mut work.words);
            if let Some((group, _)) = self.group() {
                hidden.plain.resize(t * group.width(), R::ZERO);
                group.forward(compute, y, &mut hidden.plain, x.plain);
            }
        }
    }

    /// Only `h = x A^T`, where the output is not needed again.
    pub(super) fn hidden(&self, compute: &Compute, t: usize, x: In<'_, R>, hidden: &mut Rows<R>) {
        let Some((group, _)) = self.group() else {
            return;
        };
        if let Some(packed) = self.packed {
            let (x, w) = (Pairs::new(x.words, self.linear.n_in / 2), &packed.a);
            hidden.words.resize(t * group.width() / 2, 0);
            bf16::thin(
                compute,
                &mut hidden.words,
                group.width(),
                &[Thin { x, w, col: 0 }],
            );
        } else {
            hidden.plain.resize(t * group.width(), R::ZERO);
            group.hidden(compute, &mut hidden.plain, x.plain);
        }
    }

    /// Adds the gradients of what is trained to the flat `d_params`; the input gradient goes to
    /// `dx [T, n_in]` where that is given.
    pub(super) fn backward(
        &self,
        compute: &Compute,
        d_params: &mut [R],
        mut dx: Option<&mut [R]>,
        dy: In<'_, R>,
        x: In<'_, R>,
        hidden: &Rows<R>,
        work: &mut MapWork<R>,
    ) {
        if self.rounded {
            return self.backward_rounded(compute, d_params, dx, dy, x, hidden, work);
        }
        if let Some(dx) = &mut dx {
            self.linear
                .input_grad(compute, dx, dy.plain, &mut work.words);
        }
        let Linear { n_in, n_out, .. } = *self.linear;
        if let Some((group, params)) = self.group() {
            let (params, d_hidden) = ((params, &mut *d_params), &mut work.d_hidden.plain);
            group.backward(
                compute,
                params,
                dx,
                dy.plain,
                (&hidden.plain, d_hidden),
                x.plain,
            );
        }
        if let Some(place) = self.place {
            let dims = Dims {
                m: n_out,
                n: n_in,
                k: dy.plain.len() / n_out,
            };
            let (dy_t, x) = (View::transposed(dy.plain, n_out), (x.plain, n_in));
            Call::new(dy_t, x, n_in, dims, Write::AddScaled(R::ONE))
                .run_parallel(compute, &mut d_params[place.weight..][..n_out * n_in]);
            self.bias_grad(compute, d_params, dy.plain);
        }
    }

    fn backward_rounded(
        &self,
        compute: &Compute,
        d_params: &mut [R],
        dx: Option<&mut [R]>,
        dy: In<'_, R>,
        x: In<'_, R>,
        hidden: &Rows<R>,
        work: &mut MapWork<R>,
    ) {
        let Linear { n_in, n_out, .. } = *self.linear;
        let t = dy.words.len() / (n_out / 2);
        let dy_rows = Pairs::new(dy.words, n_out / 2);
        let mut jobs = Vec::new();
        let base = Outer {
            u: &[],
            u_stride: 0,
            v: x.words,
            v_stride: n_in / 2,
            t,
            m: 0,
            n: n_in,
            at: 0,
            strides: (n_in, 1),
            alpha: 1.0,
        };
        let MapWork {
            d_hidden, stacked, ..
        } = work;
        let [up, down, whole, across] = stacked;
        if let (Some((group, _)), Some(packed)) = (self.group(), self.packed) {
            let (rank, width) = (group.rank, group.width());
            let thin = |(i, w): (usize, _)| {
                let x = dy_rows.skip(group.parts[i].out_start / 2);
                Thin {
                    x,
                    w,
                    col: i * rank,
                }
            };
            let parts: Vec<_> = packed.b.iter().enumerate().map(thin).collect();
            d_hidden.words.resize(t * width / 2, 0);
            bf16::thin(compute, &mut d_hidden.words, width, &parts);
            for (out, words) in [(&mut *up, &hidden.words), (&mut *down, &d_hidden.words)] {
                bf16::stack(compute, out, Pairs::new(words, width / 2), t, width, width);
            }
            jobs.push(Outer {
                u: down,
                u_stride: width,
                m: width,
                at: group.a.start,
                ..base
            });
            for (i, part) in group.parts.iter().enumerate() {
                jobs.push(Outer {
                    u: &up[(i * rank).min(up.len())..],
                    u_stride: width,
                    v: &dy.words[(part.out_start / 2).min(dy.words.len())..],
                    v_stride: n_out / 2,
                    m: rank,
                    n: part.n_out,
                    at: part.b.start,
                    strides: (1, rank),
                    alpha: group.scale.to_f64() as f32,
                    ..base
                });
            }
        }
        bf16::add_outer(compute, f32s(d_params), &jobs);
        if let Some(place) = self.place {
            let x_rows = Pairs::new(x.words, n_in / 2);
            bf16::stack(compute, whole, dy_rows, t, n_out, STACK_PANEL);
            bf16::stack(compute, across, x_rows, t, n_in, WIDE_PANEL);
            let d_weight = &mut f32s(d_params)[place.weight..][..n_out * n_in];
            bf16::add_stacked(compute, d_weight, (whole, n_out), (across, n_in), t);
            self.bias_grad(compute, d_params, dy.plain);
        }
        if let Some(dx) = dx {
            let tail = self.tail(|packed| &packed.a_tail, &work.d_hidden.words);
            self.weight()
                .matmul_back(compute, f32s(dx), dy_rows, t, tail);
        }
    }

    /// `db += sum_t dy_t`
    fn bias_grad(&self, compute: &Compute, d_params: &mut [R], dy: &[R]) {
        let Some(at) = self.place.and_then(|place| place.bias) else {
            return;
        };
        let n_out = self.linear.n_out;
        column_sums(compute, &mut d_params[at..][..n_out], |first, sums| {
            for dy in dy.chunks_exact(n_out) {
                sums.iter_mut()
                    .zip(&dy[first..])
                    .for_each(|(sum, &dy)| *sum += dy);
            }
        });
    }

    fn weight(&self) -> &PackedBf16 {
        self.linear
            .bf16()
            .expect("rounded products have bf16 weights")
    }

    fn tail<'b>(
        &'b self,
        which: impl Fn(&'b PackedGroup) -> &'b Tail,
        words: &'b [u32],
    ) -> Option<(&'b Tail, Pairs<'b>)> {
        let ((group, _), packed) = (self.group()?, self.packed?);
        Some((which(packed), Pairs::new(words, group.width() / 2)))
    }
}

/// Adds sums over rows to a vector, by pieces of columns: `add(first column, sums)`.
pub(super) fn column_sums<R: Real>(
    compute: &Compute,
    sums: &mut [R],
    add: impl Fn(usize, &mut [R]) + Sync,
) {
    const COLS: usize = 64;
    compute
        .pool()
        .chunks_mut(sums, COLS, |i, sums| add(i * COLS, sums));
}

pub(super) fn f32s<R: Real>(x: &mut [R]) -> &mut [f32] {
    R::as_f32_mut(x).expect("only f32 is rounded")
}
