//! Bases that are held once for all that is served over them, and what is served of them.
//!
//! [`Shelf`] is the way from a name or a run directory to a served model, while the server runs: at its start, when
//! its configuration is read again, and when a training ends.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bantam_engine::{DecoderEmbedder, Engine, EngineConfig, Llama};
use bantam_kernels::Compute;
use bantam_lab::eval::Calibration;
use bantam_lab::export::read_adapter;
use bantam_model::{Lora, Model, Weights};
use bantam_serve::{LoadedAdapter, Models, ServedAdapter, ServedEmbedder, ServedModel};
use bantam_text::ConstraintEngine;

use super::{
    Base, CALIBRATION, Place, adapter_in, embedder, identity, model_in, not_finished, place,
};
use crate::commands::Context;
use crate::settings::{ServedSettings, short_name};

/// The sentence encoder that is there without being asked for, fetched when it is first used.
const ENCODER: &str = "all-minilm-l6-v2";

/// Everything that a server serves, and the bases that it holds for it.
pub(crate) struct Shelf {
    context: Context,
    compute: Compute,
    weights: Weights,
    cancel: Arc<AtomicBool>,
    models: Arc<Models>,
    /// By reference. Locked while one is loaded, so that none is loaded twice.
    bases: Mutex<HashMap<String, Arc<HeldBase>>>,
    /// What [`Shelf::follow`] put here, and the age of the files it was made of.
    followed: Mutex<Vec<(ServedSettings, u64)>>,
}

/// A base with its weights.
struct HeldBase {
    base: Base,
    weights: Arc<Model<f32>>,
    compute: Compute,
    /// The served model whose engine its adapters share.
    engine: Mutex<Option<String>>,
}

impl HeldBase {
    /// Reads an adapter for it.
    fn adapter(&self, folder: &Path) -> anyhow::Result<LoadedAdapter> {
        let config = self.weights.config();
        let adapter = read_adapter(folder, config)?;
        let mut lora = Lora::new(adapter.config, config);
        lora.params = adapter.params;
        lora.refresh();
        // The numbers and their transposed copies.
        let bytes = 2 * lora.params.len() * size_of::<f32>();
        let lora = Arc::new(lora);
        let embedder = DecoderEmbedder::new(
            Arc::clone(&self.weights),
            Some(Arc::clone(&lora)),
            self.base.chat.tokenizer().clone(),
            self.compute.clone(),
        );
        Ok(LoadedAdapter::new(lora, bytes).with_embedder(Arc::new(embedder)))
    }
}

/// What a whole model is served as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Base,
    /// For its adapters alone.
    Hidden,
    /// All its weights were trained here.
    Trained,
}

impl Shelf {
    /// Nothing yet. Adapters take at most so many bytes of memory.
    pub(crate) fn new(
        context: Context,
        compute: Compute,
        weights: Weights,
        adapter_bytes_max: usize,
        cancel: Arc<AtomicBool>,
    ) -> Self {
        Self {
            context,
            compute,
            weights,
            cancel,
            models: Arc::new(Models::new(adapter_bytes_max)),
            bases: Mutex::default(),
            followed: Mutex::default(),
        }
    }

    /// The same models, for the server.
    pub(crate) fn models(&self) -> &Arc<Models> {
        &self.models
    }

    /// Serves what is named, whatever it is: a base, a run, a sentence encoder.
    pub(crate) fn add(&self, settings: &ServedSettings) -> anyhow::Result<()> {
        let text = &settings.model;
        if let Place::Run(folder) = place(&self.context.catalogue, text)? {
            return self.add_run(&folder, settings);
        }
        let encoder =
            embedder::sentence_encoder_of(&self.context, text, &self.cancel, &self.compute)?;
        if let Some(encoder) = encoder {
            let mut served = ServedEmbedder::new(&settings.id, encoder);
            served.aliases.clone_from(&settings.aliases);
            served.created = made(Path::new(text));
            return Ok(self.models.add_embedder(served)?);
        }
        let held = self.hold(text)?;
        self.start(&held, settings, Standing::Base)
    }

