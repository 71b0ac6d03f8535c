//! What training adds to a product with a bf16 weight: the adapter's columns, the thin
//! products that make them, and the product with the transpose, read from the same panels.

use super::{PANEL, PackedBf16, Part};
use crate::huge::WEIGHTS;
use crate::isa::Level;
use crate::ops::{round_bits, round_to_bf16_pairs};
use crate::par::Parts;
use crate::{Compute, Isa};
use std::cell::RefCell;
use std::ops::Range;

/// Rows of `X` that a task of [`PackedBf16::matmul_back`] takes: many, as each task turns its
/// piece of the weight once.
const BACK_ROWS: usize = 512;
/// Pairs of `n` that such a task turns at a time, whole panels: 184 KB.
const BACK_PAIRS: usize = 40 * PANEL / 2;
/// Rows of a task of [`thin`].
const THIN_ROWS: usize = 32;

/// Rounded rows, two neighbouring columns in a word.
#[derive(Clone, Copy, Debug)]
pub struct Pairs<'a> {
    words: &'a [u32],
    pub(crate) stride: usize,
}

impl<'a> Pairs<'a> {
    /// Rows `stride` words apart.
    pub fn new(words: &'a [u32], stride: usize) -> Self {
        Self { words, stride }
    }

    /// Without the first `n` words of every row.
    pub fn skip(self, n: usize) -> Self {
        let words = &self.words[n.min(self.words.len())..];
        Self { words, ..self }
    }

    pub(crate) fn rows_from(self, row: usize) -> &'a [u32] {
        &self.words[(row * self.stride).min(self.words.len())..]
    }

    /// Panics unless there are `m` rows of `n` words.
    pub(crate) fn check(self, m: usize, n: usize) {
        assert!(
            m == 0 || n == 0 || (m - 1) * self.stride + n <= self.words.len(),
            "X is [m, k] in pairs"
        );
    }
}

/// More columns of a weight, `E [n, k]`, few of which are not zero in a row: the adapters of
/// fused maps, each of which has its own rows and columns.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    /// Per panel of 48 rows: the first pair that is not zero, how many, and where.
    panels: Vec<(usize, usize, usize)>,
    words: Vec<u32>,
    n: usize,
    pairs: usize,
}

impl Tail {
    /// Rounds and packs `E [n, k]`: `parts` are blocks of rows with their (even) columns, and
    /// `value(row, col)` is asked within them only.
    pub fn pack(
        &mut self,
        n: usize,
        k: usize,
        parts: &[(Range<usize>, Range<usize>)],
        value: impl Fn(usize, usize) -> f32,
    ) {
        (self.n, self.pairs) = (n, k.div_ceil(2));
        self.panels.clear();
        self.words.clear();
        for first_row in (0..n).step_by(PANEL) {
            let rows = first_row..n.min(first_row + PANEL);
            let meets = |part: &&(Range<usize>, Range<usize>)| {
                part.0.start < rows.end && rows.start < part.0.end
            };
            let cols = parts.iter().filter(meets).map(|part| &part.1);
            let first = cols.clone().map(|c| c.start / 2).min().unwrap_or(0);
            let last = cols.map(|c| c.end.div_ceil(2)).max().unwrap_or(0);
            let at = self.words.len();
            self.panels.push((first, last - first, at));
            self.words.resize(at + (last - first) * PANEL, 0);
            for (part_rows, part_cols) in parts.iter().filter(meets) {
                for row in rows.start.max(part_rows.start)..rows.end.min(part_rows.end) {
                    for col in part_cols.clone() {
                        let word = at + (col / 2 - first) * PANEL + row - first_row;
                        self.words[word] |= round_bits(value(row, col)) << (16 * (col % 2));
                    }
                }
            }
        }
    }

    pub(super) fn check(&self, n: usize, h: Pairs<'_>, m: usize) {
        assert_eq!(self.n, n, "the tail has the rows of the weight");
        h.check(m, self.pairs);
    }

