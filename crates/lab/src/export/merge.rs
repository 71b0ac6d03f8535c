//! Base and adapter as one model.
//!
//! Weights that no adapter touches keep their bytes where the target format can hold them. Tensors are worked off one
//! at a time, so the memory needed is that of the largest.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use bantam_formats::{
    DType, Gguf, GgufWriter, HfFolder, ModelFiles, SafetensorsWriter, TensorInfo, TensorSpec,
    Value as GgufValue, atomic,
};
use bantam_kernels::quant::quantize;
use bantam_model::{
    FileSource, FullLayout, LoraLayout, LoraPart, ModelConfig, RopeScaling, TensorSource,
    block_format, read_tensor,
};
use serde_json::{Value, json};

use super::folder_to_gguf;
use super::tokenizer::{hf_tokenizer, hf_tokenizer_config};
use super::{Adapter, AdapterIdentity};
use crate::train::TrainError;

/// File of a folder that holds the weights.
const FOLDER_WEIGHTS: &str = "model.safetensors";

/// What a merged model is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeFormat {
    /// A Hugging Face folder with weights of this type: F32, F16 or BF16.
    Folder(DType),
    /// A GGUF file, matrices of this type: Q8_0, F16, BF16 or F32.
    Gguf(DType),
}

/// Adds an adapter, if there is one, to its base and writes the result to `out`.
///
/// Math:     W' = W + (alpha / r) B A, the product summed over r first, in f32
/// Errors:   a type the target cannot hold; a base that says too little of its tokenizer; any trouble with files
pub fn merge(
    base: &ModelFiles,
    adapter: Option<&Adapter>,
    format: MergeFormat,
    out: &Path,
) -> Result<(), TrainError> {
    let config = ModelConfig::from_files(base).map_err(bantam_model::LoadError::from)?;
    let weights = match adapter {
        None => Weights::Plain,
        Some(adapter) => {
            let layout = LoraLayout::new(&adapter.config, &config);
            let fits = layout.n_params() == adapter.params.len();
            assert!(fits, "the adapter was read for this base");
            Weights::Adapted(adapter, layout)
        }
    };
    let identity = adapter.and_then(|adapter| adapter.identity.as_ref());
    let merger = Merger {
        base,
        config: &config,
        weights,
        identity,
    };
    match (format, base) {
        (MergeFormat::Folder(dtype @ (DType::F32 | DType::F16 | DType::BF16)), _) => {
            merger.to_folder(dtype, out)
        }
        (
            MergeFormat::Gguf(dtype @ (DType::Q8_0 | DType::F32 | DType::F16 | DType::BF16)),
            ModelFiles::Gguf(gguf),
        ) => merger.to_gguf(gguf, dtype, out),
        (
            MergeFormat::Gguf(dtype @ (DType::Q8_0 | DType::F32 | DType::F16 | DType::BF16)),
            ModelFiles::Hf(folder),
        ) => merger.folder_to_gguf(folder, dtype, out),
        (MergeFormat::Folder(dtype) | MergeFormat::Gguf(dtype), _) => Err(TrainError::Export {
            path: out.to_path_buf(),
            reason: format!(
                "matrices cannot be written as {dtype}; a folder takes F32, F16 or BF16, a GGUF file also Q8_0"
            ),
        }),
    }
}

/// Writes weights that were trained, all of them, into the folder `out` as they were computed with (matrices in bf16,
/// vectors in f32), with `base`'s tokenizer and settings. Gives the name of the file that holds them.
///
/// Panics if `weights` is not of the layout's length.
pub fn write_model(
    base: &ModelFiles,
    layout: &FullLayout,
    weights: &[f32],
    identity: &AdapterIdentity,
    out: &Path,
) -> Result<&'static str, TrainError> {
    assert_eq!(weights.len(), layout.n_params(), "one number per weight");
    let config = ModelConfig::from_files(base).map_err(bantam_model::LoadError::from)?;
    let merger = Merger {
        base,
        config: &config,
        weights: Weights::Trained(layout, weights),
        identity: Some(identity),
    };
    merger.to_folder(DType::BF16, out)?;
    super::peft::write_identity(identity, out)?;
    Ok(FOLDER_WEIGHTS)
}

