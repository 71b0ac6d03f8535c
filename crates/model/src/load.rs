//! From files to a model: GGUF and Hugging Face folders of the Llama family.

use crate::linear::Weights;
use crate::weights::{Blocks, Model, TensorSource};
use crate::{ConfigError, ModelConfig, Proj, RopeScaling};
use bantam_formats::gguf::Gguf;
use bantam_formats::hf::HfFolder;
use bantam_formats::{DType, ModelFiles, TensorRef};
use bantam_kernels::quant::{Format, dequantize};
use bantam_kernels::{Compute, Real};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Why files do not make a model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Sizes or variants.
    #[error("the model's configuration: {0}")]
    Config(#[from] ConfigError),
    /// A weight that every model of this configuration has.
    #[error(
        "tensor `{0}` is missing (hint: the file may be incomplete, or of another architecture)"
    )]
    MissingTensor(String),
    /// A weight of another shape than the configuration says.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// As the file has it.
        name: String,
        /// Row-major.
        found: Vec<usize>,
        /// Row-major.
        expected: Vec<usize>,
    },
    /// A weight that a model of the Llama family does not have.
    #[error(
        "tensor `{0}` has no place in a model of the Llama family (hint: leaving it out would change the answers)"
    )]
    UnknownTensor(String),
}

/// The weights of a file by Hugging Face names and in Hugging Face order, in f32.
///
/// GGUF files of architecture `llama` hold the rows of queries and keys in another order (pairs
/// of the rotation side by side); this undoes it, and [`FileSource::to_file_rows`] redoes it.
#[derive(Debug)]
pub struct FileSource<'a> {
    files: &'a ModelFiles,
    config: &'a ModelConfig,
    used: BTreeSet<String>,
}

impl<'a> FileSource<'a> {
    /// Reads from `files`, whose configuration is `config`.
    pub fn new(files: &'a ModelFiles, config: &'a ModelConfig) -> Self {
        Self {
            files,
            config,
            used: BTreeSet::new(),
        }
    }

    /// The file's own name of the tensor that Hugging Face calls `name`.
    pub fn file_name(&self, name: &str) -> String {
        match self.files {
            ModelFiles::Gguf(_) => gguf_name(name),
            ModelFiles::Hf(_) => name.to_owned(),
        }
    }

    /// Puts rows of a weight or bias back into the file's order, in place.
    pub fn to_file_rows(&self, name: &str, values: &mut [f32]) {
        if let Some(n_heads) = self.interleaved_heads(name) {
            permute_heads(values, n_heads, self.config.head_dim, |half, i| {
                (i % 2) * half + i / 2
            });
        }
    }

    /// Heads in a tensor whose rows the file interleaves.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let ModelFiles::Gguf(gguf) = self.files else {
            return None;
        };
        if gguf.metadata().architecture() != Some("llama") {
            return None;
        }
        if name.contains("q_proj") {
            Some(self.config.n_heads)
        } else if name.contains("k_proj") {
            Some(self.config.n_kv_heads)
        } else {
            None
        }
    }

    /// Refuses a file that holds weights nothing has read.
    fn check_all_used(&self) -> Result<(), LoadError> {
        let harmless = |name: &str| {
            name.ends_with("rotary_emb.inv_freq")
                || name == "rope_freqs.weight"
                || (self.config.tied_head && name == "lm_head.weight")
        };
        match self
            .files
            .tensors()
            .iter()
            .find(|t| !self.used.contains(&t.name) && !harmless(&t.name))
        {
            Some(tensor) => Err(LoadError::UnknownTensor(tensor.name.clone())),
            None => Ok(()),
        }
    }
}

impl<'a> FileSource<'a> {
    /// Finds a tensor, checks its shape and notes that it has been read.
    fn find(&mut self, name: &str, shape: &[usize]) -> Result<Option<TensorRef<'a>>, LoadError> {
        let file_name = self.file_name(name);
        let Some(tensor) = self.files.tensor(&file_name) else {
            return Ok(None);
        };
        if tensor.shape != shape {
            let (found, expected) = (tensor.shape, shape.to_vec());
            return Err(LoadError::Shape {
                name: file_name,
                found,
                expected,
            });
        }
        self.used.insert(file_name);
        Ok(Some(tensor))
    }
}

