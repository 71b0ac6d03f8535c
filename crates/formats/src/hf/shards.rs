//! The weights of a folder: `model.safetensors`, or shards under `model.safetensors.index.json`.

use super::read_json;
use crate::{FormatError, Problem, SafetensorsFile, TensorInfo, TensorRef, limits};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Every weight file of a folder, open.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) files: Vec<SafetensorsFile>,
    pub(super) infos: Vec<TensorInfo>,
    file_of: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    /// Tensor to file.
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    pub(super) fn open(dir: &Path) -> Result<Weights, FormatError> {
        // A folder that has both was re-saved; transformers takes the single file too.
        if dir.join(SINGLE).is_file() {
            return Weights::single(SafetensorsFile::open(&dir.join(SINGLE))?);
        }
        if dir.join(INDEX).is_file() {
            return Weights::sharded(dir);
        }
        Err(FormatError::NotAModel {
            path: dir.to_owned(),
            reason: if dir.join("pytorch_model.bin").exists() {
                "its weights are `pytorch_model.bin`, which is a program and is not run; save it as safetensors"
            } else {
                "the folder has neither `model.safetensors` nor `model.safetensors.index.json`"
            },
        })
    }

    fn single(file: SafetensorsFile) -> Result<Weights, FormatError> {
        let infos = file.tensors().to_vec();
        Ok(Weights {
            file_of: infos.iter().map(|info| (info.name.clone(), 0)).collect(),
            infos,
            files: vec![file],
        })
    }

    fn sharded(dir: &Path) -> Result<Weights, FormatError> {
        let path = dir.join(INDEX);
        let index: Index = read_json(&path, limits::INDEX_BYTES)?;
        let names = check_names(&index).map_err(|problem| problem.at(&path))?;
        let mut weights = Weights {
            files: Vec::with_capacity(names.len()),
            infos: Vec::with_capacity(index.weight_map.len()),
            file_of: HashMap::with_capacity(index.weight_map.len()),
        };
        for name in names.keys() {
            weights.files.push(SafetensorsFile::open(&dir.join(name))?);
        }
        for (tensor, name) in &index.weight_map {
            let i = names[name.as_str()];
            let file = &weights.files[i];
            if let Some(found) = file.tensor(tensor) {
                weights.infos.push(TensorInfo {
                    name: tensor.clone(),
                    dtype: found.dtype,
                    shape: found.shape,
                    n_bytes: found.bytes.len(),
                });
                weights.file_of.insert(tensor.clone(), i);
            } else if !file.unsupported().iter().any(|(name, _)| name == tensor) {
                return Err(Problem::Missing {
                    what: format!("tensor `{tensor}`, which `{INDEX}` says is in this file,"),
                }
                .at(file.path()));
            }
        }
        Ok(weights)
    }

    pub(super) fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.files[*self.file_of.get(name)?].tensor(name)
    }

    pub(super) fn forget(&self, name: &str) {
        if let Some(&i) = self.file_of.get(name) {
            self.files[i].forget(name);
        }
    }
}

/// The index's files, numbered; each has to be a plain path inside the folder. (A link may lead out of it: the hub's
/// own cache is made of such links.)
fn check_names(index: &Index) -> Result<BTreeMap<&str, usize>, Problem> {
    Problem::capped(
        "the number of tensors",
        index.weight_map.len() as u64,
        limits::TENSORS,
    )?;
    let mut names: BTreeMap<&str, usize> = index
        .weight_map
        .values()
        .map(|name| (name.as_str(), 0))
        .collect();
    Problem::capped("the number of shards", names.len() as u64, limits::SHARDS)?;
    for (i, (name, number)) in names.iter_mut().enumerate() {
        *number = i;
        let inside = !name.is_empty()
            && !name.contains(['\\', ':', '\0'])
            && Path::new(name)
                .components()
                .all(|part| matches!(part, Component::Normal(_)));
        if !inside {
            return Err(Problem::Escape {
                file: (*name).into(),
            });
        }
    }
    Ok(names)
}
