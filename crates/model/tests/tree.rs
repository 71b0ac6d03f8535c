//! A prefix tree gives the gradients that its rows give one by one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Real};
use bantam_model::{
    Lora, LoraConfig, LossReport, Model, PackedBatch, Proj, Segment, Target, TrainWorkspace,
    Weights,
};
use bantam_testkit::close::assert_close;
use bantam_testkit::golden::Golden;
use proptest::prelude::*;

fn model<R: Real>(variant: &str, precision: Weights) -> Model<R> {
    let files = open_model(Golden::load(variant).model_dir()).unwrap();
    Model::load(&files, precision, true).unwrap()
}

fn adapter<R: Real>(model: &Model<R>) -> Lora<R> {
    let config = LoraConfig {
        rank: 4,
        alpha: 8.0,
        targets: Proj::ALL.to_vec(),
    };
    let mut lora = Lora::new(config, model.config());
    let mut random = Random(7);
    lora.params
        .iter_mut()
        .for_each(|x| *x = R::from_f64(random.unit() * 0.4 - 0.2));
    lora.refresh();
    lora
}

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f64 / (1u64 << 31) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.unit() * n as f64) as usize
    }
}

/// Segments of any lengths below any parents; several targets at one place.
fn tree(seed: u64, n_segments: usize) -> PackedBatch {
    let mut random = Random(seed);
    let mut batch = PackedBatch::default();
    for i in 0..n_segments {
        let parent = (i > 0 && random.below(5) > 0).then(|| random.below(i));
        let len = if random.below(8) == 0 {
            0
        } else {
            1 + random.below(40)
        };
        let start = batch.tokens.len();
        batch
            .tokens
            .extend((0..len).map(|_| random.below(150) as u32));
        batch.segments.push(Segment { parent, len });
        for pos in start..start + len {
            for _ in 0..[0, 0, 1, 3][random.below(4)] {
                batch.targets.push(Target {
                    pos: pos as u32,
                    token: random.below(150) as u32,
                    weight: 0.5 + random.unit() as f32,
                });
            }
        }
    }
    batch
}

/// Each target of a tree as a plain row that ends there.
fn rows(tree: &PackedBatch) -> Vec<PackedBatch> {
    let starts: Vec<usize> = tree
        .segments
        .iter()
        .scan(0, |end, segment| {
            *end += segment.len;
            Some(*end - segment.len)
        })
        .collect();
    let row = |target: &Target| {
        let holds = |s: &usize| {
            (starts[*s]..starts[*s] + tree.segments[*s].len).contains(&(target.pos as usize))
        };
        let mut segment = (0..starts.len()).find(holds).unwrap();
        let mut tokens = tree.tokens[starts[segment]..=target.pos as usize].to_vec();
        while let Some(parent) = tree.segments[segment].parent {
            let before = &tree.tokens[starts[parent]..][..tree.segments[parent].len];
            tokens.splice(0..0, before.iter().copied());
            segment = parent;
        }
        let (n, pos) = (tokens.len(), tokens.len() as u32 - 1);
        PackedBatch::rows(tokens, [n], vec![Target { pos, ..*target }])
    };
    tree.targets.iter().map(row).collect()
}

fn grads<R: Real>(
    model: &Model<R>,
    lora: &Lora<R>,
    batches: &[PackedBatch],
    threads: usize,
) -> (LossReport, Vec<R>) {
    let (mut work, compute) = (TrainWorkspace::default(), Compute::new(threads));
    let (mut sum, mut grads) = (LossReport::default(), vec![R::ZERO; lora.params.len()]);
    for batch in batches {
        sum.merge(&model.loss_and_grads(lora, batch, 0.01, &mut grads, &mut work, &compute));
    }
    (sum, grads)
}

fn tree_equals_rows<R: Real>(seed: u64, n_segments: usize, nmse: f64) {
    for variant in ["tied", "biased"] {
        let (model, tree) = (model::<R>(variant, Weights::F32), tree(seed, n_segments));
        let lora = adapter(&model);
        let (whole, at_once) = grads(&model, &lora, std::slice::from_ref(&tree), 2);
        let (sum, one_by_one) = grads(&model, &lora, &rows(&tree), 2);
        assert_eq!(whole.n_targets as usize, tree.targets.len());
        assert_eq!(whole.n_correct, sum.n_correct);
        assert!((whole.loss_sum - sum.loss_sum).abs() <= 1e-6 * sum.loss_sum);
        let wide = |x: &[R]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        if !tree.targets.is_empty() {
            assert_close(variant, &wide(&at_once), &wide(&one_by_one), nmse);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn in_f32_to_a_relative_1e_5(seed: u64, n_segments in 1usize..9) {
        tree_equals_rows::<f32>(seed, n_segments, 1e-10);
    }

    #[test]
    fn in_f64_to_a_relative_1e_10(seed: u64, n_segments in 1usize..6) {
        tree_equals_rows::<f64>(seed, n_segments, 1e-20);
    }
}

#[test]
fn a_tree_has_the_same_bits_on_any_threads() {
    for precision in [Weights::F32, Weights::Bf16] {
        let (model, tree) = (model::<f32>("tied", precision), tree(11, 9));
        let lora = adapter(&model);
        let bits = |threads| {
            let (report, grads) = grads(&model, &lora, std::slice::from_ref(&tree), threads);
            (
                report.loss_sum.to_bits(),
                grads.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            )
        };
        let want = bits(1);
        assert!(
            [2, 3, 5].into_iter().all(|threads| bits(threads) == want),
            "{precision:?}"
        );
    }
}

#[test]
fn gradients_of_a_tree_are_the_slopes_of_its_loss() {
    let (model, tree) = (model::<f64>("biased", Weights::F32), tree(3, 6));
    let mut lora = adapter(&model);
    let (_, grads) = grads(&model, &lora, std::slice::from_ref(&tree), 2);
    let (mut work, compute) = (TrainWorkspace::default(), Compute::new(2));
    for tensor in lora.layout().tensors().to_vec() {
        for i in tensor.range.clone().step_by(tensor.range.len() / 2) {
            let (h, at) = (1e-5, lora.params[i]);
            let mut loss = |x: f64| {
                lora.params[i] = x;
                lora.refresh();
                model.loss(Some(&lora), &tree, &mut work, &compute).loss_sum
            };
            let slope = 0.01 * (loss(at + h) - loss(at - h)) / (2.0 * h);
            loss(at);
            let error = (slope - grads[i]).abs();
            assert!(
                error < 1e-6 * slope.abs().max(1.0),
                "{tensor:?} at {i}: {slope} and {}",
                grads[i]
            );
        }
    }
}
