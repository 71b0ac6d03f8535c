//! From what the user typed (a catalogue name, a path, a run directory) to what can be opened.

use std::path::{Path, PathBuf};

use anyhow::anyhow;

use crate::catalogue::{Catalogue, Entry};
use crate::error::advise;

/// What a model argument stands for.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// A run directory of `bantam train`: an adapter and the name of its base.
    Run(PathBuf),
    /// A GGUF file or Hugging Face folder.
    Path(PathBuf),
    /// A base model of the catalogue.
    Catalogue(&'a Entry),
}

/// Tells the three apart: an existing path wins over a catalogue name only if it is written as a path or the name is unknown.
pub(crate) fn place<'a>(catalogue: &'a Catalogue, text: &str) -> anyhow::Result<Place<'a>> {
    let path = Path::new(text);
    let written_as_path =
        text.contains(['/', '\\']) || text.starts_with('.') || text.ends_with(".gguf");
    if !written_as_path && let Some(entry) = catalogue.get(text) {
        return Ok(Place::Catalogue(entry));
    }
    if path.is_dir() && is_run(path) {
        return Ok(Place::Run(path.to_owned()));
    }
    if path.exists() {
        return Ok(Place::Path(path.to_owned()));
    }
    if written_as_path {
        return Err(advise(
            anyhow!("there is no file or folder `{text}`"),
            "give a GGUF file, a Hugging Face folder, a run directory, or a name that `bantam models` lists",
        ));
    }
    let hint = match catalogue.nearest(text) {
        Some(near) => format!("did you mean `{near}`? `bantam models` lists all names"),
        None => "`bantam models` lists the names; a GGUF file or Hugging Face folder is given by its path".into(),
    };
    Err(advise(
        anyhow!("there is no model named `{text}`, and no such path"),
        hint,
    ))
}

/// Whether a folder is a run directory: it says so in `bantam.json`.
fn is_run(folder: &Path) -> bool {
    folder.join("bantam.json").is_file()
}

/// The size of a model file, or of all files in a model folder.
pub(crate) fn bytes(path: &Path) -> u64 {
    if path.is_dir() {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        return entries
            .filter_map(|e| std::fs::metadata(e.path()).ok())
            .filter(|m| m.is_file())
            .map(|m| m.len())
            .sum();
    }
    std::fs::metadata(path).map_or(0, |m| m.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Style, render};

    fn catalogue() -> Catalogue {
        Catalogue::load(Path::new("/nonexistent/catalogue.toml")).unwrap()
    }

    #[test]
    fn names_paths_and_runs_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        fs_err::write(at("m.gguf"), "").unwrap();
        fs_err::create_dir(at("run")).unwrap();
        fs_err::write(at("run") + "/bantam.json", "{}").unwrap();
        let catalogue = catalogue();
        assert!(matches!(
            place(&catalogue, "smollm2-135m-instruct").unwrap(),
            Place::Catalogue(_)
        ));
        assert!(matches!(
            place(&catalogue, &at("m.gguf")).unwrap(),
            Place::Path(_)
        ));
        assert!(matches!(
            place(&catalogue, &at("run")).unwrap(),
            Place::Run(_)
        ));
        assert!(matches!(
            place(&catalogue, dir.path().to_str().unwrap()).unwrap(),
            Place::Path(_)
        ));
    }

    #[test]
    fn what_is_not_there_comes_with_advice() {
        let catalogue = catalogue();
        let say = |text: &str| {
            render(
                &place(&catalogue, text).unwrap_err(),
                Style { color: false },
            )
        };
        insta::assert_snapshot!([say("./nowhere.gguf"), say("smollm2-135m"), say("zzz")].concat(), @r#"
        error: there is no file or folder `./nowhere.gguf`
        hint: give a GGUF file, a Hugging Face folder, a run directory, or a name that `bantam models` lists
        error: there is no model named `smollm2-135m`, and no such path
        hint: did you mean `smollm2-135m-instruct`? `bantam models` lists all names
        error: there is no model named `zzz`, and no such path
        hint: `bantam models` lists the names; a GGUF file or Hugging Face folder is given by its path
        "#);
    }
}
