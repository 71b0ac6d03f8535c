//! `bantam inspect`: what a GGUF file or a Hugging Face folder holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bantam_formats::{Gguf, HfFolder, Metadata, ModelFiles};
use serde::Serialize;

use super::Context;
use crate::error::HintExt as _;
use crate::fetch;
use crate::loader::{self, Place};
use crate::printer::{self, Align, Printer, Table, thousands};
use crate::settings::InspectSettings;

/// The `--json` object.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    format: String,
    name: Option<String>,
    architecture: Option<String>,
    parameters: u64,
    bytes: u64,
    config: BTreeMap<&'static str, serde_json::Value>,
    dtypes: Vec<DtypeTotal>,
    tensors: Vec<Tensor>,
    unsupported_tensors: Vec<String>,
    tokenizer: Tokenizer,
    chat_template: Option<String>,
}

/// All tensors of one type.
#[derive(Debug, Serialize)]
struct DtypeTotal {
    dtype: &'static str,
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

/// One tensor.
#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
}

/// What turns text into tokens.
#[derive(Debug, Default, Serialize)]
struct Tokenizer {
    model: Option<String>,
    pre: Option<String>,
    vocab: Option<u64>,
    merges: Option<u64>,
    bos: Option<Token>,
    eos: Option<Token>,
    pad: Option<Token>,
    unk: Option<Token>,
}

/// A special token; a file may know only its id or only its text.
#[derive(Debug, Serialize)]
struct Token {
    id: Option<u32>,
    text: Option<String>,
}

/// Opens and reports.
pub(crate) fn run(context: &Context, settings: &InspectSettings) -> anyhow::Result<()> {
    let path = find(context, settings)?;
    let files = bantam_formats::open_model(&path)?;
    let report = describe(&files, path)?;
    if settings.json {
        return context.printer.json(&report);
    }
    show(&context.printer, &report, settings.tensors)
}

/// The file or folder to open. A catalogue name must be in the cache: looking fetches nothing.
fn find(context: &Context, settings: &InspectSettings) -> anyhow::Result<PathBuf> {
    match loader::place(&context.catalogue, &settings.path.to_string_lossy())? {
        Place::Path(path) | Place::Run(path) => Ok(path),
        Place::Catalogue(entry) => fetch::cached_path(&context.cache, entry)?
            .ok_or_else(|| anyhow::anyhow!("`{}` is not in the cache", entry.name))
            .hint(format!("`bantam pull {}` fetches it", entry.name)),
    }
}

fn describe(files: &ModelFiles, path: PathBuf) -> anyhow::Result<Report> {
    let mut totals: BTreeMap<_, DtypeTotal> = BTreeMap::new();
    let mut tensors = Vec::new();
    for info in files.tensors() {
        let dtype = info.dtype.name();
        let total = totals.entry(info.dtype).or_insert(DtypeTotal {
            dtype,
            tensors: 0,
            parameters: 0,
            bytes: 0,
        });
        total.tensors += 1;
        total.parameters += info.n_weights() as u64;
        total.bytes += info.n_bytes as u64;
        let (shape, bytes) = (info.shape.clone(), info.n_bytes as u64);
        tensors.push(Tensor {
            name: info.name.clone(),
            dtype,
            shape,
            bytes,
        });
    }
    let mut report = Report {
        bytes: loader::bytes(&path),
        path,
        format: String::new(),
        name: None,
        architecture: None,
        parameters: totals.values().map(|t| t.parameters).sum(),
        config: BTreeMap::new(),
        dtypes: totals.into_values().collect(),
        tensors,
        unsupported_tensors: Vec::new(),
        tokenizer: Tokenizer::default(),
        chat_template: None,
    };
    match files {
        ModelFiles::Gguf(gguf) => describe_gguf(gguf, &mut report),
        ModelFiles::Hf(folder) => describe_folder(folder, &mut report)?,
    }
    Ok(report)
}