    /// Serves the model of a finished run that trained every weight, or the adapter of another over its base, which is loaded if it is not held yet; in the place of the
    /// adapter that has its name, if there is one. Requests that run notice nothing.
    pub(crate) fn add_run(&self, folder: &Path, settings: &ServedSettings) -> anyhow::Result<()> {
        if let Some(model) = model_in(folder) {
            let held = self.hold(&model.display().to_string())?;
            return self.start(&held, settings, Standing::Trained);
        }
        let adapter = adapter_in(folder).ok_or_else(|| not_finished(folder))?;
        let identity = identity(&adapter)?;
        let held = self
            .hold(&identity.base)
            .with_context(|| format!("could not open the base of `{}`", folder.display()))?;
        held.base.check(&identity, &settings.model)?;
        let engine = self.engine(&held)?;
        let mut served = ServedAdapter::new(&settings.id, engine, move || {
            held.adapter(&adapter).map_err(|error| format!("{error:#}"))
        });
        served.aliases.clone_from(&settings.aliases);
        served.created = made(folder);
        served.calibration = calibration_in(folder)?;
        // The name that OpenAI would give it.
        let alias = format!("ft:{}:{}", short_name(&identity.base), settings.id);
        if !settings.id.starts_with("ft:")
            && settings.id != alias
            && !served.aliases.contains(&alias)
        {
            served.aliases.push(alias);
        }
        Ok(self.models.add_adapter(served)?)
    }

    /// Serves the default sentence encoder as well, which is fetched when it is first used.
    pub(crate) fn add_default_encoder(self: &Arc<Self>) -> anyhow::Result<()> {
        if self.models.has(ENCODER) {
            return Ok(());
        }
        let shelf = Arc::clone(self);
        let served = ServedEmbedder::on_first_use(ENCODER, move || {
            let (context, cancel) = (&shelf.context, &shelf.cancel);
            match embedder::sentence_encoder_of(context, ENCODER, cancel, &shelf.compute) {
                Ok(Some(encoder)) => Ok(encoder),
                Ok(None) => Err("it is no sentence encoder".to_string()),
                Err(error) => Err(format!("{error:#}")),
            }
        });
        Ok(self.models.add_embedder(served)?)
    }

    /// Makes what is served what is wanted: serves what is new, serves anew the runs whose adapter was written again,
    /// and takes away what was followed and is wanted no more. What cannot be done is told by name; the rest is done.
    pub(crate) fn follow(&self, wanted: &[ServedSettings]) -> Vec<anyhow::Error> {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failures = Vec::new();
        followed.retain(|(one, _)| {
            // A run under the same name is replaced where it is.
            let stays = wanted
                .iter()
                .any(|w| w.id == one.id && (w == one || self.is_run(w)));
            if !stays && !self.models.remove(&one.id) {
                failures.push(anyhow::anyhow!("`{}` is still needed and stays", one.id));
                return true;
            }
            stays
        });
        // Bases first: a run whose base is served shares its engine.
        let (runs, bases): (Vec<_>, Vec<_>) = wanted.iter().partition(|one| self.is_run(one));
        for one in bases.into_iter().chain(runs) {
            let age = self.adapter_age(one);
            if followed.contains(&(one.clone(), age)) {
                continue;
            }
            match self.add(one).with_context(|| format!("`{}`", one.id)) {
                Ok(()) => {
                    followed.retain(|(other, _)| other.id != one.id);
                    followed.push((one.clone(), age));
                }
                Err(error) => failures.push(error),
            }
        }
        let mut bases = self.bases();
        // Weights that no engine uses any more are let go of.
        bases.retain(|_, held| held.engine_of(&self.models).is_some());
        failures
    }

    /// The system message that a run was trained with.
    pub(crate) fn system_of(&self, model: &str) -> Option<String> {
        let Ok(Place::Run(folder)) = place(&self.context.catalogue, model) else {
            return None;
        };
        let trained = adapter_in(&folder).or_else(|| model_in(&folder))?;
        let system = identity(&trained).ok()?.system;
        Some(system).filter(|text| !text.is_empty())
    }

    /// The name or path that a model is served from.
    pub(crate) fn reference(&self, id: &str) -> Option<String> {
        let followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        let (settings, _) = followed.iter().find(|(settings, _)| settings.id == id)?;
        Some(settings.model.clone())
    }

    /// The base of what lies there, and the adapter over it: where a training can begin.
    pub(crate) fn origin(&self, text: &str) -> anyhow::Result<(String, Option<PathBuf>)> {
        let Place::Run(folder) = place(&self.context.catalogue, text)? else {
            let encoder =
                embedder::sentence_encoder_of(&self.context, text, &self.cancel, &self.compute)?;
            anyhow::ensure!(
                encoder.is_none(),
                "`{text}` is a sentence encoder and answers nothing"
            );
            return Ok((text.to_owned(), None));
        };
        if let Some(model) = model_in(&folder) {
            return Ok((model.display().to_string(), None));
        }
        let adapter = adapter_in(&folder).ok_or_else(|| not_finished(&folder))?;
        Ok((identity(&adapter)?.base, Some(folder)))
    }

    /// Whether it is served as an adapter.
    fn is_run(&self, settings: &ServedSettings) -> bool {
        match place(&self.context.catalogue, &settings.model) {
            Ok(Place::Run(folder)) => model_in(&folder).is_none(),
            _ => false,
        }
    }

