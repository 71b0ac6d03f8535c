//! Low-rank adapters on the linear maps of a layer.
//!
//! `y = W x + (alpha / R) B A x` with `A [R, n_in]`, `B [n_out, R]`: Hu et al. 2021,
//! arXiv:2106.09685, eq. 3. All numbers live in one flat vector, which is what an optimiser,
//! a checkpoint and a digest want; [`LoraLayout`] says where each tensor is.

use crate::ModelConfig;
use bantam_kernels::gemm::{Call, Dims, View, Write};
use bantam_kernels::{Compute, Real};
use std::ops::Range;

/// A linear map of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output of the attention.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up of the MLP.
    Up,
    /// Down of the MLP.
    Down,
}

impl Proj {
    /// All seven, in layout order.
    pub const ALL: [Proj; 7] = [
        Proj::Q,
        Proj::K,
        Proj::V,
        Proj::O,
        Proj::Gate,
        Proj::Up,
        Proj::Down,
    ];

    /// `q_proj` and so on, as adapter configurations name them.
    pub fn name(self) -> &'static str {
        match self {
            Proj::Q => "q_proj",
            Proj::K => "k_proj",
            Proj::V => "v_proj",
            Proj::O => "o_proj",
            Proj::Gate => "gate_proj",
            Proj::Up => "up_proj",
            Proj::Down => "down_proj",
        }
    }

    /// The module within a layer: `self_attn.q_proj` and so on.
    pub fn path(self) -> &'static str {
        match self {
            Proj::Q => "self_attn.q_proj",
            Proj::K => "self_attn.k_proj",
            Proj::V => "self_attn.v_proj",
            Proj::O => "self_attn.o_proj",
            Proj::Gate => "mlp.gate_proj",
            Proj::Up => "mlp.up_proj",
            Proj::Down => "mlp.down_proj",
        }
    }

    /// The inverse of [`Proj::name`].
    pub fn from_name(name: &str) -> Option<Proj> {
        Proj::ALL.into_iter().find(|proj| proj.name() == name)
    }

    /// `(n_in, n_out)` in a model of this configuration.
    pub fn dims(self, config: &ModelConfig) -> (usize, usize) {
        let (d, f, heads) = (config.d_model, config.d_ffn, config.heads());
        let kv = config.n_kv_heads * config.head_dim;
        match self {
            Proj::Q => (d, heads.out_width()),
            Proj::K | Proj::V => (d, kv),
            Proj::O => (heads.out_width(), d),
            Proj::Gate | Proj::Up => (d, f),
            Proj::Down => (f, d),
        }
    }
}

/// Rank, scale and targets of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// `R`
    pub rank: usize,
    /// The product is scaled by `alpha / R`.
    pub alpha: f64,
    /// Which maps are adapted, in every layer.
    pub targets: Vec<Proj>,
}

/// One of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraPart {
    /// `A [R, n_in]`
    A,
    /// `B [n_out, R]`
    B,
}

/// Where one tensor of an adapter lies in the flat vector, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraTensor {
    /// Layer index.
    pub layer: usize,
    /// The adapted map.
    pub proj: Proj,
    /// Which factor.
    pub part: LoraPart,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Place in [`Lora::params`].
    pub range: Range<usize>,
}

/// The order of an adapter's tensors: by layer, then by fused map, the `A`s before the `B`s.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLayout {
    tensors: Vec<LoraTensor>,
    n_params: usize,
}

impl LoraLayout {
    /// Lays out an adapter for a model.
    pub fn new(config: &LoraConfig, model: &ModelConfig) -> Self {
        let (mut tensors, mut end) = (Vec::new(), 0);
        for layer in 0..model.n_layers {
            for fused in Fused::ALL {
                for part in [LoraPart::A, LoraPart::B] {
                    for &proj in fused
                        .projs()
                        .iter()
                        .filter(|proj| config.targets.contains(proj))
                    {
                        let (n_in, n_out) = proj.dims(model);
                        let (rows, cols) = match part {
                            LoraPart::A => (config.rank, n_in),
                            LoraPart::B => (n_out, config.rank),
                        };
                        let range = end..end + rows * cols;
                        end = range.end;
                        tensors.push(LoraTensor {
                            layer,
                            proj,
                            part,
                            rows,
                            cols,
                            range,
                        });
                    }
                }
            }
        }
        Self {
            tensors,
            n_params: end,
        }
    }

    /// Every tensor, in order.
    pub fn tensors(&self) -> &[LoraTensor] {
        &self.tensors
    }

    /// Length of the flat vector.
    pub fn n_params(&self) -> usize {
        self.n_params
    }
}

/// Maps that read the same input and are computed as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fused {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Fused {
    pub(crate) const ALL: [Fused; 4] = [Fused::Qkv, Fused::O, Fused::GateUp, Fused::Down];

    pub(crate) fn projs(self) -> &'static [Proj] {
        match self {
            Fused::Qkv => &[Proj::Q, Proj::K, Proj::V],
            Fused::O => &[Proj::O],
            Fused::GateUp => &[Proj::Gate, Proj::Up],
            Fused::Down => &[Proj::Down],
        }
    }
}

