//! The frozen weights of a model, packed for the products that read them.

use crate::linear::{Linear, Precision};
use crate::lora::{Fused, Proj};
use crate::{LoadError, ModelConfig};
use bantam_kernels::Real;

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
pub trait TensorSource {
    /// The tensor in row-major order, which must have `shape`; `None` where there is none.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, LoadError>;
}

impl<R: Real> Model<R> {
    /// Reads and packs every weight. `trainable` also packs what gradients flow through.
    pub fn from_source(
        config: ModelConfig,
        source: &mut dyn TensorSource,
        precision: Precision,
        trainable: bool,
    ) -> Result<Self, LoadError> {
        let (vocab, d) = (config.vocab, config.d_model);
        let embed = required(source, "model.embed_tokens.weight", &[vocab, d])?;
        let embed = Linear::new(
            &embed,
            None,
            vocab,
            precision,
            trainable && config.tied_head,
        );
        let head = if config.tied_head {
            None
        } else {
            let head = required(source, "lm_head.weight", &[vocab, d])?;
            Some(Linear::new(&head, None, vocab, precision, trainable))
        };
        let layers = (0..config.n_layers)
            .map(|i| Layer::from_source(i, &config, source, precision, trainable))
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
    fn from_source(
        layer: usize,
        config: &ModelConfig,
        source: &mut dyn TensorSource,
        precision: Precision,
        trainable: bool,
    ) -> Result<Self, LoadError> {
        let d = config.d_model;
        let mut fused = |fused: Fused| fuse(fused, layer, config, source, precision, trainable);
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
}

/// Reads the maps of `fused` and stacks them, biases too (zeros where only some have one).
fn fuse<R: Real>(
    fused: Fused,
    layer: usize,
    config: &ModelConfig,
    source: &mut dyn TensorSource,
    precision: Precision,
    trainable: bool,
) -> Result<Linear<R>, LoadError> {
    let (mut weights, mut bias, mut has_bias, mut rows) = (Vec::new(), Vec::new(), false, 0);
    for &proj in fused.projs() {
        let (n_in, n_out) = Proj::dims(proj, config);
        let path = format!("model.layers.{layer}.{}", proj.path());
        weights.extend(required(source, &format!("{path}.weight"), &[n_out, n_in])?);
        match source.tensor(&format!("{path}.bias"), &[n_out])? {
            Some(values) => {
                has_bias = true;
                bias.extend(values);
            }
            None => bias.resize(bias.len() + n_out, 0.0),
        }
        rows += n_out;
    }
    // Below the first adapted map no gradient is needed, so layer 0's inputs stay packed once.
    let trainable = trainable && !(layer == 0 && fused == Fused::Qkv);
    Ok(Linear::new(
        &weights,
        has_bias.then_some(&bias),
        rows,
        precision,
        trainable,
    ))
}

fn required(
    source: &mut dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, LoadError> {
    source
        .tensor(name, shape)?
        .ok_or_else(|| LoadError::MissingTensor(name.to_owned()))
}

fn to_real<R: Real>(x: &[f32]) -> Vec<R> {
    x.iter().map(|&x| R::from_f32(x)).collect()
}
