//! A frozen linear map `y = x W^T + b`, in the precision that its weights are kept in.

use crate::infer::room;
use crate::weights::Tensor;
use bantam_kernels::bf16::PackedBf16;
use bantam_kernels::gemm::{Call, Dims, PackedDense, View, Write};
use bantam_kernels::qmm::{self, QuantMatrix, QuantRows};
use bantam_kernels::quant::Format;
use bantam_kernels::{Compute, Real, ops};

/// How the frozen weights are held and multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// Block-quantised files as they are, all others in bf16.
    #[default]
    Auto,
    /// Block-quantised tensors as they are in the file, plain ones in bf16.
    Keep,
    /// Eight bits a weight: blocks of 32 that share a scale.
    Q8,
    /// bf16 weights and inputs, f32 sums; what training computes with.
    Bf16,
    /// Full precision, for comparisons with other programs.
    F32,
}

impl Weights {
    /// All of them, the default first.
    pub const ALL: [Weights; 5] = [
        Weights::Auto,
        Weights::Keep,
        Weights::Q8,
        Weights::Bf16,
        Weights::F32,
    ];

    /// `auto`, `keep`, `q8`, `bf16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Weights::Auto => "auto",
            Weights::Keep => "keep",
            Weights::Q8 => "q8",
            Weights::Bf16 => "bf16",
            Weights::F32 => "f32",
        }
    }

    /// The inverse of [`Weights::name`].
    pub fn from_name(name: &str) -> Option<Weights> {
        Weights::ALL.into_iter().find(|kind| kind.name() == name)
    }
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
    /// The fused maps one after the other: each may have a format of its own.
    Quant(Vec<QuantMatrix>),
    /// Gradients flow through the same panels.
    Bf16(PackedBf16),
    Full {
        forward: PackedDense<R>,
        /// Row-major, where gradients flow through.
        backward: Option<Vec<R>>,
    },
}

/// Inputs of a product in the form that it reads; buffers kept between products.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    /// Pairs of bf16.
    words: Vec<u32>,
    quant: QuantRows,
}

