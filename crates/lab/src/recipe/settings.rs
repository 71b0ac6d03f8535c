//! `settings.json`: a recipe with nothing left open, and the rules that fill what the user left out.
//!
//! The automatic choices depend only on the number of rows and their tokens (see [`Recipe::resolve`]), so the same
//! data always trains the same way, and each choice is reported in a sentence.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Lines, LoraRecipe, Method, PreferenceSettings, Recipe, Schedule, TargetModule};
use crate::train::TrainError;

/// See [`Settings::semantics`].
const SEMANTICS: u32 = 4;
/// Most tokens an automatic batch has on average.
const BATCH_TOKENS: f64 = 8192.0;
/// Updates an automatic number of epochs aims for.
const AIM_STEPS: f64 = 300.0;
/// Most epochs chosen automatically.
const MAX_AUTO_EPOCHS: usize = 10;
/// The same where preferences are learnt: seen more often, pairs are learnt by heart.
const MAX_AUTO_EPOCHS_OF_PAIRS: usize = 3;

/// What the data and the base say, for the rules and for the record.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Training rows.
    pub rows: usize,
    /// Tokens in them.
    pub tokens: u64,
    /// Tokens in them that carry a loss.
    pub trained_tokens: u64,
    /// Validation rows.
    pub valid_rows: usize,
    /// SHA-256 of the training rows as token ids and masks.
    pub train_sha256: String,
    /// The same of the validation rows.
    pub valid_sha256: String,
    /// Name of the base model.
    pub base_name: String,
    /// SHA-256 of its weights.
    pub base_sha256: String,
    /// Longest row allowed, already resolved.
    pub max_seq_len: usize,
    /// `seeded`, or the SHA-256 of a given order.
    pub order: String,
    /// Batches in a given order.
    pub given_batches: Option<usize>,
    /// What computes.
    pub machine: MachineSettings,
    /// Shape and SHA-256 of the adapter to begin from, if there is one.
    pub init: Option<InitFacts>,
}

/// What there is to know of an adapter that a run begins from.
#[derive(Debug, Clone, PartialEq)]
pub struct InitFacts {
    /// Its rank.
    pub rank: usize,
    /// Its alpha.
    pub alpha: f64,
    /// Its layers, in the order of [`TargetModule::ALL`].
    pub targets: Vec<TargetModule>,
    /// SHA-256 of its numbers.
    pub sha256: String,
}

/// What computes: bits are the same only on the same.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MachineSettings {
    /// Version of Bantam.
    pub version: String,
    /// Instruction set in use.
    pub isa: String,
}

impl std::fmt::Display for MachineSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with {}", self.version, self.isa)
    }
}

/// Which model is adapted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseSettings {
    /// Name or path, as given.
    pub name: String,
    /// SHA-256 of its weights.
    pub sha256: String,
}

/// What is learnt from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataSettings {
    /// The file, as given.
    pub train: PathBuf,
    /// Rows trained on.
    pub rows: usize,
    /// Their tokens.
    pub tokens: u64,
    /// Their tokens that carry a loss.
    pub trained_tokens: u64,
    /// SHA-256 of the rows as token ids and masks: template, system message and order included.
    pub train_sha256: String,
    /// The validation file; empty if there is none.
    pub valid: PathBuf,
    /// Share held out of the training file.
    pub valid_fraction: f64,
    /// Rows validated on.
    pub valid_rows: usize,
    /// SHA-256 of the validation rows.
    pub valid_sha256: String,
    /// System message for rows that have none; empty for none.
    pub system: String,
    /// Lines of the training file that are not trained on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_lines: Vec<usize>,
    /// Batch order: `seeded`, or the SHA-256 of a given order.
    pub order: String,
}

/// The adapter's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSettings {
    /// Rank.
    pub rank: usize,
    /// Numerator of the scale alpha / rank.
    pub alpha: f64,
    /// Layers that get an adapter.
    pub targets: Vec<TargetModule>,
    /// Folder of the adapter that the run began from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// SHA-256 of that adapter's numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_sha256: Option<String>,
}

/// The optimizer and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimSettings {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip_norm: f64,
    /// Deviations above the recent losses at which a loss is a spike; 0 for never.
    pub spike_z: f64,
    /// Steps of warm-up.
    pub warmup_steps: usize,
    /// Shape of the decay.
    pub schedule: Schedule,
    /// Times each row is seen, if the steps reach so far.
    pub epochs: usize,
    /// Rows an update.
    pub batch_rows: usize,
    /// Updates in all.
    pub steps: usize,
}

