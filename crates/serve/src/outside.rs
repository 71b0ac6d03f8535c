//! What evals need from outside the server: other servers' models, and a place where programs can do no harm. The
//! binary brings both; without them, what needs them is refused by name.

use serde_json::Value;

/// Models behind other servers of the OpenAI API. Its methods block.
pub trait Providers: Send + Sync {
    /// Is this the name of a model of theirs?
    fn knows(&self, model: &str) -> bool;

    /// Answers a chat request's body, tried again where that may help; the error is for who asked.
    fn chat(&self, model: &str, body: &Value) -> Result<ProviderAnswer, String>;
}

/// What a provider answered.
#[derive(Debug, Clone, PartialEq)]
pub struct ProviderAnswer {
    /// The chat completion.
    pub body: Value,
    /// What it cost, if prices are known; nothing where the answer was remembered.
    pub cost_usd: Option<f64>,
    /// How long it took, when it was asked for.
    pub latency_ms: f64,
    /// Was it remembered?
    pub cached: bool,
}

/// Runs graders' programs where they reach nothing. Its methods block.
pub trait Sandbox: Send + Sync {
    /// Why there can be no such place here, if there cannot.
    fn refusal(&self) -> Option<String>;

    /// What `grade(sample, item)` of a Python program gives.
    fn grade(&self, source: &str, sample: &Value, item: &Value) -> Result<f64, SandboxError>;
}

/// Why a program gave no score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxError {
    /// The program failed, took too long, or gave no number.
    Program(String),
    /// It could not be run.
    Server(String),
}
