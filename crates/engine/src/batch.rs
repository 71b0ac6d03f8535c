//! Many requests at once, their answers in the order of the requests: for evaluation.

use std::collections::{HashMap, VecDeque};

use crate::{
    Engine, Event, Finish, LanguageModel, Request, RequestError, Timings, TokenLogprobs, Usage,
};

/// One request's whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Its text.
    pub text: String,
    /// Its tokens, without the end token and those of a stop string.
    pub tokens: Vec<u32>,
    /// One for each token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended; a request that was refused has [`RequestError::Refused`].
    pub finish: Finish,
    /// Tokens read and written.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// How far a batch has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests that have ended.
    pub done: usize,
    /// All requests.
    pub total: usize,
    /// Tokens of the prompts of those that have ended.
    pub prompt_tokens: usize,
    /// Tokens generated so far, by running requests too.
    pub completion_tokens: usize,
}

/// Answers all requests; the answers come in the order of the requests. A request that fails or
/// is refused does not disturb the others. `progress` is called after every step.
///
/// The engine should be idle: events of requests that are not part of the batch are dropped.
pub fn generate_all<M: LanguageModel>(
    engine: &mut Engine<M>,
    requests: Vec<Request>,
    progress: &mut dyn FnMut(&Progress),
) -> Vec<Completion> {
    let mut so_far = Progress {
        total: requests.len(),
        ..Progress::default()
    };
    let mut answers: Vec<Completion> = requests.iter().map(|_| unanswered()).collect();
    let mut waiting: VecDeque<(usize, Request)> = requests.into_iter().enumerate().collect();
    let mut running = HashMap::new();
    while so_far.done < so_far.total {
        while engine.queue_room() > 0 {
            let Some((idx, request)) = waiting.pop_front() else {
                break;
            };
            match engine.submit(request) {
                Ok(id) => {
                    running.insert(id, idx);
                }
                Err(error) => {
                    answers[idx].finish = Finish::Error(RequestError::Refused(error));
                    so_far.done += 1;
                }
            }
        }
        engine.step(&mut |id, event| {
            let Some(&idx) = running.get(&id) else { return };
            let answer = &mut answers[idx];
            match event {
                Event::Token(token) => {
                    answer.text.push_str(&token.text_delta);
                    answer.tokens.push(token.id);
                    answer.logprobs.extend(token.logprobs);
                    so_far.completion_tokens += 1;
                }
                Event::Done {
                    finish,
                    usage,
                    timings,
                } => {
                    so_far.completion_tokens += usage.completion_tokens - answer.tokens.len();
                    so_far.prompt_tokens += usage.prompt_tokens;
                    so_far.done += 1;
                    (answer.finish, answer.usage, answer.timings) = (finish, usage, timings);
                }
            }
        });
        progress(&so_far);
    }
    answers
}

fn unanswered() -> Completion {
    Completion {
        text: String::new(),
        tokens: Vec::new(),
        logprobs: Vec::new(),
        finish: Finish::Cancelled,
        usage: Usage::default(),
        timings: Timings::default(),
    }
}
