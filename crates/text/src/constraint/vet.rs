//! What is looked at before a grammar is compiled: sizes, depths, and whether everything in it would be enforced.

use std::collections::HashSet;

use serde_json::Value;

use crate::TextError;

const MAX_SCHEMA_NODES: usize = 20_000;
const MAX_SCHEMA_DEPTH: usize = 64;
const MAX_SCHEMA_BYTES: usize = 512 << 10;
const MAX_REGEX_BYTES: usize = 16 << 10;
const MAX_LARK_BYTES: usize = 128 << 10;
const MAX_NESTING: usize = 64;
const MAX_LABELS: usize = 4096;
const MAX_LABEL_BYTES: usize = 1024;
const MAX_LABELS_BYTES: usize = 128 << 10;
/// Bound on `maxLength`, `minItems` and their like: each unit is a state of the compiled grammar.
const MAX_COUNT: u64 = 10_000;

/// Keywords whose value is a schema, or something with schemas inside.
const SCHEMA: [&str; 3] = ["items", "additionalItems", "additionalProperties"];
const SCHEMA_LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
const SCHEMA_MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords that are enforced and hold no schema.
const ENFORCED: [&str; 18] = [
    "$ref",
    "const",
    "enum",
    "type",
    "minItems",
    "maxItems",
    "required",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
];
/// Keywords that say nothing about what is valid.
const NOTES: [&str; 16] = [
    "$anchor",
    "$schema",
    "$id",
    "id",
    "$comment",
    "title",
    "description",
    "default",
    "readOnly",
    "writeOnly",
    "examples",
    "example",
    "deprecated",
    "discriminator",
    "contentMediaType",
    "contentEncoding",
];
const COUNTS: [&str; 6] = [
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
];

fn refuse(message: String) -> TextError {
    TextError::Constraint(message)
}

/// Is every keyword one that will be enforced, and everything of bearable size?
pub(super) fn schema(schema: &Value) -> Result<(), TextError> {
    let mut nodes = 0;
    let mut bytes = 0;
    measure(schema, 0, &mut nodes, &mut bytes)?;
    walk(schema, "schema")
}

