//! `bantam serve`: models behind the OpenAI API.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use bantam_engine::{Engine, EngineConfig};
use bantam_kernels::Compute;
use bantam_model::Weights;
use bantam_serve::{ApiKey, ServeConfig, ServedEmbedder, ServedModel, Tls};
use bantam_store::Store;
use bantam_text::ConstraintEngine;
use serde_json::json;

use super::Context;
use crate::interrupt;
use crate::loader::{self, Loaded};
use crate::progress::Progress;
use crate::settings::{ServeSettings, ServedSettings, short_name};

/// Serves until Ctrl-C.
pub(crate) fn run(context: &Context, settings: &ServeSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let compute = Compute::new(settings.threads);
    let mut first_message = String::new();
    let (mut models, mut embedders) = (Vec::new(), Vec::new());
    for (i, one) in settings.models.iter().enumerate() {
        if let Some(embedder) =
            loader::embedder::sentence_encoder_of(context, &one.model, &cancel, &compute)?
        {
            embedders.push(Arc::new(ServedEmbedder {
                id: one.id.clone(),
                aliases: one.aliases.clone(),
                created: made(Path::new(&one.model)),
                embedder,
            }));
            continue;
        }
        let (model, system) = load(context, one, settings.weights, &compute, &cancel)?;
        if let Some(system) = system.filter(|_| i == 0) {
            first_message = format!("{}, ", json!({"role": "system", "content": system}));
        }
        models.push(model);
    }
    let open = |path: &Path| Store::open(path).map(Arc::new);
    let store = match &settings.data {
        Some(folder) => {
            fs_err::create_dir_all(folder)?;
            Some(open(&folder.join("bantam.db"))?)
        }
        None => None,
    };
    let config = ServeConfig {
        host: settings.host,
        port: settings.port,
        api_keys: settings
            .api_keys
            .iter()
            .map(|key| ApiKey::new(key))
            .collect(),
        keys: settings.keys.as_deref().map(open).transpose()?,
        store,
        embedders,
        tls: settings.tls.clone().map(|(cert, key)| Tls { cert, key }),
        ..ServeConfig::default()
    };
    let scheme = if config.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let ids: Vec<String> = (settings.models.iter())
        .map(|model| format!("`{}`", model.id))
        .collect();
    bantam_serve::run(config, models, &mut |address| {
        printer.note(format!(
            "serving {} at {scheme}://{address}/v1 (Ctrl-C stops)\ntry: curl {scheme}://{address}/v1/chat/completions \
             -H 'content-type: application/json' -d '{{\"model\": \"{}\", \"messages\": \
             [{first_message}{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
            ids.join(", "),
            settings.models[0].id
        ));
    })?;
    Ok(())
}

/// A model to serve, and the system message that it was trained with.
fn load(
    context: &Context,
    settings: &ServedSettings,
    weights: Weights,
    compute: &Compute,
    cancel: &AtomicBool,
) -> anyhow::Result<(ServedModel, Option<String>)> {
    let spinner = Progress::spinner(&context.printer, format!("loading {}", settings.model));
    let (loaded, model) =
        Loaded::open_and_load(context, &settings.model, cancel, compute, weights)?;
    let name = &loaded.base.name;
    let chat = loaded.base.chat.clone();
    let constraints = ConstraintEngine::new(chat.tokenizer(), chat.end_tokens())?;
    // The trie of all tokens is built meanwhile, so that the first answer does not wait for it.
    let unready = constraints.clone();
    std::thread::spawn(move || {
        // A failure comes again, and is told, with the first constraint.
        let _ = unready.prepare();
    });
    let tokenizer = chat.tokenizer().clone();
    let embedder = model.embedder(tokenizer.clone());
    let mut served = ServedModel::new(&settings.id, chat, constraints, move || {
        Ok::<_, std::convert::Infallible>(Engine::new(model, tokenizer, EngineConfig::default()))
    });
    drop(spinner);
    served.embedder = Some(Arc::new(embedder));
    served.aliases.clone_from(&settings.aliases);
    served.created = made(Path::new(&settings.model));
    if loaded.is_specialised() {
        served.tuned = true;
        // A specialised model was judged on its likeliest answers, so that is what a plain call gets.
        served.default_temperature = 0.0;
        // The name that OpenAI would give it.
        let alias = format!("ft:{}:{}", short_name(name), settings.id);
        if settings.id != alias && !served.aliases.contains(&alias) {
            served.aliases.push(alias);
        }
    }
    Ok((served, loaded.system().map(str::to_owned)))
}

/// When a model was made, in seconds since 1970; 0 if it is not a path.
fn made(path: &Path) -> u64 {
    let modified = fs_err::metadata(path).and_then(|meta| meta.modified());
    modified
        .ok()
        .and_then(|time: SystemTime| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| since.as_secs())
}
