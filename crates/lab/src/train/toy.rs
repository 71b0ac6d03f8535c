//! A model small enough to train thousands of times in a test: a table of bigram logits.

use std::path::Path;

use bantam_kernels::{Compute, Isa};

use super::rng::{Purpose, Stream};
use super::{
    AdapterFile, AdapterForm, Form, LossReport, PackedBatch, Target, TrainError, TrainRow,
    Trainable,
};

/// Logits of the next token given the last one, and nothing else.
pub(crate) struct Bigram {
    vocab: usize,
    params: Vec<f32>,
    compute: Compute,
    /// A batch with this token has a loss that is no number.
    pub(crate) poison: Option<u32>,
    /// The same for the gradient alone.
    pub(crate) grad_poison: Option<u32>,
    /// A parameter, where it begins, and how far it may move before no loss is a number.
    pub(crate) cliff: Option<(usize, f32, f32)>,
    /// Backward passes until one gives no number, whatever the batch.
    pub(crate) fails_in: Option<usize>,
}

impl Bigram {
    pub(crate) fn new(vocab: usize) -> Self {
        Self {
            vocab,
            params: vec![0.0; vocab * vocab],
            compute: Compute::with_isa(2, Isa::SCALAR),
            poison: None,
            grad_poison: None,
            cliff: None,
            fails_in: None,
        }
    }

    fn run(&self, batch: &PackedBatch, mut d_logits: impl FnMut(usize, usize, f64)) -> LossReport {
        let mut report = LossReport::default();
        for target in &batch.targets {
            let row = batch.tokens[target.pos as usize] as usize;
            let logits = &self.params[row * self.vocab..][..self.vocab];
            let top = logits.iter().fold(f32::MIN, |a, b| a.max(*b));
            let exps: Vec<f64> = logits.iter().map(|x| f64::from(x - top).exp()).collect();
            let sum: f64 = exps.iter().sum();
            let weight = f64::from(target.weight);
            report.loss_sum -= weight * (exps[target.token as usize] / sum).ln();
            report.weight_sum += weight;
            report.n_targets += 1;
            for (col, exp) in exps.iter().enumerate() {
                d_logits(
                    row,
                    col,
                    weight * (exp / sum - f64::from(u8::from(col == target.token as usize))),
                );
            }
        }
        if self
            .cliff
            .is_some_and(|(at, first, far)| (self.params[at] - first).abs() > far)
        {
            report.loss_sum = f64::NAN;
        }
        if self
            .poison
            .is_some_and(|token| batch.tokens.contains(&token))
        {
            report.loss_sum = f64::NAN;
        }
        report
    }
}

impl Trainable for Bigram {
    fn n_params(&self) -> usize {
        self.params.len()
    }

    fn initial_params(&self, seed: u64) -> Vec<f32> {
        let mut stream = Stream::new(seed, Purpose::Init);
        (0..self.params.len())
            .map(|_| stream.symmetric(0.1))
            .collect()
    }

    fn set_params(&mut self, params: &[f32]) {
        self.params.copy_from_slice(params);
    }

    fn loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        grads: &mut [f32],
    ) -> Result<LossReport, TrainError> {
        let vocab = self.vocab;
        let mut report = self.run(batch, |row, col, d| {
            grads[row * vocab + col] += (scale * d) as f32
        });
        if self
            .grad_poison
            .is_some_and(|token| batch.tokens.contains(&token))
        {
            grads[1] = f32::INFINITY;
        }
        if self.fails_in == Some(0) {
            report.loss_sum = f64::NAN;
        }
        self.fails_in = self.fails_in.and_then(|n| n.checked_sub(1));
        Ok(report)
    }

    fn compute(&self) -> &Compute {
        &self.compute
    }

    fn loss(&mut self, batch: &PackedBatch) -> Result<LossReport, TrainError> {
        Ok(self.run(batch, |_, _, _| {}))
    }

    fn target_losses(
        &mut self,
        batch: &PackedBatch,
        losses: &mut Vec<f64>,
    ) -> Result<(), TrainError> {
        losses.clear();
        for target in &batch.targets {
            let one = PackedBatch {
                targets: vec![Target {
                    weight: 1.0,
                    ..*target
                }],
                ..batch.clone()
            };
            losses.push(self.run(&one, |_, _, _| {}).loss_sum);
        }
        Ok(())
    }

    fn form(&self) -> Form<'_> {
        Form::Adapter(self)
    }
}

impl AdapterForm for Bigram {
    fn files(&self, params: &[f32]) -> Result<Vec<AdapterFile>, TrainError> {
        let bytes = params.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(vec![AdapterFile {
            name: "table.bin".into(),
            bytes,
        }])
    }

    fn read(&self, dir: &Path) -> Result<Vec<f32>, TrainError> {
        let path = dir.join("table.bin");
        let bytes = std::fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
        Ok(bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect())
    }
}

/// Rows that a bigram can partly learn: each token is mostly the one before plus a step of its row.
pub(crate) fn rows(n: usize, vocab: u32, seed: u64) -> Vec<TrainRow> {
    let mut stream = Stream::new(seed, Purpose::Epoch(99));
    let mut row = |line| {
        let len = 4 + stream.below(9) as usize;
        let mut tokens = vec![stream.below(u64::from(vocab)) as u32];
        while tokens.len() < len {
            let noise = u32::from(stream.below(4) == 0);
            tokens.push((tokens[tokens.len() - 1] + 1 + noise) % vocab);
        }
        TrainRow {
            trained: (0..len).map(|i| i >= 2).collect(),
            tokens,
            line,
            ..TrainRow::default()
        }
    };
    (1..=n).map(&mut row).collect()
}
