//! Preferences: answers of which one is preferred to the other, or that are each called desirable or not.
//!
//! | shape | fields | becomes |
//! |---|---|---|
//! | OpenAI's | `input` (`messages`, `tools`), `preferred_output`, `non_preferred_output` (or `..._completion`) | a pair |
//! | prompt | `prompt`, `chosen`, `rejected`: texts, or lists of messages | a pair |
//! | judged chat | `messages`, `label` | an answer, desirable or not |
//! | judged prompt | `prompt`, `completion`, `label` | the same |
//!
//! `chosen` and `rejected` may also be whole conversations that begin alike; `prompt` may then be left out. Only what
//! comes after the prompt is learnt: an assistant's turns before it are context, whatever their `weight`.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::chat::{self, add_turns, array, invalid};
use super::{
    DataError, EXTRA_FIELDS, Message, Role, Row, RowOptions, RowProblem, Tool, only_fields, open,
    quoted, read_objects, wrong_type,
};

type Object = Map<String, Value>;

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRow {
    /// The conversation with the preferred answer.
    pub chosen: Row,
    /// The same with the other.
    pub rejected: Row,
}

/// One answer to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgedRow {
    /// The conversation.
    pub row: Row,
    /// Whether its answer is desirable.
    pub desirable: bool,
}

/// All rows of a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Preferences {
    /// Answers that are compared.
    Pairs(Vec<PairRow>),
    /// Answers that are judged one by one.
    Judged(Vec<JudgedRow>),
}

/// The shape of the rows of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Input,
    Prompt,
    JudgedChat,
    JudgedPrompt,
}

/// One row of either kind.
pub(super) enum Parsed {
    Pair(PairRow),
    Judged(JudgedRow),
}

/// A label that is a text is a reference for a grader.
fn is_judgement(label: &Value) -> bool {
    !label.is_string()
}

/// Two names for each answer: those of OpenAI's guides, and those of its schema.
const PREFERRED: [&str; 2] = ["preferred_output", "preferred_completion"];
const OTHER: [&str; 2] = ["non_preferred_output", "non_preferred_completion"];

impl Shape {
    /// The shape of a row, by the first of its fields that tells.
    pub(super) fn detect(row: &Object) -> Option<Self> {
        let has = |names: &[&str]| names.iter().any(|name| row.contains_key(*name));
        if has(&["input"]) || has(&PREFERRED) || has(&OTHER) {
            Some(Self::Input)
        } else if has(&["chosen", "rejected"]) {
            Some(Self::Prompt)
        } else if has(&["messages"]) && row.get("label").is_some_and(is_judgement) {
            Some(Self::JudgedChat)
        } else if has(&["label"]) && has(&["prompt", "completion"]) {
            Some(Self::JudgedPrompt)
        } else {
            None
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Input => "`input`/`preferred_output`",
            Self::Prompt => "`prompt`/`chosen`/`rejected`",
            Self::JudgedChat => "`messages`/`label`",
            Self::JudgedPrompt => "`prompt`/`completion`/`label`",
        }
    }

    fn fields(self) -> Vec<&'static str> {
        let own: &[&[&'static str]] = match self {
            Self::Input => &[&["input"], &PREFERRED, &OTHER],
            Self::Prompt => &[&["prompt", "chosen", "rejected"], &TOOLS],
            Self::JudgedChat => &[&["messages", "label"], &TOOLS],
            Self::JudgedPrompt => &[&["prompt", "completion", "label"], &TOOLS],
        };
        [&own.concat()[..], &EXTRA_FIELDS].concat()
    }
}

const TOOLS: [&str; 2] = ["tools", "parallel_tool_calls"];

/// Reads a file of preferences; its shape is that of its first row.
///
/// Errors: the first bad line, as `file:line: what is wrong` and a hint. A file without rows is an error.
pub fn load_preferences(path: &Path, options: &RowOptions) -> Result<Preferences, DataError> {
    read_preferences(open(path)?, path, options)
}

