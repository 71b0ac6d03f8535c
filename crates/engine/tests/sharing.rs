//! What requests share (adapters, memory, turns, guesses) and that none of it changes an answer.
#![allow(clippy::unwrap_used, reason = "a test")]

mod mock;

use std::collections::HashMap;
use std::sync::Arc;

use bantam_engine::{
    AdapterId, Completion, Engine, EngineConfig, Event, Finish, Request, RequestError, RequestId,
    SubmitError, generate_all,
};
use mock::{Mock, greedy, prompt, tokenizer, warm};

fn engine(config: EngineConfig) -> Engine<Mock> {
    Engine::new(Mock::new(), tokenizer(), config)
}

/// The answer of an engine that has nothing else to do and does nothing clever.
fn alone(request: &Request, adapter: Option<u64>) -> Completion {
    let mut engine = engine(EngineConfig {
        prefix_bytes: 0,
        draft_tokens: 0,
        ..EngineConfig::default()
    });
    let mut request = request.clone();
    request.adapter = adapter.map(|a| engine.load_adapter(Arc::new(a)));
    generate_all(&mut engine, vec![request], &mut |_| ()).remove(0)
}

fn same(got: &Completion, want: &Completion) {
    assert_eq!((&got.tokens, &got.finish), (&want.tokens, &want.finish));
    assert_eq!((&got.text, &got.logprobs), (&want.text, &want.logprobs));
}

/// Steps until idle; the order in which requests ended.
fn drain(engine: &mut Engine<Mock>, mut each: impl FnMut(&Engine<Mock>)) -> Vec<RequestId> {
    let mut ends = Vec::new();
    while !engine.is_idle() {
        engine.step(&mut |id, event| {
            if matches!(event, Event::Done { .. }) {
                ends.push(id);
            }
        });
        each(engine);
    }
    ends
}

#[test]
fn adapters_share_steps_and_nothing_else() {
    let mut engine = engine(EngineConfig::default());
    let log = engine.model().log.clone();
    let ids = [7, 8].map(|a| engine.load_adapter(Arc::new(a)));
    assert_ne!(ids[0], ids[1]);
    let adapters = [None, Some((ids[0], 7)), Some((ids[1], 8))];
    let mut requests = Vec::new();
    let mut want = Vec::new();
    for round in 0..2 {
        for (i, adapter) in adapters.iter().enumerate() {
            let request = warm(prompt(1, 40), i as u64 + 3 * round);
            want.push(alone(&request, adapter.map(|a| a.1)));
            requests.push(Request {
                adapter: adapter.map(|a| a.0),
                ..request
            });
        }
    }
    assert_ne!(want[0].tokens, want[1].tokens, "an adapter changes answers");
    let got = generate_all(&mut engine, requests, &mut |_| ());
    got.iter()
        .zip(&want)
        .for_each(|(got, want)| same(got, want));
    let cached: Vec<usize> = got.iter().map(|c| c.usage.cached_tokens).collect();
    assert_eq!(
        cached,
        [0, 0, 0, 39, 39, 39],
        "each adapter has its own tree"
    );
    assert_eq!(
        log.lock().unwrap().steps[0].len(),
        3,
        "one step for all three"
    );
}

#[test]
fn unloading_an_adapter_takes_it_from_no_one_who_has_it() {
    let mut engine = engine(EngineConfig {
        slots: 1,
        ..EngineConfig::default()
    });
    let id = engine.load_adapter(Arc::new(5));
    let request = |i| Request {
        adapter: Some(id),
        ..greedy(prompt(i, 30))
    };
    let ids: Vec<RequestId> = (0..2).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut texts: HashMap<RequestId, Vec<u32>> = HashMap::new();
    let mut n_steps = 0;
    while !engine.is_idle() {
        n_steps += 1;
        if n_steps == 3 {
            assert!(engine.unload_adapter(id));
            assert!(!engine.unload_adapter(id));
            let error = engine.submit(request(0)).unwrap_err();
            assert!(matches!(error, SubmitError::UnknownAdapter { .. }));
        }
        engine.step(&mut |id, event| {
            if let Event::Token(token) = event {
                texts.entry(id).or_default().push(token.id);
            }
        });
    }
    for (i, id) in ids.iter().enumerate() {
        let want = alone(&greedy(prompt(i as u64, 30)), Some(5));
        assert_eq!(texts[id], want.tokens);
    }
    assert_eq!(engine.prefixes(), (0, 0), "nothing is kept of it");
    assert_ne!(
        engine.load_adapter(Arc::new(5)),
        id,
        "names are not used again"
    );
}

