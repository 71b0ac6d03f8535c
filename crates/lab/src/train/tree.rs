//! Rows as a tree: what rows of a micro-batch begin with alike is laid down, and computed, once.
//!
//! Rows are sorted, so that rows that share a beginning are neighbours; a group of rows becomes a segment of what all
//! of them share, with a branch for each way they go on. The gradients are those of the rows one by one, up to the
//! order in which they are added.

use std::ops::Range;

use bantam_model::Segment;

use super::{PackedBatch, Target, TrainRow};

/// Tokens that a shared segment must save: attention works by blocks of rows, and a segment of a few tokens costs a
/// block like one of many.
const LEAST_SAVED: usize = 16;

/// The part of a row that is read: its last target is predicted but never read.
fn path(row: &TrainRow) -> &[u32] {
    let last = row.trained.iter().rposition(|trained| *trained);
    &row.tokens[..last.unwrap_or(0)]
}

/// How far two rows begin alike.
fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Lays out rows: end to end in their order, or with shared beginnings once, sorted.
pub fn pack(rows: &[TrainRow], batch: &[usize], share_prefixes: bool) -> PackedBatch {
    pack_weighted(rows, batch, share_prefixes, &|_| 1.0).0
}

/// As [`pack`] with shared beginnings; and of every target, the row it is of.
pub fn pack_owned(rows: &[TrainRow], batch: &[usize]) -> (PackedBatch, Vec<usize>) {
    pack_weighted(rows, batch, true, &|_| 1.0)
}

/// As [`pack`], each row's targets with that row's weight; and of every target, the row it is of.
pub(crate) fn pack_weighted(
    rows: &[TrainRow],
    batch: &[usize],
    share_prefixes: bool,
    weight: &dyn Fn(usize) -> f32,
) -> (PackedBatch, Vec<usize>) {
    let mut layout = Layout {
        packed: PackedBatch::default(),
        owners: Vec::new(),
        weight,
    };
    let mut batch: Vec<(usize, &TrainRow)> = batch.iter().map(|row| (*row, &rows[*row])).collect();
    batch.retain(|(_, row)| !path(row).is_empty());
    if share_prefixes {
        batch.sort_by_key(|(_, row)| path(row));
        layout.grow(&batch, (0, 0), None);
    } else {
        for row in batch {
            layout.add(&[row], 0..path(row.1).len(), None);
        }
    }
    (layout.packed, layout.owners)
}

/// A batch being laid out.
struct Layout<'a> {
    packed: PackedBatch,
    /// Of every target, the row it is of.
    owners: Vec<usize>,
    weight: &'a dyn Fn(usize) -> f32,
}

impl Layout<'_> {
    /// Adds sorted rows that agree up to `seen` and are laid down up to `depth`, the end of segment `parent`.
    fn grow(
        &mut self,
        rows: &[(usize, &TrainRow)],
        (depth, seen): (usize, usize),
        parent: Option<usize>,
    ) {
        type Indexed<'a> = (usize, &'a TrainRow);
        let go_on_alike = |a: &Indexed, b: &Indexed| path(a.1).get(seen) == path(b.1).get(seen);
        for group in rows.chunk_by(go_on_alike) {
            let (first, last) = (path(group[0].1), path(group[group.len() - 1].1));
            // In sorted rows, what the first and the last share all share.
            let common = shared(first, last);
            let is_end = common == seen || group.len() == 1;
            if (group.len() - 1) * (common - depth) >= LEAST_SAVED {
                let segment = self.add(group, depth..common, parent);
                if !is_end {
                    self.grow(group, (common, common), Some(segment));
                }
            } else if is_end {
                for row in group {
                    if depth < path(row.1).len() {
                        self.add(&[*row], depth..path(row.1).len(), parent);
                    }
                }
            } else {
                self.grow(group, (depth, common), parent);
            }
        }
    }

    /// Adds one segment, a stretch that all these rows share, with the targets that each of them has in it.
    fn add(
        &mut self,
        rows: &[(usize, &TrainRow)],
        stretch: Range<usize>,
        parent: Option<usize>,
    ) -> usize {
        let packed = &mut self.packed;
        let start = packed.tokens.len();
        packed
            .tokens
            .extend_from_slice(&rows[0].1.tokens[stretch.clone()]);
        for at in stretch.clone() {
            for (index, row) in rows.iter().filter(|(_, row)| row.trained[at + 1]) {
                packed.targets.push(Target {
                    pos: (start + at - stretch.start) as u32,
                    token: row.tokens[at + 1],
                    weight: (self.weight)(*index),
                });
                self.owners.push(*index);
            }
        }
        let len = stretch.len();
        packed.segments.push(Segment { parent, len });
        packed.segments.len() - 1
    }
}

