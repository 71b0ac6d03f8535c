//! Rows: the examples a team brings, one JSON object a line.
//!
//! Three shapes are read, detected from the first row and then held to for the whole file:
//!
//! | shape | fields | becomes |
//! |---|---|---|
//! | chat | `messages`, `tools`, `parallel_tool_calls` | itself |
//! | prompt | `prompt`, `completion` | user, assistant |
//! | label | `text`, `label` | user, assistant |
//!
//! Preferences have shapes of their own: see [`load_preferences`].
//!
//! `id` and `metadata` may stand in any row and are not read. Every other field is an error that names it:
//! a misspelt field that is silently dropped costs a training run. Every error carries `file:line:`.

mod chat;
mod check;
mod leak;
mod preference;
mod strict_json;

use std::fmt;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use bantam_formats::{FormatError, JsonlReader, Problem};
use serde_json::{Map, Value};

pub use check::LineCheck;
pub use leak::{
    Conflict, DuplicateReport, LeakReport, duplicates, input_key, leak_check, normalise,
};
pub use preference::{JudgedRow, PairRow, Preferences, load_preferences, read_preferences};
pub use strict_json::parse_strict;

pub use bantam_text::{Message, Role, Tool, ToolCall};

/// One example: a conversation whose assistant turns are the answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The conversation, in order; the assistant's turns are what is trained and judged.
    pub messages: Vec<Message>,
    /// The tools that the conversation may call; often none.
    pub tools: Vec<Tool>,
    /// As given in the row; `None` when the row does not say.
    pub parallel_tool_calls: Option<bool>,
    /// Where it stood in its file, from 1.
    pub line: usize,
}

impl Row {
    /// The conversation up to its last assistant turn, and that turn's text: what an evaluation asks and expects.
    ///
    /// `None` when the row ends in another role or in a turn of tool calls without text.
    pub fn question_and_answer(&self) -> Option<(&[Message], &str)> {
        let (last, before) = self.messages.split_last()?;
        (last.role == Role::Assistant).then_some(())?;
        Some((before, last.content.as_deref()?))
    }
}

/// The shape of the rows of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowFormat {
    /// `messages`, as in the OpenAI API's chat.
    Chat,
    /// `prompt` and `completion`.
    Prompt,
    /// `text` and `label`.
    Label,
}

impl RowFormat {
    fn fields(self) -> &'static [&'static str] {
        match self {
            RowFormat::Chat => &["messages", "tools", "parallel_tool_calls"],
            RowFormat::Prompt => &["prompt", "completion"],
            RowFormat::Label => &["text", "label"],
        }
    }

    fn detect(row: &Map<String, Value>) -> Option<RowFormat> {
        // One telling field is enough: the check of the shape then names what is missing or too much.
        let all = [RowFormat::Chat, RowFormat::Prompt, RowFormat::Label];
        all.into_iter()
            .find(|format| format.fields().iter().any(|field| row.contains_key(*field)))
    }
}

impl RowFormat {
    /// By its fields.
    fn name(self) -> &'static str {
        match self {
            RowFormat::Chat => "`messages`",
            RowFormat::Prompt => "`prompt`/`completion`",
            RowFormat::Label => "`text`/`label`",
        }
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The longest line that is read, in bytes: far above any row that fits a small model's context.
pub const MAX_LINE_BYTES: usize = 4 << 20;
/// Fields that any row may carry and that nothing here reads.
const EXTRA_FIELDS: [&str; 2] = ["id", "metadata"];

/// How rows are read.
#[derive(Debug, Clone, Default)]
pub struct RowOptions {
    /// A system message put before every row that has none of its own.
    pub system: Option<String>,
}

/// Why a file of rows was refused.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file could not be opened or read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file holds no row at all.
    #[error("`{}` holds no rows\nhint: one JSON object a line, such as {{\"prompt\": \"...\", \"completion\": \"...\"}}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line was refused.
    #[error("{}:{line}: {problem}{}", path.display(), problem.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RowProblem,
    },
}

