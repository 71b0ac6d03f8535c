//! `recipe.toml`: what the user asked for. Everything is optional here; [`Recipe::resolve`] leaves nothing open.
//!
//! A recipe on the command line is the same type with other fields filled, laid over the file's by [`Recipe::overlaid`].
//! Unknown keys are refused with their path, so that a misspelt setting cannot be silently ignored.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::train::TrainError;

mod preference;
mod settings;

pub use preference::PreferenceSettings;
pub use settings::{
    BaseSettings, CheckpointSettings, DataSettings, Facts, InitFacts, LoraSettings,
    MachineSettings, OptimSettings, Resolved, Settings, ValidSettings,
};

/// How the weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Supervised fine-tuning of an adapter: cross-entropy on the answers.
    #[default]
    Sft,
    /// The same of every weight.
    Full,
    /// An adapter that tells preferred answers from others, held to a reference (direct preference optimisation).
    Dpo,
    /// The same without a reference, while learning the preferred answers (odds-ratio preference optimisation).
    Orpo,
    /// From answers that are each called desirable or not (Kahneman-Tversky optimisation).
    Kto,
    /// From average log-probabilities, without a reference (simple preference optimisation).
    Simpo,
}

impl Method {
    /// As it is written in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Full => "full",
            Self::Dpo => "dpo",
            Self::Orpo => "orpo",
            Self::Kto => "kto",
            Self::Simpo => "simpo",
        }
    }

    /// What a line of the data must hold.
    pub fn lines(self) -> Lines {
        match self {
            Self::Sft | Self::Full => Lines::Rows,
            Self::Dpo | Self::Orpo | Self::Simpo => Lines::Pairs,
            Self::Kto => Lines::Judged,
        }
    }
}

/// What one line of training data holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// An answer to be learnt.
    Rows,
    /// Two answers, one of them preferred.
    Pairs,
    /// An answer that is desirable or not; pairs are read as two of them.
    Judged,
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine from the full rate to zero.
    #[default]
    Cosine,
    /// A straight line from the full rate to zero.
    Linear,
    /// No fall.
    Constant,
}

/// A linear layer that gets an adapter, by its Hugging Face name; the part before `_proj` is enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetModule {
    /// Query projection.
    #[serde(rename = "q_proj", alias = "q")]
    Q,
    /// Key projection.
    #[serde(rename = "k_proj", alias = "k")]
    K,
    /// Value projection.
    #[serde(rename = "v_proj", alias = "v")]
    V,
    /// Attention output projection.
    #[serde(rename = "o_proj", alias = "o")]
    O,
    /// Gate of the feed-forward.
    #[serde(rename = "gate_proj", alias = "gate")]
    Gate,
    /// Up projection of the feed-forward.
    #[serde(rename = "up_proj", alias = "up")]
    Up,
    /// Down projection of the feed-forward.
    #[serde(rename = "down_proj", alias = "down")]
    Down,
}

impl TargetModule {
    /// Every linear layer of a block, in the order of the layers' use.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// `q_proj` and so on.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }
}

/// Declares a section all of whose fields are optional, with `overlaid`: the other's fields win where they are given.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }

        impl $name {
            /// This with every field that `over` gives replaced by `over`'s.
            #[must_use]
            pub fn overlaid(self, over: Self) -> Self {
                Self { $($field: over.$field.or(self.$field),)* }
            }
        }
    };
}

section! {
    /// `[data]`: what to learn from.
    DataRecipe {
        /// Training rows.
        train: PathBuf,
        /// Validation rows.
        valid: PathBuf,
        /// Share of the training rows held out for validation when no `valid` file is given, by hash of the row.
        valid_fraction: f64,
        /// System message for rows that have none.
        system: String,
        /// Lines of the training file that keep their place in the order of the batches but are not trained on.
        skip_lines: Vec<usize>,
    }
}

section! {
    /// `[lora]`: the adapter's shape.
    LoraRecipe {
        /// Rank of each adapter.
        rank: usize,
        /// Numerator of the scale alpha / rank.
        alpha: f64,
        /// Layers that get an adapter.
        targets: Vec<TargetModule>,
        /// Folder of an adapter to begin from, instead of random values; its shape is taken where none is given.
        init: PathBuf,
    }
}

section! {
    /// `[optim]`: the optimizer and its schedule.
    OptimRecipe {
        /// Peak learning rate.
        lr: f64,
        /// Multiplies the peak learning rate, given or chosen.
        lr_multiplier: f64,
        /// Decay of the two moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// Largest global gradient norm; 0 for no clipping.
        clip_norm: f64,
        /// Deviations above the recent losses at which a loss is a spike, whose rows are looked at; 0 for never.
        spike_z: f64,
        /// Steps of warm-up.
        warmup_steps: usize,
        /// Warm-up as a share of all steps.
        warmup_ratio: f64,
        /// Shape of the decay.
        schedule: Schedule,
        /// Times each row is seen.
        epochs: usize,
        /// Rows an update.
        batch_rows: usize,
        /// Stop after so many updates; the schedule ends there too.
        max_steps: usize,
    }
}