/// What the written weights are.
enum Weights<'a> {
    /// The base's.
    Plain,
    /// The base's with an adapter added.
    Adapted(&'a Adapter, LoraLayout),
    /// None of the base's.
    Trained(&'a FullLayout, &'a [f32]),
}

struct Merger<'a> {
    base: &'a ModelFiles,
    config: &'a ModelConfig,
    weights: Weights<'a>,
    identity: Option<&'a AdapterIdentity>,
}

impl Merger<'_> {
    /// Every weight's Hugging Face name and shape, in the order they are written.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let config = self.config;
        let d = config.d_model;
        let mut all = vec![(
            "model.embed_tokens.weight".to_string(),
            vec![config.vocab, d],
        )];
        for layer in 0..config.n_layers {
            let at = |rest: &str| format!("model.layers.{layer}.{rest}");
            all.push((at("input_layernorm.weight"), vec![d]));
            for proj in bantam_model::Proj::ALL {
                let (n_in, n_out) = proj.dims(config);
                all.push((at(&format!("{}.weight", proj.path())), vec![n_out, n_in]));
                all.push((at(&format!("{}.bias", proj.path())), vec![n_out]));
            }
            all.push((at("post_attention_layernorm.weight"), vec![d]));
        }
        all.push(("model.norm.weight".to_string(), vec![d]));
        all.push(("lm_head.weight".to_string(), vec![config.vocab, d]));
        let source = FileSource::new(self.base, config);
        all.retain(|(name, _)| {
            let tied = config.tied_head && name == "lm_head.weight";
            !tied && self.base.tensor(&source.file_name(name)).is_some()
        });
        all
    }

    /// Whether a weight is another than the base's.
    fn is_changed(&self, name: &str) -> bool {
        match &self.weights {
            Weights::Plain => false,
            Weights::Trained(..) => true,
            Weights::Adapted(_, layout) => {
                let mut tensors = layout.tensors().iter();
                tensors.any(|t| weight_name(t.layer, t.proj) == name)
            }
        }
    }

    /// A weight in Hugging Face order, as it is to be written.
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [f32]>, TrainError> {
        let missing = || bantam_model::LoadError::MissingTensor(name.to_string());
        if let Weights::Trained(layout, weights) = &self.weights {
            let mut tensors = layout.tensors().iter();
            let tensor = tensors
                .find(|tensor| tensor.name == name)
                .ok_or_else(missing)?;
            return Ok(Cow::Borrowed(&weights[tensor.range.clone()]));
        }
        let mut source = FileSource::new(self.base, self.config);
        let mut w = source.tensor(name, shape)?.ok_or_else(missing)?;
        let Weights::Adapted(adapter, layout) = &self.weights else {
            return Ok(Cow::Owned(w));
        };
        let part = |part: LoraPart| {
            let mut tensors = layout.tensors().iter();
            let tensor =
                tensors.find(|t| t.part == part && weight_name(t.layer, t.proj) == name)?;
            Some(&adapter.params[tensor.range.clone()])
        };
        if let (Some(a), Some(b)) = (part(LoraPart::A), part(LoraPart::B)) {
            let rank = adapter.config.rank;
            let scale = (adapter.config.alpha / rank as f64) as f32;
            add_product(&mut w, a, b, rank, scale);
        }
        Ok(Cow::Owned(w))
    }

    fn to_folder(&self, dtype: DType, out: &Path) -> Result<(), TrainError> {
        std::fs::create_dir_all(out).map_err(|e| TrainError::io(out, e))?;
        let tensors = self.tensors();
        // Gains and biases were computed with as they are: rounded, it would be another model.
        let dtype_of = |shape: &[usize]| match (&self.weights, shape) {
            (Weights::Trained(..), [_]) => DType::F32,
            _ => dtype,
        };
        let specs: Vec<_> = tensors
            .iter()
            .map(|(name, shape)| TensorSpec::new(name, dtype_of(shape), shape.clone()))
            .collect();
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let mut writer = SafetensorsWriter::create(&out.join(FOLDER_WEIGHTS), &specs, &metadata)?;
        for (name, shape) in &tensors {
            let mut bytes = Vec::new();
            let format = block_format(dtype_of(shape));
            quantize(format, &self.weight(name, shape)?, &mut bytes);
            writer.tensor(name, &bytes)?;
        }
        writer.finish()?;
        match self.base {
            ModelFiles::Hf(folder) => copy_small_files(folder, dtype, out)?,
            ModelFiles::Gguf(gguf) => self.describe_gguf(gguf, dtype, out)?,
        }
        self.carry_template(out)
    }

    /// The adapter's own template wins over the base's: it is what was trained.
    fn carry_template(&self, out: &Path) -> Result<(), TrainError> {
        match self
            .identity
            .and_then(|identity| identity.chat_template.as_ref())
        {
            Some(template) => Ok(atomic::write(
                &out.join("chat_template.jinja"),
                template.as_bytes(),
            )?),
            None => Ok(()),
        }
    }

    /// The small files of a folder, from a GGUF file's metadata.
    fn describe_gguf(&self, gguf: &Gguf, dtype: DType, out: &Path) -> Result<(), TrainError> {
        let metadata = gguf.metadata();
        let tokenizer = hf_tokenizer(metadata).map_err(|reason| TrainError::Export {
            path: gguf.path().to_path_buf(),
            reason,
        })?;
        write_json(&out.join("tokenizer.json"), &tokenizer)?;
        write_json(
            &out.join("tokenizer_config.json"),
            &hf_tokenizer_config(metadata, self.config.max_context),
        )?;
        let arch = metadata.architecture().unwrap_or("llama");
        let id = |key: &str| metadata.u64(&format!("tokenizer.ggml.{key}_token_id"));
        let (bos, eos, pad) = (id("bos"), id("eos"), id("padding").or(id("eos")));
        let c = self.config;
        let has_bias = |module: &str| gguf.tensor(&format!("blk.0.{module}.bias")).is_some();
        let rope_scaling = match c.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original as u64,
            }),
        };
        let class = match arch {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let config = json!({
            "architectures": [class], "model_type": arch, "torch_dtype": torch_name(dtype),
            "vocab_size": c.vocab, "hidden_size": c.d_model, "intermediate_size": c.d_ffn,
            "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
            "head_dim": c.head_dim, "hidden_act": "silu", "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": c.rope_theta, "rope_scaling": rope_scaling, "max_position_embeddings": c.max_context,
            "attention_bias": has_bias("attn_q"), "mlp_bias": has_bias("ffn_up"),
            "tie_word_embeddings": c.tied_head,
            "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
        });
        write_json(&out.join("config.json"), &config)?;
        let generation = json!({"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad});
        write_json(&out.join("generation_config.json"), &generation)
    }

    fn folder_to_gguf(
        &self,
        folder: &HfFolder,
        dtype: DType,
        out: &Path,
    ) -> Result<(), TrainError> {
        let template = self
            .identity
            .and_then(|identity| identity.chat_template.as_deref());
        let mut metadata =
            folder_to_gguf::metadata(folder, self.config, template).map_err(|reason| {
                TrainError::Export {
                    path: folder.path().to_path_buf(),
                    reason,
                }
            })?;
        metadata.insert("general.file_type", file_type(dtype));
        let (_, interleaved) = folder_to_gguf::architecture(folder);
        let tensors = self.tensors();
        let spec = |(name, shape): &(String, Vec<usize>)| {
            let dtype = if let [_, n_in] = shape[..] {
                fitting(dtype, n_in)
            } else {
                DType::F32
            };
            TensorSpec::new(folder_to_gguf::gguf_name(name), dtype, shape.clone())
        };
        let specs: Vec<_> = tensors.iter().map(spec).collect();
        let mut writer = GgufWriter::create(out, &metadata, &specs)?;
        for ((name, shape), spec) in tensors.iter().zip(&specs) {
            let mut values = self.weight(name, shape)?.into_owned();
            if interleaved {
                folder_to_gguf::interleave(name, &mut values, self.config);
            }
            let mut bytes = Vec::new();
            quantize(block_format(spec.dtype), &values, &mut bytes);
            writer.tensor(&spec.name, &bytes)?;
        }
        Ok(writer.finish()?)
    }

    fn to_gguf(&self, gguf: &Gguf, dtype: DType, out: &Path) -> Result<(), TrainError> {
        let source = FileSource::new(self.base, self.config);
        let by_file_name: BTreeMap<String, (String, Vec<usize>)> = self
            .tensors()
            .into_iter()
            .map(|(name, shape)| (source.file_name(&name), (name, shape)))
            .collect();
        let changed = |info: &TensorInfo| {
            by_file_name
                .get(&info.name)
                .filter(|(name, _)| self.is_changed(name))
        };
        // Quantised weights without an adapter are copied: to encode them anew could only lose.
        let dtype_of = |info: &TensorInfo| match info.shape.as_slice() {
            [_, n_in] if changed(info).is_some() || info.dtype.is_plain() => fitting(dtype, *n_in),
            _ => info.dtype,
        };
        let specs: Vec<_> = gguf
            .tensors()
            .iter()
            .map(|info| TensorSpec::new(&info.name, dtype_of(info), info.shape.clone()))
            .collect();
        let mut metadata = gguf.metadata().clone();
        metadata.insert("general.file_type", file_type(dtype));
        if let Some(template) = self
            .identity
            .and_then(|identity| identity.chat_template.clone())
        {
            metadata.insert("tokenizer.chat_template", GgufValue::Str(template));
        }
        let mut writer = GgufWriter::create(out, &metadata, &specs)?;
        for (info, spec) in gguf.tensors().iter().zip(&specs) {
            let tensor = gguf
                .tensor(&info.name)
                .expect("a tensor the file has just listed");
            let values = match changed(info) {
                Some((name, shape)) => {
                    let mut values = self.weight(name, shape)?.into_owned();
                    source.to_file_rows(name, &mut values);
                    values
                }
                None if spec.dtype == info.dtype => {
                    writer.tensor(&info.name, tensor.bytes)?;
                    continue;
                }
                None => read_tensor(&tensor),
            };
            let mut bytes = Vec::new();
            quantize(block_format(spec.dtype), &values, &mut bytes);
            writer.tensor(&info.name, &bytes)?;
        }
        Ok(writer.finish()?)
    }
}

/// The type a matrix is written as: blocks only where rows are whole blocks.
fn fitting(dtype: DType, n_in: usize) -> DType {
    if n_in.is_multiple_of(dtype.block_len()) {
        dtype
    } else {
        DType::F16
    }
}

/// `general.file_type` of files whose matrices are mostly of this type.
fn file_type(dtype: DType) -> GgufValue {
    GgufValue::U32(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 32,
        _ => 7,
    })
}

