//! A frozen linear map `y = x W^T + b` in one of two precisions.

use bantam_kernels::bf16::PackedBf16;
use bantam_kernels::gemm::{Call, Dims, PackedDense, View, Write};
use bantam_kernels::{Compute, Real, ops};

/// How the frozen weights are held and multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// bf16 weights and inputs, f32 sums.
    Bf16,
    /// Full precision, for comparisons with other programs.
    Full,
}

/// A weight `W [n_out, n_in]` with an optional bias.
#[derive(Clone, Debug)]
pub(crate) struct Linear<R> {
    matrix: Matrix<R>,
    bias: Option<Vec<R>>,
    pub(crate) n_in: usize,
    pub(crate) n_out: usize,
}

#[derive(Clone, Debug)]
enum Matrix<R> {
    Bf16 {
        forward: PackedBf16,
        /// The transpose, where gradients flow through.
        backward: Option<PackedBf16>,
    },
    Full {
        forward: PackedDense<R>,
        /// Row-major, where gradients flow through.
        backward: Option<Vec<R>>,
    },
}

impl<R: Real> Linear<R> {
    /// Packs a row-major `W [n_out, n_in]`; `train` keeps what the input gradient needs.
    pub(crate) fn new(
        w: &[f32],
        bias: Option<&[f32]>,
        n_out: usize,
        precision: Precision,
        train: bool,
    ) -> Self {
        let n_in = w.len() / n_out;
        let matrix = match precision {
            Precision::Bf16 => {
                let row = |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * n_in..][..n_in]);
                let forward = PackedBf16::pack_rows(n_out, n_in, row);
                let backward = train.then(|| forward.transpose());
                Matrix::Bf16 { forward, backward }
            }
            Precision::Full => {
                let w: Vec<R> = w.iter().map(|&x| R::from_f32(x)).collect();
                let forward = PackedDense::pack(&w, n_out, n_in);
                Matrix::Full {
                    forward,
                    backward: train.then_some(w),
                }
            }
        };
        let bias = bias.map(|bias| bias.iter().map(|&x| R::from_f32(x)).collect());
        Self {
            matrix,
            bias,
            n_in,
            n_out,
        }
    }

    /// `y [T, n_out] = x [T, n_in] W^T + b`
    pub(crate) fn forward(&self, compute: &Compute, y: &mut [R], x: &[R], scratch: &mut Vec<u32>) {
        let m = x.len() / self.n_in;
        match &self.matrix {
            Matrix::Bf16 { forward, .. } => R::bf16_matmul(forward, compute, y, x, m, scratch),
            Matrix::Full { forward, .. } => forward.matmul(compute, y, x, m),
        }
        if let Some(bias) = &self.bias {
            compute.pool().chunks_mut(y, 32 * self.n_out, |_, rows| {
                ops::add_bias(compute.isa(), rows, bias)
            });
        }
    }

    /// `dx [T, n_in] = dy [T, n_out] W`, the gradient of [`Linear::forward`]'s input.
    ///
    /// Panics if the map was packed without `train`.
    pub(crate) fn input_grad(
        &self,
        compute: &Compute,
        dx: &mut [R],
        dy: &[R],
        scratch: &mut Vec<u32>,
    ) {
        let m = dy.len() / self.n_out;
        match &self.matrix {
            Matrix::Bf16 {
                backward: Some(w), ..
            } => R::bf16_matmul(w, compute, dx, dy, m, scratch),
            Matrix::Full {
                backward: Some(w), ..
            } => {
                let dims = Dims {
                    m,
                    n: self.n_in,
                    k: self.n_out,
                };
                let call = Call::new(
                    View::rows(dy, self.n_out),
                    (w, self.n_in),
                    self.n_in,
                    dims,
                    Write::Set,
                );
                call.run_parallel(compute, dx);
            }
            _ => panic!("the model was loaded for training"),
        }
    }

    /// Row `i` of `W`, as an embedding table is read.
    pub(crate) fn row(&self, out: &mut [R], i: usize) {
        match &self.matrix {
            Matrix::Bf16 { forward, .. } => {
                let mut row = vec![0.0; self.n_in];
                forward.row(&mut row, i);
                out.iter_mut()
                    .zip(row)
                    .for_each(|(out, x)| *out = R::from_f32(x));
            }
            Matrix::Full { forward, .. } => forward.row(out, i),
        }
    }
}
