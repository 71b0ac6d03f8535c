//! Which rows go into which update, and how they are laid out.
//!
//! Each epoch shuffles the rows, cuts the shuffle into pools of 32 batches, sorts each pool by length, cuts it into
//! batches and shuffles the batches: rows of like length meet, so that steps cost alike, yet every epoch mixes anew. Rows of
//! tasks that share long instructions meet first of all. A batch is worked off in micro-batches of whole rows under a
//! token cap, which bounds memory; gradients add up and are scaled by the weight of the whole batch, so the update is the
//! batch's, not the micro-batch's. How rows become segments is in [`super::tree`].

use std::path::Path;

use sha2::{Digest, Sha256};

use super::rng::{Purpose, Stream};
use super::tree::{groups, micro_batches, pack};
use super::{LossReport, TrainError, TrainPlan, Trainable};
use crate::recipe::Settings;

/// Batches sorted together by length.
const POOL_BATCHES: usize = 32;

/// What is known of a row's answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be learnt.
    #[default]
    Taught,
    /// It is preferred to that of the row after it, or desirable.
    Chosen,
    /// The one before it is preferred to it, or it is undesirable.
    Rejected,
    /// It belongs to another prompt, and tells how far the policy has moved ([`super::preference::loss::kto_kl`]).
    Mismatched,
}

/// One conversation as token ids, with the tokens that carry a loss marked. An example is one row, or two, one after the
/// other: see [`TrainPlan::train`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrainRow {
    /// The whole row, prompt and answers.
    pub tokens: Vec<u32>,
    /// Whether token i is a target; as long as `tokens`.
    pub trained: Vec<bool>,
    /// Line in its file, from 1.
    pub line: usize,
    /// What is known of its answer.
    pub verdict: Verdict,
}

impl TrainRow {
    /// Targets of this row. Its first token has nothing before it and is never one.
    pub fn n_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|t| **t).count()
    }

    /// Tokens before the first target.
    pub fn prompt_len(&self) -> usize {
        let first = self.trained.iter().skip(1).position(|t| *t);
        first.map_or(self.tokens.len(), |at| at + 1)
    }
}

/// Where the order of the batches comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchOrder {
    /// From the seed.
    Seeded,
    /// As given, one list of row indices (from 0) an update: to compare loss curves with another trainer.
    Given(Vec<Vec<usize>>),
}

impl BatchOrder {
    /// Reads an order file: a JSON list of lists of row indices, checked against the number of rows.
    pub fn read(path: &Path, n_rows: usize) -> Result<Self, TrainError> {
        let text = fs_err::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
        let batches: Vec<Vec<usize>> =
            serde_json::from_str(&text).map_err(|e| TrainError::Corrupt {
                path: path.to_path_buf(),
                reason: format!("expected a list of lists of row numbers: {e}"),
            })?;
        let wrong = |batch, reason| {
            Err(TrainError::Order {
                path: path.to_path_buf(),
                batch,
                reason,
            })
        };
        for (index, batch) in batches.iter().enumerate() {
            if batch.is_empty() {
                return wrong(index, "is empty".to_string());
            }
            if let Some(row) = batch.iter().find(|row| **row >= n_rows) {
                return wrong(
                    index,
                    format!("names row {row}, but there are {n_rows} rows, counted from 0"),
                );
            }
        }
        if batches.is_empty() {
            return wrong(0, "is missing: the list is empty".to_string());
        }
        Ok(Self::Given(batches))
    }

    /// `seeded`, or a fingerprint of the given order.
    pub fn fingerprint(&self) -> String {
        match self {
            Self::Seeded => "seeded".to_string(),
            Self::Given(batches) => {
                let mut hash = Sha256::new();
                for batch in batches {
                    hash.update((batch.len() as u64).to_le_bytes());
                    batch
                        .iter()
                        .for_each(|row| hash.update((*row as u64).to_le_bytes()));
                }
                format!("{:x}", hash.finalize())
            }
        }
    }
}

/// The batches of a run, one epoch in memory at a time. Which rows step s takes depends on s alone, so the step is the
/// whole cursor of a checkpoint.
#[derive(Debug)]
pub(crate) struct Batches<'a> {
    order: &'a BatchOrder,
    lens: Vec<usize>,
    groups: Vec<usize>,
    batch_rows: usize,
    seed: u64,
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(plan: &'a TrainPlan) -> Self {
        Self {
            order: &plan.order,
            lens: example_lens(&plan.train, plan.settings.rows_per_example()),
            groups: if plan.settings.share_prefixes {
                example_groups(&plan.train, plan.settings.rows_per_example())
            } else {
                Vec::new()
            },
            batch_rows: plan.settings.optim.batch_rows,
            seed: plan.settings.seed,
            epoch: None,
        }
    }

    /// Steps in which every row is seen once, or in which a given order ends.
    pub(crate) fn per_epoch(&self) -> usize {
        match self.order {
            BatchOrder::Seeded => self.lens.len().div_ceil(self.batch_rows),
            BatchOrder::Given(batches) => batches.len(),
        }
    }

    /// Indices of the examples of step `step`, from 0.
    pub(crate) fn at(&mut self, step: usize) -> &[usize] {
        if let BatchOrder::Given(batches) = self.order {
            return &batches[step];
        }
        let per_epoch = self.per_epoch();
        let epoch = (step / per_epoch) as u64;
        if self.epoch.as_ref().is_none_or(|(held, _)| *held != epoch) {
            self.epoch = Some((
                epoch,
                epoch_batches(&self.lens, &self.groups, self.batch_rows, self.seed, epoch),
            ));
        }
        let (_, batches) = self.epoch.as_ref().expect("filled above");
        &batches[step % per_epoch]
    }
}

