use super::*;
use crate::ops;
use rows::SPIKE;

const FORMATS: [Format; 10] = [
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

struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn float(&mut self) -> f32 {
        self.word() as f32 / (1u32 << 30) as f32 - 1.0
    }
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.float()).collect()
}

/// Activations with a spike in about every third block.
fn spiky(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed ^ 0x5eed);
    let mut x = numbers(n, seed);
    for block in x.chunks_mut(STEP) {
        if random.word().is_multiple_of(3) {
            let at = random.word() as usize % block.len();
            block[at] = 5.0 + 100.0 * random.float().abs();
            if random.word().is_multiple_of(2) {
                block[at] *= -1.0;
            }
        }
    }
    x
}

/// Blocks of random codes, extreme ones included, under scales of the size that weights have.
fn blocks(format: Format, n_weights: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes: Vec<u8> = (0..format.bytes_for(n_weights))
        .map(|_| match random.word() % 16 {
            0 => 0,
            1 => 255,
            2 => 128,
            _ => random.word() as u8,
        })
        .collect();
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
        _ => &[0, 2],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in halves {
            let scale = half::f16::from_f32(random.float() * 0.01);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
    }
    bytes
}

fn matrix(format: Format, n: usize, k: usize) -> QuantMatrix {
    let bytes = blocks(format, n * k, (n * k) as u64);
    QuantMatrix::pack(format, n, k, &bytes, &Compute::new(2))
}

fn rows(compute: &Compute, x: &[f32], m: usize) -> QuantRows {
    let mut rows = QuantRows::new();
    rows.quantise(compute, x, m, x.len() / m);
    rows
}

fn run(compute: &Compute, w: &QuantMatrix, x: &[f32], m: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * w.n()];
    matmul(compute, &mut y, w.n(), &rows(compute, x, m), &[(w, 0)]);
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn levels_give_the_bits_of_the_oracle() {
    for format in FORMATS {
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 33, 100] {
            let k = [512, 256, 2048][m % 3].max(format.block_len());
            let k = if format.block_len() == 32 {
                k + 32 * (m % 5)
            } else {
                k
            };
            let n = [1, 31, 64, 77, 100][m % 5];
            let w = matrix(format, n, k);
            let mut x = spiky(m * k, 7);
            // Codes of +-127 throughout meet the extreme weights.
            x[..64].fill(-3.0);
            x[64..128].fill(3.0);
            let want = run(&Compute::with_isa(1, Isa::SCALAR), &w, &x, m);
            for isa in Isa::available() {
                let got = run(&Compute::with_isa(2, isa), &w, &x, m);
                let name = format!("{} {} {m}x{n}x{k}", format.name(), isa.name());
                assert_eq!(bits(&got), bits(&want), "{name}");
            }
        }
    }
}

#[test]
fn rows_read_back_as_the_file_says() {
    for format in FORMATS {
        let (n, k) = (45, 512);
        let bytes = blocks(format, n * k, 3);
        let w = QuantMatrix::pack(format, n, k, &bytes, &Compute::new(2));
        let (mut want, mut got) = (vec![0.0; n * k], vec![0.0; k]);
        quant::dequantize(format, &bytes, &mut want);
        for i in 0..n {
            w.row(&mut got, i);
            let want = &want[i * k..][..k];
            // A zero may differ in sign where a minimum of zero is added.
            assert_eq!(got, want, "{} row {i}", format.name());
        }
    }
}

