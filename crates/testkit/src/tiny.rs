//! A whole chat model in a folder, small enough to train, judge and serve within a test's second.
//!
//! Two Llama layers over a byte-level BPE of about 320 tokens with the ChatML template: everything that the
//! real loop touches, with nothing to download. The weights are random, so what it says before training is noise.

use std::path::Path;

use safetensors::{Dtype, View};
use serde_json::{Value, json};

use crate::rng::Rng;

/// The model's width `D`.
pub const D_MODEL: usize = 64;
/// Its number of layers.
pub const N_LAYERS: usize = 2;
/// Its longest context, short enough to overflow in a test.
pub const MAX_CONTEXT: usize = 512;
/// `<|endoftext|>`.
pub const END_OF_TEXT: u32 = 0;
/// `<|im_start|>`.
pub const IM_START: u32 = 1;
/// `<|im_end|>`, the end of a turn.
pub const IM_END: u32 = 2;

const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Messages as ChatML. No default system prompt, so a row is exactly what its messages say.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
     + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Merges in rank order; both halves of each are single bytes or results of earlier merges. `Ġ` is the space.
const MERGES: &str = "Ġ t|h e|i n|Ġ a|r e|o n|Ġt he|e r|Ġ s|a t|o u|Ġ w|i s|Ġ c|e s|in g|Ġ b|o r|e n|Ġ m|l l|Ġ p|i t|Ġ f|a n|l e|a r|\
s t|Ġ o|e d|Ġo f|a s|Ġ h|Ġ d|i d|a l|Ġt o|i c|Ġ n|o m|n d|Ġa nd|u s|us er|s y|sy st|e m|syst em|as s|is t|\
ass ist|an t|assist ant";

/// Writes `config.json`, `generation_config.json`, `model.safetensors` (BF16), `tokenizer.json` and
/// `tokenizer_config.json` into `dir`, which is created. The same seed always gives the same bytes.
pub fn write_model(dir: &Path, seed: u64) {
    std::fs::create_dir_all(dir).unwrap();
    let write_json = |name: &str, value: Value| {
        let text = serde_json::to_string_pretty(&value).unwrap() + "\n";
        std::fs::write(dir.join(name), text).unwrap();
    };
    let tokenizer = tokenizer_json();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap().len();
    write_json("tokenizer.json", tokenizer);
    write_json("tokenizer_config.json", tokenizer_config());
    write_json("config.json", config(vocab));
    write_json(
        "generation_config.json",
        json!({"bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": IM_END}),
    );
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(
        weights(vocab, seed),
        Some(metadata),
        &dir.join("model.safetensors"),
    )
    .unwrap();
}

/// Writes `n_rows` of `{"text", "label"}` to `path`: three labels that one word of the text decides.
///
/// The system prompt to go with them is [`SYSTEM`].
pub fn write_rows(path: &Path, n_rows: usize, seed: u64) {
    const THINGS: [(&str, &str); 9] = [
        ("card", "money"),
        ("bank", "money"),
        ("coin", "money"),
        ("rain", "weather"),
        ("snow", "weather"),
        ("wind", "weather"),
        ("soup", "food"),
        ("rice", "food"),
        ("cake", "food"),
    ];
    const FRAMES: [&str; 4] = [
        "where is the {}?",
        "tell me about {}",
        "I lost a {} today",
        "is there more {} to come",
    ];
    let mut rng = Rng::new(seed);
    let mut out = String::new();
    for _ in 0..n_rows {
        let (thing, label) = THINGS[rng.below(THINGS.len())];
        let text = FRAMES[rng.below(FRAMES.len())].replace("{}", thing);
        out += &format!("{}\n", json!({"text": text, "label": label}));
    }
    std::fs::write(path, out).unwrap();
}

/// The system prompt for [`write_rows`].
pub const SYSTEM: &str = "Name the topic.";

fn config(vocab: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "max_position_embeddings": MAX_CONTEXT,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "pad_token_id": IM_END,
    })
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": SPECIALS[IM_START as usize],
        "eos_token": SPECIALS[IM_END as usize],
        "pad_token": SPECIALS[IM_END as usize],
        "unk_token": SPECIALS[END_OF_TEXT as usize],
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": MAX_CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    })
}

