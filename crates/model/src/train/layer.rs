//! One layer forward and backward.

use super::map::{In, Map, MapWork, PackedGroup, Place, Rows, column_sums, f32s, in_place};
use crate::block::size;
use crate::lora::{Fused, Lora};
use crate::rope::RopeTable;
use crate::weights::{Layer, Model};
use bantam_kernels::attention::forest::{self, Forest};
use bantam_kernels::attention::{HeadDims, rounded};
use bantam_kernels::bf16::Pairs;
use bantam_kernels::{Compute, Real, ops};

/// What one layer computed and its backward needs, its input aside.
#[derive(Clone, Debug, Default)]
pub(super) struct Saved<R> {
    /// Rotated `[T, W]`
    qkv: Rows<R>,
    /// `[T, H Dh]`; from here on only the rows that go on
    attn: Rows<R>,
    /// Input of the MLP half `[T, D]`
    x_mid: Vec<R>,
    /// `[T, 2F]`
    gate_up: Vec<R>,
    /// Hidden rows of the adapters of each fused map, `[T, P R]`
    hidden: [Rows<R>; 4],
}

/// Buffers that every layer uses again.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch<R> {
    /// Normalised rows.
    norm: Rows<R>,
    /// Activated rows.
    ffn: Rows<R>,
    /// Queries, keys and values before they are rounded.
    qkv: Vec<R>,
    /// Rows on their way through attention and the residual stream.
    attn: Vec<R>,
    delta: Vec<R>,
    d_ffn: Vec<R>,
    d_qkv: Vec<R>,
    /// Rounded output gradients.
    words: Vec<u32>,
    map: MapWork<R>,
    attention: Attention<R>,
}

/// What is trained.
pub(super) enum Goal<'a, R> {
    Nothing,
    /// The adapter, and where products are bf16 its packed form.
    Adapter(&'a Lora<R>, &'a [[PackedGroup; 4]]),
    /// Every weight; see [`super::full`].
    Weights(&'a super::full::FullLayout),
}

/// What is the same for every layer of a pass.
pub(super) struct Pass<'a, R> {
    pub(super) compute: &'a Compute,
    pub(super) forest: &'a Forest,
    pub(super) positions: &'a [usize],
    pub(super) rope: &'a RopeTable<R>,
    pub(super) goal: Goal<'a, R>,
    /// Products run on rounded rows.
    pub(super) rounded: bool,
}

/// How far a layer is computed forward.
pub(super) enum Until<'a, R> {
    /// To its output.
    Output(&'a mut Vec<R>),
    /// To what the backward needs.
    Saved,
}

impl<R: Real> Pass<'_, R> {
    fn map<'a>(&'a self, layer: &'a Layer<R>, layer_idx: usize, fused: Fused) -> Map<'a, R> {
        let (mut group, mut packed, mut place) = (None, None, None);
        match &self.goal {
            Goal::Nothing => {}
            Goal::Adapter(lora, all) => {
                group = Some((lora.group(layer_idx, fused), &lora.params[..]));
                packed = all.get(layer_idx).map(|groups| &groups[fused as usize]);
            }
            Goal::Weights(layout) => {
                let (weight, bias) = layout.map(layer_idx, fused);
                place = Some(Place { weight, bias });
            }
        }
        Map {
            linear: layer.fused(fused),
            group,
            packed,
            place,
            rounded: self.rounded,
        }
    }
}