#[test]
fn products_are_close_to_f64() {
    for format in FORMATS {
        let (m, n, k) = (9, 70, 1536);
        let w = matrix(format, n, k);
        let x = spiky(m * k, 11);
        let y = run(&Compute::new(2), &w, &x, m);
        let mut row = vec![0.0; k];
        let (mut error, mut power) = (0.0f64, 0.0f64);
        for j in 0..n {
            w.row(&mut row, j);
            for i in 0..m {
                // What eight bits leave of the activations, worked out on its own.
                let mut exact = 0.0f64;
                for (x, w) in x[i * k..][..k].chunks(32).zip(row.chunks(32)) {
                    let mut order: Vec<f32> = x.iter().map(|x| x.abs()).collect();
                    order.sort_by(|a, b| b.total_cmp(a));
                    let spike = order[0] > SPIKE * order[1];
                    let max = if spike { order[1] } else { order[0] };
                    for (x, w) in x.iter().zip(w) {
                        if x.abs() > max {
                            exact += f64::from(*x) * f64::from(*w);
                            continue;
                        }
                        let code = (x * (127.0 / max)).round_ties_even();
                        exact += f64::from(code * 1.0) * f64::from(max / 127.0) * f64::from(*w);
                    }
                }
                let got = f64::from(y[i * n + j]);
                let size: f64 = row.iter().map(|w| f64::from(w.abs())).sum();
                assert!(
                    (got - exact).abs() < 2e-6 * size,
                    "{} [{i},{j}] {got} {exact}",
                    format.name()
                );
                let full: f64 = x[i * k..][..k]
                    .iter()
                    .zip(&row)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                error += (got - full).powi(2);
                power += full.powi(2);
            }
        }
        assert!(error < 1e-4 * power, "{} {}", format.name(), error / power);
    }
}

#[test]
fn a_row_does_not_depend_on_batch_threads_or_neighbours() {
    let (m, k) = (300, 256);
    let x = spiky(m * k, 5);
    for format in [Format::Q4_0, Format::Q6_K] {
        let (a, b) = (matrix(format, 100, k), matrix(Format::Q4_K, 33, k));
        for isa in Isa::available() {
            let one = Compute::with_isa(1, isa);
            let all = run(&one, &a, &x, m);
            let also = run(&one, &b, &x, m);
            let many = Compute::with_isa(3, isa);
            for (first, size) in [(0, 1), (299, 1), (5, 2), (100, 6), (13, 17), (1, 280)] {
                let x = rows(&many, &x[first * k..][..size * k], size);
                let stride = 150;
                let mut y = vec![7.5; size * stride];
                matmul(&many, &mut y, stride, &x, &[(&b, 110), (&a, 2)]);
                for (i, y) in y.chunks(stride).enumerate() {
                    let name = format!("{} {} {first}+{i}", format.name(), isa.name());
                    assert_eq!(y[2..102], all[(first + i) * 100..][..100], "{name}");
                    assert_eq!(y[110..143], also[(first + i) * 33..][..33], "{name}");
                    let rest = [&y[..2], &y[102..110], &y[143..]].concat();
                    assert!(rest.iter().all(|&v| v == 7.5), "{name}");
                }
            }
        }
    }
}

