//! What a job is asked to be.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::ids;
use crate::openai::fields::Fields;
use crate::training::TrainingMethod;

/// The longest suffix.
const SUFFIX_MAX: usize = 64;

/// A job that was asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) validation_file: Option<String>,
    pub(super) suffix: Option<String>,
    pub(super) metadata: Map<String, Value>,
    seed: u64,
    kind: Kind,
    hyper: Hyper,
}

/// What `method.type` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Supervised,
    Dpo,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Supervised => "supervised",
            Kind::Dpo => "dpo",
        }
    }
}

/// Hyper-parameters; none where it is `auto`.
#[derive(Debug, Default)]
struct Hyper {
    /// Of `dpo` alone.
    beta: Option<f64>,
    epochs: Option<usize>,
    batch_rows: Option<usize>,
    lr_multiplier: Option<f64>,
}

impl Hyper {
    fn read(mut fields: Fields, kind: Kind) -> Result<Self, ApiError> {
        let hyper = Self {
            beta: match kind {
                Kind::Supervised => None,
                Kind::Dpo => positive(&mut fields, "beta", 2.0)?,
            },
            epochs: whole(&mut fields, "n_epochs", 50)?,
            batch_rows: whole(&mut fields, "batch_size", 256)?,
            lr_multiplier: positive(&mut fields, "learning_rate_multiplier", 100.0)?,
        };
        fields.finish(&[])?;
        Ok(hyper)
    }

    fn body(&self, kind: Kind) -> Value {
        let or_auto = |n: Option<usize>| n.map_or(json!("auto"), |n| json!(n));
        let number = |n: Option<f64>| n.map_or(json!("auto"), |n| json!(n));
        let mut body = json!({
            "n_epochs": or_auto(self.epochs),
            "batch_size": or_auto(self.batch_rows),
            "learning_rate_multiplier": number(self.lr_multiplier),
        });
        if kind == Kind::Dpo {
            body["beta"] = number(self.beta);
        }
        body
    }
}

/// `auto` or a number above 0, up to `max`.
fn positive(fields: &mut Fields, name: &str, max: f64) -> Result<Option<f64>, ApiError> {
    match fields.take::<Value>(name)? {
        None => Ok(None),
        Some(Value::String(word)) if word == "auto" => Ok(None),
        Some(value) => {
            let number = value.as_f64().filter(|n| *n > 0.0 && *n <= max);
            let path = fields.path(name);
            let message = format!("`{path}` must be `auto` or a number above 0 and at most {max}");
            Ok(Some(
                number.ok_or_else(|| ApiError::invalid(path, message))?,
            ))
        }
    }
}

/// `auto` or a whole number from 1 to `max`.
fn whole(fields: &mut Fields, name: &str, max: u64) -> Result<Option<usize>, ApiError> {
    match fields.take::<Value>(name)? {
        None => Ok(None),
        Some(Value::String(word)) if word == "auto" => Ok(None),
        Some(value) => {
            let number = value.as_u64().filter(|n| (1..=max).contains(n));
            let path = fields.path(name);
            let message = format!("`{path}` must be `auto` or a whole number from 1 to {max}");
            let number = number.ok_or_else(|| ApiError::invalid(path, message))?;
            Ok(Some(number as usize))
        }
    }
}

/// Reads the body of a request.
pub(super) fn read(body: &[u8]) -> Result<Asked, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let top = fields
        .object("hyperparameters")?
        .map(|fields| Hyper::read(fields, Kind::Supervised))
        .transpose()?;
    let (kind, nested) = match fields.object("method")? {
        None => (Kind::default(), None),
        Some(method) => read_method(method)?,
    };
    if top.is_some() && nested.is_some() {
        let message =
            "give the hyper-parameters in `method` alone; `hyperparameters` is its older spelling";
        return Err(ApiError::invalid("hyperparameters", message));
    }
    if top.is_some() && kind != Kind::Supervised {
        let message = format!(
            "give the hyper-parameters in `method.{}`; `hyperparameters` is of supervised jobs",
            kind.name()
        );
        return Err(ApiError::invalid("hyperparameters", message));
    }
    let suffix: Option<String> = fields.take("suffix")?;
    if let Some(suffix) = &suffix {
        let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if suffix.is_empty() || suffix.len() > SUFFIX_MAX || !suffix.chars().all(is_fine) {
            let message = format!(
                "`suffix` must have 1 to {SUFFIX_MAX} characters: letters, digits, `-`, `_` and `.`"
            );
            return Err(ApiError::invalid("suffix", message));
        }
    }
    if let Some(integrations) = fields.items("integrations")?
        && !integrations.is_empty()
    {
        let message = "`integrations` are not offered: a job's metrics are its events, and its result file is a CSV";
        return Err(ApiError::unsupported("integrations", message));
    }
    let seed = fields.take::<i64>("seed")?;
    let asked = Asked {
        model: fields.need("model")?,
        training_file: fields.need("training_file")?,
        validation_file: fields.take("validation_file")?,
        suffix,
        metadata: fields.metadata()?.unwrap_or_default(),
        // Shown with the job, so that it can be repeated. JavaScript holds 53 bits.
        seed: seed.map_or_else(|| ids::random_u64() >> 33, |seed| seed as u64),
        kind,
        hyper: nested.or(top).unwrap_or_default(),
    };
    fields.finish(&[])?;
    Ok(asked)
}

fn read_method(mut method: Fields) -> Result<(Kind, Option<Hyper>), ApiError> {
    let word: String = method.need("type")?;
    let kind = match word.as_str() {
        "supervised" => Kind::Supervised,
        "dpo" => Kind::Dpo,
        other => {
            let message = if other == "reinforcement" {
                "`reinforcement` is not offered; `method.type` can be `supervised` or `dpo`"
            } else {
                "`method.type` must be `supervised` or `dpo`"
            };
            return Err(ApiError::unsupported("method.type", message));
        }
    };
    let hyper = match method.object(kind.name())? {
        None => None,
        Some(mut own) => {
            let hyper = own.object("hyperparameters")?;
            own.finish(&[])?;
            hyper.map(|fields| Hyper::read(fields, kind)).transpose()?
        }
    };
    method.finish(&[])?;
    Ok((kind, hyper))
}

/// How the rows of a kept job are learnt.
pub(super) fn method_of(job: &Value) -> TrainingMethod {
    if job["method"]["type"] == "dpo" {
        TrainingMethod::Dpo {
            beta: job["method"]["dpo"]["hyperparameters"]["beta"].as_f64(),
        }
    } else {
        TrainingMethod::Supervised
    }
}

impl Asked {
    /// The job as the API shows it.
    pub(super) fn body(&self, id: &str, created: u64) -> Value {
        let kind = self.kind.name();
        let mut hyper = self.hyper.body(self.kind);
        let method = json!({"type": kind, kind: {"hyperparameters": hyper}});
        // What every method has stands beside it, too.
        if let Some(hyper) = hyper.as_object_mut() {
            hyper.remove("beta");
        }
        json!({
            "id": id, "object": "fine_tuning.job", "created_at": created, "finished_at": null,
            "model": self.model, "fine_tuned_model": null, "organization_id": "bantam",
            "status": "validating_files", "hyperparameters": hyper,
            "method": method,
            "seed": self.seed, "training_file": self.training_file,
            "validation_file": self.validation_file, "result_files": [], "trained_tokens": null,
            "error": null, "estimated_finish": null, "integrations": [],
            "metadata": self.metadata,
        })
    }
}
