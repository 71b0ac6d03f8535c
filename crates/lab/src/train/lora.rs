//! The real thing to train: a frozen model and an adapter on it.

use std::path::Path;

use bantam_kernels::Compute;
use bantam_model::{
    Lora, LoraConfig, LoraPart, Model, ModelConfig, Proj, Recompute, TrainWorkspace,
};

use super::rng::{Purpose, Stream};
use super::{AdapterFile, AdapterForm, Form, LossReport, PackedBatch, TrainError, Trainable};
use crate::export::{AdapterIdentity, adapter_files, read_adapter};
use crate::recipe::{LoraSettings, TargetModule};

/// An adapter being trained on a model that stays as it is.
#[derive(Debug)]
pub struct LoraTrainer<'a> {
    model: &'a Model<f32>,
    lora: Lora<f32>,
    work: TrainWorkspace<f32>,
    compute: Compute,
    identity: AdapterIdentity,
}

impl<'a> LoraTrainer<'a> {
    /// Prepares a new adapter on `model`, which was loaded for training. `identity` goes into the adapter's folder;
    /// `recompute` trades time for memory and changes no bit.
    pub fn new(
        model: &'a Model<f32>,
        settings: &LoraSettings,
        compute: Compute,
        identity: AdapterIdentity,
        recompute: Recompute,
    ) -> Self {
        let lora = Lora::new(settings.config(), model.config());
        Self {
            model,
            lora,
            work: TrainWorkspace::new(recompute),
            compute,
            identity,
        }
    }
}

impl LoraSettings {
    /// The same in the model's terms.
    pub fn config(&self) -> LoraConfig {
        let proj = |target: &TargetModule| match target {
            TargetModule::Q => Proj::Q,
            TargetModule::K => Proj::K,
            TargetModule::V => Proj::V,
            TargetModule::O => Proj::O,
            TargetModule::Gate => Proj::Gate,
            TargetModule::Up => Proj::Up,
            TargetModule::Down => Proj::Down,
        };
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            targets: self.targets.iter().map(proj).collect(),
        }
    }
}

/// Where an adapter begins: `A` uniform within 1/sqrt(n_in) (Kaiming's rule with a = sqrt 5, as in PEFT), `B` zero, so
/// that the first step starts from the base itself.
pub fn initial_lora(config: &LoraConfig, model: &ModelConfig, seed: u64) -> Vec<f32> {
    let layout = bantam_model::LoraLayout::new(config, model);
    let mut params = vec![0f32; layout.n_params()];
    let mut stream = Stream::new(seed, Purpose::Init);
    for tensor in layout
        .tensors()
        .iter()
        .filter(|tensor| tensor.part == LoraPart::A)
    {
        let bound = (1.0 / (tensor.cols as f64).sqrt()) as f32;
        params[tensor.range.clone()]
            .iter_mut()
            .for_each(|x| *x = stream.symmetric(bound));
    }
    params
}

impl Trainable for LoraTrainer<'_> {
    fn n_params(&self) -> usize {
        self.lora.params.len()
    }

    fn initial_params(&self, seed: u64) -> Vec<f32> {
        initial_lora(self.lora.config(), self.model.config(), seed)
    }

    fn set_params(&mut self, params: &[f32]) {
        self.lora.params.copy_from_slice(params);
        self.lora.refresh();
    }

    fn loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        grads: &mut [f32],
    ) -> Result<LossReport, TrainError> {
        Ok(self.model.loss_and_grads(
            &self.lora,
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
        Ok(self
            .model
            .loss(Some(&self.lora), batch, &mut self.work, &self.compute))
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

    fn weighed_loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        weigh: &mut bantam_model::Weigh<'_>,
        grads: &mut [f32],
    ) -> Result<(), TrainError> {
        self.model.weighed_loss_and_grads(
            &self.lora,
            batch,
            scale,
            weigh,
            grads,
            &mut self.work,
            &self.compute,
        );
        Ok(())
    }

    fn form(&self) -> Form<'_> {
        Form::Adapter(self)
    }
}

