//! A file for training, checked line by line before any method is chosen.
//!
//! Beside [rows](super::RowFormat), such a file may hold preferences ([`super::load_preferences`]) or prompts (`messages` that end before the answer, with any other fields, which graders read). The
//! first line says which; the checks of their messages are those of rows.

use serde_json::{Map, Value, json};

use super::{RowFormat, RowOptions, RowProblem, chat, parse_object, parse_row, preference};

/// What one file may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rows,
    Preferences,
    Prompts,
}

/// Checks the lines of one file. A bad line does not keep the next from being checked.
#[derive(Default)]
pub struct LineCheck {
    kind: Option<Kind>,
    format: Option<RowFormat>,
    shape: Option<preference::Shape>,
}

impl LineCheck {
    /// Whether a line may stand in the file.
    pub fn line(&mut self, text: &str) -> Result<(), RowProblem> {
        let row = parse_object(text)?;
        match *self.kind.get_or_insert_with(|| detect(&row)) {
            Kind::Rows => {
                let before = self.format;
                let parsed = parse_row(row, 0, &mut self.format, &RowOptions::default());
                if parsed.is_err() && before.is_none() {
                    // What is no row does not say what the others must be.
                    self.format = None;
                }
                parsed.map(|_| ())
            }
            Kind::Preferences => {
                preference::parse(&row, 0, &mut self.shape, &RowOptions::default()).map(|_| ())
            }
            Kind::Prompts => prompt(&row),
        }
    }
}

fn detect(row: &Map<String, Value>) -> Kind {
    if preference::Shape::detect(row).is_some() {
        return Kind::Preferences;
    }
    match row.get("messages").and_then(Value::as_array) {
        Some(messages)
            if messages
                .last()
                .is_some_and(|last| last["role"] != "assistant") =>
        {
            Kind::Prompts
        }
        _ => Kind::Rows,
    }
}

fn prompt(row: &Map<String, Value>) -> Result<(), RowProblem> {
    let mut whole = Map::new();
    for name in ["messages", "tools", "parallel_tool_calls"] {
        if let Some(value) = row.get(name) {
            whole.insert(name.to_owned(), value.clone());
        }
    }
    if let Some(messages) = whole.get_mut("messages").and_then(Value::as_array_mut) {
        if messages
            .last()
            .is_some_and(|last| last["role"] == "assistant")
        {
            return Err(RowProblem::Invalid {
                field: "messages".into(),
                problem: "end with an answer in a file whose first row has none".into(),
                hint: None,
            });
        }
        // An answer stands in for the one that will be generated.
        messages.push(json!({"role": "assistant", "content": "answer"}));
    }
    chat::parse(&whole, 0).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(lines: &[&str]) -> Vec<Option<String>> {
        let mut check = LineCheck::default();
        let told = |line: &&str| check.line(line).err().map(|problem| problem.to_string());
        lines.iter().map(told).collect()
    }

    #[test]
    fn every_line_is_judged_by_the_first_ones_kind() {
        let chat =
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        let bare = r#"{"messages":[{"role":"user","content":"a"}],"reference":"b"}"#;
        let pair = r#"{"prompt":"a","completion":"b"}"#;
        let found = problems(&[chat, "{", bare, pair, chat]);
        assert_eq!((&found[0], &found[4]), (&None, &None));
        assert!(found[1].as_ref().unwrap().starts_with("not valid JSON"));
        assert_eq!(found[2].as_ref().unwrap(), "unknown field `reference`");
        assert!(found[3].as_ref().unwrap().contains("began with `messages`"));
        let found = problems(&[bare, chat, bare]);
        assert!(found[0].is_none() && found[2].is_none());
        assert!(found[1].as_ref().unwrap().contains("end with an answer"));
    }

    #[test]
    fn preferences_have_two_answers_under_either_name() {
        let input = r#""input":{"messages":[{"role":"user","content":"a"}]}"#;
        let answer = r#"[{"role":"assistant","content":"b"}]"#;
        let other = answer.replace("\"b\"", "\"c\"");
        let guide =
            format!(r#"{{{input},"preferred_output":{answer},"non_preferred_output":{other}}}"#);
        let schema = guide.replace("_output", "_completion");
        let one = format!(r#"{{{input},"preferred_output":{answer}}}"#);
        let user = guide.replace(
            r#"preferred_output":[{"role":"assistant""#,
            r#"preferred_output":[{"role":"user""#,
        );
        let found = problems(&[&guide, &schema, &one, &user]);
        assert_eq!(found[..2], [None, None]);
        assert_eq!(
            found[2].as_ref().unwrap(),
            "missing field `non_preferred_output`"
        );
        assert_eq!(
            found[3].as_ref().unwrap(),
            "`preferred_output[0]` is no assistant message"
        );
    }

    #[test]
    fn preferences_of_other_shapes_are_checked_too() {
        let texts = r#"{"prompt":"a","chosen":"b","rejected":"c"}"#;
        let same = r#"{"prompt":"a","chosen":"b","rejected":"b"}"#;
        let row = r#"{"prompt":"a","completion":"b"}"#;
        let found = problems(&[texts, same, row, texts]);
        assert_eq!((&found[0], &found[3]), (&None, &None));
        assert!(found[1].as_ref().unwrap().contains("the same answer"));
        assert!(found[2].as_ref().unwrap().contains("prefers nothing"));
        let judged = r#"{"prompt":"a","completion":"b","label":false}"#;
        assert_eq!(problems(&[judged, judged]), [None, None]);
    }
}
