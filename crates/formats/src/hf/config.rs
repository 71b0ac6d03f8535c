//! `config.json` and `generation_config.json`, in Hugging Face's own words.

use crate::{Problem, limits};
use serde::Deserialize;

/// `config.json` of a decoder in the Llama manner. Names are Hugging Face's, verbatim; what is not named here is kept
/// in `other`. The numbers are sane (not zero, under the caps of [`limits`], heads that divide) once [`parse`] is
/// through.
///
/// [`parse`]: HfConfig::parse
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[allow(
    missing_docs,
    reason = "the fields are Hugging Face's and documented there"
)]
pub struct HfConfig {
    #[serde(default)]
    pub architectures: Option<Vec<String>>,
    #[serde(default)]
    pub model_type: Option<String>,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Absent: as many as attention heads. See [`HfConfig::n_kv_heads`].
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Absent: `hidden_size / num_attention_heads`. See [`HfConfig::head_width`].
    #[serde(default)]
    pub head_dim: Option<usize>,
    #[serde(default)]
    pub max_position_embeddings: Option<usize>,
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Absent: in `rope_parameters`, or 10,000. See [`HfConfig::rope_base`].
    #[serde(default)]
    pub rope_theta: Option<f64>,
    #[serde(default)]
    pub rope_scaling: Option<HfRope>,
    /// Where transformers 5 keeps `rope_theta` and the scaling. See [`HfConfig::rope`].
    #[serde(default)]
    pub rope_parameters: Option<HfRope>,
    #[serde(default)]
    pub partial_rotary_factor: Option<f64>,
    #[serde(default)]
    pub sliding_window: Option<usize>,
    #[serde(default)]
    pub use_sliding_window: Option<bool>,
    #[serde(default)]
    pub tie_word_embeddings: Option<bool>,
    #[serde(default)]
    pub attention_bias: Option<bool>,
    #[serde(default)]
    pub mlp_bias: Option<bool>,
    #[serde(default)]
    pub hidden_act: Option<String>,
    #[serde(default, alias = "torch_dtype")]
    pub dtype: Option<String>,
    #[serde(default)]
    pub bos_token_id: TokenIds,
    #[serde(default)]
    pub eos_token_id: TokenIds,
    #[serde(default)]
    pub pad_token_id: TokenIds,
    /// Every other field.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// How positions are rotated: `rope_scaling`, or `rope_parameters` of transformers 5.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[allow(
    missing_docs,
    reason = "the fields are Hugging Face's and documented there"
)]
pub struct HfRope {
    /// See [`HfRope::kind`].
    #[serde(default)]
    pub rope_type: Option<String>,
    /// The older name of `rope_type`; files may have both.
    #[serde(default, rename = "type")]
    pub old_type: Option<String>,
    #[serde(default)]
    pub rope_theta: Option<f64>,
    #[serde(default)]
    pub factor: Option<f64>,
    #[serde(default)]
    pub low_freq_factor: Option<f64>,
    #[serde(default)]
    pub high_freq_factor: Option<f64>,
    #[serde(default)]
    pub original_max_position_embeddings: Option<usize>,
    #[serde(default)]
    pub attention_factor: Option<f64>,
    #[serde(default)]
    pub beta_fast: Option<f64>,
    #[serde(default)]
    pub beta_slow: Option<f64>,
    /// Every other field.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl HfRope {
    /// `default`, `linear`, `dynamic`, `llama3`, `yarn` ...
    pub fn kind(&self) -> &str {
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref());
        kind.unwrap_or("default")
    }
}

/// No token id, one, or a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// One id.
    One(u32),
    /// Several.
    Many(Vec<u32>),
    /// `null` or nothing.
    #[default]
    None,
}

impl TokenIds {
    /// The ids.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            TokenIds::One(id) => std::slice::from_ref(id),
            TokenIds::Many(ids) => ids,
            TokenIds::None => &[],
        }
    }

    /// The first id.
    pub fn first(&self) -> Option<u32> {
        self.as_slice().first().copied()
    }
}

/// The ids in `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[allow(
    missing_docs,
    reason = "the fields are Hugging Face's and documented there"
)]
pub struct GenerationConfig {
    #[serde(default)]
    pub bos_token_id: TokenIds,
    #[serde(default)]
    pub eos_token_id: TokenIds,
    #[serde(default)]
    pub pad_token_id: TokenIds,
}

fn default_eps() -> f64 {
    1e-6
}