/// As [`load_preferences`], from any reader; `name` stands in the errors for the file.
pub fn read_preferences(
    input: impl Read,
    name: &Path,
    options: &RowOptions,
) -> Result<Preferences, DataError> {
    let mut shape = None;
    let rows = read_objects(input, name, |row, line| {
        parse(&row, line, &mut shape, options)
    })?;
    let (mut pairs, mut judged) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            Parsed::Pair(row) => pairs.push(row),
            Parsed::Judged(row) => judged.push(row),
        }
    }
    // A file has one shape.
    Ok(if judged.is_empty() {
        Preferences::Pairs(pairs)
    } else {
        Preferences::Judged(judged)
    })
}

/// Reads one row; the first one of a file says which shape the others have.
pub(super) fn parse(
    row: &Object,
    line: usize,
    first: &mut Option<Shape>,
    options: &RowOptions,
) -> Result<Parsed, RowProblem> {
    let shape = Shape::detect(row).ok_or_else(|| RowProblem::NoPreference {
        fields: quoted(row.keys().map(String::as_str)),
    })?;
    if let Some(first) = first
        && *first != shape
    {
        return Err(RowProblem::Mixed {
            first: first.name(),
            here: shape.name(),
        });
    }
    only_fields(row, &shape.fields(), "")?;
    let parsed = match shape {
        Shape::Input => Parsed::Pair(input_pair(row, line, options)?),
        Shape::Prompt => Parsed::Pair(prompt_pair(row, line, options)?),
        Shape::JudgedChat | Shape::JudgedPrompt => Parsed::Judged(judged(row, line, options)?),
    };
    // What is no row does not say what the others must be.
    *first = Some(shape);
    Ok(parsed)
}

/// What comes before an answer.
struct Prompt<'a> {
    messages: Vec<Message>,
    tools: Vec<Tool>,
    parallel_tool_calls: Option<bool>,
    line: usize,
    options: &'a RowOptions,
}

impl Prompt<'_> {
    /// The whole conversation with an answer: a text, or messages.
    fn with(&self, answer: &Value, place: &str) -> Result<Row, RowProblem> {
        let mut messages = self.messages.clone();
        match answer {
            Value::Array(_) => {
                add_turns(&mut messages, array(answer, place)?, place, &self.tools)?;
            }
            answer => messages.push(Message::new(Role::Assistant, text(answer, place)?)),
        }
        let answer = messages.split_off(self.messages.len());
        self.with_turns(answer, place, 0)
    }

    /// The whole conversation with an answer, which stands at `place` from message `at`; only the answer is learnt.
    fn with_turns(&self, answer: Vec<Message>, place: &str, at: usize) -> Result<Row, RowProblem> {
        for i in [0, answer.len() - 1] {
            if answer[i].role != Role::Assistant {
                let hint = "an answer begins and ends with the assistant's turn; what comes before it is the prompt";
                let field = format!("{place}[{}]", at + i);
                return Err(invalid(&field, "is no assistant message", Some(hint)));
            }
        }
        if !answer.iter().any(Message::is_trained) {
            let problem = "has weight 0 in every assistant message: nothing would be learnt";
            return Err(invalid(place, problem, None));
        }
        let mut messages = self.messages.clone();
        let turns = messages.iter_mut();
        turns
            .filter(|turn| turn.role == Role::Assistant)
            .for_each(|turn| turn.trained = Some(false));
        messages.extend(answer);
        self.options.complete(&mut messages);
        Ok(Row {
            messages,
            tools: self.tools.clone(),
            parallel_tool_calls: self.parallel_tool_calls,
            line: self.line,
        })
    }
}

/// Two answers, unless they are one.
fn pair(
    chosen: Row,
    rejected: Row,
    [chosen_place, rejected_place]: [&str; 2],
) -> Result<PairRow, RowProblem> {
    if chosen.messages == rejected.messages {
        let problem = format!("is the same answer as `{chosen_place}`");
        let hint = "leave the line out: it prefers neither";
        return Err(invalid(rejected_place, &problem, Some(hint)));
    }
    Ok(PairRow { chosen, rejected })
}

