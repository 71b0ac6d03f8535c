//! Adapters as PEFT writes and reads them.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bantam_formats::SafetensorsFile;
use bantam_model::{LoraConfig, LoraLayout, LoraPart, LoraTensor, ModelConfig, Proj};
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::train::{AdapterFile, TrainError};

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const IDENTITY: &str = "bantam.json";
const TEMPLATE: &str = "chat_template.jinja";
/// Longest of the small files that is read: theirs are of a few kilobytes.
const SMALL_FILE_BYTES: u64 = 16 << 20;
/// Highest rank that is read.
const MAX_RANK: u64 = 1024;

/// Which base an adapter belongs to (a trained model comes from) and how it was prompted; `bantam.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AdapterIdentity {
    /// Version of bantam that trained it.
    pub version: String,
    /// Name of the base, as given.
    pub base: String,
    /// SHA-256 of the base's weights.
    pub base_sha256: String,
    /// System message of rows that had none; empty for none.
    pub system: String,
    /// The chat template; a file of its own.
    #[serde(skip)]
    pub chat_template: Option<String>,
}

/// An adapter read back.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Rank, scale and targets.
    pub config: LoraConfig,
    /// All tensors, flat, in the order of the model's layout.
    pub params: Vec<f32>,
    /// What `bantam.json` says; `None` if another program wrote the adapter.
    pub identity: Option<AdapterIdentity>,
}

/// Writes `bantam.json` into a folder.
pub(super) fn write_identity(identity: &AdapterIdentity, dir: &Path) -> Result<(), TrainError> {
    Ok(bantam_formats::atomic::write(
        &dir.join(IDENTITY),
        &pretty(identity)?,
    )?)
}

/// Name of a tensor of an adapter in PEFT's file.
pub fn peft_name(tensor: &LoraTensor) -> String {
    let part = match tensor.part {
        LoraPart::A => 'A',
        LoraPart::B => 'B',
    };
    format!(
        "base_model.model.model.layers.{}.{}.lora_{part}.weight",
        tensor.layer,
        tensor.proj.path()
    )
}

/// The files of an adapter, the weights first. Equal arguments give equal bytes.
///
/// Panics if `params` is not of the layout's length.
pub fn adapter_files(
    config: &LoraConfig,
    layout: &LoraLayout,
    params: &[f32],
    identity: &AdapterIdentity,
) -> Result<Vec<AdapterFile>, TrainError> {
    assert_eq!(params.len(), layout.n_params(), "one number per parameter");
    let views = layout.tensors().iter().map(|tensor| {
        let shape = [tensor.rows, tensor.cols];
        (
            peft_name(tensor),
            Floats {
                shape,
                values: &params[tensor.range.clone()],
            },
        )
    });
    // One entry only: a map of more would come out in another order each time.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let weights =
        safetensors::serialize(views, Some(metadata)).map_err(|e| TrainError::Adapter {
            path: WEIGHTS.into(),
            reason: e.to_string(),
        })?;
    let mut files = vec![
        AdapterFile {
            name: WEIGHTS.into(),
            bytes: weights,
        },
        AdapterFile {
            name: CONFIG.into(),
            bytes: pretty(&peft_config(config, identity))?,
        },
        AdapterFile {
            name: IDENTITY.into(),
            bytes: pretty(identity)?,
        },
    ];
    if let Some(template) = &identity.chat_template {
        files.push(AdapterFile {
            name: TEMPLATE.into(),
            bytes: template.clone().into_bytes(),
        });
    }
    Ok(files)
}

/// What PEFT's `LoraConfig` would write for this adapter.
fn peft_config(config: &LoraConfig, identity: &AdapterIdentity) -> Value {
    let alpha = if config.alpha.fract() == 0.0 {
        json!(config.alpha as i64)
    } else {
        json!(config.alpha)
    };
    let targets: Vec<&str> = config.targets.iter().map(|proj| proj.name()).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": identity.base,
        "r": config.rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": null,
    })
}

fn pretty<T: Serialize>(value: &T) -> Result<Vec<u8>, TrainError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| TrainError::io(Path::new(CONFIG), e.into()))?;
    text.push(b'\n');
    Ok(text)
}

/// The fields of PEFT's configuration that change what an adapter computes.
#[derive(Deserialize)]
struct PeftConfig {
    #[serde(default)]
    peft_type: Option<String>,
    r: u64,
    lora_alpha: f64,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    fan_in_fan_out: Option<bool>,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    use_dora: Option<bool>,
    #[serde(default)]
    modules_to_save: Option<Value>,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, Value>>,
}

impl PeftConfig {
    /// Something this adapter needs that is not computed here.
    fn unsupported(&self) -> Option<&'static str> {
        let is = |flag: Option<bool>| flag.unwrap_or(false);
        let given =
            |map: &Option<BTreeMap<String, Value>>| map.as_ref().is_some_and(|map| !map.is_empty());
        let saved = self
            .modules_to_save
            .as_ref()
            .is_some_and(|m| !m.is_null() && m != &json!([]));
        [
            (
                self.peft_type.as_deref().is_some_and(|kind| kind != "LORA"),
                "a `peft_type` other than `LORA`",
            ),
            (
                self.bias.as_deref().is_some_and(|bias| bias != "none"),
                "trained biases",
            ),
            (is(self.fan_in_fan_out), "`fan_in_fan_out`"),
            (is(self.use_rslora), "`use_rslora`"),
            (is(self.use_dora), "`use_dora`"),
            (saved, "`modules_to_save`"),
            (given(&self.rank_pattern), "`rank_pattern`"),
            (given(&self.alpha_pattern), "`alpha_pattern`"),
        ]
        .into_iter()
        .find_map(|(found, what)| found.then_some(what))
    }
}

