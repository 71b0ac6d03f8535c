//! Products with a quantised weight: `Y = X W^T` from integers.
//!
//! Weights stay in the precision of their file, repacked once for streaming; activations are
//! quantised to eight bits per 32 of a row ([`QuantRows`]). A result is defined as
//!
//! ```text
//! per block of 32 columns (16 in Q2_K, Q3_K and Q6_K), in ascending order:
//!   dot = sum_i (w_code_i - zero) x_code_i                          exact, in i32
//!   y   = fma(dot as f32, w_scale * x_scale, y)
//!   y   = fma((w_code_s - zero) as f32, w_scale * x_s, y)           a block with a spike x_s
//!   y   = fma(w_min, x_scale * sum_i x_code_i [+ x_s], y)           formats with a minimum
//! ```
//!
//! and nothing else, so its bits depend neither on the instruction set nor on the batch, the
//! tiling or the threads.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod layout;
mod portable;
mod rows;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod vnni_wide;

pub use rows::QuantRows;

use crate::huge::{Piece, WEIGHTS};
use crate::isa::Level;
use crate::par::Parts;
use crate::quant::{self, Format};
use crate::{Compute, Isa};
use layout::{Layout, Line, PANEL, STEP, Wide};
use rows::{Record, TILE};
use std::cell::Cell;
use std::ops::Range;

/// Tiles of `X` that a task takes: 132 rows, whose records take a part of L2.
const TASK_TILES: usize = 22;
/// Weights that a task reads in one go: long enough to stream, short enough that threads end
/// together.
const TASK_BYTES: usize = 48 << 10;
/// Tiles of a panel from which on it pays to unpack it to bytes first: the rows that a thread takes
/// of a prompt are seven.
const WIDE_TILES: usize = 7;
/// How far ahead of a single tile to ask for weights, in lines.
const AHEAD: usize = 64;