impl AdapterForm for LoraTrainer<'_> {
    fn files(&self, params: &[f32]) -> Result<Vec<AdapterFile>, TrainError> {
        adapter_files(
            self.lora.config(),
            self.lora.layout(),
            params,
            &self.identity,
        )
    }

    fn read(&self, dir: &Path) -> Result<Vec<f32>, TrainError> {
        let adapter = read_adapter(dir, self.model.config())?;
        let (found, expected) = (&adapter.config, self.lora.config());
        // An alpha of many digits may come back from decimal text with another last bit.
        let same_alpha = (found.alpha - expected.alpha).abs() <= 1e-12 * expected.alpha;
        if !same_alpha || found.rank != expected.rank || found.targets != expected.targets {
            let reason = format!("it is {found:?}, but this run trains {expected:?}");
            return Err(TrainError::Adapter {
                path: dir.to_path_buf(),
                reason,
            });
        }
        Ok(adapter.params)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use bantam_model::Weights;
    use bantam_testkit::golden::{self, Golden};

    use super::*;
    use crate::events::RunEvent;
    use crate::export::peft_name;
    use crate::recipe::{LoraRecipe, MachineSettings, OptimRecipe, Recipe, Schedule};
    use crate::train::{BatchOrder, PlanInput, TrainPlan, TrainRow, train};

    /// A trainer that begins where PyTorch began.
    struct From<'a> {
        trainer: LoraTrainer<'a>,
        params: Vec<f32>,
    }

    impl Trainable for From<'_> {
        fn n_params(&self) -> usize {
            self.trainer.n_params()
        }
        fn initial_params(&self, _seed: u64) -> Vec<f32> {
            self.params.clone()
        }
        fn set_params(&mut self, params: &[f32]) {
            self.trainer.set_params(params);
        }
        fn loss_and_grads(
            &mut self,
            batch: &PackedBatch,
            scale: f64,
            grads: &mut [f32],
        ) -> Result<LossReport, TrainError> {
            self.trainer.loss_and_grads(batch, scale, grads)
        }
        fn compute(&self) -> &Compute {
            self.trainer.compute()
        }
        fn loss(&mut self, batch: &PackedBatch) -> Result<LossReport, TrainError> {
            self.trainer.loss(batch)
        }
        fn target_losses(
            &mut self,
            batch: &PackedBatch,
            losses: &mut Vec<f64>,
        ) -> Result<(), TrainError> {
            self.trainer.target_losses(batch, losses)
        }
        fn form(&self) -> Form<'_> {
            self.trainer.form()
        }
    }

    /// A variant's two sequences as rows.
    fn rows(golden: &Golden) -> Vec<TrainRow> {
        let (tokens, targets) = (golden.tokens(), golden.targets());
        let mut start = 0;
        let row = |(line, len): (usize, usize)| {
            let range = start..start + len;
            start += len;
            let is_trained = |i: usize| {
                targets
                    .iter()
                    .any(|(pos, _)| *pos as usize + 1 == i && i > range.start)
            };
            TrainRow {
                tokens: tokens[range.clone()].to_vec(),
                trained: range.clone().map(is_trained).collect(),
                line: line + 1,
                ..TrainRow::default()
            }
        };
        golden.seq_lens().into_iter().enumerate().map(row).collect()
    }

    fn plan(golden: &Golden, out: &Path) -> TrainPlan {
        let recipe = Recipe {
            lora: LoraRecipe {
                rank: Some(4),
                alpha: Some(8.0),
                ..Default::default()
            },
            optim: OptimRecipe {
                lr: Some(golden.scalar("train.lr")),
                clip_norm: Some(golden.scalar("train.clip")),
                weight_decay: Some(golden.scalar("train.weight_decay")),
                warmup_steps: Some(0),
                schedule: Some(Schedule::Constant),
                batch_rows: Some(2),
                ..Default::default()
            },
            // Each row is a micro-batch of its own.
            micro_tokens: Some(1),
            ..Default::default()
        };
        TrainPlan::new(PlanInput {
            recipe,
            train: rows(golden),
            valid: Vec::new(),
            base_name: "tiny".into(),
            base_sha256: "0".into(),
            max_context: 256,
            model: None,
            order: BatchOrder::Given(vec![vec![0, 1]; 10]),
            init: None,
            machine: MachineSettings::default(),
            allow_other_machine: false,
            out: out.to_path_buf(),
        })
        .unwrap()
    }

    #[test]
    fn ten_steps_are_those_of_pytorch() {
        for name in golden::ALL {
            let (golden, dir) = (Golden::load(name), tempfile::tempdir().unwrap());
            let files = bantam_formats::open_model(golden.model_dir()).unwrap();
            let model = Model::<f32>::load(&files, Weights::F32, true).unwrap();
            let plan = plan(&golden, dir.path());
            let identity = AdapterIdentity::default();
            let lora = plan.settings.lora.as_ref().unwrap();
            let (compute, recompute) = (Compute::new(2), Recompute::None);
            let trainer = LoraTrainer::new(&model, lora, compute, identity, recompute);
            let named = |prefix: &str| {
                let mut params = vec![0f32; trainer.n_params()];
                for tensor in trainer.lora.layout().tensors() {
                    let values = golden.f32(&format!("{prefix}.{}", peft_name(tensor)));
                    params[tensor.range.clone()].copy_from_slice(&values);
                }
                params
            };
            let (params, expected) = (named("lora"), named("lora_final"));
            let mut steps = Vec::new();
            let mut on_event = |event: &RunEvent| {
                if let RunEvent::Step {
                    loss, grad_norm, ..
                } = event
                {
                    steps.push((*loss, *grad_norm));
                }
            };
            let mut from = From { trainer, params };
            train(
                &plan,
                &mut from,
                &|| Duration::ZERO,
                &mut on_event,
                &AtomicBool::new(false),
            )
            .unwrap();
            let (losses, norms) = (golden.f64("train.loss"), golden.f64("train.grad_norm"));
            assert_eq!(steps.len(), losses.len());
            for (step, ((loss, norm), (torch_loss, torch_norm))) in
                steps.iter().zip(losses.iter().zip(&norms)).enumerate()
            {
                assert!(
                    (loss - torch_loss).abs() < 1e-3 * torch_loss,
                    "{name} step {step}: {loss} {torch_loss}"
                );
                assert!(
                    (norm - torch_norm).abs() < 1e-2 * torch_norm,
                    "{name} step {step}: {norm} {torch_norm}"
                );
            }
            let params = from.trainer.read(&dir.path().join("adapter")).unwrap();
            let error: f64 = params
                .iter()
                .zip(&expected)
                .map(|(a, b)| f64::from(a - b).powi(2))
                .sum();
            let size: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
            assert!(error < 1e-4 * size, "{name}: {error} of {size}");
        }
    }

    #[test]
    fn an_adapter_begins_small_in_a_and_zero_in_b() {
        let golden = Golden::load(golden::TIED);
        let files = bantam_formats::open_model(golden.model_dir()).unwrap();
        let model = ModelConfig::from_files(&files).unwrap();
        let config = LoraConfig {
            rank: 4,
            alpha: 8.0,
            targets: Proj::ALL.to_vec(),
        };
        let params = initial_lora(&config, &model, 3);
        assert_eq!(params, initial_lora(&config, &model, 3));
        for tensor in bantam_model::LoraLayout::new(&config, &model).tensors() {
            let values = &params[tensor.range.clone()];
            let bound = 1.0 / (tensor.cols as f32).sqrt();
            let most = values.iter().fold(0f32, |a, x| a.max(x.abs()));
            match tensor.part {
                LoraPart::A => assert!(most <= bound && most > 0.9 * bound),
                LoraPart::B => assert_eq!(most, 0.0),
            }
        }
    }
}