fn text<'a>(value: &'a Value, place: &str) -> Result<&'a str, RowProblem> {
    let Some(text) = value.as_str() else {
        return Err(wrong_type(value, place, "a string or an array of messages"));
    };
    if text.trim().is_empty() {
        return Err(invalid(place, "is empty", None));
    }
    Ok(text)
}

/// The first of some names for a field that is there.
fn named<'a>(
    row: &'a Object,
    names: &[&'static str],
) -> Result<(&'a Value, &'static str), RowProblem> {
    let found = names.iter().find_map(|name| Some((row.get(*name)?, *name)));
    found.ok_or(RowProblem::Missing {
        field: names[0],
        place: String::new(),
    })
}

/// A prompt that is a text, or messages.
fn messages_of(value: &Value, place: &str, tools: &[Tool]) -> Result<Vec<Message>, RowProblem> {
    let mut messages = Vec::new();
    match value {
        Value::Array(_) => add_turns(&mut messages, array(value, place)?, place, tools)?,
        value => messages.push(Message::new(Role::User, text(value, place)?)),
    }
    Ok(messages)
}

fn input_pair(row: &Object, line: usize, options: &RowOptions) -> Result<PairRow, RowProblem> {
    let (input, _) = named(row, &["input"])?;
    let input = chat::object(input, "input")?;
    only_fields(
        input,
        &["messages", "tools", "parallel_tool_calls"],
        "input",
    )?;
    let (tools, parallel_tool_calls) = chat::tools_of(input, "input.")?;
    let place = "input.messages";
    let value = input.get("messages").ok_or(RowProblem::Missing {
        field: "messages",
        place: "input".to_owned(),
    })?;
    let mut messages = Vec::new();
    add_turns(&mut messages, array(value, place)?, place, &tools)?;
    let prompt = Prompt {
        messages,
        tools,
        parallel_tool_calls,
        line,
        options,
    };
    let (chosen, rejected) = (named(row, &PREFERRED)?, named(row, &OTHER)?);
    for (value, place) in [chosen, rejected] {
        array(value, place)?;
    }
    pair(
        prompt.with(chosen.0, chosen.1)?,
        prompt.with(rejected.0, rejected.1)?,
        [chosen.1, rejected.1],
    )
}

fn prompt_pair(row: &Object, line: usize, options: &RowOptions) -> Result<PairRow, RowProblem> {
    let (tools, parallel_tool_calls) = chat::tools_of(row, "")?;
    let (chosen, rejected) = (named(row, &["chosen"])?.0, named(row, &["rejected"])?.0);
    let mut prompt = Prompt {
        messages: Vec::new(),
        tools,
        parallel_tool_calls,
        line,
        options,
    };
    let places = ["chosen", "rejected"];
    if !(is_whole(chosen) && is_whole(rejected)) {
        let (given, _) = named(row, &["prompt"])?;
        prompt.messages = messages_of(given, "prompt", &prompt.tools)?;
        let answers = (
            prompt.with(chosen, "chosen")?,
            prompt.with(rejected, "rejected")?,
        );
        return pair(answers.0, answers.1, places);
    }
    // Two whole conversations: the prompt is what they begin with alike, up to the first answer that differs.
    let mut chosen = messages_of(chosen, "chosen", &prompt.tools)?;
    let mut rejected = messages_of(rejected, "rejected", &prompt.tools)?;
    let most = chosen.len().min(rejected.len()) - 1;
    let alike = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b);
    let n = alike.count().min(most);
    prompt.messages = chosen[..n].to_vec();
    if let Some(given) = row.get("prompt") {
        let said = messages_of(given, "prompt", &prompt.tools)?;
        let is_said = if given.is_string() {
            let of = |message: &Message| message.content == said[0].content;
            prompt.messages.iter().any(of)
        } else {
            prompt.messages.starts_with(&said)
        };
        if !is_said {
            let problem = "is not what `chosen` and `rejected` begin with";
            let hint = "leave `prompt` out where both answers are whole conversations";
            return Err(invalid("prompt", problem, Some(hint)));
        }
    }
    let (chosen, rejected) = (chosen.split_off(n), rejected.split_off(n));
    let chosen = prompt.with_turns(chosen, "chosen", n)?;
    pair(chosen, prompt.with_turns(rejected, "rejected", n)?, places)
}

