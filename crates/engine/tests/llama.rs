//! The laws of `laws.rs` once more, with a real (tiny) model: its arithmetic keeps them to the bit.
#![allow(clippy::unwrap_used, reason = "a test")]

mod mock;

use std::sync::Arc;

use bantam_engine::{
    Completion, Engine, EngineConfig, Finish, Llama, Request, Sampling, generate_all,
};
use bantam_formats::open_model;
use bantam_kernels::Compute;
use bantam_model::{Model, Weights};
use mock::{prompt, tokenizer};

fn load() -> Arc<Model<f32>> {
    let dir = tempfile::tempdir().unwrap();
    bantam_testkit::tiny::write_model(dir.path(), 1);
    let files = open_model(dir.path()).unwrap();
    Arc::new(Model::load(&files, Weights::F32, false).unwrap())
}

fn requests() -> Vec<Request> {
    (0..8u64)
        .map(|i| {
            let mut tokens = prompt(i % 2, 40);
            tokens.extend(prompt(9 + i, i as usize * 3 + 1));
            let sampling = Sampling {
                temperature: 0.9 * (i % 2) as f32,
                seed: i,
                ..Sampling::default()
            };
            Request {
                prompt: tokens,
                max_tokens: 24,
                sampling,
                logprobs: Some(2),
                ..Request::default()
            }
        })
        .collect()
}

fn run(model: &Arc<Model<f32>>, threads: usize, config: EngineConfig) -> Vec<Completion> {
    let llama = Llama::new(Arc::clone(model), None, Compute::new(threads));
    let mut engine = Engine::new(llama, tokenizer(), config);
    generate_all(&mut engine, requests(), &mut |_| ())
}

#[test]
fn answers_do_not_depend_on_batch_chunks_threads_or_prefixes() {
    let model = load();
    let plain = EngineConfig {
        slots: 1,
        prefix_bytes: 0,
        step_tokens: 1000,
        ..EngineConfig::default()
    };
    let want = run(&model, 1, plain.clone());
    assert!(
        want.iter()
            .all(|c| c.finish == Finish::Length && c.tokens.len() == 24)
    );
    let configs = [
        EngineConfig {
            slots: 8,
            ..plain.clone()
        },
        EngineConfig {
            step_tokens: 7,
            slots: 3,
            ..plain
        },
        EngineConfig::default(),
        EngineConfig {
            prefix_min: 1,
            slots: 2,
            step_tokens: 33,
            ..EngineConfig::default()
        },
    ];
    for (idx, config) in configs.into_iter().enumerate() {
        let got = run(&model, 1 + idx % 2, config);
        for (got, want) in got.iter().zip(&want) {
            // Log-probabilities as well, to the bit.
            assert_eq!(
                (&got.tokens, &got.logprobs),
                (&want.tokens, &want.logprobs),
                "config {idx}"
            );
        }
    }
}