#[test]
fn clients_take_turns() {
    let mut engine = engine(EngineConfig {
        slots: 1,
        ..EngineConfig::default()
    });
    let of = |client, i| Request {
        client,
        ..greedy(prompt(i, 20))
    };
    let many: Vec<RequestId> = (0..10).map(|i| engine.submit(of(1, i)).unwrap()).collect();
    let one = engine.submit(of(2, 77)).unwrap();
    let ends = drain(&mut engine, |_| ());
    assert_eq!(ends[..3], [many[0], one, many[1]]);
    assert_eq!(ends.len(), 11);
}

#[test]
fn a_long_prompt_holds_up_neither_short_ones_nor_answers() {
    let config = EngineConfig {
        step_tokens: 64,
        busy_step_tokens: 32,
        prefix_bytes: 0,
        ..EngineConfig::default()
    };
    let mut engine = engine(config);
    let log = engine.model().log.clone();
    let long = engine
        .submit(Request {
            max_tokens: 1,
            ..greedy(prompt(1, 390))
        })
        .unwrap();
    let short: Vec<RequestId> = (2..5)
        .map(|i| {
            let request = Request {
                max_tokens: 3,
                ..greedy(prompt(i, 10))
            };
            engine.submit(request).unwrap()
        })
        .collect();
    let ends = drain(&mut engine, |_| ());
    assert_eq!(ends[3], long);
    assert!(short.iter().all(|id| ends[..3].contains(id)));
    let steps = &log.lock().unwrap().steps;
    assert!(steps[0].iter().sum::<usize>() == 64 && steps[0].len() == 4);
    for step in steps.iter().filter(|s| s.contains(&1)) {
        assert!(step.iter().sum::<usize>() <= 32, "{step:?}");
    }
}

#[test]
fn memory_is_kept_within_bounds_by_pausing_and_nobody_notices() {
    let requests: Vec<Request> = (0..8)
        .map(|i| Request {
            end_tokens: vec![],
            max_tokens: 60,
            ..warm(prompt(i % 3, 40 + i as usize), i)
        })
        .collect();
    let want: Vec<Completion> = requests.iter().map(|r| alone(r, None)).collect();
    for (kv_tokens, prefix_tokens) in [(150, 1000), (150, 0), (330, 100), (10, 10)] {
        let config = EngineConfig {
            kv_bytes: 4 * kv_tokens,
            prefix_bytes: 4 * prefix_tokens,
            ..EngineConfig::default()
        };
        let mut one = engine(config.clone());
        for request in &requests {
            one.submit(request.clone()).unwrap();
        }
        let mut most = 0;
        let mut paused = false;
        let mut before = 0;
        let ends = drain(&mut one, |engine| {
            most = most.max(engine.running());
            paused |= engine.waiting() > before && before > 0;
            before = engine.waiting();
            // One token for each may have been taken since there was last looked.
            let bound = 4 * (kv_tokens + engine.running() * 20);
            assert!(engine.running() <= 1 || engine.kv_bytes() <= bound);
        });
        assert_eq!(ends.len(), 8);
        assert_eq!(most > 1, kv_tokens > 10, "{kv_tokens}");
        if kv_tokens == 150 {
            assert!(paused, "no request was ever paused");
        }
        let got = generate_all(&mut engine(config), requests.clone(), &mut |_| ());
        got.iter()
            .zip(&want)
            .for_each(|(got, want)| same(got, want));
    }
}