/// An adapter: its numbers and the transposed copies that the forward pass reads.
#[derive(Clone, Debug)]
pub struct Lora<R> {
    /// All tensors, flat; see [`Lora::layout`]. Call [`Lora::refresh`] after a change.
    pub params: Vec<R>,
    config: LoraConfig,
    layout: LoraLayout,
    /// `[layer][fused]`
    groups: Vec<[Group<R>; 4]>,
}

/// The adapters of one fused map. `P` of its projections are targets.
#[derive(Clone, Debug)]
pub(crate) struct Group<R> {
    pub(crate) parts: Vec<Part<R>>,
    /// The `A`s one below the other: `[P R, n_in]` in the flat vector.
    pub(crate) a: Range<usize>,
    /// Their transpose, `[n_in, P R]`.
    a_t: Vec<R>,
    pub(crate) n_in: usize,
    pub(crate) n_out: usize,
    pub(crate) rank: usize,
    pub(crate) scale: R,
}

#[derive(Clone, Debug)]
pub(crate) struct Part<R> {
    /// First output column within the fused map, and how many.
    pub(crate) out_start: usize,
    pub(crate) n_out: usize,
    /// `B [n_out, R]` in the flat vector.
    pub(crate) b: Range<usize>,
    /// Its transpose, `[R, n_out]`.
    b_t: Vec<R>,
}

impl<R: Real> Lora<R> {
    /// An adapter of zeros: it changes nothing.
    ///
    /// Panics if the rank is zero.
    pub fn new(config: LoraConfig, model: &ModelConfig) -> Self {
        assert!(config.rank > 0, "the rank is at least one");
        let layout = LoraLayout::new(&config, model);
        let groups = (0..model.n_layers)
            .map(|layer| Fused::ALL.map(|fused| Group::new(fused, layer, &config, &layout, model)))
            .collect();
        Self {
            params: vec![R::ZERO; layout.n_params],
            config,
            layout,
            groups,
        }
    }

    /// Rank, scale and targets.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Where each tensor lies in [`Lora::params`].
    pub fn layout(&self) -> &LoraLayout {
        &self.layout
    }

    /// Renews the transposed copies after a change of [`Lora::params`].
    pub fn refresh(&mut self) {
        for group in self.groups.iter_mut().flatten() {
            let width = group.parts.len() * group.rank;
            transpose(
                &mut group.a_t,
                &self.params[group.a.clone()],
                width,
                group.n_in,
            );
            for part in &mut group.parts {
                transpose(
                    &mut part.b_t,
                    &self.params[part.b.clone()],
                    part.n_out,
                    group.rank,
                );
            }
        }
    }

    pub(crate) fn group(&self, layer: usize, fused: Fused) -> &Group<R> {
        &self.groups[layer][fused as usize]
    }
}

fn transpose<R: Real>(out: &mut [R], x: &[R], rows: usize, cols: usize) {
    for i in 0..rows {
        for j in 0..cols {
            out[j * rows + i] = x[i * cols + j];
        }
    }
}

impl<R: Real> Group<R> {
    fn new(
        fused: Fused,
        layer: usize,
        config: &LoraConfig,
        layout: &LoraLayout,
        model: &ModelConfig,
    ) -> Self {
        let (mut parts, mut a, mut out_start, mut n_in) = (Vec::new(), None::<Range<usize>>, 0, 0);
        for &proj in fused.projs() {
            let (proj_in, n_out) = proj.dims(model);
            n_in = proj_in;
            let find = |part| {
                layout
                    .tensors
                    .iter()
                    .find(|t| t.layer == layer && t.proj == proj && t.part == part)
            };
            if let (Some(a_tensor), Some(b_tensor)) = (find(LoraPart::A), find(LoraPart::B)) {
                let (start, end) = (a_tensor.range.start, a_tensor.range.end);
                a = Some(a.map_or(start, |a| a.start)..end);
                let b_t = vec![R::ZERO; b_tensor.range.len()];
                parts.push(Part {
                    out_start,
                    n_out,
                    b: b_tensor.range.clone(),
                    b_t,
                });
            }
            out_start += n_out;
        }
        let a = a.unwrap_or(0..0);
        let a_t = vec![R::ZERO; a.len()];
        let scale = R::from_f64(config.alpha / config.rank as f64);
        Self {
            parts,
            a,
            a_t,
            n_in,
            n_out: out_start,
            rank: config.rank,
            scale,
        }
    }

    /// Width of [`Group::forward`]'s hidden rows: `P R`.
    pub(crate) fn width(&self) -> usize {
        self.parts.len() * self.rank
    }

