//! Products with a bf16 weight: `Y = X W^T` with f32 activations and f32 sums.
//!
//! Activations are rounded to bf16 once per product. On AVX-512 BF16 the inner loop is one
//! `vdpbf16ps` for 32 products; elsewhere the halves of a pair are widened and multiplied in
//! f32, so weights still stream at two bytes each. A row of `Y` is one chain over ascending
//! `k` pairs (on tile registers over groups of sixteen pairs) whatever the batch, so decode,
//! batches and prefill give the same bits.

use crate::huge::{Piece, WEIGHTS};
use crate::isa::Level;
use crate::ops::round_to_bf16_pairs;
use crate::par::Parts;
use crate::{Compute, Isa};
use half::bf16;

mod adapted;
#[cfg(target_arch = "x86_64")]
mod amx;
mod outer;

pub use adapted::{Pairs, Tail, Thin, thin};
pub use outer::{Outer, add_outer, add_stacked, stack, stack_rows};

/// Columns of a panel of [`stack`] for the left operand of [`add_stacked`].
pub const STACK_PANEL: usize = 48;
/// The same for the right one.
pub const WIDE_PANEL: usize = 64;

/// Rows of `W` side by side in one panel: three vectors of sixteen lanes.
const PANEL: usize = 48;
/// Words of `X` that a task takes at most, 768 KB: as many rows as L2 holds beside a panel, since each task
/// reads its panel from memory.
const X_WORDS: usize = 192 << 10;
/// Pairs of `k` that a task sums before it goes on: keeps a panel's piece within L2.
const PAIRS: usize = 1024;

/// A weight matrix `W [n, k]` in bf16, laid out for streaming.
///
/// Layout: panels of 48 rows of `W`; in a panel, for each pair of columns, 48 words that hold
/// the two bf16 of a row (the even column in the low half). Padded with zeros.
#[derive(Debug)]
pub struct PackedBf16 {
    panels: Piece<u32>,
    n: usize,
    k: usize,
}

impl Clone for PackedBf16 {
    fn clone(&self) -> Self {
        let panels = WEIGHTS.copy(&self.panels);
        Self { panels, ..*self }
    }
}

impl PackedBf16 {
    /// Packs a `W [n, k]` given by rows: `row(i, out)` writes row `i` into `out [k]`.
    ///
    /// Rows are asked for in ascending order, so that a caller can stream them.
    pub fn pack_rows(n: usize, k: usize, mut row: impl FnMut(usize, &mut [f32])) -> Self {
        let pairs = k.div_ceil(2);
        let mut panels: Piece<u32> = WEIGHTS.zeroed(n.div_ceil(PANEL) * PANEL * pairs);
        let mut values = vec![0.0f32; k];
        for i in 0..n {
            row(i, &mut values);
            let panel = &mut panels[i / PANEL * PANEL * pairs..];
            for (p, pair) in values.chunks(2).enumerate() {
                let low = bf16::from_f32(pair[0]).to_bits();
                let high = pair.get(1).map_or(0, |&x| bf16::from_f32(x).to_bits());
                panel[p * PANEL + i % PANEL] = u32::from(low) | u32::from(high) << 16;
            }
        }
        Self { panels, n, k }
    }

    /// The transpose, `W^T [k, n]`: the oracle of [`PackedBf16::matmul_back`].
    #[cfg(test)]
    fn transpose(&self) -> Self {
        let pairs = self.n.div_ceil(2);
        let mut panels: Piece<u32> = WEIGHTS.zeroed(self.k.div_ceil(PANEL) * PANEL * pairs);
        let mut values = vec![0.0f32; self.k];
        for i in 0..self.n {
            self.row(&mut values, i);
            for (j, &value) in values.iter().enumerate() {
                let bits = u32::from(bf16::from_f32(value).to_bits()) << (16 * (i % 2));
                panels[(j / PANEL * pairs + i / 2) * PANEL + j % PANEL] |= bits;
            }
        }
        Self {
            panels,
            n: self.k,
            k: self.n,
        }
    }

