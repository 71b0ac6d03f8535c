//! Hugging Face folders: single, sharded, old, broken.

#![allow(clippy::unwrap_used)]

use bantam_formats::{
    DType, FormatError, ModelFiles, Problem, TensorRef, open_model, write_safetensors,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn put(dir: &Path, name: &str, text: impl ToString) {
    fs::write(dir.join(name), text.to_string()).unwrap();
}

fn put_weights(dir: &Path, name: &str, tensors: &[&str]) {
    let tensors: Vec<TensorRef<'_>> = tensors
        .iter()
        .map(|name| TensorRef {
            name,
            dtype: DType::F32,
            shape: vec![2],
            bytes: &[7; 8],
        })
        .collect();
    write_safetensors(&dir.join(name), &tensors, &BTreeMap::new()).unwrap();
}

/// A folder with a configuration and no weights.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2,
    });
    put(dir.path(), "config.json", config);
    dir
}

fn open(dir: &Path) -> bantam_formats::HfFolder {
    match open_model(dir).unwrap() {
        ModelFiles::Hf(folder) => folder,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_single_file() {
    let dir = folder();
    put_weights(dir.path(), "model.safetensors", &["a", "b"]);
    let model = open(dir.path());
    assert_eq!(model.tensors().len(), 2);
    assert_eq!(model.tensor("b").unwrap().bytes, [7; 8]);
    assert_eq!(model.tensor("c"), None);
    assert_eq!(model.eos_token_ids(), [2]);
    assert_eq!(model.chat_template(), None);
    assert!(
        model
            .tokenizer_json()
            .unwrap_err()
            .to_string()
            .contains("`tokenizer.json`")
    );
}

#[test]
fn the_small_files() {
    let dir = folder();
    put_weights(dir.path(), "model.safetensors", &["a"]);
    put(dir.path(), "tokenizer.json", "{}");
    put(
        dir.path(),
        "generation_config.json",
        json!({"eos_token_id": [2, 3], "temperature": 0.6}),
    );
    put(
        dir.path(),
        "tokenizer_config.json",
        json!({"eos_token": {"content": "<|im_end|>"}, "chat_template": "in the config"}),
    );
    put(
        dir.path(),
        "special_tokens_map.json",
        json!({"bos_token": "<s>", "eos_token": "</s>"}),
    );
    let model = open(dir.path());
    assert_eq!(model.tokenizer_json().unwrap(), b"{}");
    assert_eq!(model.eos_token_ids(), [2, 3]);
    assert_eq!(model.chat_template(), Some("in the config"));
    let tokens = model.tokenizer_config();
    assert_eq!(tokens.eos_token.as_deref(), Some("<|im_end|>"));
    assert_eq!(tokens.bos_token.as_deref(), Some("<s>"));

    put(
        dir.path(),
        "chat_template.json",
        json!({"chat_template": "in json"}),
    );
    assert_eq!(open(dir.path()).chat_template(), Some("in json"));
    put(dir.path(), "chat_template.jinja", "in a file");
    assert_eq!(open(dir.path()).chat_template(), Some("in a file"));
}

#[test]
fn shards_under_an_index() {
    let dir = folder();
    put_weights(dir.path(), "model-1.safetensors", &["a", "b"]);
    put_weights(dir.path(), "model-2.safetensors", &["c"]);
    let index = json!({"metadata": {"total_size": 24}, "weight_map": {
        "a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}});
    put(dir.path(), "model.safetensors.index.json", index);
    let model = open(dir.path());
    let names: Vec<_> = model
        .tensors()
        .iter()
        .map(|info| info.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(model.tensor("c").unwrap().shape, [2]);
}

fn problem(dir: &Path) -> Problem {
    match open_model(dir) {
        Err(FormatError::Invalid { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_index_cannot_lead_out_of_the_folder_or_lie() {
    let dir = folder();
    put_weights(dir.path(), "model-1.safetensors", &["a"]);
    for file in [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "",
        ".",
        "c:x",
        "a\\b",
        "a\0b",
    ] {
        let index = json!({"weight_map": {"a": file}});
        put(dir.path(), "model.safetensors.index.json", index);
        assert!(
            matches!(problem(dir.path()), Problem::Escape { .. }),
            "{file}"
        );
    }
    let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}});
    put(dir.path(), "model.safetensors.index.json", index);
    assert!(problem(dir.path()).to_string().starts_with("tensor `b`"));
    put(
        dir.path(),
        "model.safetensors.index.json",
        json!({"weight_map": {"a": "model-9.safetensors"}}),
    );
    assert!(
        open_model(dir.path())
            .unwrap_err()
            .to_string()
            .contains("model-9.safetensors")
    );
}

#[test]
fn what_is_not_a_model_is_told_what_would_be() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &Path| open_model(path).unwrap_err().to_string();
    assert!(error(dir.path()).contains("has no `config.json`"));
    let dir = folder();
    assert!(error(dir.path()).contains("neither `model.safetensors` nor"));
    put(dir.path(), "pytorch_model.bin", "");
    assert!(error(dir.path()).contains("save it as safetensors"));
    put_weights(dir.path(), "model.safetensors", &["a"]);
    assert!(error(&dir.path().join("model.safetensors")).contains("name the folder"));
    assert!(error(&dir.path().join("config.json")).contains("not a GGUF file"));
    assert!(error(&dir.path().join("nothing")).contains("cannot open"));
    put(dir.path(), "config.json", "{");
    assert!(matches!(problem(dir.path()), Problem::Json { .. }));
    put(dir.path(), "config.json", " ".repeat(5 << 20));
    assert!(matches!(problem(dir.path()), Problem::OverCap { .. }));
}

/// The miniature models of the goldens, whose weights the reference implementation wrote.
#[test]
fn the_folders_of_the_goldens_are_read() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens");
    for name in ["biased", "mha", "tied"] {
        let model = open(&goldens.join(name));
        let embedding = model.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!(
            embedding.shape,
            [model.config.vocab_size, model.config.hidden_size],
            "{name}"
        );
        let key = model
            .tensor("model.layers.0.self_attn.k_proj.weight")
            .unwrap();
        let rows = model.config.n_kv_heads() * model.config.head_width();
        assert_eq!(key.shape, [rows, model.config.hidden_size], "{name}");
    }
}