/// Row `i` of a head in Hugging Face order is this row of the head in the file.
fn file_row(half: usize, i: usize) -> usize {
    (i % half) * 2 + i / half
}

impl<'a> TensorSource<'a> for FileSource<'a> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(tensor) = self.find(name, shape)? else {
            return Ok(None);
        };
        let mut values = read(&tensor);
        if let Some(n_heads) = self.interleaved_heads(name) {
            permute_heads(&mut values, n_heads, self.config.head_dim, file_row);
        }
        Ok(Some(values))
    }

    fn blocks(&mut self, name: &str, shape: &[usize]) -> Result<Option<Blocks<'a>>, LoadError> {
        let Some(tensor) = self.find(name, shape)? else {
            return Ok(None);
        };
        let mut bytes = Cow::Borrowed(tensor.bytes);
        if let Some(n_heads) = self.interleaved_heads(name) {
            let head_dim = self.config.head_dim;
            permute_heads(bytes.to_mut(), n_heads, head_dim, file_row);
        }
        let format = block_format(tensor.dtype);
        Ok(Some(Blocks { format, bytes }))
    }

    fn done_with(&mut self, name: &str) {
        self.files.forget(&self.file_name(name));
    }
}

impl<R: Real> Model<R> {
    /// As [`Model::load_on`], on every core.
    pub fn load(files: &ModelFiles, weights: Weights, trainable: bool) -> Result<Self, LoadError> {
        Self::load_on(&Compute::detect(), files, weights, trainable)
    }

    /// Reads and packs the weights of `files`; `trainable` also packs what gradients flow
    /// through, which block formats do not have: they become bf16.
    pub fn load_on(
        compute: &Compute,
        files: &ModelFiles,
        weights: Weights,
        trainable: bool,
    ) -> Result<Self, LoadError> {
        let config = ModelConfig::from_files(files)?;
        let mut source = FileSource::new(files, &config);
        let model = Model::from_source(compute, config.clone(), &mut source, weights, trainable)?;
        source.check_all_used()?;
        Ok(model)
    }
}

impl ModelConfig {
    /// The configuration of a GGUF file or a Hugging Face folder.
    pub fn from_files(files: &ModelFiles) -> Result<Self, ConfigError> {
        match files {
            ModelFiles::Gguf(gguf) => from_gguf(gguf)?.validate(),
            ModelFiles::Hf(folder) => from_hf(folder)?.validate(),
        }
    }
}

const ARCHITECTURES: [&str; 3] = ["llama", "mistral", "qwen2"];

fn check_architecture(name: &str) -> Result<(), ConfigError> {
    if ARCHITECTURES.contains(&name) {
        return Ok(());
    }
    let hint = ARCHITECTURES.map(|name| format!("`{name}`")).join(", ");
    Err(ConfigError::Unsupported {
        what: format!("architecture `{name}`"),
        hint,
    })
}

fn unsupported(what: String, hint: &str) -> ConfigError {
    ConfigError::Unsupported {
        what,
        hint: hint.to_owned(),
    }
}

