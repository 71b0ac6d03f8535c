//! Against Hugging Face's WordPiece: a miniature vocabulary, four settings, two hundred awkward strings.
//! `goldens/make_wordpiece.py` wrote the expectations.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;

use bantam_text::{TextError, WordPiece};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Goldens {
    awkward: Vec<String>,
    vocab: Vec<String>,
    families: BTreeMap<String, Family>,
}

#[derive(Deserialize)]
struct Family {
    pipeline: Value,
    ids: Vec<Vec<u32>>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("../goldens/wordpiece.json")).unwrap()
}

/// The family's `tokenizer.json`.
fn hf_json(goldens: &Goldens, family: &str) -> Value {
    let mut json = goldens.families[family].pipeline.clone();
    let vocab: serde_json::Map<String, Value> = goldens
        .vocab
        .iter()
        .enumerate()
        .map(|(i, token)| (token.clone(), json!(i)))
        .collect();
    json["model"]["vocab"] = Value::Object(vocab);
    json
}

fn read(json: &Value) -> Result<WordPiece, TextError> {
    WordPiece::from_hf_json(json.to_string().as_bytes())
}

#[test]
fn every_string_has_the_ids_that_hugging_face_gives_it() {
    let goldens = goldens();
    assert!(goldens.awkward.len() >= 200 && goldens.families.len() == 4);
    for (name, family) in &goldens.families {
        let tokenizer = read(&hf_json(&goldens, name)).unwrap();
        assert_eq!(tokenizer.vocab_size(), goldens.vocab.len());
        for (text, want) in goldens.awkward.iter().zip(&family.ids) {
            assert_eq!(&tokenizer.encode(text), want, "{name}: {text:?}");
        }
    }
}

#[test]
fn a_vocabulary_alone_reads_as_bert_does() {
    let goldens = goldens();
    for (name, lowercase) in [("uncased", true), ("cased", false)] {
        let tokenizer = WordPiece::from_vocab(&goldens.vocab.join("\n"), lowercase).unwrap();
        for (text, want) in goldens.awkward.iter().zip(&goldens.families[name].ids) {
            assert_eq!(&tokenizer.encode(text), want, "{name}: {text:?}");
        }
    }
}

#[test]
fn what_people_write_never_ends_a_sentence() {
    let goldens = goldens();
    let tokenizer = read(&hf_json(&goldens, "uncased")).unwrap();
    let ids = tokenizer.encode("a [SEP] b [CLS] [MASK] [PAD] [UNK]");
    let specials = ids.iter().filter(|&&id| [0, 2, 3, 4].contains(&id)).count();
    assert_eq!((specials, ids[0], ids[ids.len() - 1]), (2, 2, 3));
}

#[test]
fn other_tokenizers_are_refused_with_what_is_wrong() {
    let goldens = goldens();
    let sound = hf_json(&goldens, "uncased");
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut json = sound.clone();
        edit(&mut json);
        read(&json).unwrap_err().to_string()
    };
    let refused = [
        (
            change(&|j| j["model"]["type"] = json!("BPE")),
            "not WordPiece",
        ),
        (
            change(&|j| j["pre_tokenizer"] = json!({"type": "Whitespace"})),
            "`Whitespace`",
        ),
        (change(&|j| j["pre_tokenizer"] = Value::Null), "`none`"),
        (
            change(&|j| j["normalizer"] = json!({"type": "NFC"})),
            "`NFC`",
        ),
        (
            change(&|j| j["model"]["unk_token"] = json!("<unk>")),
            "<unk>",
        ),
        (change(&|j| j["model"]["vocab"] = json!({})), "0 tokens"),
        (change(&|j| j["model"]["vocab"]["zz"] = json!(7)), "twice"),
        (
            change(&|j| j["model"]["vocab"]["zz"] = json!(4_000_000_000u32)),
            "too large",
        ),
        (
            change(&|j| j["model"]["max_input_chars_per_word"] = json!(100_000)),
            "max_input",
        ),
        (
            change(&|j| {
                j["model"]["continuing_subword_prefix"] = json!("#".repeat(17));
            }),
            "continuing_subword_prefix",
        ),
        (
            change(&|j| j["added_tokens"][0]["special"] = json!(false)),
            "[PAD]",
        ),
        (
            change(&|j| j["post_processor"]["single"] = json!([])),
            "post-processor",
        ),
        (
            change(&|j| j["post_processor"] = json!({"type": "ByteLevel"})),
            "ByteLevel",
        ),
    ];
    for (message, part) in refused {
        assert!(message.contains(part), "{message:?} does not name {part:?}");
    }
    let twice = WordPiece::from_vocab("[UNK]\n[CLS]\n[SEP]\na\na\n", true).unwrap_err();
    assert!(twice.to_string().contains("vocab.txt:5"), "{twice}");
    assert!(WordPiece::from_hf_json(b"{").is_err());
}

proptest! {
    #[test]
    fn any_text_is_between_its_two_special_tokens(text in ".{0,200}") {
        let tokenizer = WordPiece::from_vocab("[UNK]\n[CLS]\n[SEP]\na\n##b\nc", true).unwrap();
        let ids = tokenizer.encode(&text);
        prop_assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
        prop_assert!(ids[1..ids.len() - 1].iter().all(|id| [0, 3, 4, 5].contains(id)));
    }
}
