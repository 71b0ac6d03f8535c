//! Every weight being trained: f32 masters in the loop, and the model that computes holds them rounded to bf16.
//!
//! The result is the weights that computed (matrices rounded, gains and biases not), as a Hugging Face folder: what was
//! trained is what is served.

use std::path::Path;

use bantam_formats::ModelFiles;
use bantam_kernels::Compute;
use bantam_model::{
    FileSource, FullLayout, LoadError, Model, Recompute, TensorSource, TrainWorkspace,
};

use super::{Form, LossReport, ModelForm, PackedBatch, TrainError, Trainable};
use crate::export::{AdapterIdentity, write_model};

/// A model all of whose weights are trained.
#[derive(Debug)]
pub struct FullTrainer<'a> {
    base: &'a ModelFiles,
    model: &'a mut Model<f32>,
    layout: FullLayout,
    work: TrainWorkspace<f32>,
    compute: Compute,
    identity: AdapterIdentity,
}

impl<'a> FullTrainer<'a> {
    /// Prepares to train `model`, which was loaded from `base` for training. `identity` goes into the result's folder;
    /// `recompute` trades time for memory and changes no bit.
    pub fn new(
        base: &'a ModelFiles,
        model: &'a mut Model<f32>,
        compute: Compute,
        identity: AdapterIdentity,
        recompute: Recompute,
    ) -> Self {
        Self {
            base,
            layout: model.full_layout(),
            model,
            work: TrainWorkspace::new(recompute),
            compute,
            identity,
        }
    }

    /// The weights as the base's files hold them, not rounded.
    fn masters(&self) -> Result<Vec<f32>, LoadError> {
        let mut source = FileSource::new(self.base, self.model.config());
        let mut masters = vec![0f32; self.layout.n_params()];
        for tensor in self.layout.tensors() {
            let shape = [tensor.rows, tensor.cols];
            let shape = if tensor.is_vector {
                &shape[1..]
            } else {
                &shape[..]
            };
            let missing = || LoadError::MissingTensor(tensor.name.clone());
            let values = source.tensor(&tensor.name, shape)?.ok_or_else(missing)?;
            masters[tensor.range.clone()].copy_from_slice(&values);
        }
        Ok(masters)
    }
}

impl Trainable for FullTrainer<'_> {
    fn n_params(&self) -> usize {
        self.layout.n_params()
    }

    fn initial_params(&self, _seed: u64) -> Vec<f32> {
        self.masters()
            .expect("the model was loaded from these files")
    }

    fn set_params(&mut self, params: &[f32]) {
        self.model.set_weights(&self.layout, params, &self.compute);
    }

    fn loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        grads: &mut [f32],
    ) -> Result<LossReport, TrainError> {
        Ok(self.model.full_loss_and_grads(
            &self.layout,
            batch,
            scale,
            grads,
            &mut self.work,
            &self.compute,
        ))
    }

    fn compute(&self) -> &Compute {
        &self.compute
    }

    fn loss(&mut self, batch: &PackedBatch) -> Result<LossReport, TrainError> {
        Ok(self.model.loss(None, batch, &mut self.work, &self.compute))
    }

    fn target_losses(
        &mut self,
        batch: &PackedBatch,
        losses: &mut Vec<f64>,
    ) -> Result<(), TrainError> {
        self.loss(batch)?;
        losses.clear();
        losses.extend_from_slice(self.work.target_losses());
        Ok(())
    }

    fn form(&self) -> Form<'_> {
        Form::Model(self)
    }
}