/// A byte-level BPE with SmolLM2's layout: three specials, the 256 bytes, then one token a merge.
pub fn tokenizer_json() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert_with(|| id.into());
    };
    SPECIALS.iter().for_each(|s| add((*s).to_owned()));
    (0..=255u8).for_each(|b| add(byte_char(b).to_string()));
    let merges: Vec<(&str, &str)> = MERGES
        .split('|')
        .filter_map(|m| m.split_once(' '))
        .collect();
    merges.iter().for_each(|(a, b)| add(format!("{a}{b}")));
    let merges: Vec<Value> = merges
        .iter()
        .map(|(a, b)| json!(format!("{a} {b}")))
        .collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// GPT-2's printable stand-in for a byte: itself where it is visible, else the next free code point from 256.
fn byte_char(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        char::from(byte)
    } else {
        let n_before = (0..byte).filter(|&b| !visible(b)).count() as u32;
        char::from_u32(256 + n_before).expect("below 512, so no surrogate")
    }
}

struct Bf16 {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Bf16 {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes.as_slice().into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn weights(vocab: usize, seed: u64) -> Vec<(String, Bf16)> {
    let (d, kv, ffn) = (D_MODEL, 32, 128);
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    // bf16 is the upper half of an f32; cutting the rest off is rounding enough for random numbers.
    let mut add = |name: String, shape: &[usize], mean: f32, scale: f64| {
        let values = rng.normals(shape.iter().product(), scale);
        let bytes = values
            .iter()
            .flat_map(|x| ((x + mean).to_bits() >> 16).to_le_bytes()[..2].to_vec())
            .collect();
        out.push((
            name,
            Bf16 {
                shape: shape.to_vec(),
                bytes,
            },
        ));
    };
    add("model.embed_tokens.weight".into(), &[vocab, d], 0.0, 0.2);
    for layer in 0..N_LAYERS {
        for (name, rows, cols) in [
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", ffn, d),
            ("mlp.up_proj", ffn, d),
            ("mlp.down_proj", d, ffn),
        ] {
            add(
                format!("model.layers.{layer}.{name}.weight"),
                &[rows, cols],
                0.0,
                (cols as f64).powf(-0.5),
            );
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(
                format!("model.layers.{layer}.{name}.weight"),
                &[d],
                1.0,
                0.1,
            );
        }
    }
    add("model.norm.weight".into(), &[d], 1.0, 0.1);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_merge_is_made_of_known_tokens() {
        let tokenizer = tokenizer_json();
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
        let mut rank = std::collections::HashSet::new();
        for merge in tokenizer["model"]["merges"].as_array().unwrap() {
            let (a, b) = merge.as_str().unwrap().split_once(' ').unwrap();
            for half in [a, b] {
                assert!(
                    half.chars().count() == 1 || rank.contains(half),
                    "`{half}` is not merged before `{a} {b}`"
                );
            }
            assert!(vocab.contains_key(&format!("{a}{b}")));
            assert!(rank.insert(format!("{a}{b}")), "`{a} {b}` is there twice");
        }
        let ids: std::collections::BTreeSet<u64> =
            vocab.values().map(|v| v.as_u64().unwrap()).collect();
        assert!(
            ids.iter().copied().eq(0..vocab.len() as u64),
            "ids are dense"
        );
    }

    #[test]
    fn the_same_seed_writes_the_same_bytes() {
        let dir = std::env::temp_dir().join(format!("bantam-testkit-{}", std::process::id()));
        let read = |seed| {
            write_model(&dir, seed);
            std::fs::read(dir.join("model.safetensors")).unwrap()
        };
        let (a, again, b) = (read(1), read(1), read(2));
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(a, again);
        assert_ne!(a, b);
    }

    #[test]
    fn bytes_have_distinct_printable_stand_ins() {
        let chars: std::collections::HashSet<char> = (0..=255).map(byte_char).collect();
        assert_eq!(chars.len(), 256);
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
    }
}