/// Tokens of each example's rows.
pub(crate) fn example_lens(rows: &[TrainRow], per_example: usize) -> Vec<usize> {
    let len = |rows: &[TrainRow]| rows.iter().map(|row| row.tokens.len()).sum();
    rows.chunks(per_example).map(len).collect()
}

/// The group of each example: that of its first row.
pub(crate) fn example_groups(rows: &[TrainRow], per_example: usize) -> Vec<usize> {
    groups(rows).into_iter().step_by(per_example).collect()
}

/// Indices of the rows of some examples.
pub(crate) fn rows_of(examples: &[usize], per_example: usize) -> Vec<usize> {
    let rows = |example: &usize| example * per_example..(example + 1) * per_example;
    examples.iter().flat_map(rows).collect()
}

/// The batches of one epoch, as row indices. Rows of one group (see [`super::tree::groups`]) meet where they can; an
/// empty list of groups is one group.
pub fn epoch_batches(
    lens: &[usize],
    groups: &[usize],
    batch_rows: usize,
    seed: u64,
    epoch: u64,
) -> Vec<Vec<usize>> {
    let mut rng = Stream::new(seed, Purpose::Epoch(epoch));
    let mut order: Vec<usize> = (0..lens.len()).collect();
    rng.shuffle(&mut order);
    let mut batches = Vec::with_capacity(lens.len().div_ceil(batch_rows));
    for pool in order.chunks_mut(batch_rows * POOL_BATCHES) {
        pool.sort_by_key(|row| (groups.get(*row), lens[*row]));
        batches.extend(pool.chunks(batch_rows).map(<[usize]>::to_vec));
    }
    rng.shuffle(&mut batches);
    batches
}

/// Mean loss per target over some rows, in their order.
pub(crate) fn mean_loss<T: Trainable + ?Sized>(
    model: &mut T,
    rows: &[TrainRow],
    which: &[usize],
    settings: &Settings,
) -> Result<f64, TrainError> {
    let (cap, share) = (settings.micro_tokens, settings.share_prefixes);
    let mut total = LossReport::default();
    for micro in micro_batches(rows, which, cap, share) {
        total.merge(&model.loss(&pack(rows, &micro, share))?);
    }
    Ok(total.mean())
}

/// SHA-256 over the rows as they are trained: ids and masks, in order, and what is known of their answers.
pub fn rows_sha256(rows: &[TrainRow]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        hash.update((row.tokens.len() as u64).to_le_bytes());
        row.tokens
            .iter()
            .for_each(|token| hash.update(token.to_le_bytes()));
        row.trained
            .iter()
            .for_each(|trained| hash.update([u8::from(*trained)]));
        if row.verdict != Verdict::Taught {
            hash.update([row.verdict as u8]);
        }
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_seeded_order_is_pinned() {
        let lens = [3; 7];
        insta::assert_compact_json_snapshot!(epoch_batches(&lens, &[], 2, 0, 0), @"[[1, 3], [4], [0, 5], [6, 2]]");
        insta::assert_compact_json_snapshot!(epoch_batches(&lens, &[], 2, 0, 1), @"[[1, 0], [3], [4, 5], [2, 6]]");
    }

    #[test]
    fn an_order_file_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("order.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            BatchOrder::read(&path, 3).map_err(|e| {
                e.to_string()
                    .replace(&path.display().to_string(), "order.json")
            })
        };
        assert_eq!(
            read("[[0, 2], [1]]"),
            Ok(BatchOrder::Given(vec![vec![0, 2], vec![1]]))
        );
        insta::assert_snapshot!(read("[[0], [3]]").unwrap_err(), @"order.json: batch 1: names row 3, but there are 3 rows, counted from 0");
        insta::assert_snapshot!(read("[[0], []]").unwrap_err(), @"order.json: batch 1: is empty");
        insta::assert_snapshot!(read("[]").unwrap_err(), @"order.json: batch 0: is missing: the list is empty");
        insta::assert_snapshot!(read("{}").unwrap_err(), @"order.json: expected a list of lists of row numbers: invalid type: map, expected a sequence at line 1 column 0");
    }

    proptest! {
        #[test]
        fn an_epoch_covers_every_row_once(lens in prop::collection::vec(1usize..50, 1..400), batch in 1usize..9, seed: u64, epoch in 0u64..9) {
            let batches = epoch_batches(&lens, &[], batch, seed, epoch);
            prop_assert_eq!(batches.len(), lens.len().div_ceil(batch));
            let mut rows: Vec<usize> = batches.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lens.len()).collect::<Vec<_>>());
            prop_assert!(batches.iter().all(|b| !b.is_empty() && b.len() <= batch));
        }
    }
}