fn weight_name(layer: usize, proj: bantam_model::Proj) -> String {
    format!("model.layers.{layer}.{}.weight", proj.path())
}

/// Adds a scaled low-rank product.
///
/// Shapes: w [n_out, n_in]; a [R, n_in]; b [n_out, R]
/// Math:   w += scale b a, summed over R in order before it is scaled
fn add_product(w: &mut [f32], a: &[f32], b: &[f32], rank: usize, scale: f32) {
    let n_in = a.len() / rank;
    let mut delta = vec![0f32; n_in];
    for (w, b) in w.chunks_exact_mut(n_in).zip(b.chunks_exact(rank)) {
        delta.fill(0.0);
        for (&b, a) in b.iter().zip(a.chunks_exact(n_in)) {
            delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
        }
        w.iter_mut().zip(&delta).for_each(|(w, d)| *w += scale * d);
    }
}

/// Copies what a folder has besides weights, and names the new type in `config.json`.
fn copy_small_files(folder: &HfFolder, dtype: DType, out: &Path) -> Result<(), TrainError> {
    const NAMES: [&str; 9] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer.model",
    ];
    for name in NAMES {
        let path = folder.path().join(name);
        if path.exists() {
            let bytes = std::fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
            atomic::write(&out.join(name), &bytes)?;
        }
    }
    let path = folder.path().join("config.json");
    let bytes = std::fs::read(&path).map_err(|e| TrainError::io(&path, e))?;
    let mut config: Value = serde_json::from_slice(&bytes).map_err(|e| TrainError::Export {
        path: path.clone(),
        reason: e.to_string(),
    })?;
    let key = if config.get("dtype").is_some() {
        "dtype"
    } else {
        "torch_dtype"
    };
    config[key] = json!(torch_name(dtype));
    write_json(&out.join("config.json"), &config)
}

fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

fn write_json(path: &Path, value: &Value) -> Result<(), TrainError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| TrainError::io(path, e.into()))?;
    text.push(b'\n');
    Ok(atomic::write(path, &text)?)
}
