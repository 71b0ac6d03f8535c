//! The report's two charts, as SVG text: a loss curve, and dots with intervals.
//!
//! Each is drawn for a given width in CSS pixels, so that letters keep their size on a phone; the page holds a wide
//! and a narrow drawing and shows one. Colours are the page's custom properties. All text is escaped here.

use std::fmt::Write;

/// The losses of a run, by optimizer step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossCurve {
    /// Step and loss of every batch.
    pub train: Vec<(f64, f64)>,
    /// Step and loss of every validation.
    pub valid: Vec<(f64, f64)>,
}

impl LossCurve {
    /// The curve that a run's events tell.
    pub fn from_events<'a>(
        events: impl IntoIterator<Item = &'a crate::events::RunEvent>,
    ) -> LossCurve {
        use crate::events::RunEvent;
        let mut curve = LossCurve::default();
        for event in events {
            match event {
                RunEvent::Step { step, loss, .. } => curve.train.push((*step as f64, *loss)),
                RunEvent::Valid { step, loss, .. } => curve.valid.push((*step as f64, *loss)),
                _ => {}
            }
        }
        curve
    }

    /// The training losses, each the mean of a window around it of about a twentieth of the run. The window shrinks
    /// evenly towards the ends, so the line neither lags nor starts off the mark.
    pub fn smoothed(&self) -> Vec<(f64, f64)> {
        let n = self.train.len();
        let mean_around = |i: usize| {
            let reach = (n / 40).min(i).min(n - 1 - i);
            let window = &self.train[i - reach..=i + reach];
            window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64
        };
        self.train
            .iter()
            .enumerate()
            .map(|(i, point)| (point.0, mean_around(i)))
            .collect()
    }
}

/// One dot with its interval.
#[derive(Debug, Clone)]
pub(super) struct Dot {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) ci95: [f64; 2],
    pub(super) is_ours: bool,
}

/// Dots under one heading.
#[derive(Debug, Clone)]
pub(super) struct Panel {
    pub(super) heading: String,
    pub(super) dots: Vec<Dot>,
}

/// The loss curve: raw losses faint, their running mean, validation as points.
pub(super) fn loss_chart(curve: &LossCurve, width: f64) -> String {
    let finite = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points
            .iter()
            .copied()
            .filter(|(x, y)| x.is_finite() && y.is_finite())
            .collect()
    };
    let (train, valid) = (finite(&curve.train), finite(&curve.valid));
    let smooth = finite(&curve.smoothed());
    let all = || train.iter().chain(&valid);
    let last_step = all().map(|point| point.0).fold(1.0, f64::max);
    let top = all().map(|point| point.1).fold(0.0, f64::max);
    let y_ticks = ticks(if top > 0.0 { top } else { 1.0 }, 5);
    let x_ticks = ticks(last_step, if width < 500.0 { 4 } else { 8 });
    let y_max = top.max(*y_ticks.last().unwrap_or(&1.0)) * 1.02;
    let (left, right, upper, lower) = (46.0, 16.0, 30.0, 44.0);
    let height = if width < 500.0 { 260.0 } else { 320.0 };
    let x = |step: f64| left + (width - left - right) * step / last_step;
    let y = |loss: f64| height - lower - (height - upper - lower) * loss / y_max;

    let mut svg = open(
        width,
        height,
        "loss",
        "Training and validation loss by optimizer step",
        &loss_words(curve),
    );
    for &tick in &y_ticks {
        let (x1, x2, at) = (left, width - right, y(tick));
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{x1}" x2="{x2}" y1="{at:.1}" y2="{at:.1}"/>"#
        );
        let _ = write!(
            svg,
            r#"<text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            left - 8.0,
            at + 4.0,
            short(tick)
        );
    }
    for &tick in &x_ticks {
        let (at, base) = (x(tick), height - lower);
        let _ = write!(
            svg,
            r#"<line class="axis" x1="{at:.1}" x2="{at:.1}" y1="{base}" y2="{}"/>"#,
            base + 5.0
        );
        let _ = write!(
            svg,
            r#"<text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
            base + 19.0,
            short(tick)
        );
    }
    let base = height - lower;
    let _ = write!(
        svg,
        r#"<line class="axis" x1="{left}" x2="{}" y1="{base}" y2="{base}"/>"#,
        width - right
    );
    let _ = write!(
        svg,
        r#"<text class="label" x="{:.1}" y="{}" text-anchor="middle">optimizer step</text>"#,
        (left + width - right) / 2.0,
        height - 6.0
    );
    let _ = write!(
        svg,
        r#"<text class="label" x="4" y="16">loss per trained token</text>"#
    );
    let _ = write!(
        svg,
        r#"<path class="raw" d="{}"/>"#,
        path(&thin(&train, 600), x, y)
    );
    let _ = write!(
        svg,
        r#"<path class="smooth" d="{}"/>"#,
        path(&thin(&smooth, 600), x, y)
    );
    if valid.len() > 1 {
        let _ = write!(
            svg,
            r#"<path class="valid-line" d="{}"/>"#,
            path(&valid, x, y)
        );
    }
    for &(step, loss) in &valid {
        let _ = write!(
            svg,
            r#"<circle class="valid" cx="{:.1}" cy="{:.1}" r="4.5"><title>step {step}: validation loss {loss:.4}</title></circle>"#,
            x(step),
            y(loss)
        );
    }
    let key = width - right - 178.0;
    let _ = write!(
        svg,
        r#"<line class="smooth" x1="{key}" x2="{}" y1="12" y2="12"/><text class="tick" x="{}" y="16">training</text>"#,
        key + 22.0,
        key + 28.0
    );
    let _ = write!(
        svg,
        r#"<circle class="valid" cx="{}" cy="12" r="4.5"/><text class="tick" x="{}" y="16">validation</text>"#,
        key + 104.0,
        key + 114.0
    );
    svg.push_str("</svg>");
    svg
}

