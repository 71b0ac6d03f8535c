//! What a GGUF file needs that a Hugging Face folder says in other words: metadata, names, the order of rows.

use bantam_formats::{Array, HfFolder, Metadata, Value};
use bantam_model::{ModelConfig, Proj, RopeScaling};

use super::tokenizer::gguf_tokenizer;

/// The architecture GGUF files call this folder's, and whether their queries and keys are interleaved.
pub(super) fn architecture(folder: &HfFolder) -> (&'static str, bool) {
    match folder.config.model_type.as_deref() {
        Some("qwen2") => ("qwen2", false),
        // Mistral's blocks are Llama's, and its files say so.
        _ => ("llama", true),
    }
}

/// All metadata, or the reason why there cannot be any.
pub(super) fn metadata(
    folder: &HfFolder,
    c: &ModelConfig,
    template: Option<&str>,
) -> Result<Metadata, String> {
    let (arch, _) = architecture(folder);
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", arch);
    if let Some(name) = folder.path().file_name() {
        metadata.insert("general.name", name.to_string_lossy().into_owned());
    }
    let mut put = |key: &str, value: Value| metadata.insert(format!("{arch}.{key}"), value);
    for (key, n) in [
        ("vocab_size", c.vocab),
        ("context_length", c.max_context),
        ("embedding_length", c.d_model),
        ("block_count", c.n_layers),
        ("feed_forward_length", c.d_ffn),
        ("attention.head_count", c.n_heads),
        ("attention.head_count_kv", c.n_kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
    ] {
        put(key, Value::U32(n as u32));
    }
    put(
        "attention.layer_norm_rms_epsilon",
        Value::F32(c.rms_norm_eps as f32),
    );
    put("rope.freq_base", Value::F32(c.rope_theta as f32));
    match c.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            put("rope.scaling.type", Value::from("linear"));
            put("rope.scaling.factor", Value::F32(factor as f32));
        }
        RopeScaling::Llama3 { .. } => {
            return Err(
                "its rope scaling `llama3` is not written to GGUF files; merge to a folder instead"
                    .to_string(),
            );
        }
    }
    let json = folder.tokenizer_json().map_err(|e| e.to_string())?;
    let json = serde_json::from_slice(&json).map_err(|e| format!("tokenizer.json: {e}"))?;
    let tokenizer = gguf_tokenizer(&json, c.vocab)?;
    let id = |token: &Option<String>| {
        let token = token.as_ref()?;
        tokenizer
            .tokens
            .iter()
            .position(|t| t == token)
            .map(|id| id as u32)
    };
    let named = folder.tokenizer_config();
    let ids = [
        ("bos", id(&named.bos_token)),
        (
            "eos",
            folder
                .eos_token_ids()
                .first()
                .copied()
                .or(id(&named.eos_token)),
        ),
        ("padding", id(&named.pad_token)),
        ("unknown", id(&named.unk_token)),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            metadata.insert(format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    metadata.insert(
        "tokenizer.ggml.add_bos_token",
        named.add_bos_token.unwrap_or(false),
    );
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", tokenizer.pre);
    metadata.insert("tokenizer.ggml.tokens", Array::Str(tokenizer.tokens));
    metadata.insert("tokenizer.ggml.token_type", Array::I32(tokenizer.types));
    metadata.insert("tokenizer.ggml.merges", Array::Str(tokenizer.merges));
    if let Some(template) = template.or(folder.chat_template()) {
        metadata.insert("tokenizer.chat_template", template);
    }
    Ok(metadata)
}

/// `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight` and so on.
pub(super) fn gguf_name(name: &str) -> String {
    let within = |rest: &str| {
        let (layer, module) = rest.split_once('.')?;
        let (module, kind) = module.rsplit_once('.')?;
        let module = match Proj::ALL.into_iter().find(|proj| proj.path() == module) {
            Some(Proj::Q) => "attn_q",
            Some(Proj::K) => "attn_k",
            Some(Proj::V) => "attn_v",
            Some(Proj::O) => "attn_output",
            Some(Proj::Gate) => "ffn_gate",
            Some(Proj::Up) => "ffn_up",
            Some(Proj::Down) => "ffn_down",
            None if module == "input_layernorm" => "attn_norm",
            None => "ffn_norm",
        };
        Some(format!("blk.{layer}.{module}.{kind}"))
    };
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_string(),
        "model.norm.weight" => "output_norm.weight".to_string(),
        "lm_head.weight" => "output.weight".to_string(),
        _ => name
            .strip_prefix("model.layers.")
            .and_then(within)
            .unwrap_or_else(|| name.to_string()),
    }
}

/// Puts the two halves of each head's rows side by side, pair by pair, as files of architecture `llama` have them.
///
/// Math: new row i of a head is old row (i mod 2) Dh/2 + i / 2
pub(super) fn interleave(name: &str, values: &mut [f32], c: &ModelConfig) {
    let n_heads = match name {
        _ if name.contains(".q_proj.") => c.n_heads,
        _ if name.contains(".k_proj.") => c.n_kv_heads,
        _ => return,
    };
    let cols = values.len() / (n_heads * c.head_dim);
    for head in values.chunks_exact_mut(c.head_dim * cols) {
        let old = head.to_vec();
        for (i, row) in head.chunks_exact_mut(cols).enumerate() {
            let from = (i % 2) * (c.head_dim / 2) + i / 2;
            row.copy_from_slice(&old[from * cols..][..cols]);
        }
    }
}
