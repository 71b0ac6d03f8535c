//! The bytes of a file: mapped, or held in memory.

use crate::FormatError;
use std::ops::{Deref, Range};
use std::path::Path;

pub(crate) enum FileBytes {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps a file for reading.
    pub(crate) fn open(path: &Path) -> Result<FileBytes, FormatError> {
        // Asked before opening: to open a named pipe would wait for a writer.
        let meta = std::fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
        if !meta.is_file() {
            return Err(FormatError::NotAModel {
                path: path.to_owned(),
                reason: "it is not a regular file",
            });
        }
        if meta.len() == 0 {
            // An empty map is an error on some systems.
            return Ok(FileBytes::Owned(Vec::new()));
        }
        let file = std::fs::File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        // SAFETY: the map is read-only and lives as long as the slice borrowed from it. Another process that writes
        // to or cuts the file meanwhile breaks the assumption that it does not change; model files in a cache are
        // replaced by renaming, never in place, and every reader of mapped weights accepts this.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) };
        map.map(FileBytes::Mapped)
            .map_err(|e| FormatError::io("map", path, e))
    }

    /// Lets go of the memory behind a part of a mapped file; it can still be read.
    pub(crate) fn forget(&self, range: Range<usize>) {
        match self {
            #[cfg(unix)]
            FileBytes::Mapped(map) => {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the map is read-only, so its pages are those of the file and come back when they are read.
                // That the system declines is no error: the memory is only held longer.
                #[allow(unsafe_code)]
                let _ = unsafe { map.unchecked_advise_range(advice, range.start, range.len()) };
            }
            _ => {
                let _ = range;
            }
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Mapped(map) => map,
            FileBytes::Owned(bytes) => bytes,
        }
    }
}

/// Reads a whole small file, refusing more than `cap` bytes of it.
pub(crate) fn read_capped(
    path: &Path,
    what: &'static str,
    cap: u64,
) -> Result<Vec<u8>, FormatError> {
    use std::io::Read;
    let file = std::fs::File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let mut bytes = Vec::new();
    // One byte past the cap tells a full file from one too long, whatever its metadata say.
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| FormatError::io("read", path, e))?;
    if bytes.len() as u64 > cap {
        return Err(crate::Problem::OverCap {
            what,
            found: bytes.len() as u64,
            cap,
        }
        .at(path));
    }
    Ok(bytes)
}

/// As [`read_capped`], or `None` if there is no such file.
pub(crate) fn read_if_there(
    path: &Path,
    what: &'static str,
    cap: u64,
) -> Result<Option<Vec<u8>>, FormatError> {
    match read_capped(path, what, cap) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(FormatError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
