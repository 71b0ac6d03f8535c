//! Grammar masks: which tokens may come next, so that an answer is valid by construction.
//!
//! The parser is llguidance; what is ours is the token environment over [`Tokenizer`], the limits, and the rule
//! that nothing fails open. A specification that is not understood in full is refused when it is compiled; a
//! parser that gives up while generating returns an error for ever after. There is no path from a constraint
//! to an unconstrained answer.
//!
//! JSON is written without free whitespace: one optional space after `,` and `:`, none elsewhere. That covers
//! the two ways training data is written (`{"a":1}` and `{"a": 1}`) and leaves a small model no blank to loop on.

mod env;
mod known;
mod vet;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::{TextError, Tokenizer, ToolGrammar};
use known::{Known, State};

pub(crate) use vet::escape;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum ConstraintSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that satisfies this schema.
    JsonSchema(Value),
    /// Text that this regex matches from beginning to end (Rust syntax, no look-around).
    Regex(String),
    /// One of these texts, exactly.
    Labels(Vec<String>),
    /// Text of this grammar, in llguidance's variant of Lark.
    Lark(String),
    /// An answer that may call tools.
    Tools(Box<ToolGrammar>),
}

/// The tokens that may come next: one bit a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
    len: usize,
}

impl TokenMask {
    /// Bit `id % 32` of word `id / 32`. Ids past the end are not allowed.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// How many tokens the mask speaks of: the tokenizer's vocabulary.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is no token allowed? Never true of a mask that [`Constraint::allowed`] returns.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// May this token come next?
    pub fn allows(&self, id: u32) -> bool {
        let word = self.words.get(id as usize / 32).copied().unwrap_or(0);
        (id as usize) < self.len && word >> (id % 32) & 1 == 1
    }

    /// The allowed ids, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len as u32).filter(|id| self.allows(*id))
    }
}

/// Compiles constraints for one tokenizer. Cheap to clone.
#[derive(Clone)]
pub struct ConstraintEngine {
    tokenizer: Arc<Tokenizer>,
    end_tokens: Arc<[u32]>,
    /// What was compiled lately, the latest last.
    compiled: Arc<Mutex<Vec<(ConstraintSpec, Constraint)>>>,
    /// The trie of all tokens takes longer to build than an answer may take to begin, so it is
    /// built when the first constraint is compiled, or by [`ConstraintEngine::prepare`].
    factory: Arc<OnceLock<Result<ParserFactory, TextError>>>,
}

/// Compiled constraints that are kept: callers mostly ask for the same few.
const KEPT: usize = 32;

impl ConstraintEngine {
    /// An engine for answers that may end with `end_tokens` ([`Chat::end_tokens`](crate::Chat::end_tokens)).
    pub fn new(tokenizer: &Arc<Tokenizer>, end_tokens: &[u32]) -> Result<Self, TextError> {
        env::check_ends(tokenizer, end_tokens)?;
        Ok(ConstraintEngine {
            tokenizer: tokenizer.clone(),
            end_tokens: end_tokens.into(),
            factory: Arc::default(),
            compiled: Arc::default(),
        })
    }

    /// Builds what every constraint needs, unless it is there: the first compilation is then as fast as the others.
    pub fn prepare(&self) -> Result<(), TextError> {
        self.factory().map(drop)
    }

    fn factory(&self) -> Result<&ParserFactory, TextError> {
        let build = || {
            let env = env::token_env(&self.tokenizer, &self.end_tokens)?;
            let mut factory = ParserFactory::new_simple(&env)
                .map_err(|e| TextError::Constraint(one_line(&e.to_string())))?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(factory)
        };
        self.factory
            .get_or_init(build)
            .as_ref()
            .map_err(Clone::clone)
    }

    /// Compiles a specification, or says why it cannot be enforced. One that was compiled lately is copied.
    pub fn compile(&self, spec: &ConstraintSpec) -> Result<Constraint, TextError> {
        let kept = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = kept();
        if let Some(at) = found.iter().position(|(known, _)| known == spec) {
            let entry = found.remove(at);
            let constraint = entry.1.clone();
            found.push(entry);
            return Ok(constraint);
        }
        drop(found);
        let constraint = self.compile_anew(spec)?;
        let mut found = kept();
        if found.len() == KEPT {
            found.remove(0);
        }
        found.push((spec.clone(), constraint.clone()));
        Ok(constraint)
    }

