//! Same bits: 64 mixed requests with two adapters, at every combination of threads, concurrency, cache
//! and speculation, have one digest of all their logits and tokens.
#![allow(clippy::unwrap_used, reason = "a test")]

mod mock;

use std::sync::Arc;

use bantam_engine::exact::{Outcome, Variant, adapters, digest, requests};
use bantam_engine::{AdapterId, Engine, LanguageModel, Llama, Request};
use bantam_formats::open_model;
use bantam_kernels::Compute;
use bantam_model::{Model, Weights};
use mock::{END, Mock, tokenizer};

fn load() -> Arc<Model<f32>> {
    let dir = tempfile::tempdir().unwrap();
    bantam_testkit::tiny::write_model(dir.path(), 1);
    let files = open_model(dir.path()).unwrap();
    Arc::new(Model::load(&files, Weights::Auto, false).unwrap())
}

fn all_requests<M: LanguageModel>(engine: &Engine<M>, adapters: &[AdapterId]) -> Vec<Request> {
    requests(
        engine.tokenizer(),
        &[END],
        adapters,
        engine.model().max_context(),
    )
    .unwrap()
}

fn run(model: &Arc<Model<f32>>, variant: Variant) -> Outcome {
    let llama = Llama::new(Arc::clone(model), None, Compute::new(variant.threads));
    let mut engine = Engine::new(llama, tokenizer(), variant.config());
    let adapters = adapters(model.config()).map(|lora| engine.load_adapter(lora));
    let requests = all_requests(&engine, &adapters);
    digest(&mut engine, &requests)
}

#[test]
fn one_digest_for_every_way_to_run() {
    let model = load();
    let plain = Variant {
        threads: 1,
        concurrency: 1,
        cache: false,
        speculation: false,
    };
    let want = run(&model, plain);
    assert_eq!(want.n_failed, 0);
    assert_eq!(
        (want.usage.cached_tokens, want.usage.drafted_tokens),
        (0, 0)
    );
    assert!(want.usage.forced_tokens > 100, "{want:?}");
    assert!(want.usage.completion_tokens > 1000, "{want:?}");
    for variant in Variant::all() {
        let got = run(&model, variant);
        assert_eq!(got.digest, want.digest, "{variant:?}: {got:?}");
        // The ways really differ.
        let usage = got.usage;
        assert_eq!(
            usage.cached_tokens > 500,
            variant.cache,
            "{variant:?}: {usage:?}"
        );
        let is_alone = variant.concurrency == 1;
        assert!(
            usage.accepted_tokens > 0 || !variant.speculation || !is_alone,
            "{usage:?}"
        );
        assert!(usage.drafted_tokens == 0 || variant.speculation);
    }
}

#[test]
fn the_digest_sees_a_single_logit() {
    let run = |bend: Option<usize>| {
        let variant = Variant {
            threads: 1,
            concurrency: 7,
            cache: true,
            speculation: true,
        };
        let mut engine = Engine::new(Mock::new(), tokenizer(), variant.config());
        let adapters = [1, 2].map(|a| engine.load_adapter(Arc::new(a)));
        let mut requests = all_requests(&engine, &adapters);
        if let Some(idx) = bend {
            // Far from every choice that it makes, and still a difference.
            requests[idx].sampling.logit_bias.push((3, -1e-3));
            requests[idx].prompt[0] ^= 1;
        }
        digest(&mut engine, &requests)
    };
    let want = run(None);
    assert_eq!((run(None), want.n_failed), (want, 0));
    for idx in [0, 31, 63] {
        assert_ne!(run(Some(idx)).digest, want.digest);
    }
}
