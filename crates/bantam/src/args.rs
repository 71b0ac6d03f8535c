//! What may be typed: every command and flag, with no defaults resolved.
//!
//! Flags that a recipe, the environment or the machine can also answer are `Option`s here;
//! [`crate::settings`] turns them into values that are all present.

mod client;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use client::{
    EvalsArgs, EvalsCommand, EvalsImportArgs, JobArgs, JobsArgs, JobsCommand, JobsCreateArgs,
    JobsListArgs,
};

/// Specialise a small language model on your own examples, prove it, and serve it, all on a CPU.
#[derive(Debug, Parser)]
#[command(
    name = "bantam",
    version,
    about = "Specialise a small language model on your own examples, prove it, and serve it, all on a CPU",
    after_help = "Start with `bantam demo`: it fetches a model and data, trains, judges and shows what to type next.",
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub(crate) struct GlobalArgs {
    /// Say nothing on stderr but warnings and errors
    #[arg(long, short, global = true, display_order = 900)]
    pub(crate) quiet: bool,
}

/// The commands, in the order a newcomer meets them.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Turn messy US addresses into JSON: fetch, train, judge, report, in one go
    Demo(DemoArgs),
    /// Fetch a base model into the cache
    Pull(PullArgs),
    /// List the base models of the catalogue and which of them are cached
    Models(ModelsArgs),
    /// Specialise a base model on your own examples
    Train(Box<TrainArgs>),
    /// Score a model on held-out examples
    Eval(EvalArgs),
    /// Talk to a model in the terminal
    Chat(ChatArgs),
    /// Give up every right and run a grader's program: what a server does for each row
    #[command(hide = true)]
    Sandbox(SandboxArgs),
    /// Serve a model behind the OpenAI API
    Serve(ServeArgs),
    /// Turn texts into vectors
    Embed(EmbedArgs),
    /// Make, list and revoke the keys of a server
    #[command(subcommand)]
    Keys(KeysCommand),
    /// The fine-tuning jobs of a running server: make, list, follow, cancel, pause, resume
    Jobs(JobsArgs),
    /// The evals of a running server: take over those of promptfoo and OpenAI
    Evals(EvalsArgs),
    /// Merge a trained run into its base, as one model for other programs
    Export(ExportArgs),
    /// Measure how fast a model answers on this machine, beside what the machine could do
    Bench(BenchArgs),
    /// Show what a model file or folder holds
    Inspect(InspectArgs),
    /// Check this machine: instruction set, cores, memory, Python, cache
    Doctor(DoctorArgs),
}

/// `--json`, for the commands that report something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub(crate) struct JsonArg {
    /// Print the result as one JSON object, the last line of stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// How many threads to compute with.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ThreadsArg {
    /// Threads to compute with; the results do not depend on it [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
}

/// `--weights`
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WeightsArg {
    /// How the weights are held while the model runs
    #[arg(long, value_name = "KIND", value_enum, default_value = "auto")]
    pub(crate) weights: WeightsKind,
}

/// How weights are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightsKind {
    /// What suits the file: block-quantised ones as they are, all others in bf16
    #[default]
    Auto,
    /// Block-quantised tensors as they are in the file, plain ones in bf16
    Keep,
    /// Eight bits and a share of a scale
    Q8,
    /// What training computes with
    Bf16,
    /// Full precision
    F32,
}

impl From<WeightsKind> for bantam_model::Weights {
    fn from(kind: WeightsKind) -> Self {
        match kind {
            WeightsKind::Auto => Self::Auto,
            WeightsKind::Keep => Self::Keep,
            WeightsKind::Q8 => Self::Q8,
            WeightsKind::Bf16 => Self::Bf16,
            WeightsKind::F32 => Self::F32,
        }
    }
}

/// `bantam demo`
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Folder for the run, the scorecard and the report
    #[arg(long, value_name = "DIR", default_value = "bantam-demo")]
    pub(crate) out: PathBuf,
    /// Seed of the shuffling and of the adapter's first values
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Stop training after this many steps (a quick look; the scores will be worse)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_steps: Option<u64>,
    /// Judge on at most this many rows of each test set
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam pull`
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Catalogue name (see `bantam models`), or a local GGUF file or Hugging Face folder
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Read every cached byte again and compare its digest, instead of trusting size and time
    #[arg(long)]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam models`
#[derive(Debug, Args)]
pub(crate) struct ModelsArgs {
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// What `bantam train` trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodArg {
    /// An adapter of low rank on every linear layer
    Sft,
    /// Every weight: twice the time, three times the memory
    Full,
    /// An adapter that prefers some answers to others
    Dpo,
    /// The same without a reference, while learning the preferred answers
    Orpo,
    /// The same from answers that are each called desirable or not
    Kto,
    /// The same from average log-probabilities
    Simpo,
}