fn describe_gguf(gguf: &Gguf, report: &mut Report) {
    let metadata = gguf.metadata();
    let text = |key: &str| metadata.str(key).map(str::to_owned);
    report.format = format!("GGUF v{}", gguf.version());
    report.name = text("general.name");
    report.architecture = text("general.architecture");
    report.chat_template = text("tokenizer.chat_template");
    let counts = [
        ("context", "context_length"),
        ("layers", "block_count"),
        ("width", "embedding_length"),
        ("ffn_width", "feed_forward_length"),
        ("heads", "attention.head_count"),
        ("kv_heads", "attention.head_count_kv"),
    ];
    for (name, key) in counts {
        if let Some(n) = metadata.model_key(key).and_then(|v| v.to_u64()) {
            report.config.insert(name, n.into());
        }
    }
    if let Some(theta) = metadata
        .model_key("rope.freq_base")
        .and_then(|v| v.to_f64())
    {
        report.config.insert("rope_theta", theta.into());
    }
    let length = |key: &str| metadata.array(key).map(|a| a.len() as u64);
    report.tokenizer = Tokenizer {
        model: text("tokenizer.ggml.model"),
        pre: text("tokenizer.ggml.pre"),
        vocab: length("tokenizer.ggml.tokens"),
        merges: length("tokenizer.ggml.merges"),
        bos: gguf_token(metadata, "bos"),
        eos: gguf_token(metadata, "eos"),
        pad: gguf_token(metadata, "padding"),
        unk: gguf_token(metadata, "unknown"),
    };
}

fn gguf_token(metadata: &Metadata, which: &str) -> Option<Token> {
    let id = metadata.u32(&format!("tokenizer.ggml.{which}_token_id"))?;
    let text = metadata
        .str_array("tokenizer.ggml.tokens")
        .and_then(|tokens| tokens.get(id as usize))
        .cloned();
    Some(Token { id: Some(id), text })
}

fn describe_folder(folder: &HfFolder, report: &mut Report) -> anyhow::Result<()> {
    let config = &folder.config;
    report.format = "Hugging Face folder".into();
    report.architecture = config
        .architectures
        .as_ref()
        .and_then(|a| a.first().cloned())
        .or_else(|| config.model_type.clone());
    report.chat_template = folder.chat_template().map(str::to_owned);
    report.unsupported_tensors = folder
        .unsupported()
        .map(|(name, dtype)| format!("{name} ({dtype})"))
        .collect();
    report.config = BTreeMap::from([
        ("context", config.context().into()),
        ("layers", config.num_hidden_layers.into()),
        ("width", config.hidden_size.into()),
        ("ffn_width", config.intermediate_size.into()),
        ("heads", config.num_attention_heads.into()),
        ("kv_heads", config.n_kv_heads().into()),
        ("rope_theta", config.rope_base().into()),
    ]);
    let json: serde_json::Value = serde_json::from_slice(&folder.tokenizer_json()?)?;
    let model = &json["model"];
    let size = |value: &serde_json::Value| match value {
        serde_json::Value::Object(map) => Some(map.len() as u64),
        serde_json::Value::Array(list) => Some(list.len() as u64),
        _ => None,
    };
    let added = json["added_tokens"].as_array();
    let id_of = |text: &str| {
        let in_added = added
            .into_iter()
            .flatten()
            .find(|t| t["content"] == text)
            .and_then(|t| t["id"].as_u64());
        in_added
            .or_else(|| model["vocab"][text].as_u64())
            .and_then(|id| u32::try_from(id).ok())
    };
    let token = |text: &Option<String>| {
        text.clone().map(|text| Token {
            id: id_of(&text),
            text: Some(text),
        })
    };
    let specials = folder.tokenizer_config();
    // Added tokens lie beyond the model's own vocabulary, unless it lists them as well.
    let beyond = added
        .into_iter()
        .flatten()
        .filter(|t| model["vocab"][t["content"].as_str().unwrap_or("")].is_null());
    report.tokenizer = Tokenizer {
        model: model["type"].as_str().map(str::to_owned),
        pre: json["pre_tokenizer"]["type"].as_str().map(str::to_owned),
        vocab: size(&model["vocab"]).map(|n| n + beyond.count() as u64),
        merges: size(&model["merges"]),
        bos: token(&specials.bos_token),
        eos: token(&specials.eos_token),
        pad: token(&specials.pad_token),
        unk: token(&specials.unk_token),
    };
    Ok(())
}

