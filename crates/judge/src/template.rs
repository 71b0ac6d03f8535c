//! Texts with places for values: `{{ item.question }}`, `{{ sample.output_json.city }}`.
//!
//! Two names begin a path: `item`, the row, and `sample`, what a model answered. A path goes on with `.key` and `[0]`.
//! A string stands as it is, anything else as JSON. What is not there is an error, never an empty string: a grader that
//! compares with nothing would pass or fail every row and say nothing.

use std::fmt;

use serde_json::Value;

/// The longest template, in bytes, and the most places in it.
const BYTES_MAX: usize = 1 << 20;
const PLACES_MAX: usize = 1000;

/// Why a template is not one, or cannot be filled in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `{{` without `}}`.
    #[error("`{{{{` at byte {at} has no `}}}}` after it")]
    Open {
        /// Where the braces are.
        at: usize,
    },
    /// What stands between the braces is no path.
    #[error("`{{{{ {path} }}}}` is not a path that begins with `item` or `sample`")]
    NotAPath {
        /// What stands there.
        path: String,
    },
    /// It is too long.
    #[error("a template has at most {BYTES_MAX} bytes and {PLACES_MAX} places")]
    TooLong,
    /// The row or the answer has no such value.
    #[error("`{path}` is not there")]
    Missing {
        /// The path.
        path: String,
    },
}

/// What a path begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// The row.
    Item,
    /// What a model answered.
    Sample,
}

/// A step along a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

/// A place for a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// What it begins with.
    pub root: Root,
    steps: Vec<Step>,
}

impl Path {
    /// Reads `item.a.b[0]`.
    pub fn parse(text: &str) -> Result<Path, TemplateError> {
        let not = || TemplateError::NotAPath {
            path: text.trim().chars().take(100).collect(),
        };
        let text = text.trim();
        let end = text.find(['.', '[']).unwrap_or(text.len());
        let root = match &text[..end] {
            "item" => Root::Item,
            "sample" => Root::Sample,
            _ => return Err(not()),
        };
        let mut steps = Vec::new();
        let mut rest = &text[end..];
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('[') {
                let end = after.find(']').ok_or_else(not)?;
                let inside = after[..end].trim();
                let quoted = inside
                    .strip_prefix(['"', '\''])
                    .and_then(|s| s.strip_suffix(['"', '\'']));
                steps.push(match quoted {
                    Some(key) => Step::Key(key.to_string()),
                    None => Step::Index(inside.parse().map_err(|_| not())?),
                });
                rest = &after[end + 1..];
            } else {
                let after = rest.strip_prefix('.').ok_or_else(not)?;
                let end = after.find(['.', '[']).unwrap_or(after.len());
                let key = after[..end].trim();
                if key.is_empty() || key.contains(['{', '}', '|', '(', ')']) {
                    return Err(not());
                }
                steps.push(Step::Key(key.to_string()));
                rest = &after[end..];
            }
        }
        Ok(Path { root, steps })
    }

    /// The first key after the root: the row's field, or what of the answer is meant.
    pub fn field(&self) -> Option<&str> {
        match self.steps.first() {
            Some(Step::Key(key)) => Some(key),
            _ => None,
        }
    }

    /// The value in that place.
    pub fn find<'a>(&self, item: &'a Value, sample: &'a Value) -> Result<&'a Value, TemplateError> {
        let mut value = match self.root {
            Root::Item => item,
            Root::Sample => sample,
        };
        for step in &self.steps {
            let next = match step {
                // `.0` reaches into an array, too.
                Step::Key(key) => match value {
                    Value::Array(items) => key.parse().ok().and_then(|at: usize| items.get(at)),
                    value => value.get(key),
                },
                Step::Index(at) => value.get(at),
            };
            value = next.ok_or_else(|| TemplateError::Missing {
                path: self.to_string(),
            })?;
        }
        Ok(value)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.root {
            Root::Item => "item",
            Root::Sample => "sample",
        })?;
        for step in &self.steps {
            match step {
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(at) => write!(f, "[{at}]")?,
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Place(Path),
}

/// A text with places for values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

impl Template {
    /// Reads a template.
    pub fn parse(text: &str) -> Result<Template, TemplateError> {
        if text.len() > BYTES_MAX {
            return Err(TemplateError::TooLong);
        }
        let mut parts = Vec::new();
        let mut at = 0;
        while let Some(open) = text[at..].find("{{") {
            let open = at + open;
            if open > at {
                parts.push(Part::Text(text[at..open].to_string()));
            }
            let inside = &text[open + 2..];
            let close = inside.find("}}").ok_or(TemplateError::Open { at: open })?;
            parts.push(Part::Place(Path::parse(&inside[..close])?));
            if parts.len() > 2 * PLACES_MAX {
                return Err(TemplateError::TooLong);
            }
            at = open + 2 + close + 2;
        }
        if at < text.len() {
            parts.push(Part::Text(text[at..].to_string()));
        }
        Ok(Template { parts })
    }

    /// The places, in order.
    pub fn places(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().filter_map(|part| match part {
            Part::Place(path) => Some(path),
            Part::Text(_) => None,
        })
    }

    /// The text with the values in their places.
    pub fn fill(&self, item: &Value, sample: &Value) -> Result<String, TemplateError> {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Place(path) => match path.find(item, sample)? {
                    Value::String(text) => out.push_str(text),
                    value => out.push_str(&value.to_string()),
                },
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fill(text: &str) -> Result<String, TemplateError> {
        let item = json!({"q": "a {{ item.x }}", "n": 1.5, "list": [{"k": "v"}], "odd key": true, "no": null});
        let sample = json!({"output_text": "out", "output_json": {"city": "Rome"}});
        Template::parse(text)?.fill(&item, &sample)
    }

    #[test]
    fn values_stand_in_their_places_once() {
        for (text, want) in [
            ("plain", "plain"),
            // What a row says is not read as a template again.
            ("<{{item.q}}>", "<a {{ item.x }}>"),
            (
                "{{ item.n }}/{{ item.list[0].k }}/{{item.list.0.k}}",
                "1.5/v/v",
            ),
            (
                "{{ sample.output_json.city }} {{sample.output_json}}",
                "Rome {\"city\":\"Rome\"}",
            ),
            (
                "{{ item.odd key }}{{ item[\"odd key\"] }}{{ item.no }}",
                "truetruenull",
            ),
            ("a } b { c", "a } b { c"),
        ] {
            assert_eq!(fill(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, want) in [
            ("a {{ item.q", "byte 2"),
            ("{{ q }}", "`{{ q }}`"),
            ("{{ item..q }}", "not a path"),
            ("{{ item.list[x] }}", "not a path"),
            ("{{ item.list[9] }}", "`item.list[9]` is not there"),
            (
                "{{ sample.output_json.town }}",
                "`sample.output_json.town` is not there",
            ),
            ("{{ item.q | upper }}", "not a path"),
            ("{{}}", "not a path"),
        ] {
            let error = fill(text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        assert_eq!(
            Template::parse(&"{{item.a}}".repeat(3000)),
            Err(TemplateError::TooLong)
        );
    }
}