/// Cuts a batch into runs of whole rows of at most `micro_tokens` tokens each, those of a shared beginning counted once;
/// a longer row is a run of its own.
pub fn micro_batches(
    rows: &[TrainRow],
    batch: &[usize],
    micro_tokens: usize,
    share_prefixes: bool,
) -> Vec<Vec<usize>> {
    let mut batch = batch.to_vec();
    if share_prefixes {
        batch.sort_by_key(|row| path(&rows[*row]));
    }
    let mut micro: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for row in batch {
        let len = path(&rows[row]).len();
        if let Some(last) = micro.last_mut() {
            let alike = match last.last() {
                Some(before) if share_prefixes => shared(path(&rows[*before]), path(&rows[row])),
                _ => 0,
            };
            if len - alike <= room {
                last.push(row);
                room -= len - alike;
                continue;
            }
        }
        micro.push(vec![row]);
        room = micro_tokens.saturating_sub(len);
    }
    micro
}

/// Which rows belong to one task, as a number for each row: they begin alike for so long that it is worth having them
/// in one batch. A beginning that all rows share makes no group.
pub(crate) fn groups(rows: &[TrainRow]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|row| path(&rows[*row]));
    let mut groups = vec![0; rows.len()];
    let mut split = Split {
        rows,
        groups: &mut groups,
        n_groups: 1,
    };
    split.go_on(&order, 0, (0, 0));
    groups
}

/// Fewest rows of a group.
const GROUP_ROWS: usize = 64;
/// Fewest tokens that a group begins with alike beyond what its rows share with others.
const GROUP_TOKENS: usize = 32;

struct Split<'a> {
    rows: &'a [TrainRow],
    groups: &'a mut [usize],
    n_groups: usize,
}

