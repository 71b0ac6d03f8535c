//! Dense products `C (+)= A B` in f32 (and f64, the oracle), without packing.
//!
//! `B` is read along its rows, `A` one number at a time, so `A` may have any strides: a
//! transposed `A` costs nothing. Each element of `C` is one chain of fused multiply-adds over
//! ascending `k`, whatever the shape of the tile that holds it; see the crate's "same bits".
//!
//! This is for the thin products of a step (LoRA, attention, weight gradients). The wide ones
//! have a weight on the right and go through [`crate::bf16::PackedBf16`] or [`PackedDense`].

use crate::isa::Level;
use crate::par::Parts;
use crate::{Compute, Isa, Real};

/// A matrix seen through strides: element (i, j) is `data[i * rows_apart + j * cols_apart]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, R> {
    data: &'a [R],
    rows_apart: usize,
    cols_apart: usize,
}

impl<'a, R> View<'a, R> {
    /// Row-major with `stride` elements from one row to the next.
    pub fn rows(data: &'a [R], stride: usize) -> Self {
        Self {
            data,
            rows_apart: stride,
            cols_apart: 1,
        }
    }

    /// The transpose of a row-major matrix with `stride` elements from row to row.
    pub fn transposed(data: &'a [R], stride: usize) -> Self {
        Self {
            data,
            rows_apart: 1,
            cols_apart: stride,
        }
    }
}

/// What happens to the old content of `C`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Write<R> {
    /// `C = A B`
    Set,
    /// The chains start from `C`: cutting `k` in pieces gives the bits of one long chain.
    Continue,
    /// `C = alpha * (A B) + C` with one rounding for the sum.
    AddScaled(R),
}

/// Sizes of a product: `C [m, n] (+)= A [m, k] B [k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows of `C` and `A`.
    pub m: usize,
    /// Columns of `C` and `B`.
    pub n: usize,
    /// Columns of `A`, rows of `B`.
    pub k: usize,
}

/// The operands of a product, bounds checked once.
#[derive(Debug)]
pub struct Call<'a, R> {
    a: View<'a, R>,
    b: &'a [R],
    b_stride: usize,
    c_stride: usize,
    dims: Dims,
    write: Write<R>,
}