/// Validation and early stopping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidSettings {
    /// Updates between validations.
    pub every: usize,
    /// Validations without a new best before stopping early; 0 for never.
    pub patience: usize,
}

/// How often to save.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointSettings {
    /// Updates between checkpoints; 0 leaves it to the clock.
    pub every_steps: usize,
    /// Seconds between checkpoints; 0 leaves it to the steps.
    pub every_s: f64,
    /// Whether the adapter of each epoch's end is kept.
    #[serde(default)]
    pub each_epoch: bool,
}

/// A run's settings with nothing left open. Two runs with equal settings end with the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Version of the arithmetic: raised when the same settings would end with other bytes.
    pub semantics: u32,
    /// Where the run began: elsewhere the same settings end with other bytes.
    pub machine: MachineSettings,
    /// How the weights are trained.
    pub method: Method,
    /// Which model is adapted.
    pub base: BaseSettings,
    /// What is learnt from.
    pub data: DataSettings,
    /// Seed of everything random.
    pub seed: u64,
    /// Longest row in tokens.
    pub max_seq_len: usize,
    /// Whether longer rows were left out.
    pub skip_long: bool,
    /// Most tokens a backward pass.
    pub micro_tokens: usize,
    /// Whether what rows of a batch begin with alike is computed once.
    pub share_prefixes: bool,
    /// The adapter's shape; none where every weight is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// How preferences are learnt; none where answers are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceSettings>,
    /// The optimizer.
    pub optim: OptimSettings,
    /// Validation.
    pub valid: ValidSettings,
    /// Checkpoints.
    pub checkpoint: CheckpointSettings,
}

impl Settings {
    /// Rows that make an example: two where losses compare two, or need an answer that belongs to another prompt.
    pub fn rows_per_example(&self) -> usize {
        match self.preference {
            None => 1,
            Some(_) => 2,
        }
    }
}

/// Settings, and a sentence for each choice that was made for the user.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The settings.
    pub settings: Settings,
    /// What was chosen automatically, and from what.
    pub chosen: Vec<String>,
}

impl Recipe {
    /// Fills every open setting.
    ///
    /// Automatic rules, where nothing is given:
    /// - `optim.batch_rows`: 4 below 256 rows, 8 below 2,000, else 16; halved while an average batch has over 8,192 tokens.
    /// - `optim.epochs`: as many as come nearest to 300 updates, from 1 to 10, or to 3 where preferences are learnt; with
    ///   `max_steps`, as many as that needs.
    /// - `optim.lr`: 1e-3 sqrt(batch_rows / 16), to two digits; a tenth of it where every weight is trained or
    ///   preferences are learnt.
    /// - `optim.spike_z`: 10; 0 where preferences are learnt, as a pair that is ranked wrongly by far is what they are for.
    /// - `optim.warmup_steps`: a tenth of the updates, at most 30.
    /// - `valid.every`: a tenth of the updates, at least 10; `valid.patience`: 3.
    /// - `lora`: rank 16, alpha twice the rank, every linear layer.
    /// - `checkpoint.every_s`: 60; 600 where every weight is trained, as there are gigabytes to write.
    pub fn resolve(&self, facts: &Facts) -> Result<Resolved, TrainError> {
        let mut chosen = Vec::new();
        let preference = self.resolve_preference()?;
        let optim = self.resolve_optim(facts, &mut chosen)?;
        let method = self.method.unwrap_or_default();
        let lora = match method {
            Method::Sft | Method::Dpo | Method::Orpo | Method::Kto | Method::Simpo => {
                Some(self.resolve_lora(facts)?)
            }
            Method::Full if self.lora == LoraRecipe::default() => None,
            Method::Full => {
                return Err(setting(
                    "lora",
                    "shapes an adapter, but `method = \"full\"` trains every weight and none; leave out one of the two",
                ));
            }
        };
        let micro_tokens = self.micro_tokens.unwrap_or(768);
        check(micro_tokens >= 1, "micro_tokens", "must be at least 1")?;
        let every = self.valid.every.unwrap_or((optim.steps / 10).max(10));
        check(every >= 1, "valid.every", "must be at least 1")?;
        let usual_s = if method == Method::Full { 600.0 } else { 60.0 };
        let every_s = self.checkpoint.every_s.unwrap_or(usual_s);
        check(
            every_s.is_finite() && every_s >= 0.0,
            "checkpoint.every_s",
            "must be 0 or more",
        )?;
        let settings = Settings {
            semantics: SEMANTICS,
            machine: facts.machine.clone(),
            method,
            base: BaseSettings {
                name: facts.base_name.clone(),
                sha256: facts.base_sha256.clone(),
            },
            data: DataSettings {
                train: self.data.train.clone().unwrap_or_default(),
                rows: facts.rows,
                tokens: facts.tokens,
                trained_tokens: facts.trained_tokens,
                train_sha256: facts.train_sha256.clone(),
                valid: self.data.valid.clone().unwrap_or_default(),
                valid_fraction: self.valid_fraction()?,
                valid_rows: facts.valid_rows,
                valid_sha256: facts.valid_sha256.clone(),
                system: self.data.system.clone().unwrap_or_default(),
                skip_lines: self.data.skip_lines.clone().unwrap_or_default(),
                order: facts.order.clone(),
            },
            seed: self.seed.unwrap_or(0),
            max_seq_len: facts.max_seq_len,
            skip_long: self.skip_long.unwrap_or(false),
            micro_tokens,
            share_prefixes: self.share_prefixes.unwrap_or(true),
            lora,
            preference,
            optim,
            valid: ValidSettings {
                every,
                patience: self.valid.patience.unwrap_or(3),
            },
            checkpoint: CheckpointSettings {
                every_steps: self.checkpoint.every_steps.unwrap_or(0),
                every_s,
                each_epoch: self.checkpoint.each_epoch.unwrap_or(false),
            },
        };
        Ok(Resolved { settings, chosen })
    }

