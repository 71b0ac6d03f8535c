//! From what the user typed (a catalogue name, a path, a run directory) to a model that can answer.

mod chat;
pub(crate) mod embedder;
pub(crate) mod rows;
mod shelf;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, anyhow};
use bantam_engine::Llama;
use bantam_formats::ModelFiles;
use bantam_kernels::Compute;
use bantam_lab::export::{self, Adapter, AdapterIdentity, MergeFormat, read_adapter};
use bantam_model::encoder::EncoderConfig;
use bantam_model::{Lora, Model, ModelConfig, Weights};
use bantam_text::Chat;
use sha2::{Digest as _, Sha256};

use crate::cache::{hash_file, hex};
use crate::catalogue::{Catalogue, Entry};
use crate::commands::Context;
use crate::error::{HintExt as _, advise};

pub(crate) use shelf::Shelf;

/// The file of a run's folder that says how sure the run may be of its answers.
pub(crate) const CALIBRATION: &str = "calibration.json";

/// What a model argument stands for.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// A run directory of `bantam train`: an adapter and the name of its base, or a model.
    Run(PathBuf),
    /// A GGUF file or Hugging Face folder.
    Path(PathBuf),
    /// A base model of the catalogue.
    Catalogue(&'a Entry),
}

/// Tells the three apart: an existing path wins over a catalogue name only if it is written as a path or the name is unknown.
pub(crate) fn place<'a>(catalogue: &'a Catalogue, text: &str) -> anyhow::Result<Place<'a>> {
    let path = Path::new(text);
    let written_as_path =
        text.contains(['/', '\\']) || text.starts_with('.') || text.ends_with(".gguf");
    if !written_as_path && let Some(entry) = catalogue.get(text) {
        return Ok(Place::Catalogue(entry));
    }
    if path.is_dir() && is_run(path) {
        return Ok(Place::Run(path.to_owned()));
    }
    if path.exists() {
        return Ok(Place::Path(path.to_owned()));
    }
    if written_as_path {
        return Err(advise(
            anyhow!("there is no file or folder `{text}`"),
            "give a GGUF file, a Hugging Face folder, a run directory, or a name that `bantam models` lists",
        ));
    }
    let hint = match catalogue.nearest(text) {
        Some(near) => format!("did you mean `{near}`? `bantam models` lists all names"),
        None => "`bantam models` lists the names; a GGUF file or Hugging Face folder is given by its path".into(),
    };
    Err(advise(
        anyhow!("there is no model named `{text}`, and no such path"),
        hint,
    ))
}

/// Whether a folder is a run directory of `bantam train`, or an adapter's folder.
fn is_run(folder: &Path) -> bool {
    let is_begun = folder.join("settings.json").is_file() && folder.join("recipe.toml").is_file();
    is_begun || adapter_in(folder).is_some()
}

/// The adapter's folder: of a run directory, or the folder itself.
fn adapter_in(folder: &Path) -> Option<PathBuf> {
    let places = [folder.join("adapter"), folder.to_owned()];
    places
        .into_iter()
        .find(|place| place.join("adapter_config.json").is_file())
}

/// The model's folder in the directory of a run that trained every weight.
fn model_in(folder: &Path) -> Option<PathBuf> {
    let place = folder.join("model");
    place.join("config.json").is_file().then_some(place)
}

/// A base model's files, opened and checked, with what it takes to talk to it.
pub(crate) struct Base {
    /// As the user named it.
    pub(crate) name: String,
    /// The catalogue name or absolute path that finds it again from anywhere.
    pub(crate) reference: String,
    /// See [`Base::sha256`].
    sha256: OnceLock<String>,
    /// The files.
    pub(crate) files: ModelFiles,
    /// Prompt, loss mask, end of turn.
    pub(crate) chat: Arc<Chat>,
}

/// A base model's files, opened and checked.
struct Found {
    name: String,
    reference: String,
    sha256: OnceLock<String>,
    files: ModelFiles,
}

/// A run's adapter: its folder, and the base it belongs to.
struct FoundAdapter {
    place: PathBuf,
    identity: AdapterIdentity,
}

/// A model that can answer: a base, and an adapter if it is a run that trained one.
pub(crate) struct Loaded {
    /// The base, or the model that a run made of it.
    pub(crate) base: Base,
    /// The adapter of the run it is, if it is one.
    adapter: Option<Adapter>,
    /// What the run says of itself, if it is one.
    identity: Option<AdapterIdentity>,
}

/// What belongs to the files of a run.
enum Trained {
    Adapter(FoundAdapter),
    Model(Option<AdapterIdentity>),
}

