//! Merges an adapter into a GGUF, all matrices as Q8_0 or another type.
//!
//!     merge --base FILE --adapter DIR --out FILE [--dtype F16]
//!
//! `cargo xtask peers merge` gives the result to llama.cpp.

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;

use bantam_formats::{DType, open_model};
use bantam_lab::export::{MergeFormat, merge, read_adapter};
use bantam_model::ModelConfig;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let given: HashMap<&str, &str> = words
        .chunks_exact(2)
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect();
    let needed = |name: &str| {
        given
            .get(name)
            .copied()
            .ok_or_else(|| format!("`{name}` is missing"))
    };
    let dtype = given.get("--dtype").copied().unwrap_or("F16");
    let dtype =
        DType::from_name(dtype).ok_or_else(|| format!("`{dtype}` is no type of weights"))?;
    let base = open_model(Path::new(needed("--base")?))?;
    let config = ModelConfig::from_files(&base)?;
    let adapter = read_adapter(Path::new(needed("--adapter")?), &config)?;
    merge(
        &base,
        &adapter,
        MergeFormat::Gguf(dtype),
        Path::new(needed("--out")?),
    )?;
    Ok(())
}
