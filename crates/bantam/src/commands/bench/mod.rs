//! `bantam bench`: how fast a model answers on this machine.
//!
//! Everything goes through the engine, as it would for a caller. The measurements take turns, several
//! rounds of them, so that a machine that slows down slows down all of them alike; the middle one counts.

mod load;
mod products;
mod same_bits;
mod samples;
mod start;

use std::collections::BTreeMap;

use bantam_kernels::Compute;
use bantam_lab::train::peak_rss_mb;
use bantam_model::ModelConfig;
use serde::Serialize;
use serde_json::{Map, Value, json};

use self::load::{Load, Measure};
use self::products::{Peaks, Product};
use self::samples::{Samples, Spread};
use super::Context;
use crate::args::BenchPart;
use crate::interrupt;
use crate::loader::{self, Loaded};
use crate::printer::{self, Align, Printer, Table};
use crate::progress::Progress;
use crate::settings::BenchSettings;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    version: &'static str,
    weights: &'static str,
    threads: usize,
    isa: &'static str,
    /// Size of the model's files.
    model_bytes: u64,
    /// Every figure's median, `null` where it was not measured.
    #[serde(flatten)]
    figures: Map<String, Value>,
    /// Memory of the process that measured, with as many answers at once as there were.
    peak_rss_all_mb: u64,
    spread: BTreeMap<String, Spread>,
    peaks: Option<Peaks>,
    products: Vec<Product>,
}

/// A figure in the order of the table.
struct Figure {
    field: String,
    title: String,
    unit: &'static str,
    samples: Samples,
}

impl Figure {
    fn new(field: impl Into<String>, title: impl Into<String>, unit: &'static str) -> Self {
        Self {
            field: field.into(),
            title: title.into(),
            unit,
            samples: Samples::default(),
        }
    }
}

/// Measures and reports.
pub(crate) fn run(context: &Context, settings: &BenchSettings) -> anyhow::Result<()> {
    if settings.one_answer {
        return start::answer(context, settings);
    }
    if settings.same_bits {
        return same_bits::run(context, settings);
    }
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    interrupt::end_at_once(&cancel);
    let compute = Compute::new(settings.threads);
    let config = ModelConfig::from_files(&loaded.base.files)?;
    let spinner = Progress::spinner(printer, format!("loading {}", loaded.base.name));
    let mut load = Load::new(
        loaded.load(&compute, settings.weights)?,
        loaded.base.chat.clone(),
        settings.chats.as_deref(),
    )?;
    drop(spinner);

    let wanted: Vec<(Measure, bool)> = measures()
        .into_iter()
        .map(|(part, measure, long)| {
            let wanted = settings.wants(part) && !(long && settings.quick);
            (measure, wanted && load.fits(measure))
        })
        .collect();
    let mut figures: Vec<Figure> = wanted
        .iter()
        .map(|(measure, _)| {
            let (title, unit) = measure.title();
            Figure::new(measure.field(), title, unit)
        })
        .collect();
    let mut starts = [
        Figure::new("load_ms", "load", "ms"),
        Figure::new("first_token_ms", "start to first token", "ms"),
        Figure::new("peak_rss_mb", "peak memory, one answer", "MiB"),
    ];
    let bar = Progress::steps(printer, "measuring", settings.rounds() as u64);
    // The first pass grows buffers.
    load.first_token()?;
    for _ in 0..settings.rounds() {
        if settings.wants(BenchPart::Start) {
            let start = start::measure(settings)?;
            let values = [start.load_ms, start.first_token_ms, start.peak_rss_mb];
            for (figure, value) in starts.iter_mut().zip(values) {
                figure.samples.push(value);
            }
        }
        for (figure, &(measure, wanted)) in figures.iter_mut().zip(&wanted) {
            if wanted {
                bar.detail(&figure.title);
                figure.samples.push(load.measure(measure)?);
            }
        }
        bar.add(1);
    }
    drop(bar);
    figures.extend(starts);
    drop(load);
    let (mut peaks, mut products) = (None, Vec::new());
    if settings.wants(BenchPart::Kernels) {
        let _spinner = Progress::spinner(printer, "measuring products");
        let (files, rounds) = (&loaded.base.files, settings.rounds());
        let machine = Peaks::measure(&compute);
        products = products::measure(files, &config, settings.weights, &machine, &compute, rounds);
        peaks = Some(machine);
    }

    let spreads = figures
        .iter()
        .filter_map(|figure| Some((figure.field.clone(), figure.samples.spread()?)));
    let report = Report {
        model: &settings.model,
        version: env!("CARGO_PKG_VERSION"),
        weights: settings.weights.name(),
        threads: settings.threads,
        isa: compute.isa().name(),
        model_bytes: loader::bytes(loaded.base.files.path()),
        figures: figures
            .iter()
            .map(|f| (f.field.clone(), json!(f.samples.spread().map(|s| s.median))))
            .collect(),
        peak_rss_all_mb: peak_rss_mb(),
        spread: spreads.collect(),
        peaks,
        products,
    };
    if settings.json {
        printer.json(&report)
    } else {
        show(printer, &report, &figures)
    }
}

