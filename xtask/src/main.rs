//! The project's own chores, as `cargo xtask CHORE`.
//!
//! - `test`: everything CI runs, from a fresh clone;
//! - `tidy`: the house rules that no lint knows;
//! - `peers`: Bantam beside PEFT, transformers and llama.cpp, on demand;
//! - `exact`: the same bits in every way a model can be run and trained;
//! - `tiny`, `goldens`: the files that tests stand on.
//!
//! Chores may shell out. Nothing is installed outside `target/`, save the peers, which live in `$BANTAM_PEERS`.

mod bantam;
mod clients;
mod exact;
mod http;
mod peers;
mod resume;
mod server;
mod sh;
mod tally;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "The project's own chores",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Install what the tests need under `target/` and run them all, as CI does
    Test(test::Args),
    /// Check the house rules that no lint knows
    Tidy,
    /// Compare with PEFT, transformers and llama.cpp (slow, needs gigabytes; not part of CI)
    Peers(peers::Args),
    /// Answer and train with SmolLM2 in every way there is: one digest each
    Exact(exact::Args),
    /// Write a two-layer chat model and rows to try commands on
    Tiny {
        /// Folder to write into
        dir: PathBuf,
        /// Seed of the weights and the rows
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Make the PyTorch goldens of `crates/testkit` again
    Goldens,
}

fn main() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::Test(args) => test::run(&args),
        Chore::Tidy => tidy::run(),
        Chore::Peers(args) => peers::run(&args),
        Chore::Exact(args) => exact::run(&args),
        Chore::Tiny { dir, seed } => bantam::write_tiny(&dir, seed),
        Chore::Goldens => peers::goldens(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
