//! `bantam eval --metric perplexity`: how well a model predicts a plain text.
//!
//! The text is cut into windows of 512 tokens that do not overlap, read each on its own; every token of a
//! window but the first is predicted from those before it.

use anyhow::{Context as _, anyhow};
use bantam_kernels::Compute;
use bantam_lab::train::peak_rss_mb;
use bantam_model::{InferWorkspace, KvCache, Lora, Model, Span, Wants, Weights};
use serde::Serialize;

use super::Context;
use crate::error::advise;
use crate::interrupt;
use crate::loader::Loaded;
use crate::printer::{Table, thousands};
use crate::progress::Progress;
use crate::settings::PerplexitySettings;

/// Tokens of a window.
const WINDOW: usize = 512;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    metric: &'static str,
    model: &'a str,
    weights: &'static str,
    windows: usize,
    window: usize,
    /// Tokens predicted.
    tokens: usize,
    perplexity: f64,
    /// Nats a token.
    mean_nll: f64,
    against_f32: Option<Against>,
    peak_rss_mb: u64,
}

/// The distance from the same weights computed in f32.
#[derive(Serialize)]
struct Against {
    perplexity: f64,
    /// Relative: 0.001 is a tenth of a percent worse.
    difference: f64,
    /// Nats a token, from f32's distribution to the model's.
    mean_kl: f64,
    max_kl: f64,
    /// The share of positions where both put the same token first.
    greedy_agreement: f64,
}

/// What the windows add up to.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Sums {
    tokens: usize,
    nll: f64,
    nll_f32: f64,
    kl: f64,
    max_kl: f64,
    agreed: usize,
}

/// Reads the text and reports.
pub(crate) fn run(context: &Context, settings: &PerplexitySettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    interrupt::end_at_once(&cancel);
    let text = fs_err::read_to_string(&settings.data)?;
    let window = WINDOW.min(loaded.max_context()?);
    let tokens = loaded.base.chat.tokenizer().encode_plain(&text);
    let mut windows: Vec<&[u32]> = tokens.chunks(window).filter(|w| w.len() > 1).collect();
    windows.truncate(settings.limit);
    if windows.is_empty() {
        return Err(advise(
            anyhow!("`{}` holds no text to predict", settings.data.display()),
            "give a plain text; the more of it the better, at least some pages",
        ));
    }
    let spinner = Progress::spinner(printer, format!("loading {}", loaded.base.name));
    let compute = Compute::new(settings.threads);
    let model = loaded.base.weights_as(&compute, settings.weights, false)?;
    let lora = loaded.lora(model.config());
    let mut reader = Reader::new(&model, lora.as_ref(), &compute);
    let exact = settings
        .against_f32
        .then(|| loaded.base.weights_as(&compute, Weights::F32, false))
        .transpose()?;
    let mut exact = exact
        .as_ref()
        .map(|model| Reader::new(model, lora.as_ref(), &compute));
    drop(spinner);

    let bar = Progress::steps(
        printer,
        format!("reading {}", settings.data.display()),
        windows.len() as u64,
    );
    let mut sums = Sums::default();
    for window in &windows {
        let logits = reader.logits(window);
        match &mut exact {
            Some(exact) => sums.add(window, logits, Some(exact.logits(window))),
            None => sums.add(window, logits, None),
        }
        bar.add(1);
        bar.detail(format!("perplexity {:.3}", sums.perplexity()));
    }
    drop(bar);
    anyhow::ensure!(
        sums.nll.is_finite(),
        "the model's logits are not finite numbers"
    );
    let report = Report {
        metric: "perplexity",
        model: &settings.model,
        weights: settings.weights.name(),
        windows: windows.len(),
        window,
        tokens: sums.tokens,
        perplexity: sums.perplexity(),
        mean_nll: sums.nll / sums.tokens as f64,
        against_f32: settings.against_f32.then(|| sums.against()),
        peak_rss_mb: peak_rss_mb(),
    };
    if settings.json {
        return printer.json(&report);
    }
    let mut table = Table::facts();
    table.row(["perplexity", &format!("{:.4}", report.perplexity)]);
    table.row([
        "tokens",
        &format!(
            "{} in {} windows of {window}",
            thousands(report.tokens as u64),
            report.windows
        ),
    ]);
    if let Some(against) = &report.against_f32 {
        table.row(["perplexity in f32", &format!("{:.4}", against.perplexity)]);
        table.row([
            "difference",
            &format!("{:+.4}%", 100.0 * against.difference),
        ]);
        table.row([
            "KL from f32",
            &format!(
                "{:.2e} nats a token, at most {:.2e}",
                against.mean_kl, against.max_kl
            ),
        ]);
        table.row([
            "same first token",
            &format!("{:.2}%", 100.0 * against.greedy_agreement),
        ]);
    }
    table.row(["peak memory", &format!("{} MiB", report.peak_rss_mb)]);
    printer
        .line(table.render(printer.out_style()))
        .context("could not print")
}

