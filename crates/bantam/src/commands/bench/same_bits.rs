//! `bantam bench --same-bits`: the same requests in every way the engine can run them, one digest.

use std::sync::Arc;

use anyhow::{anyhow, ensure};
use bantam_engine::exact::{self, Outcome, Variant};
use bantam_engine::{Engine, LanguageModel as _, Llama, Usage};
use bantam_kernels::Compute;
use serde::Serialize;

use crate::commands::Context;
use crate::error::advise;
use crate::interrupt;
use crate::loader::Loaded;
use crate::printer::thousands;
use crate::progress::Progress;
use crate::settings::BenchSettings;

/// Prompts are cut to a part of this many tokens: long enough to be read in several steps.
const CONTEXT: usize = 512;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    weights: &'static str,
    isa: &'static str,
    same: bool,
    requests: usize,
    /// Of every logit that a token was chosen from, and of every answer.
    digest: String,
    ways: Vec<Way>,
}

/// One way of running the requests.
#[derive(Serialize)]
struct Way {
    threads: usize,
    concurrency: usize,
    cache: bool,
    speculation: bool,
    digest: String,
    /// To show that the ways did differ.
    prompt_tokens: usize,
    cached_tokens: usize,
    drafted_tokens: usize,
    accepted_tokens: usize,
    completion_tokens: usize,
}

/// Runs all ways and fails if two of them differ.
pub(crate) fn run(context: &Context, settings: &BenchSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    interrupt::end_at_once(&cancel);
    let compute = Compute::detect();
    let model = loaded.base.weights_as(&compute, settings.weights, false)?;
    let model = Arc::new(model);
    let adapters = exact::adapters(model.config());
    let chat = &loaded.base.chat;
    let variants = ways(settings.quick);
    let bar = Progress::steps(printer, "comparing", variants.len() as u64);
    let mut ways: Vec<Way> = Vec::new();
    for variant in variants {
        let compute = Compute::new(variant.threads);
        let llama = Llama::new(Arc::clone(&model), None, compute);
        let max_context = llama.max_context().min(CONTEXT);
        let mut engine = Engine::new(llama, chat.tokenizer().clone(), variant.config());
        let ids = adapters.clone().map(|lora| engine.load_adapter(lora));
        let requests = exact::requests(chat.tokenizer(), chat.end_tokens(), &ids, max_context)?;
        let outcome = exact::digest(&mut engine, &requests);
        ensure!(
            outcome.n_failed == 0,
            "{} of {} requests failed",
            outcome.n_failed,
            requests.len()
        );
        ways.push(Way::new(variant, outcome));
        bar.add(1);
    }
    drop(bar);
    let digest = ways.first().map(|way| way.digest.clone());
    let digest = digest.unwrap_or_default();
    let report = Report {
        model: &settings.model,
        weights: settings.weights.name(),
        isa: compute.isa().name(),
        same: ways.iter().all(|way| way.digest == digest),
        requests: exact::N_REQUESTS,
        digest,
        ways,
    };
    if settings.json {
        printer.json(&report)?;
    } else {
        printer.line(format!(
            "{} requests, {} ways to run them, {}: digest {}",
            report.requests,
            report.ways.len(),
            if report.same {
                "one result"
            } else {
                "DIFFERENT RESULTS"
            },
            report.digest
        ))?;
        for way in report.ways.iter().filter(|way| way.digest != report.digest) {
            printer.line(way.line())?;
        }
    }
    if report.same {
        return Ok(());
    }
    Err(advise(
        anyhow!("the same requests were answered with different bits"),
        "this is a bug of ours: please report it with the lines above and what `bantam doctor` prints",
    ))
}

/// All of them, or with every thread count and concurrency once, switches taking turns.
fn ways(quick: bool) -> Vec<Variant> {
    let all = Variant::all();
    if !quick {
        return all;
    }
    // Four neighbours differ in the switches alone.
    let turn = |(i, four): (usize, &[Variant])| four.get((i + i / 4) % 4).copied();
    all.chunks(4).enumerate().filter_map(turn).collect()
}

impl Way {
    fn new(variant: Variant, outcome: Outcome) -> Self {
        let Usage {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            drafted_tokens,
            accepted_tokens,
            ..
        } = outcome.usage;
        Self {
            threads: variant.threads,
            concurrency: variant.concurrency,
            cache: variant.cache,
            speculation: variant.speculation,
            digest: format!("{:016x}", outcome.digest),
            prompt_tokens,
            cached_tokens,
            drafted_tokens,
            accepted_tokens,
            completion_tokens,
        }
    }

    fn line(&self) -> String {
        let on = |is_on| if is_on { "on" } else { "off" };
        format!(
            "  {} with {} threads, {} at once, cache {}, guesses {} ({} tokens answered)",
            self.digest,
            self.threads,
            self.concurrency,
            on(self.cache),
            on(self.speculation),
            thousands(self.completion_tokens as u64)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_keeps_every_thread_count_with_every_concurrency_and_all_switches() {
        let quick = ways(true);
        assert_eq!((quick.len(), ways(false).len()), (9, 36));
        let count = |keep: &dyn Fn(&Variant) -> bool| quick.iter().filter(|v| keep(v)).count();
        for threads in [1, 2, 4] {
            for concurrency in [1, 7, 64] {
                assert_eq!(
                    count(&|v| v.threads == threads && v.concurrency == concurrency),
                    1
                );
            }
        }
        for (cache, speculation) in [(false, false), (false, true), (true, false), (true, true)] {
            assert!(count(&|v| v.cache == cache && v.speculation == speculation) >= 2);
        }
    }
}
