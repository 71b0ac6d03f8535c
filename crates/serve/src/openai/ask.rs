//! What is to be generated, whichever endpoint asked, and the requests to the engine that it comes to.

use bantam_engine::{BoxedConstraint, Request, Sampling};
use bantam_text::{ConstraintSpec, Message, ToolGrammar};

use super::format::Wanted;
use super::tools::ToolUse;
use crate::error::ApiError;
use crate::ids;
use crate::models::Model;

/// A conversation to be answered.
pub(crate) struct Ask {
    pub(crate) messages: Vec<Message>,
    /// Absent if nothing may be called.
    pub(crate) tools: Option<ToolUse>,
    pub(crate) n: usize,
    pub(crate) stop: Vec<String>,
    /// The rest of the context, if absent.
    pub(crate) max_tokens: Option<usize>,
    /// The model's default, if absent.
    pub(crate) temperature: Option<f32>,
    /// All but the temperature and, if `seed` is absent, the seed.
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<i64>,
    /// How many alternatives to report; `None` for no log-probabilities.
    pub(crate) logprobs: Option<usize>,
    pub(crate) wanted: Option<Wanted>,
    /// Text that the answer is expected to repeat: it may only save time.
    pub(crate) prediction: Option<String>,
}

/// Requests to the engine, one a choice.
pub(crate) struct Job {
    pub(crate) requests: Vec<Request>,
    /// By which calls are read out of the answers.
    pub(crate) grammar: Option<ToolGrammar>,
    pub(crate) with_logprobs: bool,
}

impl Ask {
    /// Renders the prompt, compiles the constraint, and makes one request for each choice. Templates and schemas
    /// are programs: this is to run where it delays no other connection.
    pub(crate) fn prepare(self, model: &Model) -> Result<Job, ApiError> {
        let names = self.messages.iter().position(|m| m.name.is_some());
        if let Some(idx) = names.filter(|_| !model.chat.template().source().contains("name")) {
            let message = "this model's chat template has no place for a speaker's `name`";
            return Err(ApiError::unsupported(
                format!("messages[{idx}].name"),
                message,
            ));
        }
        let (functions, customs) = match &self.tools {
            Some(tools) => (&*tools.shown.functions, &*tools.shown.customs),
            None => (&[][..], &[][..]),
        };
        let prompt = model.chat.prompt_with(&self.messages, functions, customs);
        let prompt = prompt.map_err(|e| ApiError::invalid("messages", e.to_string()))?;
        let (constraint, grammar) = constraint(model, self.tools.as_ref(), self.wanted)?;
        if constraint.is_some() && grammar.is_none() && !self.stop.is_empty() {
            let message = "`stop` would cut an answer that must be whole to be of its format";
            return Err(ApiError::invalid("stop", message));
        }
        let vocab = model.worker.info.vocab;
        check_biases(&self.sampling, vocab)?;
        // Without a limit the answer may take what the prompt leaves; at least one token, so that a prompt that
        // leaves nothing is refused with its numbers.
        let room = model.worker.info.max_context;
        let room = room.saturating_sub(prompt.len()).max(1);
        let mut sampling = self.sampling;
        sampling.temperature = self.temperature.unwrap_or(model.default_temperature);
        let one = Request {
            prompt,
            max_tokens: self.max_tokens.unwrap_or(room),
            sampling,
            stop: self.stop,
            end_tokens: model.chat.end_tokens().to_vec(),
            constraint,
            logprobs: self.logprobs,
            prediction: self.prediction.as_ref().map(|text| {
                let tokenizer = model.chat.tokenizer();
                tokenizer.encode_plain(text)
            }),
            ..Request::default()
        };
        Ok(Job {
            requests: choices(one, self.n, self.seed),
            grammar,
            with_logprobs: self.logprobs.is_some(),
        })
    }
}

/// The same request `n` times, each with a seed of its own.
pub(crate) fn choices(one: Request, n: usize, seed: Option<i64>) -> Vec<Request> {
    let seed = seed.map_or_else(ids::random_u64, |seed| seed as u64);
    (0..n as u64)
        .map(|choice| {
            let mut request = one.clone();
            request.sampling.seed = ids::choice_seed(seed, choice);
            request
        })
        .collect()
}

pub(crate) fn check_biases(sampling: &Sampling, vocab: usize) -> Result<(), ApiError> {
    let unknown = (sampling.logit_bias.iter()).find(|b| b.0 as usize >= vocab);
    match unknown {
        Some((token, _)) => {
            let message = format!("token {token} is not in the vocabulary of {vocab} tokens");
            Err(ApiError::invalid("logit_bias", message))
        }
        None => Ok(()),
    }
}

fn constraint(
    model: &Model,
    tools: Option<&ToolUse>,
    wanted: Option<Wanted>,
) -> Result<(Option<BoxedConstraint>, Option<ToolGrammar>), ApiError> {
    let compile = |spec: &ConstraintSpec| model.constraints.compile(spec);
    let Some(tools) = tools else {
        let Some((param, spec)) = wanted else {
            return Ok((None, None));
        };
        let compiled = compile(&spec).map_err(|e| ApiError::constraint(&param, e.to_string()))?;
        return Ok((Some(compiled.into()), None));
    };
    if let Some((param, spec)) = &wanted {
        // Alone first, so that an error names the right field.
        compile(spec).map_err(|e| ApiError::constraint(param, e.to_string()))?;
    }
    let grammar = tools.grammar(&model.chat, wanted.map(|(_, spec)| spec));
    let compiles =
        |grammar: &ToolGrammar| compile(&ConstraintSpec::Tools(Box::new(grammar.clone()))).is_ok();
    match compile(&ConstraintSpec::Tools(Box::new(grammar.clone()))) {
        Ok(compiled) => Ok((Some(compiled.into()), Some(grammar))),
        Err(error) => {
            let param = tools.culprit(compiles, &grammar);
            Err(ApiError::constraint(&param, error.to_string()))
        }
    }
}
