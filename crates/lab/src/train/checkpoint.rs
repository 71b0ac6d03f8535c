//! Folders that are there whole or not at all.
//!
//! `checkpoints/step-N/` holds the adapter (or every weight), the optimizer's moments, the state of the loop, `manifest.json` with the
//! SHA-256 of each file, and `COMPLETE` with the SHA-256 of the manifest, written last. The folder is made under a
//! temporary name, forced to disk and renamed; older ones are removed only after that, and the one before is kept.
//! No generator state is saved: every random draw is a function of the seed and the step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::adamw::AdamW;
use super::guard::Guard;
use super::{AdapterFile, Form, PreferenceStats, TrainError, Trainable};

const COMPLETE: &str = "COMPLETE";
const MANIFEST: &str = "manifest.json";
const TEMPORARY: &str = ".tmp-";
/// Parameters as they are, where they are not kept as an adapter.
const NUMBERS: &str = "params.f32";
/// Bytes that pass through memory at once.
const PIECE: usize = 1 << 20;

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
    /// Tokens that went through the model for them.
    pub(crate) computed: u64,
    /// Seconds of training steps, over all sessions. Like the other seconds, only reported.
    pub(crate) train_s: f64,
    /// Seconds of validation.
    pub(crate) valid_s: f64,
    /// Seconds of saving.
    pub(crate) save_s: f64,
    /// Bits of the last step's loss: decimal text may not bring them back.
    pub(crate) last_loss: u64,
    /// Step and bits of the best validation loss.
    pub(crate) best: Option<(usize, u64)>,
    /// What the best one said of preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) best_preference: Option<PreferenceStats>,
    /// Validations since then.
    pub(crate) stale: usize,
    /// Whether the run stops here although steps are left.
    pub(crate) stopped: bool,
    /// Length of the event log at this point.
    pub(crate) events_len: u64,
    /// Step, from 0, and rows of the last update.
    pub(crate) last_update: Option<(usize, Vec<usize>)>,
    /// What is known of the rows' behaviour.
    pub(crate) guard: Guard,
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
    pub(crate) fn save<T: Trainable + ?Sized>(
        &self,
        model: &T,
        snapshot: &Snapshot,
    ) -> Result<(), TrainError> {
        let AdamW { m, v, t } = &snapshot.opt;
        let t = t.to_le_bytes();
        let moments = [Part::Bytes(&t), Part::Floats(m), Part::Floats(v)];
        let state = serde_json::to_vec_pretty(&snapshot.state)
            .map_err(|e| TrainError::io(&self.dir, e.into()))?;
        write_folder(&self.path(snapshot.state.step), |dir| {
            let mut sums = BTreeMap::new();
            let mut write = |name: &str, parts: &[Part<'_>]| {
                let sum = write_file(&dir.join(name), parts)?;
                sums.insert(name.to_string(), sum);
                Ok::<_, TrainError>(())
            };
            let best = snapshot.best_params.as_ref();
            let last = model.form().name();
            for (name, params) in [(last, Some(&snapshot.params)), ("best", best)] {
                let Some(params) = params else { continue };
                match model.form() {
                    Form::Model(_) => {
                        write(&format!("{name}/{NUMBERS}"), &[Part::Floats(params)])?;
                    }
                    Form::Adapter(adapter) => {
                        for file in adapter.files(params)? {
                            let path = format!("{name}/{}", file.name);
                            write(&path, &[Part::Bytes(&file.bytes)])?;
                        }
                    }
                }
            }
            write("optimizer.bin", &moments)?;
            write("state.json", &[Part::Bytes(&state)])?;
            let manifest =
                serde_json::to_vec_pretty(&sums).map_err(|e| TrainError::io(dir, e.into()))?;
            let sum = write_file(&dir.join(MANIFEST), &[Part::Bytes(&manifest)])?;
            write_file(&dir.join(COMPLETE), &[Part::Bytes(sum.as_bytes())])?;
            Ok(())
        })?;
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

    /// Removes those of a later step than `step`.
    pub(crate) fn remove_after(&self, step: usize) -> Result<(), TrainError> {
        for later in self.steps()?.into_iter().filter(|later| *later > step) {
            remove(&self.path(later))?;
        }
        sync_dir(&self.dir)
    }

    /// The newest snapshot up to step `most` that can be believed; each newer one that cannot is described in the
    /// second value.
    pub(crate) fn load<T: Trainable + ?Sized>(
        &self,
        model: &T,
        most: usize,
    ) -> Result<(Option<Snapshot>, Vec<String>), TrainError> {
        let mut broken = Vec::new();
        for step in self.steps()?.into_iter().filter(|step| *step <= most) {
            match self.load_step(model, step) {
                Ok(snapshot) => return Ok((Some(snapshot), broken)),
                Err(error) => broken.push(format!(
                    "checkpoint step-{step} is damaged and is not used: {error}"
                )),
            }
        }
        Ok((None, broken))
    }

    fn load_step<T: Trainable + ?Sized>(
        &self,
        model: &T,
        step: usize,
    ) -> Result<Snapshot, TrainError> {
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
        let n = model.n_params();
        let numbers = |name: &str| {
            let dir = dir.join(name);
            match model.form() {
                Form::Model(_) => Floats::open(&dir.join(NUMBERS), 4 * n)?.take(n),
                Form::Adapter(adapter) => adapter.read(&dir),
            }
        };
        let params = numbers(model.form().name())?;
        let best_params = match state.best {
            Some(_) => Some(numbers("best")?),
            None => None,
        };
        let mut moments = Floats::open(&dir.join("optimizer.bin"), 8 + 8 * n)?;
        let t = u64::from_le_bytes(moments.bytes()?);
        let opt = AdamW {
            m: moments.take(n)?,
            v: moments.take(n)?,
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

/// Makes a folder that appears whole, in the place of whatever had its name; `fill` puts its files in.
pub(crate) fn write_folder<T>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let parent = path.parent().expect("a folder of a run has a parent");
    let name = path
        .file_name()
        .expect("a folder of a run has a name")
        .to_string_lossy();
    let temporary = parent.join(format!("{TEMPORARY}{name}"));
    let written = fill_folder(&temporary, fill).and_then(|filled| {
        remove(path)?;
        fs::rename(&temporary, path).map_err(|e| TrainError::io(path, e))?;
        sync_dir(parent)?;
        Ok(filled)
    });
    if written.is_err() {
        // Gives the space back; the first error is the one to tell.
        remove(&temporary).ok();
    }
    written
}

/// Writes an adapter's files as a folder. Gives the SHA-256 of the first, which holds the weights.
pub(crate) fn write_adapter(path: &Path, files: &[AdapterFile]) -> Result<String, TrainError> {
    write_folder(path, |dir| {
        let sums: Vec<String> = files
            .iter()
            .map(|file| write_file(&dir.join(&file.name), &[Part::Bytes(&file.bytes)]))
            .collect::<Result<_, _>>()?;
        Ok(sums.into_iter().next().unwrap_or_default())
    })
}

fn fill_folder<T>(
    dir: &Path,
    fill: impl FnOnce(&Path) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    remove(dir)?;
    fs::create_dir_all(dir).map_err(|e| TrainError::io(dir, e))?;
    let filled = fill(dir)?;
    for sub in fs::read_dir(dir)
        .map_err(|e| TrainError::io(dir, e))?
        .flatten()
    {
        if sub.path().is_dir() {
            sync_dir(&sub.path())?;
        }
    }
    sync_dir(dir)?;
    Ok(filled)
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
        if file_sha256(&path)? != *sum {
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
    let written = write_file(&temporary, &[Part::Bytes(bytes)])
        .and_then(|_| fs::rename(&temporary, path).map_err(|e| TrainError::io(path, e)))
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

/// SHA-256 of a file, as hexadecimal digits.
pub(crate) fn file_sha256(path: &Path) -> Result<String, TrainError> {
    let hash = || {
        let (mut file, mut hash) = (File::open(path)?, Sha256::new());
        let mut buffer = vec![0; PIECE];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(format!("{:x}", hash.finalize())),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    hash().map_err(|e| TrainError::io(path, e))
}

/// A stretch of a file.
enum Part<'a> {
    Bytes(&'a [u8]),
    /// Numbers, little end first.
    Floats(&'a [f32]),
}

/// Writes a file for good and gives its SHA-256. Numbers pass through a small buffer: there may be gigabytes of them.
fn write_file(path: &Path, parts: &[Part<'_>]) -> Result<String, TrainError> {
    let write = || {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let (mut file, mut hash) = (File::create(path)?, Sha256::new());
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            file.write_all(bytes)
        };
        let mut buffer = Vec::new();
        for part in parts {
            match part {
                Part::Bytes(bytes) => put(bytes)?,
                Part::Floats(floats) => {
                    for floats in floats.chunks(PIECE / 4) {
                        buffer.clear();
                        buffer.extend(floats.iter().flat_map(|x| x.to_le_bytes()));
                        put(&buffer)?;
                    }
                }
            }
        }
        file.sync_all()?;
        Ok(format!("{:x}", hash.finalize()))
    };
    write().map_err(|e| TrainError::io(path, e))
}

/// Reads a file of numbers through a small buffer.
struct Floats {
    path: PathBuf,
    file: BufReader<File>,
}

impl Floats {
    /// Opens a file that must have so many bytes.
    fn open(path: &Path, bytes: usize) -> Result<Self, TrainError> {
        let io = |e| TrainError::io(path, e);
        let file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        if found != bytes as u64 {
            return Err(TrainError::Corrupt {
                path: path.to_path_buf(),
                reason: format!("it has {found} bytes, not the {bytes} of this run"),
            });
        }
        Ok(Self {
            path: path.to_path_buf(),
            file: BufReader::with_capacity(PIECE, file),
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], TrainError> {
        let mut bytes = [0; N];
        self.file
            .read_exact(&mut bytes)
            .map_err(|e| TrainError::io(&self.path, e))?;
        Ok(bytes)
    }

    fn take(&mut self, n: usize) -> Result<Vec<f32>, TrainError> {
        let (mut floats, mut buffer) = (Vec::with_capacity(n), vec![0; PIECE]);
        while floats.len() < n {
            let bytes = &mut buffer[..PIECE.min(4 * (n - floats.len()))];
            let read = self.file.read_exact(bytes);
            read.map_err(|e| TrainError::io(&self.path, e))?;
            let (words, _) = bytes.as_chunks::<4>();
            floats.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        }
        Ok(floats)
    }
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
