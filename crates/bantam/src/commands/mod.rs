//! One file a command; each takes its settings and a [`Context`].

mod bench;
mod chat;
mod doctor;
mod embed;
mod eval;
mod evals;
mod export;
mod inspect;
mod jobs;
mod keys;
mod models;
mod perplexity;
mod preference;
mod pull;
mod serve;
pub(crate) mod train;

use std::sync::atomic::AtomicBool;

use crate::cache::Cache;
use crate::catalogue::Catalogue;
use crate::demo;
use crate::fetch::Fetcher;
use crate::printer::Printer;
use crate::settings::{Action, Global};

/// What every command may use.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Resolved global settings.
    pub(crate) global: Global,
    /// The way out.
    pub(crate) printer: Printer,
    /// Fetched files.
    pub(crate) cache: Cache,
    /// Known base models.
    pub(crate) catalogue: Catalogue,
}

impl Context {
    /// Everything for these global settings.
    pub(crate) fn new(global: Global) -> anyhow::Result<Self> {
        let printer = Printer::new(global.quiet, global.color);
        let cache = Cache::new(&global.cache);
        let catalogue = Catalogue::load(&global.catalogue)?;
        Ok(Self {
            global,
            printer,
            cache,
            catalogue,
        })
    }

    /// Fetches into the cache, until `cancel` is set.
    pub(crate) fn fetcher<'a>(&'a self, cancel: &'a AtomicBool) -> Fetcher<'a> {
        Fetcher {
            cache: &self.cache,
            network: &self.global.network,
            printer: &self.printer,
            cancel,
        }
    }
}

/// Runs a command.
pub(crate) fn run(context: &Context, action: Action) -> anyhow::Result<()> {
    match action {
        Action::Demo(settings) => demo::run(context, &settings),
        Action::Pull(settings) => pull::run(context, &settings),
        Action::Models(settings) => models::run(context, &settings),
        Action::Train(settings) => train::run(context, &settings),
        Action::Eval(settings) => eval::run(context, &settings),
        Action::Perplexity(settings) => perplexity::run(context, &settings),
        Action::Preference(settings) => preference::run(context, &settings),
        Action::Chat(settings) => chat::run(context, &settings),
        Action::Serve(settings) => serve::run(context, &settings),
        Action::Embed(settings) => embed::run(context, &settings),
        Action::Keys(command) => keys::run(context, command),
        Action::Jobs(args) => jobs::run(context, args),
        Action::Evals(args) => evals::run(context, args),
        Action::Export(settings) => export::run(context, &settings),
        Action::Bench(settings) => bench::run(context, &settings),
        Action::Inspect(settings) => inspect::run(context, &settings),
        Action::Doctor(settings) => doctor::run(context, &settings),
    }
}
