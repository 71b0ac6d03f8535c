//! The settings of the commands that compute: train, eval, chat, serve, embed.

use std::path::PathBuf;

use anyhow::anyhow;
use bantam_lab::eval::Metric;
use bantam_lab::recipe::{DataRecipe, LoraRecipe, OptimRecipe, PreferenceRecipe, Recipe};
use bantam_model::Weights;

use super::{count, threads};
use crate::args::{ChatArgs, EmbedArgs, EvalArgs, MetricArg, TrainArgs};
use crate::error::advise;

/// `bantam train`
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TrainSettings {
    /// The recipe file with the flags laid over it; its open values are resolved from the data.
    pub(crate) recipe: Recipe,
    /// The base model's name or path.
    pub(crate) base: String,
    /// Training rows.
    pub(crate) train: PathBuf,
    /// What to do.
    pub(crate) mode: TrainMode,
    /// Go on with a run that was begun by another version or on another instruction set.
    pub(crate) allow_other_machine: bool,
    /// Whether a server started it, and the most memory, in MiB, that it gives it.
    pub(crate) worker: Option<Option<u64>>,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// What `bantam train` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TrainMode {
    /// Trains into this run directory.
    Run(PathBuf),
    /// The same, on the batches that another trainer took.
    Replay {
        /// The run directory.
        out: PathBuf,
        /// Row numbers of each batch.
        order: PathBuf,
    },
    /// Says what the run would take.
    DryRun,
    /// Shows so many rows with their loss mask.
    Preview(usize),
}

impl TrainSettings {
    /// Reads the recipe, lays the flags over it, and insists on what cannot be guessed.
    pub(super) fn resolve(args: TrainArgs) -> anyhow::Result<Self> {
        let from_file = match &args.recipe {
            Some(path) => Recipe::read(path)?,
            None => Recipe::default(),
        };
        let recipe = from_file.overlaid(Recipe {
            method: args.method.map(Into::into),
            base: args.base,
            seed: args.seed,
            memory_mb: args.memory_mb,
            share_prefixes: args.no_share_prefixes.then_some(false),
            data: DataRecipe {
                train: args.train,
                valid: args.valid,
                valid_fraction: None,
                system: args.system,
                skip_lines: None,
            },
            lora: LoraRecipe {
                rank: args.rank.map(|n| n as usize),
                alpha: args.alpha,
                targets: None,
                init: args.init_adapter,
            },
            preference: PreferenceRecipe {
                beta: args.beta,
                ..PreferenceRecipe::default()
            },
            optim: OptimRecipe {
                lr: args.lr,
                epochs: args.epochs.map(|n| n as usize),
                batch_rows: args.batch.map(|n| n as usize),
                max_steps: args
                    .max_steps
                    .map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
                ..OptimRecipe::default()
            },
            ..Recipe::default()
        });
        let base = recipe.base.clone().ok_or_else(|| {
            advise(
                anyhow!("no base model was given"),
                "name one with `--base`, such as `--base smollm2-135m-instruct`",
            )
        })?;
        let train = recipe.data.train.clone().ok_or_else(|| {
            advise(
                anyhow!("no training rows were given"),
                "name a file of JSON lines with `--train`, each with `prompt` and `completion`, for example",
            )
        })?;
        let mode = match (args.preview, args.out, args.order) {
            (Some(rows), _, _) => TrainMode::Preview(rows as usize),
            _ if args.dry_run => TrainMode::DryRun,
            (None, Some(out), None) => TrainMode::Run(out),
            (None, Some(out), Some(order)) => TrainMode::Replay { out, order },
            (None, None, _) => {
                return Err(advise(
                    anyhow!("no run directory was given"),
                    "name a folder with `--out`: the result and the checkpoints go there",
                ));
            }
        };
        Ok(Self {
            recipe,
            base,
            train,
            mode,
            allow_other_machine: args.allow_other_machine,
            worker: args.worker.then_some(args.worker_memory_mb),
            threads: threads(args.threads),
            json: args.json.json,
        })
    }
}

/// `bantam eval`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EvalSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// Test rows.
    pub(crate) data: PathBuf,
    /// How answers are compared.
    pub(crate) metric: MetricChoice,
    /// The system message for rows without one.
    pub(crate) system: SystemChoice,
    /// What answers are held to.
    pub(crate) constraint: ConstraintChoice,
    /// Keep how sure the run may be in its folder.
    pub(crate) calibrate: bool,
    /// Most rows.
    pub(crate) limit: usize,
    /// Longest answer.
    pub(crate) max_tokens: usize,
    /// Where each row's result goes, if anywhere.
    pub(crate) rows_out: Option<PathBuf>,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// How answers are compared with references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetricChoice {
    /// `label` for a file of labels, `json` for a schema or where all references are JSON objects, else `exact`.
    FromRows,
    /// As the user says.
    Given(Metric),
}

