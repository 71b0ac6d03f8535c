//! The house rules that no lint knows, checked over every file git has or would add.
//!
//! - a file is at most 800 lines, and a Rust file opens with its module's doc;
//! - crates depend on one another only along the arrows of the architecture, and share the workspace's lints;
//! - nothing is left to be done, and nothing names a machine's folder or a package registry's host;
//! - a link in a document leads to a file that exists.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::sh;

/// Past this, look for a second noun.
const LINES_MAX: usize = 800;

/// Which crates of the workspace a crate may use, tests apart.
const ARROWS: [(&str, &[&str]); 12] = [
    ("bantam-kernels", &[]),
    ("bantam-formats", &[]),
    ("bantam-text", &[]),
    ("bantam-judge", &[]),
    ("bantam-model", &["bantam-kernels", "bantam-formats"]),
    (
        "bantam-engine",
        &["bantam-model", "bantam-text", "bantam-kernels"],
    ),
    (
        "bantam-lab",
        &[
            "bantam-engine",
            "bantam-model",
            "bantam-text",
            "bantam-formats",
            "bantam-judge",
            "bantam-kernels",
        ],
    ),
    ("bantam-store", &[]),
    (
        "bantam-serve",
        &[
            "bantam-engine",
            "bantam-judge",
            "bantam-store",
            "bantam-text",
        ],
    ),
    (
        "bantam",
        &[
            "bantam-engine",
            "bantam-formats",
            "bantam-judge",
            "bantam-kernels",
            "bantam-lab",
            "bantam-model",
            "bantam-serve",
            "bantam-store",
            "bantam-text",
        ],
    ),
    ("bantam-testkit", &[]),
    ("xtask", &["bantam-testkit"]),
];

/// Words that must not be in any text file, and what to do instead. Spelt in two halves, or this file would break the rule.
const FORBIDDEN: [([&str; 2], &str); 9] = [
    (["todo", "!("], "finish it, or leave it out"),
    (["unimplemented", "!("], "finish it, or leave it out"),
    (["dbg", "!("], "take it out"),
    (["FIX", "ME"], "fix it, or explain it"),
    (["TO", "DO"], "do it, or leave it out"),
    (["/wo", "rk/"], "name no machine's folders"),
    (
        ["pypi", ".org"],
        "name no registry's host; its ordinary client knows it",
    ),
    (
        ["pythonhosted", ".org"],
        "name no registry's host; its ordinary client knows it",
    ),
    (
        ["registry.npm", "js"],
        "name no registry's host; its ordinary client knows it",
    ),
];

/// Checks everything and prints what is wrong; whether nothing is.
pub(crate) fn run() -> Result<bool> {
    let mut wrong = Vec::new();
    let files = files()?;
    for file in &files {
        let Ok(bytes) = std::fs::read(sh::root().join(file)) else {
            continue;
        }; // Deleted, not yet committed.
        if let Ok(text) = String::from_utf8(bytes) {
            wrong.extend(check_text(file, &text));
            if file.ends_with(".md") {
                wrong.extend(check_links(sh::root(), file, &text));
            }
        }
    }
    let metadata = sh::cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()?;
    wrong.extend(check_arrows(
        &serde_json::from_slice(&metadata.stdout).context("`cargo metadata` printed no JSON")?,
    ));
    for line in &wrong {
        println!("tidy: {line}");
    }
    eprintln!("tidy: {} files, {} wrong", files.len(), wrong.len());
    Ok(wrong.is_empty())
}