    /// The adapter's shape: as given, else that of the adapter to begin from, else the default.
    fn resolve_lora(&self, facts: &Facts) -> Result<LoraSettings, TrainError> {
        let init = facts.init.as_ref();
        let rank = self.lora.rank.or(init.map(|i| i.rank)).unwrap_or(16);
        check(
            (1..=1024).contains(&rank),
            "lora.rank",
            "must be from 1 to 1024",
        )?;
        let alpha = self.lora.alpha.or(init.map(|i| i.alpha));
        let alpha = alpha.unwrap_or(2.0 * rank as f64);
        check(
            alpha.is_finite() && alpha > 0.0,
            "lora.alpha",
            "must be above 0",
        )?;
        let targets = self.lora.targets.clone();
        let targets = targets.or(init.map(|i| i.targets.clone()));
        let mut targets = targets.unwrap_or_else(|| TargetModule::ALL.to_vec());
        targets.sort_unstable();
        targets.dedup();
        check(
            !targets.is_empty(),
            "lora.targets",
            "must name at least one layer",
        )?;
        if let Some(init) = init {
            agree("lora.rank", &rank, &init.rank)?;
            agree("lora.alpha", &alpha, &init.alpha)?;
            agree("lora.targets", &names(&targets), &names(&init.targets))?;
        }
        Ok(LoraSettings {
            rank,
            alpha,
            targets,
            init: init.and(self.lora.init.clone()),
            init_sha256: init.map(|i| i.sha256.clone()),
        })
    }

    /// The share of rows to hold out, 0 for none.
    pub(crate) fn valid_fraction(&self) -> Result<f64, TrainError> {
        let fraction = self.data.valid_fraction.unwrap_or(0.0);
        check(
            (0.0..=0.5).contains(&fraction),
            "data.valid_fraction",
            "must be from 0 to 0.5",
        )?;
        let both = fraction > 0.0 && self.data.valid.is_some();
        check(
            !both,
            "data.valid_fraction",
            "cannot be given together with `data.valid`",
        )?;
        Ok(fraction)
    }