impl<'a, R: Real> Call<'a, R> {
    /// `C [m, n], row stride c_stride (+)= A [m, k] B [k, n], row stride b_stride`.
    ///
    /// Panics if `A` or `B` is too short for `dims`; `C` is checked when the call runs.
    pub fn new(
        a: View<'a, R>,
        (b, b_stride): (&'a [R], usize),
        c_stride: usize,
        dims: Dims,
        write: Write<R>,
    ) -> Self {
        let Dims { m, n, k } = dims;
        if m > 0 && n > 0 && k > 0 {
            let a_last = (m - 1) * a.rows_apart + (k - 1) * a.cols_apart;
            assert!(a_last < a.data.len(), "A holds [m, k]");
            assert!((k - 1) * b_stride + n <= b.len(), "B holds [k, n]");
            assert!(c_stride >= n || m == 1, "the rows of C do not overlap");
        }
        Self {
            a,
            b,
            b_stride,
            c_stride,
            dims,
            write,
        }
    }

    /// The shortest slice that holds `C`.
    fn c_len(&self) -> usize {
        let Dims { m, n, .. } = self.dims;
        if m == 0 || n == 0 {
            0
        } else {
            (m - 1) * self.c_stride + n
        }
    }

    /// Runs on the calling thread. Panics if `c` is too short.
    pub fn run(&self, isa: Isa, c: &mut [R]) {
        assert!(self.c_len() <= c.len(), "C holds [m, n]");
        // SAFETY: C is long enough and borrowed for the call.
        unsafe { R::gemm_serial(isa, self, c.as_mut_ptr()) };
    }

    /// Runs on the pool. Panics if `c` is too short.
    pub fn run_parallel(&self, compute: &Compute, c: &mut [R]) {
        const ROWS: usize = 64;
        const COLS: usize = 192;
        assert!(self.c_len() <= c.len(), "C holds [m, n]");
        let Dims { m, n, k } = self.dims;
        if m * n * k < 32 * 1024 {
            return self.run(compute.isa(), c);
        }
        let (row_parts, col_parts) = (m.div_ceil(ROWS), n.div_ceil(COLS));
        let parts = Parts::new(c);
        compute.pool().run(row_parts * col_parts, |task| {
            let (i, j) = (task / col_parts * ROWS, task % col_parts * COLS);
            let dims = Dims {
                m: ROWS.min(m - i),
                n: COLS.min(n - j),
                k,
            };
            let a = View {
                data: &self.a.data[(i * self.a.rows_apart).min(self.a.data.len())..],
                ..self.a
            };
            let b = &self.b[j.min(self.b.len())..];
            let call = Call::new(a, (b, self.b_stride), self.c_stride, dims, self.write);
            // SAFETY: C is long enough for the whole product, and the tasks' blocks of rows and
            // columns do not overlap.
            unsafe { R::gemm_serial(compute.isa(), &call, parts.at(i * self.c_stride + j)) };
        });
    }
}

/// The scalar oracle of every level.
///
/// # Safety
/// `c` points to a block that holds `C` and that nobody else touches meanwhile.
pub(crate) unsafe fn serial_scalar<R: Real>(call: &Call<'_, R>, c: *mut R) {
    let Dims { m, n, k } = call.dims;
    for i in 0..m {
        for j in 0..n {
            // SAFETY: element (i, j) of C, which the caller vouches for.
            let old = unsafe { &mut *c.add(i * call.c_stride + j) };
            let mut sum = if call.write == Write::Continue {
                *old
            } else {
                R::ZERO
            };
            for p in 0..k {
                let a = call.a.data[i * call.a.rows_apart + p * call.a.cols_apart];
                sum = a.mul_add(call.b[p * call.b_stride + j], sum);
            }
            *old = match call.write {
                Write::AddScaled(alpha) => alpha.mul_add(sum, *old),
                Write::Set | Write::Continue => sum,
            };
        }
    }
}

/// # Safety
/// As [`serial_scalar`].
pub(crate) unsafe fn serial_f32(isa: Isa, call: &Call<'_, f32>, c: *mut f32) {
    match isa.0 {
        // SAFETY: the caller vouches for C.
        Level::Scalar => unsafe { serial_scalar(call, c) },
        // SAFETY: the level was detected, `Call::new` checked A and B, the caller vouches for C.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::avx2(call, c) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => unsafe {
            x86::avx512(call, c)
        },
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Call, Write};
    use std::arch::x86_64::*;

    /// Walks the rows of one column strip: full tiles of `mr` rows, then the rest.
    macro_rules! rows {
        ($call:ident, $c:ident, $j:ident, $cols:ident, $tile:ident<$mr:literal, $nv:literal>, [$($rest:literal)*]) => {{
            let m = $call.dims.m;
            let mut i = 0;
            while i + $mr <= m {
                // SAFETY: rows i..i+mr and the strip's columns lie in the checked bounds.
                unsafe { $tile::<$mr , $nv>($call, $c, i, $j, $cols) };
                i += $mr;
            }
            match m - i {
                // SAFETY: as above, with the rows that are left.
                $($rest => unsafe { $tile::<$rest , $nv>($call, $c, i, $j, $cols) },)*
                _ => {}
            }
        }};
    }