/// Whether an answer is a list of messages that begins before the answer.
fn is_whole(answer: &Value) -> bool {
    let first = answer.as_array().and_then(|all| all.first());
    first.is_some_and(|first| first["role"] != "assistant")
}

fn judged(row: &Object, line: usize, options: &RowOptions) -> Result<JudgedRow, RowProblem> {
    let desirable = match named(row, &["label"])?.0 {
        Value::Bool(desirable) => *desirable,
        other => return Err(wrong_type(other, "label", "true or false")),
    };
    let (tools, parallel_tool_calls) = chat::tools_of(row, "")?;
    let mut prompt = Prompt {
        messages: Vec::new(),
        tools,
        parallel_tool_calls,
        line,
        options,
    };
    let row = if let Some(value) = row.get("messages") {
        let items = array(value, "messages")?;
        add_turns(&mut prompt.messages, items, "messages", &prompt.tools)?;
        let answer = prompt.messages.split_off(items.len() - 1);
        prompt.with_turns(answer, "messages", items.len() - 1)?
    } else {
        let (given, _) = named(row, &["prompt"])?;
        prompt.messages = messages_of(given, "prompt", &prompt.tools)?;
        prompt.with(named(row, &["completion"])?.0, "completion")?
    };
    Ok(JudgedRow { row, desirable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Preferences, DataError> {
        read_preferences(
            text.as_bytes(),
            Path::new("pairs.jsonl"),
            &RowOptions::default(),
        )
    }

    fn pairs(text: &str) -> Vec<PairRow> {
        match read(text).unwrap() {
            Preferences::Pairs(pairs) => pairs,
            Preferences::Judged(_) => panic!("not pairs"),
        }
    }

    fn judged_rows(text: &str) -> Vec<JudgedRow> {
        match read(text).unwrap() {
            Preferences::Judged(rows) => rows,
            Preferences::Pairs(_) => panic!("not judged"),
        }
    }

    fn refusal(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    const INPUT: &str = r#""input":{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"},{"role":"user","content":"2+2?"}]}"#;

    fn answer(text: &str) -> String {
        format!(r#"[{{"role":"assistant","content":"{text}"}}]"#)
    }

    fn openai(good: &str, bad: &str) -> String {
        let (good, bad) = (answer(good), answer(bad));
        format!(r#"{{{INPUT},"preferred_output":{good},"non_preferred_output":{bad}}}"#)
    }

    #[test]
    fn one_pair_in_every_shape() {
        let first = openai("4", "5");
        let second = first.replace("_output", "_completion");
        for text in [first, second] {
            let PairRow { chosen, rejected } = pairs(&text).remove(0);
            assert_eq!(chosen.messages[..3], rejected.messages[..3]);
            // An earlier answer is context.
            let learnt = |row: &Row| -> Vec<bool> {
                let turns = row.messages.iter();
                turns
                    .filter(|turn| turn.role == Role::Assistant)
                    .map(Message::is_trained)
                    .collect()
            };
            assert_eq!(
                (learnt(&chosen), learnt(&rejected)),
                (vec![false, true], vec![false, true])
            );
            assert_eq!(chosen.question_and_answer().unwrap().1, "4");
            assert_eq!(rejected.question_and_answer().unwrap().1, "5");
        }
        let texts = pairs(r#"{"prompt":"2+2?","chosen":"4","rejected":"5","id":1}"#);
        let user = r#"{"role":"user","content":"2+2?"}"#;
        let (good, bad) = (answer("4"), answer("5"));
        let lists = format!(r#"{{"prompt":[{user}],"chosen":{good},"rejected":{bad}}}"#);
        assert_eq!(pairs(&lists), texts);
        let whole = |prompt: &str| {
            let (good, bad) = (&good[1..], &bad[1..]);
            format!(r#"{{{prompt}"chosen":[{user},{good},"rejected":[{user},{bad}}}"#)
        };
        assert_eq!(pairs(&whole("")), texts);
        assert_eq!(pairs(&whole(r#""prompt":"2+2?","#)), texts);
        insta::assert_snapshot!(refusal(&whole(r#""prompt":"3+3?","#)), @r"
        pairs.jsonl:1: `prompt` is not what `chosen` and `rejected` begin with
        hint: leave `prompt` out where both answers are whole conversations
        ");
    }

    #[test]
    fn judged_answers_in_both_shapes() {
        let chat = r#"{"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":"4"}],"label":true}"#;
        let text = r#"{"prompt":"2+2?","completion":"4","label":true}"#;
        assert_eq!(judged_rows(chat), judged_rows(text));
        assert!(judged_rows(text)[0].desirable);
        insta::assert_snapshot!(refusal(&text.replace("true", "1")), @"pairs.jsonl:1: `label` must be true or false, not a number");
        let asked = chat.replace("assistant", "user");
        insta::assert_snapshot!(refusal(&asked), @r"
        pairs.jsonl:1: `messages[1]` is no assistant message
        hint: an answer begins and ends with the assistant's turn; what comes before it is the prompt
        ");
    }

    #[test]
    fn a_system_message_is_put_before_both_answers() {
        let options = RowOptions {
            system: Some("Add.".into()),
        };
        let text = r#"{"prompt":"2+2?","chosen":"4","rejected":"5"}"#;
        let read = read_preferences(text.as_bytes(), Path::new("x"), &options).unwrap();
        let Preferences::Pairs(pairs) = read else {
            panic!("pairs")
        };
        for row in [&pairs[0].chosen, &pairs[0].rejected] {
            assert_eq!(row.messages[0], Message::new(Role::System, "Add."));
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let fine = openai("4", "5");
        insta::assert_snapshot!(refusal(&format!("{fine}\n{}", openai("4", "4"))), @r"
        pairs.jsonl:2: `non_preferred_output` is the same answer as `preferred_output`
        hint: leave the line out: it prefers neither
        ");
        let mixed = r#"{"prompt":"a","chosen":"b","rejected":"c"}"#;
        insta::assert_snapshot!(refusal(&format!("{fine}\n\n{mixed}")), @r"
        pairs.jsonl:3: a `prompt`/`chosen`/`rejected` row in a file that began with `input`/`preferred_output` rows
        hint: put rows of one shape in each file
        ");
        insta::assert_snapshot!(refusal(r#"{"prompt":"a","completion":"b"}"#), @r"
        pairs.jsonl:1: a row that prefers nothing: its fields are `prompt`, `completion`
        hint: use `input`, `preferred_output` and `non_preferred_output`, or `prompt`, `chosen` and `rejected`; for `kto` also `messages` and `label`, or `prompt`, `completion` and `label`
        ");
        insta::assert_snapshot!(refusal(r#"{"prompt":"a","chosen":"b"}"#), @"pairs.jsonl:1: missing field `rejected`");
        insta::assert_snapshot!(refusal(r#"{"prompt":"a","chosen":"b","rejected":[]}"#), @"pairs.jsonl:1: `rejected` is empty");
        insta::assert_snapshot!(refusal(&fine.replace(r#""content":"5""#, r#""contents":"5""#)), @r"
        pairs.jsonl:1: unknown field `contents` in `non_preferred_output[0]`
        hint: did you mean `content`?
        ");
    }
}