fn measure(
    value: &Value,
    depth: usize,
    nodes: &mut usize,
    bytes: &mut usize,
) -> Result<(), TextError> {
    *nodes += 1;
    if depth > MAX_SCHEMA_DEPTH {
        return Err(refuse(format!(
            "the schema is nested deeper than {MAX_SCHEMA_DEPTH}"
        )));
    }
    match value {
        Value::String(text) => *bytes += text.len(),
        Value::Array(items) => items
            .iter()
            .try_for_each(|v| measure(v, depth + 1, nodes, bytes))?,
        Value::Object(fields) => {
            for (key, field) in fields {
                *bytes += key.len();
                measure(field, depth + 1, nodes, bytes)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    if *nodes > MAX_SCHEMA_NODES || *bytes > MAX_SCHEMA_BYTES {
        return Err(refuse(format!(
            "the schema has over {MAX_SCHEMA_NODES} values or {MAX_SCHEMA_BYTES} bytes of text"
        )));
    }
    Ok(())
}

fn walk(schema: &Value, path: &str) -> Result<(), TextError> {
    let fields = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(fields) => fields,
        _ => return Err(refuse(format!("{path} must be an object or a boolean"))),
    };
    for (key, value) in fields {
        let here = format!("{path}.{key}");
        let key = key.as_str();
        if SCHEMA_MAPS.contains(&key) {
            let Some(inner) = value.as_object() else {
                return Err(refuse(format!("{here} must be an object")));
            };
            inner
                .iter()
                .try_for_each(|(name, s)| walk(s, &format!("{here}.{name}")))?;
            if key == "patternProperties" {
                inner.keys().try_for_each(|pattern| regex(pattern))?;
            }
        } else if SCHEMA_LISTS.contains(&key) || (key == "items" && value.is_array()) {
            let Some(inner) = value.as_array() else {
                return Err(refuse(format!("{here} must be an array")));
            };
            inner
                .iter()
                .enumerate()
                .try_for_each(|(i, s)| walk(s, &format!("{here}[{i}]")))?;
        } else if SCHEMA.contains(&key) {
            walk(value, &here)?;
        } else if !ENFORCED.contains(&key) && !NOTES.contains(&key) {
            return Err(refuse(format!(
                "{here}: keyword `{key}` cannot be enforced"
            )));
        }
        if COUNTS.contains(&key)
            && value
                .as_f64()
                .is_none_or(|n| !(0.0..=MAX_COUNT as f64).contains(&n))
        {
            return Err(refuse(format!("{here} must be between 0 and {MAX_COUNT}")));
        }
        if key == "pattern" {
            let Some(pattern) = value.as_str() else {
                return Err(refuse(format!("{here} must be a string")));
            };
            regex(pattern)?;
        }
    }
    Ok(())
}

/// Length, nesting and repetition of a regex.
pub(super) fn regex(pattern: &str) -> Result<(), TextError> {
    if pattern.len() > MAX_REGEX_BYTES {
        return Err(refuse(format!(
            "the regex is over {MAX_REGEX_BYTES} bytes long"
        )));
    }
    nesting(pattern)?;
    // `{n}` and `{n,m}` multiply, inside one another too.
    let mut product: u64 = 1;
    let mut rest = pattern;
    while let Some(at) = rest.find('{') {
        rest = &rest[at + 1..];
        let inside = rest.split('}').next().unwrap_or_default();
        let largest = inside
            .split(',')
            .filter_map(|n| n.trim().parse::<u64>().ok())
            .max();
        if let Some(n) = largest {
            if n > MAX_COUNT {
                return Err(refuse(format!(
                    "a repetition in the regex is over {MAX_COUNT}"
                )));
            }
            product = product.saturating_mul(n.max(1));
        }
    }
    if product > 1_000_000_000_000 {
        return Err(refuse(
            "the repetitions in the regex multiply to too many".into(),
        ));
    }
    Ok(())
}

/// How deep brackets go; a rough count that escapes can only make stricter.
fn nesting(text: &str) -> Result<(), TextError> {
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(refuse(format!(
                "brackets are nested deeper than {MAX_NESTING}"
            )));
        }
    }
    Ok(())
}

/// The labels as one regex. One lexeme, so that a label which begins another is no ambiguity.
pub(super) fn labels(labels: &[String]) -> Result<String, TextError> {
    if labels.is_empty() || labels.len() > MAX_LABELS {
        return Err(refuse(format!(
            "{} labels; expected 1 to {MAX_LABELS}",
            labels.len()
        )));
    }
    if labels.iter().map(String::len).sum::<usize>() > MAX_LABELS_BYTES {
        return Err(refuse(format!(
            "the labels have over {MAX_LABELS_BYTES} bytes together"
        )));
    }
    let mut seen = HashSet::new();
    for label in labels {
        if label.is_empty() || label.len() > MAX_LABEL_BYTES {
            return Err(refuse(format!(
                "label {label:.40?} is empty or over {MAX_LABEL_BYTES} bytes long"
            )));
        }
        if !seen.insert(label) {
            return Err(refuse(format!("label {label:?} appears twice")));
        }
    }
    let escaped: Vec<String> = labels.iter().map(|l| escape(l)).collect();
    Ok(format!("({})", escaped.join("|")))
}

/// The regex that matches exactly this text.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || c == '_' || c == ' ' || !c.is_ascii() {
            out.push(c);
        } else {
            out.push_str(&format!("\\x{:02x}", u32::from(c)));
        }
    }
    out
}

/// Length and nesting of a grammar.
pub(super) fn lark(grammar: &str) -> Result<(), TextError> {
    if grammar.len() > MAX_LARK_BYTES {
        return Err(refuse(format!(
            "the grammar is over {MAX_LARK_BYTES} bytes long"
        )));
    }
    nesting(grammar)
}
