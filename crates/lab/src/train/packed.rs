//! The shapes a model trains on.

/// Sequences laid end to end, without padding; attention is block-diagonal.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PackedBatch {
    /// Token ids of all sequences.
    pub tokens: Vec<u32>,
    /// Length of each sequence.
    pub seq_lens: Vec<usize>,
    /// What is to be predicted where.
    pub targets: Vec<Target>,
}

/// One trained token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Index into the tokens whose logits are trained.
    pub pos: u32,
    /// The token that should follow.
    pub token: u32,
    /// Its weight in the loss.
    pub weight: f32,
}

/// Loss over a batch's targets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossReport {
    /// Sum of weight times cross-entropy.
    pub loss_sum: f64,
    /// Sum of weights.
    pub weight_sum: f64,
    /// Targets whose logit is the largest.
    pub n_correct: u64,
    /// Number of targets.
    pub n_targets: u64,
}