impl Found {
    /// Finds, fetches if need be, and opens a base model.
    fn open(context: &Context, text: &str, cancel: &AtomicBool) -> anyhow::Result<Self> {
        let sha256 = OnceLock::new();
        let (reference, path) = match place(&context.catalogue, text)? {
            Place::Run(_) => {
                return Err(advise(
                    anyhow!("`{text}` is a run directory, not a base model"),
                    "give the name or path of the model that the run was trained on",
                ));
            }
            Place::Path(path) => return Self::at(text, &path),
            Place::Catalogue(entry) => {
                let pulled = context.fetcher(cancel).model(entry, false)?;
                if let [file] = pulled.files.files.as_slice() {
                    // It was checked when it was fetched.
                    let _ = sha256.set(file.sha256.clone());
                }
                (entry.name.clone(), pulled.path)
            }
        };
        Self::new(text, reference, &path, sha256)
    }

    /// Opens the file or folder at `path`.
    fn at(name: &str, path: &Path) -> anyhow::Result<Self> {
        let reference = std::path::absolute(path)?.display().to_string();
        Self::new(name, reference, path, OnceLock::new())
    }

    fn new(
        text: &str,
        reference: String,
        path: &Path,
        sha256: OnceLock<String>,
    ) -> anyhow::Result<Self> {
        let files = bantam_formats::open_model(path)?;
        if EncoderConfig::is_encoder(&files) {
            return Err(advise(
                anyhow!("`{text}` is a sentence encoder: it makes vectors, not answers"),
                format!("`bantam embed --model {text}` makes them"),
            ));
        }
        Ok(Self {
            name: text.to_owned(),
            reference,
            sha256,
            files,
        })
    }

    fn with(self, chat: Arc<Chat>) -> Base {
        Base {
            name: self.name,
            reference: self.reference,
            sha256: self.sha256,
            files: self.files,
            chat,
        }
    }
}

impl Base {
    /// Finds, fetches if need be, and opens a base model.
    pub(crate) fn open(context: &Context, text: &str, cancel: &AtomicBool) -> anyhow::Result<Self> {
        let found = Found::open(context, text, cancel)?;
        let chat = chat::chat_of(&found.files)?;
        Ok(found.with(chat))
    }

    /// As [`Base::open`], with the weights to answer with: they and the tokenizer are read at the same time.
    fn open_and_load(
        context: &Context,
        text: &str,
        cancel: &AtomicBool,
        compute: &Compute,
        weights: Weights,
    ) -> anyhow::Result<(Self, Model<f32>)> {
        let found = Found::open(context, text, cancel)?;
        let (chat, model) = chat_and_weights(&found.files, compute, weights)?;
        Ok((found.with(chat), model))
    }

    /// Whether this is the base that the adapter of `run` was trained over.
    fn check(&self, identity: &AdapterIdentity, run: &str) -> anyhow::Result<()> {
        if self.sha256()? == identity.base_sha256 {
            return Ok(());
        }
        Err(advise(
            anyhow!(
                "`{}` is no longer the model that `{run}` was trained on (its sha256 differs)",
                self.name
            ),
            "bring back the model of the training, or train again",
        ))
    }

    /// Digest of the weights, which a run is tied to. Reads all of them, once, where a file is given by its path.
    pub(crate) fn sha256(&self) -> anyhow::Result<&str> {
        if let Some(known) = self.sha256.get() {
            return Ok(known);
        }
        let digest = digest(self.files.path())?;
        Ok(self.sha256.get_or_init(|| digest))
    }

    /// The longest sequence that the model reads, in tokens.
    pub(crate) fn max_context(&self) -> anyhow::Result<usize> {
        Ok(self.config()?.max_context)
    }

    /// The model's sizes.
    pub(crate) fn config(&self) -> anyhow::Result<ModelConfig> {
        Ok(ModelConfig::from_files(&self.files)?)
    }

    /// Reads an adapter for this base: of a run, or of a folder in PEFT's format.
    pub(crate) fn adapter(&self, folder: &Path) -> anyhow::Result<Adapter> {
        let place = adapter_in(folder).ok_or_else(|| {
            advise(
                anyhow!("there is no adapter in `{}`", folder.display()),
                "give a finished run of `bantam train`, or a folder with `adapter_config.json` and `adapter_model.safetensors`",
            )
        })?;
        Ok(read_adapter(
            &place,
            &ModelConfig::from_files(&self.files)?,
        )?)
    }