impl From<MethodArg> for bantam_lab::recipe::Method {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Sft => Self::Sft,
            MethodArg::Full => Self::Full,
            MethodArg::Dpo => Self::Dpo,
            MethodArg::Orpo => Self::Orpo,
            MethodArg::Kto => Self::Kto,
            MethodArg::Simpo => Self::Simpo,
        }
    }
}

/// `bantam train`
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// Base model: catalogue name, GGUF file or Hugging Face folder
    #[arg(long, value_name = "NAME|PATH")]
    pub(crate) base: Option<String>,
    /// Training rows: JSON lines of `messages`, `prompt`/`completion` or `text`/`label`; preferences, of two answers
    #[arg(long, value_name = "FILE")]
    pub(crate) train: Option<PathBuf>,
    /// Validation rows; early stopping keeps the checkpoint that does best on them
    #[arg(long, value_name = "FILE")]
    pub(crate) valid: Option<PathBuf>,
    /// Run directory: adapter (or model), checkpoints, events. The same command resumes an unfinished run
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Recipe (TOML); flags given here win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) recipe: Option<PathBuf>,
    /// System message put before every row that has none
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// What is trained: `sft`, an adapter on every linear layer, or `full`, every weight; from preferences: `dpo`,
    /// `orpo`, `simpo` (pairs) or `kto` [default: sft]
    #[arg(long, value_enum, hide_possible_values = true)]
    pub(crate) method: Option<MethodArg>,
    /// Most memory, in MiB: decides how many tokens a pass takes, and what is computed twice instead of being kept
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) memory_mb: Option<u64>,
    /// Compute each row whole, even where the rows of a batch begin alike
    #[arg(long)]
    pub(crate) no_share_prefixes: bool,
    /// Rank of the adapter
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) rank: Option<u32>,
    /// Scale of the adapter: its output is multiplied by alpha / rank
    #[arg(long, value_name = "A", allow_negative_numbers = true, value_parser = positive)]
    pub(crate) alpha: Option<f64>,
    /// Begin from this adapter (a run, or a folder in PEFT's format) instead of random values
    #[arg(long, value_name = "DIR|RUN")]
    pub(crate) init_adapter: Option<PathBuf>,
    /// How closely `dpo` and `kto` hold to the model they begin with; for `simpo` the scale of its rewards
    #[arg(long, value_name = "B", allow_negative_numbers = true, value_parser = positive)]
    pub(crate) beta: Option<f64>,
    /// Peak learning rate
    #[arg(long, value_name = "LR", allow_negative_numbers = true, value_parser = positive)]
    pub(crate) lr: Option<f64>,
    /// Rows an optimiser step
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch: Option<u32>,
    /// Passes over the training rows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) epochs: Option<u32>,
    /// Seed of the shuffling and of the adapter's first values
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Stop after this many optimiser steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_steps: Option<u64>,
    /// Go on with a run that another version of bantam began, or another instruction set: as good a result, other bits
    #[arg(long)]
    pub(crate) allow_other_machine: bool,
    /// Train on these batches, a JSON list of lists of row numbers from 0: to compare with another trainer
    #[arg(long, value_name = "FILE", hide = true, requires = "out")]
    pub(crate) order: Option<PathBuf>,
    /// Yield to everything else, and save and end when stdin is closed: how a server trains
    #[arg(long, hide = true, requires = "out")]
    pub(crate) worker: bool,
    /// The most memory of the process, in MiB
    #[arg(long, value_name = "MIB", hide = true, requires = "worker")]
    pub(crate) worker_memory_mb: Option<u64>,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    /// Say what the run would take (steps, tokens, time, memory), and train nothing
    #[arg(long, conflicts_with_all = ["preview", "order"])]
    pub(crate) dry_run: bool,
    /// Print the first N rendered rows with the loss mask visible, and train nothing
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "3", require_equals = true,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) preview: Option<u32>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// How an answer is compared with the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricArg {
    /// The answer equals the reference
    Exact,
    /// Both are JSON and hold the same value
    Json,
    /// The answer names the same label
    Label,
    /// Longest common subsequence of words, F1
    RougeL,
    /// How well the model predicts a plain text, in windows of 512 tokens
    Perplexity,
    /// How often the preferred answer of a pair is the likelier one; of a run, beside its base
    Preference,
}

