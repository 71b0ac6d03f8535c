//! The frozen weights of a model, packed for the products that read them.

use crate::linear::{Linear, Weights};
use crate::lora::{Fused, Proj};
use crate::{LoadError, ModelConfig};
use bantam_kernels::qmm::QuantMatrix;
use bantam_kernels::quant::{Format, dequantize};
use bantam_kernels::{Compute, Real};
use std::borrow::Cow;

/// Frozen weights, shared by everything that computes with the model.
#[derive(Clone, Debug)]
pub struct Model<R> {
    pub(crate) config: ModelConfig,
    /// Also the head when that is tied.
    pub(crate) embed: Linear<R>,
    pub(crate) head: Option<Linear<R>>,
    pub(crate) layers: Vec<Layer<R>>,
    pub(crate) final_norm: Vec<R>,
    pub(crate) trainable: bool,
}

/// One transformer layer; maps that read the same input are fused.
#[derive(Clone, Debug)]
pub struct Layer<R> {
    pub(crate) attn_norm: Vec<R>,
    pub(crate) qkv: Linear<R>,
    pub(crate) o: Linear<R>,
    pub(crate) mlp_norm: Vec<R>,
    pub(crate) gate_up: Linear<R>,
    pub(crate) down: Linear<R>,
}

/// Where weights come from, by Hugging Face names (`model.layers.0.self_attn.q_proj.weight`).
pub trait TensorSource<'a> {
    /// The tensor in row-major order, which must have `shape`; `None` where there is none.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, LoadError>;

    /// A matrix as it is stored, its rows in Hugging Face order.
    fn blocks(&mut self, name: &str, shape: &[usize]) -> Result<Option<Blocks<'a>>, LoadError> {
        let values = self.tensor(name, shape)?;
        Ok(values.map(|values| Blocks {
            format: Format::F32,
            bytes: Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        }))
    }

    /// Says that the bytes of a matrix are not read again.
    fn done_with(&mut self, _name: &str) {}
}

/// A matrix as it is stored: rows of blocks.
#[derive(Debug)]
pub struct Blocks<'a> {
    /// How a row is stored.
    pub format: Format,
    /// The rows.
    pub bytes: Cow<'a, [u8]>,
}

/// A matrix `[n_out, n_in]` on its way into a [`Linear`].
pub(crate) struct Tensor<'a> {
    blocks: Blocks<'a>,
    pub(crate) n_out: usize,
    pub(crate) n_in: usize,
}

impl Tensor<'_> {
    pub(crate) fn format(&self) -> Format {
        self.blocks.format
    }

    /// Whether weights share scales, which is worth keeping.
    pub(crate) fn in_blocks(&self) -> bool {
        self.blocks.format.block_len() > 1
    }

    /// The weights exactly as they are stored.
    pub(crate) fn pack(&self, compute: &Compute) -> QuantMatrix {
        let Blocks { format, bytes } = &self.blocks;
        QuantMatrix::pack(*format, self.n_out, self.n_in, bytes, compute)
    }

    /// The numbers of one row.
    pub(crate) fn row(&self, i: usize, out: &mut [f32]) {
        let len = self.blocks.format.bytes_for(self.n_in);
        let bytes = &self.blocks.bytes[i * len..][..len];
        dequantize(self.blocks.format, bytes, out);
    }
}