section! {
    /// `[preference]`: how preferences are learnt. Which settings there are depends on the method.
    PreferenceRecipe {
        /// How closely the policy is held to the reference (dpo, kto), or how rewards are scaled (simpo).
        beta: f64,
        /// By how much the preferred answer should lead (simpo).
        gamma: f64,
        /// Weight of the odds ratio beside the likelihood (orpo).
        lambda: f64,
        /// Weight of desirable answers (kto).
        desirable_weight: f64,
        /// Weight of undesirable answers (kto).
        undesirable_weight: f64,
    }
}

section! {
    /// `[valid]`: how often to validate and when to give up.
    ValidRecipe {
        /// Updates between validations.
        every: usize,
        /// Validations without a new best before stopping early; 0 for never.
        patience: usize,
    }
}

section! {
    /// `[checkpoint]`: how often to save. Has no effect on the result, and may change between sessions of a run.
    CheckpointRecipe {
        /// Updates between checkpoints; 0 leaves it to the clock.
        every_steps: usize,
        /// Seconds between checkpoints; 0 leaves it to the steps.
        every_s: f64,
        /// Keep the adapter of each epoch's end, under `epochs/` in the run's folder.
        each_epoch: bool,
    }
}

/// The whole of `recipe.toml`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// How to train.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Name or path of the base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Seed of everything random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Longest row in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_seq_len: Option<usize>,
    /// Leave longer rows out, and say so, instead of refusing them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_long: Option<bool>,
    /// Most tokens a backward pass; bounds memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_tokens: Option<usize>,
    /// Most memory, in MiB: decides `micro_tokens` and how many layers are computed twice. Not recorded in the settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    /// Compute what rows of a batch begin with alike once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_prefixes: Option<bool>,
    /// What to learn from.
    pub data: DataRecipe,
    /// The adapter's shape.
    pub lora: LoraRecipe,
    /// How preferences are learnt.
    #[serde(skip_serializing_if = "is_default")]
    pub preference: PreferenceRecipe,
    /// The optimizer.
    pub optim: OptimRecipe,
    /// Validation.
    pub valid: ValidRecipe,
    /// Checkpoints.
    pub checkpoint: CheckpointRecipe,
}

fn is_default(preference: &PreferenceRecipe) -> bool {
    *preference == PreferenceRecipe::default()
}

impl Recipe {
    /// Reads a recipe file.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let text = fs_err::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
        Self::parse(&text, path)
    }

    /// Parses a recipe; errors name the file and the path of the setting.
    pub fn parse(text: &str, path: &Path) -> Result<Self, TrainError> {
        let broken = |field: String, reason: String| TrainError::Recipe {
            path: path.to_path_buf(),
            field,
            reason: reason.trim_end().replace('\n', " "),
        };
        let document = toml::Deserializer::parse(text).map_err(|e| {
            let line = e
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            broken(format!("line {line}"), e.message().to_string())
        })?;
        serde_path_to_error::deserialize(document).map_err(|e| {
            let field = e.path().to_string();
            broken(field, e.into_inner().message().to_string())
        })
    }

    /// This with every field that `over` gives replaced by `over`'s.
    #[must_use]
    pub fn overlaid(self, over: Self) -> Self {
        // The two ways to give a warm-up exclude each other, so the upper one clears the lower.
        let mut below = self.optim;
        if over.optim.warmup_steps.is_some() || over.optim.warmup_ratio.is_some() {
            (below.warmup_steps, below.warmup_ratio) = (None, None);
        }
        Self {
            method: over.method.or(self.method),
            base: over.base.or(self.base),
            seed: over.seed.or(self.seed),
            max_seq_len: over.max_seq_len.or(self.max_seq_len),
            skip_long: over.skip_long.or(self.skip_long),
            micro_tokens: over.micro_tokens.or(self.micro_tokens),
            memory_mb: over.memory_mb.or(self.memory_mb),
            share_prefixes: over.share_prefixes.or(self.share_prefixes),
            data: self.data.overlaid(over.data),
            lora: self.lora.overlaid(over.lora),
            preference: self.preference.overlaid(over.preference),
            optim: below.overlaid(over.optim),
            valid: self.valid.overlaid(over.valid),
            checkpoint: self.checkpoint.overlaid(over.checkpoint),
        }
    }

    /// The recipe as TOML, with only the fields that are given.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe holds only strings, numbers and lists")
    }
}

#[cfg(test)]
mod tests;
