//! The official OpenAI clients against a running server.
//!
//! Each client is a script of `crates/serve/tests/`, told the server's address and the model's name as arguments
//! (Python) or as `OPENAI_BASE_URL` and `BANTAM_MODEL` (Node); it exits non-zero at the first thing that is wrong.
//! The clients' packages go under `target/`, pinned, and are installed once.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bantam::Keys;
use crate::server::Server;
use crate::sh;

const PYTHON_PACKAGES: [&str; 3] = ["jsonschema==4.25.1", "openai==3.54.0", "pydantic==2.14.3"];
const NODE_PACKAGES: [&str; 1] = ["openai@7.57.0"];

/// The name that the tests give the served model.
pub(crate) const MODEL_ID: &str = "tiny";

/// A Python that has the packages of the official client.
pub(crate) fn python() -> Result<PathBuf> {
    python_with("pyenv", &PYTHON_PACKAGES)
}

/// A Python of its own under `target/` with these packages, installed if need be. The environment is made without a
/// pip of its own, which some systems keep in yet another package; the system's pip fills it.
pub(crate) fn python_with(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let inside = if cfg!(windows) {
        "Scripts/python.exe"
    } else {
        "bin/python"
    };
    let dir = installed(name, packages, |dir| {
        sh::run(
            sh::command("python3")
                .args(["-m", "venv", "--without-pip"])
                .arg(dir),
        )?;
        let pip = [
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            "--python",
        ];
        sh::run(
            sh::command("python3")
                .args(pip)
                .arg(dir.join(inside))
                .arg("install")
                .args(packages),
        )
    })
    .context("the Python clients need python3 with pip")?;
    Ok(dir.join(inside))
}

/// The folder with `node_modules`, installed if need be.
pub(crate) fn node_packages() -> Result<PathBuf> {
    installed("node", &NODE_PACKAGES, |dir| {
        // A package file of its own, or npm would look for one further up.
        fs::write(dir.join("package.json"), "{\"private\": true}\n")?;
        let flags = [
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--prefix",
        ];
        sh::run(sh::command("npm").args(flags).arg(dir).args(NODE_PACKAGES))
    })
}

/// `target/<name>`, filled by `install` unless a stamp says that it holds just `packages`.
fn installed(
    name: &str,
    packages: &[&str],
    install: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = sh::target().join(name);
    let (stamp, want) = (dir.join(".installed"), packages.join("\n"));
    if fs::read_to_string(&stamp).is_ok_and(|have| have == want) {
        return Ok(dir);
    }
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    install(&dir)?;
    fs::write(stamp, want)?;
    Ok(dir)
}

/// Runs a script with the Python client.
pub(crate) fn run_python(server: &(Server, Keys), python: &Path, name: &str) -> Result<()> {
    let script = script(name)?;
    let mut command = sh::command(python);
    command.arg(script).args([&server.0.base_url(), MODEL_ID]);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    sh::run(address(&mut command, server))
}

/// Runs a script with the Node client, from a copy beside its `node_modules`, which is where Node looks for packages.
pub(crate) fn run_node(server: &(Server, Keys), packages: &Path, name: &str) -> Result<()> {
    let copy = packages.join(name);
    fs::copy(script(name)?, &copy)?;
    sh::run(address(sh::command("node").arg(copy), server))
}

fn script(name: &str) -> Result<PathBuf> {
    let path = sh::root().join("crates/serve/tests").join(name);
    anyhow::ensure!(path.is_file(), "{} is missing", path.display());
    Ok(path)
}

fn address<'a>(
    command: &'a mut std::process::Command,
    (server, keys): &(Server, Keys),
) -> &'a mut std::process::Command {
    command
        .env("OPENAI_BASE_URL", server.base_url())
        .env("OPENAI_API_KEY", &keys.admin)
        .env("BANTAM_LIMITED_KEY", &keys.limited)
        .env("BANTAM_TRAIN_KEY", &keys.train)
        .env("BANTAM_MODEL", MODEL_ID)
        .env("NO_PROXY", "127.0.0.1")
}
