//! A whole sentence encoder in a folder, small enough for a test: the golden's random weights with a tokenizer.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::golden::Golden;

/// The width of its vectors.
pub const DIMS: usize = 48;
/// Its longest input, special tokens included.
pub const MAX_TOKENS: usize = 48;
/// `[CLS]` and `[SEP]`.
pub const SPECIALS: (u32, u32) = (2, 3);

const WORDS: &str = "the a is my where card bank money rain snow wind weather soup rice cake food please refund not has \
                     arrived transfer how do i get new one lost stolen help with account open close pay fee rate city";

/// Writes the folder of a sentence encoder into `dir`, which is created. It is always the same.
pub fn write(dir: &Path) {
    std::fs::create_dir_all(dir.join("1_Pooling")).unwrap();
    let golden = Golden::load("encoder");
    for name in [
        "config.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    ] {
        std::fs::copy(golden.model_dir().join(name), dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
}

/// WordPiece over single characters and some words, 150 tokens at most.
fn tokenizer_json() -> Value {
    let characters = ('a'..='z').chain('0'..='9');
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
    let mut vocab = Map::new();
    let tokens = specials
        .iter()
        .cloned()
        .chain(characters.clone().map(|c| c.to_string()))
        .chain(characters.map(|c| format!("##{c}")))
        .chain("!?.,:;'\"-+()/@#$%&".chars().map(|c| c.to_string()))
        .chain(WORDS.split_whitespace().map(str::to_owned));
    for token in tokens {
        let id = vocab.len();
        vocab.entry(token).or_insert(json!(id));
    }
    assert!(vocab.len() <= 150, "{} tokens", vocab.len());
    let added = specials.iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0",
        "truncation": {"max_length": 16, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}
