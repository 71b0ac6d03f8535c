//! The cached attention against a plain one, on every instruction set and however it is cut.

use super::*;
use crate::noise::wide as numbers;

fn shapes() -> [HeadDims; 4] {
    [(6, 2, 16), (9, 3, 64), (2, 2, 20), (14, 1, 80)].map(|(n_heads, n_kv_heads, head_dim)| {
        HeadDims {
            n_heads,
            n_kv_heads,
            head_dim,
        }
    })
}

fn filled(qkv: &[f32], dims: HeadDims, layer: usize) -> Vec<Arc<KvBlock>> {
    let w = dims.qkv_width();
    let mut blocks = vec![KvBlock::new(dims, 2); (qkv.len() / w).div_ceil(BLOCK)];
    for (pos, row) in qkv.chunks_exact(w).enumerate() {
        blocks[pos / BLOCK].store(Isa::SCALAR, layer, row, pos, dims);
    }
    blocks.into_iter().map(Arc::new).collect()
}

/// Rows `rows` of one sequence in one call.
fn rows_of(
    compute: &Compute,
    qkv: &[f32],
    blocks: &[Arc<KvBlock>],
    rows: Range<usize>,
    dims: HeadDims,
) -> Vec<f32> {
    let w = dims.qkv_width();
    let mut out = vec![0.0; rows.len() * dims.out_width()];
    let span = KvSpan {
        rows: 0..rows.len(),
        first_pos: rows.start,
        blocks,
    };
    let qkv = &qkv[rows.start * w..rows.end * w];
    attend(compute, &mut out, qkv, 1, &[span], dims);
    out
}

#[test]
fn rows_have_the_same_bits_however_they_are_cut() {
    let n = 75;
    for dims in shapes() {
        let ow = dims.out_width();
        let qkv = numbers(n * dims.qkv_width(), 3);
        let blocks = filled(&qkv, dims, 1);
        let mut widened = None;
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let want = rows_of(&compute, &qkv, &blocks, 0..n, dims);
            for cut in [1, 2, 5, 31, 33] {
                for start in (0..n).step_by(cut) {
                    let rows = start..(start + cut).min(n);
                    let got = rows_of(&compute, &qkv, &blocks, rows.clone(), dims);
                    let want = &want[rows.start * ow..rows.end * ow];
                    assert!(got == want, "{} {dims:?} cut {cut} at {start}", isa.name());
                }
            }
            // Levels that widen agree to the bit; `vdpbf16ps` is close.
            let widened = widened.get_or_insert_with(|| want.clone());
            if isa.name() == "avx512-bf16" {
                let far = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-2;
                assert!(!want.iter().zip(&*widened).any(far), "{dims:?}");
            } else {
                assert!(want == *widened, "{} {dims:?}", isa.name());
            }
        }
    }
}

#[test]
fn rows_are_stored_alike_one_by_one_and_together() {
    for dims in shapes() {
        let w = dims.qkv_width();
        let qkv = numbers(BLOCK * w, 7);
        for isa in Isa::available() {
            let mut one_by_one = KvBlock::new(dims, 2);
            for (pos, row) in qkv.chunks_exact(w).enumerate() {
                one_by_one.store(Isa::SCALAR, 1, row, pos, dims);
            }
            for cut in [1, 2, 3, 5, 32] {
                let mut cut_up = KvBlock::new(dims, 2);
                for (i, rows) in qkv.chunks(cut * w).enumerate() {
                    cut_up.store(isa, 1, rows, 3 * BLOCK + i * cut, dims);
                }
                let same = |head: usize| {
                    let len = value_width(dims) * POS_PAIRS;
                    let at = dims.n_kv_heads * dims.head_dim * POS_PAIRS + head * len;
                    let used = |block: &KvBlock| -> Vec<u32> {
                        let rows = block.layer(1)[at..at + len].chunks(value_width(dims));
                        rows.flat_map(|row| row[..dims.head_dim].to_vec()).collect()
                    };
                    let keys = ..dims.n_kv_heads * dims.head_dim * POS_PAIRS;
                    one_by_one.layer(1)[keys] == cut_up.layer(1)[keys]
                        && used(&one_by_one) == used(&cut_up)
                };
                assert!((0..dims.n_kv_heads).all(same), "{dims:?} cut {cut}");
            }
        }
    }
}

#[test]
fn it_is_attention() {
    let n = 45;
    for dims in shapes() {
        let (w, ow, dh) = (dims.qkv_width(), dims.out_width(), dims.head_dim);
        let group = dims.n_heads / dims.n_kv_heads;
        // Numbers that bf16 holds exactly, so that only the probabilities are rounded.
        let mut qkv = numbers(n * w, 5);
        qkv.iter_mut().for_each(|x| *x = (*x * 16.0).round() / 16.0);
        let got = rows_of(&Compute::new(2), &qkv, &filled(&qkv, dims, 1), 0..n, dims);
        for t in 0..n {
            for head in 0..dims.n_heads {
                let key = ow + head / group * dh;
                let value = key + dims.n_kv_heads * dh;
                let at = |t: usize, column: usize| f64::from(qkv[t * w + column]);
                let score = |j: usize| -> f64 {
                    let dot: f64 = (0..dh).map(|d| at(t, head * dh + d) * at(j, key + d)).sum();
                    dot / (dh as f64).sqrt()
                };
                let max = (0..=t).map(score).fold(f64::MIN, f64::max);
                let p: Vec<f64> = (0..=t).map(|j| (score(j) - max).exp()).collect();
                let sum: f64 = p.iter().sum();
                for d in 0..dh {
                    let want: f64 = (0..=t).map(|j| p[j] / sum * at(j, value + d)).sum();
                    let got = f64::from(got[t * ow + head * dh + d]);
                    assert!((got - want).abs() < 1.2e-2, "{dims:?}: {got} and {want}");
                }
            }
        }
    }
}

#[test]
fn exp2_is_close_and_keeps_nan() {
    for i in 0..12_600 {
        let x = -(i as f32) / 100.0;
        let (got, want) = (f64::from(exp2(x)), f64::from(x).exp2());
        assert!((got / want - 1.0).abs() < 2.5e-7, "{x}: {got} and {want}");
    }
    assert_eq!(exp2(0.0), 1.0);
    assert!(exp2(f32::NAN).is_nan() && exp2(f32::NEG_INFINITY) < 2e-38);
}