impl ModelForm for FullTrainer<'_> {
    fn write(&self, params: &[f32], dir: &Path) -> Result<&'static str, TrainError> {
        write_model(self.base, &self.layout, params, &self.identity, dir)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use bantam_model::{ModelConfig, Weights};
    use bantam_testkit::golden::{self, Golden};

    use super::*;
    use crate::events::RunEvent;
    use crate::recipe::{
        CheckpointRecipe, MachineSettings, Method, OptimRecipe, Recipe, Schedule, ValidRecipe,
    };
    use crate::train::{BatchOrder, Outcome, PlanInput, TrainPlan, TrainResult, TrainRow, train};

    /// A variant's two sequences as rows.
    fn rows(golden: &Golden) -> Vec<TrainRow> {
        let (tokens, targets) = (golden.tokens(), golden.targets());
        let mut start = 0;
        let row = |(line, len): (usize, usize)| {
            let range = start..start + len;
            start += len;
            let is_target = |i: &usize| targets.iter().any(|(pos, _)| *pos as usize + 1 == *i);
            TrainRow {
                tokens: tokens[range.clone()].to_vec(),
                trained: range
                    .clone()
                    .map(|i| i > range.start && is_target(&i))
                    .collect(),
                line: line + 1,
                ..TrainRow::default()
            }
        };
        golden.seq_lens().into_iter().enumerate().map(row).collect()
    }

    /// Ten updates with both rows, each as PyTorch makes it.
    fn plan(golden: &Golden, memory_mb: Option<u64>, out: &Path) -> TrainPlan {
        let files = bantam_formats::open_model(golden.model_dir()).unwrap();
        let recipe = Recipe {
            method: Some(Method::Full),
            memory_mb,
            optim: OptimRecipe {
                lr: Some(golden.scalar("train.lr")),
                clip_norm: Some(golden.scalar("train.clip")),
                weight_decay: Some(golden.scalar("train.weight_decay")),
                warmup_steps: Some(0),
                schedule: Some(Schedule::Constant),
                batch_rows: Some(2),
                ..Default::default()
            },
            valid: ValidRecipe {
                every: Some(4),
                patience: Some(0),
            },
            checkpoint: CheckpointRecipe {
                every_steps: Some(2),
                every_s: Some(0.0),
                each_epoch: None,
            },
            ..Default::default()
        };
        TrainPlan::new(PlanInput {
            recipe,
            train: rows(golden),
            valid: Vec::new(),
            base_name: "tiny".into(),
            base_sha256: "0".into(),
            max_context: 256,
            model: Some(ModelConfig::from_files(&files).unwrap()),
            order: BatchOrder::Given(vec![vec![0, 1]; 10]),
            init: None,
            machine: MachineSettings::default(),
            allow_other_machine: false,
            out: out.to_path_buf(),
        })
        .unwrap()
    }

    /// Trains on so many threads, stopping after each of `stops` and going on; the losses and norms, and the result.
    fn run(
        golden: &Golden,
        plan: &TrainPlan,
        (weights, threads): (Weights, usize),
        stops: &[usize],
    ) -> (Vec<(f64, f64)>, TrainResult) {
        let files = bantam_formats::open_model(golden.model_dir()).unwrap();
        let mut steps = Vec::new();
        for stop in stops.iter().copied().chain([usize::MAX]) {
            // Each session is a process of its own.
            let mut model = Model::<f32>::load(&files, weights, true).unwrap();
            let (compute, identity) = (Compute::new(threads), AdapterIdentity::default());
            let mut trainer =
                FullTrainer::new(&files, &mut model, compute, identity, plan.recompute);
            let cancel = AtomicBool::new(false);
            let mut on_event = |event: &RunEvent| {
                if let RunEvent::Step {
                    step,
                    loss,
                    grad_norm,
                    ..
                } = event
                {
                    steps.push((*loss, *grad_norm));
                    cancel.store(*step == stop, std::sync::atomic::Ordering::Relaxed);
                }
            };
            let clock = || Duration::ZERO;
            match train(plan, &mut trainer, &clock, &mut on_event, &cancel).unwrap() {
                Outcome::Finished(result) => return (steps, result),
                Outcome::Interrupted { step } => assert_eq!(step, stop),
                Outcome::AlreadyFinished(_) => unreachable!("a new folder"),
            }
        }
        unreachable!("the last session ends")
    }

    #[test]
    fn ten_steps_are_those_of_pytorch() {
        for name in golden::ALL {
            let (golden, dir) = (Golden::load(name), tempfile::tempdir().unwrap());
            let plan = plan(&golden, None, dir.path());
            let (steps, result) = run(&golden, &plan, (Weights::F32, 2), &[]);
            let (losses, norms) = (golden.f64("full.loss"), golden.f64("full.grad_norm"));
            assert_eq!(steps.len(), losses.len());
            for (step, ((loss, norm), (torch_loss, torch_norm))) in
                steps.iter().zip(losses.iter().zip(&norms)).enumerate()
            {
                let far = |ours: f64, theirs: f64| (ours - theirs).abs() / theirs;
                let words = format!("{name} step {step}: {loss} {torch_loss}, {norm} {torch_norm}");
                assert!(
                    far(*loss, *torch_loss) < 5e-3 && far(*norm, *torch_norm) < 2e-2,
                    "{words}"
                );
            }
            let files = bantam_formats::open_model(&result.adapter).unwrap();
            for tensor in golden.with_prefix("full_final.") {
                let expected = golden.f64(&format!("full_final.{tensor}"));
                let written = bantam_model::read_tensor(&files.tensor(&tensor).unwrap());
                for (a, b) in written.iter().zip(&expected) {
                    let far = (f64::from(*a) - b).abs();
                    assert!(far < 2e-3 * b.abs().max(0.5), "{name} {tensor}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn one_digest_on_any_threads_stopped_anywhere_and_with_layers_computed_twice() {
        let golden = Golden::load(golden::BIASED);
        let digest = |threads, stops: &[usize], memory_mb| {
            let dir = tempfile::tempdir().unwrap();
            let plan = plan(&golden, memory_mb, dir.path());
            run(&golden, &plan, (Weights::Bf16, threads), stops)
                .1
                .sha256
        };
        let whole = digest(1, &[], None);
        assert_eq!(digest(2, &[], None), whole);
        assert_eq!(digest(4, &[3, 4, 9], None), whole);
        assert_eq!(digest(2, &[1], Some(1000)), whole);
    }

    #[test]
    fn what_was_trained_is_what_is_written() {
        let (golden, dir) = (Golden::load(golden::TIED), tempfile::tempdir().unwrap());
        let plan = plan(&golden, None, dir.path());
        let (_, result) = run(&golden, &plan, (Weights::Bf16, 2), &[]);
        // The last parameters as the run held them, and the folder as anybody opens it.
        let files = bantam_formats::open_model(golden.model_dir()).unwrap();
        let mut model = Model::<f32>::load(&files, Weights::Bf16, true).unwrap();
        let (compute, identity) = (Compute::new(1), AdapterIdentity::default());
        let mut trainer = FullTrainer::new(&files, &mut model, compute, identity, plan.recompute);
        let bytes = std::fs::read(dir.path().join("checkpoints/step-10/model/params.f32")).unwrap();
        let (words, _) = bytes.as_chunks::<4>();
        let params: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        trainer.set_params(&params);
        let batch = crate::train::pack(&plan.train, &[0, 1], true);
        let trained = trainer.loss(&batch).unwrap();
        let written = bantam_formats::open_model(&result.adapter).unwrap();
        let written = Model::<f32>::load(&written, Weights::Auto, true).unwrap();
        let loss = written.loss(
            None,
            &batch,
            &mut TrainWorkspace::default(),
            &Compute::new(2),
        );
        assert_eq!(loss, trained);
        assert!(loss.mean() < 0.5);
    }
}