/// What is wrong with one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowProblem {
    /// Bytes that are not UTF-8.
    #[error("not UTF-8 at byte {column} of the line")]
    NotUtf8 {
        /// The first bad byte, from 1.
        column: usize,
    },
    /// A line over the cap.
    #[error("the line is longer than {} MiB", max_bytes >> 20)]
    LineTooLong {
        /// The cap.
        max_bytes: usize,
    },
    /// Not JSON, or an object with a key twice.
    #[error("not valid JSON: {message} (column {column})")]
    Json {
        /// The parser's words.
        message: String,
        /// Where, in bytes from 1.
        column: usize,
    },
    /// JSON, but not an object.
    #[error("a row must be a JSON object, not {found}")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// No field of any shape.
    #[error("a row of no known shape: its fields are {fields}")]
    UnknownShape {
        /// The fields found, quoted.
        fields: String,
    },
    /// A row of another shape than the file's first.
    #[error("a {here} row in a file that began with {first} rows")]
    Mixed {
        /// The shape of the first row, by its fields.
        first: &'static str,
        /// The shape of this one.
        here: &'static str,
    },
    /// No preference in a file of them.
    #[error("a row that prefers nothing: its fields are {fields}")]
    NoPreference {
        /// The fields found, quoted.
        fields: String,
    },
    /// A field nobody reads.
    #[error("unknown field `{field}`{}", at(place))]
    UnknownField {
        /// The field.
        field: String,
        /// The object it stands in; empty for the row itself.
        place: String,
        /// What may stand there.
        allowed: Vec<&'static str>,
    },
    /// A field that must be there.
    #[error("missing field `{field}`{}", at(place))]
    Missing {
        /// The field.
        field: &'static str,
        /// The object it is missing from; empty for the row itself.
        place: String,
    },
    /// A field of the wrong type.
    #[error("`{field}` must be {expected}, not {found}")]
    WrongType {
        /// The path of the field.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A field whose value cannot be used.
    #[error("`{field}` {problem}")]
    Invalid {
        /// The path of the field.
        field: String,
        /// What is wrong with its value.
        problem: String,
        /// What to do about it.
        hint: Option<&'static str>,
    },
}

fn at(place: &str) -> String {
    if place.is_empty() {
        String::new()
    } else {
        format!(" in `{place}`")
    }
}

impl RowProblem {
    /// What to do about it, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            RowProblem::NotUtf8 { .. } => Some("save the file as UTF-8".into()),
            RowProblem::LineTooLong { .. } => {
                Some("each row is one line of JSON; split the file into lines".into())
            }
            RowProblem::Json { message, .. } if message.starts_with("EOF") => Some(
                "each row is one whole line of JSON; a pretty-printed file needs `jq -c .` first"
                    .into(),
            ),
            RowProblem::Json { .. } => None,
            RowProblem::NotAnObject { found: "an array" } => {
                Some("one object a line, not one array: `jq -c '.[]' FILE` rewrites it".into())
            }
            RowProblem::NotAnObject { .. } => None,
            RowProblem::NoPreference { .. } => Some(
                "use `input`, `preferred_output` and `non_preferred_output`, or `prompt`, `chosen` and `rejected`; \
                 for `kto` also `messages` and `label`, or `prompt`, `completion` and `label`"
                    .into(),
            ),
            RowProblem::UnknownShape { fields }
                if fields.contains("`chosen`") || fields.contains("preferred_") =>
            {
                Some("these are preferences: train on them with `method = \"dpo\"`, `orpo`, `simpo` or `kto`, and judge with the metric `preference`".into())
            }
            RowProblem::UnknownShape { .. } => {
                Some("use `messages`, or `prompt` and `completion`, or `text` and `label`".into())
            }
            RowProblem::Mixed { .. } => Some("put rows of one shape in each file".into()),
            RowProblem::UnknownField { field, allowed, .. } => {
                Some(match nearest(field, allowed) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("allowed here: {}", quoted(allowed.iter().copied())),
                })
            }
            RowProblem::Missing { .. } => None,
            RowProblem::WrongType {
                expected: "a string",
                found: "an object" | "an array",
                ..
            } => Some("write a JSON answer as a string that holds the JSON".into()),
            RowProblem::WrongType {
                expected: "a string",
                found: "a number" | "a boolean",
                ..
            } => Some("put it in quotes".into()),
            RowProblem::WrongType { .. } => None,
            RowProblem::Invalid { hint, .. } => hint.map(str::to_owned),
        }
    }
}

