//! `cargo xtask exact`: one digest, whatever the way, with SmolLM2.
//!
//! Answering: 64 requests of every kind with two adapters, at 1, 2 and 4 threads, 1, 7 and 64 at a time, with
//! caches and guesses on and off. Training: a short run at 1, 2 and 4 threads, and one that is killed again and
//! again. The same runs in CI on the tiny model, as tests and in `cargo xtask test`.

use anyhow::Result;

use crate::bantam::Bantam;
use crate::resume::{self, Task};
use crate::sh;

/// `cargo xtask exact`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which half
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// The model: a catalogue name or a path
    #[arg(long, default_value = "smollm2-135m-instruct")]
    model: String,
    /// Each thread count with each concurrency once, the switches taking turns
    #[arg(long)]
    quick: bool,
}

/// The halves.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Answering
    Answers,
    /// Training
    Training,
    /// Both
    All,
}

/// Runs them; whether there was one digest each.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let bantam = Bantam::build("release")?;
    if args.what != What::Training {
        let mut words = vec!["bench", "--same-bits", "--model", &args.model];
        words.extend(args.quick.then_some("--quick"));
        sh::run(&mut bantam.command_with_cache(&words))?;
    }
    if args.what != What::Answers {
        let task = Task::banking77(&args.model)?;
        let reference = resume::uninterrupted(&bantam, task)?;
        for threads in [2, 4] {
            resume::same_bits_with_threads(&bantam, &reference, threads)?;
        }
        resume::killed_and_resumed(&bantam, &reference, 2, 0)?;
        println!("training: one digest, {}", reference.sha256());
    }
    Ok(true)
}
