//! What must hold to the bit, whatever the threads, the batch and the cut.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Isa};
use bantam_model::{
    InferWorkspace, KvCache, Lora, LoraConfig, Model, PackedBatch, Proj, Segment, Span, Target,
    TrainWorkspace, Wants, Weights,
};
use bantam_testkit::golden::Golden;

/// `Q8` stands for all block formats: they differ in the kernel, which has laws of its own.
const SERVED: [Weights; 3] = [Weights::Q8, Weights::Bf16, Weights::F32];

fn model(precision: Weights) -> Model<f32> {
    Model::load(
        &open_model(Golden::load("tied").model_dir()).unwrap(),
        precision,
        precision != Weights::Q8,
    )
    .unwrap()
}

fn adapter(model: &Model<f32>, seed: u32) -> Lora<f32> {
    let mut lora = Lora::new(
        LoraConfig {
            rank: 8,
            alpha: 16.0,
            targets: Proj::ALL.to_vec(),
        },
        model.config(),
    );
    let mut state = seed;
    for x in &mut lora.params {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *x = ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.2;
    }
    lora.refresh();
    lora
}

fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(7919).wrapping_add(seed * 131) >> 3) % 160)
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// All logits of one sequence, `cut` tokens a pass.
fn logits(
    model: &Model<f32>,
    lora: Option<&Lora<f32>>,
    tokens: &[u32],
    cut: usize,
    compute: &Compute,
) -> Vec<f32> {
    let mut cache = KvCache::new(model.config());
    let (mut all, mut work) = (Vec::new(), InferWorkspace::default());
    for part in tokens.chunks(cut) {
        let mut out = Vec::new();
        let span = Span {
            cache: &mut cache,
            tokens: part,
            logits: Wants::All,
            lora,
        };
        model.forward(&mut [span], &mut out, &mut work, compute);
        all.extend(out);
    }
    all
}

