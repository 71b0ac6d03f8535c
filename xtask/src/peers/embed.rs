//! The sentence encoder of the catalogue beside transformers: the same tokens, the same vectors.

use anyhow::{Context, Result};

use super::report::{Bound, Report};
use super::{Desk, text};
use crate::sh;

/// The encoder that is compared.
const MODEL: &str = "all-minilm-l6-v2";

/// Bantam's vectors of awkward and ordinary texts are those of transformers in f32.
pub(super) fn embed(desk: &Desk) -> Result<Report> {
    let work = desk.work("embed")?;
    let (texts, vectors) = (work.join("texts.jsonl"), work.join("vectors.jsonl"));
    let golden = sh::root().join("crates/text/goldens/wordpiece.json");
    sh::run(
        desk.own_script("embed.py")
            .arg("--golden")
            .arg(&golden)
            .arg("--write")
            .arg(&texts),
    )?;
    let mut pull = desk.bantam.command_with_cache(&["pull", MODEL, "--json"]);
    let pulled = sh::last_json(&sh::capture(&mut pull)?)?;
    let folder = pulled["path"].as_str().context("`pull` tells no path")?;
    let made = desk.bantam_json(&[
        "embed",
        "--model",
        MODEL,
        "--data",
        text(&texts),
        "--out",
        text(&vectors),
    ])?;
    let threads = desk.threads.to_string();
    let found = sh::last_json(&sh::capture(
        desk.own_script("embed.py")
            .arg("--golden")
            .arg(&golden)
            .args(["--folder", folder, "--threads", &threads])
            .arg("--vectors")
            .arg(&vectors),
    )?)?;
    let num = |name: &str| {
        found[name]
            .as_f64()
            .with_context(|| format!("embed.py tells no `{name}`"))
    };
    let mut report =
        Report::new("embed: vectors of the sentence encoder, Bantam's against transformers'");
    report.tell("texts", num("texts")?);
    report.must(
        "texts of another count of tokens",
        num("other_tokens")?,
        Bound::Max(0.0),
    );
    report.must("least cosine", num("cosine_min")?, Bound::Min(1.0 - 1e-6));
    report.must(
        "largest difference of a number",
        num("max_abs")?,
        Bound::Max(1e-5),
    );
    let ours = made["tok_per_s"].as_f64().unwrap_or(f64::NAN);
    report.tell("tokens a second, Bantam", ours);
    report.tell(
        "tokens a second, transformers one by one",
        num("transformers_tok_per_s")?,
    );
    report.tell(
        "tokens a second, transformers padded by 32",
        num("transformers_batched_tok_per_s")?,
    );
    report.detail("found", found);
    Ok(report)
}
