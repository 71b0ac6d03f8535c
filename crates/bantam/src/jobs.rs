//! Trainings that the server hands out, each in a process of its own: whatever becomes of it, the server goes on.
//!
//! The process is `bantam train`, as anyone could type it, with three things added by `--worker`: it yields to everything
//! else on the machine, it cannot take more memory than it is given, and it saves its state and ends when its stdin
//! is closed, be it that the server says so or that the server is no more.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bantam_lab::data::RowOptions;
use bantam_lab::events::{RunEvent, read_events};
use bantam_lab::recipe::{
    CheckpointRecipe, DataRecipe, Lines, LoraRecipe, Method, OptimRecipe, PreferenceRecipe, Recipe,
};
use bantam_serve::{Chosen, Ended, Trainer, TrainingEvent, TrainingJob, TrainingMethod};
use serde_json::Value;

use crate::error::{EXIT_INTERRUPTED, EXIT_OK, EXIT_USER};
use crate::loader::{Shelf, rows};
use crate::settings::ServedSettings;

/// How long a training may take to save its state.
pub(crate) const GRACE: Duration = Duration::from_secs(60);
/// Seconds between checkpoints: what a training that is killed computes again.
const CHECKPOINT_S: f64 = 20.0;
/// Niceness of a training.
const NICE: i32 = 10;
/// The most bytes of a failed training's words that are told.
const WORDS: usize = 2000;

/// Trains for the server, by way of its shelf.
pub(crate) struct Workers {
    shelf: Arc<Shelf>,
    program: PathBuf,
    threads: Option<u16>,
    memory_mb: Option<u64>,
    /// Where the models lie that were trained here.
    trained: Mutex<HashMap<String, PathBuf>>,
}

impl Workers {
    /// Each training gets so many threads and so much memory.
    pub(crate) fn new(
        shelf: Arc<Shelf>,
        threads: Option<u16>,
        memory_mb: Option<u64>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            shelf,
            program: std::env::current_exe().context("where is this program?")?,
            threads,
            memory_mb,
            trained: Mutex::default(),
        })
    }

    /// The name or path of a served model, and the adapter over it, if there is one.
    fn origin(&self, model: &str) -> anyhow::Result<(String, Option<PathBuf>)> {
        let trained = self.trained.lock().unwrap_or_else(PoisonError::into_inner);
        let place = trained.get(model).map(|path| path.display().to_string());
        drop(trained);
        let text = place.or_else(|| self.shelf.reference(model));
        let text = text.with_context(|| format!("`{model}` cannot be trained on here"))?;
        self.shelf.origin(&text)
    }

    fn recipe(&self, job: &TrainingJob) -> anyhow::Result<Recipe> {
        let (base, init) = self.origin(&job.base)?;
        let (method, beta) = match job.method {
            TrainingMethod::Supervised => (None, None),
            TrainingMethod::Dpo { beta } => (Some(Method::Dpo), beta),
        };
        Ok(Recipe {
            method,
            preference: PreferenceRecipe {
                beta,
                ..PreferenceRecipe::default()
            },
            base: Some(base),
            seed: Some(job.seed),
            // The limit is for the whole process; what training needs beside its own is little.
            memory_mb: self.memory_mb.map(|mb| mb * 3 / 4),
            data: DataRecipe {
                train: Some(job.train.clone()),
                valid: job.valid.clone(),
                ..DataRecipe::default()
            },
            lora: LoraRecipe {
                init,
                ..LoraRecipe::default()
            },
            optim: OptimRecipe {
                epochs: job.epochs,
                batch_rows: job.batch_rows,
                lr_multiplier: job.lr_multiplier,
                ..OptimRecipe::default()
            },
            checkpoint: CheckpointRecipe {
                each_epoch: Some(true),
                every_s: Some(CHECKPOINT_S),
                every_steps: None,
            },
            ..Recipe::default()
        })
    }

    fn start(&self, job: &TrainingJob) -> anyhow::Result<(Child, PathBuf)> {
        let folder = job.run.parent().context("a run lies in its job's folder")?;
        let recipe = folder.join("recipe.toml");
        // What a training began with it goes on with, whatever is served by now.
        if !recipe.exists() {
            fs_err::write(&recipe, self.recipe(job)?.to_toml())?;
        }
        let log = folder.join("worker.log");
        let mut command = Command::new(&self.program);
        command
            .args(["train", "--quiet", "--worker", "--json"])
            .args([Path::new("--recipe"), &recipe, Path::new("--out"), &job.run])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs_err::File::create(&log)?.into_parts().0);
        if let Some(threads) = self.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        if let Some(mb) = self.memory_mb {
            command.args(["--worker-memory-mb", &mb.to_string()]);
        }
        let child = command.spawn().context("could not start a training")?;
        Ok((child, log))
    }
}

