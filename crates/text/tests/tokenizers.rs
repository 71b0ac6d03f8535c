//! Against Hugging Face: four miniature tokenizers, a hundred and more awkward strings each.
//! `goldens/make_tokenizers.py` wrote the expectations.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use bantam_text::{GgufVocab, Specials, StreamDecoder, TextError, TokenKind, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Goldens {
    awkward: Vec<String>,
    families: std::collections::BTreeMap<String, Family>,
}

#[derive(Deserialize)]
struct Family {
    tokens: Vec<String>,
    token_types: Vec<i32>,
    merges: Vec<String>,
    pipeline: serde_json::Map<String, Value>,
    ignore_merges: bool,
    ids: Vec<Vec<u32>>,
    plain_ids: Vec<Vec<u32>>,
    decoded: Vec<String>,
}

fn goldens() -> Goldens {
    serde_json::from_str(include_str!("../goldens/tokenizers.json")).unwrap()
}

fn vocab(pre: &str, family: &Family) -> GgufVocab {
    GgufVocab {
        model: "gpt2".into(),
        pre: pre.into(),
        tokens: family.tokens.clone(),
        token_types: family.token_types.clone(),
        merges: family.merges.clone(),
        eos: Some(2),
        ..GgufVocab::default()
    }
}

/// The same tokenizer as a `tokenizer.json`.
fn hf_json(family: &Family) -> Value {
    let added = family.token_types.iter().enumerate().filter(|(_, kind)| **kind != 1).map(|(id, kind)| {
        json!({"id": id, "content": family.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": *kind == 3})
    });
    let words = family
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| family.token_types[*id] != 4);
    let mut file = json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "post_processor": null,
        "model": {
            "type": "BPE",
            "vocab": words.map(|(id, t)| (t.clone(), json!(id))).collect::<serde_json::Map<_, _>>(),
            "merges": family.merges,
            "ignore_merges": family.ignore_merges,
        },
    });
    for (key, part) in &family.pipeline {
        file[key] = part.clone();
    }
    file
}

fn smollm() -> Arc<Tokenizer> {
    let goldens = goldens();
    Arc::new(Tokenizer::from_gguf(vocab("smollm", &goldens.families["smollm"])).unwrap())
}

#[test]
fn ids_equal_hugging_face() {
    let goldens = goldens();
    assert_eq!(goldens.families.len(), 4);
    for (pre, family) in &goldens.families {
        let from_gguf = Tokenizer::from_gguf(vocab(pre, family)).unwrap();
        let from_hf =
            Tokenizer::from_hf_json(hf_json(family).to_string().as_bytes(), &Specials::default())
                .unwrap();
        for (i, text) in goldens.awkward.iter().enumerate() {
            for (door, tokenizer) in [("gguf", &from_gguf), ("hf", &from_hf)] {
                assert_eq!(
                    tokenizer.encode(text),
                    family.ids[i],
                    "{pre} {door} {text:?}"
                );
                assert_eq!(
                    tokenizer.encode_plain(text),
                    family.plain_ids[i],
                    "{pre} {door} plain {text:?}"
                );
                assert_eq!(
                    tokenizer.decode(&family.ids[i]),
                    family.decoded[i],
                    "{pre} {door} {text:?}"
                );
            }
        }
    }
}

#[test]
fn kinds_and_names() {
    let t = smollm();
    let end = t.token_to_id("<|im_end|>").unwrap();
    assert!(t.is_special(end));
    assert_eq!(t.eos(), Some(end));
    assert_eq!(
        t.kind(t.token_to_id("<tool_call>").unwrap()),
        TokenKind::UserDefined
    );
    assert_eq!(
        t.token_to_id("\n").map(|id| t.token_bytes(id).to_vec()),
        Some(b"\n".to_vec())
    );
    assert_eq!(t.kind(u32::MAX), TokenKind::Unused);
    assert!(t.token_bytes(u32::MAX).is_empty());
    assert_eq!(t.decode_text(&t.encode("a<|im_end|>b")), "ab");
}

#[test]
fn refusals_say_why() {
    let goldens = goldens();
    let family = &goldens.families["gpt-2"];
    let v = vocab("deepseek-llm", family);
    assert!(matches!(
        Tokenizer::from_gguf(v),
        Err(TextError::UnknownPreTokenizer { .. })
    ));
    let mut v = vocab("gpt-2", family);
    v.model = "llama".into();
    assert!(
        Tokenizer::from_gguf(v)
            .unwrap_err()
            .to_string()
            .contains("byte-level BPE")
    );
    let mut v = vocab("gpt-2", family);
    v.merges.push("no-space".into());
    assert!(
        Tokenizer::from_gguf(v)
            .unwrap_err()
            .to_string()
            .contains("no-space")
    );
    let mut v = vocab("gpt-2", family);
    v.merges.push("Q zzz".into());
    assert!(Tokenizer::from_gguf(v).is_err());
    for (pointer, value, needle) in [
        ("/model/type", json!("Unigram"), "Unigram"),
        ("/model/byte_fallback", json!(true), "byte_fallback"),
        ("/pre_tokenizer", json!({"type": "Metaspace"}), "Metaspace"),
        ("/normalizer", json!({"type": "Lowercase"}), "Lowercase"),
        ("/model/vocab/a", json!(4_000_000_000u32), "limit"),
    ] {
        let mut file = hf_json(family);
        file["model"]["byte_fallback"] = json!(false);
        *file.pointer_mut(pointer).unwrap() = value;
        let error =
            Tokenizer::from_hf_json(file.to_string().as_bytes(), &Specials::default()).unwrap_err();
        assert!(error.to_string().contains(needle), "{error}");
    }
}

proptest! {
    /// Every text comes back, and no text that people write becomes a control token.
    #[test]
    fn round_trip(text in "\\PC{0,40}|(<\\|im_end\\|>|[a-z \\n\\t0-9é😀]){0,12}") {
        let t = smollm();
        prop_assert_eq!(t.decode(&t.encode(&text)), text.as_str());
        let plain = t.encode_plain(&text);
        prop_assert_eq!(t.decode(&plain), text.as_str());
        prop_assert!(plain.iter().all(|id| !t.is_special(*id)));
    }

    /// Decoding one id at a time shows the same text as decoding all, and never half a character.
    #[test]
    fn streaming_equals_decoding(ids in prop::collection::vec(0u32..630, 0..60)) {
        let t = smollm();
        let mut stream = StreamDecoder::new(t.clone());
        let mut text = String::new();
        for id in &ids {
            text.push_str(&stream.push(*id));
        }
        text.push_str(&stream.finish());
        prop_assert_eq!(text, t.decode_text(&ids));
    }
}
