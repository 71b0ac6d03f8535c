//! `bantam evals import`: evals of other systems, made on a running server.

use anyhow::anyhow;
use serde_json::{Value, json};

use super::Context;
use crate::args::{EvalsArgs, EvalsCommand, EvalsImportArgs};
use crate::client::{Api, text};
use crate::error::advise;
use crate::import::{self, Imported, Models};
use crate::printer::{Align, Table, thousands};

/// Runs it.
pub(crate) fn run(context: &Context, args: EvalsArgs) -> anyhow::Result<()> {
    let server = Api::new(&args.server.url, args.server.api_key)?;
    match args.command {
        EvalsCommand::Import(import) => import_file(context, &server, &import),
    }
}

fn import_file(context: &Context, server: &Api, args: &EvalsImportArgs) -> anyhow::Result<()> {
    let models = Models {
        judged: args.model.clone(),
        judge: args.judge.clone(),
    };
    let found = import::read(&args.file, &models)?;
    for note in &found.notes {
        context.printer.note(format!("note: {note}"));
    }
    if !found.unsupported.is_empty() {
        let list = found.unsupported.join("\n  ");
        if !args.skip_unsupported {
            return Err(advise(
                anyhow!(
                    "{} cannot be taken over whole:\n  {list}",
                    args.file.display()
                ),
                "--skip-unsupported imports the rest",
            ));
        }
        context.printer.warn(format!("left out:\n  {list}"));
    }
    let mut made = Vec::new();
    for eval in &found.evals {
        made.push(make(server, eval, args.run)?);
    }
    if args.json.json {
        return context
            .printer
            .json(&json!({"evals": made, "unsupported": found.unsupported, "notes": found.notes}));
    }
    let mut table = Table::new([
        ("eval", Align::Left),
        ("name", Align::Left),
        ("graders", Align::Right),
        ("rows", Align::Right),
        ("runs", Align::Right),
    ]);
    for one in &made {
        let count = |name: &str| thousands(one[name].as_u64().unwrap_or(0));
        let runs = one["runs"].as_array().map_or(0, Vec::len) as u64;
        table.row([
            text(&one["id"]),
            text(&one["name"]),
            count("graders"),
            count("rows"),
            thousands(runs),
        ]);
    }
    let rendered = table.render(context.printer.out_style());
    context.printer.line(rendered.trim_end())?;
    Ok(())
}

/// Makes an eval, uploads its rows and, if that is asked for, starts its runs.
fn make(server: &Api, one: &Imported, run: bool) -> anyhow::Result<Value> {
    let eval = server.post_json("/evals", &one.eval)?;
    let id = text(&eval["id"]);
    let (mut files, mut runs, mut n_rows) = (Vec::new(), Vec::new(), 0);
    for set in &one.sets {
        let lines: String = set.rows.iter().map(|row| format!("{row}\n")).collect();
        let name = format!("{}.jsonl", set.name.replace(['/', '\\'], "_"));
        let file = server.upload("evals", &name, lines.as_bytes())?;
        n_rows += set.rows.len();
        for (name, source) in set.runs.iter().filter(|_| run) {
            let mut source = source.clone();
            source["source"] = json!({"type": "file_id", "id": file});
            let body = json!({"name": name, "data_source": source});
            runs.push(server.post_json(&format!("/evals/{id}/runs"), &body)?["id"].clone());
        }
        files.push(json!(file));
    }
    let graders = one.eval["testing_criteria"].as_array().map_or(0, Vec::len);
    Ok(json!({
        "id": id, "name": eval["name"], "graders": graders, "rows": n_rows, "files": files, "runs": runs,
    }))
}
