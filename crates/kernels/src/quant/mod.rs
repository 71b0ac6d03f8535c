//! Block quantisation: how each weight format of ggml is laid out, and the way from bytes to numbers and back.
//!
//! A *block* is a fixed number of consecutive weights of one row that share a scale. Plain formats (`F32`, `F16`,
//! `BF16`) are blocks of one. Everything here is the scalar oracle: safe code, one loop a format, in the order of
//! operations of ggml's reference, so that results agree with it to the bit. SIMD twins are tested against it.

mod codes;
mod k_quants;
mod legacy;
mod plain;

pub(crate) use codes::{Parts, take_apart};

/// A weight format: the type of a tensor as it lies in a file or in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the names are ggml's")]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 4 bits, symmetric: `d (q - 8)`, 32 to a block.
    Q4_0,
    /// 4 bits with a minimum: `d q + m`, 32 to a block.
    Q4_1,
    /// 5 bits, symmetric: `d (q - 16)`, 32 to a block.
    Q5_0,
    /// 5 bits with a minimum: `d q + m`, 32 to a block.
    Q5_1,
    /// 8 bits, symmetric: `d q`, 32 to a block.
    Q8_0,
    /// 2 bits, 16 sub-blocks of 16 with 4-bit scales and minima.
    Q2_K,
    /// 3 bits, 16 sub-blocks of 16 with 6-bit scales.
    Q3_K,
    /// 4 bits, 8 sub-blocks of 32 with 6-bit scales and minima.
    Q4_K,
    /// 5 bits, 8 sub-blocks of 32 with 6-bit scales and minima.
    Q5_K,
    /// 6 bits, 16 sub-blocks of 16 with 8-bit scales.
    Q6_K,
}

impl Format {
    /// Every format, plain ones first.
    pub const ALL: [Format; 13] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
    ];

    /// Weights in one block.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => legacy::LEN,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => {
                k_quants::LEN
            }
        }
    }

    /// Bytes in one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => legacy::Q4_0_BYTES,
            Format::Q4_1 => legacy::Q4_1_BYTES,
            Format::Q5_0 => legacy::Q5_0_BYTES,
            Format::Q5_1 => legacy::Q5_1_BYTES,
            Format::Q8_0 => legacy::Q8_0_BYTES,
            Format::Q2_K => k_quants::Q2_K_BYTES,
            Format::Q3_K => k_quants::Q3_K_BYTES,
            Format::Q4_K => k_quants::Q4_K_BYTES,
            Format::Q5_K => k_quants::Q5_K_BYTES,
            Format::Q6_K => k_quants::Q6_K_BYTES,
        }
    }

    /// The name as ggml and GGUF tools print it.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::BF16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q5_0 => "Q5_0",
            Format::Q5_1 => "Q5_1",
            Format::Q8_0 => "Q8_0",
            Format::Q2_K => "Q2_K",
            Format::Q3_K => "Q3_K",
            Format::Q4_K => "Q4_K",
            Format::Q5_K => "Q5_K",
            Format::Q6_K => "Q6_K",
        }
    }

    /// Bytes that `n` weights take; `n` must be whole blocks.
    pub fn bytes_for(self, n: usize) -> usize {
        assert_eq!(
            n % self.block_len(),
            0,
            "{n} weights are not whole {} blocks",
            self.name()
        );
        n / self.block_len() * self.block_bytes()
    }

    /// Whether [`quantize`] can write this format; every format can be read.
    pub const fn can_quantize(self) -> bool {
        matches!(
            self,
            Format::F32 | Format::F16 | Format::BF16 | Format::Q8_0 | Format::Q4_0 | Format::Q4_1
        )
    }
}

/// Weights from bytes.
///
/// Shapes:   bytes `[n / block_len * block_bytes]`; out `[n]`
/// Math:     per block, see the format; `(d * sub-block scale) * q`, then the minimum
/// Numerics: f32 without fused multiply-add; equal to ggml's reference to the bit. Any bytes are valid input:
///           a scale may be NaN or infinite and then so is its block
/// Errors:   panics if `out` is not whole blocks or the lengths disagree (checked once at load)
/// Source:   ggml, `ggml-quants.c`, `dequantize_row_*`
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        bytes.len(),
        format.bytes_for(out.len()),
        "{} bytes for {} weights",
        format.name(),
        out.len()
    );
    match format {
        Format::F32 => decode(out, bytes, plain::f32_values),
        Format::F16 => decode(out, bytes, plain::f16_values),
        Format::BF16 => decode(out, bytes, plain::bf16_values),
        Format::Q4_0 => decode(out, bytes, legacy::q4_0_values),
        Format::Q4_1 => decode(out, bytes, legacy::q4_1_values),
        Format::Q5_0 => decode(out, bytes, legacy::q5_0_values),
        Format::Q5_1 => decode(out, bytes, legacy::q5_1_values),
        Format::Q8_0 => decode(out, bytes, legacy::q8_0_values),
        Format::Q2_K => decode(out, bytes, k_quants::q2_k_values),
        Format::Q3_K => decode(out, bytes, k_quants::q3_k_values),
        Format::Q4_K => decode(out, bytes, k_quants::q4_k_values),
        Format::Q5_K => decode(out, bytes, k_quants::q5_k_values),
        Format::Q6_K => decode(out, bytes, k_quants::q6_k_values),
    }
}

/// Bytes from weights, appended to `out`.
///
/// Shapes:   values `[n]`, whole blocks; appends `n / block_len * block_bytes` bytes
/// Math:     per block, the scale that maps the largest magnitude (or the range) onto the codes, then rounding
/// Numerics: the rounding of ggml's reference; `F16` and `BF16` round to nearest, ties to even. A block whose scale
///           is beyond half precision (weights of about 500,000) decodes to infinities, as in ggml
/// Errors:   panics if `values` is not whole blocks or the format is not [`Format::can_quantize`]
/// Source:   ggml, `ggml-quants.c`, `quantize_row_*_ref`
pub fn quantize(format: Format, values: &[f32], out: &mut Vec<u8>) {
    out.reserve(format.bytes_for(values.len()));
    match format {
        Format::F32 => encode(out, values, plain::f32_bytes),
        Format::F16 => encode(out, values, plain::f16_bytes),
        Format::BF16 => encode(out, values, plain::bf16_bytes),
        Format::Q4_0 => encode(out, values, legacy::q4_0_bytes),
        Format::Q4_1 => encode(out, values, legacy::q4_1_bytes),
        Format::Q8_0 => encode(out, values, legacy::q8_0_bytes),
        other => panic!("{} can be read but not written", other.name()),
    }
}

/// Runs a block decoder over whole blocks; lengths were asserted by the caller.
fn decode<const BYTES: usize, const LEN: usize>(
    out: &mut [f32],
    bytes: &[u8],
    block: impl Fn(&mut [f32; LEN], &[u8; BYTES]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (outs, _) = out.as_chunks_mut::<LEN>();
    for (out, bytes) in outs.iter_mut().zip(blocks) {
        block(out, bytes);
    }
}

/// Runs a block encoder over whole blocks; lengths were asserted by the caller.
fn encode<const BYTES: usize, const LEN: usize>(
    out: &mut Vec<u8>,
    values: &[f32],
    block: impl Fn(&[f32; LEN]) -> [u8; BYTES],
) {
    let (blocks, _) = values.as_chunks::<LEN>();
    for values in blocks {
        out.extend_from_slice(&block(values));
    }
}

/// A half-precision scale at byte `at` of a block.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}