/// Which system message is put before conversations that have none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SystemChoice {
    /// The one that the run was trained with.
    OfTheRun,
    /// As the user says.
    Given(String),
}

impl SystemChoice {
    pub(super) fn new(arg: Option<String>) -> Self {
        arg.map_or(Self::OfTheRun, Self::Given)
    }

    /// The message, if there is one to use.
    pub(crate) fn or<'a>(&'a self, of_the_run: Option<&'a str>) -> Option<&'a str> {
        match self {
            Self::OfTheRun => of_the_run,
            Self::Given(text) => Some(text.as_str()).filter(|text| !text.is_empty()),
        }
    }
}

/// What a model's answers are held to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConstraintChoice {
    /// Anything goes.
    Free,
    /// A JSON schema in this file.
    Schema(PathBuf),
    /// The labels in this file, one a line.
    Labels(PathBuf),
}

/// `bantam eval --metric perplexity`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PerplexitySettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// The text.
    pub(crate) data: PathBuf,
    /// Compare with the same weights in f32.
    pub(crate) against_f32: bool,
    /// Most windows.
    pub(crate) limit: usize,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

impl PerplexitySettings {
    /// The settings, if this metric was asked for; flags that mean nothing to it are refused.
    pub(super) fn resolve(args: &EvalArgs) -> anyhow::Result<Option<Self>> {
        if args.metric != Some(MetricArg::Perplexity) {
            return if args.against_f32 {
                Err(advise(
                    anyhow!("`--against-f32` compares perplexities"),
                    "add `--metric perplexity`, and a plain text as `--data`",
                ))
            } else {
                Ok(None)
            };
        }
        let meaningless = [
            ("--schema", args.schema.is_some()),
            ("--labels", args.labels.is_some()),
            ("--system", args.system.is_some()),
            ("--calibrate", args.calibrate),
            ("--rows-out", args.rows_out.is_some()),
        ];
        if let Some((flag, _)) = meaningless.into_iter().find(|(_, given)| *given) {
            return Err(advise(
                anyhow!("perplexity asks the model nothing, so `{flag}` means nothing to it"),
                format!("leave out `{flag}`"),
            ));
        }
        Ok(Some(Self {
            model: args.model.clone(),
            data: args.data.clone(),
            against_f32: args.against_f32,
            limit: count(args.limit),
            weights: args.weights.weights.into(),
            threads: threads(args.threads),
            json: args.json.json,
        }))
    }
}

impl EvalSettings {
    pub(super) fn resolve(args: EvalArgs) -> Self {
        let constraint = match (args.schema, args.labels) {
            (Some(path), _) => ConstraintChoice::Schema(path),
            (None, Some(path)) => ConstraintChoice::Labels(path),
            (None, None) => ConstraintChoice::Free,
        };
        let metric = args.metric.and_then(|metric| match metric {
            MetricArg::Exact => Some(Metric::Exact),
            MetricArg::Json => Some(Metric::Json),
            MetricArg::Label => Some(Metric::Label),
            MetricArg::RougeL => Some(Metric::RougeL),
            // Have settings of their own.
            MetricArg::Perplexity | MetricArg::Preference => None,
        });
        Self {
            model: args.model,
            data: args.data,
            metric: metric.map_or(MetricChoice::FromRows, MetricChoice::Given),
            system: SystemChoice::new(args.system),
            constraint,
            limit: count(args.limit),
            max_tokens: args.max_tokens as usize,
            calibrate: args.calibrate,
            rows_out: args.rows_out,
            weights: args.weights.weights.into(),
            threads: threads(args.threads),
            json: args.json.json,
        }
    }
}

/// `bantam chat`
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChatSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// The system message.
    pub(crate) system: SystemChoice,
    /// 0 for the likeliest token.
    pub(crate) temperature: f64,
    /// Nucleus.
    pub(crate) top_p: f64,
    /// Longest answer.
    pub(crate) max_tokens: usize,
    /// Seed of the sampling.
    pub(crate) seed: u64,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
}

impl ChatSettings {
    pub(super) fn resolve(args: ChatArgs) -> Self {
        Self {
            model: args.model,
            system: SystemChoice::new(args.system),
            temperature: args.temperature,
            top_p: args.top_p,
            max_tokens: args.max_tokens as usize,
            seed: args.seed,
            weights: args.weights.weights.into(),
            threads: threads(args.threads),
        }
    }
}

