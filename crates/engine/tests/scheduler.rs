//! The engine, one step at a time, with planned failures.
#![allow(clippy::unwrap_used, reason = "a test")]

mod mock;

use std::collections::HashMap;

use bantam_engine::{
    BoxedConstraint, Engine, EngineConfig, Event, Finish, Request, RequestError, RequestId,
    SubmitError, TokenConstraint, Usage, generate_all,
};
use mock::{FAIL, LOSE, MAX_CONTEXT, Mock, NAN, PANIC, greedy, prompt, tokenizer, warm};

fn engine(config: EngineConfig) -> Engine<Mock> {
    Engine::new(Mock::new(), tokenizer(), config)
}

/// Steps until idle; the text and the end of each request. Checks that nothing follows an end.
fn drain(engine: &mut Engine<Mock>) -> HashMap<RequestId, (String, Finish, Usage)> {
    let mut texts: HashMap<RequestId, String> = HashMap::new();
    let mut ends = HashMap::new();
    let mut n_steps = 0;
    while !engine.is_idle() {
        n_steps += 1;
        assert!(n_steps < 10_000, "the engine does not come to rest");
        engine.step(&mut |id, event| {
            assert!(!ends.contains_key(&id), "an event after the end");
            match event {
                Event::Token(token) => texts.entry(id).or_default().push_str(&token.text_delta),
                Event::Done { finish, usage, .. } => {
                    ends.insert(id, (texts.remove(&id).unwrap_or_default(), finish, usage));
                }
            }
        });
    }
    ends
}

fn alone(request: &Request) -> (String, Finish) {
    let mut engine = engine(EngineConfig::default());
    let answer = generate_all(&mut engine, vec![request.clone()], &mut |_| ()).remove(0);
    (answer.text, answer.finish)
}

#[test]
fn cancelling_at_any_step_disturbs_no_one() {
    let requests: Vec<Request> = (0..5)
        .map(|i| warm(prompt(i % 2, 60 + i as usize), i))
        .collect();
    for victim in 0..5 {
        for at in 0..25 {
            let config = EngineConfig {
                slots: 3,
                step_tokens: 20,
                ..EngineConfig::default()
            };
            let mut engine = engine(config);
            let ids: Vec<RequestId> = requests
                .iter()
                .map(|r| engine.submit(r.clone()).unwrap())
                .collect();
            let mut ends = HashMap::new();
            let mut texts: HashMap<RequestId, String> = HashMap::new();
            let mut n_steps = 0;
            while !engine.is_idle() {
                if n_steps == at {
                    let was_running = !ends.contains_key(&ids[victim]);
                    assert_eq!(engine.cancel(ids[victim]), was_running);
                    assert!(!engine.cancel(ids[victim]), "only once");
                }
                n_steps += 1;
                engine.step(&mut |id, event| match event {
                    Event::Token(token) => {
                        assert!(!ends.contains_key(&id));
                        texts.entry(id).or_default().push_str(&token.text_delta);
                    }
                    Event::Done { finish, .. } => {
                        assert!(ends.insert(id, finish).is_none(), "ended twice");
                    }
                });
            }
            assert_eq!(ends.len(), 5);
            for (idx, id) in ids.iter().enumerate() {
                let (text, finish) = alone(&requests[idx]);
                if ends[id] == Finish::Cancelled {
                    assert_eq!(idx, victim);
                    assert!(text.starts_with(texts.get(id).map_or("", |t| t)));
                } else {
                    assert_eq!(
                        (texts.remove(id).unwrap_or_default(), &ends[id]),
                        (text, &finish)
                    );
                }
            }
        }
    }
}

#[test]
fn a_failing_model_ends_only_the_request_that_makes_it_fail() {
    for (poison, said) in [
        (PANIC, "the model failed: panic: planned panic"),
        (FAIL, "the model failed: planned failure"),
        (NAN, "the model's logits are not finite after 41 tokens"),
        (LOSE, "the model failed: a cache of 20 tokens now has 0"),
    ] {
        let mut requests: Vec<Request> = (0..4).map(|i| warm(prompt(i, 30), i)).collect();
        requests[2].prompt.insert(25, poison);
        requests[2].prompt.extend(prompt(77, 10));
        let config = EngineConfig {
            step_tokens: 80,
            slots: 4,
            ..EngineConfig::default()
        };
        let mut engine = engine(config);
        let mut ids: Vec<RequestId> = vec![engine.submit(requests[2].clone()).unwrap()];
        // The poison is read after the others have begun, or with them.
        ids.extend([0, 1, 3].map(|i| engine.submit(requests[i].clone()).unwrap()));
        let ends = drain(&mut engine);
        let Finish::Error(error) = &ends[&ids[0]].1 else {
            panic!("{poison} went through")
        };
        if poison != LOSE {
            assert_eq!(error.to_string(), said);
        } else {
            assert!(
                error.to_string().starts_with("the model failed: "),
                "{error}"
            );
        }
        for (id, idx) in ids[1..].iter().zip([0, 1, 3]) {
            let (text, finish, _) = &ends[id];
            assert_eq!(
                (text.clone(), finish.clone()),
                alone(&requests[idx]),
                "poison {poison}"
            );
        }
        // Nothing of the failed request is left for others to start from.
        let again = engine.submit(requests[2].clone()).unwrap();
        let ends = drain(&mut engine);
        assert!(matches!(ends[&again].1, Finish::Error(_)));
        assert_eq!(ends[&again].2.cached_tokens, 0);
    }
}

