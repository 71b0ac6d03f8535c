//! Files that are either whole or not there.
//!
//! Bytes go to a temporary file beside the target, reach the disk (`fsync`), and then take the target's name in one
//! step. Whatever happens before that step, the file that was there stays as it was and the temporary file is removed.

use crate::FormatError;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a whole file in one step.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let mut file = AtomicFile::create(path)?;
    file.write_bytes(bytes)?;
    file.commit()
}

/// A file being written that appears under its name when it is committed, and not at all otherwise.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temp: PathBuf,
    /// `None` once committed.
    file: Option<BufWriter<File>>,
    written: u64,
}

impl AtomicFile {
    /// Begins a file. The folder has to exist.
    pub fn create(target: &Path) -> Result<AtomicFile, FormatError> {
        // Process and counter make the name free, so that two writers do not share one.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let Some(name) = target.file_name() else {
            return Err(FormatError::io(
                "create",
                target,
                io::ErrorKind::InvalidFilename.into(),
            ));
        };
        let mut temp_name = std::ffi::OsString::from(".");
        temp_name.push(name);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        temp_name.push(format!(".{}-{count}.tmp", std::process::id()));
        let temp = target.with_file_name(temp_name);
        let file = File::create(&temp).map_err(|e| FormatError::io("create", target, e))?;
        Ok(AtomicFile {
            target: target.to_owned(),
            temp,
            file: Some(BufWriter::with_capacity(1 << 16, file)),
            written: 0,
        })
    }

    /// Appends bytes.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.write_all(bytes)
            .map_err(|e| FormatError::io("write", &self.target, e))
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Puts the file under its name, once it is on the disk.
    pub fn commit(mut self) -> Result<(), FormatError> {
        let result = self.put_in_place();
        if result.is_ok() {
            self.file = None;
        }
        result.map_err(|e| FormatError::io("write", &self.target, e))
    }

    fn put_in_place(&mut self) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        fs::rename(&self.temp, &self.target)?;
        sync_folder(&self.target)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = match &mut self.file {
            Some(file) => file.write(bytes)?,
            None => 0,
        };
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // Without the flush that dropping the buffer would try: the bytes are not wanted.
            drop(file.into_parts().0);
            let _ = fs::remove_file(&self.temp);
        }
    }
}

/// Makes a renaming last through a power cut: the folder is what records it.
#[cfg(unix)]
fn sync_folder(target: &Path) -> io::Result<()> {
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot sync a folder; the rename itself has succeeded.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

#[cfg(not(unix))]
fn sync_folder(_target: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn writes_and_replaces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn nothing_is_left_of_a_file_that_was_not_committed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write(&path, b"one").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_bytes(&[7; 100_000]).unwrap();
        assert_eq!(file.written(), 100_000);
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!(names(folder.path()), ["a.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(&folder.path().join("no/a.json"), b"").unwrap_err();
        assert!(error.to_string().contains("no/a.json"), "{error}");
    }

    /// `/dev/full` answers every write as a full disk does.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_apart() {
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let source = full.write_all(b"x").unwrap_err();
        let error = FormatError::io("write", Path::new("a.json"), source);
        assert!(matches!(error, FormatError::DiskFull { .. }), "{error:?}");
        assert!(
            error
                .to_string()
                .starts_with("no space left to write `a.json`")
        );
    }
}
