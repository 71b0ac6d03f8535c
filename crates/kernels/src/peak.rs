//! What this machine can do at most: the roofs that products are held against.
//!
//! Each measurement takes some tens of milliseconds on all threads of a [`Compute`].

use crate::Compute;
use crate::isa::Level;
use crate::par::Parts;
use std::hint::black_box;
use std::time::Instant;

/// Tasks of one measurement for each thread.
const TASKS: usize = 16;
/// Measurements, of which the best counts.
const ROUNDS: usize = 5;

/// Integer operations (a multiplication and an addition are two) in units of 10^9 a second,
/// of 8-bit dot products in registers.
pub fn int8_gops(compute: &Compute) -> f64 {
    rate(compute, |compute| match compute.isa().0 {
        // SAFETY: the level was detected.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Vnni | Level::Avx512Bf16 => unsafe { x86::dpbusd() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Amx => unsafe { x86::tiles(|i| crate::amx::add_int8(i), 64) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => unsafe { x86::maddubs() },
        Level::Scalar => multiply_integers(),
    })
}

/// Float operations in units of 10^9 a second, of bf16 dot products in registers; of f32 ones
/// where the machine has no bf16.
pub fn bf16_gflops(compute: &Compute) -> f64 {
    rate(compute, |compute| match compute.isa().0 {
        // SAFETY: the level was detected.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { x86::dpbf16() },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Amx => unsafe { x86::tiles(|i| crate::amx::add_bf16(i), 32) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 | Level::Avx512Vnni => unsafe { x86::fma() },
        Level::Scalar => multiply_floats(),
    })
}

/// Bytes in units of 10^9 a second, read in order from memory that no cache holds.
pub fn read_gbs(compute: &Compute) -> f64 {
    const CHUNK: usize = 1 << 20;
    // 256 MB: more than the caches of a server.
    let mut words = vec![1u64; 32 * CHUNK];
    let parts = Parts::new(&mut words);
    let n = 32 * CHUNK / (CHUNK / 8);
    rate_of(|| {
        compute.pool().run(n, |i| {
            // SAFETY: only read here, each chunk by one task.
            let words = unsafe { parts.slice(i * (CHUNK / 8)..(i + 1) * (CHUNK / 8)) };
            black_box(read::sum(compute.isa(), words));
        });
        (n * CHUNK) as f64
    })
}

mod read {
    crate::isa::for_each_isa! {
        #[allow(unreachable_pub)]
        pub fn sum(words: &[u64]) -> u64 {
            let mut lanes = [0u64; 64];
            for words in words.as_chunks::<64>().0 {
                for (lane, word) in lanes.iter_mut().zip(words) {
                    *lane = lane.wrapping_add(*word);
                }
            }
            lanes.into_iter().fold(0, u64::wrapping_add)
        }
    }
}

/// Runs `task`, which returns its count of operations, on all threads.
fn rate(compute: &Compute, task: impl Fn(&Compute) -> f64 + Sync) -> f64 {
    let n_tasks = TASKS * compute.threads();
    rate_of(|| {
        let mut done = vec![0.0; n_tasks];
        compute
            .pool()
            .chunks_mut(&mut done, 1, |_, done| done[0] = task(compute));
        done.iter().sum()
    })
}

/// The best rate of `round`, which returns its count, in units of 10^9 a second.
fn rate_of(mut round: impl FnMut() -> f64) -> f64 {
    (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            round() / start.elapsed().as_secs_f64() / 1e9
        })
        .fold(0.0, f64::max)
}

fn multiply_integers() -> f64 {
    const TURNS: usize = 20_000;
    let (a, mut b) = (black_box([3u8; 64]), [5i8; 64]);
    let mut sums = [0i32; 64];
    for _ in 0..TURNS {
        // Unknown each turn, so that the products are not hoisted out.
        b = black_box(b);
        for ((sum, &a), &b) in sums.iter_mut().zip(&a).zip(&b) {
            *sum = sum.wrapping_add(i32::from(a) * i32::from(b));
        }
    }
    black_box(sums);
    (TURNS * 64 * 2) as f64
}

fn multiply_floats() -> f64 {
    const TURNS: usize = 20_000;
    let (a, b) = (black_box([0.5f32; 64]), black_box([0.25f32; 64]));
    let mut sums = [0.0f32; 64];
    for _ in 0..TURNS {
        for ((sum, &a), &b) in sums.iter_mut().zip(&a).zip(&b) {
            *sum = a.mul_add(b, *sum);
        }
    }
    black_box(sums);
    (TURNS * 64 * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::amx::{self, TILE};
    use std::arch::x86_64::*;
    use std::hint::black_box;

    const TURNS: usize = 100_000;

    /// Products of whole tiles over `depth` terms, three chains of them.
    ///
    /// # Safety
    /// Tiles are available; `add` adds the product of the operands to a sum.
    pub(super) unsafe fn tiles(add: impl Fn(usize), depth: usize) -> f64 {
        let (zeros, turns) = ([0u32; TILE * TILE], TURNS / 10);
        // SAFETY: the caller vouches for tiles; the operands are one tile each.
        unsafe {
            amx::shape(TILE, TILE);
            amx::left(zeros.as_ptr(), 4 * TILE);
            for i in 0..amx::SUMS {
                amx::right(i, zeros.as_ptr(), 4 * TILE);
                amx::zero(i);
            }
            for _ in 0..turns {
                (0..amx::SUMS).for_each(&add);
            }
        }
        (turns * amx::SUMS * 2 * TILE * TILE * depth) as f64
    }

    /// Twelve independent chains hide the latency of an operation.
    macro_rules! chains {
        ($name:ident, $features:literal, $zero:expr, $a:expr, $per_op:expr, |$sum:ident, $x:ident| $op:expr) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name() -> f64 {
                let mut sums = [$zero; 12];
                let $x = black_box($a);
                for _ in 0..TURNS {
                    for $sum in &mut sums {
                        *$sum = $op;
                    }
                }
                black_box(sums);
                (TURNS * 12 * $per_op) as f64
            }
        };
    }

    chains!(
        dpbusd,
        "avx512f,avx512vnni",
        _mm512_setzero_si512(),
        _mm512_set1_epi8(3),
        128,
        |sum, x| _mm512_dpbusd_epi32(*sum, x, x)
    );
    chains!(
        maddubs,
        "avx2",
        _mm256_setzero_si256(),
        _mm256_set1_epi8(3),
        64,
        |sum, x| _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, x))
    );
    chains!(
        fma,
        "avx2,fma",
        _mm256_setzero_ps(),
        _mm256_set1_ps(0.5),
        16,
        |sum, x| _mm256_fmadd_ps(*sum, x, x)
    );
    chains!(
        dpbf16,
        "avx512f,avx512bw,avx512bf16",
        _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)),
        64,
        |sum, x| _mm512_dpbf16_ps(*sum, x, x)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn every_roof_is_a_positive_number() {
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            for roof in [int8_gops(&compute), bf16_gflops(&compute)] {
                assert!(roof.is_finite() && roof > 0.0, "{} {roof}", isa.name());
            }
        }
        assert!(read_gbs(&Compute::new(1)) > 0.0);
    }
}
