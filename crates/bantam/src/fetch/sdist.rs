//! Source distributions from the Python package index: data that a package's sources carry.
//!
//! pip reads a source distribution's metadata by running its build script, so the archive's digest is given to pip
//! itself: other bytes are refused before anything in them runs.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};

use super::{Fetcher, pip};
use crate::cache::{Check, Ref};

/// No text file that we would take from an archive is larger.
const MEMBER_CAP: u64 = 256 << 20;

impl Fetcher<'_> {
    /// Makes sure that the source distribution with this digest is in the cache; returns the archive's path.
    pub(crate) fn pypi_sdist(
        &self,
        package: &str,
        version: &str,
        sha256: &str,
    ) -> anyhow::Result<PathBuf> {
        let name = format!("sdist-{package}-{version}");
        let _lock = self.cache.lock(&name, || {
            self.printer.note(format!(
                "waiting for another process that is fetching `{package}`"
            ));
        })?;
        if let Some(found) = self.cache.read_ref(&name)
            && let [file] = found.files.as_slice()
            && file.sha256 == sha256
            && matches!(self.cache.check(file, false)?, Check::Good | Check::Touched)
        {
            return self.cache.view(&name, &found);
        }
        let scratch = self.cache.scratch()?;
        let requirements = scratch.path.join("requirements.txt");
        fs_err::write(
            &requirements,
            format!("{package}=={version} --hash=sha256:{sha256}\n"),
        )?;
        let what = format!("{package}=={version}");
        let arguments = [
            "--no-binary".into(),
            package.into(),
            "-r".into(),
            requirements.into_os_string(),
        ];
        pip::download(self, &what, &scratch.path, &arguments)?;
        let archive = pip::only_file(&scratch.path, ".tar.gz")?;
        let shown = archive
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut file = fs_err::File::open(&archive)?;
        let size = file.metadata()?.len();
        self.cache
            .store(&mut file, Some(sha256), size, &mut |_| self.go_on())
            .with_context(|| format!("`{shown}`"))?;
        let files = vec![self.cache.record(&shown, sha256)?];
        let value = Ref {
            source: format!("pypi-sdist:{what}"),
            commit: None,
            files,
        };
        self.cache.write_ref(&name, &value)?;
        self.cache.view(&name, &value)
    }
}

/// Reads files of a `.tar.gz` by their exact paths in it; every one must be there, once, and be a regular file.
pub(crate) fn read_members(archive: &Path, paths: &[&str]) -> anyhow::Result<Vec<Vec<u8>>> {
    let shown = archive.display();
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(fs_err::File::open(archive)?));
    let mut found: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    for entry in tar
        .entries()
        .with_context(|| format!("`{shown}` is not a tar archive"))?
    {
        let entry = entry.with_context(|| format!("`{shown}` is damaged"))?;
        // Only names that were asked for are taken, into memory: nothing in the archive can choose a place on the disk.
        let Some(path) = paths.iter().find(|p| entry.path_bytes() == p.as_bytes()) else {
            continue;
        };
        if !entry.header().entry_type().is_file() {
            return Err(anyhow!("`{path}` in `{shown}` is not a regular file"));
        }
        let size = entry.size();
        anyhow::ensure!(
            size <= MEMBER_CAP,
            "`{path}` in `{shown}` claims to have {size} bytes"
        );
        let mut bytes = Vec::new();
        entry
            .take(MEMBER_CAP)
            .read_to_end(&mut bytes)
            .with_context(|| format!("`{path}` in `{shown}`"))?;
        anyhow::ensure!(
            bytes.len() as u64 == size,
            "`{path}` in `{shown}` is cut short"
        );
        anyhow::ensure!(
            found.insert(path, bytes).is_none(),
            "`{path}` is twice in `{shown}`"
        );
    }
    paths
        .iter()
        .map(|path| {
            found
                .remove(path)
                .ok_or_else(|| anyhow!("`{shown}` has no file `{path}`"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let gzip =
            flate2::write::GzEncoder::new(file.reopen().unwrap(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        for (path, kind, bytes) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_size(bytes.len() as u64);
            header.set_path(path).unwrap();
            if kind.is_symlink() {
                header.set_link_name("/etc/passwd").unwrap();
            }
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
        file
    }

    #[test]
    fn members_come_in_the_order_asked_for() {
        use tar::EntryType::Regular;
        let file = archive(&[
            ("p/a", Regular, b"one"),
            ("p/b", Regular, b"two"),
            ("p/c", Regular, b"three"),
        ]);
        assert_eq!(
            read_members(file.path(), &["p/c", "p/a"]).unwrap(),
            [b"three".to_vec(), b"one".to_vec()]
        );
        let error = read_members(file.path(), &["p/d"]).unwrap_err().to_string();
        assert!(error.ends_with("has no file `p/d`"), "{error}");
    }

    #[test]
    fn links_and_repeats_are_refused() {
        use tar::EntryType::{Regular, Symlink};
        let file = archive(&[("p/a", Symlink, b"")]);
        let error = read_members(file.path(), &["p/a"]).unwrap_err().to_string();
        assert!(error.ends_with("is not a regular file"), "{error}");
        let file = archive(&[("p/a", Regular, b"1"), ("p/a", Regular, b"2")]);
        let error = read_members(file.path(), &["p/a"]).unwrap_err().to_string();
        assert!(error.contains("is twice in"), "{error}");
    }

    #[test]
    fn garbage_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), b"not gzip").unwrap();
        assert!(read_members(file.path(), &["p"]).is_err());
    }
}
