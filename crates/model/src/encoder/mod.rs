//! Sentence encoders of the BERT family: post-norm layers, learned positions, attention both ways.
//!
//! In f32 throughout: an encoder is small, and its vectors are compared with ones that other programs made.

mod forward;

use crate::LoadError;
use crate::load::read;
use bantam_formats::hf::{HfFolder, Pooling};
use bantam_formats::{FormatError, ModelFiles};
use bantam_kernels::gemm::PackedDense;
use std::collections::BTreeSet;

/// Sizes and constants of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderConfig {
    /// Tokens in the vocabulary, `V`.
    pub vocab: usize,
    /// Width, `D`.
    pub d_model: usize,
    /// Layers.
    pub n_layers: usize,
    /// Heads, `H`; divides `D`.
    pub n_heads: usize,
    /// Width of the MLP, `F`.
    pub d_ffn: usize,
    /// Rows of the table of positions.
    pub positions: usize,
    /// The longest sequence to read, special tokens included: what the model was made for, at most `positions`.
    pub max_tokens: usize,
    /// Added to the variance before the root.
    pub norm_eps: f32,
    /// How the rows of a sequence become one vector.
    pub pooling: Pooling,
    /// Whether vectors are scaled to length 1.
    pub normalize: bool,
}

/// Why files do not make an encoder.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    /// Another architecture, or a variant that is not built.
    #[error("{0} is not supported for embeddings (hint: encoders of type `bert` are)")]
    Unsupported(String),
    /// A weight is missing or of another shape.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A weight with no place in an encoder.
    #[error(
        "tensor `{0}` has no place in an encoder of type `bert` (hint: leaving it out would change the vectors)"
    )]
    UnknownTensor(String),
    /// A file that cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// An encoder's weights, packed; shared by everything that embeds with it.
#[derive(Clone, Debug)]
pub struct Encoder {
    config: EncoderConfig,
    /// `[V, D]`
    words: Vec<f32>,
    /// `[positions, D]`
    positions: Vec<f32>,
    /// The first token type, `[D]`: a sentence alone has no other.
    first_type: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    qkv: Map,
    out: Map,
    attn_norm: Norm,
    up: Map,
    down: Map,
    ffn_norm: Norm,
}

#[derive(Clone, Debug)]
struct Map {
    weight: PackedDense<f32>,
    bias: Vec<f32>,
}

#[derive(Clone, Debug)]
struct Norm {
    gain: Vec<f32>,
    shift: Vec<f32>,
}

impl EncoderConfig {
    /// Whether these files are an encoder's, by the type they state.
    pub fn is_encoder(files: &ModelFiles) -> bool {
        match files {
            ModelFiles::Hf(folder) => folder.config.model_type.as_deref() == Some("bert"),
            ModelFiles::Gguf(gguf) => gguf.metadata().architecture() == Some("bert"),
        }
    }

    /// The configuration of a Hugging Face folder, with what sentence-transformers adds to it.
    pub fn from_folder(folder: &HfFolder) -> Result<Self, EncoderError> {
        let unsupported = |what: String| Err(EncoderError::Unsupported(what));
        let hf = &folder.config;
        let field = |name: &str| hf.other.get(name);
        match hf.model_type.as_deref() {
            Some("bert") => {}
            other => return unsupported(format!("architecture `{}`", other.unwrap_or("unknown"))),
        }
        match hf.hidden_act.as_deref() {
            Some("gelu") | None => {}
            Some(act) => return unsupported(format!("activation `{act}`")),
        }
        match field("position_embedding_type").and_then(|v| v.as_str()) {
            Some("absolute") | None => {}
            Some(kind) => return unsupported(format!("position embedding `{kind}`")),
        }
        if field("is_decoder").and_then(|v| v.as_bool()) == Some(true) {
            return unsupported("an encoder made a decoder (`is_decoder`)".into());
        }
        let norm_eps = field("layer_norm_eps").map_or(Some(1e-12), |v| v.as_f64());
        let Some(norm_eps) = norm_eps.filter(|eps| (0.0..1.0).contains(eps)) else {
            return unsupported("`layer_norm_eps` outside 0 to 1".into());
        };
        if hf.head_dim.is_some() || hf.n_kv_heads() != hf.num_attention_heads {
            return unsupported("heads of another width or count than `hidden_size` has".into());
        }
        let sentence = folder.sentence_config()?;
        Ok(Self {
            vocab: hf.vocab_size,
            d_model: hf.hidden_size,
            n_layers: hf.num_hidden_layers,
            n_heads: hf.num_attention_heads,
            d_ffn: hf.intermediate_size,
            positions: hf.context(),
            max_tokens: sentence
                .max_seq_length
                .map_or(hf.context(), |max| max.min(hf.context())),
            norm_eps: norm_eps as f32,
            pooling: sentence.pooling,
            normalize: sentence.normalize,
        })
    }
}