    /// # Safety
    /// The CPU has AVX-512 F; `call` and `c` are in bounds.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(call: &Call<'_, f32>, c: *mut f32) {
        let mut j = 0;
        while j < call.dims.n {
            let cols = 32.min(call.dims.n - j);
            // The products of an adapter are often 16 wide: one vector, not one and a masked one.
            if cols > 16 {
                rows!(call, c, j, cols, tile512<8, 2>, [1 2 3 4 5 6 7]);
            } else {
                rows!(call, c, j, cols, tile512<8, 1>, [1 2 3 4 5 6 7]);
            }
            j += 32;
        }
    }

    /// # Safety
    /// The CPU has AVX2 and FMA; `call` and `c` are in bounds.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(call: &Call<'_, f32>, c: *mut f32) {
        let mut j = 0;
        while j < call.dims.n {
            let cols = 16.min(call.dims.n - j);
            if cols > 8 {
                rows!(call, c, j, cols, tile256<4, 2>, [1 2 3]);
            } else {
                rows!(call, c, j, cols, tile256<4, 1>, [1 2 3]);
            }
            j += 16;
        }
    }

    /// # Safety
    /// Rows `i..i + MR`, columns `j..j + cols` (at most `16 NV`) exist; the CPU has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    unsafe fn tile512<const MR: usize, const NV: usize>(
        call: &Call<'_, f32>,
        c: *mut f32,
        i: usize,
        j: usize,
        cols: usize,
    ) {
        let mask: [__mmask16; NV] = std::array::from_fn(|v| lanes(cols.saturating_sub(16 * v)));
        let (rs, cs) = (call.a.rows_apart, call.a.cols_apart);
        // SAFETY: masked lanes are never touched, the rest is in bounds by the caller's promise.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); NV]; MR];
            let out = c.add(i * call.c_stride + j);
            if call.write == Write::Continue {
                for r in 0..MR {
                    for v in 0..NV {
                        acc[r][v] = _mm512_maskz_loadu_ps(
                            mask[v],
                            out.wrapping_add(r * call.c_stride + 16 * v),
                        );
                    }
                }
            }
            let a = call.a.data.as_ptr().add(i * rs);
            let mut b = call.b.as_ptr().wrapping_add(j);
            for p in 0..call.dims.k {
                let mut row = [_mm512_setzero_ps(); NV];
                for v in 0..NV {
                    row[v] = if cols == 16 * NV {
                        _mm512_loadu_ps(b.add(16 * v))
                    } else {
                        _mm512_maskz_loadu_ps(mask[v], b.wrapping_add(16 * v))
                    };
                }
                for r in 0..MR {
                    let x = _mm512_set1_ps(*a.add(r * rs + p * cs));
                    for v in 0..NV {
                        acc[r][v] = _mm512_fmadd_ps(x, row[v], acc[r][v]);
                    }
                }
                b = b.wrapping_add(call.b_stride);
            }
            for r in 0..MR {
                for v in 0..NV {
                    let at = out.wrapping_add(r * call.c_stride + 16 * v);
                    let value = match call.write {
                        Write::AddScaled(alpha) => {
                            let old = _mm512_maskz_loadu_ps(mask[v], at);
                            _mm512_fmadd_ps(_mm512_set1_ps(alpha), acc[r][v], old)
                        }
                        Write::Set | Write::Continue => acc[r][v],
                    };
                    _mm512_mask_storeu_ps(at, mask[v], value);
                }
            }
        }
    }

    /// The mask of the first `n` (at most 16) lanes.
    fn lanes(n: usize) -> __mmask16 {
        if n >= 16 { !0 } else { (1 << n) - 1 }
    }

    /// # Safety
    /// Rows `i..i + MR`, columns `j..j + cols` (at most 16) exist; the CPU has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile256<const MR: usize, const NV: usize>(
        call: &Call<'_, f32>,
        c: *mut f32,
        i: usize,
        j: usize,
        cols: usize,
    ) {
        let mut mask = [_mm256_setzero_si256(); NV];
        for v in 0..NV {
            mask[v] = lanes256(cols.saturating_sub(8 * v));
        }
        let (rs, cs) = (call.a.rows_apart, call.a.cols_apart);
        // SAFETY: masked lanes are never touched, the rest is in bounds by the caller's promise.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); NV]; MR];
            let out = c.add(i * call.c_stride + j);
            if call.write == Write::Continue {
                for r in 0..MR {
                    for v in 0..NV {
                        acc[r][v] = _mm256_maskload_ps(
                            out.wrapping_add(r * call.c_stride + 8 * v),
                            mask[v],
                        );
                    }
                }
            }
            let a = call.a.data.as_ptr().add(i * rs);
            let mut b = call.b.as_ptr().wrapping_add(j);
            for p in 0..call.dims.k {
                let mut row = [_mm256_setzero_ps(); NV];
                for v in 0..NV {
                    row[v] = if cols == 8 * NV {
                        _mm256_loadu_ps(b.add(8 * v))
                    } else {
                        _mm256_maskload_ps(b.wrapping_add(8 * v), mask[v])
                    };
                }
                for r in 0..MR {
                    let x = _mm256_set1_ps(*a.add(r * rs + p * cs));
                    for v in 0..NV {
                        acc[r][v] = _mm256_fmadd_ps(x, row[v], acc[r][v]);
                    }
                }
                b = b.wrapping_add(call.b_stride);
            }
            for r in 0..MR {
                for v in 0..NV {
                    let at = out.wrapping_add(r * call.c_stride + 8 * v);
                    let value = match call.write {
                        Write::AddScaled(alpha) => _mm256_fmadd_ps(
                            _mm256_set1_ps(alpha),
                            acc[r][v],
                            _mm256_maskload_ps(at, mask[v]),
                        ),
                        Write::Set | Write::Continue => acc[r][v],
                    };
                    _mm256_maskstore_ps(at, mask[v], value);
                }
            }
        }
    }

    /// The mask of the first `n` (at most 8) lanes.
    #[target_feature(enable = "avx2")]
    fn lanes256(n: usize) -> __m256i {
        let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), index)
    }
}

