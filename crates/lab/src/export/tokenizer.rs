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

/// What GGUF metadata say of a tokenizer.
pub(super) struct GgufTokenizer {
    /// Name of the pre-tokenizer.
    pub(super) pre: &'static str,
    /// Spelling of each id.
    pub(super) tokens: Vec<String>,
    /// Type of each id.
    pub(super) types: Vec<i32>,
    /// Merges, two spellings with a space between.
    pub(super) merges: Vec<String>,
}

/// The opposite of [`hf_tokenizer`], for a model of `vocab` rows; or the reason why there is none.
pub(super) fn gguf_tokenizer(json: &Value, vocab: usize) -> Result<GgufTokenizer, String> {
    const NORMAL: i32 = 1;
    const UNUSED: i32 = 5;
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true {
        return Err(
            "its tokenizer is not byte-level BPE, the only kind written to GGUF files".to_string(),
        );
    }
    let wanted = how_it_splits(&json["pre_tokenizer"]);
    let known = ["smollm", "gpt-2", "llama-bpe", "qwen2"];
    let pre = known
        .into_iter()
        .find(|pre| pre_tokenizer(pre).is_some_and(|p| how_it_splits(&p) == wanted))
        .ok_or("its pre-tokenizer has no name in GGUF files")?;
    let mut tokens: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; vocab];
    let mut put = |token: &str, id: &Value, kind: i32| {
        let place = id
            .as_u64()
            .and_then(|id| usize::try_from(id).ok())
            .filter(|id| *id < vocab);
        let place = place.ok_or_else(|| {
            format!("its token {token:?} has the id {id}, beyond the model's {vocab}")
        })?;
        tokens[place] = token.to_string();
        types[place] = kind;
        Ok::<(), String>(())
    };
    for (token, id) in model["vocab"].as_object().into_iter().flatten() {
        put(token, id, NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
        put(
            added["content"].as_str().unwrap_or_default(),
            &added["id"],
            kind as i32,
        )?;
    }
    let merge = |merge: &Value| match merge {
        Value::String(pair) => Some(pair.clone()),
        pair => Some(format!(
            "{} {}",
            pair.get(0)?.as_str()?,
            pair.get(1)?.as_str()?
        )),
    };
    let merges: Option<Vec<String>> = model["merges"]
        .as_array()
        .into_iter()
        .flatten()
        .map(merge)
        .collect();
    let merges = merges.ok_or("tokenizer.json: a merge is not two tokens")?;
    Ok(GgufTokenizer {
        pre,
        tokens,
        types,
        merges,
    })
}

/// A pre-tokenizer without what does not change the tokens: offsets are not kept.
fn how_it_splits(pre_tokenizer: &Value) -> Value {
    let mut value = pre_tokenizer.clone();
    let steps = match &mut value {
        Value::Object(map) if map.contains_key("pretokenizers") => {
            map["pretokenizers"].as_array_mut()
        }
        _ => None,
    };
    let strip = |step: &mut Value| {
        if let Value::Object(step) = step {
            step.remove("trim_offsets");
        }
    };
    match steps {
        Some(steps) => steps.iter_mut().for_each(strip),
        None => strip(&mut value),
    }
    value
}
