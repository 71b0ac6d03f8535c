//! Files that are either whole or not there.
//!
//! Bytes go to a temporary file beside the target, reach the disk (`fsync`), and then take the target's name in one
//! step. Whatever happens before that step, the file that was there stays as it was and the temporary file is removed.

use crate::FormatError;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
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
    /// Begins a file. The folder has to exist. What a killed writer of the same file left behind is removed.
    pub fn create(target: &Path) -> Result<AtomicFile, FormatError> {
        let refused = |e| FormatError::io("create", target, e);
        let Some(name) = target.file_name() else {
            return Err(refused(io::ErrorKind::InvalidFilename.into()));
        };
        remove_leftovers(target, name);
        // Process and counter make the name free, so that two writers do not share one.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let mut temp_name = temp_prefix(name);
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            temp_name.push(format!("{}-{count}{TEMP_SUFFIX}", std::process::id()));
            let temp = target.with_file_name(temp_name);
            let file = File::create(&temp).map_err(refused)?;
            // The lock says that the writer is alive. Someone who clears leftovers may have come in between: then
            // the lock is taken or the file gone, and the next name is tried. Not every file system has locks.
            if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) || !temp.exists() {
                continue;
            }
            return Ok(AtomicFile {
                target: target.to_owned(),
                temp,
                file: Some(BufWriter::with_capacity(1 << 16, file)),
                written: 0,
            });
        }
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

const TEMP_SUFFIX: &str = ".tmp";

/// How the names of a file's temporary files begin.
fn temp_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    prefix
}

/// Removes temporary files of `target` whose writers are gone, which is to say that nobody holds their locks.
fn remove_leftovers(target: &Path, name: &OsStr) {
    let prefix = temp_prefix(name);
    let Ok(entries) = fs::read_dir(folder_of(target)) else {
        return;
    };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let ours = found
            .as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes());
        let is_temp = ours
            .and_then(|rest| rest.strip_suffix(TEMP_SUFFIX.as_bytes()))
            .is_some_and(|rest| rest.iter().all(|b| b.is_ascii_digit() || *b == b'-'));
        if is_temp && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            // A leftover that cannot be removed is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes a renaming last through a power cut: the folder is what records it.
#[cfg(unix)]
fn sync_folder(target: &Path) -> io::Result<()> {
    match File::open(folder_of(target))?.sync_all() {
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
    fn leftovers_of_a_killed_writer_are_removed_and_those_of_a_live_one_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        for name in [".a.json.123-0.tmp", ".a.json.5.x.tmp", ".b.json.123-0.tmp"] {
            fs::write(folder.path().join(name), "half").unwrap();
        }
        let live = AtomicFile::create(&path).unwrap();
        write(&path, b"two").unwrap();
        live.commit().unwrap();
        assert_eq!(
            names(folder.path()),
            [".a.json.5.x.tmp", ".b.json.123-0.tmp", "a.json"]
        );
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
