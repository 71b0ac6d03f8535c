//! The matrix products of a model alone, beside what the machine could do at most.
//!
//! The matrices are the model's own, all layers of them in turn, so that a product reads from where it
//! reads in a pass over the model.

use std::time::Instant;

use bantam_formats::ModelFiles;
use bantam_kernels::bf16::PackedBf16;
use bantam_kernels::qmm::{self, QuantMatrix, QuantRows};
use bantam_kernels::quant::Format;
use bantam_kernels::{Compute, peak};
use bantam_model::{FileSource, ModelConfig, Weights, block_format, read_tensor};
use serde::Serialize;

use super::samples::Samples;

/// Rows of activations: one answer, many answers, a prompt.
const ROWS: [usize; 3] = [1, 16, 512];

/// What this machine can do at most.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Peaks {
    /// 8-bit products in registers.
    pub(crate) int8_gop_s: f64,
    /// bf16 products in registers, or f32 ones where there are none.
    pub(crate) bf16_gop_s: f64,
    /// Reading memory in order.
    pub(crate) read_gb_s: f64,
}

impl Peaks {
    /// Measures them.
    pub(crate) fn measure(compute: &Compute) -> Self {
        Self {
            int8_gop_s: peak::int8_gops(compute),
            bf16_gop_s: peak::bf16_gflops(compute),
            read_gb_s: peak::read_gbs(compute),
        }
    }
}

/// What one product reached.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Product {
    /// Which maps of the model.
    pub(crate) what: &'static str,
    /// How the weights are held.
    pub(crate) weights: String,
    /// Rows of activations.
    pub(crate) m: usize,
    /// Outputs.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    /// Microseconds, the median.
    pub(crate) us: f64,
    /// Gigabytes of weights read a second.
    pub(crate) gb_s: f64,
    /// Multiplications and additions a second, in thousands of millions.
    pub(crate) gop_s: f64,
    /// The least time that reading and arithmetic need at the machine's peaks, as a share of the time it took. Above 1
    /// where weights come from a cache.
    pub(crate) peak_share: f64,
}

/// Maps of one input: what, and the tensors of a layer.
const GROUPS: [(&str, &[&str]); 4] = [
    (
        "q, k, v",
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ),
    ("o", &["self_attn.o_proj"]),
    ("gate, up", &["mlp.gate_proj", "mlp.up_proj"]),
    ("down", &["mlp.down_proj"]),
];

/// One matrix, as the model holds it.
enum Matrix {
    Blocks(QuantMatrix),
    Bf16(PackedBf16),
}

impl Matrix {
    /// Packs the tensor as `weights` says; none if the model has no such tensor, or computes in f32.
    fn pack(files: &ModelFiles, name: &str, weights: Weights, compute: &Compute) -> Option<Self> {
        let tensor = files.tensor(name)?;
        let &[n, k] = tensor.shape.as_slice() else {
            return None;
        };
        let format = block_format(tensor.dtype);
        let is_plain = matches!(format, Format::F32 | Format::F16 | Format::BF16);
        match weights {
            Weights::F32 => None,
            Weights::Auto | Weights::Keep if !is_plain => {
                let blocks = QuantMatrix::pack(format, n, k, tensor.bytes, compute);
                Some(Self::Blocks(blocks))
            }
            _ => {
                let values = read_tensor(&tensor);
                let row = |i: usize, out: &mut [f32]| out.copy_from_slice(&values[i * k..][..k]);
                Some(match weights {
                    Weights::Q8 => Self::Blocks(QuantMatrix::quantise_q8(n, k, row)),
                    _ => Self::Bf16(PackedBf16::pack_rows(n, k, row)),
                })
            }
        }
    }

    fn size(&self) -> (usize, usize) {
        match self {
            Self::Blocks(w) => (w.n(), w.k()),
            Self::Bf16(w) => (w.n(), w.k()),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Blocks(w) => w.bytes(),
            Self::Bf16(w) => w.bytes(),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Blocks(w) => format!("{:?}", w.format()),
            Self::Bf16(_) => "BF16".to_owned(),
        }
    }
}