impl HfConfig {
    /// Parses and checks `config.json`.
    pub fn parse(json: &[u8]) -> Result<HfConfig, Problem> {
        let config: HfConfig = serde_json::from_slice(json).map_err(|e| Problem::json(&e))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Problem> {
        between("vocab_size", self.vocab_size, limits::VOCAB)?;
        between("hidden_size", self.hidden_size, limits::WIDTH)?;
        between(
            "intermediate_size",
            self.intermediate_size,
            limits::FFN_WIDTH,
        )?;
        between("num_hidden_layers", self.num_hidden_layers, limits::LAYERS)?;
        between(
            "num_attention_heads",
            self.num_attention_heads,
            limits::HEADS,
        )?;
        between("num_key_value_heads", self.n_kv_heads(), limits::HEADS)?;
        between("head_dim", self.head_width(), limits::HEAD_WIDTH)?;
        between("max_position_embeddings", self.context(), limits::CONTEXT)?;
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(field(
                "num_attention_heads",
                self.num_attention_heads,
                format!("it has to divide `hidden_size`, {}", self.hidden_size),
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.n_kv_heads()) {
            return Err(field(
                "num_key_value_heads",
                self.n_kv_heads(),
                format!(
                    "it has to divide `num_attention_heads`, {}",
                    self.num_attention_heads
                ),
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(field(
                "rms_norm_eps",
                self.rms_norm_eps,
                "it has to lie between 0 and 1",
            ));
        }
        let rope_base = self.rope_base();
        if !(rope_base >= 1.0 && rope_base.is_finite()) {
            return Err(field(
                "rope_theta",
                rope_base,
                "it has to be a number of at least 1",
            ));
        }
        if let Some(factor) = self.rope().and_then(|rope| rope.factor)
            && !(factor > 0.0 && factor.is_finite())
        {
            return Err(field("rope_scaling.factor", factor, "it has to be above 0"));
        }
        Ok(())
    }

    /// Key and value heads.
    pub fn n_kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of an attention head.
    pub fn head_width(&self) -> usize {
        let implied = || self.hidden_size.checked_div(self.num_attention_heads);
        self.head_dim.or_else(implied).unwrap_or(0)
    }

    /// The longest context, 2,048 if none is given (as transformers has it).
    pub fn context(&self) -> usize {
        self.max_position_embeddings.unwrap_or(2048)
    }

    /// The base of the rotary frequencies, 10,000 if none is given (as transformers has it).
    pub fn rope_base(&self) -> f64 {
        let nested = || self.rope_parameters.as_ref()?.rope_theta;
        self.rope_theta.or_else(nested).unwrap_or(10_000.0)
    }

    /// The scaling of rotary frequencies, from wherever the file keeps it; `None` if there is none.
    pub fn rope(&self) -> Option<&HfRope> {
        let scaled = |rope: &&HfRope| rope.kind() != "default";
        let newer = self.rope_parameters.as_ref().filter(scaled);
        newer.or(self.rope_scaling.as_ref().filter(scaled))
    }
}

fn between(name: &str, found: usize, cap: usize) -> Result<(), Problem> {
    if (1..=cap).contains(&found) {
        return Ok(());
    }
    Err(field(
        name,
        found,
        format!("it has to lie between 1 and {cap}"),
    ))
}

fn field(name: &str, found: impl ToString, expected: impl Into<String>) -> Problem {
    Problem::Field {
        field: name.into(),
        found: found.to_string(),
        expected: expected.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOLLM2: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
        "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": 49152 }"#;

    /// `SMOLLM2` with one field set.
    fn with(name: &str, value: &str) -> Result<HfConfig, Problem> {
        let mut json: serde_json::Value = serde_json::from_str(SMOLLM2).unwrap();
        json[name] = serde_json::from_str(value).unwrap();
        HfConfig::parse(json.to_string().as_bytes())
    }

    #[test]
    fn a_real_config_is_read_whole() {
        let config = HfConfig::parse(SMOLLM2.as_bytes()).unwrap();
        assert_eq!(
            (config.n_kv_heads(), config.head_width(), config.context()),
            (3, 64, 8192)
        );
        assert_eq!(config.rope_base(), 100_000.0);
        assert_eq!(config.rope(), None);
        assert_eq!(config.eos_token_id.as_slice(), [2]);
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
        assert!(config.other.contains_key("is_llama_config"));
    }

    #[test]
    fn rope_is_found_where_either_version_keeps_it() {
        let llama3 = r#"{"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;
        let config = with("rope_scaling", llama3).unwrap();
        assert_eq!(
            config.rope().map(|rope| (rope.kind(), rope.factor)),
            Some(("llama3", Some(8.0)))
        );
        let config = with("rope_scaling", r#"{"type": "linear", "factor": 2}"#).unwrap();
        assert_eq!(config.rope().map(HfRope::kind), Some("linear"));

        let mut json: serde_json::Value = serde_json::from_str(SMOLLM2).unwrap();
        json.as_object_mut().unwrap().remove("rope_theta");
        json["rope_parameters"] = serde_json::json!({"rope_type": "default", "rope_theta": 5e5});
        let config = HfConfig::parse(json.to_string().as_bytes()).unwrap();
        assert_eq!((config.rope_base(), config.rope()), (5e5, None));
    }

    #[test]
    fn end_tokens_may_be_one_several_or_none() {
        assert_eq!(
            with("eos_token_id", "[1, 2]")
                .unwrap()
                .eos_token_id
                .as_slice(),
            [1, 2]
        );
        assert_eq!(
            with("eos_token_id", "null").unwrap().eos_token_id.first(),
            None
        );
        assert!(with("eos_token_id", "-1").is_err());
    }

    #[test]
    fn impossible_numbers_are_refused_by_name() {
        for (name, value) in [
            ("vocab_size", "0"),
            ("vocab_size", "99999999999"),
            ("hidden_size", "0"),
            ("hidden_size", "1000000"),
            ("num_hidden_layers", "100000"),
            ("num_attention_heads", "0"),
            ("num_attention_heads", "7"),
            ("num_key_value_heads", "0"),
            ("num_key_value_heads", "2"),
            ("head_dim", "0"),
            ("max_position_embeddings", "0"),
            ("rms_norm_eps", "0"),
            ("rms_norm_eps", "-1e-5"),
            ("rope_theta", "0"),
        ] {
            match with(name, value) {
                Err(Problem::Field { field, .. }) => assert!(
                    field == name
                        || (name, value) == ("hidden_size", "0")
                        || name == "num_attention_heads",
                    "{name} = {value} blamed on {field}"
                ),
                other => panic!("{name} = {value} gave {other:?}"),
            }
        }
        assert!(with("hidden_size", "-1").is_err());
        assert!(with("hidden_size", "1e30").is_err());
        assert!(
            HfConfig::parse(b"{}")
                .unwrap_err()
                .to_string()
                .contains("vocab_size")
        );
    }
}
