//! The scorecard: everything the demo measured, as `scorecard.json` and as the text that ends it.

use std::path::PathBuf;

use bantam_lab::report::{Scorecard, text_table};
use serde::Serialize;

use super::split::LeakCheck;
use crate::printer::{bytes, duration, thousands};

/// What the demo measured: the lab's scorecard, and what only the demo knows. `bantam demo --json` prints it
/// as one line.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DemoCard {
    #[serde(flatten)]
    pub(crate) card: Scorecard,
    pub(crate) data: Data,
    pub(crate) training: Training,
    /// Seconds of each step of this process, in order, and in all; what was there already took none.
    pub(crate) steps: Vec<Step>,
    pub(crate) total_s: f64,
    /// What a reader of the figures should know.
    pub(crate) notes: Vec<String>,
    /// What to type next.
    pub(crate) next: Vec<String>,
}

/// The data and its split.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Data {
    pub(crate) package: String,
    pub(crate) sha256: String,
    pub(crate) licence: String,
    pub(crate) train: usize,
    pub(crate) valid: usize,
    pub(crate) test: usize,
    pub(crate) messiest: usize,
    /// Rows of the messiest set whose directions or street types were relabelled for its second reading.
    pub(crate) relabelled: usize,
    pub(crate) leak_check: LeakCheck,
}

/// The training run, summed up; the whole story is in its `events.jsonl`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Training {
    pub(crate) run: PathBuf,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) lr: f64,
    pub(crate) batch: usize,
    pub(crate) epochs: usize,
    pub(crate) rows: u64,
    pub(crate) tokens: u64,
    pub(crate) train_s: f64,
    pub(crate) tok_per_s: f64,
    pub(crate) last_loss: f64,
    pub(crate) valid_loss: Option<f64>,
    pub(crate) peak_rss_mb: u64,
    pub(crate) adapter_sha256: String,
    pub(crate) adapter_bytes: u64,
}

/// How long a step took.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) seconds: f64,
}

impl DemoCard {
    /// The printed form.
    pub(crate) fn render(&self) -> String {
        let mut out = text_table(&self.card);
        let mut line = |text: &str| {
            out.push_str(text);
            out.push('\n');
        };
        let training = &self.training;
        line("");
        line(&format!(
            "trained on {} rows in {} ({:.0} tokens/s, peak memory {}); the adapter has {}",
            thousands(self.data.train as u64),
            duration(training.train_s),
            training.tok_per_s,
            bytes(training.peak_rss_mb << 20),
            bytes(training.adapter_bytes),
        ));
        for note in &self.notes {
            line(&format!("note: {note}"));
        }
        out
    }

    /// The settings that the report shows, as name and value.
    pub(crate) fn recipe(&self) -> Vec<(String, String)> {
        let (training, data) = (&self.training, &self.data);
        let pairs = [
            ("data", format!("{} ({})", data.package, data.licence)),
            (
                "rows",
                format!(
                    "{} train, {} valid, {} test, {} messiest",
                    data.train, data.valid, data.test, data.messiest
                ),
            ),
            (
                "adapter",
                format!(
                    "LoRA, rank {}, alpha {}, every linear layer",
                    training.rank, training.alpha
                ),
            ),
            ("peak learning rate", training.lr.to_string()),
            ("rows an update", training.batch.to_string()),
            ("epochs", training.epochs.to_string()),
            ("tokens seen", thousands(training.tokens)),
            (
                "training speed",
                format!("{:.0} tokens/s", training.tok_per_s),
            ),
            ("training memory", bytes(training.peak_rss_mb << 20)),
            (
                "validation loss",
                training
                    .valid_loss
                    .map_or("-".to_owned(), |loss| format!("{loss:.4}")),
            ),
        ];
        pairs.map(|(name, value)| (name.to_owned(), value)).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use bantam_lab::report::{Environment, Measurement, System, SystemKind, TestSet};

    use super::*;

    fn made_up() -> DemoCard {
        let mut card = Scorecard::new("made up", "2026-01-01T00:00:00Z", Environment::default());
        card.test_sets.push(TestSet {
            id: "test".into(),
            name: "test".into(),
            rows: 245,
            note: String::new(),
        });
        for (id, kind, value) in [
            ("most frequent tag", SystemKind::Trivial, 0.1875),
            ("specialised", SystemKind::Specialised, 0.8125),
        ] {
            card.systems.push(System {
                id: id.into(),
                name: id.into(),
                kind,
                ..System::default()
            });
            let score = |metric: &str, value: f64| serde_json::json!({"metric": metric, "value": value, "ci95": [value - 0.0625, value + 0.0625], "interval": "made up"});
            let result = serde_json::json!({
                "system": id, "test_set": "test", "rows": 245, "p50_ms": 640.0, "p95_ms": 1280.0, "tok_per_s": 600.0,
                "scores": [score("exact match", value), score("field F1", value + 0.125)],
                "failures": {"no_answer": 0, "cut_off": 1, "invalid_json": 2},
            });
            card.results
                .push(serde_json::from_value::<Measurement>(result).unwrap());
        }
        DemoCard {
            card,
            data: Data {
                package: "made-up==1".into(),
                sha256: "00".into(),
                licence: "MIT".into(),
                train: 1134,
                valid: 92,
                test: 245,
                messiest: 63,
                relabelled: 29,
                leak_check: super::super::split::leak_check(&super::super::split::Split::default()),
            },
            training: Training {
                run: "run".into(),
                rank: 16,
                alpha: 32.0,
                lr: 0.0078125,
                batch: 8,
                epochs: 2,
                rows: 2268,
                tokens: 200_000,
                train_s: 401.0,
                tok_per_s: 450.0,
                last_loss: 0.125,
                valid_loss: Some(0.25),
                peak_rss_mb: 900,
                adapter_sha256: "00".into(),
                adapter_bytes: 19_500_000,
            },
            steps: vec![Step {
                name: "training".into(),
                seconds: 401.0,
            }],
            total_s: 600.0,
            notes: vec!["a made-up note".into()],
            next: vec!["bantam serve".into()],
        }
    }

    #[test]
    fn the_end_reads_well() {
        insta::assert_snapshot!(made_up().render(), @r"
        test (245 rows)
          system             exact match % [95% CI]  field F1 % [95% CI]  p50 ms  p95 ms  tok/s                 failed
          ------------------------------------------------------------------------------------------------------------
          most frequent tag       18.8 [12.5, 25.0]    31.2 [25.0, 37.5]     640    1280    600  1 cut off, 2 not JSON
          specialised             81.2 [75.0, 87.5]   93.8 [87.5, 100.0]     640    1280    600  1 cut off, 2 not JSON

          system             model  peak memory  training
          -----------------------------------------------
          most frequent tag      -            -         -
          specialised            -            -         -

        trained on 1,134 rows in 6 min 41 s (450 tokens/s, peak memory 943.7 MB); the adapter has 19.5 MB
        note: a made-up note
        ");
    }

    #[test]
    fn the_json_has_the_scores_and_what_only_the_demo_knows() {
        let json = serde_json::to_value(made_up()).unwrap();
        let keys: Vec<&str> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        for key in [
            "schema",
            "results",
            "comparisons",
            "data",
            "training",
            "steps",
            "total_s",
            "next",
        ] {
            assert!(keys.contains(&key), "{key} in {keys:?}");
        }
    }
}