    /// Adds the adapters' part to `y` and keeps `h` for the backward.
    ///
    /// Shapes: y [T, n_out] (added to); h [T, P R] (saved); x [T, n_in]
    /// Math:   h = x A^T;  y += (alpha / R) h B^T
    pub(crate) fn forward(&self, compute: &Compute, y: &mut [R], h: &mut [R], x: &[R]) {
        let (t, width) = (x.len() / self.n_in, self.width());
        if width == 0 {
            return;
        }
        if t == 1 {
            return self.forward_one(compute, y, h, x);
        }
        self.hidden(compute, h, x);
        for (i, part) in self.parts.iter().enumerate() {
            let up = Dims {
                m: t,
                n: part.n_out,
                k: self.rank,
            };
            let h = View::rows(&h[i * self.rank..], width);
            Call::new(
                h,
                (&part.b_t, part.n_out),
                self.n_out,
                up,
                Write::AddScaled(self.scale),
            )
            .run_parallel(compute, &mut y[part.out_start..]);
        }
    }

    /// `h [T, P R] = x A^T`
    pub(crate) fn hidden(&self, compute: &Compute, h: &mut [R], x: &[R]) {
        let width = self.width();
        let down = Dims {
            m: x.len() / self.n_in,
            n: width,
            k: self.n_in,
        };
        let x = View::rows(x, self.n_in);
        Call::new(x, (&self.a_t, width), width, down, Write::Set).run_parallel(compute, h);
    }

    /// [`Group::forward`] of one row, which reads every number of the adapter for a single
    /// product: the columns are cut between the threads, and each is the same chain as ever.
    fn forward_one(&self, compute: &Compute, y: &mut [R], h: &mut [R], x: &[R]) {
        const HIDDEN: usize = 16;
        const COLS: usize = 192;
        let (isa, width) = (compute.isa(), self.width());
        compute.pool().chunks_mut(h, HIDDEN, |i, h| {
            let a_t = (&self.a_t[i * HIDDEN..], width);
            let dims = Dims {
                m: 1,
                n: h.len(),
                k: self.n_in,
            };
            Call::new(View::rows(x, self.n_in), a_t, width, dims, Write::Set).run(isa, h);
        });
        let h = &*h;
        compute.pool().chunks_mut(y, COLS, |i, y| {
            let cols = i * COLS..i * COLS + y.len();
            for (p, part) in self.parts.iter().enumerate() {
                let start = part.out_start.clamp(cols.start, cols.end);
                let end = (part.out_start + part.n_out).clamp(cols.start, cols.end);
                if start < end {
                    let b_t = (&part.b_t[start - part.out_start..], part.n_out);
                    let dims = Dims {
                        m: 1,
                        n: end - start,
                        k: self.rank,
                    };
                    let h = View::rows(&h[p * self.rank..], width);
                    let write = Write::AddScaled(self.scale);
                    Call::new(h, b_t, end - start, dims, write)
                        .run(isa, &mut y[start - cols.start..]);
                }
            }
        });
    }

    /// Backward of [`Group::forward`]; the input gradient only where `dx` is given.
    ///
    /// Shapes: d_params flat (added to); dx [T, n_in] (added to); dy [T, n_out]; h [T, P R];
    ///         x [T, n_in]; d_h is scratch
    /// Math:   y = s h B^T  =>  dh = s dy B, dB += s dy^T h
    ///         h = x A^T    =>  dx += dh A,  dA += dh^T x
    pub(crate) fn backward(
        &self,
        compute: &Compute,
        (params, d_params): (&[R], &mut [R]),
        dx: Option<&mut [R]>,
        dy: &[R],
        (h, d_h): (&[R], &mut Vec<R>),
        x: &[R],
    ) {
        let (t, width) = (x.len() / self.n_in, self.width());
        if width == 0 {
            return;
        }
        d_h.clear();
        d_h.resize(t * width, R::ZERO);
        for (i, part) in self.parts.iter().enumerate() {
            let dy_part = &dy[part.out_start..];
            let up = Dims {
                m: t,
                n: self.rank,
                k: part.n_out,
            };
            let b = &params[part.b.clone()];
            Call::new(
                View::rows(dy_part, self.n_out),
                (b, self.rank),
                width,
                up,
                Write::AddScaled(self.scale),
            )
            .run_parallel(compute, &mut d_h[i * self.rank..]);
            let weights = Dims {
                m: part.n_out,
                n: self.rank,
                k: t,
            };
            let h = (&h[i * self.rank..], width);
            Call::new(
                View::transposed(dy_part, self.n_out),
                h,
                self.rank,
                weights,
                Write::AddScaled(self.scale),
            )
            .run_parallel(compute, &mut d_params[part.b.clone()]);
        }
        let weights = Dims {
            m: width,
            n: self.n_in,
            k: t,
        };
        Call::new(
            View::transposed(d_h, width),
            (x, self.n_in),
            self.n_in,
            weights,
            Write::AddScaled(R::ONE),
        )
        .run_parallel(compute, &mut d_params[self.a.clone()]);
        if let Some(dx) = dx {
            let down = Dims {
                m: t,
                n: self.n_in,
                k: width,
            };
            let a = (&params[self.a.clone()], self.n_in);
            Call::new(
                View::rows(d_h, width),
                a,
                self.n_in,
                down,
                Write::AddScaled(R::ONE),
            )
            .run_parallel(compute, dx);
        }
    }
}