    /// When a run's adapter was written; 0 for anything else.
    fn adapter_age(&self, settings: &ServedSettings) -> u64 {
        match place(&self.context.catalogue, &settings.model) {
            Ok(Place::Run(folder)) => adapter_in(&folder).map_or(0, |adapter| {
                made(&adapter.join("adapter_model.safetensors"))
            }),
            _ => 0,
        }
    }

    fn bases(&self) -> MutexGuard<'_, HashMap<String, Arc<HeldBase>>> {
        self.bases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A base by its name or path, loaded if it is not held.
    fn hold(&self, text: &str) -> anyhow::Result<Arc<HeldBase>> {
        let reference = match place(&self.context.catalogue, text)? {
            Place::Catalogue(entry) => entry.name.clone(),
            Place::Path(path) | Place::Run(path) => {
                std::path::absolute(&path)?.display().to_string()
            }
        };
        let mut bases = self.bases();
        if let Some(held) = bases.get(&reference) {
            return Ok(Arc::clone(held));
        }
        let (compute, cancel) = (&self.compute, &self.cancel);
        let (base, weights) =
            Base::open_and_load(&self.context, text, cancel, compute, self.weights)?;
        let held = Arc::new(HeldBase {
            base,
            weights: Arc::new(weights),
            compute: compute.clone(),
            engine: Mutex::default(),
        });
        bases.insert(reference, Arc::clone(&held));
        Ok(held)
    }

    /// The served model whose engine adapters over a base share; one for them alone, if the base is not served.
    fn engine(&self, held: &HeldBase) -> anyhow::Result<String> {
        if let Some(id) = held.engine_of(&self.models) {
            return Ok(id);
        }
        let hidden = ServedSettings {
            model: held.base.reference.clone(),
            id: format!("{} (base)", held.base.reference),
            aliases: Vec::new(),
        };
        self.start(held, &hidden, Standing::Hidden)?;
        Ok(hidden.id)
    }

    /// Serves a whole model.
    fn start(
        &self,
        held: &HeldBase,
        settings: &ServedSettings,
        standing: Standing,
    ) -> anyhow::Result<()> {
        let chat = held.base.chat.clone();
        let constraints = ConstraintEngine::new(chat.tokenizer(), chat.end_tokens())?;
        // The trie of all tokens is built meanwhile, so that the first answer does not wait for it.
        let unready = constraints.clone();
        std::thread::spawn(move || {
            // A failure comes again, and is told, with the first constraint.
            let _ = unready.prepare();
        });
        let tokenizer = chat.tokenizer().clone();
        let llama = Llama::new(Arc::clone(&held.weights), None, self.compute.clone());
        let embedder = llama.embedder(tokenizer.clone());
        let mut served = ServedModel::new(&settings.id, chat, constraints, move || {
            let config = EngineConfig::default();
            Ok::<_, std::convert::Infallible>(Engine::new(llama, tokenizer, config))
        });
        served.embedder = Some(Arc::new(embedder));
        served.aliases.clone_from(&settings.aliases);
        served.created = made(Path::new(&settings.model));
        served.hidden = standing == Standing::Hidden;
        if standing == Standing::Trained {
            served.tuned = true;
            // It was judged on its likeliest answers, so that is what a plain call gets.
            served.default_temperature = 0.0;
            served.calibration = calibration_in(Path::new(&settings.model))?;
        }
        self.models.add(served)?;
        let mut engine = held.engine.lock().unwrap_or_else(PoisonError::into_inner);
        *engine = Some(settings.id.clone());
        Ok(())
    }
}

impl HeldBase {
    /// The served model whose engine its adapters share, if it is still served.
    fn engine_of(&self, models: &Models) -> Option<String> {
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        engine.clone().filter(|id| models.has(id))
    }
}

/// When a file or folder was written, in seconds since 1970; 0 if it is not a path.
fn made(path: &Path) -> u64 {
    let modified = fs_err::metadata(path).and_then(|meta| meta.modified());
    modified
        .ok()
        .and_then(|time: SystemTime| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| since.as_secs())
}

/// The temperature that `bantam eval --calibrate` fitted for a run, if it did.
fn calibration_in(folder: &Path) -> anyhow::Result<Option<f64>> {
    let path = folder.join(CALIBRATION);
    if !path.exists() {
        return Ok(None);
    }
    let fitted: Calibration = serde_json::from_str(&fs_err::read_to_string(&path)?)
        .with_context(|| format!("{} is no calibration", path.display()))?;
    anyhow::ensure!(
        fitted.temperature.is_finite() && fitted.temperature > 0.0,
        "{}: `temperature` must be above 0",
        path.display()
    );
    Ok(Some(fitted.temperature))
}