impl<R: Real> Model<R> {
    /// Layer `layer_idx` on `x [T, D]`. With `rows` only these go on after attention: the loss
    /// reads no others of the last layer.
    pub(super) fn layer_forward(
        &self,
        pass: &Pass<'_, R>,
        layer_idx: usize,
        x: &[R],
        rows: Option<&[usize]>,
        saved: &mut Saved<R>,
        scratch: &mut Scratch<R>,
        until: Until<'_, R>,
    ) {
        let (config, layer, compute) = (&self.config, &self.layers[layer_idx], pass.compute);
        let (d, f, heads) = (config.d_model, config.d_ffn, config.heads());
        let t = pass.positions.len();
        let map = |fused| pass.map(layer, layer_idx, fused);
        let Scratch {
            norm,
            ffn,
            qkv,
            attn,
            delta,
            map: work,
            attention,
            ..
        } = scratch;

        self.norm_rows(pass, norm, x, &layer.attn_norm);
        let [h_qkv, h_o, h_gate_up, h_down] = &mut saved.hidden;
        let Rows { plain, words } = &mut saved.qkv;
        let qkv = if pass.rounded { qkv } else { plain };
        let (w, ow) = (heads.qkv_width(), heads.out_width());
        size(qkv, t * w);
        map(Fused::Qkv).forward(compute, qkv, (&*norm).into(), h_qkv, work);
        in_place(compute, qkv, w, words, pass.rounded, |first, rows| {
            self.rotate_rows(pass, first, rows, R::ONE);
        });
        size(attn, t * ow);
        attention.forward(pass, attn, &saved.qkv, heads);
        let n = rows.map_or(t, <[usize]>::len);
        let pick = |i: usize| rows.map_or(i, |rows| rows[i]);
        saved
            .attn
            .make(compute, (n, ow), pass.rounded, |first, out| {
                for (i, out) in out.chunks_exact_mut(ow).enumerate() {
                    out.copy_from_slice(&attn[pick(first + i) * ow..][..ow]);
                }
            });
        size(delta, n * d);
        map(Fused::O).forward(compute, delta, (&saved.attn).into(), h_o, work);
        sum_rows(compute, &mut saved.x_mid, delta, d, |i| {
            &x[pick(i) * d..][..d]
        });

        self.norm_rows(pass, norm, &saved.x_mid, &layer.mlp_norm);
        size(&mut saved.gate_up, n * 2 * f);
        map(Fused::GateUp).forward(
            compute,
            &mut saved.gate_up,
            (&*norm).into(),
            h_gate_up,
            work,
        );
        activate(pass, ffn, &saved.gate_up, f);
        match until {
            Until::Output(out) => {
                map(Fused::Down).forward(compute, delta, (&*ffn).into(), h_down, work);
                sum_rows(compute, out, delta, d, |i| &saved.x_mid[i * d..][..d]);
            }
            Until::Saved => map(Fused::Down).hidden(compute, n, (&*ffn).into(), h_down),
        }
    }

    /// Turns `d_x`, the gradient of the layer's output (of `rows` only, if given), into that of
    /// its input `[T, D]`, and adds the gradients of what is trained to `d_params`.
    pub(super) fn layer_backward(
        &self,
        pass: &Pass<'_, R>,
        layer_idx: usize,
        x: &[R],
        rows: Option<&[usize]>,
        d_params: &mut [R],
        d_x: &mut Vec<R>,
        saved: &mut Saved<R>,
        scratch: &mut Scratch<R>,
    ) {
        let (config, layer, compute) = (&self.config, &self.layers[layer_idx], pass.compute);
        let (d, f, heads, rounded) = (config.d_model, config.d_ffn, config.heads(), pass.rounded);
        let (t, n) = (pass.positions.len(), d_x.len() / d);
        let (w, ow) = (heads.qkv_width(), heads.out_width());
        let map = |fused| pass.map(layer, layer_idx, fused);
        let norms = match &pass.goal {
            Goal::Weights(layout) => layout.norms(layer_idx).map(Some),
            _ => [None, None],
        };
        let Scratch {
            norm,
            ffn,
            attn,
            delta,
            d_ffn,
            d_qkv,
            words,
            map: work,
            attention,
            ..
        } = scratch;
        let [h_qkv, h_o, h_gate_up, h_down] = &saved.hidden;

        // x = x_mid + down(swiglu(gate_up(norm(x_mid))))
        activate(pass, ffn, &saved.gate_up, f);
        in_place(compute, d_x, d, words, rounded, |_, _| {});
        size(d_ffn, n * f);
        let dy = In::new(d_x, words);
        let down = map(Fused::Down);
        down.backward(
            compute,
            d_params,
            Some(d_ffn),
            dy,
            (&*ffn).into(),
            h_down,
            work,
        );
        in_place(
            compute,
            &mut saved.gate_up,
            2 * f,
            words,
            rounded,
            |first, gate_up| {
                let d_ffn = &d_ffn[first * f..][..gate_up.len() / 2];
                ops::swiglu_backward(compute.isa(), gate_up, d_ffn, f);
            },
        );
        self.norm_rows(pass, norm, &saved.x_mid, &layer.mlp_norm);
        size(delta, n * d);
        let dy = In::new(&saved.gate_up, words);
        let gate_up = map(Fused::GateUp);
        gate_up.backward(
            compute,
            d_params,
            Some(delta),
            dy,
            (&*norm).into(),
            h_gate_up,
            work,
        );
        let of_norm = NormBack {
            x: &saved.x_mid,
            eps: config.rms_norm_eps,
            w: &layer.mlp_norm,
            at: norms[1],
        };
        of_norm.run(compute, d_x, delta, d_params);

        // x_mid = x + o(attention(rope(qkv(norm(x)))))
        in_place(compute, d_x, d, words, rounded, |_, _| {});
        size(attn, n * ow);
        let dy = In::new(d_x, words);
        map(Fused::O).backward(
            compute,
            d_params,
            Some(attn),
            dy,
            (&saved.attn).into(),
            h_o,
            work,
        );
        if let Some(rows) = rows {
            scatter(d_x, rows, t, d);
            scatter(attn, rows, t, ow);
        }
        size(d_qkv, t * w);
        in_place(compute, attn, ow, words, rounded, |_, _| {});
        let d_out = In::new(attn, words);
        attention.backward(pass, d_qkv, d_out, &saved.qkv, heads);
        in_place(compute, d_qkv, w, words, rounded, |first, rows| {
            self.rotate_rows(pass, first, rows, -R::ONE);
        });
        self.norm_rows(pass, norm, x, &layer.attn_norm);
        let dy = In::new(d_qkv, words);
        let qkv = map(Fused::Qkv);
        // Below the first layer's adapters nothing is trained.
        if layer_idx == 0 && !matches!(pass.goal, Goal::Weights(_)) {
            qkv.backward(compute, d_params, None, dy, (&*norm).into(), h_qkv, work);
            return;
        }
        size(delta, t * d);
        qkv.backward(
            compute,
            d_params,
            Some(delta),
            dy,
            (&*norm).into(),
            h_qkv,
            work,
        );
        let of_norm = NormBack {
            x,
            eps: config.rms_norm_eps,
            w: &layer.attn_norm,
            at: norms[0],
        };
        of_norm.run(compute, d_x, delta, d_params);
    }