impl Encoder {
    /// Reads and packs every weight.
    pub fn load(files: &ModelFiles) -> Result<Self, EncoderError> {
        let ModelFiles::Hf(folder) = files else {
            return Err(EncoderError::Unsupported("a GGUF file".into()));
        };
        let config = EncoderConfig::from_folder(folder)?;
        let prefixed = folder
            .tensor("bert.embeddings.word_embeddings.weight")
            .is_some();
        let mut source = Source {
            folder,
            prefix: if prefixed { "bert." } else { "" },
            used: BTreeSet::new(),
        };
        let (d, f) = (config.d_model, config.d_ffn);
        let words = source.take("embeddings.word_embeddings.weight", &[config.vocab, d])?;
        let positions = source.take(
            "embeddings.position_embeddings.weight",
            &[config.positions, d],
        )?;
        let first_type = source.first_row("embeddings.token_type_embeddings.weight", d)?;
        let norm = source.norm("embeddings.LayerNorm", d)?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for i in 0..config.n_layers {
            let at = |name: &str| format!("encoder.layer.{i}.{name}");
            let qkv = ["query", "key", "value"].map(|name| at(&format!("attention.self.{name}")));
            layers.push(Layer {
                qkv: source.map(&qkv, d, d)?,
                out: source.map(&[at("attention.output.dense")], d, d)?,
                attn_norm: source.norm(&at("attention.output.LayerNorm"), d)?,
                up: source.map(&[at("intermediate.dense")], f, d)?,
                down: source.map(&[at("output.dense")], d, f)?,
                ffn_norm: source.norm(&at("output.LayerNorm"), d)?,
            });
        }
        source.check_all_used()?;
        Ok(Self {
            config,
            words,
            positions,
            first_type,
            norm,
            layers,
        })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }
}

/// Tensors of a folder by the names that BERT gives them, and which of them were read.
struct Source<'a> {
    folder: &'a HfFolder,
    prefix: &'a str,
    used: BTreeSet<String>,
}

impl Source<'_> {
    /// The tensor, which must have `shape`.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EncoderError> {
        let name = format!("{}{name}", self.prefix);
        let Some(tensor) = self.folder.tensor(&name) else {
            return Err(LoadError::MissingTensor(name).into());
        };
        if tensor.shape != shape {
            return Err(LoadError::Shape {
                name,
                found: tensor.shape,
                expected: shape.to_vec(),
            }
            .into());
        }
        self.used.insert(name);
        Ok(read(&tensor))
    }

    /// The first row of a table of any length.
    fn first_row(&mut self, name: &str, d: usize) -> Result<Vec<f32>, EncoderError> {
        let found = self.folder.tensor(&format!("{}{name}", self.prefix));
        let rows = found.map_or(1, |tensor| {
            tensor.shape.first().copied().unwrap_or(1).max(1)
        });
        let mut table = self.take(name, &[rows, d])?;
        table.truncate(d);
        Ok(table)
    }

    /// Maps of the same input, one under the other.
    fn map(&mut self, names: &[String], n: usize, k: usize) -> Result<Map, EncoderError> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weight.extend(self.take(&format!("{name}.weight"), &[n, k])?);
            bias.extend(self.take(&format!("{name}.bias"), &[n])?);
        }
        let weight = PackedDense::pack(&weight, names.len() * n, k);
        Ok(Map { weight, bias })
    }

    fn norm(&mut self, name: &str, d: usize) -> Result<Norm, EncoderError> {
        Ok(Norm {
            gain: self.take(&format!("{name}.weight"), &[d])?,
            shift: self.take(&format!("{name}.bias"), &[d])?,
        })
    }

    /// Refuses a folder that holds weights nothing has read, but for the heads of BERT's own tasks.
    fn check_all_used(&self) -> Result<(), EncoderError> {
        let harmless = |name: &str| {
            let name = name.strip_prefix("bert.").unwrap_or(name);
            name.starts_with("pooler.")
                || name.starts_with("cls.")
                || name == "embeddings.position_ids"
        };
        let tensors = self.folder.tensors().iter();
        match tensors
            .map(|t| &t.name)
            .find(|name| !self.used.contains(*name) && !harmless(name))
        {
            Some(name) => Err(EncoderError::UnknownTensor(name.clone())),
            None => Ok(()),
        }
    }
}