/// Dots with intervals on a scale from 0 to 100%, one panel under another.
pub(super) fn dot_chart(title: &str, panels: &[Panel], width: f64) -> String {
    let narrow = width < 500.0;
    let (row, head, lower) = (if narrow { 40.0 } else { 30.0 }, 38.0, 46.0);
    // Narrow drawings put each name above its line instead of beside it.
    let (left, right) = if narrow { (12.0, 12.0) } else { (230.0, 130.0) };
    let n_rows: usize = panels.iter().map(|panel| panel.dots.len()).sum();
    let height = panels.len() as f64 * head + n_rows as f64 * row + lower;
    let x = |value: f64| left + (width - left - right) * value.clamp(0.0, 1.0);
    let base = height - lower;

    let mut svg = open(
        width,
        height,
        title,
        &format!("{title} of each system, with 95% intervals"),
        &dot_words(panels),
    );
    for percent in [0, 20, 40, 60, 80, 100] {
        let at = x(f64::from(percent) / 100.0);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="{}" y2="{base}"/>"#,
            head - 8.0
        );
        let _ = write!(
            svg,
            r#"<text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{percent}</text>"#,
            base + 17.0
        );
    }
    let _ = write!(
        svg,
        r#"<text class="label" x="{:.1}" y="{}" text-anchor="middle">{}, %</text>"#,
        (left + width - right) / 2.0,
        height - 8.0,
        escape(title)
    );
    let mut top = 0.0;
    for panel in panels {
        let _ = write!(
            svg,
            r#"<text class="panel" x="{}" y="{}">{}</text>"#,
            if narrow { left } else { 4.0 },
            top + 22.0,
            escape(&panel.heading)
        );
        top += head;
        for dot in &panel.dots {
            let at = if narrow { top + 26.0 } else { top + row / 2.0 };
            let class = if dot.is_ours { "ours" } else { "theirs" };
            let score = super::table::percent_with_interval(dot.value, dot.ci95);
            let (lo, hi) = (x(dot.ci95[0]), x(dot.ci95[1]));
            let _ = write!(
                svg,
                r#"<g class="{class}"><title>{}: {score}</title>"#,
                escape(&dot.name)
            );
            let _ = write!(
                svg,
                r#"<line x1="{lo:.1}" x2="{hi:.1}" y1="{at:.1}" y2="{at:.1}"/>"#
            );
            for end in [lo, hi] {
                let _ = write!(
                    svg,
                    r#"<line x1="{end:.1}" x2="{end:.1}" y1="{:.1}" y2="{:.1}"/>"#,
                    at - 5.0,
                    at + 5.0
                );
            }
            let _ = write!(
                svg,
                r#"<circle cx="{:.1}" cy="{at:.1}" r="5.5"/>"#,
                x(dot.value)
            );
            let (name, name_y, score_y) = if narrow {
                (clip(&dot.name, 30), top + 13.0, top + 13.0)
            } else {
                (clip(&dot.name, 34), at + 4.0, at + 4.0)
            };
            let name_x = if narrow { left } else { 14.0 };
            let _ = write!(
                svg,
                r#"<text class="name" x="{name_x}" y="{name_y:.1}">{}</text>"#,
                escape(&name)
            );
            let _ = write!(
                svg,
                r#"<text class="score" x="{}" y="{score_y:.1}" text-anchor="end">{score}</text></g>"#,
                width - if narrow { right } else { 2.0 }
            );
            top += row;
        }
    }
    svg.push_str("</svg>");
    svg
}