/// Times every product of the model.
pub(crate) fn measure(
    files: &ModelFiles,
    config: &ModelConfig,
    weights: Weights,
    peaks: &Peaks,
    compute: &Compute,
    rounds: usize,
) -> Vec<Product> {
    let source = FileSource::new(files, config);
    let pack = |name: &str| {
        let name = source.file_name(&format!("{name}.weight"));
        Matrix::pack(files, &name, weights, compute)
    };
    let mut found = Vec::new();
    for (what, names) in GROUPS {
        let layer = |l: usize| -> Option<Vec<Matrix>> {
            let names = names.iter();
            names
                .map(|name| pack(&format!("model.layers.{l}.{name}")))
                .collect()
        };
        let layers: Option<Vec<_>> = (0..config.n_layers).map(layer).collect();
        if let Some(layers) = layers {
            time(&mut found, what, &layers, peaks, compute, rounds);
        }
    }
    let head = if config.tied_head {
        "model.embed_tokens"
    } else {
        "lm_head"
    };
    if let Some(head) = pack(head) {
        time(&mut found, "head", &[vec![head]], peaks, compute, rounds);
    }
    found
}

/// Times the same product of every layer, with few and with many rows.
fn time(
    found: &mut Vec<Product>,
    what: &'static str,
    layers: &[Vec<Matrix>],
    peaks: &Peaks,
    compute: &Compute,
    rounds: usize,
) {
    let n: usize = layers[0].iter().map(|w| w.size().0).sum();
    let k = layers[0][0].size().1;
    let bytes: usize = layers.iter().flatten().map(Matrix::bytes).sum();
    let bytes = bytes as f64 / layers.len() as f64;
    for m in ROWS {
        let mut x = vec![0.0; m * k];
        noise(&mut x);
        let mut rows = QuantRows::new();
        rows.quantise(compute, &x, m, k);
        let (mut y, mut scratch) = (vec![0.0; m * n], Vec::new());
        // A prompt's products depend on arithmetic alone; a few of them will do.
        let used = if m > 64 {
            &layers[..layers.len().min(4)]
        } else {
            layers
        };
        let mut samples = Samples::default();
        for round in 0..=rounds {
            let began = Instant::now();
            for parts in used {
                product(compute, &mut y, n, (&x, &rows), parts, &mut scratch);
            }
            // The first grows buffers.
            if round > 0 {
                samples.push(began.elapsed().as_secs_f64() / used.len() as f64);
            }
        }
        let seconds = samples.spread().map_or(f64::NAN, |s| s.median);
        let operations = 2.0 * (m * n * k) as f64;
        let peak_gop_s = match layers[0][0] {
            Matrix::Blocks(_) => peaks.int8_gop_s,
            Matrix::Bf16(_) => peaks.bf16_gop_s,
        };
        let least = (bytes / peaks.read_gb_s).max(operations / peak_gop_s) / 1e9;
        let mut names: Vec<String> = layers.iter().flatten().map(Matrix::name).collect();
        names.sort();
        names.dedup();
        found.push(Product {
            what,
            weights: names.join(", "),
            m,
            n,
            k,
            us: seconds * 1e6,
            gb_s: bytes / seconds / 1e9,
            gop_s: operations / seconds / 1e9,
            peak_share: least / seconds,
        });
    }
}

/// Maps of one input, in as many regions as the model takes for them.
fn product(
    compute: &Compute,
    y: &mut [f32],
    n: usize,
    (x, rows): (&[f32], &QuantRows),
    parts: &[Matrix],
    scratch: &mut Vec<u32>,
) {
    let (mut blocks, mut col) = (Vec::new(), 0);
    for part in parts {
        match part {
            Matrix::Blocks(w) => blocks.push((w, col)),
            Matrix::Bf16(w) => {
                let y = &mut y[rows.m() * col..][..rows.m() * w.n()];
                w.matmul(compute, y, x, rows.m(), scratch);
            }
        }
        col += part.size().0;
    }
    if !blocks.is_empty() {
        qmm::matmul(compute, y, n, rows, &blocks);
    }
}

/// Values between -1 and 1.
fn noise(row: &mut [f32]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for x in row {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *x = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
    }
}
