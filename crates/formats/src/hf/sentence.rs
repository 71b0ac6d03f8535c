//! What sentence-transformers adds to a folder: how long a text may be, and how its rows become one vector.

use super::json_or_default;
use crate::{FormatError, Problem, limits};
use serde::Deserialize;
use std::path::Path;

/// How the rows of a sequence become one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all rows.
    #[default]
    Mean,
    /// The first row, of the token `[CLS]`.
    Cls,
}

/// The settings of a sentence encoder. A folder without them is read as most encoders are made: mean, then length 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentenceConfig {
    /// The longest sequence, special tokens included.
    pub max_seq_length: Option<usize>,
    /// How the rows of a sequence become one vector.
    pub pooling: Pooling,
    /// Whether vectors are scaled to length 1.
    pub normalize: bool,
}

/// `sentence_bert_config.json`
#[derive(Debug, Default, Deserialize)]
struct Lengths {
    #[serde(default)]
    max_seq_length: Option<usize>,
}

/// An entry of `modules.json`.
#[derive(Debug, Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// `1_Pooling/config.json`
#[derive(Debug, Default, Deserialize)]
struct PoolingModes {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

/// The settings in `dir`.
pub(super) fn read(dir: &Path) -> Result<SentenceConfig, FormatError> {
    let lengths_path = dir.join("sentence_bert_config.json");
    let lengths: Lengths = json_or_default(&lengths_path, limits::CONFIG_BYTES)?;
    if let Some(found) = lengths.max_seq_length
        && !(3..=limits::CONTEXT).contains(&found)
    {
        return Err(Problem::Field {
            field: "max_seq_length".into(),
            found: found.to_string(),
            expected: format!("it has to lie between 3 and {}", limits::CONTEXT),
        }
        .at(&lengths_path));
    }
    let modules_path = dir.join("modules.json");
    let modules: Vec<Module> = json_or_default(&modules_path, limits::CONFIG_BYTES)?;
    let mut config = SentenceConfig {
        max_seq_length: lengths.max_seq_length,
        pooling: Pooling::Mean,
        normalize: modules.is_empty(),
    };
    for module in &modules {
        match module.kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" => {}
            "Pooling" => config.pooling = pooling(dir, &module.path)?,
            "Normalize" => config.normalize = true,
            _ => {
                return Err(Problem::Field {
                    field: "type".into(),
                    found: module.kind.chars().take(80).collect(),
                    expected: "`Transformer`, `Pooling` and `Normalize` are supported".into(),
                }
                .at(&modules_path));
            }
        }
    }
    Ok(config)
}

/// The pooling of the module in `folder`, a name in `dir`.
fn pooling(dir: &Path, folder: &str) -> Result<Pooling, FormatError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    if !folder.chars().all(plain) {
        return Err(Problem::Field {
            field: "path".into(),
            found: folder.chars().take(80).collect(),
            expected: "it has to be the name of a folder beside the file".into(),
        }
        .at(&dir.join("modules.json")));
    }
    let path = dir.join(folder).join("config.json");
    let bytes = crate::bytes::read_if_there(&path, "the file's length", limits::CONFIG_BYTES)?;
    let Some(bytes) = bytes else {
        // Left out when the folder was copied; almost every encoder means the mean.
        return Ok(Pooling::Mean);
    };
    let modes: PoolingModes = super::parse_json(&bytes, &path)?;
    let others = modes.pooling_mode_max_tokens
        || modes.pooling_mode_mean_sqrt_len_tokens
        || modes.pooling_mode_weightedmean_tokens
        || modes.pooling_mode_lasttoken;
    match (modes.pooling_mode_mean_tokens, modes.pooling_mode_cls_token) {
        (true, false) if !others => Ok(Pooling::Mean),
        (false, true) if !others => Ok(Pooling::Cls),
        _ => Err(Problem::Field {
            field: "pooling_mode".into(),
            found: "another one, or several".into(),
            expected: "the mean of all tokens, or the first token alone, is supported".into(),
        }
        .at(&path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(files: &[(&str, &str)]) -> Result<SentenceConfig, FormatError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        read(dir.path())
    }

    const MODULES: &str = r#"[
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]"#;

    #[test]
    fn a_folder_of_sentence_transformers_is_read() {
        let bare = with(&[]).unwrap();
        assert_eq!(
            (bare.max_seq_length, bare.pooling, bare.normalize),
            (None, Pooling::Mean, true)
        );
        let cls = r#"{"word_embedding_dimension": 4, "pooling_mode_cls_token": true}"#;
        let found = with(&[
            (
                "sentence_bert_config.json",
                r#"{"max_seq_length": 256, "do_lower_case": false}"#,
            ),
            ("modules.json", MODULES),
            ("1_Pooling/config.json", cls),
        ]);
        let found = found.unwrap();
        assert_eq!(
            (found.max_seq_length, found.pooling, found.normalize),
            (Some(256), Pooling::Cls, true)
        );
        let no_norm = MODULES.replace("models.Normalize", "models.Transformer");
        assert!(!with(&[("modules.json", &no_norm)]).unwrap().normalize);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let say = |files: &[(&str, &str)]| with(files).unwrap_err().to_string();
        assert!(
            say(&[("sentence_bert_config.json", r#"{"max_seq_length": 0}"#)])
                .contains("max_seq_length")
        );
        assert!(say(&[("modules.json", &MODULES.replace("Normalize", "Dense"))]).contains("Dense"));
        assert!(say(&[("modules.json", &MODULES.replace("1_Pooling", "../x"))]).contains("path"));
        let max = r#"{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}"#;
        let text = say(&[("modules.json", MODULES), ("1_Pooling/config.json", max)]);
        assert!(text.contains("pooling_mode"), "{text}");
    }
}
