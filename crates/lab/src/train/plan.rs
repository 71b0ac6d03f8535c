//! From a recipe and tokenised rows to a plan that can only succeed or run out of disk.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bantam_model::{ModelConfig, Proj, Recompute};
use sha2::{Digest, Sha256};

use super::TrainError;
use super::batch::{
    BatchOrder, TrainRow, Verdict, epoch_batches, example_groups, example_lens, rows_of,
    rows_sha256,
};
use super::memory::{MOST_TOKENS, Memory};
use super::preference::kto::{mismatched, one_sided};
use super::tree::pack;
use crate::export::Adapter;
use crate::recipe::{
    Facts, InitFacts, Lines, LoraSettings, MachineSettings, Recipe, Resolved, Settings,
    TargetModule,
};

/// What a plan is made from.
#[derive(Debug, Clone)]
pub struct PlanInput {
    /// The recipe, command line laid over it.
    pub recipe: Recipe,
    /// Training rows, in file order; of pairs, the preferred answer's before the other's.
    pub train: Vec<TrainRow>,
    /// Validation rows of a file of their own; empty for none.
    pub valid: Vec<TrainRow>,
    /// Name of the base model.
    pub base_name: String,
    /// SHA-256 of its weights.
    pub base_sha256: String,
    /// Longest context of the base: the default of `max_seq_len` and its upper bound.
    pub max_context: usize,
    /// Sizes of the base, for what its training takes; without them no budget can be kept.
    pub model: Option<ModelConfig>,
    /// Where the order of the batches comes from.
    pub order: BatchOrder,
    /// An adapter to begin from, instead of random values.
    pub init: Option<Adapter>,
    /// What computes.
    pub machine: MachineSettings,
    /// Whether a run that was begun elsewhere may go on here, with other bits.
    pub allow_other_machine: bool,
    /// The run directory.
    pub out: PathBuf,
}

/// A run ready to start: settings without gaps, rows checked.
#[derive(Debug, Clone)]
pub struct TrainPlan {
    /// Settings, as in `settings.json`.
    pub settings: Settings,
    /// The recipe, as in `recipe.toml`.
    pub recipe: Recipe,
    /// What was chosen automatically, a sentence each.
    pub chosen: Vec<String>,
    /// What the user should know before the run, a sentence each.
    pub warnings: Vec<String>,
    /// Rows to train on: one an example, or two where preferences are learnt, the second of a pair being the answer that
    /// is not preferred, and of a judged answer the answer to another prompt
    /// ([`Settings::rows_per_example`](crate::recipe::Settings::rows_per_example)).
    pub train: Vec<TrainRow>,
    /// Rows to validate on.
    pub valid: Vec<TrainRow>,
    /// Where the order of the batches comes from.
    pub order: BatchOrder,
    /// The parameters to begin from, if they are not drawn at random.
    pub init: Option<Vec<f32>>,
    /// Indices of the examples that `data.skip_lines` leaves out.
    pub skipped: BTreeSet<usize>,
    /// Which activations are computed twice instead of being kept: changes no bit, and is in no settings.
    pub recompute: Recompute,
    /// What the run's memory comes from, if the base's sizes are known.
    pub memory: Option<Memory>,
    /// Whether a run that was begun elsewhere may go on here, with other bits.
    pub allow_other_machine: bool,
    /// The run directory.
    pub out: PathBuf,
}

impl TrainPlan {
    /// Examples to train on.
    pub fn n_train(&self) -> usize {
        self.train.len() / self.settings.rows_per_example()
    }

    /// Examples to validate on.
    pub fn n_valid(&self) -> usize {
        self.valid.len() / self.settings.rows_per_example()
    }

