//! What the engine makes of the model's speed: `streams MODEL.gguf [THREADS]` generates with 1, 4, 16 and 64
//! streams, greedy, sampled, and held to a JSON schema, and runs the bare model on the same batch beside it.
#![allow(clippy::unwrap_used, reason = "a tool for measuring")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bantam_engine::{
    BoxedConstraint, Engine, EngineConfig, Event, LanguageModel, Llama, Request, Sampling, Span,
    Usage, Wants,
};
use bantam_formats::{ModelFiles, open_model};
use bantam_kernels::Compute;
use bantam_model::{Model, Weights};
use bantam_text::{ConstraintEngine, ConstraintSpec, GgufVocab, Tokenizer};
use serde_json::json;

const STEPS: usize = 24;

fn tokenizer(files: &ModelFiles) -> Arc<Tokenizer> {
    let ModelFiles::Gguf(gguf) = files else {
        panic!("a GGUF file is needed")
    };
    let metadata = gguf.metadata();
    let strings = |key| metadata.str_array(key).unwrap().to_vec();
    let kinds = metadata.u32_array("tokenizer.ggml.token_type").unwrap();
    let vocab = GgufVocab {
        model: metadata.str("tokenizer.ggml.model").unwrap().to_owned(),
        pre: metadata.str("tokenizer.ggml.pre").unwrap().to_owned(),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: kinds.into_iter().map(|kind| kind as i32).collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: None,
        eos: metadata.u32("tokenizer.ggml.eos_token_id"),
        pad: None,
        unk: None,
        add_bos: false,
    };
    Arc::new(Tokenizer::from_gguf(vocab).unwrap())
}

/// Tokens a second of the model alone: one row a stream.
fn bare(llama: &mut Llama, n: usize, prompt: &[u32]) -> f64 {
    let mut caches: Vec<_> = (0..n).map(|_| llama.new_cache()).collect();
    let mut logits = Vec::new();
    let mut pass = |tokens: &[u32], wants| {
        let spans = caches.iter_mut().map(|cache| Span {
            cache,
            tokens,
            wants,
            adapter: None,
        });
        llama
            .forward(&mut spans.collect::<Vec<_>>(), &mut logits)
            .unwrap();
    };
    pass(prompt, Wants::None);
    let began = Instant::now();
    (0..STEPS).for_each(|step| pass(&[50 + step as u32], Wants::Last));
    (n * STEPS) as f64 / began.elapsed().as_secs_f64()
}

/// Tokens a second of the engine after the prompts are read.
fn ours(mut engine: Engine<Llama>, requests: Vec<Request>) -> (f64, usize, Usage) {
    for request in requests {
        engine.submit(request).unwrap();
    }
    let (mut tokens, mut began, mut steps, mut all) = (0, None, 0, Usage::default());
    while !engine.is_idle() {
        steps += 1;
        engine.step(&mut |_, event| match event {
            Event::Token(_) => tokens += 1,
            Event::Done { usage, .. } => {
                all.forced_tokens += usage.forced_tokens;
                all.drafted_tokens += usage.drafted_tokens;
                all.accepted_tokens += usage.accepted_tokens;
            }
        });
        // The first step reads the prompts.
        began.get_or_insert_with(|| {
            tokens = 0;
            Instant::now()
        });
    }
    let speed = tokens as f64 / began.unwrap().elapsed().as_secs_f64();
    (speed, steps, all)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let path = args.next().expect("the path of a model");
    let threads = args.next().map_or(2, |n| n.parse().unwrap());
    let files = open_model(Path::new(&path)).unwrap();
    let tokenizer = tokenizer(&files);
    let model = Arc::new(Model::load(&files, Weights::Auto, false).unwrap());
    let new = || Llama::new(Arc::clone(&model), None, Compute::new(threads));
    let end_tokens = vec![tokenizer.eos().unwrap()];
    let constraints = ConstraintEngine::new(&tokenizer, &end_tokens).unwrap();
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["person", "place", "mood"],
        "properties": {"person": {"type": "string", "maxLength": 40}, "place": {"type": "string", "maxLength": 40},
        "mood": {"enum": ["cheerful", "sad", "neither"]}}});
    let schema: BoxedConstraint = constraints
        .compile(&ConstraintSpec::JsonSchema(schema))
        .unwrap()
        .into();
    let text = "Yesterday Anna Berggren walked to the harbour of Gothenburg and laughed. As JSON: ";
    let prompt = tokenizer.encode_plain(text);
    for n in [1, 4, 16, 64] {
        println!(
            "{n:2} streams: model {:7.0} tok/s",
            bare(&mut new(), n, &prompt)
        );
        let free = |temperature, draft_tokens: usize| (temperature, None, draft_tokens);
        let kinds = [
            ("greedy", free(0.0, 0)),
            ("greedy, drafts", free(0.0, 12)),
            ("sampled", free(1.0, 0)),
            ("json", (0.0, Some(schema.clone()), 0)),
            ("json, drafts", (0.0, Some(schema.clone()), 12)),
        ];
        for (name, (temperature, constraint, draft_tokens)) in kinds {
            let request = |i: usize| {
                let mut prompt = prompt.clone();
                prompt.insert(0, 1000 + i as u32);
                let sampling = Sampling {
                    temperature,
                    seed: i as u64,
                    ..Sampling::default()
                };
                let is_free = constraint.is_none();
                Request {
                    prompt,
                    max_tokens: if is_free { STEPS + 1 } else { 64 },
                    sampling,
                    end_tokens: if is_free {
                        Vec::new()
                    } else {
                        end_tokens.clone()
                    },
                    constraint: constraint.clone(),
                    ..Request::default()
                }
            };
            let config = EngineConfig {
                step_tokens: 4096,
                busy_step_tokens: 4096,
                draft_tokens,
                ..EngineConfig::default()
            };
            let engine = Engine::new(new(), tokenizer.clone(), config);
            let (speed, steps, usage) = ours(engine, (0..n).map(request).collect());
            println!(
                "  {name:15} {speed:7.0} tok/s in {steps:3} steps; forced {}, drafted {}, accepted {}",
                usage.forced_tokens, usage.drafted_tokens, usage.accepted_tokens
            );
        }
    }
}
