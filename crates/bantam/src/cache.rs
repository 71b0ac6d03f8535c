//! The content-addressed cache of fetched files.
//!
//! ```text
//! blobs/sha256-<hex>      the bytes, written once, read-only
//! refs/<name>.json        which blobs a model is made of, with the size and time seen when they were verified
//! models/<name>/<path>    the same bytes under their own names (hard links), which is what loaders open
//! partial/                downloads that are not finished
//! locks/<name>.lock       held by the process that fetches
//! ```
//!
//! Every file appears whole or not at all: it is written beside its place, synced, then renamed.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The cache's root folder and what is done in it.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// What a name stands for: the files that were fetched for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ref {
    /// The source as the catalogue wrote it; another source under the same name is another model.
    pub(crate) source: String,
    /// The commit that a branch or tag of the source stood for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) commit: Option<String>,
    /// The files.
    pub(crate) files: Vec<RefFile>,
}

impl Ref {
    /// Total size.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }
}

/// One file of a [`Ref`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RefFile {
    /// Its name in the model's folder.
    pub(crate) path: String,
    /// Its digest, which names its blob.
    pub(crate) sha256: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// The blob's modification time when it was last verified, in nanoseconds since 1970.
    pub(crate) modified_ns: u64,
}

/// A lock that ends when it is dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// The cache under `root`; nothing is created until something is stored.
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache's folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the lock of `name`; calls `on_wait` if another process holds it, then waits for that one to end.
    pub(crate) fn lock(&self, name: &str, on_wait: impl FnOnce()) -> anyhow::Result<Lock> {
        let path = self
            .folder("locks")?
            .join(format!("{}.lock", file_name(name)));
        let file = File::options().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("could not open `{}`", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                on_wait();
                file.lock()
                    .with_context(|| format!("could not lock `{}`", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("could not lock `{}`", path.display()));
            }
        }
        Ok(Lock { _file: file })
    }

    /// What `name` stands for, if it was fetched and its record can be read.
    pub(crate) fn read_ref(&self, name: &str) -> Option<Ref> {
        let text = fs_err::read_to_string(self.ref_path(name)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Records what `name` stands for.
    pub(crate) fn write_ref(&self, name: &str, value: &Ref) -> anyhow::Result<()> {
        self.folder("refs")?;
        let mut text = serde_json::to_string_pretty(value)?;
        text.push('\n');
        write_atomic(&self.ref_path(name), text.as_bytes())?;
        Ok(())
    }

    fn ref_path(&self, name: &str) -> PathBuf {
        self.root
            .join("refs")
            .join(format!("{}.json", file_name(name)))
    }

    /// Where the blob of this digest is or would be.
    pub(crate) fn blob(&self, sha256: &str) -> PathBuf {
        self.root.join("blobs").join(format!("sha256-{sha256}"))
    }

    /// Where a download of this key grows until it is whole.
    pub(crate) fn partial(&self, key: &str) -> anyhow::Result<PathBuf> {
        Ok(self
            .folder("partial")?
            .join(format!("{}.part", file_name(key))))
    }

    /// A folder for a fetch's own files, removed when it is dropped; on the cache's file system, so that its files can be renamed into it.
    pub(crate) fn scratch(&self) -> anyhow::Result<Scratch> {
        let folder = self.folder("partial")?;
        sweep(&folder);
        // Ours alone: the process, and a count within it.
        static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = folder.join(format!("scratch-{}-{count}", std::process::id()));
        fs_err::create_dir_all(&path)?;
        Ok(Scratch { path })
    }

    /// Reads `from` to its end into a new blob, hashing on the way; `cap` bounds its size, `tick` hears of every piece.
    ///
    /// With `expected` given, a different digest is an error and nothing is kept.
    pub(crate) fn store(
        &self,
        from: &mut dyn Read,
        expected: Option<&str>,
        cap: u64,
        tick: &mut dyn FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<Stored> {
        let scratch = self.scratch()?;
        let path = scratch.path.join("blob");
        let mut file = fs_err::File::create(&path)?;
        let mut hasher = Sha256::new();
        let bytes = copy(from, cap, tick, &mut |piece| {
            hasher.update(piece);
            file.write_all(piece)
        })?;
        file.sync_all()?;
        drop(file);
        let digest = hex(&hasher.finalize());
        check_digest(expected, &digest)?;
        self.adopt(&path, &digest)?;
        Ok(Stored {
            sha256: digest,
            bytes,
        })
    }

    /// Makes a verified file on the cache's file system the blob of `sha256`.
    pub(crate) fn adopt(&self, file: &Path, sha256: &str) -> anyhow::Result<()> {
        let folder = self.folder("blobs")?;
        let blob = self.blob(sha256);
        let mut permissions = fs_err::metadata(file)?.permissions();
        permissions.set_readonly(true);
        fs_err::set_permissions(file, permissions)?;
        fs_err::rename(file, &blob)?;
        sync_folder(&folder)?;
        Ok(())
    }

    /// A file's record for a [`Ref`], from its blob as it is now.
    pub(crate) fn record(&self, path: &str, sha256: &str) -> anyhow::Result<RefFile> {
        let metadata = fs_err::metadata(self.blob(sha256))?;
        Ok(RefFile {
            path: path.to_owned(),
            sha256: sha256.to_owned(),
            bytes: metadata.len(),
            modified_ns: modified_ns(&metadata),
        })
    }

    /// Whether a file's blob is as it was when it was verified.
    ///
    /// Size and time are compared; when they differ, or with `full`, every byte is hashed again. A damaged blob is
    /// removed, so that it is fetched anew.
    pub(crate) fn check(&self, file: &RefFile, full: bool) -> anyhow::Result<Check> {
        let blob = self.blob(&file.sha256);
        let Ok(metadata) = std::fs::metadata(&blob) else {
            return Ok(Check::Missing);
        };
        let untouched = metadata.len() == file.bytes && modified_ns(&metadata) == file.modified_ns;
        if untouched && !full {
            return Ok(Check::Good);
        }
        let digest = hash_file(&blob, &mut |_| Ok(()))?;
        if digest == file.sha256 {
            return Ok(if untouched {
                Check::Good
            } else {
                Check::Touched
            });
        }
        fs_err::remove_file(&blob)?;
        Ok(Check::Damaged)
    }

    /// The model under its files' own names; the path to open is the only file, or the folder of several.
    pub(crate) fn view(&self, name: &str, value: &Ref) -> anyhow::Result<PathBuf> {
        let folder = self.root.join("models").join(file_name(name));
        for file in &value.files {
            let place = folder.join(&file.path);
            let blob = self.blob(&file.sha256);
            if same_file(&place, &blob) {
                continue;
            }
            let parent = place.parent().unwrap_or(&folder);
            fs_err::create_dir_all(parent)?;
            let new = parent.join(format!(".new-{}", std::process::id()));
            let _ = std::fs::remove_file(&new);
            if std::fs::hard_link(&blob, &new).is_err() {
                fs_err::copy(&blob, &new)?;
            }
            fs_err::rename(&new, &place)?;
        }
        match value.files.as_slice() {
            [file] => Ok(folder.join(&file.path)),
            _ => Ok(folder),
        }
    }

    /// Bytes that the cache holds: blobs and unfinished downloads.
    pub(crate) fn bytes(&self) -> u64 {
        fn sum(folder: &Path) -> u64 {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(|entry| match entry.metadata() {
                    Ok(m) if m.is_dir() => sum(&entry.path()),
                    Ok(m) => m.len(),
                    Err(_) => 0,
                })
                .sum()
        }
        sum(&self.root.join("blobs")) + sum(&self.root.join("partial"))
    }

    fn folder(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(name);
        fs_err::create_dir_all(&path)?;
        Ok(path)
    }
}

/// Removes scratch folders that a killed process left behind: those untouched for a day.
fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry
            .metadata()
            .and_then(|m| m.modified())
            .ok()
            .and_then(|time| time.elapsed().ok());
        let is_scratch = entry.file_name().to_string_lossy().starts_with("scratch-");
        if is_scratch && age.is_some_and(|age| age.as_secs() > 86_400) {
            // Left behind, it is only wasted space.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// What [`Cache::check`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// As it was.
    Good,
    /// The bytes are right though the time has changed; the record wants renewing.
    Touched,
    /// The bytes were wrong; the blob is gone now.
    Damaged,
    /// There is no blob.
    Missing,
}

/// A blob that was just stored.
#[derive(Debug)]
pub(crate) struct Stored {
    /// Its digest.
    pub(crate) sha256: String,
    /// Its size.
    pub(crate) bytes: u64,
}

/// A folder that is removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Where it is.
    pub(crate) path: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind, it is only wasted space.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// The digest is not the pinned one.
#[derive(Debug, thiserror::Error)]
#[error("the sha256 is {found}, not {expected}: these are not the expected bytes")]
pub(crate) struct WrongDigest {
    expected: String,
    found: String,
}

/// Compares a digest with the expected one, if there is one.
pub(crate) fn check_digest(expected: Option<&str>, found: &str) -> Result<(), WrongDigest> {
    match expected {
        Some(expected) if expected != found => Err(WrongDigest {
            expected: expected.to_owned(),
            found: found.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Hashes a file; `tick` hears of every piece.
pub(crate) fn hash_file(
    path: &Path,
    tick: &mut dyn FnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = fs_err::File::open(path)?;
    copy(&mut file, u64::MAX, tick, &mut |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(hex(&hasher.finalize()))
}

/// Copies to the end, at most `cap` bytes; returns how many.
pub(crate) fn copy(
    from: &mut dyn Read,
    cap: u64,
    tick: &mut dyn FnMut(u64) -> anyhow::Result<()>,
    to: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> anyhow::Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        total += n as u64;
        anyhow::ensure!(total <= cap, "more than the expected {cap} bytes");
        to(&buffer[..n])?;
        tick(n as u64)?;
    }
}

/// Writes a file so that it appears whole or not at all.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // The parent of a bare name is empty, which means here.
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let written = (|| {
        let mut file = fs_err::File::create(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs_err::rename(&temp, path)?;
        sync_folder(folder)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temp);
    }
    written
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        fs_err::File::open(folder)?.sync_all()
    } else {
        Ok(())
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
            write!(out, "{byte:02x}").expect("a string takes everything");
            out
        })
}

/// `name` as one file name: anything unusual becomes `-`.
fn file_name(name: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || "._-+".contains(c) {
            c
        } else {
            '-'
        }
    };
    let text: String = name.chars().map(safe).collect();
    // Neither hidden nor a parent.
    text.trim_start_matches('.').to_ascii_lowercase()
}

fn modified_ns(metadata: &std::fs::Metadata) -> u64 {
    let since = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |d| d.as_nanos() as u64)
}

/// Whether `place` already shows the blob: a hard link shares size and time, a copy only the size.
fn same_file(place: &Path, blob: &Path) -> bool {
    let (Ok(a), Ok(b)) = (std::fs::symlink_metadata(place), std::fs::metadata(blob)) else {
        return false;
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        a.is_file() && a.ino() == b.ino() && a.dev() == b.dev()
    }
    #[cfg(not(unix))]
    {
        a.is_file() && a.len() == b.len() && modified_ns(&a) >= modified_ns(&b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("c"));
        (dir, cache)
    }

    fn store(cache: &Cache, bytes: &[u8], expected: Option<&str>) -> anyhow::Result<Stored> {
        cache.store(&mut &bytes[..], expected, 100, &mut |_| Ok(()))
    }

    fn hello(cache: &Cache, path: &str) -> Ref {
        let stored = store(cache, b"hello", Some(HELLO)).unwrap();
        let files = vec![cache.record(path, &stored.sha256).unwrap()];
        Ref {
            source: "s".into(),
            commit: None,
            files,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn stored_under_its_digest_and_seen_under_its_name() {
        let (_dir, cache) = cache();
        let value = hello(&cache, "m.gguf");
        assert_eq!(
            names(&cache.root.join("blobs")),
            [format!("sha256-{HELLO}")]
        );
        cache.write_ref("Org/Name", &value).unwrap();
        assert_eq!(cache.read_ref("Org/Name").unwrap(), value);
        let path = cache.view("Org/Name", &value).unwrap();
        assert!(path.ends_with("models/org-name/m.gguf"));
        assert_eq!(fs_err::read(&path).unwrap(), b"hello");
        assert_eq!(cache.bytes(), 5);
    }

    #[test]
    fn wrong_bytes_and_too_many_bytes_leave_nothing() {
        let (_dir, cache) = cache();
        let error = store(&cache, b"hullo", Some(HELLO)).unwrap_err();
        assert!(error.is::<WrongDigest>(), "{error}");
        let error = store(&cache, &[0; 101], None).unwrap_err();
        assert_eq!(error.to_string(), "more than the expected 100 bytes");
        assert!(names(&cache.root.join("blobs")).is_empty());
        assert!(names(&cache.root.join("partial")).is_empty());
    }

    #[test]
    fn damage_is_found_by_size_and_time_or_by_reading_all() {
        let (_dir, cache) = cache();
        let value = hello(&cache, "m");
        let file = &value.files[0];
        assert_eq!(cache.check(file, false).unwrap(), Check::Good);
        let blob = cache.blob(HELLO);
        let time = fs_err::metadata(&blob).unwrap().modified().unwrap();
        let overwrite = |bytes: &[u8], keep_time: bool| {
            fs_err::remove_file(&blob).unwrap();
            fs_err::write(&blob, bytes).unwrap();
            if keep_time {
                File::options()
                    .write(true)
                    .open(&blob)
                    .unwrap()
                    .set_modified(time)
                    .unwrap();
            }
        };
        overwrite(b"hello", false);
        assert_eq!(cache.check(file, false).unwrap(), Check::Touched);
        overwrite(b"jello", true);
        assert_eq!(
            cache.check(file, false).unwrap(),
            Check::Good,
            "the fast path cannot see this"
        );
        assert_eq!(cache.check(file, true).unwrap(), Check::Damaged);
        assert_eq!(cache.check(file, true).unwrap(), Check::Missing);
        fs_err::write(&blob, b"hell").unwrap();
        assert_eq!(cache.check(file, false).unwrap(), Check::Damaged);
    }

    #[test]
    fn a_view_follows_its_blob() {
        let (_dir, cache) = cache();
        let value = hello(&cache, "a/b.json");
        let path = cache.view("n", &value).unwrap();
        fs_err::remove_file(&path).unwrap();
        fs_err::write(&path, b"edited").unwrap();
        assert_eq!(
            fs_err::read(cache.view("n", &value).unwrap()).unwrap(),
            b"hello"
        );
    }

    #[test]
    fn the_second_waits_for_the_first() {
        let (_dir, cache) = cache();
        let first = cache
            .lock("n", || unreachable!("nobody else holds it"))
            .unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let second = std::thread::spawn({
            let cache = cache.clone();
            move || {
                let _lock = cache.lock("n", || sender.send("waiting").unwrap()).unwrap();
                sender.send("got it").unwrap();
            }
        });
        assert_eq!(receiver.recv().unwrap(), "waiting");
        assert!(receiver.try_recv().is_err());
        drop(first);
        assert_eq!(receiver.recv().unwrap(), "got it");
        second.join().unwrap();
    }
}
