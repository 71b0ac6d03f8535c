//! The same laws of runs that learn preferences, and their gradients on a real model.

use bantam_kernels::Compute;
use bantam_model::{Lora, Model, Recompute, TrainWorkspace, Weights};
use bantam_testkit::golden::{self, Golden};

use super::*;
use crate::export::AdapterIdentity;
use crate::recipe::{
    Lines, LoraSettings, Method, PreferenceRecipe, PreferenceSettings, TargetModule,
};
use crate::train::preference::{Scored, judge};
use crate::train::rng::{Purpose, Stream};
use crate::train::tree::pack_weighted;

const METHODS: [Method; 4] = [Method::Dpo, Method::Orpo, Method::Kto, Method::Simpo];

/// Prompts with an answer that counts up, and one that counts down.
fn pairs(n: usize, vocab: u32, seed: u64) -> Vec<TrainRow> {
    let mut stream = Stream::new(seed, Purpose::Epoch(77));
    let mut rows = Vec::new();
    for line in 1..=n {
        let first = stream.below(u64::from(vocab)) as u32;
        let prompt = [first, (first + 3) % vocab, (first + 5) % vocab];
        for (verdict, step) in [(Verdict::Chosen, 1), (Verdict::Rejected, vocab - 1)] {
            let mut tokens = prompt.to_vec();
            for _ in 0..2 + stream.below(5) {
                tokens.push((tokens[tokens.len() - 1] + step) % vocab);
            }
            rows.push(TrainRow {
                trained: (0..tokens.len()).map(|at| at >= prompt.len()).collect(),
                tokens,
                line,
                verdict,
            });
        }
    }
    rows
}

fn preferring(method: Method, out: &Path) -> PlanInput {
    let mut recipe = Recipe {
        method: Some(method),
        ..recipe()
    };
    if method != Method::Orpo {
        recipe.preference.beta = Some(0.5);
    }
    PlanInput {
        train: pairs(23, VOCAB, 1),
        valid: pairs(6, VOCAB, 2),
        ..input(recipe, out)
    }
}

fn steps(events: &[RunEvent]) -> Vec<(f64, PreferenceStats)> {
    let step = |event: &RunEvent| match event {
        RunEvent::Step {
            loss, preference, ..
        } => Some((*loss, preference.unwrap())),
        _ => None,
    };
    events.iter().filter_map(step).collect()
}

#[test]
fn every_method_learns_to_tell_answers_apart() {
    for method in METHODS {
        let dir = tempfile::tempdir().unwrap();
        let plan = TrainPlan::new(preferring(method, dir.path())).unwrap();
        let (outcome, events) = go(&plan, None);
        let Outcome::Finished(result) = outcome.unwrap() else {
            panic!("not interrupted")
        };
        let steps = steps(&events);
        let (first, last) = (steps[0], steps[steps.len() - 1]);
        assert!(last.0 < first.0, "{method:?}: {first:?} {last:?}");
        let valid = result.valid_preference.unwrap();
        assert!(valid.accuracy > 0.8, "{method:?}: {valid:?}");
        assert!(valid.rewards_margin > Some(0.1), "{method:?}: {valid:?}");
        let [low, high] = valid.accuracy_ci95.unwrap();
        assert!(low < valid.accuracy && valid.accuracy <= high);
        // Each pair is one example, or two judged answers.
        let n = if method == Method::Kto { 12 } else { 6 };
        assert_eq!(valid.examples, n);
    }
}

