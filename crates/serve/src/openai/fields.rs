//! The fields of a request's body, taken out one by one.
//!
//! Each endpoint takes the fields it honours; what is left must be a hint, or ask for nothing, or it is unknown and
//! a 400 that names it. So no field is ever dropped.

use bantam_engine::Sampling;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Whether a value is what a field takes.
type Check = fn(&Value) -> bool;

/// Fields that are advice to the operator: checked, without effect.
const HINTS: &[(&str, Check, &str)] = &[
    ("user", Value::is_string, "a string"),
    (
        "safety_identifier",
        is_short,
        "a string of at most 128 characters",
    ),
    ("prompt_cache_key", Value::is_string, "a string"),
    ("prompt_cache_options", Value::is_object, "an object"),
    ("prompt_cache_retention", Value::is_string, "a string"),
];

/// A field that is taken only with a value that asks for nothing: its name, those values as JSON, and why.
pub(crate) type Neutral = (&'static str, &'static [&'static str], &'static str);

/// A JSON object that is being read.
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// A request's body.
    pub(crate) fn of_body(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| ApiError::malformed_json(format!("the body is not JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self {
                path: String::new(),
                map,
            }),
            _ => Err(ApiError::malformed_json(
                "the body must be a JSON object".to_string(),
            )),
        }
    }

    /// An object somewhere inside.
    pub(crate) fn of(path: impl Into<String>, value: Value) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            _ => {
                let message = format!("`{path}` must be an object");
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// A field's name in full.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Takes a field out; an explicit null is an absent field, as OpenAI has it.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.map.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(&self.path(name), value).map(Some),
        }
    }

    /// Takes a field out that must be there.
    pub(crate) fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        let value = self.take(name)?;
        value.ok_or_else(|| ApiError::missing(&self.path(name)))
    }

    /// Takes an object out, to be read in turn.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.path(name);
        let value = self.take::<Value>(name)?;
        value.map(|value| Fields::of(path, value)).transpose()
    }

    /// Takes the items of an array out, each with its path.
    pub(crate) fn items(&mut self, name: &str) -> Result<Option<Vec<(String, Value)>>, ApiError> {
        let path = self.path(name);
        match self.take::<Value>(name)? {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(
                items
                    .into_iter()
                    .enumerate()
                    .map(|(i, item)| (format!("{path}[{i}]"), item))
                    .collect(),
            )),
            Some(_) => {
                let message = format!("`{path}` must be an array");
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// A number within bounds.
    pub(crate) fn ranged(
        &mut self,
        name: &str,
        min: f32,
        max: f32,
    ) -> Result<Option<f32>, ApiError> {
        match self.take::<f32>(name)? {
            Some(v) if !(min..=max).contains(&v) => {
                let path = self.path(name);
                let message = format!("`{path}` must be between {min} and {max}, not {v}");
                Err(ApiError::invalid(path, message))
            }
            value => Ok(value),
        }
    }

    /// A whole number within bounds.
    pub(crate) fn whole(
        &mut self,
        name: &str,
        min: u64,
        max: u64,
    ) -> Result<Option<usize>, ApiError> {
        let Some(v) = self.take::<u64>(name)? else {
            return Ok(None);
        };
        if !(min..=max).contains(&v) {
            let most = if max == u64::MAX {
                String::new()
            } else {
                format!(" and at most {max}")
            };
            let path = self.path(name);
            let message = format!("`{path}` must be at least {min}{most}, not {v}");
            return Err(ApiError::invalid(path, message));
        }
        Ok(Some(usize::try_from(v).unwrap_or(usize::MAX)))
    }

    /// `stream` and `stream_options`: whether to stream, and whether to tell the usage.
    pub(crate) fn stream(&mut self) -> Result<(bool, bool), ApiError> {
        let stream = self.take("stream")?.unwrap_or(false);
        let Some(mut options) = self.object("stream_options")? else {
            return Ok((stream, false));
        };
        if !stream {
            let message = "`stream_options` goes with `stream: true` only";
            return Err(ApiError::invalid("stream_options", message));
        }
        let include_usage = options.take("include_usage")?.unwrap_or(false);
        if options.take("include_obfuscation")? == Some(true) {
            let message = "chunks are not padded";
            return Err(ApiError::unsupported(
                "stream_options.include_obfuscation",
                message,
            ));
        }
        options.finish(&[])?;
        Ok((stream, include_usage))
    }

    /// Everything about how tokens are chosen but the temperature, which has the model's default, and the seed.
    pub(crate) fn sampling(&mut self) -> Result<Sampling, ApiError> {
        let top_k = match self.take::<i64>("top_k")?.unwrap_or(0) {
            // vLLM's clients write "all" as -1.
            -1 => 0,
            k => usize::try_from(k)
                .map_err(|_| ApiError::invalid("top_k", "`top_k` must be at least 0, or -1"))?,
        };
        Ok(Sampling {
            temperature: 0.0,
            top_k,
            top_p: self.ranged("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            min_p: self.ranged("min_p", 0.0, 1.0)?.unwrap_or(0.0),
            repetition_penalty: self
                .ranged("repetition_penalty", 0.01, 100.0)?
                .unwrap_or(1.0),
            presence_penalty: self.ranged("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            frequency_penalty: self.ranged("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
            logit_bias: biases(self.take("logit_bias")?)?,
            seed: 0,
        })
    }

    /// `stop`: a string or up to four.
    pub(crate) fn stops(&mut self) -> Result<Vec<String>, ApiError> {
        let bad = || {
            let message = "`stop` must be a string or an array of at most 4, none of them empty";
            ApiError::invalid("stop", message)
        };
        let stops: Vec<String> = match self.take("stop")? {
            None => Vec::new(),
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Array(stops)) => stops
                .iter()
                .map(|s| s.as_str().map(str::to_string).ok_or_else(bad))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(bad()),
        };
        if stops.len() > 4 || stops.iter().any(String::is_empty) {
            return Err(bad());
        }
        Ok(stops)
    }

    /// `metadata`: at most 16 pairs of short strings.
    pub(crate) fn metadata(&mut self) -> Result<Option<Map<String, Value>>, ApiError> {
        let path = self.path("metadata");
        let Some(value) = self.take::<Value>("metadata")? else {
            return Ok(None);
        };
        let fits = |(key, value): (&String, &Value)| {
            let value = value.as_str();
            key.chars().count() <= 64 && value.is_some_and(|v| v.chars().count() <= 512)
        };
        match value {
            Value::Object(pairs) if pairs.len() <= 16 && pairs.iter().all(fits) => Ok(Some(pairs)),
            _ => {
                let message = format!(
                    "`{path}` must be at most 16 pairs of strings, 64 and 512 characters long"
                );
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// Sets pairs of `metadata` that are not said.
    pub(crate) fn default_metadata(&mut self, pairs: &Map<String, Value>) {
        let all = self.map.entry("metadata").or_insert(Value::Null);
        if all.is_null() {
            *all = Value::Object(Map::new());
        }
        if let (false, Value::Object(said)) = (pairs.is_empty(), &mut *all) {
            for (key, value) in pairs {
                said.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        if self.map["metadata"] == Value::Object(Map::new()) {
            self.map.shift_remove("metadata");
        }
    }

    /// What is left, and where it stands.
    pub(crate) fn into_parts(self) -> (String, Map<String, Value>) {
        (self.path, self.map)
    }

    /// Takes what is left: hints, and fields that ask for nothing.
    pub(crate) fn finish(mut self, neutral: &[Neutral]) -> Result<(), ApiError> {
        let names: Vec<String> = self.map.keys().cloned().collect();
        for name in names {
            let value = self.map.shift_remove(&name).unwrap_or(Value::Null);
            let hint = HINTS.iter().find(|(known, ..)| *known == name);
            if let Some((_, is_valid, what)) = hint.filter(|_| self.path.is_empty()) {
                if !value.is_null() && !is_valid(&value) {
                    return Err(ApiError::invalid(
                        &*name,
                        format!("`{name}` must be {what}"),
                    ));
                }
                continue;
            }
            let Some((_, values, why)) = neutral.iter().find(|(known, ..)| *known == name) else {
                return Err(ApiError::unknown(&self.path(&name)));
            };
            if !value.is_null() && !values.contains(&value.to_string().as_str()) {
                let but = match values {
                    [] => String::new(),
                    values => format!("; it may only be {}", values.join(" or ")),
                };
                let path = self.path(&name);
                let message = format!("`{path}` is not supported: {why}{but}");
                return Err(ApiError::unsupported(path, message));
            }
        }
        Ok(())
    }
}

fn is_short(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.chars().count() <= 128)
}

/// Reads a value, naming where in it something is wrong.
pub(crate) fn read<T: DeserializeOwned>(prefix: &str, value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let param = match (prefix, inner.as_str()) {
            (prefix, ".") => prefix.to_string(),
            ("", inner) => inner.to_string(),
            (prefix, inner) => format!("{prefix}.{inner}"),
        };
        ApiError::invalid(param.clone(), format!("`{param}`: {}", error.into_inner()))
    })
}

fn biases(biases: Option<Map<String, Value>>) -> Result<Vec<(u32, f32)>, ApiError> {
    let read = |(token, bias): (String, Value)| {
        let token = token.parse::<u32>().ok();
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let message = "`logit_bias` must map token ids to numbers between -100 and 100";
        token
            .zip(bias.map(|b| b as f32))
            .ok_or_else(|| ApiError::invalid("logit_bias", message))
    };
    biases.into_iter().flatten().map(read).collect()
}