#[test]
fn a_paused_request_can_be_cancelled() {
    let mut engine = engine(EngineConfig {
        kv_bytes: 4 * 120,
        prefix_bytes: 0,
        ..EngineConfig::default()
    });
    let request = |i| Request {
        end_tokens: vec![],
        max_tokens: 100,
        ..greedy(prompt(i, 40))
    };
    let ids: Vec<RequestId> = (0..2).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut ends = HashMap::new();
    for _ in 0..3 {
        engine.step(&mut |_, _| ());
    }
    assert_eq!(engine.running(), 2);
    while engine.running() == 2 {
        engine.step(&mut |_, _| ());
    }
    assert_eq!((engine.running(), engine.waiting()), (1, 1));
    assert!(engine.cancel(ids[1]));
    while !engine.is_idle() {
        engine.step(&mut |id, event| {
            if let Event::Done { finish, .. } = event {
                assert!(ends.insert(id, finish).is_none());
            }
        });
    }
    assert_eq!(ends[&ids[1]], Finish::Cancelled);
    assert_eq!(ends[&ids[0]], Finish::Length);
}

#[test]
fn a_true_prediction_takes_fewer_steps_and_a_false_one_no_other_answer() {
    for temperature in [0.0, 0.8] {
        let mut request = Request {
            end_tokens: vec![],
            logprobs: Some(2),
            ..warm(prompt(1, 30), 4)
        };
        request.sampling.temperature = temperature;
        let want = alone(&request, None);
        let mut steps = Vec::new();
        let mut wrong = want.tokens.clone();
        (0..wrong.len()).step_by(3).for_each(|i| wrong[i] ^= 1);
        for prediction in [None, Some(want.tokens.clone()), Some(wrong)] {
            let mut engine = engine(EngineConfig::default());
            let log = engine.model().log.clone();
            let request = Request {
                prediction,
                ..request.clone()
            };
            let got = generate_all(&mut engine, vec![request], &mut |_| ()).remove(0);
            same(&got, &want);
            assert!(got.usage.accepted_tokens <= got.usage.drafted_tokens);
            steps.push((log.lock().unwrap().steps.len(), got.usage));
        }
        assert!(steps[0].0 > 30, "{steps:?}");
        assert!(steps[1].0 < 10, "{steps:?}");
        assert!(steps[1].1.accepted_tokens > 30, "{steps:?}");
        assert!(steps[2].1.accepted_tokens > 0, "{steps:?}");
        assert!(steps[2].1.accepted_tokens < steps[2].1.drafted_tokens);
    }
}

#[test]
fn options_are_scored_as_the_model_scores_them() {
    let prompt_tokens = prompt(1, 60);
    let options: Vec<Vec<u32>> = [
        &[40, 41, 42][..],
        &[40, 41],
        &[40, 50, 51, 52],
        &[60],
        &[],
        &[40, 41, 42],
    ]
    .map(<[u32]>::to_vec)
    .to_vec();
    let mut engine = engine(EngineConfig {
        step_tokens: 25,
        ..EngineConfig::default()
    });
    let id = engine.load_adapter(Arc::new(9));
    let log = engine.model().log.clone();
    for (id, adapter) in [(None, None), (Some(id), Some(9)), (None, None)] {
        log.lock().unwrap().steps.clear();
        let got = engine.score_options(&prompt_tokens, &options, id).unwrap();
        for (option, got) in options.iter().zip(&got) {
            let want = engine
                .model()
                .logprob(adapter.as_ref(), &prompt_tokens, option);
            assert!((got - want).abs() < 1e-5, "{option:?}: {got} and {want}");
        }
        assert_eq!(got[0], got[5]);
    }
    // The last time the prompt was known but for its last token; what options share was read once.
    assert_eq!(log.lock().unwrap().steps, [vec![1], vec![1], vec![1, 2]]);
    let many: Vec<Vec<u32>> = (0..70).map(|i| vec![40 + i, 41, 42]).collect();
    let got = engine.score_options(&prompt_tokens, &many, None).unwrap();
    let want = engine.model().logprob(None, &prompt_tokens, &many[69]);
    assert!((got[69] - want).abs() < 1e-5);

    let error = engine.score_options(&prompt(1, 399), &options, None);
    let too_long = matches!(
        error,
        Err(RequestError::Refused(SubmitError::ContextOverflow { .. }))
    );
    assert!(too_long);
    let unknown = engine.score_options(&prompt_tokens, &options, Some(AdapterId(99)));
    assert_eq!(unknown.unwrap_err().to_string(), "adapter 99 is not loaded");
    let poison = engine.score_options(&[40, mock::PANIC], &options, None);
    assert_eq!(
        poison.unwrap_err().to_string(),
        "the model failed: panic: planned panic"
    );
}
