//! Which rows go into which update, and how they are laid out.
//!
//! Each epoch shuffles the rows, cuts the shuffle into pools of 32 batches, sorts each pool by length, cuts it into
//! batches and shuffles the batches: rows of like length meet, so little work is lost on the longest, yet every epoch
//! mixes anew. A batch is worked off in micro-batches of whole rows under a token cap, which bounds memory; gradients
//! add up and are scaled by the weight of the whole batch, so the update is the batch's, not the micro-batch's.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::rng::{Purpose, Stream};
use super::{LossReport, PackedBatch, Target, TrainError, Trainable};

/// Batches sorted together by length.
const POOL_BATCHES: usize = 32;

/// One example as token ids, with the tokens that carry a loss marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainRow {
    /// The whole row, prompt and answers.
    pub tokens: Vec<u32>,
    /// Whether token i is a target; as long as `tokens`.
    pub trained: Vec<bool>,
    /// Line in its file, from 1.
    pub line: usize,
}

impl TrainRow {
    /// Targets of this row. Its first token has nothing before it and is never one.
    pub fn n_trained(&self) -> usize {
        self.trained.iter().skip(1).filter(|t| **t).count()
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
    batch_rows: usize,
    seed: u64,
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(
        order: &'a BatchOrder,
        rows: &[TrainRow],
        batch_rows: usize,
        seed: u64,
    ) -> Self {
        Self {
            order,
            lens: rows.iter().map(|row| row.tokens.len()).collect(),
            batch_rows,
            seed,
            epoch: None,
        }
    }

    /// Row indices of step `step`, from 0.
    pub(crate) fn at(&mut self, step: usize) -> &[usize] {
        if let BatchOrder::Given(batches) = self.order {
            return &batches[step];
        }
        let per_epoch = self.lens.len().div_ceil(self.batch_rows);
        let epoch = (step / per_epoch) as u64;
        if self.epoch.as_ref().is_none_or(|(held, _)| *held != epoch) {
            self.epoch = Some((
                epoch,
                epoch_batches(&self.lens, self.batch_rows, self.seed, epoch),
            ));
        }
        let (_, batches) = self.epoch.as_ref().expect("filled above");
        &batches[step % per_epoch]
    }
}

/// The batches of one epoch, as row indices.
pub fn epoch_batches(lens: &[usize], batch_rows: usize, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let mut rng = Stream::new(seed, Purpose::Epoch(epoch));
    let mut order: Vec<usize> = (0..lens.len()).collect();
    rng.shuffle(&mut order);
    let mut batches = Vec::with_capacity(lens.len().div_ceil(batch_rows));
    for pool in order.chunks_mut(batch_rows * POOL_BATCHES) {
        pool.sort_by_key(|row| lens[*row]);
        batches.extend(pool.chunks(batch_rows).map(<[usize]>::to_vec));
    }
    rng.shuffle(&mut batches);
    batches
}

/// Cuts a batch into runs of whole rows of at most `micro_tokens` tokens; a longer row is a run of its own.
pub fn micro_batches(rows: &[TrainRow], batch: &[usize], micro_tokens: usize) -> Vec<Vec<usize>> {
    let mut micro: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for &row in batch {
        let len = rows[row].tokens.len();
        match micro.last_mut() {
            Some(last) if len <= room => {
                last.push(row);
                room -= len;
            }
            _ => {
                micro.push(vec![row]);
                room = micro_tokens.saturating_sub(len);
            }
        }
    }
    micro
}

/// Lays rows end to end. A row ends before its last target, which is predicted but never read.
pub fn pack(rows: &[TrainRow], batch: &[usize]) -> PackedBatch {
    let (mut packed, mut lens) = (PackedBatch::default(), Vec::new());
    for row in batch.iter().map(|&row| &rows[row]) {
        let start = packed.tokens.len();
        let targets = (1..row.tokens.len()).filter(|&i| row.trained[i]);
        let before = packed.targets.len();
        packed.targets.extend(targets.map(|i| Target {
            pos: (start + i - 1) as u32,
            token: row.tokens[i],
            weight: 1.0,
        }));
        let Some(last) = packed.targets[before..].last() else {
            continue;
        };
        let len = last.pos as usize + 1 - start;
        packed.tokens.extend_from_slice(&row.tokens[..len]);
        lens.push(len);
    }
    PackedBatch::rows(packed.tokens, lens, packed.targets)
}

/// Mean loss per target over all rows, in the rows' order.
pub(crate) fn mean_loss<T: Trainable>(
    model: &mut T,
    rows: &[TrainRow],
    micro_tokens: usize,
) -> Result<f64, TrainError> {
    let all: Vec<usize> = (0..rows.len()).collect();
    let mut total = LossReport::default();
    for micro in micro_batches(rows, &all, micro_tokens) {
        let report = model.loss(&pack(rows, &micro))?;
        total.loss_sum += report.loss_sum;
        total.weight_sum += report.weight_sum;
    }
    Ok(total.loss_sum / total.weight_sum)
}

/// SHA-256 over the rows as they are trained: ids and masks, in order.
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
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(tokens: &[u32], trained: &[u8]) -> TrainRow {
        TrainRow {
            tokens: tokens.to_vec(),
            trained: trained.iter().map(|t| *t == 1).collect(),
            line: 1,
        }
    }

    #[test]
    fn targets_point_at_the_token_before() {
        let rows = [
            row(&[5, 6, 7, 8], &[0, 0, 1, 1]),
            row(&[1, 2, 3, 4], &[1, 1, 0, 0]),
        ];
        let packed = pack(&rows, &[0, 1]);
        assert_eq!(packed.tokens, [5, 6, 7, 1]);
        let lens: Vec<_> = packed.segments.iter().map(|s| (s.parent, s.len)).collect();
        assert_eq!(lens, [(None, 3), (None, 1)]);
        let targets: Vec<_> = packed.targets.iter().map(|t| (t.pos, t.token)).collect();
        assert_eq!(targets, [(1, 7), (2, 8), (3, 2)]);
    }

    #[test]
    fn the_seeded_order_is_pinned() {
        let lens = [3; 7];
        insta::assert_compact_json_snapshot!(epoch_batches(&lens, 2, 0, 0), @"[[1, 3], [4], [0, 5], [6, 2]]");
        insta::assert_compact_json_snapshot!(epoch_batches(&lens, 2, 0, 1), @"[[1, 0], [3], [4, 5], [2, 6]]");
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
            let batches = epoch_batches(&lens, batch, seed, epoch);
            prop_assert_eq!(batches.len(), lens.len().div_ceil(batch));
            let mut rows: Vec<usize> = batches.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lens.len()).collect::<Vec<_>>());
            prop_assert!(batches.iter().all(|b| !b.is_empty() && b.len() <= batch));
        }

        #[test]
        fn micro_batches_keep_order_and_the_cap(lens in prop::collection::vec(1usize..50, 1..60), cap in 1usize..120) {
            let rows: Vec<TrainRow> = lens.iter().map(|n| row(&vec![1; *n], &vec![1; *n])).collect();
            let batch: Vec<usize> = (0..rows.len()).rev().collect();
            let micro = micro_batches(&rows, &batch, cap);
            prop_assert_eq!(micro.concat(), batch);
            for rows_of in &micro {
                let tokens: usize = rows_of.iter().map(|r| lens[*r]).sum();
                prop_assert!(tokens <= cap || rows_of.len() == 1);
            }
        }
    }
}