#[test]
fn refusals_are_typed_and_name_the_numbers() {
    let mut engine = engine(EngineConfig {
        queue: 2,
        ..EngineConfig::default()
    });
    let over = Request {
        max_tokens: 41,
        ..greedy(prompt(1, 360))
    };
    let error = engine.submit(over).unwrap_err();
    assert_eq!(
        error,
        SubmitError::ContextOverflow {
            prompt_tokens: 360,
            max_tokens: 41,
            max_context: 400
        }
    );
    assert_eq!(
        error.to_string(),
        "the prompt has 360 tokens and `max_tokens` is 41, together more than the model's context of 400 tokens"
    );
    assert_eq!(
        engine.submit(greedy(vec![])).unwrap_err(),
        SubmitError::EmptyPrompt
    );
    let none = Request {
        max_tokens: 0,
        ..greedy(prompt(1, 3))
    };
    assert_eq!(
        engine.submit(none).unwrap_err(),
        SubmitError::NoTokensWanted
    );
    let unknown = engine.submit(greedy(vec![99_999])).unwrap_err();
    assert!(matches!(
        unknown,
        SubmitError::UnknownToken { token: 99_999, .. }
    ));
    let whole = Request {
        max_tokens: usize::MAX,
        ..greedy(prompt(1, 3))
    };
    assert!(matches!(
        engine.submit(whole).unwrap_err(),
        SubmitError::ContextOverflow { .. }
    ));
    assert!(engine.is_idle());
    engine.submit(greedy(prompt(1, 3))).unwrap();
    engine.submit(greedy(prompt(1, 3))).unwrap();
    let full = engine.submit(greedy(prompt(1, 3))).unwrap_err();
    assert_eq!(full, SubmitError::QueueFull { waiting: 2 });
    drain(&mut engine);
}

#[test]
fn the_context_can_be_filled_to_the_brim() {
    let full = Request {
        max_tokens: 30,
        end_tokens: vec![],
        ..greedy(prompt(1, MAX_CONTEXT - 30))
    };
    let mut engine = engine(EngineConfig::default());
    let id = engine.submit(full).unwrap();
    let ends = drain(&mut engine);
    assert_eq!(ends[&id].1, Finish::Length);
    assert_eq!(ends[&id].2.completion_tokens, 30);
}

#[test]
fn a_step_stays_within_its_budget_and_every_one_moves() {
    let config = EngineConfig {
        slots: 4,
        step_tokens: 32,
        prefix_bytes: 0,
        ..EngineConfig::default()
    };
    let mut engine = engine(config);
    let log = engine.model().log.clone();
    for i in 0..8 {
        engine.submit(warm(prompt(i, 100), i)).unwrap();
    }
    drain(&mut engine);
    for step in &log.lock().unwrap().steps {
        assert!(step.iter().sum::<usize>() <= 32, "{step:?}");
        assert!(step.len() <= 4);
    }
}

#[test]
fn usage_counts_what_was_read_and_written() {
    let mut engine = engine(EngineConfig::default());
    let id = engine
        .submit(Request {
            end_tokens: vec![],
            ..greedy(prompt(1, 33))
        })
        .unwrap();
    let usage = drain(&mut engine)[&id].2;
    assert_eq!(
        usage,
        Usage {
            prompt_tokens: 33,
            cached_tokens: 0,
            completion_tokens: 40,
            ..usage
        }
    );
}

#[test]
fn the_prefix_budget_is_kept() {
    let config = EngineConfig {
        prefix_bytes: 4 * 150,
        ..EngineConfig::default()
    };
    let mut engine = engine(config);
    for i in 0..10 {
        engine.submit(greedy(prompt(i, 40))).unwrap();
        drain(&mut engine);
        let (n, bytes) = engine.prefixes();
        assert!(bytes <= 600, "{n} pieces of {bytes} bytes");
        assert!(n > 0);
    }
}

/// Allows the tokens of a script, one after the other, then fails as planned.
#[derive(Clone)]
struct Script {
    allowed: Vec<Vec<u32>>,
    at: usize,
    fail_at: Option<usize>,
    mask: Vec<u32>,
}

impl Script {
    fn boxed(allowed: &[&[u32]], fail_at: Option<usize>) -> Option<BoxedConstraint> {
        let allowed = allowed.iter().map(|a| a.to_vec()).collect();
        Some(Box::new(Script {
            allowed,
            at: 0,
            fail_at,
            mask: Vec::new(),
        }))
    }
}

