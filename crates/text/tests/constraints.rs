//! Constraints: whatever is chosen under the mask is valid, and what cannot be enforced is refused.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use bantam_text::{
    Constraint, ConstraintEngine, ConstraintSpec, GgufVocab, TextError, Tokenizer, fuzz,
};
use proptest::prelude::*;
use serde_json::{Value, json};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let goldens: Value = serde_json::from_str(include_str!("../goldens/tokenizers.json")).unwrap();
    let f = &goldens["families"]["smollm"];
    let read = |v: &Value| serde_json::from_value(v.clone()).unwrap();
    Arc::new(
        Tokenizer::from_gguf(GgufVocab {
            model: "gpt2".into(),
            pre: "smollm".into(),
            tokens: read(&f["tokens"]),
            token_types: serde_json::from_value(f["token_types"].clone()).unwrap(),
            merges: read(&f["merges"]),
            eos: Some(2),
            ..GgufVocab::default()
        })
        .unwrap(),
    )
});
static ENGINE: LazyLock<ConstraintEngine> =
    LazyLock::new(|| ConstraintEngine::new(&TOKENIZER, &[2, 0]).unwrap());

fn compile(spec: ConstraintSpec) -> Result<Constraint, TextError> {
    ENGINE.compile(&spec)
}

fn schema(value: Value) -> Result<Constraint, TextError> {
    compile(ConstraintSpec::JsonSchema(value))
}

/// Is `text` a complete answer?
fn accepts(constraint: &Constraint, text: &str) -> bool {
    let mut c = constraint.clone();
    for id in TOKENIZER.encode_plain(text) {
        // Another way to cut the text into tokens may be the forced one; bytes decide.
        if !c.allowed().unwrap().allows(id) || c.commit(id).is_err() {
            return accepts_by_bytes(constraint, text.as_bytes());
        }
    }
    c.allowed().unwrap().allows(2)
}

fn accepts_by_bytes(constraint: &Constraint, text: &[u8]) -> bool {
    if text.is_empty() {
        return constraint.clone().allowed().unwrap().allows(2);
    }
    let mut start = constraint.clone();
    let next: Vec<u32> = start.allowed().unwrap().iter().collect();
    next.into_iter().filter(|id| *id > 2).any(|id| {
        let bytes = TOKENIZER.token_bytes(id);
        let mut c = constraint.clone();
        !bytes.is_empty()
            && text.starts_with(bytes)
            && c.commit(id).is_ok()
            && accepts_by_bytes(&c, &text[bytes.len()..])
    })
}

/// Takes random allowed tokens, leaning towards those that close things, until an end token; `None` if none
/// came in time.
fn walk(mut c: Constraint, choices: &[u16]) -> Option<String> {
    let mut ids = Vec::new();
    for choice in choices {
        let mask = c.allowed().unwrap();
        let all: Vec<u32> = mask.iter().collect();
        let closing: Vec<u32> = all
            .iter()
            .copied()
            .filter(|id| {
                *id <= 2
                    || TOKENIZER
                        .token_bytes(*id)
                        .iter()
                        .all(|b| b"\"}]:,".contains(b))
            })
            .collect();
        let pick = usize::from(*choice >> 2);
        let pool = if choice & 3 != 0 && !closing.is_empty() {
            &closing
        } else {
            &all
        };
        let id = pool[pick % pool.len()];
        c.commit(id).unwrap();
        if id <= 2 {
            assert!(id != 1, "only end tokens end");
            assert!(c.is_done() && c.allowed().is_err());
            return Some(TOKENIZER.decode(&ids));
        }
        ids.push(id);
    }
    None
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["user", "The", "é日"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
        },
        "required": ["name", "kind"],
        "additionalProperties": false
    })
}