    fn compile_anew(&self, spec: &ConstraintSpec) -> Result<Constraint, TextError> {
        let refuse = |message: String| TextError::Constraint(message);
        let grammars = match spec {
            ConstraintSpec::Tools(tools) => tools.grammars(&single)?,
            spec => vec![single(spec)?],
        };
        let factory = self.factory()?;
        // Compiling recurses with the grammar, so it gets a stack of its own.
        let parser = std::thread::scope(|scope| {
            let compile = || {
                let parser = factory.create_parser(TopLevelGrammar {
                    grammars,
                    max_tokens: None,
                });
                parser.map_err(|e| e.to_string())
            };
            let thread = std::thread::Builder::new()
                .name("constraint".into())
                .stack_size(COMPILE_STACK_BYTES);
            match thread.spawn_scoped(scope, compile) {
                Ok(handle) => handle
                    .join()
                    .unwrap_or_else(|_| Err("the grammar compiler gave up".into())),
                Err(e) => Err(e.to_string()),
            }
        })
        .map_err(|e| refuse(one_line(&e)))?;
        let mut matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(refuse(one_line(&error)));
        }
        if let Some(warning) = matcher.grammar_warnings().first() {
            return Err(refuse(format!(
                "it could not be enforced exactly: {}",
                one_line(warning)
            )));
        }
        let mut constraint = Constraint {
            origin: Arc::new(Mutex::new(matcher)),
            own: None,
            path: Vec::new(),
            n_consumed: 0,
            state: None,
            known: Arc::default(),
            vocab_size: self.tokenizer.vocab_size(),
            ended: false,
            end_tokens: self.end_tokens.clone(),
        };
        // A grammar without any first token is refused here rather than in the middle of an answer.
        constraint
            .allowed()
            .map_err(|e| refuse(one_line(&e.to_string())))?;
        Ok(constraint)
    }
}

impl std::fmt::Debug for ConstraintEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConstraintEngine")
            .field("vocab_size", &self.tokenizer.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Enough for the deepest grammar that [`vet`] lets through.
const COMPILE_STACK_BYTES: usize = 16 << 20;

/// Work and memory that one constraint may take. The fuels are per compilation or per token: well under a
/// second even when spent to the end.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// The grammar of a constraint that is not about tools.
fn single(spec: &ConstraintSpec) -> Result<GrammarWithLexer, TextError> {
    Ok(match spec {
        ConstraintSpec::JsonObject => json_grammar(json!({"type": "object"}))?,
        ConstraintSpec::JsonSchema(schema) => {
            vet::schema(schema)?;
            json_grammar(schema.clone())?
        }
        ConstraintSpec::Regex(regex) => {
            vet::regex(regex)?;
            GrammarWithLexer::from_regex(regex)
        }
        ConstraintSpec::Labels(labels) => GrammarWithLexer::from_regex(&vet::labels(labels)?),
        ConstraintSpec::Lark(grammar) => {
            vet::lark(grammar)?;
            GrammarWithLexer::from_lark(grammar.clone())
        }
        ConstraintSpec::Tools(_) => {
            return Err(TextError::Constraint(
                "a grammar of tools cannot be part of another".into(),
            ));
        }
    })
}

fn json_grammar(schema: Value) -> Result<GrammarWithLexer, TextError> {
    // Options ride inside the schema; a boolean schema has no inside.
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other,
    };
    let options = JsonCompileOptions {
        item_separator: ", ?".into(),
        key_separator: ": ?".into(),
        whitespace_flexible: false,
        ..JsonCompileOptions::default()
    };
    if !schema.is_object() {
        return Err(TextError::Constraint("a schema must be an object".into()));
    }
    options.apply_to(&mut schema);
    Ok(GrammarWithLexer::from_json_schema(schema))
}

/// The first line, without a trailing period.
fn one_line(message: &str) -> String {
    let line = message
        .lines()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("unknown error");
    line.trim()
        .trim_end_matches('.')
        .chars()
        .take(300)
        .collect()
}

/// One answer's progress through its constraint. A clone goes its own way.
///
/// Clones share what they find out about the grammar's states, and each has a parser of its own only from
/// where it goes a way that none went before: answers to the same question take most states from there.
pub struct Constraint {
    /// The parser at the beginning.
    origin: Arc<Mutex<Matcher>>,
    /// The parser after the first `n_consumed` tokens of `path`.
    own: Option<Box<Matcher>>,
    n_consumed: usize,
    path: Vec<u32>,
    /// The present state, where it is known.
    state: Option<Arc<State>>,
    known: Arc<Known>,
    vocab_size: usize,
    ended: bool,
    end_tokens: Arc<[u32]>,
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Constraint {
            origin: self.origin.clone(),
            // With lexer tables of its own: limits must not depend on what other answers did.
            own: self.own.as_ref().map(|own| Box::new(own.deep_clone())),
            n_consumed: self.n_consumed,
            path: self.path.clone(),
            state: self.state.clone(),
            known: self.known.clone(),
            vocab_size: self.vocab_size,
            ended: self.ended,
            end_tokens: self.end_tokens.clone(),
        }
    }
}