    /// Normalises rows.
    fn norm_rows(&self, pass: &Pass<'_, R>, out: &mut Rows<R>, x: &[R], w: &[R]) {
        let (d, isa) = (w.len(), pass.compute.isa());
        let eps = R::from_f64(self.config.rms_norm_eps);
        out.make(
            pass.compute,
            (x.len() / d, d),
            pass.rounded,
            |first, out| {
                let mut rstd = vec![R::ZERO; out.len() / d];
                ops::rms_norm(isa, out, &mut rstd, &x[first * d..][..out.len()], w, eps);
            },
        );
    }

    /// Rotates queries and keys of rows to their positions (`sign` 1) or back (-1).
    fn rotate_rows(&self, pass: &Pass<'_, R>, first: usize, rows: &mut [R], sign: R) {
        let heads = self.config.heads();
        let rotated = heads.out_width() + heads.n_kv_heads * heads.head_dim;
        let rows = rows.chunks_exact_mut(heads.qkv_width());
        for (row, &pos) in rows.zip(&pass.positions[first..]) {
            let (cos, sin) = pass.rope.at(pos);
            ops::rope(pass.compute.isa(), &mut row[..rotated], cos, sin, sign);
        }
    }
}

/// Buffers of attention: in full precision, or on rounded rows.
#[derive(Clone, Debug, Default)]
struct Attention<R> {
    full: forest::Buffers<R>,
    rounded: rounded::Buffers,
}

impl<R: Real> Attention<R> {
    fn forward(&mut self, pass: &Pass<'_, R>, out: &mut [R], qkv: &Rows<R>, heads: HeadDims) {
        let (compute, forest) = (pass.compute, pass.forest);
        if pass.rounded {
            let qkv = Pairs::new(&qkv.words, heads.qkv_width() / 2);
            let buffers = &mut self.rounded;
            rounded::forward(compute, f32s(out), qkv, forest, heads, buffers);
        } else {
            let buffers = &mut self.full;
            forest::forward(compute, out, &qkv.plain, forest, heads, buffers);
        }
    }

