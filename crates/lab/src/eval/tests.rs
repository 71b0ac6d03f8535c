use super::*;
use crate::data::{RowOptions, read_rows};

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-9, "{a} is not {b}");
}

/// Five pairs of answer and expected answer.
fn outcome(metric: Metric, pairs: [(&str, &str); 5]) -> EvalOutcome {
    let jsonl: Vec<String> = pairs
        .iter()
        .map(|(_, expected)| serde_json::json!({"prompt": "q", "completion": expected}).to_string())
        .collect();
    let name = Path::new("test.jsonl");
    let rows = read_rows(jsonl.join("\n").as_bytes(), name, &RowOptions::default()).unwrap();
    let questions = questions(&rows, metric, name).unwrap();
    let mut answers = pairs.iter().map(|(answer, _)| Answer::text(*answer));
    run(&questions, metric, |_| answers.next().unwrap()).unwrap()
}

#[test]
fn exact_fixture() {
    let out = outcome(
        Metric::Exact,
        [
            ("yes", "yes"),
            (" no\n", "no"),
            ("Yes", "yes"),
            ("", "no"),
            ("a  b", "a b"),
        ],
    );
    near(out.score, 2.0 / 5.0);
    assert_eq!(
        out.per_row
            .iter()
            .map(|row| row.correct)
            .collect::<Vec<_>>(),
        [true, true, false, false, false]
    );
    // Wilson, 2 of 5.
    assert!(
        (out.ci95[0] - 0.117_62).abs() < 1e-4 && (out.ci95[1] - 0.769_28).abs() < 1e-4,
        "{:?}",
        out.ci95
    );
}