impl Constraint {
    /// The tokens that may come next, end tokens included where the answer is complete. Never empty; an
    /// error is final.
    pub fn allowed(&mut self) -> Result<&TokenMask, TextError> {
        if self.ended {
            return Err(TextError::ConstraintFailed("the answer has ended".into()));
        }
        let state = match self.state.take() {
            Some(state) => state,
            None => match self.known.get(&self.path) {
                Some(state) => state,
                None => self.work_out()?,
            },
        };
        Ok(&self.state.insert(state).mask)
    }

    /// Takes the token that was chosen; one that is not allowed is an error.
    pub fn commit(&mut self, token: u32) -> Result<(), TextError> {
        if !self.allowed()?.allows(token) {
            return Err(TextError::ConstraintFailed(format!(
                "token {token} is not allowed here"
            )));
        }
        if self.end_tokens.contains(&token) {
            self.ended = true;
            return Ok(());
        }
        self.path.push(token);
        self.state = self.known.get(&self.path);
        if self.state.is_none() {
            let matcher = self.matcher()?;
            if matcher.is_stopped() {
                let state = self.work_out()?;
                self.state = Some(state);
            }
        }
        Ok(())
    }

    /// The tokens that must come next whatever the model thinks, if there are any: they need no sampling, and
    /// can be fed to the model in one pass. Each is still to be committed.
    pub fn forced(&mut self) -> Vec<u32> {
        if self.is_done() {
            return Vec::new();
        }
        match self.matcher() {
            Ok(matcher) => matcher.compute_ff_tokens(),
            Err(_) => Vec::new(),
        }
    }

    /// How many of these tokens, one after the other, the grammar could take from here. It does not look at how
    /// forced text is cut into tokens, so [`Self::commit`] may take fewer.
    pub fn n_possible(&mut self, tokens: &[u32]) -> usize {
        if self.is_done() || tokens.is_empty() {
            return 0;
        }
        let known = tokens
            .iter()
            .take_while(|&&t| (t as usize) < self.vocab_size);
        let known = known.count();
        match self.matcher() {
            Ok(matcher) => matcher.validate_tokens(&tokens[..known]).unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Is the answer complete, with nothing but an end token to follow (or one already given)?
    pub fn is_done(&self) -> bool {
        self.ended || self.state.as_ref().is_some_and(|state| state.is_done)
    }

    /// The parser, taken to where the answer is. It must not be at its end.
    fn matcher(&mut self) -> Result<&mut Matcher, TextError> {
        let own = self.own.get_or_insert_with(|| {
            let origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
            Box::new(origin.deep_clone())
        });
        for &token in &self.path[self.n_consumed..] {
            own.consume_token(token).map_err(failed)?;
            self.n_consumed += 1;
        }
        if !own.stop_reason().is_ok() {
            return Err(TextError::ConstraintFailed(own.stop_reason().to_string()));
        }
        Ok(own)
    }

    /// Asks the parser for the present state, and leaves it to the other clones.
    fn work_out(&mut self) -> Result<Arc<State>, TextError> {
        let len = self.vocab_size;
        let matcher = self.matcher()?;
        let words = matcher.compute_mask_or_eos().map_err(failed)?;
        if !matcher.stop_reason().is_ok() {
            let reason = matcher.stop_reason().to_string();
            return Err(TextError::ConstraintFailed(reason));
        }
        let is_done = matcher.is_stopped();
        let mut words: Vec<u32> = words.into();
        // Exactly as many words as the vocabulary needs, so that nobody reads padding as tokens.
        words.resize(len.div_ceil(32), 0);
        let mask = TokenMask { words, len };
        if mask.is_empty() {
            return Err(TextError::ConstraintFailed("no token can follow".into()));
        }
        let state = Arc::new(State { mask, is_done });
        self.known.insert(&self.path, &state);
        Ok(state)
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("done", &self.is_done())
            .finish_non_exhaustive()
    }
}

fn failed(error: impl std::fmt::Display) -> TextError {
    TextError::ConstraintFailed(one_line(&error.to_string()))
}