impl TokenConstraint for Script {
    fn allowed(&mut self) -> Result<&[u32], String> {
        if self.fail_at == Some(self.at) {
            return Err("planned failure".to_string());
        }
        self.mask = vec![0; 10];
        for &token in self
            .allowed
            .get(self.at)
            .ok_or("asked for a mask after the end")?
        {
            self.mask[token as usize / 32] |= 1 << (token % 32);
        }
        Ok(&self.mask)
    }

    fn commit(&mut self, token: u32) -> Result<(), String> {
        assert!(
            self.allowed[self.at].contains(&token),
            "the mask was not obeyed"
        );
        self.at += 1;
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.at == self.allowed.len()
    }

    fn boxed_clone(&self) -> BoxedConstraint {
        Box::new(self.clone())
    }
}

#[test]
fn a_constraint_is_obeyed_and_ends_the_answer() {
    let allowed: &[&[u32]] = &[&[100, 101], &[102], &[103], &[104], &[105, 106, 107]];
    for logprobs in [None, Some(2)] {
        let mut engine = engine(EngineConfig {
            draft_tokens: 0,
            ..EngineConfig::default()
        });
        let log = engine.model().log.clone();
        let constraint = Script::boxed(allowed, None);
        let request = Request {
            constraint,
            logprobs,
            ..warm(prompt(1, 10), 3)
        };
        let answer = generate_all(&mut engine, vec![request], &mut |_| ()).remove(0);
        assert_eq!(answer.finish, Finish::Stop);
        assert_eq!(answer.tokens.len(), 5);
        assert_eq!(answer.tokens[1..4], [102, 103, 104]);
        let steps = log.lock().unwrap().steps.clone();
        let want: &[&[usize]] = if logprobs.is_none() {
            &[&[10], &[4]]
        } else {
            &[&[10], &[1], &[1], &[1], &[1]]
        };
        assert_eq!(
            steps, want,
            "tokens without an alternative are read together"
        );
    }
}

#[test]
fn forced_tokens_change_nothing_but_the_work() {
    let allowed: &[&[u32]] = &[
        &[100, 101],
        &[102],
        &[103, 104, 105],
        &[90],
        &[105, 106, 107],
    ];
    let of = |logprobs, seed| {
        let constraint = Script::boxed(allowed, None);
        let request = Request {
            constraint,
            logprobs,
            ..warm(prompt(1, 10), seed)
        };
        generate_all(
            &mut engine(EngineConfig::default()),
            vec![request],
            &mut |_| (),
        )
        .remove(0)
        .tokens
    };
    for seed in 0..20 {
        assert_eq!(of(None, seed), of(Some(0), seed));
    }
}

#[test]
fn a_constraint_fails_closed() {
    let allowed: &[&[u32]] = &[&[100, 101], &[102, 103], &[], &[104]];
    let run = |fail_at, allowed| {
        let request = Request {
            constraint: Script::boxed(allowed, fail_at),
            ..greedy(prompt(1, 10))
        };
        generate_all(
            &mut engine(EngineConfig::default()),
            vec![request],
            &mut |_| (),
        )
        .remove(0)
    };
    for fail_at in [0, 1] {
        let error = RequestError::Constraint("planned failure".to_string());
        assert_eq!(run(Some(fail_at), allowed).finish, Finish::Error(error));
    }
    let dead = run(None, allowed);
    assert_eq!(dead.finish, Finish::Error(RequestError::DeadEnd { at: 2 }));
    assert_eq!(dead.tokens.len(), 2);
}

#[test]
fn a_batch_reports_refusals_and_progress_in_place() {
    let mut engine = engine(EngineConfig {
        queue: 2,
        slots: 2,
        ..EngineConfig::default()
    });
    let mut requests: Vec<Request> = (0..9).map(|i| greedy(prompt(i, 20))).collect();
    requests[4].max_tokens = 10_000;
    let mut seen = Vec::new();
    let got = generate_all(&mut engine, requests.clone(), &mut |p| seen.push(*p));
    for (idx, (answer, request)) in got.iter().zip(&requests).enumerate() {
        if idx == 4 {
            let refused = Finish::Error(RequestError::Refused(SubmitError::ContextOverflow {
                prompt_tokens: 20,
                max_tokens: 10_000,
                max_context: 400,
            }));
            assert_eq!(answer.finish, refused);
        } else {
            assert_eq!((answer.text.clone(), answer.finish.clone()), alone(request));
        }
    }
    assert!(seen.windows(2).all(|w| w[0].done <= w[1].done));
    assert!(
        seen.windows(2)
            .all(|w| w[0].completion_tokens <= w[1].completion_tokens)
    );
    let last = seen.last().unwrap();
    assert_eq!((last.done, last.total, last.prompt_tokens), (9, 9, 160));
    let written: usize = got.iter().map(|c| c.usage.completion_tokens).sum();
    assert_eq!(last.completion_tokens, written);
}
