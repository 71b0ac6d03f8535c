//! Products with bf16 weights at the shapes of SmolLM2-135M, as training has them: forward, and back to the input.
//!
//! `cargo bench -p bantam-kernels --bench bf16`. Elements are float operations, so `Gelem/s` reads as GFLOP/s. Each
//! shape has as many matrices as the model has layers, so that no cache of a core holds the weights.

use bantam_kernels::bf16::{PackedBf16, Pairs, round_rows};
use bantam_kernels::{Compute, peak};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;

/// Name, outputs, inputs and count of matrices.
const SHAPES: [(&str, usize, usize, usize); 3] = [
    ("qkv", 960, 576, 30),
    ("gate-up", 3072, 576, 30),
    ("down", 576, 1536, 30),
];
/// Tokens of a batch.
const ROWS: [usize; 3] = [90, 350, 1400];

fn products(criterion: &mut Criterion) {
    let compute = Compute::detect();
    println!("roof: {:.0} GFLOP/s bf16", peak::bf16_gflops(&compute));
    for (name, n, k, count) in SHAPES {
        let weights: Vec<PackedBf16> = (0..count)
            .map(|i| {
                PackedBf16::pack_rows(n, k, |row, out| {
                    out.iter_mut()
                        .enumerate()
                        .for_each(|(col, x)| *x = ((row + 3 * col + i) % 7) as f32 - 3.0);
                })
            })
            .collect();
        let mut group = criterion.benchmark_group(name);
        group.measurement_time(Duration::from_secs(2));
        for m in ROWS {
            group.throughput(Throughput::Elements((2 * m * n * k) as u64));
            let (mut x, mut dy) = (Vec::new(), Vec::new());
            round_rows(&compute, &mut x, &vec![0.5; m * k], k);
            round_rows(&compute, &mut dy, &vec![0.5; m * n], n);
            let (mut y, mut dx) = (vec![0.0; m * n], vec![0.0; m * k]);
            let mut turn = (0..count).cycle();
            group.bench_function(BenchmarkId::new("forward", m), |bencher| {
                bencher.iter(|| {
                    let w = &weights[turn.next().unwrap_or(0)];
                    w.matmul_rounded(&compute, &mut y, &x, m);
                });
            });
            group.bench_function(BenchmarkId::new("back", m), |bencher| {
                bencher.iter(|| {
                    let w = &weights[turn.next().unwrap_or(0)];
                    w.matmul_back(&compute, &mut dx, Pairs::new(&dy, n / 2), m, None);
                });
            });
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