impl<R: Real> Linear<R> {
    /// Packs the rows of `tensors`, one below the other; `train` keeps what the input gradient
    /// needs.
    pub(crate) fn new(
        compute: &Compute,
        tensors: &[Tensor<'_>],
        bias: Option<&[f32]>,
        weights: Weights,
        train: bool,
    ) -> Self {
        let n_in = tensors.first().map_or(0, |tensor| tensor.n_in);
        let n_out = tensors.iter().map(|tensor| tensor.n_out).sum();
        let in_blocks = tensors.iter().all(|tensor| tensor.in_blocks());
        let matrix = match weights {
            Weights::Auto | Weights::Keep if in_blocks && !train => {
                Matrix::Quant(tensors.iter().map(|tensor| tensor.pack(compute)).collect())
            }
            Weights::Q8 if !train => Matrix::Quant(
                tensors
                    .iter()
                    .map(|tensor| match tensor.format() {
                        Format::Q8_0 => tensor.pack(compute),
                        _ => QuantMatrix::quantise_q8(tensor.n_out, n_in, |i, out| {
                            tensor.row(i, out)
                        }),
                    })
                    .collect(),
            ),
            Weights::Auto | Weights::Keep | Weights::Q8 | Weights::Bf16 => {
                // Rows are asked for in ascending order.
                let (mut part, mut first) = (0, 0);
                let forward = PackedBf16::pack_rows(n_out, n_in, |i, out| {
                    if i >= first + tensors[part].n_out {
                        first += tensors[part].n_out;
                        part += 1;
                    }
                    tensors[part].row(i - first, out);
                });
                Matrix::Bf16(forward)
            }
            Weights::F32 => {
                let (mut w, mut row) = (Vec::with_capacity(n_out * n_in), vec![0.0; n_in]);
                for tensor in tensors {
                    for i in 0..tensor.n_out {
                        tensor.row(i, &mut row);
                        w.extend(row.iter().map(|&x| R::from_f32(x)));
                    }
                }
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
            Matrix::Quant(parts) => {
                // Only a loss of weights that are not trained comes this way.
                let narrow: Vec<f32> = x.iter().map(|x| x.to_f64() as f32).collect();
                let (mut rows, mut out) = (QuantRows::new(), vec![0.0; y.len()]);
                rows.quantise(compute, &narrow, m, self.n_in);
                quant_product(compute, &mut out, self.n_out, &rows, parts);
                for (y, x) in y.iter_mut().zip(out) {
                    *y = R::from_f32(x);
                }
            }
            Matrix::Bf16(w) => R::bf16_matmul(w, compute, y, x, m, scratch),
            Matrix::Full { forward, .. } => forward.matmul(compute, y, x, m),
        }
        self.add_bias(compute, y);
    }

    /// `y [T, n_out] += b`
    pub(crate) fn add_bias(&self, compute: &Compute, y: &mut [R]) {
        if let Some(bias) = &self.bias {
            compute.pool().chunks_mut(y, 32 * self.n_out, |_, rows| {
                ops::add_bias(compute.isa(), rows, bias)
            });
        }
    }

    /// The weight, where it is held in bf16.
    pub(crate) fn bf16(&self) -> Option<&PackedBf16> {
        match &self.matrix {
            Matrix::Bf16(w) => Some(w),
            _ => None,
        }
    }

    /// The bias, if there is one.
    pub(crate) fn bias(&self) -> Option<&[R]> {
        self.bias.as_deref()
    }

    /// Replaces the weight by the first `n_out n_in` numbers of `w`, and the bias likewise.
    ///
    /// Panics if the map is held in blocks.
    pub(crate) fn set(&mut self, compute: &Compute, w: &[R], bias: Option<&[R]>) {
        let w = &w[..self.n_out * self.n_in];
        match &mut self.matrix {
            Matrix::Bf16(panels) => match R::as_f32(w) {
                Some(w) => panels.set(compute, w),
                None => {
                    let narrow: Vec<f32> = w.iter().map(|x| x.to_f64() as f32).collect();
                    panels.set(compute, &narrow);
                }
            },
            Matrix::Full { forward, backward } => {
                *forward = PackedDense::pack(w, self.n_out, self.n_in);
                if let Some(backward) = backward {
                    backward.copy_from_slice(w);
                }
            }
            Matrix::Quant(_) => panic!("the model was loaded for training"),
        }
        if let (Some(to), Some(from)) = (&mut self.bias, bias) {
            to.copy_from_slice(&from[..self.n_out]);
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
            Matrix::Bf16(w) => R::bf16_matmul_back(w, compute, dx, dy, m, scratch),
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
        let widen = |out: &mut [R], row: &[f32]| {
            out.iter_mut()
                .zip(row)
                .for_each(|(out, &x)| *out = R::from_f32(x));
        };
        match &self.matrix {
            Matrix::Quant(parts) => {
                let mut row = vec![0.0; self.n_in];
                let (part, i) = part_of(parts, i);
                part.row(&mut row, i);
                widen(out, &row);
            }
            Matrix::Bf16(forward) => {
                let mut row = vec![0.0; self.n_in];
                forward.row(&mut row, i);
                widen(out, &row);
            }
            Matrix::Full { forward, .. } => forward.row(out, i),
        }
    }

    /// Full precision all the way, so the cache is too.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self.matrix, Matrix::Full { .. })
    }
}

/// What a map reads, before it is put into the map's form.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// As it is.
    Rows(&'a [f32]),
    /// The gated activation of rows of gate and up.
    GateUp(&'a [f32]),
    /// The norm of rows, with its gain and epsilon.
    Norm(&'a [f32], &'a [f32], f32),
}

impl Linear<f32> {
    /// As [`Linear::forward`]. What `input` asks for is left in `plain` as f32 rows if `keep`
    /// is set or the product reads them; the bits are the same either way.
    pub(crate) fn apply(
        &self,
        compute: &Compute,
        y: &mut [f32],
        input: Input<'_>,
        (plain, keep): (&mut Vec<f32>, bool),
        inputs: &mut Inputs,
    ) {
        let m = y.len() / self.n_out;
        let Inputs { words, quant } = inputs;
        let x = match (&self.matrix, input) {
            (_, Input::Rows(x)) => x,
            (Matrix::Quant(parts), Input::Norm(x, w, eps)) if !keep => {
                quant.quantise_norm(compute, x, m, w, eps);
                quant_product(compute, y, self.n_out, quant, parts);
                return self.add_bias(compute, y);
            }
            (Matrix::Quant(parts), Input::GateUp(x)) if !keep => {
                quant.quantise_swiglu(compute, x, m, self.n_in);
                quant_product(compute, y, self.n_out, quant, parts);
                return self.add_bias(compute, y);
            }
            _ => {
                let plain = room(plain, m * self.n_in);
                plain_rows(compute, plain, input, self.n_in);
                plain
            }
        };
        match &self.matrix {
            Matrix::Quant(parts) => {
                quant.quantise(compute, x, m, self.n_in);
                quant_product(compute, y, self.n_out, quant, parts);
            }
            Matrix::Bf16(forward) => forward.matmul(compute, y, x, m, words),
            Matrix::Full { forward, .. } => forward.matmul(compute, y, x, m),
        }
        self.add_bias(compute, y);
    }

    /// Only some outputs: `y [m, rows.len()]`, the bits that [`Linear::apply`] has there.
    pub(crate) fn apply_rows(
        &self,
        compute: &Compute,
        y: &mut [f32],
        x: &[f32],
        rows: &[u32],
        inputs: &mut Inputs,
    ) {
        let m = x.len() / self.n_in;
        let Inputs { words, quant } = inputs;
        match &self.matrix {
            Matrix::Quant(parts) => {
                quant.quantise(compute, x, m, self.n_in);
                // A head is one map.
                let [part] = &parts[..] else {
                    unreachable!("only fused maps have several parts")
                };
                qmm::matmul_rows(compute, y, quant, part, rows);
            }
            Matrix::Bf16(forward) => {
                let picked = PackedBf16::pack_rows(rows.len(), self.n_in, |i, out| {
                    forward.row(out, rows[i] as usize)
                });
                picked.matmul(compute, y, x, m, words);
            }
            Matrix::Full { forward, .. } => {
                let mut picked = vec![0.0; rows.len() * self.n_in];
                for (out, &i) in picked.chunks_exact_mut(self.n_in).zip(rows) {
                    forward.row(out, i as usize);
                }
                let picked = PackedDense::pack(&picked, rows.len(), self.n_in);
                picked.matmul(compute, y, x, m);
            }
        }
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(rows.len()) {
                for (y, &i) in y.iter_mut().zip(rows) {
                    *y += bias[i as usize];
                }
            }
        }
    }
}

/// `out [T, k]`: the rows that `input` asks for.
fn plain_rows(compute: &Compute, out: &mut [f32], input: Input<'_>, k: usize) {
    /// Rows that a task takes: few enough that a small batch is shared.
    const TASK_ROWS: usize = 4;
    let isa = compute.isa();
    compute
        .pool()
        .chunks_mut(out, TASK_ROWS * k, |i, out| match input {
            Input::Rows(x) => out.copy_from_slice(&x[i * TASK_ROWS * k..][..out.len()]),
            Input::GateUp(x) => {
                let x = &x[2 * i * TASK_ROWS * k..][..2 * out.len()];
                ops::swiglu(isa, out, x, k);
            }
            Input::Norm(x, w, eps) => {
                let mut rstd = [0.0; TASK_ROWS];
                let x = &x[i * TASK_ROWS * k..][..out.len()];
                ops::rms_norm(isa, out, &mut rstd[..x.len() / k], x, w, eps);
            }
        });
}

fn quant_product(
    compute: &Compute,
    y: &mut [f32],
    stride: usize,
    x: &QuantRows,
    parts: &[QuantMatrix],
) {
    let place = |i: usize| parts[..i].iter().map(QuantMatrix::n).sum();
    match parts {
        [w] => qmm::matmul(compute, y, stride, x, &[(w, 0)]),
        [a, b] => qmm::matmul(compute, y, stride, x, &[(a, 0), (b, place(1))]),
        [a, b, c] => {
            let parts = [(a, 0), (b, place(1)), (c, place(2))];
            qmm::matmul(compute, y, stride, x, &parts)
        }
        _ => unreachable!("at most three maps are fused"),
    }
}

/// The part that holds row `i` of the whole, and which of its rows that is.
fn part_of(parts: &[QuantMatrix], mut i: usize) -> (&QuantMatrix, usize) {
    for part in parts {
        if i < part.n() {
            return (part, i);
        }
        i -= part.n();
    }
    panic!("the row exists")
}