fn from_hf(folder: &HfFolder) -> Result<ModelConfig, ConfigError> {
    let hf = &folder.config;
    check_architecture(hf.model_type.as_deref().unwrap_or("unknown"))?;
    if let Some(act) = hf.hidden_act.as_deref().filter(|act| *act != "silu") {
        return Err(unsupported(format!("activation `{act}`"), "`silu`"));
    }
    if hf.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
        return Err(unsupported(
            "`partial_rotary_factor`".into(),
            "heads rotated whole",
        ));
    }
    let slides = hf.use_sliding_window.unwrap_or(true)
        && hf
            .sliding_window
            .is_some_and(|window| window < hf.context());
    if slides {
        return Err(unsupported(
            "`sliding_window`".into(),
            "attention over the whole context",
        ));
    }
    let rope_scaling = match hf.rope() {
        None => RopeScaling::None,
        Some(rope) => {
            let need = |value: Option<f64>, name: &str| {
                value.ok_or_else(|| ConfigError::Missing(format!("rope_scaling.{name}")))
            };
            match rope.kind() {
                "linear" => RopeScaling::Linear {
                    factor: need(rope.factor, "factor")?,
                },
                "llama3" => RopeScaling::Llama3 {
                    factor: need(rope.factor, "factor")?,
                    low_freq_factor: need(rope.low_freq_factor, "low_freq_factor")?,
                    high_freq_factor: need(rope.high_freq_factor, "high_freq_factor")?,
                    original: need(
                        rope.original_max_position_embeddings.map(|n| n as f64),
                        "original_max_position_embeddings",
                    )?,
                },
                kind => {
                    return Err(unsupported(
                        format!("rope_scaling `{kind}`"),
                        "`linear`, `llama3`",
                    ));
                }
            }
        }
    };
    Ok(ModelConfig {
        vocab: hf.vocab_size,
        d_model: hf.hidden_size,
        n_layers: hf.num_hidden_layers,
        n_heads: hf.num_attention_heads,
        n_kv_heads: hf.n_kv_heads(),
        head_dim: hf.head_width(),
        d_ffn: hf.intermediate_size,
        rms_norm_eps: hf.rms_norm_eps,
        rope_theta: hf.rope_base(),
        rope_scaling,
        // Absent means untied for Llama, but such files may still lack a head of their own.
        tied_head: hf
            .tie_word_embeddings
            .unwrap_or_else(|| folder.tensor("lm_head.weight").is_none()),
        max_context: hf.context(),
    })
}

fn from_gguf(gguf: &Gguf) -> Result<ModelConfig, ConfigError> {
    let metadata = gguf.metadata();
    let arch = metadata
        .architecture()
        .ok_or_else(|| ConfigError::Missing("general.architecture".into()))?;
    check_architecture(arch)?;
    let key = |name: &str| format!("{arch}.{name}");
    let maybe = |name: &str| {
        metadata
            .u64(&key(name))
            .and_then(|n| usize::try_from(n).ok())
    };
    let count = |name: &str| maybe(name).ok_or_else(|| ConfigError::Missing(key(name)));
    let table = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| ConfigError::Missing("token_embd.weight".into()))?;
    let (d_model, n_heads) = (count("embedding_length")?, count("attention.head_count")?);
    let head_dim = maybe("attention.key_length").unwrap_or(d_model / n_heads.max(1));
    if maybe("rope.dimension_count").is_some_and(|n| n != head_dim) {
        return Err(unsupported(
            format!("`{}`", key("rope.dimension_count")),
            "heads rotated whole",
        ));
    }
    let rope_scaling = match metadata.str(&key("rope.scaling.type")) {
        _ if gguf.tensor("rope_freqs.weight").is_some() => {
            return Err(unsupported(
                "`rope_freqs.weight`".into(),
                "rope scaling `linear`; a Hugging Face folder of this model works",
            ));
        }
        None | Some("none") => RopeScaling::None,
        Some("linear") => {
            let factor = metadata.f64(&key("rope.scaling.factor"));
            RopeScaling::Linear {
                factor: factor.ok_or_else(|| ConfigError::Missing(key("rope.scaling.factor")))?,
            }
        }
        Some(kind) => return Err(unsupported(format!("rope scaling `{kind}`"), "`linear`")),
    };
    let eps = key("attention.layer_norm_rms_epsilon");
    Ok(ModelConfig {
        vocab: table.shape.first().copied().unwrap_or(0),
        d_model,
        n_layers: count("block_count")?,
        n_heads,
        n_kv_heads: maybe("attention.head_count_kv").unwrap_or(n_heads),
        head_dim,
        d_ffn: count("feed_forward_length")?,
        rms_norm_eps: metadata.f64(&eps).ok_or(ConfigError::Missing(eps))?,
        rope_theta: metadata.f64(&key("rope.freq_base")).unwrap_or(10_000.0),
        rope_scaling,
        tied_head: gguf.tensor("output.weight").is_none(),
        max_context: count("context_length")?,
    })
}

