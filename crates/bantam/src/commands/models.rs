//! `bantam models`: the catalogue, with what is cached.

use serde::Serialize;

use super::Context;
use crate::fetch::{self, Cached};
use crate::printer::{self, Align, Table};
use crate::settings::ModelsSettings;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    models: Vec<ModelReport<'a>>,
}

#[derive(Serialize)]
struct ModelReport<'a> {
    name: &'a str,
    parameters: u64,
    context: u64,
    licence: &'a str,
    source: String,
    sha256: &'a std::collections::BTreeMap<String, String>,
    cached: bool,
    bytes: Option<u64>,
    about: &'a str,
}

/// Lists the catalogue.
pub(crate) fn run(context: &Context, settings: &ModelsSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let models: Vec<ModelReport<'_>> = context
        .catalogue
        .entries()
        .iter()
        .map(|entry| {
            let state = fetch::cached(&context.cache, entry);
            ModelReport {
                name: &entry.name,
                parameters: entry.parameters,
                context: entry.context,
                licence: &entry.licence,
                source: entry.source.to_string(),
                sha256: &entry.sha256,
                cached: matches!(state, Cached::Yes { .. }),
                bytes: match state {
                    Cached::Yes { bytes } => Some(bytes),
                    Cached::No => None,
                },
                about: &entry.about,
            }
        })
        .collect();
    if settings.json {
        return printer.json(&Report { models });
    }
    let mut table = Table::new([
        ("name", Align::Left),
        ("parameters", Align::Right),
        ("context", Align::Right),
        ("licence", Align::Left),
        ("cached", Align::Right),
        ("about", Align::Left),
    ]);
    for model in &models {
        table.row([
            model.name.to_owned(),
            printer::parameters(model.parameters),
            printer::thousands(model.context),
            model.licence.to_owned(),
            model.bytes.map_or_else(|| "-".to_owned(), printer::bytes),
            model.about.to_owned(),
        ]);
    }
    printer.line(table.render(printer.out_style()))?;
    printer.note("`bantam pull NAME` fetches one; a GGUF file or Hugging Face folder can be given by its path");
    Ok(())
}