#[test]
fn a_run_begins_at_its_own_reference() {
    for (method, loss) in [(Method::Dpo, std::f64::consts::LN_2), (Method::Kto, 0.5)] {
        let dir = tempfile::tempdir().unwrap();
        let plan = TrainPlan::new(preferring(method, dir.path())).unwrap();
        let (first, stats) = steps(&go(&plan, None).1)[0];
        assert!((first - loss).abs() < 1e-12, "{first}");
        assert_eq!(stats.rewards_margin.unwrap_or(0.0), 0.0);
        assert_eq!(stats.accuracy, 0.0);
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    for method in METHODS {
        let whole = tempfile::tempdir().unwrap();
        finish(&TrainPlan::new(preferring(method, whole.path())).unwrap());
        for stops in [vec![0], vec![1, 2], vec![3, 7], vec![5, 6, 11]] {
            let dir = tempfile::tempdir().unwrap();
            let plan = TrainPlan::new(preferring(method, dir.path())).unwrap();
            for stop in stops {
                let outcome = go(&plan, Some(stop)).0.unwrap();
                assert!(
                    matches!(outcome, Outcome::Interrupted { .. }),
                    "{outcome:?}"
                );
            }
            finish(&plan);
            assert_eq!(adapter(dir.path()), adapter(whole.path()), "{method:?}");
            assert_eq!(story(dir.path()), story(whole.path()), "{method:?}");
        }
    }
}

#[test]
fn a_poisoned_pair_is_left_out_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = preferring(Method::Dpo, dir.path());
    input.train[9].tokens[4] = VOCAB;
    let plan = TrainPlan::new(input).unwrap();
    let mut model = Bigram::new(VOCAB as usize + 1);
    model.poison = Some(VOCAB);
    let (outcome, events) = go_with(&plan, &mut model, None);
    let Outcome::Finished(result) = outcome.unwrap() else {
        panic!("not interrupted")
    };
    assert_eq!(result.dropped, ["train.jsonl:5"]);
    assert!(steps(&events).iter().all(|(loss, _)| loss.is_finite()));
}

#[test]
fn pairs_that_are_too_long_are_left_out_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = preferring(Method::Dpo, dir.path());
    input.train[3].tokens.extend([1; 70]);
    input.train[3].trained.extend([true; 70]);
    input.recipe.skip_long = Some(true);
    let plan = TrainPlan::new(input.clone()).unwrap();
    assert_eq!((plan.n_train(), plan.train.len()), (22, 44));
    assert!(plan.train.iter().all(|row| row.line != 2));
    insta::assert_snapshot!(plan.warnings.join("\n"), @"train.jsonl: 1 of 23 pairs have an answer of more than 64 tokens and are left out");
    input.recipe.skip_long = None;
    let error = TrainPlan::new(input).unwrap_err().to_string();
    assert!(error.starts_with("train.jsonl:2: this row has"), "{error}");
    assert!(error.contains("1 of 23 rows are too long"), "{error}");
}

#[test]
fn answers_to_one_prompt_are_held_out_together() {
    let dir = tempfile::tempdir().unwrap();
    for method in [Method::Dpo, Method::Kto] {
        let mut input = preferring(method, dir.path());
        input.train = pairs(200, 40, 3);
        input.valid.clear();
        input.recipe.data.valid_fraction = Some(0.3);
        let plan = TrainPlan::new(input).unwrap();
        let prompts = |rows: &[TrainRow]| -> BTreeSet<Vec<u32>> {
            rows.iter().map(|row| row.tokens[..3].to_vec()).collect()
        };
        let (train, valid) = (prompts(&plan.train), prompts(&plan.valid));
        assert!(!valid.is_empty() && train.is_disjoint(&valid));
        assert_eq!(plan.settings.data.rows, plan.n_train());
        assert_eq!(plan.settings.data.valid_rows, plan.n_valid());
    }
}

#[test]
fn a_judged_answer_is_followed_by_one_to_another_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = preferring(Method::Kto, dir.path());
    input.train.retain(|row| row.verdict == Verdict::Chosen);
    let plan = TrainPlan::new(input).unwrap();
    insta::assert_snapshot!(plan.warnings.join("\n"), @"train.jsonl: all answers are desirable; it takes both kinds to learn a difference");
    for (example, next) in plan.train.chunks(2).zip(plan.train.chunks(2).skip(1)) {
        let (row, other) = (&example[0], &example[1]);
        assert_eq!(other.verdict, Verdict::Mismatched);
        assert_eq!(other.tokens[..3], row.tokens[..3]);
        assert_eq!(other.tokens[3..], next[0].tokens[3..]);
        assert_eq!(other.trained.len(), other.tokens.len());
    }
}

/// Settings of each method that leave nothing near 0.
fn all_settings() -> [PreferenceSettings; 4] {
    [
        PreferenceSettings::Dpo { beta: 0.3 },
        PreferenceSettings::Orpo { lambda: 0.7 },
        PreferenceSettings::Kto {
            beta: 0.3,
            desirable_weight: 1.3,
            undesirable_weight: 0.7,
        },
        PreferenceSettings::Simpo {
            beta: 2.0,
            gamma: 0.4,
        },
    ]
}