    fn backward(
        &mut self,
        pass: &Pass<'_, R>,
        d_qkv: &mut [R],
        d_out: In<'_, R>,
        qkv: &Rows<R>,
        heads: HeadDims,
    ) {
        let (compute, forest) = (pass.compute, pass.forest);
        if pass.rounded {
            let qkv = Pairs::new(&qkv.words, heads.qkv_width() / 2);
            let d_out = Pairs::new(d_out.words, heads.out_width() / 2);
            let buffers = &mut self.rounded;
            rounded::backward(compute, f32s(d_qkv), d_out, qkv, forest, heads, buffers);
        } else {
            let (d_out, qkv, buffers) = (d_out.plain, &qkv.plain, &mut self.full);
            forest::backward(compute, d_qkv, d_out, qkv, forest, heads, buffers);
        }
    }
}

/// `out [T, F] = silu(gate) up`
fn activate<R: Real>(pass: &Pass<'_, R>, out: &mut Rows<R>, gate_up: &[R], f: usize) {
    let n = gate_up.len() / (2 * f);
    out.make(pass.compute, (n, f), pass.rounded, |first, out| {
        let gate_up = &gate_up[2 * first * f..][..2 * out.len()];
        ops::swiglu(pass.compute.isa(), out, gate_up, f);
    });
}

/// `out = a + b` by rows.
fn sum_rows<'a, R: Real>(
    compute: &Compute,
    out: &mut Vec<R>,
    a: &[R],
    d: usize,
    b: impl Fn(usize) -> &'a [R] + Sync,
) {
    const ROWS: usize = 16;
    size(out, a.len());
    compute.pool().chunks_mut(out, ROWS * d, |i, out| {
        for (r, out) in out.chunks_exact_mut(d).enumerate() {
            let row = i * ROWS + r;
            out.copy_from_slice(b(row));
            ops::add_assign(compute.isa(), out, &a[row * d..][..d]);
        }
    });
}

/// Puts row `i` to row `rows[i]` of `t`, zeros elsewhere. `rows` ascend.
fn scatter<R: Real>(x: &mut Vec<R>, rows: &[usize], t: usize, n: usize) {
    let packed = x.clone();
    x.clear();
    x.resize(t * n, R::ZERO);
    for (&row, values) in rows.iter().zip(packed.chunks_exact(n)) {
        x[row * n..][..n].copy_from_slice(values);
    }
}

/// A norm on the way back.
pub(super) struct NormBack<'a, R> {
    pub(super) x: &'a [R],
    pub(super) eps: f64,
    pub(super) w: &'a [R],
    /// Where the gradient of its gain begins, if that is trained.
    pub(super) at: Option<usize>,
}

impl<R: Real> NormBack<'_, R> {
    /// Adds the gradient that flows through: `dy` to `d_x`, and that of the gain.
    ///
    /// Math: out_i = w_i x_i rstd  =>  dw_i += sum_t dy_i x_i rstd
    pub(super) fn run(&self, compute: &Compute, d_x: &mut [R], dy: &[R], d_params: &mut [R]) {
        const ROWS: usize = 16;
        let (d, eps, isa) = (self.w.len(), R::from_f64(self.eps), compute.isa());
        compute.pool().chunks_mut(d_x, ROWS * d, |i, d_x| {
            let at = i * ROWS * d..i * ROWS * d + d_x.len();
            let (dy, x) = (&dy[at.clone()], &self.x[at]);
            let (mut rstd, n) = ([R::ZERO; ROWS], d_x.len() / d);
            ops::rms_norm_rstd(isa, &mut rstd[..n], x, eps);
            ops::rms_norm_backward(isa, d_x, dy, x, &rstd[..n], self.w);
        });
        let Some(at) = self.at else { return };
        let mut rstd = vec![R::ZERO; self.x.len() / d];
        ops::rms_norm_rstd(isa, &mut rstd, self.x, eps);
        column_sums(compute, &mut d_params[at..][..d], |first, sums| {
            let rows = dy.chunks_exact(d).zip(self.x.chunks_exact(d)).zip(&rstd);
            for ((dy, x), &rstd) in rows {
                let terms = sums.iter_mut().zip(&dy[first..]).zip(&x[first..]);
                terms.for_each(|((sum, &dy), &x)| *sum += dy * x * rstd);
            }
        });
    }
}
