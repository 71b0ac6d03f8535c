//! Arguments of the commands that work through a running server.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::JsonArg;

/// `bantam jobs`
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct JobsArgs {
    #[command(flatten)]
    pub(crate) server: ServerArg,
    #[command(subcommand)]
    pub(crate) command: JobsCommand,
}

/// A running server.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct ServerArg {
    /// The server's API
    #[arg(
        long,
        value_name = "URL",
        env = "BANTAM_URL",
        default_value = "http://127.0.0.1:8080/v1",
        global = true
    )]
    pub(crate) url: String,
    /// Key of the server's, if it asks for one
    #[arg(
        long,
        value_name = "KEY",
        env = "BANTAM_API_KEY",
        hide_env_values = true,
        global = true
    )]
    pub(crate) api_key: Option<String>,
}

/// `bantam evals`
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct EvalsArgs {
    #[command(flatten)]
    pub(crate) server: ServerArg,
    #[command(subcommand)]
    pub(crate) command: EvalsCommand,
}

/// What is to be done with evals.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub(crate) enum EvalsCommand {
    /// Make the evals of a promptfoo configuration, or of what OpenAI's Evals API gave
    Import(EvalsImportArgs),
}

/// `bantam evals import`
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct EvalsImportArgs {
    /// promptfooconfig.yaml, or objects of OpenAI's Evals API as JSON or a line each
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The model that is judged, in place of promptfoo's providers
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// The model that judges where an assertion needs one
    #[arg(long, value_name = "MODEL")]
    pub(crate) judge: Option<String>,
    /// Import what is left where something is not known here
    #[arg(long)]
    pub(crate) skip_unsupported: bool,
    /// Start the runs: promptfoo's prompts and providers, or OpenAI's answers judged again
    #[arg(long)]
    pub(crate) run: bool,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// What is to be done with jobs.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub(crate) enum JobsCommand {
    /// List the jobs, newest first
    List(JobsListArgs),
    /// Upload rows and have a model trained on them
    Create(JobsCreateArgs),
    /// Show a job
    Show(JobArgs),
    /// Tell what happens in a job until it is over; fails if the job does
    Follow(JobArgs),
    /// End a job
    Cancel(JobArgs),
    /// Let a job rest; what it has learned is kept
    Pause(JobArgs),
    /// Let a job that rests go on
    Resume(JobArgs),
}

/// `bantam jobs list`
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct JobsListArgs {
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) limit: u32,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// `bantam jobs create`
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct JobsCreateArgs {
    /// Rows to learn from, as JSON lines
    #[arg(value_name = "FILE")]
    pub(crate) rows: PathBuf,
    /// The served model to begin from
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,
    /// Rows to validate on
    #[arg(long, value_name = "FILE")]
    pub(crate) valid: Option<PathBuf>,
    /// Part of the tuned model's name
    #[arg(long, value_name = "TEXT")]
    pub(crate) suffix: Option<String>,
    /// Seed of everything random
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u32>,
    /// Times each row is seen [default: chosen by the number of rows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) epochs: Option<u32>,
    /// Rows an update [default: chosen by the number of rows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch_rows: Option<u32>,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}

/// A job, for the commands that need no more.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct JobArgs {
    /// The job's name, `ftjob-...`
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) json: JsonArg,
}