/// Every file that git tracks or would add, from the root.
fn files() -> Result<Vec<String>> {
    let listed = sh::command("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("cannot run `git`")?;
    anyhow::ensure!(
        listed.status.success(),
        "`git ls-files` failed: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let names = String::from_utf8(listed.stdout).context("a file's name is not UTF-8")?;
    Ok(names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

fn check_text(file: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if file.ends_with(".lock") {
        return wrong; // Cargo writes it.
    }
    let is_source = [".rs", ".py", ".mjs", ".sh", ".md"]
        .iter()
        .any(|ending| file.ends_with(ending));
    let n_lines = text.lines().count();
    if is_source && n_lines > LINES_MAX {
        wrong.push(format!(
            "{file}: {n_lines} lines, over {LINES_MAX}: look for a second noun"
        ));
    }
    // A fuzz target is one line around a function that has its doc elsewhere.
    let needs_doc = file.ends_with(".rs")
        && !file.ends_with("tests.rs")
        && !file.starts_with("fuzz/fuzz_targets/");
    if needs_doc && !text.starts_with("//!") {
        wrong.push(format!("{file}:1: no module doc"));
    }
    for (number, line) in text.lines().enumerate() {
        for (halves, advice) in FORBIDDEN {
            let word = halves.concat();
            if line.contains(&word) {
                wrong.push(format!("{file}:{}: `{word}`: {advice}", number + 1));
            }
        }
    }
    wrong
}

/// Links of a Markdown file to files: `[words](path#anchor)`, relative to the file's folder.
fn check_links(root: &Path, file: &str, text: &str) -> Vec<String> {
    let folder = root
        .join(file)
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default();
    let mut wrong = Vec::new();
    let mut in_code = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for link in line
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', ' ']).next())
        {
            let path = link.split('#').next().unwrap_or_default();
            let is_file = !path.is_empty() && !path.contains("://") && !path.starts_with("mailto:");
            if is_file && !folder.join(path).exists() {
                wrong.push(format!(
                    "{file}:{}: the link `{link}` leads nowhere",
                    number + 1
                ));
            }
        }
    }
    wrong
}

/// The crates' dependencies on one another, from `cargo metadata --no-deps`.
fn check_arrows(metadata: &Value) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(may_use) = allowed.get(name) else {
            wrong.push(format!("crate `{name}` is not in the table of arrows (xtask/src/tidy.rs): which rule has it alone?"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().unwrap_or_default();
            let in_tests_only = dependency["kind"] == "dev";
            if allowed.contains_key(used) && !in_tests_only && !may_use.contains(&used) {
                wrong.push(format!("crate `{name}` may not depend on `{used}`"));
            }
        }
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let text = std::fs::read_to_string(manifest).unwrap_or_default();
        if !manifest.is_empty() && !text.contains("[lints]\nworkspace = true") {
            wrong.push(format!(
                "crate `{name}` does not inherit the workspace's lints"
            ));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_long_file_and_a_missing_doc_are_found() {
        let long = format!("//! Doc.\n{}", "\n".repeat(LINES_MAX));
        assert_eq!(check_text("a.rs", &long).len(), 1);
        assert_eq!(
            check_text("a.rs", "fn main() {}\n"),
            ["a.rs:1: no module doc"]
        );
        assert!(check_text("a.rs", "//! Doc.\n").is_empty());
    }

    #[test]
    fn forbidden_words_are_found_with_their_line() {
        let text = format!("//! Doc.\nfn f() {{ {}) }}\n", FORBIDDEN[0].0.concat());
        let wrong = check_text("a.rs", &text);
        assert!(
            wrong.len() == 1 && wrong[0].starts_with("a.rs:2: "),
            "{wrong:?}"
        );
    }

    #[test]
    fn dead_links_are_found_outside_code() {
        let text = "[a](Cargo.toml) [b](gone.md#part) [c](https://example.org/x)\n```\n[d](gone.md)\n```\n";
        assert_eq!(
            check_links(sh::root(), "x.md", text),
            ["x.md:1: the link `gone.md#part` leads nowhere"]
        );
    }

    #[test]
    fn arrows_point_down() {
        let metadata = |used: &str, kind: Option<&str>| json!({"packages": [{"name": "bantam-text", "manifest_path": "", "dependencies": [{"name": used, "kind": kind}]}]});
        assert_eq!(check_arrows(&metadata("bantam-lab", None)).len(), 1);
        assert!(check_arrows(&metadata("bantam-testkit", Some("dev"))).is_empty());
        assert!(check_arrows(&metadata("serde", None)).is_empty());
    }
}