/// Columns of one panel of a [`PackedDense`].
const PANEL: usize = 32;

/// A weight matrix `W [n, k]` laid out for `Y = X W^T` in full precision.
///
/// Layout: panels of 32 rows of `W`, each `[k, 32]`, the last one padded with zeros.
#[derive(Clone, Debug)]
pub struct PackedDense<R> {
    panels: Vec<R>,
    n: usize,
    k: usize,
}

impl<R: Real> PackedDense<R> {
    /// Packs a row-major `W [n, k]`. Panics if `w` has another length.
    pub fn pack(w: &[R], n: usize, k: usize) -> Self {
        assert_eq!(w.len(), n * k, "W is [n, k]");
        let mut panels = vec![R::ZERO; n.div_ceil(PANEL) * PANEL * k];
        for (row, values) in w.chunks_exact(k.max(1)).enumerate() {
            let panel = &mut panels[row / PANEL * PANEL * k..];
            for (p, &value) in values.iter().enumerate() {
                panel[p * PANEL + row % PANEL] = value;
            }
        }
        Self { panels, n, k }
    }

    /// `Y [m, n] = X [m, k] W^T`, on the pool. Panics on wrong lengths.
    pub fn matmul(&self, compute: &Compute, y: &mut [R], x: &[R], m: usize) {
        const ROWS: usize = 64;
        assert_eq!(x.len(), m * self.k, "X is [m, k]");
        assert_eq!(y.len(), m * self.n, "Y is [m, n]");
        if m == 0 || self.n == 0 {
            return;
        }
        let n_panels = self.n.div_ceil(PANEL);
        let parts = Parts::new(y);
        compute.pool().run(n_panels * m.div_ceil(ROWS), |task| {
            let (panel_idx, i) = (task % n_panels, task / n_panels * ROWS);
            let panel = &self.panels[panel_idx * PANEL * self.k..][..PANEL * self.k];
            let j = panel_idx * PANEL;
            let dims = Dims {
                m: ROWS.min(m - i),
                n: PANEL.min(self.n - j),
                k: self.k,
            };
            let x = View::rows(&x[i * self.k..], self.k);
            let call = Call::new(x, (panel, PANEL), self.n, dims, Write::Set);
            // SAFETY: Y holds [m, n] (checked above); a task writes its own rows and columns.
            unsafe { R::gemm_serial(compute.isa(), &call, parts.at(i * self.n + j)) };
        });
    }

