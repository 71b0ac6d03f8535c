//! The binary under test: built, given a tiny model, run, served.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use bantam_testkit::tiny;
use serde_json::Value;

use crate::server::{Server, free_port};
use crate::sh;

/// Writes `model/`, `train.jsonl` and `test.jsonl` into `dir`.
pub(crate) fn write_tiny(dir: &Path, seed: u64) -> Result<bool> {
    tiny::write_model(&dir.join("model"), seed);
    tiny::write_rows(&dir.join("train.jsonl"), 96, seed);
    tiny::write_rows(&dir.join("test.jsonl"), 24, seed + 1);
    eprintln!(
        "wrote {d}/model, {d}/train.jsonl and {d}/test.jsonl; train on them with --system '{}'",
        tiny::SYSTEM,
        d = dir.display()
    );
    Ok(true)
}

/// A fresh folder under `target/` with the tiny model and its rows.
pub(crate) fn tiny_world(name: &str) -> Result<PathBuf> {
    let dir = sh::target().join("xtask").join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    write_tiny(&dir, 0)?;
    Ok(dir)
}

/// The built binary.
#[derive(Clone)]
pub(crate) struct Bantam(PathBuf);

impl Bantam {
    /// Builds with cargo's profile `profile` (`dev` or `release`).
    pub(crate) fn build(profile: &str) -> Result<Bantam> {
        sh::run(sh::cargo().args(["build", "--package", "bantam", "--profile", profile]))?;
        let folder = if profile == "dev" { "debug" } else { profile };
        let path = sh::target()
            .join(folder)
            .join(format!("bantam{}", std::env::consts::EXE_SUFFIX));
        if !path.is_file() {
            bail!("cargo built no {}", path.display());
        }
        Ok(Bantam(path))
    }

    /// The binary that is measured: `$BANTAM_BIN`, or a release build.
    pub(crate) fn measured() -> Result<Bantam> {
        match std::env::var_os("BANTAM_BIN") {
            Some(path) => Ok(Bantam(path.into())),
            None => Bantam::build("release"),
        }
    }

    /// A command of the binary, blind to the user's settings and cache.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = sh::command(&self.0);
        command
            .args(args)
            .env("BANTAM_HOME", sh::target().join("xtask").join("home"));
        command.env_remove("BANTAM_API_KEY").env("NO_COLOR", "1");
        command
    }

    /// A command of the binary that sees the user's cache of base models.
    pub(crate) fn command_with_cache(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        match std::env::var_os("BANTAM_HOME") {
            Some(home) => command.env("BANTAM_HOME", home),
            None => command.env_remove("BANTAM_HOME"),
        };
        command
    }

    /// Runs with `--json` and returns the object.
    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        sh::last_json(&sh::capture(self.command(args).arg("--json"))?)
    }

    /// Serves `model` on a free port of the loopback until dropped, to holders of a key of the database `path`; what
    /// is kept goes beside it.
    pub(crate) fn serve(
        &self,
        model: &Path,
        model_id: &str,
        path: &Path,
    ) -> Result<(Server, Keys)> {
        let port = free_port()?;
        let (model, port_text) = (model.to_string_lossy(), port.to_string());
        let data = path.with_extension("kept").to_string_lossy().into_owned();
        let path = path.to_string_lossy();
        let make = |flags: &[&str]| -> Result<String> {
            let report = self.json(&[&["keys", "create", "--keys", &path], flags].concat())?;
            let key = report["key"]
                .as_str()
                .context("`keys create` tells no key")?;
            Ok(key.to_owned())
        };
        let keys = Keys {
            admin: make(&["--scope", "admin"])?,
            limited: make(&["--requests-per-minute", "60"])?,
            train: make(&["--scope", "train"])?,
        };
        let words = [
            "serve",
            "--model",
            &model,
            "--model-id",
            model_id,
            "--port",
            &port_text,
            "--keys",
            &path,
            "--data",
            &data,
        ];
        Ok((Server::start(&mut self.command(&words), port)?, keys))
    }
}

/// Keys of a server.
pub(crate) struct Keys {
    /// May do everything.
    pub(crate) admin: String,
    /// May ask sixty times a minute.
    pub(crate) limited: String,
    /// May not ask models.
    pub(crate) train: String,
}
