//! `bantam serve`: a model behind the OpenAI API.

use bantam_engine::{Engine, EngineConfig};
use bantam_kernels::Compute;
use bantam_serve::{ApiKey, ServeConfig, ServedModel};
use bantam_text::ConstraintEngine;
use serde_json::json;

use super::Context;
use crate::interrupt;
use crate::loader::Loaded;
use crate::progress::Progress;
use crate::settings::ServeSettings;

/// Serves until Ctrl-C.
pub(crate) fn run(context: &Context, settings: &ServeSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    let spinner = Progress::spinner(printer, format!("loading {}", loaded.base.name));
    let model = loaded.load(&Compute::new(settings.threads), settings.weights)?;
    let chat = loaded.base.chat.clone();
    let constraints = ConstraintEngine::new(chat.tokenizer(), chat.end_tokens())?;
    let tokenizer = chat.tokenizer().clone();
    // A specialised model was judged on its likeliest answers, so that is what a plain call gets.
    let default_temperature = if loaded.is_specialised() { 0.0 } else { 1.0 };
    let first_message = loaded.system().map_or_else(String::new, |system| {
        format!("{}, ", json!({"role": "system", "content": system}))
    });
    let mut served = ServedModel::new(&settings.model_id, chat, constraints, move || {
        Ok::<_, std::convert::Infallible>(Engine::new(model, tokenizer, EngineConfig::default()))
    });
    served.default_temperature = default_temperature;
    drop(spinner);
    let config = ServeConfig {
        host: settings.host,
        port: settings.port,
        api_keys: settings
            .api_keys
            .iter()
            .map(|key| ApiKey::new(key))
            .collect(),
        ..ServeConfig::default()
    };
    bantam_serve::run(config, vec![served], &mut |address| {
        printer.note(format!(
            "serving `{}` at http://{address}/v1 (Ctrl-C stops)\ntry: curl http://{address}/v1/chat/completions \
             -H 'content-type: application/json' -d '{{\"model\": \"{0}\", \"messages\": \
             [{first_message}{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
            settings.model_id
        ));
    })?;
    Ok(())
}