    /// Rows of `W`: outputs of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of `W`: inputs of the product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.panels.len() * 4
    }

    /// Copies row `i` of `W` into `out [k]` (exact: bf16 widens to f32).
    pub fn row(&self, out: &mut [f32], i: usize) {
        assert!(i < self.n && out.len() == self.k, "the row exists and fits");
        let panel = &self.panels[i / PANEL * PANEL * self.k.div_ceil(2)..];
        for (j, x) in out.iter_mut().enumerate() {
            let word = panel[j / 2 * PANEL + i % PANEL];
            *x = f32::from_bits(if j % 2 == 0 {
                word << 16
            } else {
                word & 0xffff_0000
            });
        }
    }

    /// `Y [m, n] = X [m, k] W^T`. `scratch` keeps the rounded activations between calls.
    ///
    /// Panics if `y` or `x` has another length.
    pub fn matmul(
        &self,
        compute: &Compute,
        y: &mut [f32],
        x: &[f32],
        m: usize,
        scratch: &mut Vec<u32>,
    ) {
        assert_eq!(x.len(), m * self.k, "X is [m, k]");
        round_rows(compute, scratch, x, self.k);
        self.matmul_rounded(compute, y, scratch, m);
    }

    /// As [`PackedBf16::matmul`], with activations that are already rounded to pairs.
    pub fn matmul_rounded(&self, compute: &Compute, y: &mut [f32], x: &[u32], m: usize) {
        self.matmul_pairs(compute, y, Pairs::new(x, self.k.div_ceil(2)), m, None);
    }

    /// `Y [m, n] = X W^T + H E^T`: the chains of the rounded `X` go on over the columns of the
    /// rounded `H`, whose weight is a [`Tail`].
    ///
    /// Panics if an operand has another size.
    pub fn matmul_pairs(
        &self,
        compute: &Compute,
        y: &mut [f32],
        x: Pairs<'_>,
        m: usize,
        tail: Option<(&Tail, Pairs<'_>)>,
    ) {
        let pairs = self.k.div_ceil(2);
        x.check(m, pairs);
        assert_eq!(y.len(), m * self.n, "Y is [m, n]");
        if let Some((tail, h)) = tail {
            tail.check(self.n, h, m);
        }
        if m == 0 || self.n == 0 {
            return;
        }
        let n_panels = self.n.div_ceil(PANEL);
        let y = Parts::new(y);
        // As many pieces as it takes, of like size.
        let most = (X_WORDS / pairs.max(1)).max(64);
        let rows = m.div_ceil(m.div_ceil(most)).next_multiple_of(16);
        compute.pool().run(n_panels * m.div_ceil(rows), |task| {
            let (panel_idx, first_row) = (task % n_panels, task / n_panels * rows);
            let panel = &self.panels[panel_idx * PANEL * pairs..][..PANEL * pairs];
            let first_col = panel_idx * PANEL;
            let part = Part {
                rows: first_row..m.min(first_row + rows),
                first_col,
                n_cols: PANEL.min(self.n - first_col),
                y_stride: self.n,
            };
            let mut at = 0;
            while at < pairs || at == 0 {
                let len = PAIRS.min(pairs - at);
                // SAFETY: Y holds [m, n] (checked above); a task writes its part only, which no
                // other task does.
                unsafe {
                    part.add(
                        compute.isa(),
                        &y,
                        x.skip(at),
                        &panel[at * PANEL..],
                        len,
                        at > 0,
                    )
                };
                at += len.max(1);
            }
            if let Some((tail, h)) = tail {
                // SAFETY: as above.
                unsafe { tail.add(compute.isa(), &y, &part, h) };
            }
        });
    }
}

/// Rounds rows of `k` numbers to pairs, `ceil(k / 2)` words each.
pub fn round_rows(compute: &Compute, out: &mut Vec<u32>, x: &[f32], k: usize) {
    let (pairs, m) = (k.div_ceil(2), x.len() / k.max(1));
    out.resize(m * pairs, 0);
    compute
        .pool()
        .chunks_mut(out, 16 * pairs.max(1), |i, words| {
            for (r, words) in words.chunks_exact_mut(pairs).enumerate() {
                let x = &x[(i * 16 + r) * k..][..k];
                round_to_bf16_pairs(compute.isa(), words, x);
            }
        });
}

/// The part of `Y` that one task computes.
struct Part {
    rows: std::ops::Range<usize>,
    first_col: usize,
    n_cols: usize,
    y_stride: usize,
}

