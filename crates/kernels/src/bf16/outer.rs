//! Sums of outer products of bf16 rows: `C += alpha U^T V`, the gradient of a weight.
//!
//! `U [T, m]` holds two rows in each word (see [`stack_rows`]), `V [T, n]` two columns, as
//! rounding leaves them; the kernel turns `V` while it loads. Each element is one chain of
//! pairs of rows in ascending order, from zero, added to `C` once.

use super::{Block, Pairs, STACK_PANEL, WIDE_PANEL};
use crate::isa::{Level, for_each_isa};
use crate::par::Parts;
use crate::{Compute, Isa};

/// Rows of `C` that a tile holds.
const TILE: usize = 8;
/// Columns of `C` that a tile holds: two vectors.
const COLS: usize = 32;
/// Rows and columns of `C` that a task takes.
const TASK: (usize, usize) = (48, 192);

/// One product; several run in one parallel region.
#[derive(Clone, Copy, Debug)]
pub struct Outer<'a> {
    /// `U` from its first column on: row pairs are `u_stride` words apart.
    pub u: &'a [u32],
    /// Words from a pair of rows of `U` to the next.
    pub u_stride: usize,
    /// `V` from its first column on, which is even: rows are `v_stride` words apart.
    pub v: &'a [u32],
    /// Words from a row of `V` to the next.
    pub v_stride: usize,
    /// Rows of `U` and `V`.
    pub t: usize,
    /// Rows of `C`: columns of `U`.
    pub m: usize,
    /// Columns of `C`: columns of `V`.
    pub n: usize,
    /// Where element (0, 0) of `C` lies in the output.
    pub at: usize,
    /// From a row of `C` to the next, and from a column to the next.
    pub strides: (usize, usize),
    /// Factor of the sum.
    pub alpha: f32,
}

