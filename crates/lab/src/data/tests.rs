use super::*;

fn read(bytes: impl AsRef<[u8]>) -> Result<Vec<Row>, DataError> {
    read_rows(
        bytes.as_ref(),
        Path::new("rows.jsonl"),
        &RowOptions::default(),
    )
}

fn refusal(bytes: impl AsRef<[u8]>) -> String {
    read(bytes).unwrap_err().to_string()
}

fn roles(row: &Row) -> Vec<Role> {
    row.messages.iter().map(|message| message.role).collect()
}

const PAIR: &str = "{\"text\": \"hi\", \"label\": \"greeting\"}";
const ASK: &str = r#"{"role":"user","content":"weather in Oslo?"}"#;

#[test]
fn the_three_shapes() {
    let rows = read("{\"prompt\": \"2+2\", \"completion\": \"4\", \"id\": 7}\n").unwrap();
    assert_eq!(roles(&rows[0]), [Role::User, Role::Assistant]);
    assert_eq!(rows[0].question_and_answer().unwrap().1, "4");

    let options = RowOptions {
        system: Some("classify".into()),
    };
    let rows = read_rows(PAIR.as_bytes(), Path::new("x"), &options).unwrap();
    assert_eq!(roles(&rows[0]), [Role::System, Role::User, Role::Assistant]);

    let chat = r#"{"messages":[{"role":"developer","content":"be brief"},
        {"role":"user","content":[{"type":"text","text":"one "},{"type":"text","text":"two"}]},
        {"role":"assistant","content":"ok","weight":0},{"role":"user","content":"again"},
        {"role":"assistant","content":"ok","weight":1,"refusal":null}],"metadata":{"any":[1]}}"#
        .replace('\n', " ");
    let rows = read_rows(chat.as_bytes(), Path::new("x"), &options).unwrap();
    assert_eq!(
        rows[0].messages.len(),
        5,
        "a row with its own instructions keeps them"
    );
    assert_eq!(rows[0].messages[1].content.as_deref(), Some("one two"));
    assert_eq!(
        (rows[0].messages[2].trained, rows[0].messages[4].trained),
        (Some(false), Some(true))
    );
}

#[test]
fn tools_and_their_calls() {
    let tools = r#""tools":[{"type":"function","function":{"name":"weather","description":"d","parameters":{"type":"object"}}}]"#;
    let call = |name: &str, arguments: &str| {
        format!(
            r#"{{"role":"assistant","tool_calls":[{{"id":"c1","type":"function","function":{{"name":"{name}","arguments":"{arguments}"}}}}]}}"#
        )
    };
    let answer = |id: &str| format!(r#"{{"role":"tool","tool_call_id":"{id}","content":"rain"}}"#);
    let row = |call: String, answer: String| {
        format!(r#"{{"messages":[{ASK},{call},{answer}],{tools},"parallel_tool_calls":false}}"#)
    };

    let rows = read(row(call("weather", "{}"), answer("c1"))).unwrap();
    assert_eq!(roles(&rows[0]), [Role::User, Role::Assistant, Role::Tool]);
    assert_eq!(
        (rows[0].tools.len(), rows[0].parallel_tool_calls),
        (1, Some(false))
    );
    assert!(rows[0].question_and_answer().is_none());

    let error = refusal(row(call("wether", "{}"), answer("c1")));
    assert!(
        error.contains(
            "`messages[1].tool_calls[0].function.name` calls `wether`, which is not in `tools`"
        ),
        "{error}"
    );
    let error = refusal(row(call("weather", "oslo"), answer("c1")));
    assert!(
        error.contains("is not the text of a JSON object"),
        "{error}"
    );
    let error = refusal(row(call("weather", "{}"), answer("c2")));
    assert!(
        error.contains("`messages[2].tool_call_id` `c2` answers no open call"),
        "{error}"
    );
}

#[test]
fn bom_crlf_and_blank_lines_are_read() {
    let rows = read(format!("\u{feff}{PAIR}\r\n\r\n   \n{PAIR}")).unwrap();
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 4]);
}