    /// Loads the weights for training, in bf16.
    pub(crate) fn weights(&self, trainable: bool) -> anyhow::Result<Model<f32>> {
        self.weights_as(&Compute::detect(), Weights::Bf16, trainable)
    }

    /// Loads the weights to answer with.
    pub(crate) fn weights_as(
        &self,
        compute: &Compute,
        weights: Weights,
        trainable: bool,
    ) -> anyhow::Result<Model<f32>> {
        load(&self.files, compute, weights, trainable)
    }
}

fn load(
    files: &ModelFiles,
    compute: &Compute,
    weights: Weights,
    trainable: bool,
) -> anyhow::Result<Model<f32>> {
    let model = Model::load_on(compute, files, weights, trainable);
    model.with_context(|| format!("could not load `{}`", files.path().display()))
}

impl Loaded {
    /// Opens a base model or a run.
    pub(crate) fn open(context: &Context, text: &str, cancel: &AtomicBool) -> anyhow::Result<Self> {
        let (found, trained) = Self::find(context, text, cancel)?;
        let chat = chat::chat_of(&found.files)?;
        Self::join(text, found.with(chat), trained)
    }

    /// As [`Loaded::open`] and [`Loaded::load`], the tokenizer and the weights at the same time.
    pub(crate) fn open_and_load(
        context: &Context,
        text: &str,
        cancel: &AtomicBool,
        compute: &Compute,
        weights: Weights,
    ) -> anyhow::Result<(Self, Llama)> {
        let (found, trained) = Self::find(context, text, cancel)?;
        let (chat, model) = chat_and_weights(&found.files, compute, weights)?;
        let loaded = Self::join(text, found.with(chat), trained)?;
        let llama = loaded.ready(model, compute);
        Ok((loaded, llama))
    }

    fn find(
        context: &Context,
        text: &str,
        cancel: &AtomicBool,
    ) -> anyhow::Result<(Found, Trained)> {
        let Place::Run(folder) = place(&context.catalogue, text)? else {
            let found = Found::open(context, text, cancel)?;
            return Ok((found, Trained::Model(None)));
        };
        if let Some(model) = model_in(&folder) {
            let identity = export::read_identity(&model)?;
            let name = identity.as_ref().map_or(text, |identity| &identity.base);
            return Ok((Found::at(name, &model)?, Trained::Model(identity)));
        }
        let place = adapter_in(&folder).ok_or_else(|| not_finished(&folder))?;
        let identity = identity(&place)?;
        let found = Found::open(context, &identity.base, cancel)
            .with_context(|| format!("could not open the base of `{}`", folder.display()))?;
        Ok((found, Trained::Adapter(FoundAdapter { place, identity })))
    }

    /// A base with what belongs to it.
    fn join(text: &str, base: Base, trained: Trained) -> anyhow::Result<Self> {
        let FoundAdapter { place, identity } = match trained {
            Trained::Adapter(found) => found,
            Trained::Model(identity) => {
                return Ok(Self {
                    base,
                    adapter: None,
                    identity,
                });
            }
        };
        base.check(&identity, text)?;
        let adapter = read_adapter(&place, &ModelConfig::from_files(&base.files)?)?;
        Ok(Self {
            base,
            identity: adapter.identity.clone(),
            adapter: Some(adapter),
        })
    }

    /// The longest sequence that the model reads, in tokens.
    pub(crate) fn max_context(&self) -> anyhow::Result<usize> {
        self.base.max_context()
    }

    /// Loads weights and adapter.
    pub(crate) fn load(&self, compute: &Compute, weights: Weights) -> anyhow::Result<Llama> {
        let model = self.base.weights_as(compute, weights, false)?;
        Ok(self.ready(model, compute))
    }

    fn ready(&self, model: Model<f32>, compute: &Compute) -> Llama {
        let adapter = self.lora(model.config()).map(Arc::new);
        Llama::new(Arc::new(model), adapter, compute.clone())
    }

    /// The adapter of the run it is, ready to be computed with.
    pub(crate) fn lora(&self, model: &ModelConfig) -> Option<Lora<f32>> {
        let adapter = self.adapter.as_ref()?;
        let mut lora = Lora::new(adapter.config.clone(), model);
        lora.params.clone_from(&adapter.params);
        lora.refresh();
        Some(lora)
    }

    /// Writes base and adapter, or the model that was trained whole, as one model.
    pub(crate) fn merge(&self, format: MergeFormat, out: &Path) -> anyhow::Result<()> {
        if self.adapter.is_none() && self.identity.is_none() {
            return Err(advise(
                anyhow!(
                    "`{}` is a base model: there is nothing to merge into it",
                    self.base.name
                ),
                "give the folder of a `bantam train` run",
            ));
        }
        let adapter = self.adapter.as_ref();
        Ok(export::merge(&self.base.files, adapter, format, out)?)
    }