#[test]
fn a_prompt_gives_the_same_bits_however_it_is_cut_and_on_any_threads() {
    for precision in SERVED {
        let model = model(precision);
        // Long enough that whole prompts are cut by rows and not by columns.
        let (lora, tokens) = (adapter(&model, 1), tokens(130, 3));
        for isa in Isa::available() {
            let want = bits(&logits(
                &model,
                Some(&lora),
                &tokens,
                130,
                &Compute::with_isa(1, isa),
            ));
            for (cut, threads) in [
                (1, 1),
                (1, 2),
                (3, 4),
                (33, 1),
                (101, 2),
                (129, 3),
                (130, 2),
            ] {
                let got = logits(
                    &model,
                    Some(&lora),
                    &tokens,
                    cut,
                    &Compute::with_isa(threads, isa),
                );
                assert!(
                    bits(&got) == want,
                    "{precision:?} {} cut {cut} on {threads} threads",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn a_sequence_gives_the_same_bits_in_any_batch() {
    for precision in SERVED {
        let model = model(precision);
        let (red, blue) = (adapter(&model, 1), adapter(&model, 2));
        let compute = Compute::new(2);
        let sequences: Vec<Vec<u32>> = (0..11).map(|i| tokens(5 + 9 * i as usize, i)).collect();
        let lora_of = |i: usize| [None, Some(&red), Some(&red), Some(&blue)][i % 4];
        let some: Vec<u32> = vec![3, 4, 90, 17, 159];
        let wants_of = |i: usize| {
            [
                Wants::Last,
                Wants::LastOf(&some),
                Wants::Tail(4),
                Wants::None,
                Wants::LastOf(&some[1..3]),
                Wants::All,
                Wants::Tail(1000),
            ][i % 7]
        };
        let mut caches = vec![KvCache::new(model.config()); sequences.len()];
        let mut spans: Vec<_> = caches
            .iter_mut()
            .zip(&sequences)
            .enumerate()
            .map(|(i, (cache, tokens))| Span {
                cache,
                tokens,
                logits: wants_of(i),
                lora: lora_of(i),
            })
            .collect();
        let mut together = Vec::new();
        model.forward(
            &mut spans,
            &mut together,
            &mut InferWorkspace::default(),
            &compute,
        );
        let (vocab, mut left) = (model.config().vocab, &together[..]);
        for (i, sequence) in sequences.iter().enumerate() {
            let alone = logits(&model, lora_of(i), sequence, 1000, &compute);
            let tail = |n: usize| alone[alone.len() - n.min(sequence.len()) * vocab..].to_vec();
            let want = match wants_of(i) {
                Wants::None => Vec::new(),
                Wants::Last => tail(1),
                Wants::LastOf(list) => list.iter().map(|&i| tail(1)[i as usize]).collect(),
                Wants::Tail(n) => tail(n),
                Wants::All => alone.clone(),
            };
            let (got, rest) = left.split_at(want.len());
            assert_eq!(bits(&want), bits(got), "{precision:?} sequence {i}");
            left = rest;
        }
        assert!(left.is_empty());
    }
}

#[test]
fn a_forked_cache_goes_on_like_a_new_one_and_leaves_the_first_alone() {
    let model = model(Weights::Q8);
    let (compute, mut work, mut out) = (Compute::new(2), InferWorkspace::default(), Vec::new());
    let mut run = |cache: &mut KvCache, tokens: &[u32]| {
        model.forward(
            &mut [Span {
                cache,
                tokens,
                logits: Wants::All,
                lora: None,
            }],
            &mut out,
            &mut work,
            &compute,
        );
        bits(&out)
    };
    for shared in [1, 31, 32, 33, 64, 70] {
        let (prefix, left, right) = (tokens(70, 5), tokens(40, 6), tokens(40, 7));
        let mut first = KvCache::new(model.config());
        run(&mut first, &prefix);
        let mut second = first.fork(shared);
        let right_forked = run(&mut second, &right);
        let left_after = run(&mut first, &left);
        let mut fresh = KvCache::new(model.config());
        run(&mut fresh, &prefix[..shared]);
        assert_eq!(run(&mut fresh, &right), right_forked, "fork at {shared}");
        let mut fresh = KvCache::new(model.config());
        run(&mut fresh, &prefix);
        assert_eq!(
            run(&mut fresh, &left),
            left_after,
            "original after a fork at {shared}"
        );
        second.truncate(shared);
        assert_eq!(
            run(&mut second, &right),
            right_forked,
            "again after truncation to {shared}"
        );
    }
}

fn packed(sequences: &[Vec<u32>]) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for sequence in sequences {
        let start = batch.tokens.len();
        for i in sequence.len() / 2..sequence.len() - 1 {
            batch.targets.push(Target {
                pos: (start + i) as u32,
                token: sequence[i + 1],
                weight: 1.0,
            });
        }
        batch.tokens.extend(sequence);
        batch.segments.push(Segment {
            parent: None,
            len: sequence.len(),
        });
    }
    batch
}

#[test]
fn gradients_have_the_same_bits_on_any_threads() {
    for precision in [Weights::Bf16, Weights::F32] {
        let model = model(precision);
        let lora = adapter(&model, 1);
        let batch = packed(
            &(0..9)
                .map(|i| tokens(7 + 11 * i as usize, i))
                .collect::<Vec<_>>(),
        );
        let grads = |threads| {
            let mut grads = vec![0.0; lora.params.len()];
            let mut work = TrainWorkspace::default();
            let compute = Compute::new(threads);
            let report = model.loss_and_grads(&lora, &batch, 0.01, &mut grads, &mut work, &compute);
            (report.loss_sum.to_bits(), bits(&grads))
        };
        let want = grads(1);
        assert!(
            [2, 3, 4].into_iter().all(|threads| grads(threads) == want),
            "{precision:?}"
        );
    }
}

#[test]
fn a_batch_is_the_sum_of_its_rows() {
    let model = model(Weights::F32);
    let lora = adapter(&model, 1);
    let (compute, mut work) = (Compute::new(2), TrainWorkspace::default());
    let sequences: Vec<Vec<u32>> = (0..6).map(|i| tokens(7 + 11 * i as usize, i)).collect();
    let mut together = vec![0.0; lora.params.len()];
    let whole = model.loss_and_grads(
        &lora,
        &packed(&sequences),
        0.01,
        &mut together,
        &mut work,
        &compute,
    );
    let mut one_by_one = vec![0.0; lora.params.len()];
    let mut sum = bantam_model::LossReport::default();
    for sequence in sequences {
        sum.merge(&model.loss_and_grads(
            &lora,
            &packed(&[sequence]),
            0.01,
            &mut one_by_one,
            &mut work,
            &compute,
        ));
    }
    assert!(
        (sum.loss_sum - whole.loss_sum).abs() < 1e-9 * whole.loss_sum
            && sum.n_correct == whole.n_correct
    );
    bantam_testkit::close::assert_close("gradients", &one_by_one, &together, 1e-11);
}

/// Per trained token, the loss of the training pass and of the logits of the serving pass.
fn trained_and_served(weights: Weights) -> (f64, f64) {
    let model = model(weights);
    let lora = adapter(&model, 1);
    let (compute, sequence, vocab) = (Compute::new(2), tokens(77, 9), model.config().vocab);
    let batch = packed(std::slice::from_ref(&sequence));
    let trained = model.loss(
        Some(&lora),
        &batch,
        &mut TrainWorkspace::default(),
        &compute,
    );
    let mut served = logits(&model, Some(&lora), &sequence, 10, &compute);
    let mut loss_sum = 0.0;
    for target in &batch.targets {
        let row = &mut served[target.pos as usize * vocab..][..vocab];
        loss_sum +=
            bantam_kernels::ops::cross_entropy(compute.isa(), row, target.token as usize, 0.0).0;
    }
    let n = batch.targets.len() as f64;
    (trained.loss_sum / n, loss_sum / n)
}

#[test]
fn what_is_trained_is_what_is_served() {
    // In full precision to the bit; else serving also rounds what attention reads to bf16.
    let (trained, served) = trained_and_served(Weights::F32);
    assert_eq!(trained.to_bits(), served.to_bits());
    for weights in [Weights::Bf16, Weights::Q8] {
        let (trained, served) = trained_and_served(weights);
        assert!(
            (trained / served - 1.0).abs() < 2e-3,
            "{weights:?}: {trained} and {served}"
        );
    }
}
