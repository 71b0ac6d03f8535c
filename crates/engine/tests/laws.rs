//! A request's answer depends on the request alone.
#![allow(clippy::unwrap_used, reason = "a test")]

mod mock;

use bantam_engine::{Completion, Engine, EngineConfig, Finish, Request, Sampling, generate_all};
use mock::{Mock, greedy, prompt, tokenizer, warm};
use proptest::prelude::*;

fn run(config: EngineConfig, requests: &[Request]) -> Vec<Completion> {
    let mut engine = Engine::new(Mock::new(), tokenizer(), config);
    generate_all(&mut engine, requests.to_vec(), &mut |_| ())
}

/// One engine for each request: no neighbours, no prefixes, prompts in one piece.
fn alone(requests: &[Request]) -> Vec<Completion> {
    let config = EngineConfig {
        prefix_bytes: 0,
        step_tokens: 1000,
        ..EngineConfig::default()
    };
    requests
        .iter()
        .flat_map(|r| run(config.clone(), std::slice::from_ref(r)))
        .collect()
}

fn assert_same(got: &[Completion], want: &[Completion]) {
    assert_eq!(got.len(), want.len());
    for (idx, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.text, want.text, "request {idx}");
        assert_eq!(got.tokens, want.tokens, "request {idx}");
        assert_eq!(got.logprobs, want.logprobs, "request {idx}");
        assert_eq!(got.finish, want.finish, "request {idx}");
        assert_eq!(
            got.usage.prompt_tokens, want.usage.prompt_tokens,
            "request {idx}"
        );
        assert_eq!(
            got.usage.completion_tokens, want.usage.completion_tokens,
            "request {idx}"
        );
    }
}

/// Requests of every kind, most of them with one of two beginnings.
fn mixed(n: usize) -> Vec<Request> {
    (0..n as u64)
        .map(|i| {
            let mut tokens = prompt(i % 2, 50);
            tokens.extend(prompt(100 + i, 1 + i as usize * 7 % 40));
            if i % 5 == 4 {
                tokens = prompt(200 + i, 3);
            }
            let mut request = if i % 3 == 0 {
                greedy(tokens)
            } else {
                warm(tokens, i)
            };
            if i % 4 == 1 {
                request.sampling.top_p = 0.8;
                request.sampling.repetition_penalty = 1.1;
                request.logprobs = Some(3);
            }
            if i % 4 == 2 {
                request.sampling.top_k = 12;
                request.sampling.frequency_penalty = 0.5;
                request.stop = vec!["a".to_string(), "QX".to_string()];
            }
            request.max_tokens = 1 + i as usize % 30;
            request
        })
        .collect()
}

#[test]
fn a_batch_is_its_singles() {
    let requests = mixed(24);
    let want = alone(&requests);
    assert!(want.iter().any(|c| c.finish == Finish::Stop));
    assert!(want.iter().any(|c| c.finish == Finish::Length));
    assert!(want.iter().all(|c| !matches!(c.finish, Finish::Error(_))));
    for slots in [1, 2, 5, 24] {
        let off = EngineConfig {
            slots,
            prefix_bytes: 0,
            ..EngineConfig::default()
        };
        assert_same(&run(off, &requests), &want);
    }
}

#[test]
fn chunked_prompts_are_whole_prompts() {
    let requests = mixed(12);
    let want = alone(&requests);
    for step_tokens in [1, 2, 17, 64] {
        let config = EngineConfig {
            step_tokens,
            prefix_bytes: 0,
            ..EngineConfig::default()
        };
        assert_same(&run(config, &requests), &want);
    }
}

#[test]
fn prefix_reuse_changes_nothing_but_the_work() {
    let requests = mixed(24);
    let want = alone(&requests);
    for (slots, prefix_bytes, saved) in [
        (1, 4 * 100, 100),
        (1, 4 * 2000, 700),
        (3, 4 * 300, 500),
        (8, 4 * 2000, 700),
    ] {
        let config = EngineConfig {
            slots,
            prefix_bytes,
            ..EngineConfig::default()
        };
        let got = run(config, &requests);
        assert_same(&got, &want);
        let cached: usize = got.iter().map(|c| c.usage.cached_tokens).sum();
        assert!(cached >= saved, "{cached} tokens reused with {slots} slots");
    }
    assert!(want.iter().all(|c| c.usage.cached_tokens == 0));
}