    /// The system message to use when the user gives none: the training's.
    pub(crate) fn system(&self) -> Option<&str> {
        let identity = self.identity.as_ref();
        identity
            .map(|identity| identity.system.as_str())
            .filter(|text| !text.is_empty())
    }
}

/// Prompts and weights, at the same time.
fn chat_and_weights(
    files: &ModelFiles,
    compute: &Compute,
    weights: Weights,
) -> anyhow::Result<(Arc<Chat>, Model<f32>)> {
    std::thread::scope(|scope| {
        let chat = scope.spawn(|| chat::chat_of(files));
        let model = load(files, compute, weights, false);
        let chat = chat.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((chat?, model?))
    })
}

fn not_finished(run: &Path) -> anyhow::Error {
    advise(
        anyhow!(
            "the run `{}` is not finished: it has no adapter or model yet",
            run.display()
        ),
        "run the same `bantam train` command again: it goes on where it stopped",
    )
}

/// Which base an adapter belongs to.
fn identity(adapter: &Path) -> anyhow::Result<AdapterIdentity> {
    let path = adapter.join("bantam.json");
    let text = fs_err::read_to_string(&path)
        .hint("the adapter was written by another program: merge it into its base there, and use the merged model")?;
    serde_json::from_str(&text).with_context(|| format!("`{}` cannot be read", path.display()))
}

/// A digest of a model: of its file, or of the names and digests of a folder's weights and settings.
fn digest(path: &Path) -> anyhow::Result<String> {
    if !path.is_dir() {
        return hash_file(path, &mut |_| Ok(()));
    }
    let mut names = Vec::new();
    for entry in fs_err::read_dir(path)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if [".safetensors", ".json", ".jinja"]
            .iter()
            .any(|ending| name.ends_with(ending))
        {
            names.push(name);
        }
    }
    names.sort();
    let mut hasher = Sha256::new();
    for name in names {
        let file = hash_file(&path.join(&name), &mut |_| Ok(()))?;
        hasher.update(format!("{file}  {name}\n"));
    }
    Ok(hex(&hasher.finalize()))
}

/// The size of a model file, or of all files in a model folder.
pub(crate) fn bytes(path: &Path) -> u64 {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        return entries
            .filter_map(|e| std::fs::metadata(e.path()).ok())
            .filter(|m| m.is_file())
            .map(|m| m.len())
            .sum();
    }
    std::fs::metadata(path).map_or(0, |m| m.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Style, render};

    fn catalogue() -> Catalogue {
        Catalogue::load(Path::new("/nonexistent/catalogue.toml")).unwrap()
    }

    #[test]
    fn names_paths_and_runs_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs_err::write(at("m.gguf"), "").unwrap();
        fs_err::create_dir(at("run")).unwrap();
        fs_err::write(at("run") + "/settings.json", "{}").unwrap();
        fs_err::write(at("run") + "/recipe.toml", "").unwrap();
        let catalogue = catalogue();
        assert!(matches!(
            place(&catalogue, "smollm2-135m-instruct").unwrap(),
            Place::Catalogue(_)
        ));
        assert!(matches!(
            place(&catalogue, &at("m.gguf")).unwrap(),
            Place::Path(_)
        ));
        assert!(matches!(
            place(&catalogue, &at("run")).unwrap(),
            Place::Run(_)
        ));
        assert!(matches!(
            place(&catalogue, dir.path().to_str().unwrap()).unwrap(),
            Place::Path(_)
        ));
    }

    #[test]
    fn what_is_not_there_comes_with_advice() {
        let catalogue = catalogue();
        let say = |text: &str| {
            render(
                &place(&catalogue, text).unwrap_err(),
                Style { color: false },
            )
        };
        insta::assert_snapshot!([say("./nowhere.gguf"), say("smollm2-135m"), say("zzz")].concat(), @r#"
        error: there is no file or folder `./nowhere.gguf`
        hint: give a GGUF file, a Hugging Face folder, a run directory, or a name that `bantam models` lists
        error: there is no model named `smollm2-135m`, and no such path
        hint: did you mean `smollm2-135m-instruct`? `bantam models` lists all names
        error: there is no model named `zzz`, and no such path
        hint: `bantam models` lists the names; a GGUF file or Hugging Face folder is given by its path
        "#);
    }
}