/// `bantam eval`
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Model: catalogue name, GGUF file, Hugging Face folder, or a run directory of `bantam train`
    #[arg(long, value_name = "NAME|PATH|RUN")]
    pub(crate) model: String,
    /// Test rows, in any of the shapes `bantam train` reads; for perplexity, plain text
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// How answers are compared with the references [default: from the rows]
    #[arg(long, value_enum)]
    pub(crate) metric: Option<MetricArg>,
    /// System message put before every row that has none [default: the run's]
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Let the model answer only JSON that this JSON schema allows
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    pub(crate) schema: Option<PathBuf>,
    /// Let the model answer only one of the labels in this file, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) labels: Option<PathBuf>,
    /// Fit how sure the run is of its labels to these rows, and keep that in its folder for `/v1/decisions`
    #[arg(long, requires = "labels")]
    pub(crate) calibrate: bool,
    /// Score at most this many rows, or windows of a text
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// For perplexity: compare with the same weights computed in f32 as well
    #[arg(long)]
    pub(crate) against_f32: bool,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// Write each row's answer, reference and score here, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) rows_out: Option<PathBuf>,
    /// How weights are held.
    #[command(flatten)]
    pub(crate) weights: WeightsArg,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam chat`
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Model: catalogue name, GGUF file, Hugging Face folder, or a run directory of `bantam train`
    #[arg(long, value_name = "NAME|PATH|RUN")]
    pub(crate) model: String,
    /// System message [default: the run's, if there is one]
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true, value_parser = not_negative)]
    pub(crate) temperature: f64,
    /// Keep only the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true, value_parser = probability)]
    pub(crate) top_p: f64,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// How weights are held.
    #[command(flatten)]
    pub(crate) weights: WeightsArg,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
}

/// `bantam serve`
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Model: catalogue name, GGUF file, Hugging Face folder, or a run directory of `bantam train`
    #[arg(long, value_name = "NAME|PATH|RUN", required_unless_present = "config")]
    pub(crate) model: Option<String>,
    /// Models, aliases and all that the flags set, from a TOML file; flags given here win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: 8080]
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// Name that clients call the model by [default: the name or folder given]
    #[arg(long, value_name = "ID", requires = "model")]
    pub(crate) model_id: Option<String>,
    /// Database of keys (see `bantam keys`); needed for any address but loopback, unless there is an --api-key
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,
    /// Folder that answers, files and batches are kept in [default: kept in memory until the server ends]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Memory for adapters; those that were not asked for longest make way for others [default: 1024]
    #[arg(long, value_name = "MB")]
    pub(crate) adapter_mb: Option<u32>,
    /// Threads of a fine-tuning job [default: one a core]; jobs yield to requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) train_threads: Option<u16>,
    /// The most memory of a fine-tuning job's process [default: no limit]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(256..))]
    pub(crate) train_memory_mb: Option<u64>,
    /// Certificate (PEM), to serve HTTPS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of the certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Key that clients must send as `Authorization: Bearer KEY`; may be given more than once
    #[arg(
        long,
        value_name = "KEY",
        env = "BANTAM_API_KEY",
        hide_env_values = true
    )]
    pub(crate) api_key: Vec<String>,
    /// How weights are held.
    #[command(flatten)]
    pub(crate) weights: WeightsArg,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
}

/// `bantam embed`
#[derive(Debug, Args)]
pub(crate) struct EmbedArgs {
    /// Sentence encoder, or a generating model whose hidden rows are averaged: catalogue name, folder, file or run
    #[arg(long, value_name = "NAME|PATH|RUN", default_value = "all-minilm-l6-v2")]
    pub(crate) model: String,
    /// Texts, as JSON lines: a string, or an object with `text` and perhaps `id`; `-` reads stdin
    #[arg(long, value_name = "FILE|-")]
    pub(crate) data: String,
    /// Read every line as a text of its own instead of as JSON
    #[arg(long)]
    pub(crate) lines: bool,
    /// Write the vectors here, as JSON lines [default: to stdout]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Keep the first N numbers of each vector, scaled to length 1 again
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) dimensions: Option<u32>,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam keys`
#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key and show it, once
    Create(KeysCreateArgs),
    /// List the keys: names, scopes, limits, last use
    List(KeysListArgs),
    /// End a key
    Revoke(KeysRevokeArgs),
}

/// `bantam keys create`
#[derive(Debug, Args)]
pub(crate) struct KeysCreateArgs {
    /// Database of keys; made if it is not there
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: PathBuf,
    /// Whose key it is
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) name: String,
    /// What it may do; may be given more than once
    #[arg(long, value_enum, value_name = "SCOPE", default_values_t = [ScopeArg::Inference])]
    pub(crate) scope: Vec<ScopeArg>,
    /// Requests a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) requests_per_minute: Option<u32>,
    /// Tokens a minute, read and written [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tokens_per_minute: Option<u32>,
    /// Tokens a day of UTC [default: any number]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) tokens_per_day: Option<u64>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam keys list`