impl<R: Real> Model<R> {
    /// Reads and packs every weight. `trainable` also packs what gradients flow through.
    pub fn from_source<'a>(
        compute: &Compute,
        config: ModelConfig,
        source: &mut dyn TensorSource<'a>,
        weights: Weights,
        trainable: bool,
    ) -> Result<Self, LoadError> {
        let (vocab, d) = (config.vocab, config.d_model);
        let weights = match weights {
            Weights::F32 => Weights::F32,
            _ if trainable => Weights::Bf16,
            other => other,
        };
        let mut table = |name: &str, trainable| {
            let tensor = matrix(source, name, &[vocab, d])?;
            let linear = Linear::new(compute, &[tensor], None, weights, trainable);
            source.done_with(name);
            Ok::<_, LoadError>(linear)
        };
        let embed = table("model.embed_tokens.weight", trainable && config.tied_head)?;
        let head = if config.tied_head {
            None
        } else {
            Some(table("lm_head.weight", trainable)?)
        };
        let layers = (0..config.n_layers)
            .map(|i| Layer::from_source(compute, i, &config, source, weights, trainable))
            .collect::<Result<_, _>>()?;
        let final_norm = to_real(&required(source, "model.norm.weight", &[d])?);
        Ok(Self {
            config,
            embed,
            head,
            layers,
            final_norm,
            trainable,
        })
    }

    /// Sizes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The map from the final hidden state to logits.
    pub(crate) fn head(&self) -> &Linear<R> {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

impl<R: Real> Layer<R> {
    fn from_source<'a>(
        compute: &Compute,
        layer: usize,
        config: &ModelConfig,
        source: &mut dyn TensorSource<'a>,
        weights: Weights,
        trainable: bool,
    ) -> Result<Self, LoadError> {
        let d = config.d_model;
        let mut fused =
            |fused: Fused| fuse(compute, fused, layer, config, source, weights, trainable);
        let (qkv, o) = (fused(Fused::Qkv)?, fused(Fused::O)?);
        let (gate_up, down) = (fused(Fused::GateUp)?, fused(Fused::Down)?);
        let mut norm =
            |name: &str| required(source, &format!("model.layers.{layer}.{name}.weight"), &[d]);
        Ok(Self {
            attn_norm: to_real(&norm("input_layernorm")?),
            mlp_norm: to_real(&norm("post_attention_layernorm")?),
            qkv,
            o,
            gate_up,
            down,
        })
    }

    pub(crate) fn fused(&self, fused: Fused) -> &Linear<R> {
        match fused {
            Fused::Qkv => &self.qkv,
            Fused::O => &self.o,
            Fused::GateUp => &self.gate_up,
            Fused::Down => &self.down,
        }
    }

    pub(crate) fn fused_mut(&mut self, fused: Fused) -> &mut Linear<R> {
        match fused {
            Fused::Qkv => &mut self.qkv,
            Fused::O => &mut self.o,
            Fused::GateUp => &mut self.gate_up,
            Fused::Down => &mut self.down,
        }
    }
}

/// Reads the maps of `fused` and stacks them, biases too (zeros where only some have one).
fn fuse<'a, R: Real>(
    compute: &Compute,
    fused: Fused,
    layer: usize,
    config: &ModelConfig,
    source: &mut dyn TensorSource<'a>,
    weights: Weights,
    trainable: bool,
) -> Result<Linear<R>, LoadError> {
    let (mut tensors, mut bias, mut has_bias) = (Vec::new(), Vec::new(), false);
    let name = |proj: &Proj, kind| format!("model.layers.{layer}.{}.{kind}", proj.path());
    for proj in fused.projs() {
        let (n_in, n_out) = Proj::dims(*proj, config);
        tensors.push(matrix(source, &name(proj, "weight"), &[n_out, n_in])?);
        match source.tensor(&name(proj, "bias"), &[n_out])? {
            Some(values) => {
                has_bias = true;
                bias.extend(values);
            }
            None => bias.resize(bias.len() + n_out, 0.0),
        }
    }
    let bias = has_bias.then_some(&bias[..]);
    let linear = Linear::new(compute, &tensors, bias, weights, trainable);
    drop(tensors);
    for proj in fused.projs() {
        source.done_with(&name(proj, "weight"));
    }
    Ok(linear)
}

fn matrix<'a>(
    source: &mut dyn TensorSource<'a>,
    name: &str,
    shape: &[usize; 2],
) -> Result<Tensor<'a>, LoadError> {
    let blocks = source
        .blocks(name, shape)?
        .ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
    Ok(Tensor {
        blocks,
        n_out: shape[0],
        n_in: shape[1],
    })
}

fn required(
    source: &mut dyn TensorSource<'_>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, LoadError> {
    let values = source
        .tensor(name, shape)?
        .ok_or_else(|| LoadError::MissingTensor(name.to_owned()))?;
    source.done_with(name);
    Ok(values)
}

fn to_real<R: Real>(x: &[f32]) -> Vec<R> {
    x.iter().map(|&x| R::from_f32(x)).collect()
}