thread_local! {
    /// A widened panel; grows to the largest and stays.
    static WIDE: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// A weight matrix `W [n, k]` in a block format, packed for products.
#[derive(Debug)]
pub struct QuantMatrix {
    format: Format,
    n: usize,
    k: usize,
    n_steps: usize,
    panel_lines: usize,
    lines: Piece<Line>,
}

impl Clone for QuantMatrix {
    fn clone(&self) -> Self {
        let lines = WEIGHTS.copy(&self.lines);
        Self { lines, ..*self }
    }
}

impl QuantMatrix {
    /// Packs `W [n, k]` from its rows of blocks as they lie in a file.
    ///
    /// Every block format keeps its weights exactly: `Q4_0`, `Q4_1`, `Q8_0`, `Q4_K` and `Q6_K`
    /// at about the file's size, the others in the next wider layout.
    ///
    /// Panics if the format is plain, `k` is not whole blocks or `bytes` has another length.
    pub fn pack(format: Format, n: usize, k: usize, bytes: &[u8], compute: &Compute) -> Self {
        let row_bytes = format.bytes_for(k);
        assert_eq!(bytes.len(), n * row_bytes, "W is [n, k]");
        let mut out = Self::empty(format, n, k);
        let panel_lines = out.panel_lines;
        if panel_lines > 0 {
            let pool = compute.pool();
            pool.chunks_mut(&mut out.lines, panel_lines, |p, panel| {
                let rows = bytes[p * PANEL * row_bytes..].chunks_exact(row_bytes);
                for (r, row) in rows.take(PANEL).enumerate() {
                    layout::pack_row(format, panel, r, row);
                }
            });
        }
        out
    }

    /// Quantises `W [n, k]` to `Q8_0`: `row(i, out)` writes row `i` into `out [k]`.
    ///
    /// Rows are asked for in ascending order, so that a caller can stream them; a `k` that is
    /// not whole blocks is filled up with zeros.
    pub fn quantise_q8(n: usize, k: usize, mut row: impl FnMut(usize, &mut [f32])) -> Self {
        let mut out = Self::empty(Format::Q8_0, n, k);
        let mut values = vec![0.0; out.n_steps * STEP];
        let mut bytes = Vec::new();
        for i in 0..n {
            row(i, &mut values[..k]);
            bytes.clear();
            quant::quantize(Format::Q8_0, &values, &mut bytes);
            let panel = &mut out.lines[i / PANEL * out.panel_lines..][..out.panel_lines];
            layout::pack_row(Format::Q8_0, panel, i % PANEL, &bytes);
        }
        out
    }

    fn empty(format: Format, n: usize, k: usize) -> Self {
        let n_steps = k.div_ceil(STEP);
        let panel_lines = Layout::of(format).panel_lines(n_steps);
        Self {
            format,
            n,
            k,
            n_steps,
            panel_lines,
            // Zeroed by the system when first touched, that is by the threads that pack.
            lines: WEIGHTS.zeroed(n.div_ceil(PANEL) * panel_lines),
        }
    }

    /// The format of the weights.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows of `W`: outputs of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns of `W`: inputs of the product.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Row `i` of `W` into `out [k]`: the bits of [`quant::dequantize`].
    pub fn row(&self, out: &mut [f32], i: usize) {
        assert!(i < self.n && out.len() == self.k, "the row exists and fits");
        let layout = Layout::of(self.format);
        let (panel, r) = (self.panel(i / PANEL), i % PANEL);
        let mut wide = Wide::EMPTY;
        for (s, out) in out.chunks_mut(STEP).enumerate() {
            wide.read(layout, panel, s);
            for (j, out) in out.iter_mut().enumerate() {
                let half = if layout.sixteens() { j / 16 } else { 0 };
                let code = wide.codes[j / 4][4 * r + j % 4];
                let value = (i32::from(code) - layout.zero as i32) as f32;
                *out = wide.scales[half][r] * value;
                if layout.has_min() {
                    *out += wide.mins[half][r];
                }
            }
        }
    }

    fn n_panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    fn panel(&self, p: usize) -> &[Line] {
        &self.lines[p * self.panel_lines..][..self.panel_lines]
    }
}

/// Several maps of the same input in one parallel region.
///
/// `parts` pairs each `W [n, k]` with the column of `y [m, y_stride]` at which its `n` outputs
/// start. Columns that no part covers are left alone.
///
/// Panics if `y` is not `[m, y_stride]`, a part has another `k`, or two parts overlap.
pub fn matmul(
    compute: &Compute,
    y: &mut [f32],
    y_stride: usize,
    x: &QuantRows,
    parts: &[(&QuantMatrix, usize)],
) {
    assert_eq!(y.len(), x.m() * y_stride, "Y is [m, y_stride]");
    for (i, (w, col)) in parts.iter().enumerate() {
        assert_eq!(w.k, x.k(), "W and X have the same k");
        assert!(col + w.n <= y_stride, "the columns of a part lie within Y");
        let apart = |(other, at): &(&QuantMatrix, usize)| *at >= col + w.n || at + other.n <= *col;
        assert!(parts[..i].iter().all(apart), "parts do not overlap");
    }
    let n_panels: usize = parts.iter().map(|(w, _)| w.n_panels()).sum();
    if x.m() == 0 || n_panels == 0 {
        return;
    }
    let n_chunks = x.n_tiles().div_ceil(TASK_TILES);
    let chunk_tiles = x.n_tiles().div_ceil(n_chunks);
    let panel_bytes = parts[0].0.panel_lines * size_of::<Line>();
    // Where a panel takes long, two make a task: while one is multiplied the next is fetched.
    let per_task = if x.n_tiles() >= WIDE_TILES {
        2
    } else {
        let most = n_panels / (2 * compute.threads());
        (TASK_BYTES / panel_bytes.max(1)).clamp(1, most.max(1))
    };
    let n_runs: usize = parts
        .iter()
        .map(|(w, _)| w.n_panels().div_ceil(per_task))
        .sum();
    let y = Parts::new(y);
    compute.pool().run(n_runs * n_chunks, |task| {
        let (mut run, chunk) = (task % n_runs, task / n_runs);
        let tiles = chunk * chunk_tiles..((chunk + 1) * chunk_tiles).min(x.n_tiles());
        for (w, col) in parts {
            let runs = w.n_panels().div_ceil(per_task);
            if run < runs {
                let panels = run * per_task..((run + 1) * per_task).min(w.n_panels());
                // SAFETY: Y holds [m, y_stride]; a task writes the rows of its tiles and the
                // columns of its panels, which no other task does since parts are disjoint.
                unsafe { product(compute.isa(), &y, y_stride, x, (w, *col), panels, tiles) };
                return;
            }
            run -= runs;
        }
    });
}

/// One task of [`matmul`].
///
/// # Safety
/// `y` holds `[m, y_stride]`, and nobody else touches the rows of `tiles` in the columns of
/// `panels` meanwhile.
unsafe fn product(
    isa: Isa,
    y: &Parts<f32>,
    y_stride: usize,
    x: &QuantRows,
    (w, col): (&QuantMatrix, usize),
    panels: Range<usize>,
    tiles: Range<usize>,
) {
    let layout = Layout::of(w.format);
    #[cfg(target_arch = "x86_64")]
    let wide = tiles.len() >= WIDE_TILES && isa.0 >= Level::Avx512Vnni;
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    let mut scratch = if wide { WIDE.take() } else { Vec::new() };
    for p in panels.clone() {
        let last = p + 1 == panels.end;
        if wide {
            // SAFETY: the level was detected; a panel holds its steps.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                vnni_wide::widen(w.format, w.panel(p), w.n_steps, &mut scratch);
            }
        }
        for t in tiles.clone() {
            let (records, n_rows) = x.tile(t);
            let mut tile = Tile {
                panel: w.panel(p),
                n_steps: w.n_steps,
                x: records,
                n_rows,
                n_cols: PANEL.min(w.n - p * PANEL),
                y_stride,
                ahead: AHEAD,
                ahead_lines: layout.step_lines(),
                ahead_steps: w.n_steps,
            };
            // Ask for weights ahead of the hardware, but for none that another thread reads: a
            // single tile for what it reaches next, the first of many for the next panel.
            if tiles.len() == 1 {
                if last {
                    tile.ahead_steps = w.n_steps.saturating_sub(AHEAD / layout.step_lines());
                }
            } else {
                let each = layout.step_lines().div_ceil(tiles.len());
                let first = (t - tiles.start) * each;
                tile.ahead = w.panel_lines + first;
                tile.ahead_lines = each.min(layout.step_lines().saturating_sub(first));
                if last || tile.ahead_lines == 0 {
                    tile.ahead_steps = 0;
                }
            }
            let y = y.at(t * TILE * y_stride + col + p * PANEL);
            #[cfg(target_arch = "x86_64")]
            if wide {
                // SAFETY: the tile's part of Y is the caller's to write; `scratch` has the panel.
                unsafe { vnni_wide::product(w.format, &tile, &scratch, y) };
                continue;
            }
            // SAFETY: as above.
            unsafe { tile.run(isa, w.format, y) };
        }
    }
    if wide {
        WIDE.set(scratch);
    }
}