/// The opening of a drawing with its title and description for a screen reader.
fn open(width: f64, height: f64, kind: &str, title: &str, description: &str) -> String {
    let id: String = kind
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let id = format!("chart-{id}-{width}");
    format!(
        r#"<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{id}-t {id}-d"><title id="{id}-t">{}</title><desc id="{id}-d">{}</desc>"#,
        escape(title),
        escape(description)
    )
}

fn loss_words(curve: &LossCurve) -> String {
    let smooth = curve.smoothed();
    let ends = smooth.first().zip(smooth.last());
    let mut words = ends.map_or("No training steps.".to_owned(), |(first, last)| {
        format!(
            "Training loss goes from {:.3} at step {} to {:.3} at step {}.",
            first.1, first.0, last.1, last.0
        )
    });
    if let Some(last) = curve.valid.last() {
        let _ = write!(words, " Validation loss ends at {:.3}.", last.1);
    }
    words
}

fn dot_words(panels: &[Panel]) -> String {
    let mut words = String::new();
    for panel in panels {
        let _ = write!(words, "{}: ", panel.heading);
        for dot in &panel.dots {
            let _ = write!(
                words,
                "{} {}; ",
                dot.name,
                super::table::percent_with_interval(dot.value, dot.ci95)
            );
        }
    }
    words
}

fn path(points: &[(f64, f64)], x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> String {
    let mut d = String::new();
    for (i, &(step, value)) in points.iter().enumerate() {
        let _ = write!(
            d,
            "{}{:.1} {:.1}",
            if i == 0 { 'M' } else { 'L' },
            x(step),
            y(value)
        );
    }
    d
}

/// At most about `n` of the points, evenly, the last always.
fn thin(points: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(n).max(1);
    points
        .iter()
        .enumerate()
        .filter(|(i, _)| i % step == 0 || i + 1 == points.len())
        .map(|(_, point)| *point)
        .collect()
}

/// Round numbers from 0 up to `max`, about `n` of them, in steps of 1, 2 or 5 times a power of ten.
fn ticks(max: f64, n: usize) -> Vec<f64> {
    let rough = max / n as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(10.0 * power);
    let n_steps = (max / step + 1e-9) as usize;
    (0..=n_steps.min(100)).map(|i| i as f64 * step).collect()
}

fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn clip(text: &str, n_chars: usize) -> String {
    if text.chars().count() <= n_chars {
        return text.to_owned();
    }
    let head: String = text.chars().take(n_chars - 1).collect();
    format!("{}…", head.trim_end())
}

/// Escapes text for SVG and HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML has no place for control characters, not even escaped.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}