/// `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight` and so on.
fn gguf_name(name: &str) -> String {
    let plain = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => "",
    };
    if !plain.is_empty() {
        return plain.to_owned();
    }
    let within = |rest: &str| -> Option<String> {
        let (layer, module) = rest.split_once('.')?;
        let (module, kind) = module.rsplit_once('.')?;
        let module = match module {
            "input_layernorm" => "attn_norm",
            "post_attention_layernorm" => "ffn_norm",
            path => match Proj::ALL.into_iter().find(|proj| proj.path() == path)? {
                Proj::Q => "attn_q",
                Proj::K => "attn_k",
                Proj::V => "attn_v",
                Proj::O => "attn_output",
                Proj::Gate => "ffn_gate",
                Proj::Up => "ffn_up",
                Proj::Down => "ffn_down",
            },
        };
        Some(format!("blk.{layer}.{module}.{kind}"))
    };
    name.strip_prefix("model.layers.")
        .and_then(within)
        .unwrap_or_else(|| name.to_owned())
}

/// Reorders the rows of each head: new row `i` is old row `old(head_dim / 2, i)`.
fn permute_heads<T: Copy>(
    values: &mut [T],
    n_heads: usize,
    head_dim: usize,
    old: impl Fn(usize, usize) -> usize,
) {
    let cols = values.len() / (n_heads * head_dim);
    for head in values.chunks_exact_mut(head_dim * cols) {
        let before = head.to_vec();
        for (i, row) in head.chunks_exact_mut(cols).enumerate() {
            row.copy_from_slice(&before[old(head_dim / 2, i) * cols..][..cols]);
        }
    }
}

/// The block format of a file's data type; the two crates agree on every size.
pub fn block_format(dtype: DType) -> Format {
    let format = match dtype {
        DType::F32 => Format::F32,
        DType::F16 => Format::F16,
        DType::BF16 => Format::BF16,
        DType::Q4_0 => Format::Q4_0,
        DType::Q4_1 => Format::Q4_1,
        DType::Q5_0 => Format::Q5_0,
        DType::Q5_1 => Format::Q5_1,
        DType::Q8_0 => Format::Q8_0,
        DType::Q2_K => Format::Q2_K,
        DType::Q3_K => Format::Q3_K,
        DType::Q4_K => Format::Q4_K,
        DType::Q5_K => Format::Q5_K,
        DType::Q6_K => Format::Q6_K,
    };
    assert!(format.block_len() == dtype.block_len() && format.block_bytes() == dtype.block_bytes());
    format
}

/// A tensor's values in f32.
pub fn read(tensor: &TensorRef<'_>) -> Vec<f32> {
    let mut values = vec![0.0; tensor.shape.iter().product()];
    dequantize(block_format(tensor.dtype), tensor.bytes, &mut values);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_gguf() {
        assert_eq!(
            gguf_name("model.layers.12.self_attn.q_proj.weight"),
            "blk.12.attn_q.weight"
        );
        assert_eq!(
            gguf_name("model.layers.0.mlp.down_proj.bias"),
            "blk.0.ffn_down.bias"
        );
        assert_eq!(
            gguf_name("model.layers.0.post_attention_layernorm.weight"),
            "blk.0.ffn_norm.weight"
        );
        assert_eq!(gguf_name("lm_head.weight"), "output.weight");
    }

    #[test]
    fn interleaving_heads_is_undone() {
        let original: Vec<f32> = (0..2 * 8 * 3).map(|i| i as f32).collect();
        let mut values = original.clone();
        permute_heads(&mut values, 2, 8, |half, i| (i % 2) * half + i / 2);
        // Rows 0 and 4 of a head are a rotated pair, side by side in the file.
        assert_eq!(values[3..6], original[12..15]);
        permute_heads(&mut values, 2, 8, file_row);
        assert_eq!(values, original);
    }
}