    /// Copies row `row` of `W` into `out [k]`.
    pub fn row(&self, out: &mut [R], row: usize) {
        assert!(
            row < self.n && out.len() == self.k,
            "the row exists and fits"
        );
        let panel = &self.panels[row / PANEL * PANEL * self.k..];
        for (p, x) in out.iter_mut().enumerate() {
            *x = panel[p * PANEL + row % PANEL];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::unit as numbers;

    #[test]
    fn every_level_equals_the_oracle_to_the_bit() {
        // Lengths around each tile size: one below, equal, one above, and several tiles.
        for &(m, n, k) in &[
            (1, 1, 1),
            (1, 32, 64),
            (3, 33, 5),
            (8, 16, 17),
            (9, 31, 2),
            (17, 65, 40),
            (70, 200, 33),
        ] {
            for transposed in [false, true] {
                for write in [Write::Set, Write::Continue, Write::AddScaled(0.7)] {
                    let (a, b, c0) = (
                        numbers(m * k, 1),
                        numbers(k * (n + 3), 2),
                        numbers(m * (n + 2), 3),
                    );
                    let view = if transposed {
                        View::transposed(&a, m)
                    } else {
                        View::rows(&a, k)
                    };
                    let call = Call::new(view, (&b, n + 3), n + 2, Dims { m, n, k }, write);
                    let mut want = c0.clone();
                    // SAFETY: `want` holds C.
                    unsafe { serial_scalar(&call, want.as_mut_ptr()) };
                    for isa in Isa::available() {
                        let mut got = c0.clone();
                        call.run(isa, &mut got);
                        assert_eq!(got, want, "{} {m}x{n}x{k}", isa.name());
                        for threads in [1, 2] {
                            let mut got = c0.clone();
                            call.run_parallel(&Compute::with_isa(threads, isa), &mut got);
                            assert_eq!(got, want, "{} {m}x{n}x{k} on {threads}", isa.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_cut_chain_equals_the_whole() {
        let (m, n, k) = (5, 40, 37);
        let (a, b) = (numbers(m * k, 4), numbers(k * n, 5));
        let whole_call = Call::new(View::rows(&a, k), (&b, n), n, Dims { m, n, k }, Write::Set);
        for isa in Isa::available() {
            let mut whole = vec![0.0; m * n];
            whole_call.run(isa, &mut whole);
            let mut cut = vec![0.0; m * n];
            for (at, len) in [(0, 16), (16, 16), (32, 5)] {
                let dims = Dims { m, n, k: len };
                let a = View::rows(&a[at..], k);
                Call::new(a, (&b[at * n..], n), n, dims, Write::Continue).run(isa, &mut cut);
            }
            assert_eq!(cut, whole, "{}", isa.name());
        }
    }

    #[test]
    fn a_packed_row_does_not_depend_on_its_batch() {
        let (m, n, k) = (67, 83, 41);
        let (x, w) = (numbers(m * k, 6), numbers(n * k, 7));
        let packed = PackedDense::pack(&w, n, k);
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let mut all = vec![0.0; m * n];
            packed.matmul(&compute, &mut all, &x, m);
            for i in 0..m {
                let mut one = vec![0.0; n];
                packed.matmul(&compute, &mut one, &x[i * k..][..k], 1);
                assert_eq!(one, all[i * n..][..n]);
                let mut row = vec![0.0; k];
                packed.row(&mut row, i.min(n - 1));
                assert_eq!(row, w[i.min(n - 1) * k..][..k]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "B holds [k, n]")]
    fn a_short_operand_is_refused() {
        let x = [0.0f32; 4];
        Call::new(
            View::rows(&x, 1),
            (&x, 2),
            2,
            Dims { m: 2, n: 2, k: 3 },
            Write::Set,
        )
        .run(Isa::SCALAR, &mut [0.0; 4]);
    }
}