impl Part {
    /// The part `(+)= X panel^T` over `n_pairs` pairs.
    ///
    /// # Safety
    /// `y` holds the part, and no other thread touches that meanwhile.
    unsafe fn add(
        &self,
        isa: Isa,
        y: &Parts<f32>,
        x: Pairs<'_>,
        panel: &[u32],
        n_pairs: usize,
        go_on: bool,
    ) {
        let block = Block {
            x: x.rows_from(self.rows.start),
            x_stride: x.stride,
            x_step: 1,
            panel: &panel[..n_pairs * PANEL],
            w_stride: PANEL,
            y_stride: self.y_stride,
            n_rows: self.rows.len(),
            n_cols: self.n_cols,
            n_pairs,
            go_on,
        };
        // SAFETY: the caller vouches for the part of Y; `Pairs::check` was called for X.
        unsafe { block.run(isa, y.at(self.rows.start * self.y_stride + self.first_col)) };
    }
}

/// One task: some rows of `X` against one panel, over a run of pairs.
pub(crate) struct Block<'a> {
    pub(crate) x: &'a [u32],
    /// Words from a row of `X` to the next, and from a pair to the next.
    pub(crate) x_stride: usize,
    pub(crate) x_step: usize,
    /// Whole vectors of sixteen are read: a row of the panel goes on to the next multiple.
    pub(crate) panel: &'a [u32],
    /// Words from a pair of the panel to the next.
    pub(crate) w_stride: usize,
    pub(crate) y_stride: usize,
    pub(crate) n_rows: usize,
    /// At most 64.
    pub(crate) n_cols: usize,
    pub(crate) n_pairs: usize,
    /// The sums start from what `Y` holds.
    pub(crate) go_on: bool,
}

impl Block<'_> {
    /// # Safety
    /// `y` points to a block of `[n_rows, n_cols]`, rows `y_stride` apart, that nobody else
    /// touches meanwhile; `x` and `panel` hold what the sizes say.
    pub(crate) unsafe fn run(&self, isa: Isa, y: *mut f32) {
        match isa.0 {
            // SAFETY: the caller vouches for Y.
            Level::Scalar => unsafe { self.scalar(y) },
            // SAFETY: the level was detected; the caller vouches for the rest.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vnni => unsafe { x86::avx2(self, y) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => unsafe { x86::avx512_bf16(self, y) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Amx => unsafe { amx::run(self, y) },
        }
    }

    /// The oracle of the widening levels, to the bit; `vdpbf16ps` rounds differently.
    ///
    /// # Safety
    /// As [`Block::run`].
    unsafe fn scalar(&self, y: *mut f32) {
        for i in 0..self.n_rows {
            for j in 0..self.n_cols {
                // SAFETY: element (i, j) of the block, which the caller vouches for.
                let y = unsafe { &mut *y.add(i * self.y_stride + j) };
                let mut sum = if self.go_on { *y } else { 0.0 };
                for p in 0..self.n_pairs {
                    let x = self.x[i * self.x_stride + p * self.x_step];
                    let w = self.panel[p * self.w_stride + j];
                    sum = high(x).mul_add(high(w), sum);
                    sum = low(x).mul_add(low(w), sum);
                }
                *y = sum;
            }
        }
    }
}

fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::as_bf16;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Block;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512 with BF16; the block's slices hold what its sizes say.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn avx512_bf16(block: &Block<'_>, y: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe {
            match block.n_cols.div_ceil(16) {
                1 => rows512::<8, 1>(block, y),
                2 => rows512::<8, 2>(block, y),
                3 => rows512::<8, 3>(block, y),
                _ => rows512::<6, 4>(block, y),
            }
        }
    }

    /// # Safety
    /// At most `16 NV` columns; as [`avx512_bf16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn rows512<const MR: usize, const NV: usize>(block: &Block<'_>, y: *mut f32) {
        let mut i = 0;
        while i + MR <= block.n_rows {
            // SAFETY: rows i..i+MR exist.
            unsafe { tile512::<MR, NV>(block, y, i) };
            i += MR;
        }
        // SAFETY: the rows that are left exist.
        unsafe {
            match block.n_rows - i {
                1 => tile512::<1, NV>(block, y, i),
                2 => tile512::<2, NV>(block, y, i),
                3 => tile512::<3, NV>(block, y, i),
                4 => tile512::<4, NV>(block, y, i),
                5 => tile512::<5, NV>(block, y, i),
                6 => tile512::<6, NV>(block, y, i),
                7 => tile512::<7, NV>(block, y, i),
                _ => {}
            }
        }
    }

    /// Eight rows by three vectors, or six by four, fill 24 of the 32 registers with sums.
    ///
    /// # Safety
    /// Rows `i..i + MR` exist; as [`rows512`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn tile512<const MR: usize, const NV: usize>(block: &Block<'_>, y: *mut f32, i: usize) {
        let mask: [__mmask16; NV] = std::array::from_fn(|v| {
            let lanes = block.n_cols.saturating_sub(16 * v);
            if lanes >= 16 { !0 } else { (1 << lanes) - 1 }
        });
        // SAFETY: the panel holds n_pairs rows of whole vectors, X holds n_pairs words of each row,
        // and masked lanes of Y are never touched.
        unsafe {
            let y = y.add(i * block.y_stride);
            let mut x = block.x.as_ptr().add(i * block.x_stride).cast::<i32>();
            let mut acc = [[_mm512_setzero_ps(); NV]; MR];
            if block.go_on {
                for r in 0..MR {
                    for v in 0..NV {
                        acc[r][v] = _mm512_maskz_loadu_ps(
                            mask[v],
                            y.wrapping_add(r * block.y_stride + 16 * v),
                        );
                    }
                }
            }
            let mut w = block.panel.as_ptr().cast::<i32>();
            for _ in 0..block.n_pairs {
                let mut words = [as_bf16(_mm512_setzero_si512()); NV];
                for v in 0..NV {
                    words[v] = as_bf16(_mm512_loadu_epi32(w.add(16 * v)));
                    if MR <= 2 {
                        // Few rows stream the weights: ask for them ahead of the hardware.
                        let ahead = w.wrapping_add(block.w_stride * 24 + 16 * v);
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                }
                for r in 0..MR {
                    let x = as_bf16(_mm512_set1_epi32(*x.add(r * block.x_stride)));
                    for v in 0..NV {
                        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, words[v]);
                    }
                }
                x = x.wrapping_add(block.x_step);
                w = w.wrapping_add(block.w_stride);
            }
            for r in 0..MR {
                for v in 0..NV {
                    _mm512_mask_storeu_ps(
                        y.wrapping_add(r * block.y_stride + 16 * v),
                        mask[v],
                        acc[r][v],
                    );
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(crate) fn as_bf16(words: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes without invalid values.
        unsafe { std::mem::transmute(words) }
    }

    /// # Safety
    /// The CPU has AVX2 and FMA; the block's slices hold what its sizes say.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(block: &Block<'_>, y: *mut f32) {
        for group in 0..block.n_cols.div_ceil(16) {
            let mut i = 0;
            // SAFETY: rows i.. and the group's sixteen lanes of the panel exist.
            unsafe {
                while i + 4 <= block.n_rows {
                    tile256::<4>(block, y, i, group);
                    i += 4;
                }
                match block.n_rows - i {
                    1 => tile256::<1>(block, y, i, group),
                    2 => tile256::<2>(block, y, i, group),
                    3 => tile256::<3>(block, y, i, group),
                    _ => {}
                }
            }
        }
    }

    /// # Safety
    /// Rows `i..i + MR` and the sixteen words of `group` exist in the panel; as [`avx2`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile256<const MR: usize>(block: &Block<'_>, y: *mut f32, i: usize, group: usize) {
        let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let left = block.n_cols.saturating_sub(16 * group) as i32;
        let mask = [
            _mm256_cmpgt_epi32(_mm256_set1_epi32(left), index),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(left - 8), index),
        ];
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        // SAFETY: as `tile512`.
        unsafe {
            let y = y.wrapping_add(i * block.y_stride + 16 * group);
            let x = block.x.as_ptr().add(i * block.x_stride);
            let mut acc = [[_mm256_setzero_ps(); 2]; MR];
            if block.go_on {
                for r in 0..MR {
                    for v in 0..2 {
                        acc[r][v] =
                            _mm256_maskload_ps(y.wrapping_add(r * block.y_stride + 8 * v), mask[v]);
                    }
                }
            }
            let mut w = block.panel.as_ptr().add(16 * group).cast::<__m256i>();
            for p in 0..block.n_pairs {
                let words = [_mm256_loadu_si256(w), _mm256_loadu_si256(w.add(1))];
                let odd = words.map(|v| _mm256_castsi256_ps(_mm256_and_si256(v, high)));
                let even = words.map(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)));
                for r in 0..MR {
                    // Widened as vectors: taken apart as words, each half would cross from the
                    // integer registers.
                    let pair = *x.add(r * block.x_stride + p * block.x_step);
                    let pair = _mm256_set1_epi32(pair.cast_signed());
                    let x_odd = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
                    let x_even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pair));
                    for v in 0..2 {
                        acc[r][v] = _mm256_fmadd_ps(x_odd, odd[v], acc[r][v]);
                        acc[r][v] = _mm256_fmadd_ps(x_even, even[v], acc[r][v]);
                    }
                }
                w = w.wrapping_byte_add(4 * block.w_stride);
            }
            for r in 0..MR {
                for v in 0..2 {
                    _mm256_maskstore_ps(
                        y.wrapping_add(r * block.y_stride + 8 * v),
                        mask[v],
                        acc[r][v],
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::unit as numbers;

    fn pack(w: &[f32], n: usize, k: usize) -> PackedBf16 {
        PackedBf16::pack_rows(n, k, |i, out| out.copy_from_slice(&w[i * k..][..k]))
    }

    #[test]
    fn levels_agree_with_f64_and_widening_levels_to_the_bit() {
        for &(m, n, k) in &[
            (1, 48, 64),
            (5, 49, 33),
            (9, 1, 7),
            (17, 100, 2050),
            (300, 50, 4),
        ] {
            let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
            let packed = pack(&w, n, k);
            let mut oracle = vec![0.0; m * n];
            packed.matmul(
                &Compute::with_isa(1, Isa::SCALAR),
                &mut oracle,
                &x,
                m,
                &mut Vec::new(),
            );
            for isa in Isa::available() {
                let mut got = vec![0.0; m * n];
                packed.matmul(&Compute::with_isa(2, isa), &mut got, &x, m, &mut Vec::new());
                if isa.0 < Level::Avx512Bf16 {
                    assert_eq!(got, oracle, "{} {m}x{n}x{k}", isa.name());
                }
                for i in 0..m {
                    for j in 0..n {
                        let round = |v: f32| f64::from(bf16::from_f32(v).to_f32());
                        let want: f64 = (0..k)
                            .map(|p| round(x[i * k + p]) * round(w[j * k + p]))
                            .sum();
                        let error = (f64::from(got[i * n + j]) - want).abs();
                        assert!(
                            error < 1e-5 * (k as f64).sqrt(),
                            "{} {m}x{n}x{k} [{i},{j}] {error:e}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_batch_or_threads() {
        let (m, n, k) = (37, 97, 2100);
        let (x, w) = (numbers(m * k, 3), numbers(n * k, 4));
        let packed = pack(&w, n, k);
        for isa in Isa::available() {
            let mut all = vec![0.0; m * n];
            packed.matmul(&Compute::with_isa(1, isa), &mut all, &x, m, &mut Vec::new());
            for size in [1, 2, 3, 5, 7, 8, 20] {
                let compute = Compute::with_isa(2, isa);
                for first in (0..m - size).step_by(6) {
                    let mut part = vec![0.0; size * n];
                    packed.matmul(
                        &compute,
                        &mut part,
                        &x[first * k..][..size * k],
                        size,
                        &mut Vec::new(),
                    );
                    assert_eq!(
                        part,
                        all[first * n..][..size * n],
                        "{} {size} rows at {first}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn rows_and_transpose_read_back() {
        let (n, k) = (53, 31);
        let w = numbers(n * k, 5);
        let packed = pack(&w, n, k);
        let transposed = packed.transpose();
        let (mut row, mut column) = (vec![0.0; k], vec![0.0; n]);
        for i in 0..n {
            packed.row(&mut row, i);
            for j in 0..k {
                assert_eq!(row[j], bf16::from_f32(w[i * k + j]).to_f32());
                transposed.row(&mut column, j);
                assert_eq!(column[i], row[j]);
            }
        }
    }
}