#[test]
fn chosen_rows_are_those_of_the_whole_product() {
    let (n, k) = (1000, 288);
    let chosen: Vec<u32> = (0..n as u32)
        .filter(|i| i % 7 == 0 || (300..420).contains(i))
        .chain([5, 999, 5, 0])
        .collect();
    for format in [Format::Q4_0, Format::Q8_0] {
        let w = matrix(format, n, k);
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            for m in [1, 5, 8] {
                let x = spiky(m * k, 17);
                let all = run(&compute, &w, &x, m);
                let mut y = vec![f32::NAN; m * chosen.len()];
                matmul_rows(&compute, &mut y, &rows(&compute, &x, m), &w, &chosen);
                for (i, y) in y.chunks(chosen.len()).enumerate() {
                    for (y, &j) in y.iter().zip(&chosen) {
                        assert_eq!(*y, all[i * n + j as usize], "{} {i} {j}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn quantising_is_the_same_everywhere_and_fused_as_apart() {
    for k in [1, 31, 32, 33, 100, 576, 1536] {
        for m in [1, 7, 20] {
            let mut x = spiky(m * k, 23);
            x[0] = 0.0;
            if k > 64 {
                x[32..64].fill(0.0);
                x[64] = 1e-38;
            }
            let (w, gate_up) = (numbers(k, 24), numbers(2 * m * k, 25));
            let want = rows(&Compute::with_isa(1, Isa::SCALAR), &x, m);
            for isa in Isa::available() {
                let compute = Compute::with_isa(2, isa);
                let mut got = rows(&compute, &x, m);
                assert_eq!(got.all(), want.all(), "{} {m}x{k}", isa.name());

                let (mut normed, mut rstd) = (vec![0.0; m * k], vec![0.0; m]);
                ops::rms_norm(isa, &mut normed, &mut rstd, &x, &w, 1e-5);
                got.quantise_norm(&compute, &x, m, &w, 1e-5);
                assert_eq!(got.all(), rows(&compute, &normed, m).all(), "norm {m}x{k}");

                let mut act = vec![0.0; m * k];
                ops::swiglu(isa, &mut act, &gate_up, k);
                got.quantise_swiglu(&compute, &gate_up, m, k);
                assert_eq!(got.all(), rows(&compute, &act, m).all(), "swiglu {m}x{k}");
            }
        }
    }
}

#[test]
fn a_spike_is_kept_whole_and_the_others_keep_their_bits() {
    let compute = Compute::new(1);
    let mut x = vec![0.5f32; 128];
    x[0] = 1.0;
    // The first block: above 4 times the others; the second: exactly 4 times; the third: two of
    // them; the fourth: nothing but the one.
    x[17] = -4.5;
    x[40] = 2.0;
    x[70..72].fill(9.0);
    x[96..].fill(0.0);
    x[100] = 1e6;
    let rows = rows(&compute, &x, 1);
    let spikes: Vec<_> = rows.all().iter().map(|r| (r.spike, r.spike_at)).collect();
    assert_eq!(spikes, [(-4.5, 17), (0.0, 0), (0.0, 0), (0.0, 0)]);
    let first = &rows.all()[0];
    assert_eq!(
        (first.codes[0], first.codes[17], first.codes[1]),
        (127, 0, 64)
    );
    assert_eq!(first.scale, 1.0 / 127.0);
    assert_eq!(rows.all()[3].codes[4], 127);
}

#[test]
fn codes_round_ties_to_even_and_a_nan_is_not_lost() {
    let compute = Compute::new(1);
    let mut x = vec![0.0f32; 64];
    x[0] = 127.0;
    x[1..6].copy_from_slice(&[0.5, 1.5, -0.5, -1.5, -127.0]);
    x[40] = f32::NAN;
    let got = rows(&compute, &x, 1);
    let records = got.all();
    assert_eq!(records[0].codes[..6], [127, 0, 2, 0, -2, -127]);
    assert_eq!((records[0].scale, records[0].neg_sum), (1.0, 0));
    assert!(records[1].scale.is_nan());
}

#[test]
fn quantised_floats_are_what_the_format_says() {
    let (n, k) = (40, 100);
    let w = numbers(n * k, 31);
    let packed = QuantMatrix::quantise_q8(n, k, |i, out| out.copy_from_slice(&w[i * k..][..k]));
    let (mut want, mut got) = (vec![0.0; 128], vec![0.0; k]);
    for i in 0..n {
        let mut padded = w[i * k..][..k].to_vec();
        padded.resize(128, 0.0);
        let mut bytes = Vec::new();
        quant::quantize(Format::Q8_0, &padded, &mut bytes);
        quant::dequantize(Format::Q8_0, &bytes, &mut want);
        packed.row(&mut got, i);
        assert_eq!(got, want[..k]);
    }
    let x = numbers(3 * k, 32);
    let want = run(&Compute::with_isa(1, Isa::SCALAR), &packed, &x, 3);
    assert_eq!(run(&Compute::new(2), &packed, &x, 3), want);
}

#[test]
fn the_five_fast_formats_stay_at_the_size_of_their_file() {
    for format in [
        Format::Q4_0,
        Format::Q4_1,
        Format::Q8_0,
        Format::Q4_K,
        Format::Q6_K,
    ] {
        let (n, k) = (64, 1536);
        let file = format.bytes_for(n * k) as f64;
        let size = matrix(format, n, k).bytes() as f64;
        assert!(size <= 1.03 * file, "{} {}", format.name(), size / file);
    }
}

#[test]
#[should_panic(expected = "parts do not overlap")]
fn overlapping_parts_are_refused() {
    let w = matrix(Format::Q8_0, 10, 32);
    let compute = Compute::new(1);
    let x = rows(&compute, &[1.0; 32], 1);
    matmul(&compute, &mut [0.0; 30], 30, &x, &[(&w, 0), (&w, 9)]);
}