fn is_person(v: &Value) -> bool {
    let Some(o) = v.as_object() else { return false };
    o.keys()
        .all(|k| ["name", "age", "kind", "tags", "next"].contains(&k.as_str()))
        && o.get("name")
            .and_then(Value::as_str)
            .is_some_and(|s| s.chars().count() <= 6)
        && o.get("kind")
            .and_then(Value::as_str)
            .is_some_and(|s| ["user", "The", "é日"].contains(&s))
        && o.get("age")
            .is_none_or(|a| a.as_u64().is_some_and(|a| a <= 150))
        && o.get("tags").is_none_or(|t| {
            t.as_array()
                .is_some_and(|t| t.len() <= 3 && t.iter().all(Value::is_boolean))
        })
        && o.get("next").is_none_or(|n| n.is_null() || is_person(n))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn walks_stay_within_the_schema(choices in prop::collection::vec(any::<u16>(), 300)) {
        if let Some(text) = walk(schema(person()).unwrap(), &choices) {
            let value: Value = serde_json::from_str(&text).map_err(|e| TestCaseError::fail(format!("{text:?}: {e}")))?;
            prop_assert!(is_person(&value), "{}", text);
        }
    }

    #[test]
    fn walks_stay_json(choices in prop::collection::vec(any::<u16>(), 200)) {
        if let Some(text) = walk(compile(ConstraintSpec::JsonObject).unwrap(), &choices) {
            let value: Value = serde_json::from_str(&text).map_err(|e| TestCaseError::fail(format!("{text:?}: {e}")))?;
            prop_assert!(value.is_object());
        }
    }

    #[test]
    fn walks_end_in_a_label(choices in prop::collection::vec(any::<u16>(), 64), labels in prop::collection::btree_set("[a-cé/. \\n\\\\(*]{1,6}", 1..12)) {
        let labels: Vec<String> = labels.into_iter().collect();
        let c = compile(ConstraintSpec::Labels(labels.clone())).unwrap();
        for label in &labels {
            prop_assert!(accepts(&c, label), "{:?} of {:?}", label, labels);
        }
        if let Some(text) = walk(c, &choices) {
            prop_assert!(labels.contains(&text), "{:?} of {:?}", text, labels);
        }
    }
}

#[test]
fn walks_do_end() {
    // The tests above would pass in vain if no walk ever came to its end.
    let mut ended = 0;
    for seed in 0..20u32 {
        let choices: Vec<u16> = (0..300u32)
            .map(|i| (seed.wrapping_mul(7919) + i).wrapping_mul(2_654_435_761) as u16)
            .collect();
        ended += usize::from(walk(schema(person()).unwrap(), &choices).is_some());
    }
    assert!(ended >= 5, "{ended}");
}