/// Reads an adapter for a model. Every tensor must be there, fit, and be finite; none may be left over.
pub fn read_adapter(dir: &Path, model: &ModelConfig) -> Result<Adapter, TrainError> {
    let config_path = dir.join(CONFIG);
    let bad_config = |reason: String| TrainError::Adapter {
        path: config_path.clone(),
        reason,
    };
    let peft: PeftConfig = serde_json::from_slice(&read_small(&config_path)?)
        .map_err(|e| bad_config(e.to_string()))?;
    if let Some(what) = peft.unsupported() {
        return Err(bad_config(format!(
            "{what} cannot be used here; only plain LoRA can"
        )));
    }
    if !(1..=MAX_RANK).contains(&peft.r) {
        return Err(bad_config(format!(
            "`r` is {}, expected 1 to {MAX_RANK}",
            peft.r
        )));
    }
    if !(peft.lora_alpha.is_finite() && peft.lora_alpha > 0.0) {
        return Err(bad_config(format!(
            "`lora_alpha` is {}, expected a number above 0",
            peft.lora_alpha
        )));
    }

    let path = dir.join(WEIGHTS);
    let bad = |reason: String| TrainError::Adapter {
        path: path.clone(),
        reason,
    };
    let file = SafetensorsFile::open(&path)?;
    if let Some((name, dtype)) = file.unsupported().first() {
        return Err(bad(format!(
            "tensor `{name}` is of type {dtype}, which is not a float"
        )));
    }
    // The targets are the modules that have tensors: `target_modules` may be a pattern.
    let names = file.tensors().iter().map(|tensor| tensor.name.as_str());
    let modules: Vec<&str> = names
        .filter_map(|name| name.split(".lora_").next()?.rsplit('.').next())
        .collect();
    let targets = Proj::ALL
        .into_iter()
        .filter(|proj| modules.contains(&proj.name()))
        .collect();
    let config = LoraConfig {
        rank: peft.r as usize,
        alpha: peft.lora_alpha,
        targets,
    };
    let layout = LoraLayout::new(&config, model);
    let mut params = vec![0f32; layout.n_params()];
    for tensor in layout.tensors() {
        let name = peft_name(tensor);
        let found = file
            .tensor(&name)
            .ok_or_else(|| bad(format!("tensor `{name}` is missing")))?;
        let expected = [tensor.rows, tensor.cols];
        if found.shape != expected {
            let shape = &found.shape;
            return Err(bad(format!(
                "tensor `{name}` has shape {shape:?}, but this base needs {expected:?}"
            )));
        }
        let values = bantam_model::read_tensor(&found);
        if values.iter().any(|x| !x.is_finite()) {
            return Err(bad(format!(
                "tensor `{name}` holds a number that is not finite"
            )));
        }
        params[tensor.range.clone()].copy_from_slice(&values);
    }
    let known: Vec<String> = layout.tensors().iter().map(peft_name).collect();
    if let Some(other) = file
        .tensors()
        .iter()
        .find(|tensor| !known.contains(&tensor.name))
    {
        return Err(bad(format!(
            "tensor `{}` has no place in this base",
            other.name
        )));
    }
    if params.is_empty() {
        return Err(bad("there are no tensors in it".to_string()));
    }
    Ok(Adapter {
        config,
        params,
        identity: read_identity(dir)?,
    })
}

/// What `bantam.json` in an adapter's or a trained model's folder says, if it is there.
pub fn read_identity(dir: &Path) -> Result<Option<AdapterIdentity>, TrainError> {
    let path = dir.join(IDENTITY);
    if !path.exists() {
        return Ok(None);
    }
    let mut identity: AdapterIdentity =
        serde_json::from_slice(&read_small(&path)?).map_err(|e| TrainError::Adapter {
            path,
            reason: e.to_string(),
        })?;
    let template = dir.join(TEMPLATE);
    if template.exists() {
        let text = String::from_utf8(read_small(&template)?);
        identity.chat_template = Some(text.map_err(|e| TrainError::Adapter {
            path: template,
            reason: e.to_string(),
        })?);
    }
    Ok(Some(identity))
}

fn read_small(path: &Path) -> Result<Vec<u8>, TrainError> {
    let n_bytes = std::fs::metadata(path)
        .map_err(|e| TrainError::io(path, e))?
        .len();
    if n_bytes > SMALL_FILE_BYTES {
        let reason = format!("it has {n_bytes} bytes, more than any such file needs");
        return Err(TrainError::Adapter {
            path: path.to_path_buf(),
            reason,
        });
    }
    std::fs::read(path).map_err(|e| TrainError::io(path, e))
}

/// A matrix about to be written.
struct Floats<'a> {
    shape: [usize; 2],
    values: &'a [f32],
}

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    }

    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}