/// Waits for a process, which is told to end once `stop` is set.
fn wait(child: &mut Child, stop: &AtomicBool) -> std::io::Result<ExitStatus> {
    let mut told: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        match told {
            None if stop.load(Ordering::Relaxed) => {
                drop(child.stdin.take());
                told = Some(Instant::now());
            }
            // What it has not saved it computes again.
            Some(since) if since.elapsed() > GRACE => child.kill()?,
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a training said at its end, in a line.
fn last_words(log: &Path) -> String {
    let text = fs_err::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(WORDS)..]).into_owned();
    let words: Vec<&str> = text.split_whitespace().collect();
    let words = words.join(" ");
    words
        .strip_prefix("error: ")
        .map_or_else(|| words.clone(), str::to_owned)
}

/// Is this how a process speaks that was refused memory? A thread whose stack finds no room says `EAGAIN`.
fn ran_out(words: &str) -> bool {
    let signs = ["memory allocation of", "(os error 11)", "(os error 12)"];
    signs.iter().any(|sign| words.contains(sign))
}

impl Trainer for Workers {
    fn refusal(&self, model: &str) -> Option<String> {
        self.origin(model).err().map(|error| format!("{error:#}"))
    }

    fn check(&self, path: &Path, method: TrainingMethod) -> Result<usize, String> {
        let (lines, per_line) = match method {
            TrainingMethod::Supervised => (Lines::Rows, 1),
            TrainingMethod::Dpo { .. } => (Lines::Pairs, 2),
        };
        match rows::load(lines, path, &RowOptions::default()) {
            Ok(rows) => Ok(rows.len() / per_line),
            // The folder is the server's business.
            Err(error) => Err(error
                .to_string()
                .replace(&path.display().to_string(), "line")),
        }
    }

    fn train(&self, job: &TrainingJob, stop: &AtomicBool) -> Ended {
        let started = self.start(job);
        let (mut child, log) = match started {
            Ok(started) => started,
            Err(error) => return Ended::Failed(format!("{error:#}")),
        };
        let status = match wait(&mut child, stop) {
            Ok(status) => status,
            Err(error) => return Ended::Died(error.to_string()),
        };
        match status.code().and_then(|code| u8::try_from(code).ok()) {
            Some(EXIT_OK) => Ended::Finished,
            Some(EXIT_INTERRUPTED) => Ended::Stopped,
            // It would end so again: the limit is the process's own, whatever else the machine does.
            _ if self.memory_mb.is_some() && ran_out(&last_words(&log)) => {
                let mb = self.memory_mb.unwrap_or_default();
                Ended::Failed(format!(
                    "the training needs more than the {mb} MiB that it may take; hint: serve with a larger `--train-memory-mb`, or train on shorter rows"
                ))
            }
            Some(EXIT_USER) => Ended::Failed(last_words(&log)),
            _ if stop.load(Ordering::Relaxed) => Ended::Stopped,
            _ => Ended::Died(format!("{status}; {}", last_words(&log))),
        }
    }