    /// Checks the rows, holds some out if asked to, and resolves the settings.
    pub fn new(input: PlanInput) -> Result<Self, TrainError> {
        let PlanInput {
            recipe,
            mut train,
            mut valid,
            base_name,
            base_sha256,
            max_context,
            model,
            order,
            init,
            machine,
            allow_other_machine,
            out,
        } = input;
        let train_path = recipe.data.train.clone().unwrap_or_default();
        let valid_path = recipe.data.valid.clone().unwrap_or_default();
        if train.is_empty() {
            return Err(TrainError::NoRows { path: train_path });
        }
        let max_seq_len = recipe.max_seq_len.unwrap_or(max_context);
        if max_seq_len < 2 || max_seq_len > max_context {
            let reason = format!("must be from 2 to {max_context}, the context of the base");
            return Err(TrainError::Setting {
                field: "max_seq_len",
                reason,
            });
        }
        let lines = recipe.method.unwrap_or_default().lines();
        let per_line = if lines == Lines::Pairs { 2 } else { 1 };
        let skip_long = recipe.skip_long.unwrap_or(false);
        let mut warnings = Vec::new();
        for (path, rows) in [(&train_path, &mut train), (&valid_path, &mut valid)] {
            if let Some(row) = rows.iter().find(|row| row.n_trained() == 0) {
                return Err(TrainError::NothingTrained {
                    path: path.clone(),
                    line: row.line,
                });
            }
            let fits = |rows: &[TrainRow]| rows.iter().all(|row| row.tokens.len() <= max_seq_len);
            let n = rows.len() / per_line;
            let n_long = rows.chunks(per_line).filter(|rows| !fits(rows)).count();
            if n_long > 0 && !skip_long {
                return Err(too_long(path, rows, max_seq_len, (n_long, n)));
            }
            if n_long > 0 {
                let whole = rows.chunks(per_line).filter(|rows| fits(rows));
                *rows = whole.flatten().cloned().collect();
                let path = path.display();
                let what = match lines {
                    Lines::Pairs => "pairs have an answer of",
                    Lines::Rows | Lines::Judged => "rows have",
                };
                warnings.push(format!(
                    "{path}: {n_long} of {n} {what} more than {max_seq_len} tokens and are left out"
                ));
            }
        }
        let fraction = recipe.valid_fraction()?;
        if fraction > 0.0 {
            (train, valid) = hold_out(train, per_line, fraction)?;
        }
        if train.is_empty() {
            return Err(TrainError::NoRows { path: train_path });
        }
        let mut per_example = per_line;
        if lines == Lines::Judged {
            warnings.extend(one_sided(&train, &train_path));
            (train, valid) = (
                mismatched(train, max_seq_len),
                mismatched(valid, max_seq_len),
            );
            per_example = 2;
        }
        let skipped = skipped(
            &train,
            per_example,
            recipe.data.skip_lines.as_deref().unwrap_or_default(),
        )?;
        let given_batches = match &order {
            BatchOrder::Seeded => None,
            BatchOrder::Given(batches) => Some(batches.len()),
        };
        let other_base = init
            .as_ref()
            .and_then(|adapter| adapter.identity.as_ref())
            .filter(|identity| identity.base_sha256 != base_sha256);
        if let Some(identity) = other_base {
            warnings.push(format!(
                "the adapter to begin from was trained on other weights (`{}`)",
                identity.base
            ));
        }
        let facts = Facts {
            rows: train.len() / per_example,
            tokens: train.iter().map(|row| row.tokens.len() as u64).sum(),
            trained_tokens: train
                .iter()
                .filter(|row| row.verdict != Verdict::Mismatched)
                .map(|row| row.n_trained() as u64)
                .sum(),
            valid_rows: valid.len() / per_example,
            train_sha256: rows_sha256(&train),
            valid_sha256: rows_sha256(&valid),
            base_name,
            base_sha256,
            max_seq_len,
            order: order.fingerprint(),
            given_batches,
            machine,
            init: init.as_ref().map(init_facts),
        };
        let Resolved {
            mut settings,
            mut chosen,
        } = recipe.resolve(&facts)?;
        let lora = settings.lora.as_ref().map(LoraSettings::config);
        let memory = model.map(|model| Memory::new(&model, lora, !valid.is_empty()));
        if recipe.micro_tokens.is_none() && settings.share_prefixes {
            let most = match recipe.memory_mb {
                Some(_) => MOST_TOKENS,
                None => 2 * settings.micro_tokens,
            };
            settings.micro_tokens = whole_batch(&train, &settings, most);
        }
        let mut recompute = Recompute::None;
        if let (Some(budget), Some(memory)) = (recipe.memory_mb, &memory) {
            let fit = memory.fit(budget, wanted(&recipe, &settings, &train, &valid))?;
            chosen.push(format!(
                "micro_tokens = {} and {} layers computed twice, for {budget} MiB",
                fit.tokens, fit.twice
            ));
            settings.micro_tokens = recipe.micro_tokens.unwrap_or(fit.tokens);
            recompute = fit.recompute();
        }
        Ok(Self {
            settings,
            recipe,
            chosen,
            warnings,
            train,
            valid,
            order,
            init: init.map(|adapter| adapter.params),
            skipped,
            recompute,
            memory,
            allow_other_machine,
            out,
        })
    }
}