    /// # Safety
    /// As [`Part::add`]; [`Tail::check`] was called.
    pub(super) unsafe fn add(&self, isa: Isa, y: &Parts<f32>, part: &Part, h: Pairs<'_>) {
        let (first, n_pairs, at) = self.panels[part.first_col / PANEL];
        // SAFETY: passed on to the caller.
        unsafe { part.add(isa, y, h.skip(first), &self.words[at..], n_pairs, true) };
    }
}

/// A product with few columns, rounded: one of the parts of [`thin`].
#[derive(Clone, Copy, Debug)]
pub struct Thin<'a> {
    /// `X [m, k]`
    pub x: Pairs<'a>,
    /// `W [n, k]`
    pub w: &'a PackedBf16,
    /// Where its columns begin in the result.
    pub col: usize,
}

/// Computes `X W^T` of every part side by side and rounds: `out [m, width / 2]` in pairs.
///
/// Panics unless `width` is even and the parts' columns, in order, fill it.
pub fn thin(compute: &Compute, out: &mut [u32], width: usize, parts: &[Thin<'_>]) {
    assert!(width > 0 && width.is_multiple_of(2), "columns are paired");
    let m = out.len() / (width / 2);
    let mut end = 0;
    for part in parts {
        assert_eq!(part.col, end, "the parts are in order");
        end += part.w.n();
        part.x.check(m, part.w.k().div_ceil(2));
    }
    assert_eq!(end, width, "the parts fill the width");
    let isa = compute.isa();
    compute
        .pool()
        .chunks_mut(out, THIN_ROWS * width / 2, |task, out| {
            let rows = out.len() / (width / 2);
            let mut sums = vec![0.0f32; rows * width];
            let y = Parts::new(&mut sums);
            for part in parts {
                let pairs = part.w.k().div_ceil(2);
                let x = Pairs::new(part.x.rows_from(task * THIN_ROWS), part.x.stride);
                for (panel_idx, panel) in part.w.panels.chunks(PANEL * pairs.max(1)).enumerate() {
                    let first = panel_idx * PANEL;
                    let block = Part {
                        rows: 0..rows,
                        first_col: part.col + first,
                        n_cols: PANEL.min(part.w.n() - first),
                        y_stride: width,
                    };
                    // SAFETY: the sums are this task's own and hold [rows, width].
                    unsafe { block.add(isa, &y, x, panel, pairs, false) };
                }
            }
            let both = sums
                .chunks_exact(width)
                .zip(out.chunks_exact_mut(width / 2));
            both.for_each(|(sums, out)| round_to_bf16_pairs(isa, out, sums));
        });
}

thread_local! {
    /// A piece of a transposed weight.
    static TURNED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

impl PackedBf16 {
    /// Packs `W [n, k]` again in place: `value(i, j)` is its element.
    pub fn repack(&mut self, n: usize, k: usize, value: impl Fn(usize, usize) -> f32) {
        let pairs = k.div_ceil(2);
        (self.n, self.k) = (n, k);
        let len = n.div_ceil(PANEL) * PANEL * pairs;
        if self.panels.len() == len {
            self.panels.fill(0);
        } else {
            self.panels = WEIGHTS.zeroed(len);
        }
        for i in 0..n {
            let panel = &mut self.panels[i / PANEL * PANEL * pairs..];
            for p in 0..pairs {
                let low = round_bits(value(i, 2 * p));
                let high = if 2 * p + 1 < k {
                    round_bits(value(i, 2 * p + 1))
                } else {
                    0
                };
                panel[p * PANEL + i % PANEL] = low | high << 16;
            }
        }
    }

    /// Rounds new numbers `W [n, k]`, row-major, into the same panels, on the pool.
    ///
    /// Panics if there are not as many.
    pub fn set(&mut self, compute: &Compute, w: &[f32]) {
        assert_eq!(w.len(), self.n * self.k, "W is [n, k]");
        let (n, k, pairs) = (self.n, self.k, self.k.div_ceil(2));
        if k == 0 {
            return;
        }
        compute
            .pool()
            .chunks_mut(&mut self.panels, PANEL * pairs, |i, panel| {
                let rows = &w[i * PANEL * k..n.min((i + 1) * PANEL) * k];
                let mut words = vec![0; rows.len() / k * pairs];
                for (words, row) in words.chunks_exact_mut(pairs).zip(rows.chunks_exact(k)) {
                    round_to_bf16_pairs(compute.isa(), words, row);
                }
                for (p, out) in panel.chunks_exact_mut(PANEL).enumerate() {
                    let column = words[p..].iter().step_by(pairs);
                    out.iter_mut()
                        .zip(column)
                        .for_each(|(out, &word)| *out = word);
                }
            });
    }

    /// `DX [m, k] = DY [m, n] W + H E^T`, the input gradient of [`PackedBf16::matmul_pairs`],
    /// with `DY` rounded to pairs and the adapter's part as a [`Tail`].
    ///
    /// Each task turns its piece of the panels for all of its rows, so the weight is held once.
    /// Panics if an operand has another size.
    pub fn matmul_back(
        &self,
        compute: &Compute,
        dx: &mut [f32],
        dy: Pairs<'_>,
        m: usize,
        tail: Option<(&Tail, Pairs<'_>)>,
    ) {
        let pairs = self.n.div_ceil(2);
        dy.check(m, pairs);
        assert_eq!(dx.len(), m * self.k, "DX is [m, k]");
        if let Some((tail, h)) = tail {
            tail.check(self.k, h, m);
        }
        if m == 0 || self.k == 0 {
            return;
        }
        let n_panels = self.k.div_ceil(PANEL);
        // As many pieces as it takes, of like size.
        let rows = m.div_ceil(m.div_ceil(BACK_ROWS)).next_multiple_of(8);
        let dx = Parts::new(dx);
        compute.pool().run(n_panels * m.div_ceil(rows), |task| {
            let (panel_idx, first_row) = (task % n_panels, task / n_panels * rows);
            let first_col = panel_idx * PANEL;
            let part = Part {
                rows: first_row..m.min(first_row + rows),
                first_col,
                n_cols: PANEL.min(self.k - first_col),
                y_stride: self.k,
            };
            TURNED.with_borrow_mut(|turned| {
                let mut at = 0;
                while at < pairs || at == 0 {
                    let len = BACK_PAIRS.min(pairs - at);
                    self.turn(compute.isa(), turned, first_col, at..at + len);
                    // SAFETY: DX holds [m, k] (checked above); a task writes its part only.
                    unsafe { part.add(compute.isa(), &dx, dy.skip(at), turned, len, at > 0) };
                    at += len.max(1);
                }
            });
            if let Some((tail, h)) = tail {
                // SAFETY: as above.
                unsafe { tail.add(compute.isa(), &dx, &part, h) };
            }
        });
    }

    /// Columns `first_col..first_col + 48` of `W` over the rows of `row_pairs`, as a panel of
    /// the transpose. `row_pairs` begins with a panel.
    fn turn(&self, isa: Isa, out: &mut Vec<u32>, first_col: usize, row_pairs: Range<usize>) {
        let pairs = self.k.div_ceil(2);
        let cols = first_col / 2..pairs.min((first_col + PANEL) / 2);
        out.resize(row_pairs.len() * PANEL, 0);
        for (i, out) in out.chunks_mut(PANEL / 2 * PANEL).enumerate() {
            let panel_idx = row_pairs.start / (PANEL / 2) + i;
            let panel = &self.panels[panel_idx * PANEL * pairs..][..PANEL * pairs];
            let panel = &panel[cols.start * PANEL..cols.end * PANEL];
            #[cfg(target_arch = "x86_64")]
            if isa.0 >= Level::Avx512Bf16
                && cols.len() == PANEL / 2
                && let Ok(out) = <&mut [u32; PANEL / 2 * PANEL]>::try_from(&mut *out)
            {
                let panel = panel.try_into().expect("24 pairs of 48 words");
                // SAFETY: the level was detected.
                unsafe { x86::turn(out, panel) };
                continue;
            }
            let _ = isa;
            turn_scalar(out, panel);
        }
    }
}

/// Pairs of columns by 48 rows to pairs of rows by 48 columns; missing columns are zero.
fn turn_scalar(out: &mut [u32], panel: &[u32]) {
    for (q, out) in out.chunks_exact_mut(PANEL).enumerate() {
        out.fill(0);
        for (out, words) in out.chunks_exact_mut(2).zip(panel.chunks_exact(PANEL)) {
            let (a, b) = (words[2 * q], words[2 * q + 1]);
            out[0] = (a & 0xffff) | (b << 16);
            out[1] = (a >> 16) | (b & 0xffff_0000);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PANEL;
    use std::arch::x86_64::*;

    /// [`super::turn_scalar`] of a full panel: two rows of a pair of columns are 64 bits, which
    /// are put in order by bytes and then transposed in blocks of eight by eight.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn turn(out: &mut [u32; PANEL / 2 * PANEL], panel: &[u32; PANEL / 2 * PANEL]) {
        let order = _mm512_broadcast_i32x4(_mm_setr_epi8(
            0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
        ));
        for cols in 0..3 {
            for rows in 0..3 {
                let mut a = [_mm512_setzero_si512(); 8];
                for (i, a) in a.iter_mut().enumerate() {
                    let words: &[u32; 16] = (&panel[(cols * 8 + i) * PANEL + rows * 16..][..16])
                        .try_into()
                        .expect("sixteen words");
                    // SAFETY: the array is 64 bytes.
                    let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
                    *a = _mm512_shuffle_epi8(words, order);
                }
                let mut b = a;
                for i in 0..4 {
                    b[2 * i] = _mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]);
                }
                // b[2i + h]: rows h, h + 2, h + 4, h + 6 of column pairs 2i and 2i + 1.
                for h in 0..2 {
                    let low = _mm512_shuffle_i64x2::<0x88>(b[h], b[2 + h]);
                    let low_odd = _mm512_shuffle_i64x2::<0xdd>(b[h], b[2 + h]);
                    let high = _mm512_shuffle_i64x2::<0x88>(b[4 + h], b[6 + h]);
                    let high_odd = _mm512_shuffle_i64x2::<0xdd>(b[4 + h], b[6 + h]);
                    // low: rows h and h + 4 of columns 0..4; low_odd: rows h + 2 and h + 6.
                    let done = [
                        (h, _mm512_shuffle_i64x2::<0x88>(low, high)),
                        (h + 4, _mm512_shuffle_i64x2::<0xdd>(low, high)),
                        (h + 2, _mm512_shuffle_i64x2::<0x88>(low_odd, high_odd)),
                        (h + 6, _mm512_shuffle_i64x2::<0xdd>(low_odd, high_odd)),
                    ];
                    for (row, words) in done {
                        let at = (rows * 8 + row) * PANEL + cols * 16;
                        let out: &mut [u32; 16] =
                            (&mut out[at..][..16]).try_into().expect("sixteen words");
                        // SAFETY: the array is 64 bytes.
                        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), words) };
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::unit as numbers;

    fn pack(w: &[f32], n: usize, k: usize) -> PackedBf16 {
        PackedBf16::pack_rows(n, k, |i, out| out.copy_from_slice(&w[i * k..][..k]))
    }

    fn rounded(x: &[f32], cols: usize) -> Vec<u32> {
        let words = cols.div_ceil(2);
        let mut out = vec![0; x.len() / cols * words];
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(words)) {
            round_to_bf16_pairs(Isa::SCALAR, out, x);
        }
        out
    }

    #[test]
    fn the_turned_product_has_the_bits_of_the_transpose() {
        for (m, n, k) in [
            (5, 96, 96),
            (9, 100, 49),
            (1, 7, 150),
            (600, 2000, 48),
            (3, 97, 101),
        ] {
            let (dy, packed) = (numbers(m * n, 1), pack(&numbers(n * k, 2), n, k));
            let words = rounded(&dy, n);
            for isa in Isa::available() {
                let compute = Compute::with_isa(2, isa);
                let (mut want, mut got) = (vec![0.0; m * k], vec![0.0; m * k]);
                packed
                    .transpose()
                    .matmul_rounded(&compute, &mut want, &words, m);
                packed.matmul_back(
                    &compute,
                    &mut got,
                    Pairs::new(&words, n.div_ceil(2)),
                    m,
                    None,
                );
                assert_eq!(got, want, "{} {m}x{n}x{k}", isa.name());
            }
        }
    }

    #[test]
    fn a_tail_continues_the_chains() {
        // Two parts whose border lies within a panel; rows 100.. have no part.
        // Whole groups of pairs, which tiles sum before they go on.
        let (m, n, k) = (11, 130, 64);
        let parts = [(0..60, 0..4), (60..100, 4..8)];
        let (x, w, h, e) = (
            numbers(m * k, 1),
            numbers(n * k, 2),
            numbers(m * 8, 3),
            numbers(n * 8, 4),
        );
        let part_of = |row: usize| parts.iter().find(|part| part.0.contains(&row));
        let value = |row: usize, col: usize| {
            part_of(row)
                .filter(|part| part.1.contains(&col))
                .map_or(0.0, |_| e[row * 8 + col])
        };
        let mut tail = Tail::default();
        tail.pack(n, 8, &parts, |row, col| e[row * 8 + col]);
        // The oracle: one weight with all the columns.
        let whole = PackedBf16::pack_rows(n, k + 8, |i, out| {
            out[..k].copy_from_slice(&w[i * k..][..k]);
            (0..8).for_each(|c| out[k + c] = value(i, c));
        });
        let both: Vec<f32> = (0..m)
            .flat_map(|i| [&x[i * k..][..k], &h[i * 8..][..8]].concat())
            .collect();
        let (x_words, h_words) = (rounded(&x, k), rounded(&h, 8));
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let (mut want, mut got) = (vec![0.0; m * n], vec![0.0; m * n]);
            whole.matmul(&compute, &mut want, &both, m, &mut Vec::new());
            let tail = Some((&tail, Pairs::new(&h_words, 4)));
            pack(&w, n, k).matmul_pairs(&compute, &mut got, Pairs::new(&x_words, k / 2), m, tail);
            assert_eq!(got, want, "{}", isa.name());
        }
    }

    #[test]
    fn thin_products_are_the_rounded_wide_ones() {
        let (m, k) = (70, 40);
        let (x, a, b) = (numbers(m * k, 1), numbers(50 * k, 2), numbers(4 * 10, 3));
        let words = rounded(&x, k);
        let (a, mut narrow) = (pack(&a, 50, k), PackedBf16::pack_rows(0, 0, |_, _| {}));
        narrow.repack(4, 10, |i, j| b[i * 10 + j]);
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let pairs = Pairs::new(&words, k / 2);
            let mut out = vec![0; m * 27];
            let parts = [
                Thin {
                    x: pairs,
                    w: &a,
                    col: 0,
                },
                Thin {
                    x: pairs.skip(5),
                    w: &narrow,
                    col: 50,
                },
            ];
            thin(&compute, &mut out, 54, &parts);
            let (mut wide, mut part) = (vec![0.0; m * 50], vec![0.0; m * 4]);
            a.matmul(&compute, &mut wide, &x, m, &mut Vec::new());
            let columns: Vec<f32> = x.chunks(k).flat_map(|row| row[10..20].to_vec()).collect();
            pack(&b, 4, 10).matmul(&compute, &mut part, &columns, m, &mut Vec::new());
            let both: Vec<f32> = wide
                .chunks(50)
                .zip(part.chunks(4))
                .flat_map(|(a, b)| [a, b].concat())
                .collect();
            assert_eq!(out, rounded(&both, 54), "{}", isa.name());
        }
    }
}
