//! A model folder as Hugging Face lays it out: `config.json`, safetensors (one file or shards under an index),
//! `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, `chat_template.jinja`.

mod config;
mod sentence;
mod shards;
mod tokenizer_config;

pub use config::{GenerationConfig, HfConfig, HfRope, TokenIds};
pub use sentence::{Pooling, SentenceConfig};
pub use tokenizer_config::TokenizerConfig;

use crate::bytes::{read_capped, read_if_there};
use crate::{FormatError, Problem, TensorInfo, TensorRef, limits};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// An open model folder. Small files are parsed, weights mapped and checked.
#[derive(Debug)]
pub struct HfFolder {
    /// `config.json`.
    pub config: HfConfig,
    dir: PathBuf,
    weights: shards::Weights,
    tokenizer_config: TokenizerConfig,
    generation_config: GenerationConfig,
    chat_template: Option<String>,
}

impl HfFolder {
    /// Opens a folder.
    pub fn open(dir: &Path) -> Result<HfFolder, FormatError> {
        let config_path = dir.join("config.json");
        let Some(config) = read_if_there(&config_path, "the file's length", limits::CONFIG_BYTES)?
        else {
            return Err(FormatError::NotAModel {
                path: dir.to_owned(),
                reason: "the folder has no `config.json`; name a folder from Hugging Face or a `.gguf` file",
            });
        };
        let config = HfConfig::parse(&config).map_err(|problem| problem.at(&config_path))?;
        let tokens: TokenizerConfig = json_or_default(
            &dir.join("tokenizer_config.json"),
            limits::TOKENIZER_CONFIG_BYTES,
        )?;
        let more_tokens = json_or_default(
            &dir.join("special_tokens_map.json"),
            limits::TOKENIZER_CONFIG_BYTES,
        )?;
        let tokenizer_config = tokens.or(more_tokens);
        Ok(HfFolder {
            config,
            weights: shards::Weights::open(dir)?,
            generation_config: json_or_default(
                &dir.join("generation_config.json"),
                limits::CONFIG_BYTES,
            )?,
            chat_template: template_file(dir)?
                .or(tokenizer_config.chat_template().map(str::to_owned)),
            tokenizer_config,
            dir: dir.to_owned(),
        })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.weights.tensor(name)
    }

    /// Lets go of the memory that reading a tensor took; it can still be read.
    pub fn forget(&self, name: &str) {
        self.weights.forget(name);
    }

    /// What the files say of each tensor.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.weights.infos
    }

    /// Names and types of tensors whose type is not read here (integers, 8-bit floats).
    pub fn unsupported(&self) -> impl Iterator<Item = &(String, String)> {
        self.weights
            .files
            .iter()
            .flat_map(|file| file.unsupported())
    }

    /// The bytes of `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>, FormatError> {
        let path = self.dir.join("tokenizer.json");
        read_if_there(&path, "the file's length", limits::TOKENIZER_BYTES)?.ok_or_else(|| {
            Problem::Missing {
                what:
                    "`tokenizer.json` (older models: load it with transformers and save it again)"
                        .into(),
            }
            .at(&self.dir)
        })
    }

    /// What sentence-transformers says of a sentence encoder; its defaults where it says nothing.
    pub fn sentence_config(&self) -> Result<SentenceConfig, FormatError> {
        sentence::read(&self.dir)
    }

    /// The chat template: `chat_template.jinja` if there is one, otherwise what `tokenizer_config.json` holds.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The special tokens.
    pub fn tokenizer_config(&self) -> &TokenizerConfig {
        &self.tokenizer_config
    }

    /// The ids in `generation_config.json`; empty if there is no such file.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// The ids that end a generation: `generation_config.json`'s, or else `config.json`'s.
    pub fn eos_token_ids(&self) -> &[u32] {
        match self.generation_config.eos_token_id.as_slice() {
            [] => self.config.eos_token_id.as_slice(),
            ids => ids,
        }
    }
}

/// A template in a file of its own: bare, or in JSON as processors have it.
fn template_file(dir: &Path) -> Result<Option<String>, FormatError> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = read_if_there(&path, "the file's length", limits::TOKENIZER_CONFIG_BYTES)?
    {
        let text = String::from_utf8(bytes).map_err(|e| {
            Problem::NotUtf8 {
                what: "the template",
                offset: e.utf8_error().valid_up_to() as u64,
            }
            .at(&path)
        })?;
        return Ok(Some(text));
    }
    let holder: TokenizerConfig = json_or_default(
        &dir.join("chat_template.json"),
        limits::TOKENIZER_CONFIG_BYTES,
    )?;
    Ok(holder.chat_template().map(str::to_owned))
}

fn json_or_default<T: DeserializeOwned + Default>(path: &Path, cap: u64) -> Result<T, FormatError> {
    match read_if_there(path, "the file's length", cap)? {
        Some(bytes) => parse_json(&bytes, path),
        None => Ok(T::default()),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path, cap: u64) -> Result<T, FormatError> {
    parse_json(&read_capped(path, "the file's length", cap)?, path)
}

fn parse_json<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T, FormatError> {
    serde_json::from_slice(bytes).map_err(|e| Problem::json(&e).at(path))
}
