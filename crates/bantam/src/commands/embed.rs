//! `bantam embed`: texts to vectors, as JSON lines.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use bantam_engine::{Embedder, check_inputs, shorten};
use bantam_formats::JsonlReader;
use bantam_kernels::Compute;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Context;
use crate::cache::write_atomic;
use crate::error::{HintExt as _, Interrupted, advise};
use crate::interrupt;
use crate::loader::embedder;
use crate::printer;
use crate::progress::Progress;
use crate::settings::EmbedSettings;

/// Texts that are embedded between two looks at Ctrl-C.
const BATCH: usize = 64;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    rows: usize,
    tokens: usize,
    dimensions: usize,
    wall_s: f64,
    tok_per_s: f64,
    out: Option<&'a Path>,
}

/// One text, as tokens.
struct Row {
    line: usize,
    id: Option<Value>,
    tokens: Vec<u32>,
}

/// A line of the input.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Text(String),
    Object {
        text: String,
        #[serde(default)]
        id: Option<Value>,
    },
}

/// A line of the output.
#[derive(Serialize)]
struct Vector<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    index: usize,
    tokens: usize,
    embedding: &'a [f32],
}

/// Reads, embeds, writes.
pub(crate) fn run(context: &Context, settings: &EmbedSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let spinner = Progress::spinner(printer, format!("loading {}", settings.model));
    let compute = Compute::new(settings.threads);
    let model = embedder::open(context, &settings.model, &cancel, &compute)?;
    drop(spinner);
    let dims = settings.dimensions.unwrap_or(model.dims());
    if dims > model.dims() {
        return Err(advise(
            anyhow!(
                "`{}` makes vectors of {} numbers",
                settings.model,
                model.dims()
            ),
            "ask for fewer with `--dimensions`, or leave it out",
        ));
    }
    let rows = read(settings, &*model)?;
    let bar = Progress::steps(
        printer,
        format!("embedding with {}", settings.model),
        rows.len() as u64,
    );
    let began = Instant::now();
    let mut file = String::new();
    for (batch, rows) in rows.chunks(BATCH).enumerate() {
        go_on(&cancel)?;
        let inputs: Vec<&[u32]> = rows.iter().map(|row| row.tokens.as_slice()).collect();
        let mut text = String::new();
        for (i, (row, mut vector)) in rows.iter().zip(model.vectors(&inputs)).enumerate() {
            shorten(&mut vector, dims);
            let line = Vector {
                id: row.id.as_ref(),
                index: batch * BATCH + i,
                tokens: row.tokens.len(),
                embedding: &vector,
            };
            text.push_str(&serde_json::to_string(&line)?);
            text.push('\n');
        }
        match settings.out {
            Some(_) => file.push_str(&text),
            None => printer.piece(&text)?,
        }
        bar.add(rows.len() as u64);
    }
    drop(bar);
    let wall_s = began.elapsed().as_secs_f64();
    if let Some(path) = &settings.out {
        write_atomic(path, file.as_bytes())
            .with_context(|| format!("could not write `{}`", path.display()))?;
    }
    let tokens = rows.iter().map(|row| row.tokens.len()).sum();
    let report = Report {
        model: &settings.model,
        rows: rows.len(),
        tokens,
        dimensions: dims,
        wall_s,
        tok_per_s: tokens as f64 / wall_s.max(1e-9),
        out: settings.out.as_deref(),
    };
    if settings.json {
        return printer.json(&report);
    }
    printer.note(format!(
        "{} texts as vectors of {dims} numbers in {} ({:.0} tok/s)",
        printer::thousands(report.rows as u64),
        printer::duration(wall_s),
        report.tok_per_s
    ));
    Ok(())
}

/// Every text as tokens; the first that the model cannot read is named before anything is computed.
fn read(settings: &EmbedSettings, model: &dyn Embedder) -> anyhow::Result<Vec<Row>> {
    let (input, name): (Box<dyn BufRead>, &Path) = match &settings.data {
        Some(path) => {
            let file = fs_err::File::open(path)
                .hint("give a file of JSON lines with `--data`, or `-` for stdin")?;
            (Box::new(io::BufReader::new(file)), path)
        }
        None => (Box::new(io::stdin().lock()), Path::new("stdin")),
    };
    let mut lines = JsonlReader::new(input, name);
    let mut rows = Vec::new();
    while let Some(line) = lines.next_line()? {
        let (text, id) = if settings.lines {
            (line.text.to_owned(), None)
        } else {
            match serde_json::from_str(line.text) {
                Ok(Line::Text(text)) => (text, None),
                Ok(Line::Object { text, id }) => (text, id),
                Err(_) => {
                    return Err(advise(
                        anyhow!(
                            "{}:{}: this line is no JSON string and no object with `text`",
                            name.display(),
                            line.number
                        ),
                        "with `--lines` every line is read as a text of its own",
                    ));
                }
            }
        };
        let tokens = model.encode(&text);
        let line = line.number;
        rows.push(Row { line, id, tokens });
    }
    for row in &rows {
        let checked = check_inputs(&[&row.tokens], model.max_tokens(), model.vocab());
        checked.map_err(|error| {
            let why = error.to_string().replace("input 0", "the text");
            anyhow!("{}:{}: {why}", name.display(), row.line)
        })?;
    }
    Ok(rows)
}

/// Fails when the user has asked to stop.
fn go_on(cancel: &AtomicBool) -> anyhow::Result<()> {
    if cancel.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    Ok(())
}