#[test]
fn errors_name_the_file_the_line_and_the_way_out() {
    for (bytes, wanted) in [
        (
            format!("{PAIR}\n{{\"text\": \"hi\", \"lable\": \"x\"}}"),
            "rows.jsonl:2: unknown field `lable`\nhint: did you mean `label`?",
        ),
        (
            format!("{PAIR}\n\n{{\"prompt\": \"a\", \"completion\": \"b\"}}"),
            "rows.jsonl:3: a `prompt`/`completion` row in a file that began with `text`/`label` rows",
        ),
        (
            "{\"text\": \"a\", \"text\": \"b\"}".into(),
            "rows.jsonl:1: not valid JSON: the key `text` is there twice",
        ),
        (
            "{\"text\": \"a\"}".into(),
            "rows.jsonl:1: missing field `label`",
        ),
        (
            "{\"text\": \"a\", \"label\": 3}".into(),
            "rows.jsonl:1: `label` must be a string, not a number\nhint: put it in quotes",
        ),
        (
            "{\"prompt\": \"a\", \"completion\": {}}".into(),
            "a string that holds the JSON",
        ),
        (
            "{\"text\": \"a\", \"label\": \" \"}".into(),
            "rows.jsonl:1: `label` is empty",
        ),
        (
            "{\"question\": \"a\"}".into(),
            "rows.jsonl:1: a row of no known shape: its fields are `question`",
        ),
        ("[{}]".into(), "one object a line, not one array"),
        ("{\n\"text\": 1}".into(), "pretty-printed"),
        ("{\"messages\": []}".into(), "`messages` is empty"),
        (
            format!("{{\"messages\": [{ASK}]}}"),
            "hold no assistant message",
        ),
        (
            r#"{"messages":[{"role":"bot","content":"x"}]}"#.into(),
            "`messages[0].role` is `bot`\nhint: roles are",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x","weight":1}]}"#.into(),
            "unknown field `weight` in `messages[0]`",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":"x","weight":2}]}"#.into(),
            "must be 0 or 1, not 2",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":"x","weight":0}]}"#.into(),
            "nothing would be learnt",
        ),
        (
            r#"{"messages":[{"role":"assistant"}]}"#.into(),
            "missing field `content` in `messages[0]`",
        ),
        (
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#.into(),
            "only text parts are read",
        ),
        (
            r#"{"messages":[],"functions":[]}"#.into(),
            "did you mean `tools`?",
        ),
    ] {
        let error = refusal(&bytes);
        assert!(
            error.contains(wanted),
            "wanted {wanted:?}\n   got {error:?}"
        );
    }
}

#[test]
fn hostile_bytes_are_refused() {
    assert!(
        refusal(b"{\"text\": \"\xff\", \"label\": \"b\"}")
            .contains("rows.jsonl:1: not UTF-8 at byte 11")
    );
    assert!(refusal("").contains("holds no rows"));
    assert!(refusal("\u{feff}\r\n\n").contains("holds no rows"));
    let long = format!(
        "{PAIR}\n{{\"text\": \"{}\", \"label\": \"b\"}}",
        "a".repeat(MAX_LINE_BYTES)
    );
    assert!(refusal(long).contains("rows.jsonl:2: the line is longer than 4 MiB"));
    let error = load_rows(Path::new("/nowhere/rows.jsonl"), &RowOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cannot read `/nowhere/rows.jsonl`"),
        "{error}"
    );
}

#[test]
fn normalised_text() {
    assert_eq!(normalise("  14 Main-St.,  Apt #2 "), "14 main st apt 2");
    assert_eq!(normalise("Ünï\tCODE"), "ünï code");
    assert_eq!(normalise("?!"), "");
}

#[test]
fn leaks_and_duplicates() {
    let train = read("{\"text\":\"14 Main St.\",\"label\":\"a\"}\n{\"text\":\"14 main st\",\"label\":\"b\"}\n{\"text\":\"x\",\"label\":\"a\"}\n{\"text\":\"?\",\"label\":\"a\"}").unwrap();
    let report = duplicates(&train);
    assert_eq!((report.repeats, report.contradictions), (1, 1));
    assert_eq!(
        report.pairs,
        [Conflict {
            first: 1,
            second: 2,
            same_answer: false
        }]
    );

    let test = read("{\"text\":\"!\",\"label\":\"a\"}\n{\"text\":\"14, MAIN ST\",\"label\":\"b\"}\n{\"text\":\"X\",\"label\":\"c\"}").unwrap();
    let report = leak_check(&train, &test);
    assert_eq!((report.leaked, report.leaked_with_answer), (2, 1));
    assert_eq!(
        report.pairs[0],
        Conflict {
            first: 2,
            second: 2,
            same_answer: true
        }
    );
    assert_eq!(
        report.to_string(),
        "2 of 3 rows also stand in the 4 training rows (1 with the same answer; first: line 2 = training line 2)"
    );
    assert!(leak_check(&train, &read(PAIR).unwrap()).is_clean());
}
