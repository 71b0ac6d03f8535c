//! Graders as requests describe them: read, checked as far as that goes without a row, and told again.

use bantam_judge::expression::Expression;
use bantam_judge::grader::{Operation, Python, Similarity, StringCheck, TextSimilarity};
use bantam_judge::template::{Path, Root, Template};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::fields::{self, Fields};

/// The most graders of an eval, and of a `multi` grader.
const GRADERS_MAX: usize = 50;
/// The longest program, in bytes.
const SOURCE_MAX: usize = 256 << 10;
/// The most labels of a grader.
const LABELS_MAX: usize = 255;

/// A grader that can be run.
pub(crate) struct Criterion {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) grader: Grader,
    /// The least score that passes.
    pub(crate) threshold: f64,
    /// As it is shown.
    pub(crate) shown: Value,
}

/// What a grader does.
pub(crate) enum Grader {
    StringCheck {
        input: Template,
        reference: Template,
        operation: Operation,
    },
    TextSimilarity {
        input: Template,
        reference: Template,
        metric: Similarity,
        model: Option<String>,
    },
    ScoreModel {
        model: String,
        input: Vec<MessageTemplate>,
        range: [f64; 2],
        sampling: Map<String, Value>,
    },
    LabelModel {
        model: String,
        input: Vec<MessageTemplate>,
        labels: Vec<String>,
        passing: Vec<String>,
    },
    Python {
        source: String,
    },
    Multi {
        graders: Vec<(String, Criterion)>,
        output: Expression,
    },
}

/// A message with places for values.
pub(crate) struct MessageTemplate {
    pub(crate) role: String,
    pub(crate) text: Template,
}

/// Where a grader stands: an eval's graders say what passes, those of the graders' endpoints need not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Eval,
    Alone,
}

/// Reads the criteria of an eval.
pub(crate) fn criteria(items: Vec<(String, Value)>) -> Result<Vec<Criterion>, ApiError> {
    if items.is_empty() || items.len() > GRADERS_MAX {
        let message = format!("`testing_criteria` must be 1 to {GRADERS_MAX} graders");
        return Err(ApiError::invalid("testing_criteria", message));
    }
    let mut all: Vec<Criterion> = Vec::with_capacity(items.len());
    for (path, item) in items {
        let one = criterion(&path, item, Use::Eval)?;
        if all.iter().any(|other| other.name == one.name) {
            let message = format!(
                "the name `{}` is there twice: results are told by name",
                one.name
            );
            return Err(ApiError::invalid(format!("{path}.name"), message));
        }
        all.push(one);
    }
    Ok(all)
}

/// Reads a grader.
pub(crate) fn criterion(path: &str, value: Value, place: Use) -> Result<Criterion, ApiError> {
    read(path, value, place, true)
}

fn read(path: &str, value: Value, place: Use, may_nest: bool) -> Result<Criterion, ApiError> {
    let shown = value.clone();
    let mut fields = Fields::of(path, value)?;
    let kind: String = fields.need("type")?;
    let (kind, grader, threshold) = match kind.as_str() {
        "string_check" => string_check(fields)?,
        "text_similarity" => text_similarity(fields, place)?,
        "score_model" => score_model(fields)?,
        "label_model" => label_model(fields)?,
        "python" => python(fields)?,
        "multi" if may_nest => multi(fields)?,
        "multi" => {
            let message = "a `multi` grader does not stand in another";
            return Err(ApiError::invalid(format!("{path}.type"), message));
        }
        _ => {
            let message = format!(
                "`{path}.type` must be `string_check`, `text_similarity`, `score_model`, `label_model`, `python` or `multi`"
            );
            return Err(ApiError::invalid(format!("{path}.type"), message));
        }
    };
    let name = shown["name"].as_str().unwrap_or_default().to_string();
    if name.is_empty() {
        return Err(ApiError::missing(&format!("{path}.name")));
    }
    Ok(Criterion {
        name,
        kind,
        grader,
        threshold,
        shown,
    })
}

