//! The run directory: who holds it, what it was started with, what it ended with.
//!
//! `recipe.toml` (as given), `settings.json` (resolved), `events.jsonl`, `checkpoints/`, `adapter/`, and `result.json`
//! once the run is over. `.lock` is held by the process that trains into it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::{sweep, write_atomic};
use super::{TrainError, TrainPlan, TrainResult};
use crate::recipe::MachineSettings;

/// How often, and how long apart, a lock is tried before another process is said to hold it.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Settings that may change between sessions of a run: they do not touch the result. Data, base and first adapter
/// are held to their SHA-256, not to their names; the machine has a word of its own.
const FREE: [&str; 6] = [
    "machine.",
    "checkpoint.",
    "base.name",
    "data.train",
    "data.valid",
    "lora.init",
];

/// A run directory held by this process.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    /// Held until drop; the kernel lets go of it even when the process is killed.
    _lock: File,
}

impl RunDir {
    /// Takes the directory and either starts a run in it or finds the same run there.
    ///
    /// The second value is what the user should know of it.
    pub(crate) fn open(plan: &TrainPlan) -> Result<(Self, Vec<String>), TrainError> {
        let path = plan.out.clone();
        fs::create_dir_all(&path).map_err(|e| TrainError::io(&path, e))?;
        let lock_path = path.join(".lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path);
        let lock = lock.map_err(|e| TrainError::io(&lock_path, e))?;
        // A program that is just being started from this process shares its open files for a moment.
        let mut looks = 0;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if looks < LOOKS => {
                    looks += 1;
                    thread::sleep(BETWEEN_LOOKS);
                }
                Err(TryLockError::WouldBlock) => return Err(TrainError::Locked { path }),
                Err(TryLockError::Error(e)) => return Err(TrainError::io(&lock_path, e)),
            }
        }
        sweep(&path)?;
        let run = Self { path, _lock: lock };
        let settings_path = run.settings_path();
        let text = serde_json::to_string_pretty(&plan.settings)
            .map_err(|e| TrainError::io(&settings_path, e.into()))?;
        let mut warnings = Vec::new();
        if settings_path.exists() {
            run.compare(&text)?;
            if !run.path.join("result.json").exists()
                && let Some(error) = run.elsewhere(&plan.settings.machine)?
            {
                if !plan.allow_other_machine {
                    return Err(error);
                }
                warnings.push(format!("{error}: it was accepted"));
                write_atomic(&settings_path, text.as_bytes())?;
            }
        } else {
            let taken = [
                "adapter",
                "model",
                "checkpoints",
                "events.jsonl",
                "result.json",
            ];
            if taken.iter().any(|name| run.path.join(name).exists()) {
                return Err(TrainError::NotARun { path: run.path });
            }
            write_atomic(
                &run.path.join("recipe.toml"),
                plan.recipe.to_toml().as_bytes(),
            )?;
            write_atomic(&settings_path, text.as_bytes())?;
        }
        Ok((run, warnings))
    }

    /// Says that the run was begun by another version or on another instruction set, if it was.
    fn elsewhere(&self, now: &MachineSettings) -> Result<Option<TrainError>, TrainError> {
        #[derive(Deserialize)]
        struct Was {
            machine: MachineSettings,
        }
        let path = self.settings_path();
        let text = fs::read_to_string(&path).map_err(|e| TrainError::io(&path, e))?;
        let Was { machine: was } =
            serde_json::from_str(&text).map_err(|e| TrainError::Corrupt {
                path: path.clone(),
                reason: e.to_string(),
            })?;
        Ok((was != *now).then(|| TrainError::OtherMachine {
            path: self.path.clone(),
            was: was.to_string(),
            now: now.to_string(),
        }))
    }

    /// Refuses settings that would end with other bytes, naming the first that differs.
    fn compare(&self, now: &str) -> Result<(), TrainError> {
        let path = self.settings_path();
        let was = fs::read_to_string(&path).map_err(|e| TrainError::io(&path, e))?;
        let corrupt = |e: serde_json::Error| TrainError::Corrupt {
            path: path.clone(),
            reason: e.to_string(),
        };
        // Both sides go through the same text, so a number cannot differ by how it was parsed.
        let was: Value = serde_json::from_str(&was).map_err(corrupt)?;
        let now: Value = serde_json::from_str(now).map_err(corrupt)?;
        let (was, now) = (flatten(&was), flatten(&now));
        let names = now.iter().chain(&was).map(|(name, _)| name);
        for name in names.filter(|name| {
            !FREE
                .iter()
                .any(|free| *name == free || free.ends_with('.') && name.starts_with(free))
        }) {
            let value = |side: &[(String, String)]| {
                side.iter()
                    .find(|(n, _)| n == name)
                    .map_or("not set".to_string(), |(_, v)| v.clone())
            };
            let (was, now) = (value(&was), value(&now));
            if was != now {
                return Err(TrainError::Differs {
                    path: self.path.clone(),
                    field: name.clone(),
                    was,
                    now,
                });
            }
        }
        Ok(())
    }

    /// What the run ended with, if it is over.
    pub(crate) fn result(&self) -> Result<Option<TrainResult>, TrainError> {
        let path = self.path.join("result.json");
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
        let result = serde_json::from_slice(&bytes);
        result.map(Some).map_err(|e| TrainError::Corrupt {
            path,
            reason: e.to_string(),
        })
    }

    /// Marks the run as over.
    pub(crate) fn finish(&self, result: &TrainResult) -> Result<(), TrainError> {
        let path = self.path.join("result.json");
        let text =
            serde_json::to_vec_pretty(result).map_err(|e| TrainError::io(&path, e.into()))?;
        write_atomic(&path, &text)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn events_path(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    fn settings_path(&self) -> PathBuf {
        self.path.join("settings.json")
    }
}

/// Every leaf as `a.b.c` and its JSON; lists count as leaves.
fn flatten(value: &Value) -> Vec<(String, String)> {
    let Value::Object(map) = value else {
        return vec![(String::new(), value.to_string())];
    };
    let mut leaves = Vec::new();
    for (key, value) in map {
        for (below, leaf) in flatten(value) {
            let name = if below.is_empty() {
                key.clone()
            } else {
                format!("{key}.{below}")
            };
            leaves.push((name, leaf));
        }
    }
    leaves
}
