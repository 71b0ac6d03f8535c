//! What a model of the Llama family is: sizes, norms, positions; checked once.

use bantam_kernels::attention::HeadDims;

/// Sizes and constants of a model, checked to be consistent.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Tokens in the vocabulary, `V`.
    pub vocab: usize,
    /// Width, `D`.
    pub d_model: usize,
    /// Layers, `L`.
    pub n_layers: usize,
    /// Query heads, `H`.
    pub n_heads: usize,
    /// Key-value heads, `K`.
    pub n_kv_heads: usize,
    /// Head width, `Dh`; even.
    pub head_dim: usize,
    /// Width of the MLP, `F`.
    pub d_ffn: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The head is the transpose of the embedding.
    pub tied_head: bool,
    /// Positions that the model was made for.
    pub max_context: usize,
}

/// Ways to stretch rotary frequencies to longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions of the original training.
        original: f64,
    },
}

/// A configuration that cannot be.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// A size outside the range that this program computes with.
    #[error("`{field}` is {value}, expected {expected}")]
    Size {
        /// Name in the model's own terms.
        field: &'static str,
        /// As found.
        value: String,
        /// What would do.
        expected: String,
    },
    /// Another architecture, or a variant that is not built.
    #[error("{what} is not supported (hint: models of the Llama family are: {hint})")]
    Unsupported {
        /// As found.
        what: String,
        /// What would do.
        hint: String,
    },
    /// A field that must be there.
    #[error("`{0}` is missing")]
    Missing(String),
}

impl ModelConfig {
    /// Checks every size once; later code only asserts.
    pub fn validate(self) -> Result<Self, ConfigError> {
        let positive = [
            ("vocab", self.vocab, 1 << 24),
            ("d_model", self.d_model, 1 << 17),
            ("n_layers", self.n_layers, 1 << 10),
            ("n_heads", self.n_heads, 1 << 10),
            ("n_kv_heads", self.n_kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 10),
            ("d_ffn", self.d_ffn, 1 << 19),
            ("max_context", self.max_context, 1 << 24),
        ];
        for (field, value, max) in positive {
            if value == 0 || value > max {
                return Err(size(field, value, format!("1 to {max}")));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(size(
                "n_kv_heads",
                self.n_kv_heads,
                format!("a divisor of n_heads = {}", self.n_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(size("head_dim", self.head_dim, "an even number".into()));
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Err(size("rms_norm_eps", self.rms_norm_eps, "0 to 1".into()));
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta.is_finite()) {
            return Err(size("rope_theta", self.rope_theta, "at least 1".into()));
        }
        let factor = match self.rope_scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear { factor } => factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => {
                if !(low_freq_factor > 0.0 && high_freq_factor > low_freq_factor && original > 0.0)
                {
                    return Err(size(
                        "rope_scaling",
                        format!("{:?}", self.rope_scaling),
                        "0 < low < high".into(),
                    ));
                }
                factor
            }
        };
        if !(factor > 0.0 && factor.is_finite()) {
            return Err(size(
                "rope_scaling.factor",
                factor,
                "a positive number".into(),
            ));
        }
        Ok(self)
    }

    /// Head counts and width for the attention routines.
    pub fn heads(&self) -> HeadDims {
        HeadDims {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
        }
    }

    /// Weights of the model, a tied head counted once, biases left out.
    pub fn n_params(&self) -> usize {
        let heads = self.heads();
        let attention = (heads.qkv_width() + heads.out_width()) * self.d_model;
        let layer = attention + 3 * self.d_model * self.d_ffn + 2 * self.d_model;
        let tables = if self.tied_head { 1 } else { 2 };
        self.n_layers * layer + self.d_model + tables * self.vocab * self.d_model
    }
}

fn size(field: &'static str, value: impl ToString, expected: String) -> ConfigError {
    ConfigError::Size {
        field,
        value: value.to_string(),
        expected,
    }
}