fn show(printer: &Printer, report: &Report, all_tensors: bool) -> anyhow::Result<()> {
    let style = printer.out_style();
    printer.line(style.bold(&report.path.display().to_string()))?;
    let mut facts = Table::facts();
    facts.row([
        "format".to_owned(),
        format!("{}, {}", report.format, printer::bytes(report.bytes)),
    ]);
    let known = |value: &Option<String>| value.clone().unwrap_or_else(|| "not stated".into());
    if report.name.is_some() {
        facts.row(["name".to_owned(), known(&report.name)]);
    }
    facts.row(["architecture".to_owned(), known(&report.architecture)]);
    facts.row([
        "parameters".to_owned(),
        format!(
            "{} ({})",
            printer::parameters(report.parameters),
            thousands(report.parameters)
        ),
    ]);
    let shape = [
        "layers",
        "width",
        "ffn_width",
        "heads",
        "kv_heads",
        "context",
        "rope_theta",
    ];
    for name in shape {
        if let Some(value) = report.config.get(name) {
            let shown = value.as_u64().map_or_else(|| value.to_string(), thousands);
            facts.row([name.replace('_', " "), shown]);
        }
    }
    printer.line(facts.render(style))?;

    let mut totals = Table::new([
        ("type", Align::Left),
        ("tensors", Align::Right),
        ("parameters", Align::Right),
        ("bytes", Align::Right),
    ]);
    for total in &report.dtypes {
        totals.row([
            total.dtype.to_owned(),
            total.tensors.to_string(),
            thousands(total.parameters),
            thousands(total.bytes),
        ]);
    }
    printer.line(format!("\n{}", totals.render(style)))?;
    if !report.unsupported_tensors.is_empty() {
        let n = report.unsupported_tensors.len();
        printer.line(format!(
            "{n} tensors of other types: {}",
            report.unsupported_tensors.join(", ")
        ))?;
    }

    let tokenizer = &report.tokenizer;
    printer.line(format!(
        "
{}",
        style.bold("tokenizer")
    ))?;
    let mut words = Table::facts();
    words.row(["model".to_owned(), known(&tokenizer.model)]);
    words.row(["pre-tokenizer".to_owned(), known(&tokenizer.pre)]);
    for (name, n) in [("vocab", tokenizer.vocab), ("merges", tokenizer.merges)] {
        words.row([
            name.to_owned(),
            n.map_or_else(|| "not stated".into(), thousands),
        ]);
    }
    let specials = [
        ("bos", &tokenizer.bos),
        ("eos", &tokenizer.eos),
        ("pad", &tokenizer.pad),
        ("unk", &tokenizer.unk),
    ];
    for (name, token) in specials {
        if let Some(token) = token {
            let text = token
                .text
                .as_ref()
                .map(|t| format!("{t:?}"))
                .unwrap_or_default();
            let id = token.id.map(|id| format!(" = {id}")).unwrap_or_default();
            words.row([name.to_owned(), format!("{text}{id}")]);
        }
    }
    printer.line(words.render(style))?;
    match &report.chat_template {
        Some(template) => {
            printer.line(format!("\n{}", style.bold("chat template")))?;
            printer.line(visible(template))?;
        }
        None => printer
            .line("\nno chat template: this is a base model, or its template was left out")?,
    }

    if all_tensors {
        let mut table = Table::new([
            ("tensor", Align::Left),
            ("type", Align::Left),
            ("shape", Align::Left),
            ("bytes", Align::Right),
        ]);
        for tensor in &report.tensors {
            let shape: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
            table.row([
                tensor.name.clone(),
                tensor.dtype.to_owned(),
                shape.join(" x "),
                thousands(tensor.bytes),
            ]);
        }
        printer.line(format!("\n{}", table.render(style)))?;
    } else {
        printer.note(format!(
            "`--tensors` lists all {} tensors",
            report.tensors.len()
        ));
    }
    Ok(())
}

/// A foreign text with its control characters made harmless; line breaks and tabs stay.
fn visible(text: &str) -> String {
    let harmless = |c: char| {
        if c.is_control() && c != '\n' && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    text.chars().map(harmless).collect()
}
