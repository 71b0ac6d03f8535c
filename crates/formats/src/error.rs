//! What can be wrong with a file, said with the file's name and the place in it.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was being done: "open", "read", "write" ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason given.
        source: io::Error,
    },
    /// No room was left (or a quota or size limit was hit) while writing; the file is as it was before.
    #[error(
        "no space left to write `{}`; what was there before is untouched; free some space or write to another disk",
        path.display()
    )]
    DiskFull {
        /// The file that was to be written.
        path: PathBuf,
        /// The reason given.
        source: io::Error,
    },
    /// The bytes are not what the format says.
    #[error("`{}`: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A line of a JSONL file is bad.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A model path that is neither a GGUF file nor a Hugging Face folder.
    #[error("`{}` is not a model: {reason}", path.display())]
    NotAModel {
        /// The path.
        path: PathBuf,
        /// Why not, and what would be.
        reason: &'static str,
    },
}

/// What is wrong with some bytes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The first bytes are another format's.
    #[error("not a {format} file")]
    Magic {
        /// The format expected.
        format: &'static str,
    },
    /// A version that is not known.
    #[error("GGUF version {found} is not known (2 and 3 are){}", big_endian_hint(*found))]
    Version {
        /// The version stated.
        found: u32,
    },
    /// The file ends early.
    #[error("ends in the middle of {what} at byte {offset}; is the download complete?")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it began.
        offset: u64,
    },
    /// More of something than any real file has.
    #[error("{what} is {found}, more than the {cap} allowed")]
    OverCap {
        /// What is counted.
        what: &'static str,
        /// The count stated.
        found: u64,
        /// The most allowed.
        cap: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// What was being read.
        what: &'static str,
        /// Where it began.
        offset: u64,
    },
    /// A type code that is not known.
    #[error("{what} has type code {code}, which is not known")]
    TypeCode {
        /// What was being read.
        what: String,
        /// The code.
        code: u32,
    },
    /// A tensor type that exists but is not read here.
    #[error(
        "tensor `{tensor}` has type {dtype}, which is not supported; convert the model to one of {}",
        crate::DType::names()
    )]
    DType {
        /// The tensor.
        tensor: String,
        /// The type.
        dtype: String,
    },
    /// The same name twice.
    #[error("{what} `{name}` appears twice")]
    Duplicate {
        /// What has the name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A shape that no tensor of its type can have.
    #[error("tensor `{tensor}` has the impossible shape {shape:?} for {dtype}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape stated, in the file's order.
        shape: Vec<u64>,
        /// Its type.
        dtype: &'static str,
    },
    /// A tensor whose data lie outside the file.
    #[error(
        "tensor `{tensor}` lies at bytes {start}..{end} of {available} bytes of data; is the download complete?"
    )]
    OutOfBounds {
        /// The tensor.
        tensor: String,
        /// The first byte.
        start: u64,
        /// The byte after the last.
        end: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// A tensor that does not begin where tensors may.
    #[error("tensor `{tensor}` begins at byte {offset}, which is not a multiple of {alignment}")]
    Unaligned {
        /// The tensor.
        tensor: String,
        /// Where it begins.
        offset: u64,
        /// What that must be a multiple of.
        alignment: u64,
    },
    /// Two tensors share bytes, or leave bytes between them where the format forbids it.
    #[error("tensor `{second}` does not begin where `{first}` ends")]
    NotAdjacent {
        /// The tensor that lies first.
        first: String,
        /// The one after it.
        second: String,
    },
    /// JSON that does not parse or does not fit.
    #[error("{message}")]
    Json {
        /// What the parser says, with line and column.
        message: String,
    },
    /// A field with a value that it cannot have.
    #[error("`{field}` is {found}; {expected}")]
    Field {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// Something that has to be there is not.
    #[error("{what} is missing")]
    Missing {
        /// What is missing.
        what: String,
    },
    /// A path that leads out of the folder.
    #[error("the index names the file `{file}`, which is not inside the folder")]
    Escape {
        /// The path as the index has it.
        file: String,
    },
    /// The writer was handed something other than what it was told to expect.
    #[error("the writer expected {expected} and was handed {found}")]
    Writer {
        /// What was announced.
        expected: String,
        /// What came.
        found: String,
    },
}

fn big_endian_hint(version: u32) -> &'static str {
    match version.swap_bytes() {
        2 | 3 => "; it looks big-endian, convert it with `gguf_convert_endian.py`",
        _ if version == 1 => "; version 1 is from 2023, convert the model again",
        _ => "",
    }
}

impl Problem {
    /// The error that this problem is in the file at `path`.
    pub(crate) fn at(self, path: &Path) -> FormatError {
        FormatError::Invalid {
            path: path.to_owned(),
            problem: self,
        }
    }

    pub(crate) fn json(error: &serde_json::Error) -> Problem {
        Problem::Json {
            message: error.to_string(),
        }
    }

    /// A writer was handed a tensor other than the next one announced (name and bytes), or one too many.
    pub(crate) fn unexpected(next: Option<(String, usize)>, name: &str, n_bytes: usize) -> Problem {
        let tensor = |name: &str, n: usize| format!("tensor `{name}` of {n} bytes");
        Problem::Writer {
            expected: next.map_or("no more tensors".into(), |(name, n)| tensor(&name, n)),
            found: tensor(name, n_bytes),
        }
    }

    /// Refuses a stated count over `cap`, and returns it as an index otherwise.
    pub(crate) fn capped(what: &'static str, found: u64, cap: usize) -> Result<usize, Problem> {
        match usize::try_from(found) {
            Ok(n) if n <= cap => Ok(n),
            _ => Err(Problem::OverCap {
                what,
                found,
                cap: cap as u64,
            }),
        }
    }
}

impl FormatError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> FormatError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => FormatError::DiskFull { path, source },
            _ => FormatError::Io {
                action,
                path,
                source,
            },
        }
    }
}
