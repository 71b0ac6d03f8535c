//! Running other programs: echoed, in the workspace's root, with no standard input.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's root: the parent of this crate's folder.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs this chore.
pub(crate) fn cargo() -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// `program`, to run in the root without standard input.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).stdin(Stdio::null());
    command
}

/// The command line as a person would type it.
pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quote = |w: std::borrow::Cow<'_, str>| {
        if w.contains([' ', '"', '{']) {
            format!("'{w}'")
        } else {
            w.into_owned()
        }
    };
    words
        .map(|w| quote(w.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether `program --version` works here.
pub(crate) fn exists(program: &str) -> bool {
    let probe = command(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    probe.is_ok_and(|status| status.success())
}

/// Runs to the end with output passed through; an error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", show(command));
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", show(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", show(command));
    }
    Ok(())
}

/// Runs to the end and returns what it printed; stderr is passed through, an error shows stdout too.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    eprintln!("$ {}", show(command));
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run `{}`", show(command)))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("`{}` failed: {}\n{text}", show(command), output.status);
    }
    Ok(text)
}

/// Runs to the end, passing stdout through and handing each of its lines to `on_line`; whether it succeeded.
pub(crate) fn stream(command: &mut Command, mut on_line: impl FnMut(&str)) -> Result<bool> {
    eprintln!("$ {}", show(command));
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{}`", show(command)))?;
    let stdout = child.stdout.take().expect("piped above");
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        writeln!(std::io::stdout(), "{line}")?;
        on_line(&line);
    }
    Ok(child.wait()?.success())
}

/// The last line that is a JSON object, as `--json` prints it.
pub(crate) fn last_json(stdout: &str) -> Result<serde_json::Value> {
    let line = stdout
        .lines()
        .rev()
        .find(|line| line.starts_with('{'))
        .context("it printed no JSON object")?;
    serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))
}