type Read = (&'static str, Grader, f64);

/// A template, with what is wrong told at its place.
fn template(path: String, text: &str) -> Result<Template, ApiError> {
    Template::parse(text).map_err(|e| ApiError::invalid(&*path, format!("`{path}`: {e}")))
}

fn string_check(fields: Fields) -> Result<Read, ApiError> {
    let (input, reference) = (fields.path("input"), fields.path("reference"));
    let check: StringCheck = fields.rest()?;
    let grader = Grader::StringCheck {
        input: template(input, &check.input)?,
        reference: template(reference, &check.reference)?,
        operation: check.operation,
    };
    Ok(("string_check", grader, 1.0))
}

fn text_similarity(fields: Fields, place: Use) -> Result<Read, ApiError> {
    let (input, reference) = (fields.path("input"), fields.path("reference"));
    let threshold = fields.path("pass_threshold");
    let check: TextSimilarity = fields.rest()?;
    if place == Use::Eval && check.pass_threshold.is_none() {
        return Err(ApiError::missing(&threshold));
    }
    let grader = Grader::TextSimilarity {
        input: template(input, &check.input)?,
        reference: template(reference, &check.reference)?,
        metric: check.evaluation_metric,
        model: check.model,
    };
    Ok((
        "text_similarity",
        grader,
        check.pass_threshold.unwrap_or(0.5),
    ))
}

fn score_model(mut fields: Fields) -> Result<Read, ApiError> {
    fields.need::<String>("name")?;
    let range_path = fields.path("range");
    let range = match fields.take::<Vec<f64>>("range")?.as_deref() {
        None => [0.0, 1.0],
        Some([low, high]) if low < high => [*low, *high],
        Some(_) => {
            let message = format!("`{range_path}` must be two numbers, the lesser first");
            return Err(ApiError::invalid(range_path, message));
        }
    };
    let mut sampling = Map::new();
    if let Some(mut params) = fields.object("sampling_params")? {
        // OpenAI's own spelling, beside the one of its other endpoints.
        for (name, known) in [
            ("temperature", "temperature"),
            ("top_p", "top_p"),
            ("seed", "seed"),
            ("max_completions_tokens", "max_completion_tokens"),
            ("max_completion_tokens", "max_completion_tokens"),
            ("reasoning_effort", "reasoning_effort"),
        ] {
            if let Some(value) = params.take::<Value>(name)? {
                sampling.insert(known.to_string(), value);
            }
        }
        params.finish(&[])?;
    }
    let grader = Grader::ScoreModel {
        model: fields.need("model")?,
        input: messages(&mut fields, "input")?,
        range,
        sampling,
    };
    let threshold: Option<f64> = fields.take("pass_threshold")?;
    fields.finish(&[])?;
    // Where nothing is said, the upper half of the range passes.
    let threshold = threshold.unwrap_or((range[0] + range[1]) / 2.0);
    Ok(("score_model", grader, threshold))
}

fn label_model(mut fields: Fields) -> Result<Read, ApiError> {
    fields.need::<String>("name")?;
    let labels: Vec<String> = fields.need("labels")?;
    let passing: Vec<String> = fields.need("passing_labels")?;
    let unique: std::collections::HashSet<&String> = labels.iter().collect();
    if labels.len() < 2 || labels.len() > LABELS_MAX || unique.len() < labels.len() {
        let path = fields.path("labels");
        let message = format!("`{path}` must be 2 to {LABELS_MAX} labels that differ");
        return Err(ApiError::invalid(path, message));
    }
    if let Some(stray) = passing.iter().find(|label| !labels.contains(label)) {
        let path = fields.path("passing_labels");
        let message = format!("`{path}`: `{stray:.80}` is not one of `labels`");
        return Err(ApiError::invalid(path, message));
    }
    let grader = Grader::LabelModel {
        model: fields.need("model")?,
        input: messages(&mut fields, "input")?,
        labels,
        passing,
    };
    fields.finish(&[])?;
    Ok(("label_model", grader, 1.0))
}

fn python(fields: Fields) -> Result<Read, ApiError> {
    let path = fields.path("source");
    let python: Python = fields.rest()?;
    if python.source.len() > SOURCE_MAX {
        let message = format!("`{path}` must be at most {SOURCE_MAX} bytes");
        return Err(ApiError::invalid(path, message));
    }
    if !python.source.contains("def grade") {
        let message = format!("`{path}` must define a function `grade(sample, item)`");
        return Err(ApiError::invalid(path, message));
    }
    let threshold = python.pass_threshold.unwrap_or(0.5);
    Ok((
        "python",
        Grader::Python {
            source: python.source,
        },
        threshold,
    ))
}

fn multi(mut fields: Fields) -> Result<Read, ApiError> {
    fields.need::<String>("name")?;
    let path = fields.path("graders");
    let named: Vec<(String, String, Value)> = match fields.need::<Value>("graders")? {
        // One grader alone stands for a list of one.
        Value::Object(map) if map.get("type").is_some_and(Value::is_string) => {
            let name = map.get("name").and_then(Value::as_str).unwrap_or_default();
            vec![(path.clone(), name.to_string(), Value::Object(map))]
        }
        Value::Object(map) => map
            .into_iter()
            .map(|(name, value)| (format!("{path}.{name}"), name, value))
            .collect(),
        Value::Array(items) => items
            .into_iter()
            .enumerate()
            .map(|(i, value)| {
                let name = value["name"].as_str().unwrap_or_default().to_string();
                (format!("{path}[{i}]"), name, value)
            })
            .collect(),
        _ => {
            let message = format!("`{path}` must be an object of graders by name");
            return Err(ApiError::invalid(path, message));
        }
    };
    if named.is_empty() || named.len() > GRADERS_MAX {
        let message = format!("`{path}` must be 1 to {GRADERS_MAX} graders");
        return Err(ApiError::invalid(path, message));
    }
    let mut graders: Vec<(String, Criterion)> = Vec::new();
    for (path, name, value) in named {
        let inner = read(&path, value, Use::Alone, false)?;
        if graders.iter().any(|(other, _)| *other == name) {
            let message = format!("`{path}`: the name `{name:.80}` is there twice");
            return Err(ApiError::invalid(path, message));
        }
        graders.push((name, inner));
    }
    let path = fields.path("calculate_output");
    let formula: String = fields.need("calculate_output")?;
    let wrong = |why: String| ApiError::invalid(&*path, format!("`{path}`: {why}"));
    let output = Expression::parse(&formula).map_err(|e| wrong(e.to_string()))?;
    for name in output.names() {
        if !graders.iter().any(|(known, _)| known == name) {
            let known: Vec<&str> = graders.iter().map(|(name, _)| name.as_str()).collect();
            let known = known.join(", ");
            return Err(wrong(format!(
                "`{name}` is not the name of a grader; there are {known}"
            )));
        }
    }
    let threshold: Option<f64> = fields.take("pass_threshold")?;
    fields.finish(&[])?;
    Ok((
        "multi",
        Grader::Multi { graders, output },
        threshold.unwrap_or(0.5),
    ))
}

/// Messages with places for values.
pub(crate) fn messages(fields: &mut Fields, name: &str) -> Result<Vec<MessageTemplate>, ApiError> {
    let path = fields.path(name);
    let items = fields.items(name)?;
    let items = items.filter(|items| !items.is_empty()).ok_or_else(|| {
        let message = format!("`{path}` must be an array of messages");
        ApiError::invalid(&*path, message)
    })?;
    let read = |(path, item): (String, Value)| {
        let mut message = Fields::of(path, item)?;
        let role: String = message.need("role")?;
        if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
            let path = message.path("role");
            let message = format!("`{path}` must be `user`, `assistant`, `system` or `developer`");
            return Err(ApiError::invalid(path, message));
        }
        if let Some(kind) = message.take::<String>("type")?
            && kind != "message"
        {
            let path = message.path("type");
            return Err(ApiError::invalid(
                path.clone(),
                format!("`{path}` must be `message`"),
            ));
        }
        let path = message.path("content");
        let mut text = String::new();
        contents(&path, message.need("content")?, &mut text)?;
        message.finish(&[])?;
        Ok(MessageTemplate {
            role,
            text: template(path, &text)?,
        })
    };
    items.into_iter().map(read).collect()
}