#[test]
fn json_fixture() {
    let out = outcome(
        Metric::Json,
        [
            // Right: key order, white space and the spelling of a number do not count.
            (r#"{ "b": 1.0, "a": "x" }"#, r#"{"a":"x","b":1}"#),
            // Of 3 expected, 1 right, 1 wrong, 1 missing.
            (r#"{"a":"x","b":2}"#, r#"{"a":"x","b":1,"c":true}"#),
            // The array in another order: all fields right, yet not equal.
            (r#"{"a":["y","x","x"]}"#, r#"{"a":["x","y","x"]}"#),
            // Not JSON: 2 missing.
            (r#"{"a":"x""#, r#"{"a":"x","b":{"c":null}}"#),
            // A key twice is not JSON; 1 missing.
            (r#"{"a":1,"a":1}"#, r#"{"a":1}"#),
        ],
    );
    near(out.score, 1.0 / 5.0);
    assert_eq!(
        out.failures,
        Failures {
            no_answer: 0,
            cut_off: 0,
            invalid_json: 2
        }
    );
    // right 2 + 1 + 3, answered 2 + 2 + 3, expected 2 + 3 + 3 + 2 + 1
    let Extras::Fields {
        field_f1,
        field_precision,
        field_recall,
        field_f1_ci95,
        field_f1_interval,
    } = &out.extras
    else {
        panic!("{:?}", out.extras)
    };
    near(*field_precision, 6.0 / 7.0);
    near(*field_recall, 6.0 / 11.0);
    near(*field_f1, 12.0 / 18.0);
    assert!(field_f1_ci95[0] < *field_f1 && *field_f1 < field_f1_ci95[1]);
    assert!(field_f1_interval.starts_with("bca bootstrap"));
}

#[test]
fn fields_keep_their_places() {
    let count = |answer: &str, expected: &str| {
        let (answer, expected) = (
            parse_strict(answer).unwrap(),
            parse_strict(expected).unwrap(),
        );
        let counts = FieldCounts::of(Some(&answer), &expected);
        (counts.right, counts.answered, counts.expected)
    };
    assert_eq!(count(r#"{"a":{"b":1}}"#, r#"{"a/b":1}"#), (0, 1, 1));
    assert_eq!(count(r#"{"a":["x"]}"#, r#"{"a":"x"}"#), (0, 1, 1));
    assert_eq!(count(r#"{"a":"1"}"#, r#"{"a":1}"#), (0, 1, 1));
    assert_eq!(count(r#"{"a":["x","x"]}"#, r#"{"a":["x"]}"#), (1, 2, 1));
    assert_eq!(count(r#"{"a":[],"b":{}}"#, "{}"), (0, 0, 0));
    assert_eq!(count("3", "3.0"), (1, 1, 1));
}

#[test]
fn label_fixture() {
    let out = outcome(
        Metric::Label,
        [
            ("a", "a"),
            ("a ", "a"),
            ("a", "b"),
            ("b", "b"),
            ("I think b", "c"),
        ],
    );
    near(out.score, 3.0 / 5.0);
    let Extras::Labels(summary) = &out.extras else {
        panic!("{:?}", out.extras)
    };
    // F1 of a: 2*2/(2+3); of b: 2*1/(2+1); of c: 0.
    near(summary.macro_f1, (4.0 / 5.0 + 2.0 / 3.0 + 0.0) / 3.0);
    assert_eq!((summary.labels, summary.off_list), (3, 1));
    assert_eq!(summary.confusions.len(), 2);
    assert_eq!(
        (
            summary.confusions[0].expected.as_str(),
            summary.confusions[0].answered.as_str()
        ),
        ("b", "a")
    );
}

#[test]
fn rouge_l_fixture() {
    // Row scores from the `rouge-score` package 0.1.2, without stemming.
    let out = outcome(
        Metric::RougeL,
        [
            ("the cat sat on the mat", "The cat sat on the mat."),
            (
                "the cat was found under the bed",
                "the cat was under the bed",
            ),
            (
                "SpellForce 3 is a pretty bad game.",
                "SpellForce-3 is quite a bad video game, from 2017",
            ),
            ("nothing alike", "some other words"),
            ("a b c d", "d c b a"),
        ],
    );
    let wanted = [
        1.0,
        0.923_076_923_076_923,
        0.705_882_352_941_176_4,
        0.0,
        0.25,
    ];
    for (row, wanted) in out.per_row.iter().zip(wanted) {
        near(row.score, wanted);
    }
    near(out.score, 0.575_791_855_203_619_9);
    assert!(out.interval.starts_with("bca bootstrap"));
    assert_eq!(
        out.extras,
        Extras::Words {
            expected_without_words: 0
        }
    );
}

#[test]
fn rows_that_fail_stay_in_the_score() {
    let jsonl = "{\"prompt\":\"p\",\"completion\":\"ok\"}\n".repeat(4);
    let name = Path::new("x.jsonl");
    let rows = read_rows(jsonl.as_bytes(), name, &RowOptions::default()).unwrap();
    let questions = questions(&rows, Metric::Exact, name).unwrap();
    let timed = |ms: f64| Answer {
        latency_ms: Some(ms),
        completion_tokens: 5,
        cut_off: ms > 20.0,
        ..Answer::text("ok")
    };
    let answers = vec![
        timed(10.0),
        timed(20.0),
        timed(30.0),
        Answer::failed("the prompt does not fit"),
    ];
    let out = judge(&questions, answers, 0.5, Metric::Exact).unwrap();
    assert_eq!((out.rows, out.score), (4, 0.75));
    assert_eq!(
        out.failures,
        Failures {
            no_answer: 1,
            cut_off: 1,
            invalid_json: 0
        }
    );
    assert_eq!(
        (out.p50_ms, out.p95_ms, out.tok_per_s),
        (Some(20.0), Some(30.0), Some(30.0))
    );

    let lines = rows_jsonl(&out.per_row).unwrap();
    let last: RowResult = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last, out.per_row[3]);
    let summary = serde_json::to_value(&out).unwrap();
    assert!(summary.get("per_row").is_none() && summary["interval"] == "wilson");
    let error = judge(&questions, Vec::new(), 1.0, Metric::Exact)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "0 answers to 4 questions");
}

#[test]
fn what_cannot_be_judged_is_told_before_the_first_question() {
    let name = Path::new("test.jsonl");
    let rows = read_rows(
        "{\"prompt\":\"p\",\"completion\":\"{a\"}".as_bytes(),
        name,
        &RowOptions::default(),
    )
    .unwrap();
    let error = questions(&rows, Metric::Json, name)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("test.jsonl:1: the expected answer is not JSON"),
        "{error}"
    );
    assert_eq!("rouge-l".parse::<Metric>().unwrap(), Metric::RougeL);
    assert!(
        "bleu"
            .parse::<Metric>()
            .unwrap_err()
            .to_string()
            .contains("hint: one of")
    );
    assert_eq!(
        serde_json::to_string(&Metric::RougeL).unwrap(),
        "\"rouge-l\""
    );
}