/// Only some rows of `W`: `y [m, rows.len()]`, the same bits as the full product has there.
///
/// Rows in ascending order cost least.
///
/// Panics if `y` has another length, `k` differs or a row does not exist.
pub fn matmul_rows(compute: &Compute, y: &mut [f32], x: &QuantRows, w: &QuantMatrix, rows: &[u32]) {
    assert_eq!(y.len(), x.m() * rows.len(), "Y is [m, rows]");
    assert_eq!(w.k, x.k(), "W and X have the same k");
    assert!(rows.iter().all(|&i| (i as usize) < w.n), "the rows exist");
    if y.is_empty() {
        return;
    }
    /// Rows of `W` that a task takes.
    const TASK_ROWS: usize = 64;
    let n_cols = rows.len();
    let step_lines = Layout::of(w.format).step_lines();
    let y = Parts::new(y);
    compute.pool().run(n_cols.div_ceil(TASK_ROWS), |task| {
        let mut at = task * TASK_ROWS;
        let end = (at + TASK_ROWS).min(n_cols);
        let mut values = [0.0f32; TILE * PANEL];
        while at < end {
            // Neighbours in one panel are computed together.
            let p = rows[at] as usize / PANEL;
            let same = rows[at..end]
                .iter()
                .take_while(|&&i| i as usize / PANEL == p)
                .count();
            for t in 0..x.n_tiles() {
                let (records, n_rows) = x.tile(t);
                let tile = Tile {
                    panel: w.panel(p),
                    n_steps: w.n_steps,
                    x: records,
                    n_rows,
                    n_cols: PANEL.min(w.n - p * PANEL),
                    y_stride: PANEL,
                    ahead: AHEAD,
                    ahead_lines: step_lines,
                    ahead_steps: w.n_steps.saturating_sub(AHEAD / step_lines),
                };
                // SAFETY: `values` holds a whole tile.
                unsafe { tile.run(compute.isa(), w.format, values.as_mut_ptr()) };
                for r in 0..n_rows {
                    let first = (t * TILE + r) * n_cols + at;
                    // SAFETY: columns at..at + same of a row belong to this task alone.
                    let out = unsafe { y.slice(first..first + same) };
                    for (out, &i) in out.iter_mut().zip(&rows[at..]) {
                        *out = values[r * PANEL + i as usize % PANEL];
                    }
                }
            }
            at += same;
        }
    });
}

/// Some rows of `X` against one panel.
struct Tile<'a> {
    panel: &'a [Line],
    n_steps: usize,
    /// `[step][row]`
    x: &'a [Record],
    n_rows: usize,
    n_cols: usize,
    y_stride: usize,
    /// What to ask for: at each of the first `ahead_steps` steps `ahead_lines` lines, `ahead`
    /// lines after that step's first.
    ahead: usize,
    ahead_lines: usize,
    ahead_steps: usize,
}

impl Tile<'_> {
    /// # Safety
    /// `y` points to `n_rows` rows of `n_cols`, `y_stride` apart, that nobody else touches
    /// meanwhile; the slices hold what the sizes say in this format.
    unsafe fn run(&self, isa: Isa, format: Format, y: *mut f32) {
        #[cfg(target_arch = "x86_64")]
        if isa.0 >= Level::Avx512Vnni {
            // SAFETY: the level was detected; the caller vouches for the rest.
            return unsafe { vnni::product(format, self, y) };
        }
        #[cfg(target_arch = "x86_64")]
        if isa.0 >= Level::Avx2 {
            // SAFETY: as above.
            return unsafe { avx2::product(format, self, y) };
        }
        let mut sums = [[0.0; PANEL]; TILE];
        portable::scalar(Layout::of(format), self, &mut sums);
        for (r, sums) in sums[..self.n_rows].iter().enumerate() {
            // SAFETY: row r of the block that the caller vouches for.
            unsafe {
                let y = y.add(r * self.y_stride);
                std::ptr::copy_nonoverlapping(sums.as_ptr(), y, self.n_cols);
            }
        }
    }
}