/// The text of a message's content, whichever way it is written.
fn contents(path: &str, value: Value, text: &mut String) -> Result<(), ApiError> {
    match value {
        Value::String(part) => text.push_str(&part),
        Value::Array(parts) => {
            for (i, part) in parts.into_iter().enumerate() {
                contents(&format!("{path}[{i}]"), part, text)?;
            }
        }
        part => {
            let mut part = Fields::of(path, part)?;
            let kind: String = part.need("type")?;
            if !["input_text", "output_text", "text"].contains(&kind.as_str()) {
                let path = part.path("type");
                let message = format!("`{path}`: models here read text, not `{kind:.40}`");
                return Err(ApiError::unsupported(path, message));
            }
            text.push_str(&part.need::<String>("text")?);
            part.finish(&[])?;
        }
    }
    Ok(())
}

impl Criterion {
    /// Every place for a value, in the grader and in those inside it.
    pub(crate) fn places(&self) -> Vec<&Path> {
        match &self.grader {
            Grader::StringCheck {
                input, reference, ..
            }
            | Grader::TextSimilarity {
                input, reference, ..
            } => input.places().chain(reference.places()).collect(),
            Grader::ScoreModel { input, .. } | Grader::LabelModel { input, .. } => {
                input.iter().flat_map(|m| m.text.places()).collect()
            }
            Grader::Python { .. } => Vec::new(),
            Grader::Multi { graders, .. } => {
                graders.iter().flat_map(|(_, one)| one.places()).collect()
            }
        }
    }

