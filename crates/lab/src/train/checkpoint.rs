//! Folders that are there whole or not at all.
//!
//! `checkpoints/step-N/` holds the adapter, the optimizer's moments, the state of the loop, `manifest.json` with the
//! SHA-256 of each file, and `COMPLETE` with the SHA-256 of the manifest, written last. The folder is made under a
//! temporary name, forced to disk and renamed; older ones are removed only after that, and the one before is kept.
//! No generator state is saved: every random draw is a function of the seed and the step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::adamw::AdamW;
use super::{AdapterFile, TrainError, Trainable};

const COMPLETE: &str = "COMPLETE";
const MANIFEST: &str = "manifest.json";
const TEMPORARY: &str = ".tmp-";

/// Everything of the loop but the big arrays.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoopState {
    /// Steps finished; with the seed, the whole cursor into the data.
    pub(crate) step: usize,
    /// Rows seen.
    pub(crate) rows: u64,
    /// Tokens seen.
    pub(crate) tokens: u64,
    /// Seconds trained, over all sessions. Only reported.
    pub(crate) elapsed_s: f64,
    /// Bits of the last step's loss: decimal text may not bring them back.
    pub(crate) last_loss: u64,
    /// Step and bits of the best validation loss.
    pub(crate) best: Option<(usize, u64)>,
    /// Validations since then.
    pub(crate) stale: usize,
    /// Step of the last validation.
    pub(crate) validated: usize,
    /// Whether the run stops here although steps are left.
    pub(crate) stopped: bool,
    /// Length of the event log at this point.
    pub(crate) events_len: u64,
}

/// All it takes to go on.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) state: LoopState,
    pub(crate) params: Vec<f32>,
    pub(crate) best_params: Option<Vec<f32>>,
    pub(crate) opt: AdamW,
}

/// The `checkpoints` folder of a run.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    pub(crate) fn open(run: &Path) -> Result<Self, TrainError> {
        let dir = run.join("checkpoints");
        fs::create_dir_all(&dir).map_err(|e| TrainError::io(&dir, e))?;
        sweep(&dir)?;
        Ok(Self { dir })
    }

    /// Saves a snapshot and then removes all but the last two.
    pub(crate) fn save<T: Trainable>(
        &self,
        model: &T,
        snapshot: &Snapshot,
    ) -> Result<(), TrainError> {
        let folder = |name: &str, files: Vec<AdapterFile>| {
            files
                .into_iter()
                .map(move |f| AdapterFile {
                    name: format!("{name}/{}", f.name),
                    ..f
                })
                .collect::<Vec<_>>()
        };
        let mut files = folder("adapter", model.adapter_files(&snapshot.params)?);
        if let Some(best) = &snapshot.best_params {
            files.extend(folder("best", model.adapter_files(best)?));
        }
        let AdamW { m, v, t } = &snapshot.opt;
        let mut moments = t.to_le_bytes().to_vec();
        moments.extend(m.iter().chain(v).flat_map(|x| x.to_le_bytes()));
        files.push(AdapterFile {
            name: "optimizer.bin".into(),
            bytes: moments,
        });
        let state = serde_json::to_vec_pretty(&snapshot.state)
            .map_err(|e| TrainError::io(&self.dir, e.into()))?;
        files.push(AdapterFile {
            name: "state.json".into(),
            bytes: state,
        });
        let sums: BTreeMap<_, _> = files
            .iter()
            .map(|f| (f.name.as_str(), sha256(&f.bytes)))
            .collect();
        let manifest =
            serde_json::to_vec_pretty(&sums).map_err(|e| TrainError::io(&self.dir, e.into()))?;
        let marker = sha256(&manifest).into_bytes();
        files.push(AdapterFile {
            name: MANIFEST.into(),
            bytes: manifest,
        });
        files.push(AdapterFile {
            name: COMPLETE.into(),
            bytes: marker,
        });
        write_folder(&self.path(snapshot.state.step), &files)?;
        self.keep_last(2)
    }

    /// Removes all but the newest `n`.
    pub(crate) fn keep_last(&self, n: usize) -> Result<(), TrainError> {
        for step in self.steps()?.into_iter().skip(n) {
            let path = self.path(step);
            fs::remove_dir_all(&path).map_err(|e| TrainError::io(&path, e))?;
        }
        Ok(())
    }

    /// The newest snapshot that can be believed; each newer one that cannot is described in the second value.
    pub(crate) fn load<T: Trainable>(
        &self,
        model: &T,
    ) -> Result<(Option<Snapshot>, Vec<String>), TrainError> {
        let mut broken = Vec::new();
        for step in self.steps()? {
            match self.load_step(model, step) {
                Ok(snapshot) => return Ok((Some(snapshot), broken)),
                Err(error) => broken.push(format!(
                    "checkpoint step-{step} is damaged and is not used: {error}"
                )),
            }
        }
        Ok((None, broken))
    }

    fn load_step<T: Trainable>(&self, model: &T, step: usize) -> Result<Snapshot, TrainError> {
        let dir = self.path(step);
        verify_folder(&dir)?;
        let path = dir.join("state.json");
        let corrupt = |path: &Path, reason: String| TrainError::Corrupt {
            path: path.to_path_buf(),
            reason,
        };
        let state: LoopState =
            serde_json::from_slice(&read(&path)?).map_err(|e| corrupt(&path, e.to_string()))?;
        if state.step != step {
            return Err(corrupt(&path, format!("it is of step {}", state.step)));
        }
        let params = model.read_adapter(&dir.join("adapter"))?;
        let best_params = match state.best {
            Some(_) => Some(model.read_adapter(&dir.join("best"))?),
            None => None,
        };
        let path = dir.join("optimizer.bin");
        let bytes = read(&path)?;
        let n = model.n_params();
        if bytes.len() != 8 + 8 * n {
            return Err(corrupt(
                &path,
                format!(
                    "it has {} bytes, not the {} of {n} parameters",
                    bytes.len(),
                    8 + 8 * n
                ),
            ));
        }
        let (t, moments) = bytes.split_at(8);
        let floats: Vec<f32> = moments
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("chunks of four")))
            .collect();
        let t = u64::from_le_bytes(t.try_into().expect("split at eight"));
        let opt = AdamW {
            m: floats[..n].to_vec(),
            v: floats[n..].to_vec(),
            t,
        };
        Ok(Snapshot {
            state,
            params,
            best_params,
            opt,
        })
    }

    fn path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    /// Steps that have a folder, newest first.
    fn steps(&self) -> Result<Vec<usize>, TrainError> {
        let io = |e| TrainError::io(&self.dir, e);
        let mut steps = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            steps.extend(
                name.to_str()
                    .and_then(|n| n.strip_prefix("step-"))
                    .and_then(|n| n.parse::<usize>().ok()),
            );
        }
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }
}

