//! A Hugging Face tokenizer from what a GGUF file says of its own.

use bantam_formats::Metadata;
use serde_json::{Map, Value, json};

/// Token types of GGUF that are not ordinary text.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// How text is cut before merging: one step a line, in Hugging Face's terms.
fn pre_tokenizer(pre: &str) -> Option<Value> {
    const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
    const REST: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |numbers: &str| {
        let pattern = format!("{WORDS}{numbers}{REST}");
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    Some(match pre {
        "gpt-2" | "default" => bytes(true),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]})
        }
        "llama-bpe" | "llama3" | "llama-v3" => split(r"\p{N}{1,3}"),
        "qwen2" => split(r"\p{N}"),
        _ => return None,
    })
}

/// `tokenizer.json`, or the reason why there cannot be one.
pub(super) fn hf_tokenizer(metadata: &Metadata) -> Result<Value, String> {
    let model = metadata.str("tokenizer.ggml.model").unwrap_or("none");
    if model != "gpt2" {
        return Err(format!(
            "its tokenizer is of kind `{model}`, and only byte-level BPE (`gpt2`) can be put into a folder"
        ));
    }
    let pre = metadata.str("tokenizer.ggml.pre").unwrap_or("default");
    let pre_tokenizer = pre_tokenizer(pre).ok_or_else(|| {
        format!("its pre-tokenizer `{pre}` is not one that can be put into a folder")
    })?;
    let list = |key: &str| {
        metadata
            .str_array(key)
            .ok_or_else(|| format!("`{key}` is missing"))
    };
    let (tokens, merges) = (
        list("tokenizer.ggml.tokens")?,
        list("tokenizer.ggml.merges")?,
    );
    let types = metadata
        .u32_array("tokenizer.ggml.token_type")
        .unwrap_or_default();
    let (mut vocab, mut added) = (Map::new(), Vec::new());
    for (id, token) in tokens.iter().enumerate() {
        vocab.insert(token.clone(), id.into());
        let kind = types.get(id).copied().unwrap_or(1);
        if kind == CONTROL || kind == USER_DEFINED {
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind == CONTROL,
            }));
        }
    }
    let normalizer = if pre == "qwen2" {
        json!({"type": "NFC"})
    } else {
        Value::Null
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.starts_with("llama"), "vocab": vocab, "merges": merges,
        },
    }))
}

/// `tokenizer_config.json`: special tokens by name, and the template.
pub(super) fn hf_tokenizer_config(metadata: &Metadata, max_context: usize) -> Value {
    let tokens = metadata
        .str_array("tokenizer.ggml.tokens")
        .unwrap_or_default();
    let token = |key: &str| {
        let id = metadata.u64(&format!("tokenizer.ggml.{key}_token_id"))?;
        tokens.get(usize::try_from(id).ok()?).cloned()
    };
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_context,
        "add_bos_token": metadata.bool("tokenizer.ggml.add_bos_token").unwrap_or(false),
    });
    let names = [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ];
    for (name, key) in names {
        if let Some(token) = token(key) {
            config[name] = json!(token);
        }
    }
    if let Some(template) = metadata.str("tokenizer.chat_template") {
        config["chat_template"] = json!(template);
    }
    config
}