/// Tokens a pass would take if memory were no question, the longest row, and what all rows begin with.
fn wanted(
    recipe: &Recipe,
    settings: &Settings,
    train: &[TrainRow],
    valid: &[TrainRow],
) -> (usize, usize, usize) {
    let rows = || train.iter().chain(valid);
    let longest = rows().map(|row| row.tokens.len()).max().unwrap_or(0);
    if let Some(given) = recipe.micro_tokens {
        // A longer row is a pass of its own whatever the limit, and no smaller pass is asked for.
        let most = given.max(longest);
        return (most, most, 0);
    }
    let first = &train[0].tokens;
    let alike = |row: &TrainRow| {
        first
            .iter()
            .zip(&row.tokens)
            .take_while(|(a, b)| a == b)
            .count()
    };
    let shared = if settings.share_prefixes && train.len() > 1 {
        train[1..].iter().map(alike).min().unwrap_or(0)
    } else {
        0
    };
    (settings.micro_tokens, longest, shared)
}

/// Tokens that an average batch computes, if that is at most `most`: a beginning that all its rows share is then
/// computed once, not once a micro-batch.
fn whole_batch(rows: &[TrainRow], settings: &Settings, most: usize) -> usize {
    let per_example = settings.rows_per_example();
    let lens = example_lens(rows, per_example);
    let groups = example_groups(rows, per_example);
    let batches = epoch_batches(&lens, &groups, settings.optim.batch_rows, settings.seed, 0);
    let computed = |batch: &Vec<usize>| {
        let batch = rows_of(batch, per_example);
        pack(rows, &batch, true).tokens.len()
    };
    let looked_at = batches.len().min(32);
    let all: usize = batches[..looked_at].iter().map(computed).sum();
    // A tenth more: most batches are then whole, not half of them.
    let whole = all * 11 / (10 * looked_at);
    (whole.div_ceil(32) * 32).clamp(settings.micro_tokens, most.max(settings.micro_tokens))
}

/// Indices of the examples of these lines.
fn skipped(
    rows: &[TrainRow],
    per_example: usize,
    lines: &[usize],
) -> Result<BTreeSet<usize>, TrainError> {
    let mut found = BTreeSet::new();
    for line in lines {
        let examples = rows.chunks(per_example).enumerate();
        let before = found.len();
        found.extend(
            examples
                .filter(|(_, rows)| rows[0].line == *line)
                .map(|(i, _)| i),
        );
        if found.len() == before && lines.iter().filter(|other| *other == line).count() == 1 {
            return Err(TrainError::Setting {
                field: "data.skip_lines",
                reason: format!("names line {line}, on which there is no row to train on"),
            });
        }
    }
    if found.len() == rows.len() / per_example {
        return Err(TrainError::Setting {
            field: "data.skip_lines",
            reason: "leaves no row to train on".to_string(),
        });
    }
    Ok(found)
}

/// Shape and digest of an adapter.
fn init_facts(adapter: &Adapter) -> InitFacts {
    let mut hash = Sha256::new();
    for number in &adapter.params {
        hash.update(number.to_le_bytes());
    }
    let named = |target: &TargetModule| {
        let of = |proj: &Proj| proj.name() == target.name();
        adapter.config.targets.iter().any(of)
    };
    InitFacts {
        rank: adapter.config.rank,
        alpha: adapter.config.alpha,
        targets: TargetModule::ALL.into_iter().filter(named).collect(),
        sha256: format!("{:x}", hash.finalize()),
    }
}

fn too_long(
    path: &std::path::Path,
    rows: &[TrainRow],
    max_seq_len: usize,
    (count, n): (usize, usize),
) -> TrainError {
    let first = rows.iter().find(|row| row.tokens.len() > max_seq_len);
    TrainError::TooLong {
        path: path.to_path_buf(),
        line: first.map_or(0, |row| row.line),
        tokens: first.map_or(0, |row| row.tokens.len()),
        max_seq_len,
        count,
        rows: n,
        longest: rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0),
    }
}

