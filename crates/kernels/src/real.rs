//! The float types that the arithmetic is generic over: f32 to run, f64 to check gradients.

use std::fmt::{Debug, Display};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// A float type. `f32` runs; `f64` is where a gradient check closes to about 1e-9.
pub trait Real:
    Copy
    + Send
    + Sync
    + Default
    + PartialOrd
    + PartialEq
    + Debug
    + Display
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + 'static
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// The most negative finite value.
    const LOWEST: Self;
    /// Rounds to this type.
    fn from_f64(x: f64) -> Self;
    /// Rounds to this type.
    fn from_f32(x: f32) -> Self;
    /// Widens (exact).
    fn to_f64(self) -> f64;
    /// `self * a + b` with one rounding.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// e to the power of `self`, without a branch so that loops vectorise; underflows to
    /// a value below 1.2e-38 instead of zero.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The greater of two numbers.
    fn max(self, other: Self) -> Self;

    /// A dense product on the calling thread; see [`crate::gemm`]. Vector levels exist for f32.
    ///
    /// # Safety
    /// `c` points to a block that holds `C` and that nobody else touches meanwhile.
    #[doc(hidden)]
    unsafe fn gemm_serial(isa: crate::Isa, call: &crate::gemm::Call<'_, Self>, c: *mut Self);

    /// `Y [m, n] = X [m, k] W^T` with a bf16 weight; see [`crate::bf16`]. In f64 the
    /// activations keep their precision: the oracle of the rounding.
    #[doc(hidden)]
    fn bf16_matmul(
        w: &crate::bf16::PackedBf16,
        compute: &crate::Compute,
        y: &mut [Self],
        x: &[Self],
        m: usize,
        scratch: &mut Vec<u32>,
    );

    /// `DX [m, k] = DY [m, n] W`, the input gradient of [`Real::bf16_matmul`].
    #[doc(hidden)]
    fn bf16_matmul_back(
        w: &crate::bf16::PackedBf16,
        compute: &crate::Compute,
        dx: &mut [Self],
        dy: &[Self],
        m: usize,
        scratch: &mut Vec<u32>,
    );

    /// The same slice, where this is f32.
    #[doc(hidden)]
    fn as_f32(x: &[Self]) -> Option<&[f32]>;

    /// The same slice, where this is f32.
    #[doc(hidden)]
    fn as_f32_mut(x: &mut [Self]) -> Option<&mut [f32]>;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f32::MIN;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        // Cody-Waite reduction to |r| <= ln2/2, then a degree-6 polynomial (Cephes expf
        // coefficients); at most 2 units in the last place from the true value.
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self < 88.0 { self } else { 88.0 };
        let x = if x > -87.0 { x } else { -87.0 };
        let shifted = f32::mul_add(x, LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = f32::mul_add(n, -LN2_HIGH, x);
        let r = f32::mul_add(n, -LN2_LOW, r);
        let p = 1.987_569_1e-4;
        let p = f32::mul_add(p, r, 1.398_199_9e-3);
        let p = f32::mul_add(p, r, 8.333_452e-3);
        let p = f32::mul_add(p, r, 4.166_579_6e-2);
        let p = f32::mul_add(p, r, 1.666_666_5e-1);
        let p = f32::mul_add(p, r, 0.5);
        let y = f32::mul_add(p, r * r, r) + 1.0;
        let scale = f32::from_bits(
            (shifted
                .to_bits()
                .wrapping_sub(ROUND.to_bits())
                .wrapping_add(127))
                << 23,
        );
        // A NaN fails both comparisons above and would come out finite.
        if self.is_nan() { self } else { y * scale }
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    unsafe fn gemm_serial(isa: crate::Isa, call: &crate::gemm::Call<'_, Self>, c: *mut Self) {
        // SAFETY: passed on to the caller.
        unsafe { crate::gemm::serial_f32(isa, call, c) };
    }
    fn bf16_matmul(
        w: &crate::bf16::PackedBf16,
        compute: &crate::Compute,
        y: &mut [Self],
        x: &[Self],
        m: usize,
        scratch: &mut Vec<u32>,
    ) {
        w.matmul(compute, y, x, m, scratch);
    }
    fn bf16_matmul_back(
        w: &crate::bf16::PackedBf16,
        compute: &crate::Compute,
        dx: &mut [Self],
        dy: &[Self],
        m: usize,
        scratch: &mut Vec<u32>,
    ) {
        let stride = w.n().div_ceil(2);
        crate::bf16::round_rows(compute, scratch, dy, w.n());
        let dy = crate::bf16::Pairs::new(scratch, stride);
        w.matmul_back(compute, dx, dy, m, None);
    }
    fn as_f32(x: &[Self]) -> Option<&[f32]> {
        Some(x)
    }
    fn as_f32_mut(x: &mut [Self]) -> Option<&mut [f32]> {
        Some(x)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f64::MIN;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x.into()
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    unsafe fn gemm_serial(_: crate::Isa, call: &crate::gemm::Call<'_, Self>, c: *mut Self) {
        // SAFETY: passed on to the caller.
        unsafe { crate::gemm::serial_scalar(call, c) };
    }
    fn bf16_matmul(
        w: &crate::bf16::PackedBf16,
        _: &crate::Compute,
        y: &mut [Self],
        x: &[Self],
        m: usize,
        _: &mut Vec<u32>,
    ) {
        assert!(
            x.len() == m * w.k() && y.len() == m * w.n(),
            "X is [m, k], Y is [m, n]"
        );
        let mut row = vec![0.0f32; w.k()];
        for j in 0..w.n() {
            w.row(&mut row, j);
            for (x, y) in x.chunks_exact(w.k()).zip(y.chunks_exact_mut(w.n())) {
                y[j] = x.iter().zip(&row).map(|(x, &w)| x * f64::from(w)).sum();
            }
        }
    }
    fn bf16_matmul_back(
        w: &crate::bf16::PackedBf16,
        _: &crate::Compute,
        dx: &mut [Self],
        dy: &[Self],
        m: usize,
        _: &mut Vec<u32>,
    ) {
        assert!(
            dx.len() == m * w.k() && dy.len() == m * w.n(),
            "DX is [m, k], DY is [m, n]"
        );
        dx.fill(0.0);
        let mut row = vec![0.0f32; w.k()];
        for j in 0..w.n() {
            w.row(&mut row, j);
            for (dx, dy) in dx.chunks_exact_mut(w.k()).zip(dy.chunks_exact(w.n())) {
                let terms = dx.iter_mut().zip(&row);
                terms.for_each(|(dx, &w)| *dx += dy[j] * f64::from(w));
            }
        }
    }
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -8600..8790 {
            let x = i as f32 * 0.01 + 0.0037;
            let (got, want) = (f64::from(Real::exp(x)), f64::from(x).exp());
            worst = worst.max((got - want).abs() / want);
        }
        assert!(worst < 2.5e-7, "worst relative error {worst:e}");
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert!(Real::exp(f32::NAN).is_nan());
        assert!(Real::exp(f32::NEG_INFINITY) < 2e-38);
    }
}