/// `bantam embed`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EmbedSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// The texts; nothing for stdin.
    pub(crate) data: Option<PathBuf>,
    /// Whether a line is a text, and not JSON.
    pub(crate) lines: bool,
    /// Where the vectors go; nothing for stdout.
    pub(crate) out: Option<PathBuf>,
    /// Numbers to keep of each vector, if not all.
    pub(crate) dimensions: Option<usize>,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

impl EmbedSettings {
    pub(super) fn resolve(args: EmbedArgs) -> anyhow::Result<Self> {
        if args.json.json && args.out.is_none() {
            return Err(advise(
                anyhow!("`--json` and the vectors would share stdout"),
                "name a file for the vectors with `--out`",
            ));
        }
        Ok(Self {
            model: args.model,
            data: (args.data != "-").then(|| args.data.into()),
            lines: args.lines,
            out: args.out,
            dimensions: args.dimensions.map(|n| n as usize),
            threads: threads(args.threads),
            json: args.json.json,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::error::{Style, render};
    use crate::settings::Action;

    fn action(arguments: &[&str]) -> anyhow::Result<Action> {
        Action::resolve(
            crate::args::Cli::try_parse_from([&["bantam"], arguments].concat())
                .unwrap()
                .command,
        )
    }

    #[test]
    fn flags_win_over_the_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("recipe.toml");
        let text = "base = \"b\"\nseed = 7\n[data]\ntrain = \"t.jsonl\"\n[lora]\nrank = 8\n[optim]\nlr = 0.5\n";
        fs_err::write(&recipe, text).unwrap();
        let recipe = recipe.to_str().unwrap();
        let arguments = [
            "train",
            "--recipe",
            recipe,
            "--rank",
            "4",
            "--epochs",
            "2",
            "--out",
            "o",
            "--threads",
            "3",
        ];
        let Action::Train(settings) = action(&arguments).unwrap() else {
            unreachable!()
        };
        assert_eq!(
            (settings.base.as_str(), settings.train.to_str()),
            ("b", Some("t.jsonl"))
        );
        assert_eq!(
            (settings.recipe.seed, settings.recipe.lora.rank),
            (Some(7), Some(4))
        );
        assert_eq!(
            (settings.recipe.optim.lr, settings.recipe.optim.epochs),
            (Some(0.5), Some(2))
        );
        assert_eq!(
            (&settings.mode, settings.threads),
            (&TrainMode::Run("o".into()), 3)
        );
    }

    #[test]
    fn what_cannot_be_guessed_is_asked_for() {
        let say =
            |arguments: &[&str]| render(&action(arguments).unwrap_err(), Style { color: false });
        let said = [
            say(&["train"]),
            say(&["train", "--base", "b"]),
            say(&["train", "--base", "b", "--train", "t"]),
            say(&["serve", "--model", "m", "--host", "example.org"]),
        ];
        insta::assert_snapshot!(said.concat(), @r#"
        error: no base model was given
        hint: name one with `--base`, such as `--base smollm2-135m-instruct`
        error: no training rows were given
        hint: name a file of JSON lines with `--train`, each with `prompt` and `completion`, for example
        error: no run directory was given
        hint: name a folder with `--out`: the result and the checkpoints go there
        error: `example.org` is not an IP address to listen on
        hint: 127.0.0.1 is this machine alone, 0.0.0.0 every network it is in
        "#);
        let Action::Train(preview) =
            action(&["train", "--base", "b", "--train", "t", "--preview=2"]).unwrap()
        else {
            unreachable!()
        };
        assert_eq!(preview.mode, TrainMode::Preview(2));
    }

    #[test]
    fn eval_chat_and_serve_are_resolved() {
        let Action::Eval(eval) =
            action(&["eval", "--model", "m", "--data", "d", "--labels", "l"]).unwrap()
        else {
            unreachable!()
        };
        assert_eq!(
            (eval.constraint, eval.limit),
            (ConstraintChoice::Labels("l".into()), usize::MAX)
        );
        assert_eq!(
            (eval.metric, eval.system),
            (MetricChoice::FromRows, SystemChoice::OfTheRun)
        );
        let Action::Serve(serve) =
            action(&["serve", "--model", "runs/a.gguf", "--host", "localhost"]).unwrap()
        else {
            unreachable!()
        };
        assert_eq!(
            (serve.models[0].id.as_str(), serve.host.to_string()),
            ("a", "127.0.0.1".to_owned())
        );
        let Action::Chat(chat) = action(&["chat", "--model", "m", "--system", ""]).unwrap() else {
            unreachable!()
        };
        assert_eq!(
            chat.system.or(Some("of the run")),
            None,
            "an empty one is none"
        );
    }
}
