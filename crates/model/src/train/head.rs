//! The loss, its gradient, and the way back through the head and the last norm.

use super::layer::{Goal, NormBack, Pass};
use super::map::{In, Map, MapWork, Place, Rows, in_place};
use super::{LossReport, PackedBatch, Read, zeros};
use crate::block::size;
use crate::weights::Model;
use bantam_kernels::{Real, ops};

/// Rows of logits that are held at once: 128 rows of a vocabulary of 49,152 are 25 MB.
pub(super) const HEAD_ROWS: usize = 128;

#[derive(Clone, Debug, Default)]
pub(super) struct Buffers<R> {
    x: Vec<R>,
    norm: Rows<R>,
    logits: Vec<R>,
    words: Vec<u32>,
    d_norm: Vec<R>,
    d_x: Vec<R>,
    losses: Vec<(f64, bool)>,
    /// The loss of every target of the batch, unweighted.
    pub(super) of_target: Vec<f64>,
    work: MapWork<R>,
}

impl<R: Real> Model<R> {
    /// Loss at the targets, whose rows of the last layer are `x`; with `grads`, also the
    /// gradient `d_x` of these rows and what is trained here.
    pub(super) fn run_head(
        &self,
        pass: &Pass<'_, R>,
        batch: &PackedBatch,
        read: &Read,
        x: &[R],
        grads: &mut Option<(f64, &mut [R])>,
        d_x: &mut Vec<R>,
        buffers: &mut Buffers<R>,
    ) -> LossReport {
        let (d, vocab, compute) = (self.config.d_model, self.config.vocab, pass.compute);
        let (isa, eps) = (compute.isa(), R::from_f64(self.config.rms_norm_eps));
        let head = self.head();
        let rounded = pass.rounded && head.bf16().is_some() && vocab.is_multiple_of(2);
        let layout = match &pass.goal {
            Goal::Weights(layout) => Some(*layout),
            _ => None,
        };
        let map = Map {
            linear: head,
            group: None,
            packed: None,
            place: layout.map(|layout| Place {
                weight: layout.head(),
                bias: None,
            }),
            rounded,
        };
        if grads.is_some() {
            zeros(d_x, x.len());
        }
        let mut report = LossReport::default();
        buffers.of_target.clear();
        let chunks = batch
            .targets
            .chunks(HEAD_ROWS)
            .zip(read.of_target.chunks(HEAD_ROWS));
        for (targets, rows) in chunks {
            let n = targets.len();
            buffers.x.clear();
            for &row in rows {
                buffers.x.extend_from_slice(&x[row * d..][..d]);
            }
            let x = &buffers.x;
            buffers.norm.make(compute, (n, d), rounded, |first, out| {
                let mut rstd = vec![R::ZERO; out.len() / d];
                let x = &x[first * d..][..out.len()];
                ops::rms_norm(isa, out, &mut rstd, x, &self.final_norm, eps);
            });
            size(&mut buffers.logits, n * vocab);
            let (logits, norm) = (&mut buffers.logits, In::from(&buffers.norm));
            map.forward(
                compute,
                logits,
                norm,
                &mut Rows::default(),
                &mut buffers.work,
            );
            buffers.losses.resize(n, (0.0, false));
            let scale = grads.as_ref().map_or(0.0, |(scale, _)| *scale);
            compute.pool().chunks_mut2(
                (logits, vocab),
                (&mut buffers.losses, 1),
                |i, logits, loss| {
                    let d_scale = R::from_f64(scale * f64::from(targets[i].weight));
                    let token = targets[i].token as usize;
                    loss[0] = ops::cross_entropy(isa, logits, token, d_scale);
                },
            );
            for (target, &(loss, correct)) in targets.iter().zip(&buffers.losses) {
                report.loss_sum += f64::from(target.weight) * loss;
                report.weight_sum += f64::from(target.weight);
                report.n_correct += u64::from(correct);
                report.n_targets += 1;
                buffers.of_target.push(loss);
            }
            let Some((_, d_params)) = grads else { continue };
            in_place(
                compute,
                logits,
                vocab,
                &mut buffers.words,
                rounded,
                |_, _| {},
            );
            size(&mut buffers.d_norm, n * d);
            let (d_norm, dy) = (&mut buffers.d_norm, In::new(logits, &buffers.words));
            let hidden = Rows::default();
            map.backward(
                compute,
                d_params,
                Some(d_norm),
                dy,
                norm,
                &hidden,
                &mut buffers.work,
            );
            zeros(&mut buffers.d_x, n * d);
            let of_norm = NormBack {
                x: &buffers.x,
                eps: self.config.rms_norm_eps,
                w: &self.final_norm,
                at: layout.map(|layout| layout.final_norm()),
            };
            of_norm.run(compute, &mut buffers.d_x, d_norm, d_params);
            for (&row, d_row) in rows.iter().zip(buffers.d_x.chunks_exact(d)) {
                ops::add_assign(isa, &mut d_x[row * d..][..d], d_row);
            }
        }
        report
    }
}