#[test]
fn a_conversation_reads_only_what_is_new() {
    let mut engine = Engine::new(Mock::new(), tokenizer(), EngineConfig::default());
    let first = Request {
        max_tokens: 10,
        end_tokens: vec![],
        ..greedy(prompt(1, 60))
    };
    let answer = generate_all(&mut engine, vec![first], &mut |_| ()).remove(0);
    let mut second = prompt(1, 60);
    second.extend(&answer.tokens);
    second.extend(prompt(2, 5));
    let answer = generate_all(&mut engine, vec![greedy(second.clone())], &mut |_| ()).remove(0);
    // All but the last token of the first answer, which no one needed to read.
    assert_eq!(answer.usage.cached_tokens, 69);
    assert_same(&[answer], &alone(&[greedy(second)]));
}

#[test]
fn equal_prompts_at_once_are_read_once() {
    let mut engine = Engine::new(Mock::new(), tokenizer(), EngineConfig::default());
    let log = engine.model().log.clone();
    let requests: Vec<Request> = (0..4).map(|seed| warm(prompt(1, 100), seed)).collect();
    let got = generate_all(&mut engine, requests.clone(), &mut |_| ());
    assert_same(&got, &alone(&requests));
    assert_eq!(
        got.iter()
            .map(|c| c.usage.cached_tokens)
            .collect::<Vec<_>>(),
        [0, 99, 99, 99]
    );
    assert_eq!(log.lock().unwrap().steps[0], [100]);
}

#[test]
fn asking_for_logprobs_changes_no_token() {
    let plain = warm(prompt(3, 20), 7);
    let told = Request {
        logprobs: Some(5),
        ..plain.clone()
    };
    let got = alone(&[plain, told]);
    assert_eq!(got[0].tokens, got[1].tokens);
    assert_eq!(got[1].logprobs.len(), got[1].tokens.len());
    for logprobs in &got[1].logprobs {
        assert_eq!(logprobs.top.len(), 5);
        assert!(logprobs.top.windows(2).all(|w| w[0].1 >= w[1].1));
        assert!(logprobs.logprob <= logprobs.top[0].1);
    }
}

#[test]
fn a_stop_string_cuts_the_answer_before_it() {
    let free = Request {
        max_tokens: 60,
        end_tokens: vec![],
        logprobs: Some(0),
        ..warm(prompt(5, 9), 1)
    };
    let whole = alone(std::slice::from_ref(&free)).remove(0);
    assert_eq!(whole.finish, Finish::Length);
    for at in 0..whole.text.len() - 3 {
        let stop = whole.text[at..at + 3].to_string();
        let first = whole.text.find(&stop).unwrap();
        let got = alone(&[Request {
            stop: vec![stop, "never".to_string()],
            ..free.clone()
        }])
        .remove(0);
        assert_eq!(got.text, whole.text[..first]);
        assert_eq!(got.finish, Finish::Stop);
        assert_eq!(got.logprobs.len(), got.tokens.len());
    }
}

#[test]
fn a_seed_is_an_answer() {
    let of = |seed| alone(&[warm(prompt(1, 10), seed)]).remove(0).text;
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_batch_is_its_singles(
        shape in prop::collection::vec((0u64..4, 0usize..80, 1usize..30, 0u64..5), 1..12),
        slots in 1usize..6,
        step_tokens in 1usize..80,
        prefix_tokens in 0usize..300,
        draft_tokens in 0usize..9,
        kv_tokens in 100usize..2000,
        prefix_min in 1usize..30,
    ) {
        let requests: Vec<Request> = shape
            .iter()
            .map(|&(family, len, max_tokens, seed)| {
                let mut tokens = prompt(family, 40);
                tokens.extend(prompt(seed + 50, len));
                let sampling = Sampling { temperature: seed as f32 * 0.4, seed, ..Sampling::default() };
                Request { sampling, max_tokens, ..greedy(tokens) }
            })
            .collect();
        let config = EngineConfig {
            slots,
            step_tokens,
            prefix_bytes: 4 * prefix_tokens,
            prefix_min,
            draft_tokens,
            kv_bytes: 4 * kv_tokens,
            queue: 3,
            ..EngineConfig::default()
        };
        assert_same(&run(config, &requests), &alone(&requests));
    }
}