/// What is measured: the part it belongs to, the figure, whether `--quick` leaves it out.
fn measures() -> [(BenchPart, Measure, bool); 8] {
    [
        (BenchPart::Prefill, Measure::Prefill(128), false),
        (BenchPart::Prefill, Measure::Prefill(512), false),
        (BenchPart::Prefill, Measure::Prefill(2048), true),
        (BenchPart::Decode, Measure::Decode, false),
        (BenchPart::Streams, Measure::Streams(4), false),
        (BenchPart::Streams, Measure::Streams(16), false),
        (BenchPart::Streams, Measure::Streams(64), true),
        (BenchPart::Chat, Measure::Chat, false),
    ]
}

fn show(printer: &Printer, report: &Report<'_>, figures: &[Figure]) -> anyhow::Result<()> {
    let style = printer.out_style();
    printer.line(style.bold(&format!(
        "{}, {}, weights {}, {} threads, {}",
        report.model,
        printer::bytes(report.model_bytes),
        report.weights,
        report.threads,
        report.isa
    )))?;
    let mut table = Table::new([
        ("", Align::Left),
        ("median", Align::Right),
        ("", Align::Left),
        ("least", Align::Right),
        ("most", Align::Right),
    ]);
    for figure in figures {
        if let Some(spread) = figure.samples.spread() {
            let values = [spread.median, spread.min, spread.max].map(short);
            let [median, min, max] = values;
            table.row([figure.title.clone(), median, figure.unit.into(), min, max]);
        }
    }
    if figures
        .iter()
        .any(|figure| figure.samples.spread().is_some())
    {
        printer.line(table.render(style))?;
    }
    if report.products.is_empty() {
        return Ok(());
    }
    let mut table = Table::new([
        ("product", Align::Left),
        ("weights", Align::Left),
        ("rows", Align::Right),
        ("us", Align::Right),
        ("GB/s", Align::Right),
        ("GOP/s", Align::Right),
        ("of peak", Align::Right),
    ]);
    for p in &report.products {
        table.row([
            format!("{} [{} x {}]", p.what, p.n, p.k),
            p.weights.clone(),
            p.m.to_string(),
            short(p.us),
            short(p.gb_s),
            short(p.gop_s),
            format!("{:.0}%", 100.0 * p.peak_share),
        ]);
    }
    printer.line(format!("\n{}", table.render(style)))?;
    if let Some(peaks) = &report.peaks {
        printer.line(format!(
            "peaks: int8 {} GOP/s, bf16 {} GOP/s, reading {} GB/s",
            short(peaks.int8_gop_s),
            short(peaks.bf16_gop_s),
            short(peaks.read_gb_s)
        ))?;
    }
    Ok(())
}

/// Three digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