/// Reads a file of rows; its shape is that of its first row.
///
/// Errors: the first bad line, as `file:line: what is wrong` and a hint. A file without rows is an error.
pub fn load_rows(path: &Path, options: &RowOptions) -> Result<Vec<Row>, DataError> {
    read_rows(open(path)?, path, options)
}

fn open(path: &Path) -> Result<fs_err::File, DataError> {
    fs_err::File::open(path).map_err(|error| DataError::Read {
        path: path.to_owned(),
        source: io::Error::from(error.kind()),
    })
}

/// As [`load_rows`], from any reader; `name` stands in the errors for the file.
pub fn read_rows(
    input: impl Read,
    name: &Path,
    options: &RowOptions,
) -> Result<Vec<Row>, DataError> {
    let mut format = None;
    read_objects(input, name, |row, line| {
        parse_row(row, line, &mut format, options)
    })
}

/// Reads every line as an object, and what `parse` makes of it; a file without lines is an error.
fn read_objects<T>(
    input: impl Read,
    name: &Path,
    mut parse: impl FnMut(Map<String, Value>, usize) -> Result<T, RowProblem>,
) -> Result<Vec<T>, DataError> {
    let input = BufReader::with_capacity(1 << 16, input);
    let mut reader = JsonlReader::new(input, name).with_caps(MAX_LINE_BYTES, u64::MAX);
    let mut rows = Vec::new();
    while let Some(line) = reader.next_line().map_err(|error| refused(error, name))? {
        let row = parse_object(line.text).and_then(|row| parse(row, line.number));
        rows.push(row.map_err(|problem| DataError::Row {
            path: name.to_owned(),
            line: line.number,
            problem,
        })?);
    }
    if rows.is_empty() {
        return Err(DataError::Empty {
            path: name.to_owned(),
        });
    }
    Ok(rows)
}

/// A line that cannot be read, in this module's terms.
fn refused(error: FormatError, name: &Path) -> DataError {
    let path = name.to_owned();
    let row = |line, problem| DataError::Row {
        path: name.to_owned(),
        line,
        problem,
    };
    match error {
        FormatError::Line {
            line,
            problem: Problem::NotUtf8 { offset, .. },
            ..
        } => row(
            line,
            RowProblem::NotUtf8 {
                column: offset as usize + 1,
            },
        ),
        FormatError::Line {
            line,
            problem: Problem::OverCap { .. },
            ..
        } => row(
            line,
            RowProblem::LineTooLong {
                max_bytes: MAX_LINE_BYTES,
            },
        ),
        FormatError::Io { source, .. } => DataError::Read { path, source },
        error => DataError::Read {
            path,
            source: io::Error::other(error),
        },
    }
}

/// Reads a line as the object that a row is.
fn parse_object(text: &str) -> Result<Map<String, Value>, RowProblem> {
    let value = parse_strict(text).map_err(|error| {
        let message = error.to_string();
        // The parser counts lines within this one line: only its column says anything.
        let message = message
            .rsplit_once(" at line ")
            .map_or(message.as_str(), |(words, _)| words)
            .to_owned();
        RowProblem::Json {
            message,
            column: error.column(),
        }
    })?;
    match value {
        Value::Object(row) => Ok(row),
        other => Err(RowProblem::NotAnObject {
            found: kind_of(&other),
        }),
    }
}

