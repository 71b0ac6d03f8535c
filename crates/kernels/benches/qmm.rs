//! Quantised products at the shapes of SmolLM2-135M: one token, sixteen, a prompt of 512.
//!
//! `cargo bench -p bantam-kernels`. Elements are integer operations, so `Gelem/s` reads as
//! GOP/s; the single token counts bytes of weights instead, the stream that bounds it. Each
//! shape has as many matrices as the model has layers, so that no cache holds the weights. The
//! roofs of this machine are printed first.

use bantam_kernels::qmm::{QuantMatrix, QuantRows, matmul};
use bantam_kernels::quant::Format;
use bantam_kernels::{Compute, peak};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;

const FORMATS: [Format; 5] = [
    Format::Q4_0,
    Format::Q4_1,
    Format::Q8_0,
    Format::Q4_K,
    Format::Q6_K,
];

/// Name, outputs, inputs and count of matrices. The K formats need whole blocks of 256 columns,
/// so they get 512 where the model has 576.
const SHAPES: [(&str, usize, usize, usize); 4] = [
    ("qkv", 960, 576, 30),
    ("gate-up", 3072, 576, 30),
    ("down", 576, 1536, 30),
    ("head", 49152, 576, 1),
];

/// Random codes under small scales.
fn weights(format: Format, n: usize, k: usize, compute: &Compute) -> QuantMatrix {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0u8; format.bytes_for(n * k)];
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    let halves: &[usize] = match format {
        Format::Q4_1 | Format::Q4_K => &[0, 2],
        Format::Q6_K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
        }
    }
    QuantMatrix::pack(format, n, k, &bytes, compute)
}

fn products(criterion: &mut Criterion) {
    let compute = Compute::detect();
    println!(
        "roofs: {:.0} GOP/s int8, {:.0} GFLOP/s bf16, {:.1} GB/s read",
        peak::int8_gops(&compute),
        peak::bf16_gflops(&compute),
        peak::read_gbs(&compute)
    );
    for format in FORMATS {
        let mut group = criterion.benchmark_group(format.name());
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_millis(500));
        for (name, n, k, count) in SHAPES {
            let k = if k % format.block_len() == 0 { k } else { 512 };
            let matrices: Vec<_> = (0..count)
                .map(|_| weights(format, n, k, &compute))
                .collect();
            for m in [1, 16, 512] {
                if m == 512 && name == "head" {
                    continue;
                }
                let x: Vec<f32> = (0..m * k)
                    .map(|i| (i * 7919 % 1000) as f32 / 500.0 - 1.0)
                    .collect();
                let (mut rows, mut y) = (QuantRows::new(), vec![0.0; m * n]);
                rows.quantise(&compute, &x, m, k);
                group.throughput(if m == 1 {
                    Throughput::Bytes(matrices[0].bytes() as u64)
                } else {
                    Throughput::Elements((2 * m * n * k) as u64)
                });
                let mut turn = 0;
                group.bench_function(BenchmarkId::new(name, m), |bencher| {
                    bencher.iter(|| {
                        turn += 1;
                        matmul(&compute, &mut y, n, &rows, &[(&matrices[turn % count], 0)]);
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