/// Writes files, in their order, as a folder that appears whole, in the place of whatever had its name.
pub(crate) fn write_folder(path: &Path, files: &[AdapterFile]) -> Result<(), TrainError> {
    let parent = path.parent().expect("a folder of a run has a parent");
    let name = path
        .file_name()
        .expect("a folder of a run has a name")
        .to_string_lossy();
    let temporary = parent.join(format!("{TEMPORARY}{name}"));
    let written = fill_folder(&temporary, files).and_then(|()| {
        remove(path)?;
        fs::rename(&temporary, path).map_err(|e| TrainError::io(path, e))?;
        sync_dir(parent)
    });
    if written.is_err() {
        // Gives the space back; the first error is the one to tell.
        remove(&temporary).ok();
    }
    written
}

fn fill_folder(dir: &Path, files: &[AdapterFile]) -> Result<(), TrainError> {
    remove(dir)?;
    for file in files {
        write_file(&dir.join(&file.name), &file.bytes)?;
    }
    for sub in fs::read_dir(dir)
        .map_err(|e| TrainError::io(dir, e))?
        .flatten()
    {
        if sub.path().is_dir() {
            sync_dir(&sub.path())?;
        }
    }
    sync_dir(dir)
}

/// Checks a checkpoint against its manifest.
fn verify_folder(dir: &Path) -> Result<(), TrainError> {
    let corrupt = |path: &Path, reason: &str| TrainError::Corrupt {
        path: path.to_path_buf(),
        reason: reason.to_string(),
    };
    let (marker, manifest) = (dir.join(COMPLETE), dir.join(MANIFEST));
    let bytes = read(&manifest)?;
    if read(&marker)? != sha256(&bytes).as_bytes() {
        return Err(corrupt(
            &manifest,
            "its SHA-256 is not the one in `COMPLETE`",
        ));
    }
    let sums: BTreeMap<String, String> =
        serde_json::from_slice(&bytes).map_err(|e| corrupt(&manifest, &e.to_string()))?;
    for (name, sum) in &sums {
        let path = dir.join(name);
        if sha256(&read(&path)?) != *sum {
            return Err(corrupt(
                &path,
                "its SHA-256 is not the one in `manifest.json`",
            ));
        }
    }
    Ok(())
}

/// Writes one file for good, by way of a temporary one.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let parent = path.parent().expect("a file of a run has a parent");
    let name = path
        .file_name()
        .expect("a file of a run has a name")
        .to_string_lossy();
    let temporary = parent.join(format!("{TEMPORARY}{name}"));
    let written = write_file(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path).map_err(|e| TrainError::io(path, e)))
        .and_then(|()| sync_dir(parent));
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written
}

/// Removes what a killed process left half-written.
pub(crate) fn sweep(dir: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(dir).map_err(|e| TrainError::io(dir, e))? {
        let entry = entry.map_err(|e| TrainError::io(dir, e))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// SHA-256 as hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let write = || {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| TrainError::io(path, e))
}

fn read(path: &Path) -> Result<Vec<u8>, TrainError> {
    fs::read(path).map_err(|e| TrainError::io(path, e))
}

/// Removes a file or folder, if it is there.
fn remove(path: &Path) -> Result<(), TrainError> {
    let result = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(path, e)),
        _ => Ok(()),
    }
}

/// A rename is only safe once its folder is on disk.
fn sync_dir(dir: &Path) -> Result<(), TrainError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| TrainError::io(dir, e))
}