#[test]
fn json_has_no_free_whitespace() {
    let c = schema(json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"], "additionalProperties": false})).unwrap();
    for good in [
        r#"{"a":1}"#,
        r#"{"a": 1}"#,
        r#"{"a": 1, "b": [1, 2,3]}"#,
        r#"{"a":-7,"b":[]}"#,
    ] {
        assert!(accepts(&c, good), "{good}");
    }
    for bad in [
        "",
        r#"{ "a":1}"#,
        r#"{"a":  1}"#,
        r#"{"a":1 }"#,
        "{\n\"a\":1}",
        r#"{"a":1} "#,
        r#"{"b":[]}"#,
        r#"{"a":1,"c":2}"#,
        r#"{"a":01}"#,
    ] {
        assert!(!accepts(&c, bad), "{bad}");
    }
}

#[test]
fn labels_may_begin_one_another() {
    let labels: Vec<String> = ["card", "card_lost", "card lost", "a.b"]
        .map(String::from)
        .into();
    let c = compile(ConstraintSpec::Labels(labels.clone())).unwrap();
    for label in &labels {
        assert!(accepts(&c, label), "{label}");
    }
    for bad in ["", "car", "card_", "card_lost ", "axb", "CARD"] {
        assert!(!accepts(&c, bad), "{bad}");
    }
    let mut one = compile(ConstraintSpec::Labels(vec!["hello world".into()])).unwrap();
    let forced = one.forced();
    assert_eq!(TOKENIZER.decode(&forced), "hello world");
    for id in forced {
        one.commit(id).unwrap();
    }
    assert!(one.is_done());
    assert_eq!(one.allowed().unwrap().iter().collect::<Vec<_>>(), [0, 2]);
    one.commit(2).unwrap();
    assert!(one.allowed().is_err() && one.commit(2).is_err());
}

#[test]
fn regex_and_lark() {
    let c = compile(ConstraintSpec::Regex(r"\d{3}-[a-z]+/(x|y\n)?".into())).unwrap();
    assert!(accepts(&c, "123-abc/") && accepts(&c, "123-a/y\n"));
    assert!(!accepts(&c, "12-abc/") && !accepts(&c, "123-abc"));
    let c = compile(ConstraintSpec::Lark(
        "start: \"(\" start \")\" | NUM\nNUM: /[0-9]+/".into(),
    ))
    .unwrap();
    assert!(accepts(&c, "((42))") && !accepts(&c, "((42)"));
}

#[test]
fn a_wrong_token_is_an_error_and_a_clone_goes_its_own_way() {
    let mut c = compile(ConstraintSpec::Labels(vec!["yes".into(), "no".into()])).unwrap();
    let other = c.clone();
    assert!(c.commit(1).is_err());
    assert!(c.commit(TOKENIZER.token_to_id("q").unwrap()).is_err());
    for id in TOKENIZER.encode_plain("no") {
        c.commit(id).unwrap();
    }
    assert!(accepts(&other, "yes"));
}

/// Walks by hashes; what was allowed at each step, what was taken, and whether that was the end.
fn trace(mut c: Constraint, seed: u32) -> Vec<(Vec<u32>, u32, bool)> {
    let mut steps = Vec::new();
    while !c.is_done() && steps.len() < 40 {
        let allowed: Vec<u32> = c.allowed().unwrap().iter().collect();
        let hash = (seed + steps.len() as u32).wrapping_mul(2_654_435_761) >> 16;
        let token = allowed[hash as usize % allowed.len()];
        if steps.len() % 3 == 1 {
            // Looking changes nothing.
            assert!(c.n_possible(&[token, 70_000]) <= 1);
            c.forced();
        }
        c.commit(token).unwrap();
        steps.push((allowed, token, c.is_done()));
        if token == 2 || token == 0 {
            break;
        }
    }
    steps
}

#[test]
fn what_answers_share_is_what_each_finds_alone() {
    let labels = ["card", "card_arrival", "card arrival", "top up", "top_up"];
    let specs = [
        ConstraintSpec::Labels(labels.map(str::to_owned).to_vec()),
        ConstraintSpec::JsonSchema(person()),
        ConstraintSpec::Regex("(ab|ac)*d".into()),
    ];
    for spec in specs {
        for seed in (0..20).chain(0..20) {
            let alone = ConstraintEngine::new(&TOKENIZER, &[2, 0]).unwrap();
            let alone = trace(alone.compile(&spec).unwrap(), seed);
            assert_eq!(trace(compile(spec.clone()).unwrap(), seed), alone);
        }
    }
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    for (bad, needle) in [
        (json!({"typ": "object"}), "`typ`"),
        (
            json!({"type": "object", "properties": {"a": {"type": "string", "formt": "date"}}}),
            "schema.properties.a.formt",
        ),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"not": {"type": "string"}}), "`not`"),
        (json!({"if": {}, "then": {}}), "cannot be enforced"),
        (
            json!({"type": "string", "format": "no-such-format"}),
            "format",
        ),
        (json!({"$ref": "https://example.org/x.json"}), ""),
        (json!({"$ref": "#/$defs/missing"}), ""),
        (
            json!({"x-guidance": {"lenient": true}, "type": "object"}),
            "x-guidance",
        ),
        (json!({"type": "strin"}), ""),
        (json!(false), ""),
        (json!(7), "object"),
        (json!({"type": "string", "pattern": "(?=a)b"}), ""),
        (json!({"type": "string", "pattern": "(["}), ""),
        (json!({"type": "string", "maxLength": 1e12}), "maxLength"),
        (
            json!({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}),
            "",
        ),
        (json!({"type": "integer", "minimum": 5, "maximum": 4}), ""),
    ] {
        let error = schema(bad.clone()).map(|_| ()).unwrap_err().to_string();
        assert!(
            error.starts_with("constraint refused: ") && error.contains(needle),
            "{bad}: {error}"
        );
    }
    for labels in [
        vec![],
        vec!["".to_string()],
        vec!["a".to_string(), "a".to_string()],
    ] {
        assert!(compile(ConstraintSpec::Labels(labels)).is_err());
    }
    assert!(compile(ConstraintSpec::Regex("(".into())).is_err());
    assert!(compile(ConstraintSpec::Regex("a(?=b)".into())).is_err());
    assert!(compile(ConstraintSpec::Lark("start: nothing".into())).is_err());
    assert!(ConstraintEngine::new(&TOKENIZER, &[]).is_err());
    assert!(ConstraintEngine::new(&TOKENIZER, &[u32::MAX]).is_err());
}

