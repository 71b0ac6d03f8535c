//! Closeness of two slices of numbers.
//!
//! The measure is the normalised mean square error, `sum (got - want)^2 / sum want^2`: one number for a whole
//! tensor, free of its scale, and NaN as soon as one element is NaN, so that `<=` fails.

/// A float that can be compared in `f64`.
pub trait Number: Copy {
    /// The value as `f64`, exactly.
    fn f64(self) -> f64;
}

impl Number for f32 {
    fn f64(self) -> f64 {
        f64::from(self)
    }
}

impl Number for f64 {
    fn f64(self) -> f64 {
        self
    }
}

/// Normalised mean square error of `got` against `want`.
///
/// Zero when both are all zeros, infinite when only `want` is, NaN when any element of either is.
/// Panics if the lengths differ.
pub fn nmse<A: Number, B: Number>(got: &[A], want: &[B]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let mut error = 0.0;
    let mut power = 0.0;
    for (g, w) in got.iter().zip(want) {
        let (g, w) = (g.f64(), w.f64());
        error += (g - w) * (g - w);
        power += w * w;
    }
    if error == 0.0 { 0.0 } else { error / power }
}

/// Panics unless `nmse(got, want) <= nmse_max`, showing the first element that diverges and the worst one.
///
/// An element counts as diverging when it is off by more than the root mean square that `nmse_max` grants to
/// every element, or is NaN or infinite where `want` is not.
#[track_caller]
pub fn assert_close<A: Number, B: Number>(name: &str, got: &[A], want: &[B], nmse_max: f64) {
    assert_eq!(
        got.len(),
        want.len(),
        "`{name}`: {} elements, expected {}",
        got.len(),
        want.len()
    );
    let error = nmse(got, want);
    if error <= nmse_max {
        return;
    }
    let rms = (want.iter().map(|w| w.f64() * w.f64()).sum::<f64>() / want.len() as f64).sqrt();
    let allowed = nmse_max.sqrt() * rms;
    let distance = |i: usize| {
        let d = (got[i].f64() - want[i].f64()).abs();
        if d.is_nan() { f64::INFINITY } else { d }
    };
    let off = |i: &usize| distance(*i) > allowed;
    let n_off = (0..got.len()).filter(off).count();
    let first = (0..got.len()).find(off);
    let worst = (0..got.len()).max_by(|&a, &b| distance(a).total_cmp(&distance(b)));
    let show = |i: usize| format!("[{i}] is {:e}, expected {:e}", got[i].f64(), want[i].f64());
    panic!(
        "`{name}`: NMSE {error:e} over {nmse_max:e}; {n_off} of {} elements off by more than {allowed:e}\n  first {}\n  worst {}",
        got.len(),
        first.map_or_else(|| "none".into(), show),
        worst.map_or_else(|| "none".into(), show),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_slices_have_no_error() {
        assert_eq!(nmse(&[1.0f32, -2.0], &[1.0f64, -2.0]), 0.0);
        assert_eq!(nmse(&[0.0f32; 3], &[0.0f32; 3]), 0.0);
        assert_close("empty", &[] as &[f32], &[] as &[f32], 0.0);
    }

    #[test]
    fn error_is_relative_to_the_reference() {
        assert_eq!(nmse(&[1.0f64, 3.0], &[1.0f64, 2.0]), 0.2);
        assert_eq!(nmse(&[1.0f64], &[0.0f64]), f64::INFINITY);
    }

    #[test]
    #[should_panic(expected = "first [1] is NaN, expected 2e0")]
    fn nan_fails() {
        assert_close("x", &[1.0f32, f32::NAN], &[1.0f32, 2.0], 1e9);
    }

    #[test]
    #[should_panic(expected = "first [0] is NaN")]
    fn nan_fails_where_the_reference_is_zero() {
        assert_close("x", &[f32::NAN], &[0.0f32], 1e9);
    }

    #[test]
    #[should_panic(expected = "first [2] is 3.5e0, expected 3e0\n  worst [3] is 9e0, expected 4e0")]
    fn the_first_and_the_worst_difference_are_shown() {
        assert_close(
            "x",
            &[1.0f32, 2.0, 3.5, 9.0],
            &[1.0f32, 2.0, 3.0, 4.0],
            1e-6,
        );
    }

    #[test]
    #[should_panic(expected = "`x`: 1 elements, expected 2")]
    fn lengths_must_agree() {
        assert_close("x", &[1.0f32], &[1.0f32, 2.0], 1.0);
    }
}