    fn events(&self, run: &Path) -> Vec<TrainingEvent> {
        let mut events = Vec::new();
        let mut at = 0;
        for event in read_events(&run.join("events.jsonl")).unwrap_or_default() {
            match event {
                RunEvent::Step {
                    step,
                    total,
                    loss,
                    tokens,
                    elapsed_s,
                    ..
                } => {
                    at = step;
                    events.push(TrainingEvent::Step {
                        step,
                        total,
                        loss,
                        tokens,
                        elapsed_s,
                    });
                }
                RunEvent::Valid { step, loss, .. } => {
                    events.push(TrainingEvent::Valid { step, loss });
                }
                RunEvent::Warning { message } => {
                    events.push(TrainingEvent::Warning { step: at, message });
                }
                RunEvent::RowsDropped { step, rows, .. } => {
                    for row in rows {
                        let message = format!("{} is left out: {}", row.place, row.reason);
                        events.push(TrainingEvent::Warning { step, message });
                    }
                }
                RunEvent::RolledBack { step, reason, .. } => {
                    let message = format!("step {step} was taken back, {reason}");
                    events.push(TrainingEvent::Warning { step: at, message });
                }
                RunEvent::EarlyStop {
                    step, best_step, ..
                } => {
                    let message = format!(
                        "stopped early: the validation loss was best after step {best_step}"
                    );
                    events.push(TrainingEvent::Warning { step, message });
                }
                RunEvent::RunStarted { .. }
                | RunEvent::StepSkipped { .. }
                | RunEvent::Checkpoint { .. }
                | RunEvent::Resumed { .. }
                | RunEvent::Finished { .. } => {}
            }
        }
        events
    }

    fn chosen(&self, run: &Path) -> Option<Chosen> {
        let text = fs_err::read_to_string(run.join("settings.json")).ok()?;
        let settings: Value = serde_json::from_str(&text).ok()?;
        let number = |name: &str| settings["optim"][name].as_u64().map(|n| n as usize);
        Some(Chosen {
            epochs: number("epochs")?,
            batch_rows: number("batch_rows")?,
            steps: number("steps")?,
            beta: settings["preference"]["beta"].as_f64(),
        })
    }

    fn epochs(&self, run: &Path) -> Vec<(usize, PathBuf)> {
        let Ok(entries) = fs_err::read_dir(run.join("epochs")) else {
            return Vec::new();
        };
        let mut epochs: Vec<(usize, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let step = name.strip_prefix("step-")?.parse().ok()?;
                // The adapter appears whole.
                let is_whole = entry.path().join("adapter").is_dir();
                is_whole.then(|| (step, entry.path()))
            })
            .collect();
        epochs.sort_unstable();
        epochs
    }

    fn serve(&self, folder: &Path, id: &str) -> Result<(), String> {
        let settings = ServedSettings {
            model: folder.display().to_string(),
            id: id.to_owned(),
            aliases: Vec::new(),
        };
        self.shelf
            .add_run(folder, &settings)
            .map_err(|error| format!("{error:#}"))?;
        let mut trained = self.trained.lock().unwrap_or_else(PoisonError::into_inner);
        trained.insert(id.to_owned(), folder.to_owned());
        Ok(())
    }
}

/// In a training's process: yields to others, takes no more memory than so many MiB, and sets `cancel` when stdin ends.
pub(crate) fn become_worker(
    memory_mb: Option<u64>,
    cancel: &Arc<AtomicBool>,
) -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, nice, setrlimit};
        nice(NICE).context("could not lower the priority")?;
        if let Some(mb) = memory_mb {
            let limit = Some(mb << 20);
            let limit = Rlimit {
                current: limit,
                maximum: limit,
            };
            setrlimit(Resource::As, limit).context("could not limit the memory")?;
        }
    }
    let cancel = Arc::clone(cancel);
    std::thread::Builder::new()
        .name("leash".to_owned())
        .spawn(move || {
            let mut byte = [0];
            while matches!(std::io::stdin().read(&mut byte), Ok(n) if n > 0) {}
            cancel.store(true, Ordering::SeqCst);
        })?;
    Ok(())
}