/// A model and what it computes with.
struct Reader<'a> {
    model: &'a Model<f32>,
    lora: Option<&'a Lora<f32>>,
    compute: &'a Compute,
    work: InferWorkspace,
    logits: Vec<f32>,
}

impl<'a> Reader<'a> {
    fn new(model: &'a Model<f32>, lora: Option<&'a Lora<f32>>, compute: &'a Compute) -> Self {
        Self {
            model,
            lora,
            compute,
            work: InferWorkspace::default(),
            logits: Vec::new(),
        }
    }

    /// The logits after every token of a window.
    fn logits(&mut self, tokens: &[u32]) -> &[f32] {
        let mut cache = KvCache::new(self.model.config());
        let span = Span {
            cache: &mut cache,
            tokens,
            logits: Wants::All,
            lora: self.lora,
        };
        self.model
            .forward(&mut [span], &mut self.logits, &mut self.work, self.compute);
        &self.logits
    }
}

impl Sums {
    /// Adds a window's predictions: row `i` of the logits is about token `i + 1`.
    fn add(&mut self, window: &[u32], logits: &[f32], exact: Option<&[f32]>) {
        let vocab = logits.len() / window.len();
        for (i, &next) in window[1..].iter().enumerate() {
            let row = &logits[i * vocab..][..vocab];
            let log_sum = log_sum_exp(row);
            self.tokens += 1;
            self.nll += log_sum - f64::from(row[next as usize]);
            let Some(exact) = exact else { continue };
            let exact = &exact[i * vocab..][..vocab];
            let exact_log_sum = log_sum_exp(exact);
            self.nll_f32 += exact_log_sum - f64::from(exact[next as usize]);
            let kl: f64 = exact
                .iter()
                .zip(row)
                .map(|(&p, &q)| {
                    let log_p = f64::from(p) - exact_log_sum;
                    log_p.exp() * (log_p - (f64::from(q) - log_sum))
                })
                .sum();
            self.kl += kl;
            self.max_kl = self.max_kl.max(kl);
            self.agreed += usize::from(first_of(row) == first_of(exact));
        }
    }

    fn perplexity(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    fn against(&self) -> Against {
        let n = self.tokens as f64;
        Against {
            perplexity: (self.nll_f32 / n).exp(),
            difference: ((self.nll - self.nll_f32) / n).exp() - 1.0,
            mean_kl: self.kl / n,
            max_kl: self.max_kl,
            greedy_agreement: self.agreed as f64 / n,
        }
    }
}

/// `ln sum_i e^(x_i)`
fn log_sum_exp(row: &[f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
    f64::from(top) + sum.ln()
}

/// The first of the largest.
fn first_of(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_odds_and_a_known_divergence() {
        // Over four tokens with equal logits every token costs ln 4, whatever is added to them.
        let mut sums = Sums::default();
        sums.add(&[0, 3, 1], &[5.0; 12], None);
        assert_eq!(sums.tokens, 2);
        assert!((sums.perplexity() - 4.0).abs() < 1e-12);

        // From (3/4, 1/4) to (1/2, 1/2).
        let mut sums = Sums::default();
        let exact = [3f32.ln(), 0.0, 0.0, 0.0];
        sums.add(&[0, 0], &[1.0; 4], Some(&exact));
        let against = sums.against();
        let kl = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((against.mean_kl - kl).abs() < 1e-7, "{}", against.mean_kl);
        assert!((against.perplexity - 4.0 / 3.0).abs() < 1e-6);
        assert!((against.difference - 0.5).abs() < 1e-6);
        assert_eq!(against.greedy_agreement, 1.0);
    }

    #[test]
    fn the_same_logits_are_no_distance_apart() {
        let logits: Vec<f32> = (0..20).map(|i| ((i * 7) % 5) as f32).collect();
        let mut sums = Sums::default();
        sums.add(&[1, 2, 3, 4], &logits, Some(&logits));
        let against = sums.against();
        assert_eq!((against.difference, against.mean_kl), (0.0, 0.0));
        assert_eq!(against.greedy_agreement, 1.0);
    }
}