fn parse_row(
    row: Map<String, Value>,
    line: usize,
    file_format: &mut Option<RowFormat>,
    options: &RowOptions,
) -> Result<Row, RowProblem> {
    let format = RowFormat::detect(&row).ok_or_else(|| RowProblem::UnknownShape {
        fields: quoted(row.keys().map(String::as_str)),
    })?;
    let first = *file_format.get_or_insert(format);
    if first != format {
        return Err(RowProblem::Mixed {
            first: first.name(),
            here: format.name(),
        });
    }
    let allowed: Vec<&'static str> = format
        .fields()
        .iter()
        .chain(&EXTRA_FIELDS)
        .copied()
        .collect();
    only_fields(&row, &allowed, "")?;
    let mut parsed = match format {
        RowFormat::Chat => chat::parse(&row, line)?,
        RowFormat::Prompt => pair(&row, "prompt", "completion", line)?,
        RowFormat::Label => pair(&row, "text", "label", line)?,
    };
    options.complete(&mut parsed.messages);
    Ok(parsed)
}

impl RowOptions {
    /// Puts the system message before a conversation that has none.
    fn complete(&self, messages: &mut Vec<Message>) {
        let Some(system) = &self.system else { return };
        let is_own = |message: &Message| matches!(message.role, Role::System | Role::Developer);
        if !messages.iter().any(is_own) {
            messages.insert(0, Message::new(Role::System, system));
        }
    }
}

fn pair(
    row: &Map<String, Value>,
    ask: &'static str,
    answer: &'static str,
    line: usize,
) -> Result<Row, RowProblem> {
    let text_of = |field: &'static str| {
        let value = row.get(field).ok_or(RowProblem::Missing {
            field,
            place: String::new(),
        })?;
        let text = string(value, field)?;
        if text.trim().is_empty() {
            return Err(RowProblem::Invalid {
                field: field.into(),
                problem: "is empty".into(),
                hint: None,
            });
        }
        Ok(text)
    };
    let messages = vec![
        Message::new(Role::User, text_of(ask)?),
        Message::new(Role::Assistant, text_of(answer)?),
    ];
    Ok(Row {
        messages,
        tools: Vec::new(),
        parallel_tool_calls: None,
        line,
    })
}

fn only_fields(
    object: &Map<String, Value>,
    allowed: &[&'static str],
    place: &str,
) -> Result<(), RowProblem> {
    match object.keys().find(|key| !allowed.contains(&key.as_str())) {
        None => Ok(()),
        Some(field) => Err(RowProblem::UnknownField {
            field: field.clone(),
            place: place.to_owned(),
            allowed: allowed.to_vec(),
        }),
    }
}

fn string<'a>(value: &'a Value, field: &str) -> Result<&'a str, RowProblem> {
    value
        .as_str()
        .ok_or_else(|| wrong_type(value, field, "a string"))
}

fn wrong_type(value: &Value, field: &str, expected: &'static str) -> RowProblem {
    RowProblem::WrongType {
        field: field.to_owned(),
        expected,
        found: kind_of(value),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.take(12).map(|name| format!("`{name}`")).collect();
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

/// The allowed name within two edits of `field`, or the present name of a field of old.
fn nearest<'a>(field: &str, allowed: &[&'a str]) -> Option<&'a str> {
    let old = [
        ("functions", "tools"),
        ("function_call", "tool_calls"),
        ("conversations", "messages"),
        ("response", "completion"),
        ("output", "completion"),
        ("class", "label"),
        ("input", "text"),
    ];
    if let Some((_, now)) = old
        .iter()
        .find(|(then, now)| *then == field && allowed.contains(now))
    {
        return Some(now);
    }
    let close = allowed
        .iter()
        .map(|name| (edit_distance(field, name), *name))
        .min()?;
    (close.0 <= 2 && close.0 < close.1.len()).then_some(close.1)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut costs: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut diagonal = costs[0];
        costs[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let keep = diagonal + usize::from(from != *to);
            diagonal = costs[j + 1];
            costs[j + 1] = keep.min(costs[j] + 1).min(diagonal + 1);
        }
    }
    costs[b.len()]
}

#[cfg(test)]
mod tests;