#[test]
fn gradients_of_an_adapter_close() {
    let golden = Golden::load(golden::TIED);
    let files = bantam_formats::open_model(golden.model_dir()).unwrap();
    let model = Model::<f64>::load(&files, Weights::F32, true).unwrap();
    let lora = LoraSettings {
        rank: 4,
        alpha: 8.0,
        targets: TargetModule::ALL.to_vec(),
        init: None,
        init_sha256: None,
    };
    let (compute, mut work) = (Compute::new(2), TrainWorkspace::new(Recompute::None));
    for settings in all_settings() {
        let mut rows = pairs(3, 40, 5);
        if matches!(settings, PreferenceSettings::Kto { .. }) {
            // The first of two is judged, the second only moves the reference point, which is held fixed below.
            rows.iter_mut()
                .step_by(4)
                .for_each(|row| row.verdict = Verdict::Rejected);
        }
        let all: Vec<usize> = (0..rows.len()).collect();
        let mut adapter = Lora::<f64>::new(lora.config(), model.config());
        for (i, param) in adapter.params.iter_mut().enumerate() {
            *param = ((i * 7919 % 1000) as f64 - 500.0) * 2e-4;
        }
        adapter.refresh();
        let mut scores = |adapter: &Lora<f64>| {
            let (packed, owners) = pack_weighted(&rows, &all, true, &|_| 1.0);
            model.loss(Some(adapter), &packed, &mut work, &compute);
            let mut sums = vec![0.0; rows.len()];
            for (owner, loss) in owners.iter().zip(work.target_losses()) {
                sums[*owner] -= loss;
            }
            sums
        };
        let begun = scores(&adapter);
        let scored = |sums: &[f64]| -> Vec<Scored> {
            let one = |(i, row): (usize, &TrainRow)| Scored {
                verdict: row.verdict,
                // KTO's reference point is a constant: the second rows stay where they are.
                policy: match settings {
                    PreferenceSettings::Kto { .. } if i % 2 == 1 => begun[i],
                    _ => sums[i],
                },
                reference: begun[i] + [0.5, -0.7, 1.1][i % 3],
                tokens: row.n_trained(),
            };
            rows.iter().enumerate().map(one).collect()
        };
        let mut loss = |adapter: &Lora<f64>| judge(&settings, &scored(&scores(adapter))).0.loss;
        let (_, factors) = judge(&settings, &scored(&begun));
        // Two of the parameters of each tensor, where differences are taken.
        let tensors = adapter.layout().tensors();
        let places: Vec<usize> = tensors
            .iter()
            .flat_map(|tensor| [tensor.range.start + 1, tensor.range.end - 2])
            .collect();
        let differences: Vec<f64> = places
            .iter()
            .map(|&at| {
                let (was, h) = (adapter.params[at], 1e-5);
                let mut moved = |to: f64| {
                    adapter.params[at] = to;
                    adapter.refresh();
                    loss(&adapter)
                };
                let difference = (moved(was + h) - moved(was - h)) / (2.0 * h);
                moved(was);
                difference
            })
            .collect();
        let weight = |row: usize| -factors[row] as f32;
        let (packed, _) = pack_weighted(&rows, &all, true, &weight);
        let mut grads = vec![0.0; adapter.params.len()];
        let scale = 1.0 / (rows.len() / 2) as f64;
        let mut work = TrainWorkspace::new(Recompute::None);
        model.loss_and_grads(&adapter, &packed, scale, &mut grads, &mut work, &compute);
        for (at, difference) in places.iter().zip(differences) {
            let error = (grads[*at] - difference).abs();
            assert!(
                error < 1e-6 * difference.abs().max(1.0),
                "{settings:?} {at}: {} {difference}",
                grads[*at]
            );
        }
        assert!(grads.iter().any(|grad| grad.abs() > 1e-3), "{settings:?}");
    }
}

