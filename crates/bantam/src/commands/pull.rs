//! `bantam pull`: a base model into the cache, or a check of one that is there.

use std::path::Path;

use serde::Serialize;

use super::Context;
use crate::interrupt;
use crate::loader::{self, Place};
use crate::printer;
use crate::settings::PullSettings;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    path: &'a Path,
    bytes: u64,
    fetched: bool,
    source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<&'a str>,
    files: Vec<FileReport<'a>>,
}

#[derive(Serialize)]
struct FileReport<'a> {
    path: &'a str,
    sha256: &'a str,
    bytes: u64,
}

/// Fetches or verifies, and says where the model is.
pub(crate) fn run(context: &Context, settings: &PullSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let entry = match loader::place(&context.catalogue, &settings.name)? {
        Place::Catalogue(entry) => entry,
        Place::Run(path) | Place::Path(path) => {
            // Nothing to fetch, but the user wants to know whether it can be used.
            bantam_formats::open_model(&path)?;
            if settings.json {
                let source = format!("file:{}", path.display());
                let report = Report {
                    name: &settings.name,
                    path: &path,
                    bytes: loader::bytes(&path),
                    fetched: false,
                    source: &source,
                    commit: None,
                    files: Vec::new(),
                };
                return printer.json(&report);
            }
            printer.line(format!(
                "`{}` is a local model and is used where it is",
                path.display()
            ))?;
            return Ok(());
        }
    };
    let cancel = interrupt::watch()?;
    let pulled = context.fetcher(&cancel).model(entry, settings.verify)?;
    if settings.json {
        let files = pulled.files.files.iter();
        return printer.json(&Report {
            name: &entry.name,
            path: &pulled.path,
            bytes: pulled.files.bytes(),
            fetched: pulled.fetched,
            source: &pulled.files.source,
            commit: pulled.files.commit.as_deref(),
            files: files
                .map(|f| FileReport {
                    path: &f.path,
                    sha256: &f.sha256,
                    bytes: f.bytes,
                })
                .collect(),
        });
    }
    let what = match (pulled.fetched, settings.verify) {
        (true, _) => "fetched and verified",
        (false, true) => "already here, every byte verified",
        (false, false) => "already here",
    };
    let style = printer.out_style();
    printer.line(format!(
        "{} {} ({}, {}): {what}",
        style.green("✓"),
        style.bold(&entry.name),
        printer::bytes(pulled.files.bytes()),
        entry.licence
    ))?;
    printer.line(format!("  {}", pulled.path.display()))?;
    Ok(())
}
