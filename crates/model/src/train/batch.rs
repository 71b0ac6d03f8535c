//! What one pass of training computes: tokens in a forest of segments, and what is trained.

use bantam_kernels::attention::forest::Forest;

/// Token segments laid end to end. A segment's tokens follow those of its parent, so that rows
/// which begin alike compute their beginning once; attention looks along the path to the root.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// Token ids of all segments.
    pub tokens: Vec<u32>,
    /// Lengths sum to `tokens.len()`; a parent comes before its children.
    pub segments: Vec<Segment>,
    /// What is trained, in ascending order of `pos`.
    pub targets: Vec<Target>,
}

/// A run of tokens of a [`PackedBatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the segment that comes before it in its rows; `None` where rows begin.
    pub parent: Option<usize>,
    /// Tokens.
    pub len: usize,
}

/// One trained token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Index in `tokens` whose logits are trained: the place *before* the target. Several
    /// targets may share one: the end of a prefix that goes on in several ways.
    pub pos: u32,
    /// The token that should follow.
    pub token: u32,
    /// Weight of its loss.
    pub weight: f32,
}

impl PackedBatch {
    /// Rows that share nothing, `lens` long, laid end to end.
    pub fn rows(
        tokens: Vec<u32>,
        lens: impl IntoIterator<Item = usize>,
        targets: Vec<Target>,
    ) -> Self {
        let segment = |len| Segment { parent: None, len };
        Self {
            tokens,
            segments: lens.into_iter().map(segment).collect(),
            targets,
        }
    }

    /// The segments in the terms of attention, everything checked once.
    ///
    /// Panics if the batch is inconsistent or a token is outside the vocabulary.
    pub(crate) fn forest(&self, vocab: usize) -> Forest {
        let (n, in_vocab) = (self.tokens.len(), |token: u32| (token as usize) < vocab);
        let forest = Forest::new(self.segments.iter().map(|s| (s.parent, s.len)));
        assert_eq!(forest.n_rows(), n, "lengths sum to the tokens");
        assert!(
            self.tokens.iter().all(|&token| in_vocab(token)),
            "tokens are in the vocabulary"
        );
        let ok = |target: &Target| (target.pos as usize) < n && in_vocab(target.token);
        assert!(
            self.targets.iter().all(ok),
            "targets are in the batch and the vocabulary"
        );
        assert!(
            self.targets.is_sorted_by_key(|target| target.pos),
            "targets are in order"
        );
        forest
    }
}

/// Sums over the targets of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossReport {
    /// Weighted cross entropy, in nats.
    pub loss_sum: f64,
    /// Sum of the weights.
    pub weight_sum: f64,
    /// Targets that had the highest logit.
    pub n_correct: u64,
    /// Targets.
    pub n_targets: u64,
}

impl LossReport {
    /// Adds another batch's sums.
    pub fn merge(&mut self, other: &LossReport) {
        self.loss_sum += other.loss_sum;
        self.weight_sum += other.weight_sum;
        self.n_correct += other.n_correct;
        self.n_targets += other.n_targets;
    }

    /// Mean loss per unit of weight.
    pub fn mean(&self) -> f64 {
        self.loss_sum / self.weight_sum
    }
}