#[derive(Debug, Args)]
pub(crate) struct KeysListArgs {
    /// Database of keys
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: PathBuf,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam keys revoke`
#[derive(Debug, Args)]
pub(crate) struct KeysRevokeArgs {
    /// Database of keys
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: PathBuf,
    /// The key's name in the list
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScopeArg {
    /// Ask models
    Inference,
    /// Train them
    Train,
    /// Everything
    Admin,
}

/// The type of the matrices in an exported model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportType {
    /// 8 bits in blocks of 32, GGUF only
    #[value(name = "q8_0")]
    Q8,
    /// 16-bit floats
    F16,
    /// 16-bit floats with the range of f32
    Bf16,
    /// 32-bit floats
    F32,
}

/// `bantam export`
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Run directory of `bantam train`
    #[arg(long, value_name = "RUN")]
    pub(crate) model: String,
    /// What to write: a GGUF file if the name ends in `.gguf`, else a Hugging Face folder
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) out: PathBuf,
    /// Type of the matrices
    #[arg(long, value_enum, default_value = "f16")]
    pub(crate) r#type: ExportType,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// A part of `bantam bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchPart {
    /// Reading prompts of 128, 512 and 2048 tokens
    Prefill,
    /// One answer of 128 tokens
    Decode,
    /// 4, 16 and 64 answers at once
    Streams,
    /// Short chats with one system prompt, from 16 clients
    Chat,
    /// From the start of the process to the first token, loading, memory
    Start,
    /// The matrix products alone, beside this machine's peaks
    Kernels,
}

/// `bantam bench`
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Model: catalogue name, GGUF file, Hugging Face folder, or a run directory of `bantam train`
    #[arg(long, value_name = "NAME|PATH|RUN")]
    pub(crate) model: String,
    /// Measure these parts only [default: all]
    #[arg(long, value_enum, value_name = "PART", value_delimiter = ',')]
    pub(crate) only: Vec<BenchPart>,
    /// Three rounds instead of five, without the longest measurements
    #[arg(long)]
    pub(crate) quick: bool,
    /// Time these chats, one JSON object of `messages` and `max_tokens` a line, and answer them as the server does
    #[arg(long, value_name = "FILE")]
    pub(crate) chats: Option<PathBuf>,
    /// Instead of measuring, answer 64 requests of every kind with 1, 2 and 4 threads, alone and together, with caches
    /// and guesses on and off, and compare the digests of all logits and answers
    #[arg(long, conflicts_with = "only")]
    pub(crate) same_bits: bool,
    /// Give one answer and say when: what `start` runs, each time in a process of its own
    #[arg(long, hide = true)]
    pub(crate) one_answer: bool,
    /// How weights are held.
    #[command(flatten)]
    pub(crate) weights: WeightsArg,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam inspect`
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// GGUF file, Hugging Face folder, or catalogue name of a cached model
    #[arg(value_name = "FILE|DIR")]
    pub(crate) path: PathBuf,
    /// List every tensor, not only the totals
    #[arg(long)]
    pub(crate) tensors: bool,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam doctor`
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

fn number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("not a finite number".into()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    number(text).and_then(|v| {
        if v > 0.0 {
            Ok(v)
        } else {
            Err("must be above 0".into())
        }
    })
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text).and_then(|v| {
        if v >= 0.0 {
            Ok(v)
        } else {
            Err("must not be below 0".into())
        }
    })
}

fn probability(text: &str) -> Result<f64, String> {
    number(text).and_then(|v| {
        if v > 0.0 && v <= 1.0 {
            Ok(v)
        } else {
            Err("must be above 0 and at most 1".into())
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn preview_takes_an_optional_count() {
        let parse = |args: &[&str]| match Cli::try_parse_from([&["bantam", "train"], args].concat())
            .unwrap()
            .command
        {
            Command::Train(train) => train.preview,
            _ => unreachable!(),
        };
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&["--preview"]), Some(3));
        assert_eq!(parse(&["--preview=7"]), Some(7));
        assert_eq!(parse(&["--preview", "--json"]), Some(3));
    }
}

/// `bantam sandbox`
#[derive(Debug, Args)]
pub(crate) struct SandboxArgs {
    /// Seconds of computing
    #[arg(long)]
    pub(crate) seconds: u64,
    /// Memory, in MiB
    #[arg(long)]
    pub(crate) memory_mb: u64,
}