/// Adds every product to its place in `c`.
///
/// Panics if an operand is too short or two products (or two elements of one) may overlap.
pub fn add_outer(compute: &Compute, c: &mut [f32], jobs: &[Outer<'_>]) {
    let mut tasks = Vec::new();
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for (i, job) in jobs.iter().enumerate() {
        if job.m == 0 || job.n == 0 || job.t == 0 {
            continue;
        }
        assert!(
            (job.t.div_ceil(2) - 1) * job.u_stride + job.m <= job.u.len(),
            "U is [T, m]"
        );
        assert!(
            (job.t - 1) * job.v_stride + job.n.div_ceil(2) <= job.v.len(),
            "V is [T, n]"
        );
        let (row, col) = job.strides;
        assert!(
            (col == 1 && row >= job.n) || (row == 1 && col >= job.m),
            "the elements of C do not overlap"
        );
        let end = job.at + (job.m - 1) * row + (job.n - 1) * col + 1;
        assert!(end <= c.len(), "C holds [m, n]");
        assert!(
            spans.iter().all(|&(a, b)| end <= a || b <= job.at),
            "products do not overlap"
        );
        spans.push((job.at, end));
        for first_row in (0..job.m).step_by(TASK.0) {
            tasks.extend(
                (0..job.n)
                    .step_by(TASK.1)
                    .map(|first_col| (i, first_row, first_col)),
            );
        }
    }
    let c = Parts::new(c);
    compute.pool().run(tasks.len(), |task| {
        let (job, first_row, first_col) = tasks[task];
        let job = &jobs[job];
        let (last_row, last_col) = (job.m.min(first_row + TASK.0), job.n.min(first_col + TASK.1));
        let mut tile = [[0.0; COLS]; TILE];
        for j in (first_col..last_col).step_by(COLS) {
            for i in (first_row..last_row).step_by(TILE) {
                let (rows, cols) = (TILE.min(last_row - i), COLS.min(last_col - j));
                sums(compute.isa(), &mut tile, job, (i, rows), (j, cols));
                let at = job.at + i * job.strides.0 + j * job.strides.1;
                let (lines, apart, len) = match job.strides {
                    (apart, 1) => (rows, apart, cols),
                    (_, apart) => (cols, apart, rows),
                };
                let is_turned = job.strides.1 != 1;
                let mut line = [0.0; COLS];
                for l in 0..lines {
                    for (s, line) in line.iter_mut().enumerate().take(len) {
                        *line = if is_turned { tile[s][l] } else { tile[l][s] };
                    }
                    let start = at + l * apart;
                    // SAFETY: inside C and in no other product by the assertions above, in no
                    // other task of this one as tasks cut rows and columns.
                    let c = unsafe { c.slice(start..start + len) };
                    add_line(compute.isa(), c, &line[..len], job.alpha);
                }
            }
        }
    });
}

for_each_isa! {
    /// `c = alpha sums + c` with one rounding.
    fn add_line(c: &mut [f32], sums: &[f32], alpha: f32) {
        for (c, &sum) in c.iter_mut().zip(sums) {
            *c = alpha.mul_add(sum, *c);
        }
    }
}

/// `C [m, n] += U^T V`, the gradient of a whole weight: both operands stacked, `U [T, m]` in panels of
/// [`STACK_PANEL`] columns and `V [T, n]` in panels of [`WIDE_PANEL`].
///
/// Each element goes on as one chain of pairs of rows in ascending order, from what `C` holds.
/// Panics if an operand has another size.
pub fn add_stacked(
    compute: &Compute,
    c: &mut [f32],
    (u, m): (&[u32], usize),
    (v, n): (&[u32], usize),
    t: usize,
) {
    /// Panels of `V` that a task takes.
    const PANELS: usize = 3;
    let pairs = t.div_ceil(2);
    let (u_panels, v_panels) = (m.div_ceil(STACK_PANEL), n.div_ceil(WIDE_PANEL));
    assert_eq!(c.len(), m * n, "C is [m, n]");
    assert_eq!(u.len(), u_panels * pairs * STACK_PANEL, "U is [T, m]");
    assert_eq!(v.len(), v_panels * pairs * WIDE_PANEL, "V is [T, n]");
    if pairs == 0 || m == 0 || n == 0 {
        return;
    }
    let c = Parts::new(c);
    let cuts = v_panels.div_ceil(PANELS);
    compute.pool().run(u_panels * cuts, |task| {
        let (row_panel, cut) = (task / cuts, task % cuts);
        let first_row = row_panel * STACK_PANEL;
        for col_panel in cut * PANELS..v_panels.min((cut + 1) * PANELS) {
            let first_col = col_panel * WIDE_PANEL;
            let block = Block {
                x: &u[row_panel * pairs * STACK_PANEL..][..pairs * STACK_PANEL],
                x_stride: 1,
                x_step: STACK_PANEL,
                panel: &v[col_panel * pairs * WIDE_PANEL..][..pairs * WIDE_PANEL],
                w_stride: WIDE_PANEL,
                y_stride: n,
                n_rows: STACK_PANEL.min(m - first_row),
                n_cols: WIDE_PANEL.min(n - first_col),
                n_pairs: pairs,
                go_on: true,
            };
            // SAFETY: C holds [m, n]; tasks have their own rows and columns of it.
            unsafe { block.run(compute.isa(), c.at(first_row * n + first_col)) };
        }
    });
}

/// The sums of one tile.
fn sums(
    isa: Isa,
    tile: &mut [[f32; COLS]; TILE],
    job: &Outer<'_>,
    (i, rows): (usize, usize),
    (j, cols): (usize, usize),
) {
    #[cfg(target_arch = "x86_64")]
    if isa.0 >= Level::Avx512Bf16 {
        // SAFETY: the level was detected; the bounds were checked by `add_outer`.
        return unsafe { x86::sums(tile, job, (i, rows), (j, cols)) };
    }
    let (u, v) = (&job.u[i..], &job.v[j / 2..]);
    widened(
        isa,
        tile,
        u,
        job.u_stride,
        v,
        job.v_stride,
        job.t,
        rows,
        cols,
    );
}

for_each_isa! {
    /// The levels without bf16 products: halves are widened, the odd row of a pair first.
    fn widened(tile: &mut [[f32; COLS]; TILE], u: &[u32], u_stride: usize, v: &[u32], v_stride: usize, t: usize, rows: usize, cols: usize) {
        *tile = [[0.0; COLS]; TILE];
        let words = cols.div_ceil(2);
        for pair in 0..t.div_ceil(2) {
            let (mut even, mut odd) = ([0u32; COLS / 2], [0u32; COLS / 2]);
            even[..words].copy_from_slice(&v[2 * pair * v_stride..][..words]);
            if 2 * pair + 1 < t {
                odd[..words].copy_from_slice(&v[(2 * pair + 1) * v_stride..][..words]);
            }
            let (mut first, mut second) = ([0.0f32; COLS], [0.0f32; COLS]);
            for s in 0..COLS / 2 {
                first[2 * s] = f32::from_bits(even[s] << 16);
                first[2 * s + 1] = f32::from_bits(even[s] & 0xffff_0000);
                second[2 * s] = f32::from_bits(odd[s] << 16);
                second[2 * s + 1] = f32::from_bits(odd[s] & 0xffff_0000);
            }
            for (sums, &u) in tile.iter_mut().zip(&u[pair * u_stride..][..rows]) {
                let (low, high) = (f32::from_bits(u << 16), f32::from_bits(u & 0xffff_0000));
                for s in 0..COLS {
                    let sum = high.mul_add(second[s], sums[s]);
                    sums[s] = low.mul_add(first[s], sum);
                }
            }
        }
    }
}

/// Stacks the rows of `X [T, cols]` in pairs (see [`stack_rows`]), in panels of `panel`
/// columns that lie one after the other: `[panels][T / 2][panel]`, padded with zeros.
///
/// Panics unless `cols` and `panel` are even and `x` holds the rows.
pub fn stack(
    compute: &Compute,
    out: &mut Vec<u32>,
    x: Pairs<'_>,
    t: usize,
    cols: usize,
    panel: usize,
) {
    /// Row pairs of a task.
    const PAIRS: usize = 64;
    assert!(panel > 0 && panel.is_multiple_of(2) && cols.is_multiple_of(2));
    x.check(t, cols / 2);
    let (pairs, n_panels) = (t.div_ceil(2), cols.div_ceil(panel));
    let cuts = pairs.div_ceil(PAIRS);
    out.resize(n_panels * pairs * panel, 0);
    let (isa, out) = (compute.isa(), Parts::new(out));
    compute.pool().run(n_panels * cuts, |task| {
        let (panel_idx, first) = (task / cuts, task % cuts * PAIRS);
        let last = pairs.min(first + PAIRS);
        let at = panel_idx * pairs;
        // SAFETY: tasks have their own panels and row pairs, inside `out` as it was sized.
        let out = unsafe { out.slice((at + first) * panel..(at + last) * panel) };
        let width = panel.min(cols - panel_idx * panel);
        let zeros = vec![0; width / 2];
        for (i, out) in out.chunks_exact_mut(panel).enumerate() {
            let row = |row: usize| &x.rows_from(row)[panel_idx * panel / 2..][..width / 2];
            let (even, odd) = (2 * (first + i), 2 * (first + i) + 1);
            let (out, rest) = out.split_at_mut(width);
            rest.fill(0);
            stack_rows(isa, out, row(even), if odd < t { row(odd) } else { &zeros });
        }
    });
}

for_each_isa! {
    /// Puts rows `2 i` and `2 i + 1` of rounded pairs on top of each other: word `j` of the
    /// result holds column `j` of both, the even row in the low half.
    ///
    /// Shapes: out [D] (D even), even, odd [D / 2]; an odd last row has zeros beside it.
    pub fn stack_rows(out: &mut [u32], even: &[u32], odd: &[u32]) {
        assert!(out.len() == 2 * even.len() && out.len() == 2 * odd.len());
        for ((out, &a), &b) in out.chunks_exact_mut(2).zip(even).zip(odd) {
            out[0] = (a & 0xffff) | (b << 16);
            out[1] = (a >> 16) | (b & 0xffff_0000);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{COLS, Outer, TILE};
    use crate::bf16::as_bf16;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512 with BF16; the job's operands hold the rows and columns named.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn sums(
        tile: &mut [[f32; COLS]; TILE],
        job: &Outer<'_>,
        (i, rows): (usize, usize),
        (j, cols): (usize, usize),
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            match rows {
                8 => rows_of::<8>(tile, job, i, j, cols),
                7 => rows_of::<7>(tile, job, i, j, cols),
                6 => rows_of::<6>(tile, job, i, j, cols),
                5 => rows_of::<5>(tile, job, i, j, cols),
                4 => rows_of::<4>(tile, job, i, j, cols),
                3 => rows_of::<3>(tile, job, i, j, cols),
                2 => rows_of::<2>(tile, job, i, j, cols),
                _ => rows_of::<1>(tile, job, i, j, cols),
            }
        }
    }

    /// # Safety
    /// As [`sums`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn rows_of<const MR: usize>(
        tile: &mut [[f32; COLS]; TILE],
        job: &Outer<'_>,
        i: usize,
        j: usize,
        cols: usize,
    ) {
        // Halves of two rows that belong to one column, for the first and the last 16 columns.
        let mut index = [[0u16; 32]; 2];
        for s in 0..32 {
            let half = (s / 2) as u16;
            index[0][s] = half + 32 * (s % 2) as u16;
            index[1][s] = half + 16 + 32 * (s % 2) as u16;
        }
        let words = cols.div_ceil(2);
        let mask: __mmask16 = if words >= 16 { !0 } else { (1 << words) - 1 };
        // SAFETY: masked words are never touched; the rest is in bounds by the caller's promise.
        unsafe {
            let first = _mm512_loadu_epi16(index[0].as_ptr().cast());
            let second = _mm512_loadu_epi16(index[1].as_ptr().cast());
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            let mut u = job.u.as_ptr().add(i).cast::<i32>();
            let mut v = job.v.as_ptr().add(j / 2).cast::<i32>();
            for pair in 0..job.t.div_ceil(2) {
                let even = _mm512_maskz_loadu_epi32(mask, v);
                let below = if 2 * pair + 1 < job.t { mask } else { 0 };
                let odd = _mm512_maskz_loadu_epi32(below, v.wrapping_add(job.v_stride));
                let left = as_bf16(_mm512_permutex2var_epi16(even, first, odd));
                let right = as_bf16(_mm512_permutex2var_epi16(even, second, odd));
                for r in 0..MR {
                    let x = as_bf16(_mm512_set1_epi32(*u.add(r)));
                    acc[r][0] = _mm512_dpbf16_ps(acc[r][0], x, left);
                    acc[r][1] = _mm512_dpbf16_ps(acc[r][1], x, right);
                }
                u = u.wrapping_add(job.u_stride);
                v = v.wrapping_add(2 * job.v_stride);
            }
            for r in 0..MR {
                _mm512_storeu_ps(tile[r].as_mut_ptr(), acc[r][0]);
                _mm512_storeu_ps(tile[r].as_mut_ptr().add(16), acc[r][1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::unit as numbers;
    use crate::ops::round_to_bf16_pairs;
    use half::bf16;

    fn rounded(x: &[f32], cols: usize) -> Vec<u32> {
        let mut words = vec![0; x.len() / cols * cols.div_ceil(2)];
        for (x, words) in x
            .chunks_exact(cols)
            .zip(words.chunks_exact_mut(cols.div_ceil(2)))
        {
            round_to_bf16_pairs(Isa::SCALAR, words, x);
        }
        words
    }

    #[test]
    fn a_whole_weight_s_gradient_is_the_definition_and_adds_up() {
        for (t, m, n) in [(1, 2, 2), (7, 50, 130), (64, 48, 64), (33, 100, 34)] {
            let (u, v) = (numbers(t * m, 3), numbers(t * n, 4));
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let mut widened: Option<Vec<f32>> = None;
            for (isa, threads) in Isa::available().into_iter().zip([1, 2, 3, 2, 1]) {
                let compute = Compute::with_isa(threads, isa);
                let stacked = |x: &[f32], cols: usize, panel: usize| {
                    let (words, mut out) = (rounded(x, cols), Vec::new());
                    stack(
                        &compute,
                        &mut out,
                        Pairs::new(&words, cols / 2),
                        t,
                        cols,
                        panel,
                    );
                    out
                };
                let (us, vs) = (stacked(&u, m, STACK_PANEL), stacked(&v, n, WIDE_PANEL));
                let mut c = vec![1.0; m * n];
                add_stacked(&compute, &mut c, (&us, m), (&vs, n), t);
                for (at, got) in c.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let terms = (0..t).map(|p| round(u[p * m + i]) * round(v[p * n + j]));
                    let want = 1.0 + terms.sum::<f64>();
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{} {at}", isa.name());
                }
                if isa.0 < Level::Avx512Bf16 {
                    assert_eq!(
                        widened.get_or_insert_with(|| c.clone()),
                        &c,
                        "{}",
                        isa.name()
                    );
                }
            }
        }
    }

    #[test]
    fn two_products_equal_the_definition_on_every_level() {
        for (t, m, n) in [(1, 2, 1), (7, 16, 33), (64, 50, 200), (33, 8, 32)] {
            let (u, v) = (numbers(t * m, 1), numbers(t * n, 2));
            let v_words = rounded(&v, n);
            let mut stacked = Vec::new();
            let pairs = rounded(&u, m);
            stack(
                &Compute::new(2),
                &mut stacked,
                Pairs::new(&pairs, m / 2),
                t,
                m,
                m,
            );
            // In panels: the same numbers elsewhere.
            let mut panels = Vec::new();
            stack(
                &Compute::new(2),
                &mut panels,
                Pairs::new(&pairs, m / 2),
                t,
                m,
                6,
            );
            for i in 0..m {
                let at = (i / 6 * t.div_ceil(2) + t / 2) * 6 + i % 6;
                assert_eq!(
                    panels.get(at),
                    (t % 2 == 1)
                        .then(|| &stacked[t / 2 * m + i])
                        .or(panels.get(at))
                );
            }
            let job = Outer {
                u: &stacked,
                u_stride: m,
                v: &v_words,
                v_stride: n.div_ceil(2),
                t,
                m,
                n,
                at: 3,
                strides: (n, 1),
                alpha: 0.5,
            };
            // The same once more, transposed, behind it.
            let other = Outer {
                at: 3 + m * n,
                strides: (1, m),
                ..job
            };
            let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
            let mut widened: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut c = vec![1.0; 3 + 2 * m * n];
                add_outer(&Compute::with_isa(2, isa), &mut c, &[job, other]);
                for i in 0..m {
                    for j in 0..n {
                        let sum: f64 = (0..t)
                            .map(|p| round(u[p * m + i]) * round(v[p * n + j]))
                            .sum();
                        let got = c[3 + i * n + j];
                        assert!(
                            (f64::from(got) - 1.0 - 0.5 * sum).abs() < 1e-4,
                            "{}",
                            isa.name()
                        );
                        assert_eq!(got.to_bits(), c[3 + m * n + j * m + i].to_bits());
                    }
                }
                if isa.0 < Level::Avx512Bf16 {
                    assert_eq!(
                        widened.get_or_insert_with(|| c.clone()),
                        &c,
                        "{}",
                        isa.name()
                    );
                }
            }
        }
    }
}