    fn resolve_optim(
        &self,
        facts: &Facts,
        chosen: &mut Vec<String>,
    ) -> Result<OptimSettings, TrainError> {
        let o = &self.optim;
        let method = self.method.unwrap_or_default();
        let learns_answers = method.lines() == Lines::Rows;
        let most_epochs = if learns_answers {
            MAX_AUTO_EPOCHS
        } else {
            MAX_AUTO_EPOCHS_OF_PAIRS
        };
        let mean = facts.tokens as f64 / facts.rows.max(1) as f64;
        let batch_rows = o.batch_rows.unwrap_or_else(|| {
            let mut batch: usize = if facts.rows < 256 {
                4
            } else if facts.rows < 2000 {
                8
            } else {
                16
            };
            while batch > 1 && batch as f64 * mean > BATCH_TOKENS {
                batch /= 2;
            }
            chosen.push(format!(
                "optim.batch_rows = {batch} for {} rows of {mean:.0} tokens",
                facts.rows
            ));
            batch
        });
        check(batch_rows >= 1, "optim.batch_rows", "must be at least 1")?;
        check(
            o.max_steps != Some(0),
            "optim.max_steps",
            "must be at least 1",
        )?;
        check(o.epochs != Some(0), "optim.epochs", "must be at least 1")?;
        let per_epoch = facts.rows.div_ceil(batch_rows).max(1);
        let (epochs, planned) = match (facts.given_batches, o.epochs) {
            (Some(batches), epochs) => (epochs.unwrap_or(1), batches),
            (None, Some(epochs)) => (epochs, epochs * per_epoch),
            (None, None) => {
                let epochs = match o.max_steps {
                    Some(steps) => steps.div_ceil(per_epoch),
                    None => {
                        let nearest = (AIM_STEPS / per_epoch as f64).round() as usize;
                        let epochs = nearest.clamp(1, most_epochs);
                        chosen.push(format!("optim.epochs = {epochs} of {per_epoch} updates"));
                        epochs
                    }
                };
                (epochs, epochs * per_epoch)
            }
        };
        let steps = o.max_steps.map_or(planned, |most| most.min(planned));
        let lr = o.lr.unwrap_or_else(|| {
            let of_16_rows = match method {
                Method::Sft => 1e-3,
                Method::Full | Method::Dpo | Method::Orpo | Method::Kto | Method::Simpo => 1e-4,
            };
            let lr = two_digits(of_16_rows * (batch_rows as f64 / 16.0).sqrt());
            chosen.push(format!("optim.lr = {lr} for batches of {batch_rows} rows"));
            lr
        }) * o.lr_multiplier.unwrap_or(1.0);
        check(lr.is_finite() && lr > 0.0, "optim.lr", "must be above 0")?;
        let warmup_steps = match (o.warmup_steps, o.warmup_ratio) {
            (Some(_), Some(_)) => {
                return Err(setting(
                    "optim.warmup_ratio",
                    "cannot be given together with `optim.warmup_steps`",
                ));
            }
            (Some(steps), None) => steps,
            (None, Some(ratio)) => {
                check(
                    (0.0..=1.0).contains(&ratio),
                    "optim.warmup_ratio",
                    "must be from 0 to 1",
                )?;
                (ratio * steps as f64).round() as usize
            }
            (None, None) => {
                let warmup = steps.div_ceil(10).min(30);
                chosen.push(format!("optim.warmup_steps = {warmup} of {steps} updates"));
                warmup
            }
        };
        let betas = o.betas.unwrap_or([0.9, 0.999]);
        check(
            betas.iter().all(|b| (0.0..1.0).contains(b)),
            "optim.betas",
            "must be from 0 to below 1",
        )?;
        let eps = o.eps.unwrap_or(1e-8);
        check(eps.is_finite() && eps > 0.0, "optim.eps", "must be above 0")?;
        let weight_decay = o.weight_decay.unwrap_or(0.0);
        check(
            weight_decay.is_finite() && weight_decay >= 0.0,
            "optim.weight_decay",
            "must be 0 or more",
        )?;
        let clip_norm = o.clip_norm.unwrap_or(1.0);
        check(
            clip_norm.is_finite() && clip_norm >= 0.0,
            "optim.clip_norm",
            "must be 0 or more",
        )?;
        let spike_z = o.spike_z.unwrap_or(if learns_answers { 10.0 } else { 0.0 });
        check(
            spike_z.is_finite() && spike_z >= 0.0,
            "optim.spike_z",
            "must be 0 or more",
        )?;
        let schedule = o.schedule.unwrap_or_default();
        Ok(OptimSettings {
            lr,
            betas,
            eps,
            weight_decay,
            clip_norm,
            spike_z,
            warmup_steps,
            schedule,
            epochs,
            batch_rows,
            steps,
        })
    }
}

pub(super) fn setting(field: &'static str, reason: &str) -> TrainError {
    TrainError::Setting {
        field,
        reason: reason.to_string(),
    }
}

pub(super) fn check(fine: bool, field: &'static str, reason: &str) -> Result<(), TrainError> {
    if fine {
        Ok(())
    } else {
        Err(setting(field, reason))
    }
}

/// Refuses a shape other than that of the adapter to begin from.
fn agree<T: PartialEq + std::fmt::Display>(
    field: &'static str,
    given: &T,
    found: &T,
) -> Result<(), TrainError> {
    if given == found {
        return Ok(());
    }
    let reason = format!(
        "is {given}, but the adapter to begin from has {found}; leave it out, and the adapter's is taken"
    );
    Err(TrainError::Setting { field, reason })
}

fn names(targets: &[TargetModule]) -> String {
    let names: Vec<&str> = targets.iter().map(|target| target.name()).collect();
    names.join(", ")
}

/// Rounds to two significant digits, by way of decimal text so that the value is the one printed.
fn two_digits(x: f64) -> f64 {
    format!("{x:.1e}").parse().expect("a number just printed")
}