#[test]
fn one_thread_is_two_and_a_shared_prompt_is_a_repeated_one() {
    let golden = Golden::load(golden::TIED);
    let files = bantam_formats::open_model(golden.model_dir()).unwrap();
    let model = Model::<f32>::load(&files, Weights::Bf16, true).unwrap();
    for method in METHODS {
        let run = |threads: usize, share: bool, stop: Option<usize>| {
            let dir = tempfile::tempdir().unwrap();
            let mut input = preferring(method, dir.path());
            // Long enough that sharing it is worth it.
            let prompt: Vec<u32> = (0..20).map(|i| 5 + i * 3 % 30).collect();
            for row in input.train.iter_mut().chain(&mut input.valid) {
                row.tokens.splice(0..0, prompt.iter().copied());
                row.trained.splice(0..0, prompt.iter().map(|_| false));
            }
            input.recipe.share_prefixes = Some(share);
            input.recipe.micro_tokens = Some(120);
            input.recipe.optim.lr = Some(1e-3);
            input.recipe.lora.rank = Some(4);
            let plan = TrainPlan::new(input).unwrap();
            let lora = plan.settings.lora.as_ref().unwrap();
            let mut trainer = LoraTrainer::new(
                &model,
                lora,
                Compute::new(threads),
                AdapterIdentity::default(),
                Recompute::None,
            );
            let mut losses = Vec::new();
            for stop in [stop, None] {
                let cancel = AtomicBool::new(false);
                let mut on_event = |event: &RunEvent| {
                    if let RunEvent::Step { step, loss, .. } = event {
                        losses.push(*loss);
                        cancel.store(Some(*step) == stop, Ordering::Relaxed);
                    }
                };
                train(
                    &plan,
                    &mut trainer,
                    &|| Duration::ZERO,
                    &mut on_event,
                    &cancel,
                )
                .unwrap();
            }
            let weights = dir.path().join("adapter/adapter_model.safetensors");
            (losses, fs::read(weights).unwrap())
        };
        let (losses, bytes) = run(1, true, None);
        if method == Method::Dpo {
            // Rounded to bf16 and sharing beginnings, the policy still begins at its reference.
            let first = losses[0];
            assert!((first - std::f64::consts::LN_2).abs() < 1e-12, "{first}");
        }
        assert_eq!(
            run(2, true, None),
            (losses.clone(), bytes.clone()),
            "{method:?}"
        );
        assert_eq!(run(2, true, Some(5)), (losses.clone(), bytes), "{method:?}");
        let (plain, _) = run(2, false, None);
        assert_eq!(plain.len(), losses.len());
        for (a, b) in plain.iter().zip(&losses) {
            assert!((a - b).abs() < 1e-2 * a.max(1.0), "{method:?}: {a} {b}");
        }
    }
}

#[test]
fn weights_made_on_the_way_are_those_made_before() {
    let golden = Golden::load(golden::TIED);
    let files = bantam_formats::open_model(golden.model_dir()).unwrap();
    let model = Model::<f32>::load(&files, Weights::Bf16, true).unwrap();
    let settings = LoraSettings {
        rank: 4,
        alpha: 8.0,
        targets: TargetModule::ALL.to_vec(),
        init: None,
        init_sha256: None,
    };
    let (compute, identity) = (Compute::new(2), AdapterIdentity::default());
    let mut trainer = LoraTrainer::new(&model, &settings, compute, identity, Recompute::None);
    let params: Vec<f32> = (0..trainer.n_params())
        .map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 2e-4)
        .collect();
    trainer.set_params(&params);
    let rows = pairs(40, 40, 9);
    let all: Vec<usize> = (0..rows.len()).collect();
    let (packed, _) = pack_weighted(&rows, &all, true, &|_| 1.0);
    assert!(
        packed.targets.len() > 256,
        "more than two pieces of the head"
    );
    let weigh = |losses: &[f64]| {
        losses
            .iter()
            .map(|loss| (loss - 2.0) as f32)
            .collect::<Vec<_>>()
    };
    let mut one = vec![0f32; params.len()];
    trainer
        .weighed_loss_and_grads(&packed, 0.1, &mut |losses| weigh(losses), &mut one)
        .unwrap();
    let mut losses = Vec::new();
    trainer.target_losses(&packed, &mut losses).unwrap();
    let mut weighed = packed.clone();
    for (target, weight) in weighed.targets.iter_mut().zip(weigh(&losses)) {
        target.weight = weight;
    }
    let mut two = vec![0f32; params.len()];
    trainer.loss_and_grads(&weighed, 0.1, &mut two).unwrap();
    assert_eq!(one, two);
}

#[test]
fn only_methods_of_preferences_have_two_rows_an_example() {
    for method in [Method::Sft, Method::Full] {
        assert_eq!(method.lines(), Lines::Rows);
        let recipe = Recipe {
            method: Some(method),
            preference: PreferenceRecipe::default(),
            ..recipe()
        };
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(plan(recipe, dir.path()).settings.rows_per_example(), 1);
    }
}