#[test]
fn the_fuzz_corpus_passes() {
    type Body = fn(&[u8]);
    let targets: [(&str, Body); 5] = [
        ("tokenizer_json", fuzz::tokenizer_json),
        ("chat_template", fuzz::chat_template),
        ("json_schema", fuzz::json_schema),
        ("regex", fuzz::regex),
        ("lark", fuzz::lark),
    ];
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    for (target, body) in targets {
        let mut n = 0;
        for entry in std::fs::read_dir(corpus.join(target)).unwrap() {
            body(&std::fs::read(entry.unwrap().path()).unwrap());
            n += 1;
        }
        assert!(n > 0, "no corpus for {target}");
    }
}

#[test]
fn hostile_grammars_are_bounded() {
    let nested = |n: usize| {
        (0..n).fold(
            json!({"type": "string"}),
            |s, _| json!({"type": "array", "items": s}),
        )
    };
    let wide: serde_json::Map<String, Value> = (0..3000)
        .map(|i| (format!("p{i}"), json!({"type": "string"})))
        .collect();
    let all_of: Vec<Value> = (0..14)
        .map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "string"}}}, {"properties": {format!("b{i}"): {"type": "integer"}}}]}))
        .collect();
    let specs = [
        ConstraintSpec::JsonSchema(nested(40)),
        ConstraintSpec::JsonSchema(nested(120)),
        ConstraintSpec::JsonSchema(json!({"type": "object", "properties": wide})),
        ConstraintSpec::JsonSchema(json!({"allOf": all_of})),
        ConstraintSpec::JsonSchema(json!({"$ref": "#"})),
        ConstraintSpec::JsonSchema(json!({"allOf": [{"$ref": "#"}]})),
        ConstraintSpec::JsonSchema(
            json!({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        ),
        ConstraintSpec::JsonSchema(
            json!({"type": "array", "minItems": 10000, "items": {"type": "array", "minItems": 10000, "items": {"type": "string", "minLength": 10000}}}),
        ),
        ConstraintSpec::JsonSchema(json!({"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"})),
        ConstraintSpec::Regex("(a{1,9999}){1,9999}".into()),
        ConstraintSpec::Regex("((((a*)*)*)*)*b".into()),
        ConstraintSpec::Regex("(.*a){30}".into()),
        ConstraintSpec::Regex("(a|b|ab)*c{2000}(a|aa)*".into()),
        ConstraintSpec::Regex("(".repeat(10_000)),
        ConstraintSpec::Lark("start: start start | \"a\" | ".into()),
        ConstraintSpec::Lark(format!(
            "start: {}\"a\"{}",
            "(".repeat(3000),
            ")".repeat(3000)
        )),
    ];
    for spec in specs {
        let began = Instant::now();
        if let Ok(mut c) = compile(spec.clone()) {
            for _ in 0..40 {
                let Ok(mask) = c.allowed() else { break };
                let id = mask.iter().last().unwrap();
                if c.commit(id).is_err() || c.is_done() {
                    break;
                }
            }
        }
        // Generous: a debug build on a busy machine. Unbounded work would take hours.
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{:.100?} took {:?}",
            spec,
            began.elapsed()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No bytes make the entry points panic.
    #[test]
    fn hostile_bytes(data in prop::collection::vec(any::<u8>(), 0..200), text in "[ -~é\\n]{0,60}", keys in prop::collection::vec("(\"type\"|\"items\"|\"anyOf\"|\"\\$ref\"|\"pattern\"|\\{|\\}|\\[|\\]|:|,|\"#\"|\"object\"|\"string\"|1|null)", 0..16)) {
        for bytes in [data.as_slice(), text.as_bytes(), keys.concat().as_bytes()] {
            fuzz::tokenizer_json(bytes);
            fuzz::gguf_vocab(bytes);
            fuzz::chat_template(bytes);
            fuzz::json_schema(bytes);
            fuzz::regex(bytes);
            fuzz::lark(bytes);
        }
    }

    #[test]
    fn hostile_templates(parts in prop::collection::vec(prop::sample::select(vec!["{{", "}}", "{%", "%}", " for ", "m", " in ", "messages", " if ", "endfor", "endif", "set", "=", "content", ".", "[", "]", "-1", "::", "|", "tojson", "'<|im_end|>'", "generation", "+", "~", "(", ")", "range", "9", "\n", " "]), 0..24)) {
        fuzz::chat_template(parts.concat().as_bytes());
        let with_end = format!("{{% for m in messages %}}{{{{ m.content }}}}<|im_end|>{{% endfor %}}{}", parts.concat());
        fuzz::chat_template(with_end.as_bytes());
    }
}
