//! Block formats against the values and bytes of the `gguf` Python package (made by `goldens/quant.py`).

#![allow(clippy::unwrap_used)]

use bantam_kernels::quant::{Format, dequantize, quantize};
use proptest::prelude::*;
use std::path::Path;

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("goldens/quant")
        .join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / 4];
    dequantize(Format::F32, bytes, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_format_decodes_as_the_reference() {
    for format in Format::ALL {
        let blocks = golden(&format!("{}.blocks", format.name()));
        let expected = floats(&golden(&format!("{}.values", format.name())));
        let mut found = vec![f32::NAN; expected.len()];
        dequantize(format, &blocks, &mut found);
        assert_eq!(bits(&found), bits(&expected), "{}", format.name());
    }
}

#[test]
fn every_writable_format_encodes_as_the_reference() {
    let values = floats(&golden("quantize.values"));
    for format in Format::ALL.into_iter().filter(|f| f.can_quantize()) {
        let expected = match format {
            Format::F32 => golden("quantize.values"),
            _ => golden(&format!("quantize.{}.blocks", format.name())),
        };
        let mut found = Vec::new();
        quantize(format, &values, &mut found);
        assert_eq!(found, expected, "{}", format.name());
    }
}

#[test]
#[should_panic(expected = "not whole Q4_0 blocks")]
fn part_of_a_block_is_refused() {
    dequantize(Format::Q4_0, &[0; 18], &mut [0.0; 31]);
}

/// The largest error of a weight, as a share of the largest magnitude (symmetric) or range (with minimum) of its
/// block: half a step, plus half precision's rounding of the scale (and for `Q4_0` the one-sided top code).
fn tolerance(format: Format, block: &[f32]) -> f32 {
    let peak = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    match format {
        Format::F32 => 0.0,
        Format::F16 => peak / 2048.0 + 6e-8,
        Format::BF16 => peak / 256.0,
        Format::Q8_0 => peak * (0.5 / 127.0 + 1e-3) + 1e-5,
        Format::Q4_0 => peak * (1.0 / 8.0 + 1e-3) + 1e-5,
        Format::Q4_1 => peak * (1.0 / 15.0 + 4e-3) + 1e-5,
        other => panic!("{} is not writable", other.name()),
    }
}

proptest! {
    #[test]
    fn what_is_written_reads_back_close(values in prop::collection::vec(-50.0f32..50.0, 32)) {
        for format in Format::ALL.into_iter().filter(|f| f.can_quantize()) {
            let mut bytes = Vec::new();
            quantize(format, &values, &mut bytes);
            prop_assert_eq!(bytes.len(), format.bytes_for(values.len()));
            let mut back = vec![f32::NAN; values.len()];
            dequantize(format, &bytes, &mut back);
            let allowed = tolerance(format, &values);
            for (a, b) in values.iter().zip(&back) {
                prop_assert!((a - b).abs() <= allowed, "{} {a} {b} {allowed}", format.name());
            }
        }
    }

    #[test]
    fn any_floats_encode_and_any_bytes_decode(seed in prop::collection::vec(any::<u32>(), 256)) {
        let values: Vec<f32> = seed.iter().map(|&b| f32::from_bits(b)).collect();
        let raw: Vec<u8> = seed.iter().flat_map(|b| b.to_le_bytes()).collect();
        for format in Format::ALL {
            if format.can_quantize() {
                quantize(format, &values, &mut Vec::new());
            }
            dequantize(format, &raw[..format.block_bytes()], &mut vec![0.0; format.block_len()]);
        }
    }
}