    /// The models that it asks.
    pub(crate) fn models(&self) -> Vec<&str> {
        match &self.grader {
            Grader::ScoreModel { model, .. } | Grader::LabelModel { model, .. } => vec![model],
            Grader::Multi { graders, .. } => {
                graders.iter().flat_map(|(_, one)| one.models()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Does it, or one inside it, run a program?
    pub(crate) fn runs_programs(&self) -> bool {
        match &self.grader {
            Grader::Python { .. } => true,
            Grader::Multi { graders, .. } => graders.iter().any(|(_, one)| one.runs_programs()),
            _ => false,
        }
    }

    /// The embedding model whose vectors it compares, if it compares vectors; inside, the name if one was given.
    pub(crate) fn embedder(&self) -> Option<Option<&str>> {
        match &self.grader {
            Grader::TextSimilarity {
                metric: Similarity::Cosine,
                model,
                ..
            } => Some(model.as_deref()),
            Grader::Multi { graders, .. } => graders.iter().find_map(|(_, one)| one.embedder()),
            _ => None,
        }
    }
}

/// Refuses a grader that reads what no row of the eval will have.
pub(crate) fn check_places(
    criteria: &[Criterion],
    schema: Option<&Value>,
    has_sample: bool,
) -> Result<(), ApiError> {
    for (i, criterion) in criteria.iter().enumerate() {
        for place in criterion.places() {
            let param = format!("testing_criteria[{i}]");
            if place.root == Root::Sample && !has_sample {
                let message = format!(
                    "`{}` reads `{place}`, and there will be none: set `data_source_config.include_sample_schema`",
                    criterion.name
                );
                return Err(ApiError::invalid(param, message));
            }
            let known = schema.and_then(|schema| schema["properties"].as_object());
            let closed = schema.is_some_and(|schema| schema["additionalProperties"] == false);
            if let (Root::Item, Some(field), Some(known)) = (place.root, place.field(), known)
                && !known.contains_key(field)
                && (closed || !known.is_empty())
            {
                let message = format!(
                    "`{}` reads `{place}`, which `data_source_config.item_schema` does not have",
                    criterion.name
                );
                return Err(ApiError::invalid(param, message));
            }
        }
    }
    Ok(())
}

/// Reads graders that were kept: they were checked when they came.
pub(crate) fn kept(shown: &Value) -> Result<Vec<Criterion>, ApiError> {
    let items = shown.as_array().cloned().unwrap_or_default();
    let items = items.into_iter().enumerate();
    criteria(
        items
            .map(|(i, item)| (format!("testing_criteria[{i}]"), item))
            .collect(),
    )
}

/// The fields of a request that are not read one by one.
impl Fields {
    fn rest<T: serde::de::DeserializeOwned>(self) -> Result<T, ApiError> {
        let (path, map) = self.into_parts();
        fields::read(&path, Value::Object(map))
    }
}

/// The answer's namespace in templates: what graders may read as `sample`.
pub(crate) fn sample_of(text: &str, more: Value) -> Value {
    let mut sample = json!({"output_text": text});
    if let Ok(parsed) = serde_json::from_str::<Value>(text) {
        sample["output_json"] = parsed;
    }
    if let Value::Object(more) = more {
        for (name, value) in more {
            sample[name] = value;
        }
    }
    sample
}
