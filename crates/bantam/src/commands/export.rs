//! `bantam export`: base and adapter as one model that other programs open.

use serde_json::json;

use super::Context;
use crate::interrupt;
use crate::loader::{self, Loaded};
use crate::printer;
use crate::progress::Progress;
use crate::settings::ExportSettings;

/// Writes the merged model.
pub(crate) fn run(context: &Context, settings: &ExportSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    let out = settings.out.display();
    let spinner = Progress::spinner(printer, format!("writing {out}"));
    loaded.merge(settings.format, &settings.out)?;
    drop(spinner);
    let bytes = loader::bytes(&settings.out);
    printer.line(format!("{out}  {}", printer::bytes(bytes)))?;
    if settings.json {
        printer.json(&json!({"base": loaded.base.name, "out": settings.out, "bytes": bytes}))?;
    }
    Ok(())
}