/// Splits by hash of the row, so that equal rows stay on one side and adding rows moves none of the old ones; of
/// preferences, by hash of the prompt, so that no answer to a prompt is learnt whose other answer is validated on.
fn hold_out(
    rows: Vec<TrainRow>,
    per_line: usize,
    fraction: f64,
) -> Result<(Vec<TrainRow>, Vec<TrainRow>), TrainError> {
    let key = |row: &TrainRow| {
        let mut hash = Sha256::new();
        let hashed = match row.verdict {
            Verdict::Taught => row.tokens.len(),
            _ => row.prompt_len(),
        };
        row.tokens[..hashed]
            .iter()
            .for_each(|token| hash.update(token.to_le_bytes()));
        u64::from_le_bytes(
            hash.finalize()[..8]
                .try_into()
                .expect("a digest has 32 bytes"),
        )
    };
    let limit = (fraction * u64::MAX as f64) as u64;
    let (mut train, mut valid) = (Vec::new(), Vec::new());
    for rows in rows.chunks(per_line) {
        let side = if key(&rows[0]) < limit {
            &mut valid
        } else {
            &mut train
        };
        side.extend_from_slice(rows);
    }
    if valid.is_empty() || train.is_empty() {
        let side = if valid.is_empty() {
            "validate on"
        } else {
            "train on"
        };
        let reason = format!(
            "leaves nothing to {side}: {} rows are too few for it",
            rows.len() / per_line
        );
        return Err(TrainError::Setting {
            field: "data.valid_fraction",
            reason,
        });
    }
    Ok((train, valid))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::DataRecipe;

    fn input(lens: &[usize]) -> PlanInput {
        let row = |(i, len): (usize, &usize)| {
            let mut tokens = vec![1; *len];
            tokens[0] = i as u32;
            TrainRow {
                tokens,
                trained: vec![true; *len],
                line: i + 1,
                ..TrainRow::default()
            }
        };
        let data = DataRecipe {
            train: Some("train.jsonl".into()),
            ..Default::default()
        };
        PlanInput {
            recipe: Recipe {
                data,
                ..Default::default()
            },
            train: lens.iter().enumerate().map(row).collect(),
            valid: Vec::new(),
            base_name: "tiny".into(),
            base_sha256: "b".into(),
            max_context: 8,
            model: None,
            order: BatchOrder::Seeded,
            init: None,
            machine: MachineSettings::default(),
            allow_other_machine: false,
            out: Path::new("out").into(),
        }
    }

    #[test]
    fn long_rows_are_refused_with_their_line() {
        let error = TrainPlan::new(input(&[3, 9, 4, 12])).unwrap_err();
        insta::assert_snapshot!(error, @"train.jsonl:2: this row has 9 tokens but `max_seq_len` is 8 (2 of 4 rows are too long, the longest has 12); raise `max_seq_len`, shorten them, or set `skip_long = true`");
    }

    #[test]
    fn long_rows_are_skipped_when_asked_and_said() {
        let mut input = input(&[3, 9, 4, 12]);
        input.recipe.skip_long = Some(true);
        let plan = TrainPlan::new(input).unwrap();
        assert_eq!(
            plan.train.iter().map(|r| r.line).collect::<Vec<_>>(),
            [1, 3]
        );
        insta::assert_snapshot!(plan.warnings.join("\n"), @"train.jsonl: 2 of 4 rows have more than 8 tokens and are left out");
    }

    #[test]
    fn rows_without_targets_and_empty_files_are_refused() {
        let mut none = input(&[3, 4]);
        none.train[1].trained = vec![true, false, false, false];
        insta::assert_snapshot!(TrainPlan::new(none).unwrap_err(), @"train.jsonl:2: no token of this row is trained");
        insta::assert_snapshot!(TrainPlan::new(input(&[])).unwrap_err(), @"train.jsonl: there are no rows to train on");
    }

    #[test]
    fn holding_out_keeps_equal_rows_together_and_old_rows_in_place() {
        let split = |n: usize| {
            let mut input = input(&vec![5; n]);
            input.train.push(input.train[0].clone());
            input.recipe.data.valid_fraction = Some(0.2);
            TrainPlan::new(input).unwrap()
        };
        let (small, large) = (split(200), split(300));
        assert_eq!(small.train.len() + small.valid.len(), 201);
        assert!(
            (20..60).contains(&small.valid.len()),
            "{}",
            small.valid.len()
        );
        let twins = small.valid.iter().filter(|r| r.tokens[0] == 0).count();
        assert!(twins == 0 || twins == 2);
        assert!(small.valid.iter().all(|row| large.valid.contains(row)));
    }
}