impl Split<'_> {
    /// Looks for groups among sorted rows that agree up to `seen`; they are of `group`, which all share up to `depth`.
    fn go_on(&mut self, order: &[usize], group: usize, (depth, seen): (usize, usize)) {
        let rows = self.rows;
        let next = |row: usize| path(&rows[row]).get(seen);
        for part in order.chunk_by(|a, b| next(*a) == next(*b)) {
            let mut own = (group, depth);
            let common = shared(path(&rows[part[0]]), path(&rows[part[part.len() - 1]]));
            if part.len() == rows.len() {
                own.1 = common;
            } else if part.len() >= GROUP_ROWS && common - depth >= GROUP_TOKENS {
                own = (self.n_groups, common);
                self.n_groups += 1;
            }
            part.iter().for_each(|row| self.groups[*row] = own.0);
            if part.len() >= GROUP_ROWS && common > seen {
                self.go_on(part, own.0, (own.1, common));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bantam_kernels::Compute;
    use bantam_model::{Model, Weights};
    use bantam_testkit::golden::{self, Golden};
    use proptest::prelude::*;

    use super::*;
    use crate::export::AdapterIdentity;
    use crate::recipe::{LoraSettings, TargetModule};
    use crate::train::{LoraTrainer, Trainable};

    fn row(tokens: &[u32], trained: &[u8]) -> TrainRow {
        TrainRow {
            tokens: tokens.to_vec(),
            trained: trained.iter().map(|t| *t == 1).collect(),
            line: 1,
            ..TrainRow::default()
        }
    }

    /// Every target of a batch as the tokens before it and itself.
    fn lessons(batch: &PackedBatch) -> Vec<(Vec<u32>, u32)> {
        let mut starts = Vec::new();
        let mut end = 0;
        for segment in &batch.segments {
            starts.push(end);
            end += segment.len;
        }
        assert_eq!(end, batch.tokens.len());
        assert!(batch.targets.is_sorted_by_key(|target| target.pos));
        let lesson = |target: &Target| {
            let at = target.pos as usize;
            let mut segment = starts.iter().rposition(|start| *start <= at).unwrap();
            let mut before = batch.tokens[starts[segment]..=at].to_vec();
            while let Some(parent) = batch.segments[segment].parent {
                assert!(parent < segment);
                let tokens = &batch.tokens[starts[parent]..][..batch.segments[parent].len];
                before.splice(0..0, tokens.iter().copied());
                segment = parent;
            }
            (before, target.token)
        };
        let mut lessons: Vec<_> = batch.targets.iter().map(lesson).collect();
        lessons.sort();
        lessons
    }

    #[test]
    fn targets_point_at_the_token_before() {
        let rows = [
            row(&[5, 6, 7, 8], &[0, 0, 1, 1]),
            row(&[1, 2, 3, 4], &[1, 1, 0, 0]),
        ];
        let packed = pack(&rows, &[0, 1], false);
        assert_eq!(packed.tokens, [5, 6, 7, 1]);
        let lens: Vec<_> = packed.segments.iter().map(|s| (s.parent, s.len)).collect();
        assert_eq!(lens, [(None, 3), (None, 1)]);
        let targets: Vec<_> = packed.targets.iter().map(|t| (t.pos, t.token)).collect();
        assert_eq!(targets, [(1, 7), (2, 8), (3, 2)]);
    }

    #[test]
    fn a_shared_beginning_is_laid_down_once_and_a_short_one_is_not_worth_it() {
        let instructions: Vec<u32> = (0..20).collect();
        let tail = |tail: &[u32]| {
            let tokens = [&instructions, tail].concat();
            let trained: Vec<u8> = (0..tokens.len()).map(|i| u8::from(i >= 21)).collect();
            row(&tokens, &trained)
        };
        let rows = [tail(&[30, 31, 32]), tail(&[40, 41]), tail(&[30, 31, 33])];
        let packed = pack(&rows, &[0, 1, 2], true);
        let shape: Vec<_> = packed.segments.iter().map(|s| (s.parent, s.len)).collect();
        assert_eq!(
            shape,
            [(None, 20), (Some(0), 2), (Some(0), 2), (Some(0), 1)]
        );
        assert_eq!(packed.targets.len(), 5);
    }

    #[test]
    fn tasks_with_long_instructions_are_groups_and_their_questions_are_not() {
        let mut rows = Vec::new();
        for i in 0..300u32 {
            let task = i % 3;
            // A shared opening, a task's instructions, a few ways to begin a question, the question.
            let mut tokens: Vec<u32> = (0..10).collect();
            tokens.extend((0..40).map(|j| 100 * (task + 1) + j));
            tokens.extend([1000 + i % 2, 7, 8, 2000 + i]);
            let trained = vec![1; tokens.len()];
            rows.push(row(&tokens, &trained));
        }
        let found = groups(&rows);
        assert!((0..300).all(|i| found[i] == found[i % 3]));
        assert_eq!([found[0], found[1], found[2]], [1, 2, 3]);
        let one_task: Vec<TrainRow> = rows.iter().step_by(3).cloned().collect();
        assert_eq!(groups(&one_task), vec![0; 100]);
        let lens = vec![54; 300];
        let batches = super::super::epoch_batches(&lens, &found, 10, 0, 0);
        let mixed = |batch: &&Vec<usize>| batch.iter().any(|row| found[*row] != found[batch[0]]);
        assert!(batches.iter().filter(mixed).count() <= 2);
    }

    #[test]
    fn gradients_with_shared_beginnings_are_those_of_the_rows() {
        for name in golden::ALL {
            let golden = Golden::load(name);
            let files = bantam_formats::open_model(golden.model_dir()).unwrap();
            let model = Model::<f32>::load(&files, Weights::F32, true).unwrap();
            let settings = LoraSettings {
                rank: 4,
                alpha: 8.0,
                targets: TargetModule::ALL.to_vec(),
                init: None,
                init_sha256: None,
            };
            let mut trainer = LoraTrainer::new(
                &model,
                &settings,
                Compute::new(2),
                AdapterIdentity::default(),
                bantam_model::Recompute::None,
            );
            // Not the usual beginning, whose `B` is zero and hides half of the gradient.
            let params: Vec<f32> = (0..trainer.n_params())
                .map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 2e-4)
                .collect();
            trainer.set_params(&params);
            let instructions: Vec<u32> = (0..24).map(|i| 5 + i * 3 % 40).collect();
            let rows: Vec<TrainRow> = (0..9u32)
                .map(|i| {
                    let mut tokens = instructions.clone();
                    tokens.extend((0..4).map(|j| 10 + (i / 3) * 7 + j));
                    tokens.extend((0..3 + i % 4).map(|j| 3 + i * 5 % 40 + j));
                    let trained = (0..tokens.len()).map(|at| at > 20).collect();
                    TrainRow {
                        tokens,
                        trained,
                        line: 1,
                        ..TrainRow::default()
                    }
                })
                .collect();
            let all: Vec<usize> = (0..rows.len()).collect();
            let mut run = |share| {
                let packed = pack(&rows, &all, share);
                let mut grads = vec![0f32; params.len()];
                let report = trainer.loss_and_grads(&packed, 0.1, &mut grads).unwrap();
                assert_eq!(trainer.loss(&packed).unwrap().loss_sum, report.loss_sum);
                (packed.tokens.len(), report, grads)
            };
            let ((long, plain, expected), (short, tree, grads)) = (run(false), run(true));
            assert!(short * 2 < long, "{short} {long}");
            assert_eq!(plain.n_targets, tree.n_targets);
            assert!((plain.loss_sum - tree.loss_sum).abs() < 1e-6 * plain.loss_sum);
            let distance: f64 = grads
                .iter()
                .zip(&expected)
                .map(|(a, b)| f64::from(a - b).powi(2))
                .sum();
            let size: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
            assert!(
                size > 0.0 && distance < 1e-10 * size,
                "{name}: {distance} of {size}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_tree_teaches_what_its_rows_teach(
            rows in prop::collection::vec((prop::collection::vec(0u32..3, 2..40), prop::collection::vec(0u8..2, 40)), 1..12),
            base in 0usize..30,
        ) {
            let rows: Vec<TrainRow> = rows
                .iter()
                .map(|(tail, trained)| {
                    let mut tokens = vec![1; base];
                    tokens.extend(tail);
                    let mut trained: Vec<u8> = trained.iter().copied().cycle().take(tokens.len()).collect();
                    *trained.last_mut().unwrap() = 1;
                    row(&tokens, &trained)
                })
                .collect();
            let all: Vec<usize> = (0..rows.len()).collect();
            let (plain, tree) = (pack(&rows, &all, false), pack(&rows, &all, true));
            prop_assert!(tree.tokens.len() <= plain.tokens.len());
            prop_assert!(tree.segments.iter().all(|segment| segment.len > 0));
            prop_assert_eq!(lessons(&plain), lessons(&tree));
        }

        #[test]
        fn micro_batches_keep_rows_and_the_cap(lens in prop::collection::vec(2usize..50, 1..60), cap in 1usize..120, share: bool) {
            let rows: Vec<TrainRow> = lens.iter().map(|n| row(&vec![1; *n], &vec![1; *n])).collect();
            let batch: Vec<usize> = (0..rows.len()).rev().collect();
            let micro = micro_batches(&rows, &batch, cap, share);
            let mut found = micro.concat();
            if !share {
                prop_assert_eq!(&found, &batch);
            }
            found.sort_unstable();
            found.reverse();
            prop_assert_eq!(&found, &batch);
            for rows_of in &micro {
                let tokens = pack(&rows, rows_of, share).tokens.len();
                prop_assert!(tokens <= cap + 4 * LEAST_SAVED || rows_of.len() == 1);
            }
        }
    }
}
