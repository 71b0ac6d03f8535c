//! `bantam serve`: models behind the OpenAI API.

use std::path::Path;
use std::sync::Arc;

use bantam_kernels::Compute;
use bantam_lab::data::{LineCheck, RowProblem};
use bantam_serve::{ApiKey, ServeConfig, Tls, TrainingConfig};
use bantam_store::Store;
use serde_json::json;

use super::Context;
use crate::jobs::Workers;
use crate::loader::Shelf;
use crate::printer::Printer;
use crate::progress::Progress;
use crate::providers::ProviderBook;
use crate::sandbox::PythonSandbox;
use crate::settings::{ServeSettings, listed_models};
use crate::{courier, interrupt};

/// Serves until Ctrl-C.
pub(crate) fn run(context: &Context, settings: &ServeSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let shelf = Arc::new(Shelf::new(
        context.clone(),
        Compute::new(settings.threads),
        settings.weights,
        settings.adapter_bytes,
        cancel,
    ));
    load(&shelf, settings, printer)?;
    shelf.add_default_encoder()?;
    let open = |path: &Path| Store::open(path).map(Arc::new);
    let store = match &settings.data {
        Some(folder) => {
            fs_err::create_dir_all(folder)?;
            Some(open(&folder.join("bantam.db"))?)
        }
        None => None,
    };
    let training = match &settings.data {
        Some(folder) => Some(TrainingConfig {
            trainer: Arc::new(Workers::new(
                Arc::clone(&shelf),
                settings.train_threads,
                settings.train_memory_mb,
            )?),
            // Trainings are started from elsewhere, too.
            folder: std::path::absolute(folder)?.join("jobs"),
        }),
        None => None,
    };
    let secret = |name: &str| std::env::var(name).ok().filter(|key| !key.is_empty());
    let providers = ProviderBook::new(&settings.providers, settings.data.clone(), secret)?;
    let sandbox = PythonSandbox::new(settings.grader_time, settings.grader_memory_mb)?;
    let config = ServeConfig {
        providers: Some(Arc::new(providers)),
        sandbox: Some(Arc::new(sandbox)),
        hooks: courier::hooks(&settings.webhooks, secret)?,
        host: settings.host,
        port: settings.port,
        api_keys: settings
            .api_keys
            .iter()
            .map(|key| ApiKey::new(key))
            .collect(),
        keys: settings.keys.as_deref().map(open).transpose()?,
        store,
        write_timeout: settings.write_timeout,
        cors_origins: settings.cors_origins.clone(),
        training_rows: Some(Arc::new(|| {
            let mut check = LineCheck::default();
            Box::new(move |line| check.line(line).map_err(described))
        })),
        training,
        tls: settings.tls.clone().map(|(cert, key)| Tls { cert, key }),
        ..ServeConfig::default()
    };
    let scheme = if config.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let first = &settings.models[0];
    let system = shelf.system_of(&first.model);
    let first_message = system.map_or_else(String::new, |system| {
        format!("{}, ", json!({"role": "system", "content": system}))
    });
    let ids = quoted(settings.models.iter().map(|model| &model.id));
    let mut on_ready = |address| {
        printer.note(format!(
            "serving {ids} at {scheme}://{address}/v1 (Ctrl-C stops)\ntry: curl {scheme}://{address}/v1/chat/completions \
             -H 'content-type: application/json' -d '{{\"model\": \"{}\", \"messages\": \
             [{first_message}{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
            first.id
        ));
    };
    let mut on_reload = || reload(&shelf, settings, printer);
    let models = Arc::clone(shelf.models());
    bantam_serve::run(config, models, &mut on_ready, &mut on_reload)?;
    Ok(())
}

/// What is wrong with a line, and what to do about it.
fn described(problem: RowProblem) -> String {
    match problem.hint() {
        Some(hint) => format!("{problem} (hint: {hint})"),
        None => problem.to_string(),
    }
}

fn quoted<'a>(ids: impl Iterator<Item = &'a String>) -> String {
    let ids: Vec<String> = ids.map(|id| format!("`{id}`")).collect();
    ids.join(", ")
}

/// Loads the models; the first that cannot be loaded ends it.
fn load(shelf: &Shelf, settings: &ServeSettings, printer: &Printer) -> anyhow::Result<()> {
    let names: Vec<&str> = settings.models.iter().map(|m| m.model.as_str()).collect();
    let _spinner = Progress::spinner(printer, format!("loading {}", names.join(", ")));
    match shelf.follow(&settings.models).into_iter().next() {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

/// Serves what the configuration file lists by now. Requests that run are not disturbed.
fn reload(shelf: &Shelf, settings: &ServeSettings, printer: &Printer) {
    let Some(path) = &settings.config else {
        printer.warn("there is no configuration file to read again");
        return;
    };
    let failures = match listed_models(path) {
        Ok(wanted) => shelf.follow(&wanted),
        Err(error) => vec![error],
    };
    for failure in failures {
        printer.warn(format!("{failure:#}"));
    }
    let ids = quoted(shelf.models().ids().iter());
    printer.note(format!("now serving {ids}"));
}
