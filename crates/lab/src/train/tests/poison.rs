//! Poisoned rows, ruinous updates, transient faults: the run goes on, says what it left out, and ends with the bytes
//! of a run that left it out from the start.

use super::*;

/// A token that only the poisoned row has.
const ODD: u32 = VOCAB;

fn odd_model() -> Bigram {
    Bigram::new(VOCAB as usize + 1)
}

fn end(plan: &TrainPlan, model: &mut Bigram) -> (TrainResult, Vec<RunEvent>) {
    let (outcome, events) = go_with(plan, model, None);
    match outcome.unwrap() {
        Outcome::Finished(result) => (result, events),
        other => panic!("{other:?}"),
    }
}

/// The usual run with the odd token in row 7, which stands on line 8.
fn poisoned(out: &Path) -> TrainPlan {
    let mut input = input(recipe(), out);
    input.train[7].tokens[2] = ODD;
    TrainPlan::new(input).unwrap()
}

/// The same, told not to train on that line.
fn without(out: &Path) -> TrainPlan {
    let mut input = input(recipe(), out);
    input.train[7].tokens[2] = ODD;
    input.recipe.data.skip_lines = Some(vec![8]);
    TrainPlan::new(input).unwrap()
}

fn dropped(events: &[RunEvent]) -> Vec<String> {
    let rows = events.iter().filter_map(|event| match event {
        RunEvent::RowsDropped { rows, .. } => Some(rows),
        _ => None,
    });
    rows.flatten()
        .map(|row| format!("{} {}", row.place, row.reason))
        .collect()
}

#[test]
fn a_row_whose_loss_is_no_number_is_named_and_left_out_to_the_bit() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut model = odd_model();
    model.poison = Some(ODD);
    let (result, events) = end(&poisoned(dir.path()), &mut model);
    assert_eq!(dropped(&events), ["train.jsonl:8 its loss is not a number"]);
    assert_eq!(result.dropped, ["train.jsonl:8"]);
    let (expected, _) = end(&without(other.path()), &mut odd_model());
    assert_eq!(result.sha256, expected.sha256);
    assert_eq!(result.rows, expected.rows);
    assert_eq!(story(dir.path()), story(other.path()));
    // It would have made a difference.
    let whole = tempfile::tempdir().unwrap();
    let (trained, _) = end(&poisoned(whole.path()), &mut odd_model());
    assert_ne!(trained.sha256, expected.sha256);
    // A run that is stopped anywhere remembers which row it was.
    for stop in 1..STEPS {
        let dir = tempfile::tempdir().unwrap();
        let plan = poisoned(dir.path());
        go_with(&plan, &mut model, Some(stop)).0.unwrap();
        let (result, _) = end(&plan, &mut model);
        assert_eq!(result.sha256, expected.sha256, "stopped after {stop}");
        assert_eq!(result.dropped, ["train.jsonl:8"]);
    }
}

#[test]
fn a_row_whose_gradient_is_no_number_is_named_and_left_out_to_the_bit() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut model = odd_model();
    model.grad_poison = Some(ODD);
    let (result, events) = end(&poisoned(dir.path()), &mut model);
    assert_eq!(
        dropped(&events),
        ["train.jsonl:8 its gradient is not a number"]
    );
    let (expected, _) = end(&without(other.path()), &mut odd_model());
    assert_eq!(result.sha256, expected.sha256);
}

/// Seventy updates with the rows but one, then four with the one, and more.
fn late(out: &Path, skip: Option<Vec<usize>>) -> TrainPlan {
    let mut input = input(recipe(), out);
    input.recipe.optim.lr = Some(0.3);
    input.recipe.optim.spike_z = Some(5.0);
    input.recipe.valid.patience = Some(0);
    input.recipe.data.skip_lines = skip;
    // Steps of the wrong size throughout: nothing that was learnt helps.
    let row = &mut input.train[7];
    row.tokens = (0..40).map(|i| (i * 7) % VOCAB).collect();
    row.trained = (0..40).map(|i| i >= 2).collect();
    let mut batches: Vec<Vec<usize>> = (0..70usize)
        .map(|i| {
            let other = |j| (4 * i + j) % 22;
            (0..4)
                .map(|j| other(j) + usize::from(other(j) >= 7))
                .collect()
        })
        .collect();
    batches.extend([
        vec![1, 2, 7, 3],
        vec![4, 5, 6, 7],
        vec![7],
        vec![0, 9, 10, 7],
    ]);
    batches.extend(batches[..8].to_vec());
    input.order = BatchOrder::Given(batches);
    TrainPlan::new(input).unwrap()
}

#[test]
fn a_row_of_huge_loss_is_named_and_left_out_to_the_bit() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (result, events) = end(&late(dir.path(), None), &mut odd_model());
    let named = dropped(&events);
    assert_eq!(named.len(), 1, "{named:?}");
    assert!(
        named[0].starts_with("train.jsonl:8 its loss is "),
        "{named:?}"
    );
    let (expected, events) = end(&late(other.path(), Some(vec![8])), &mut odd_model());
    assert_eq!(dropped(&events), [""; 0]);
    assert_eq!(result.sha256, expected.sha256);
    assert_eq!(story(dir.path()), story(other.path()));
    // The batch with no other row made no update.
    let is_skip = |event: &&RunEvent| matches!(event, RunEvent::StepSkipped { step: 73, .. });
    assert_eq!(events.iter().filter(is_skip).count(), 1);
    // Without the watch it is trained on.
    let dir = tempfile::tempdir().unwrap();
    let mut plan = late(dir.path(), None);
    plan.settings.optim.spike_z = 0.0;
    let (result, events) = end(&plan, &mut odd_model());
    assert_eq!(dropped(&events), [""; 0]);
    assert_ne!(result.sha256, expected.sha256);
}

/// The usual run, where an update of step 6 puts the model over a cliff.
fn cliff(out: &Path, every_steps: usize) -> (TrainPlan, Bigram) {
    let mut input = input(recipe(), out);
    input.train[7].tokens[2] = ODD;
    input.recipe.checkpoint.every_steps = Some(every_steps);
    let mut batches: Vec<Vec<usize>> = (0..12)
        .map(|i| (0..4).map(|j| 8 + (4 * i + j) % 15).collect())
        .collect();
    batches[5] = vec![1, 7, 2];
    input.order = BatchOrder::Given(batches);
    let plan = TrainPlan::new(input).unwrap();
    let mut model = odd_model();
    let at = (ODD * (VOCAB + 1)) as usize;
    let first = model.initial_params(plan.settings.seed)[at];
    model.cliff = Some((at, first, 0.005));
    (plan, model)
}

#[test]
fn an_update_that_ruins_the_model_is_taken_back_whatever_was_saved() {
    let mut ends = Vec::new();
    for every_steps in [0, 1, 2, 4] {
        let dir = tempfile::tempdir().unwrap();
        let (plan, mut model) = cliff(dir.path(), every_steps);
        let (result, events) = end(&plan, &mut model);
        let back: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                RunEvent::RolledBack { step, to, rows, .. } => Some((*step, *to, rows.clone())),
                _ => None,
            })
            .collect();
        let to = [0, 5, 4, 4][[0, 1, 2, 4].iter().position(|e| *e == every_steps).unwrap()];
        let rows = ["train.jsonl:2", "train.jsonl:8", "train.jsonl:3"].map(String::from);
        assert_eq!(back, [(6, to, rows.to_vec())]);
        assert_eq!(result.rows, 4 * 11);
        let told = read_events(&dir.path().join("events.jsonl")).unwrap();
        let starts = told
            .iter()
            .filter(|e| matches!(e, RunEvent::RunStarted { .. }));
        assert_eq!(starts.count(), 1);
        ends.push((result.sha256, story(dir.path())));
    }
    assert!(ends.iter().all(|end| *end == ends[0]));
    // Stopping in between changes nothing either.
    for stop in [3, 5, 6, 7] {
        let dir = tempfile::tempdir().unwrap();
        let (plan, mut model) = cliff(dir.path(), 2);
        go_with(&plan, &mut model, Some(stop)).0.unwrap();
        let (result, _) = end(&plan, &mut model);
        assert_eq!(result.sha256, ends[0].0, "stopped after {stop}");
    }
}

#[test]
fn a_fault_that_does_not_come_back_changes_nothing() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut model = odd_model();
    model.fails_in = Some(7);
    let (result, events) = end(&poisoned(dir.path()), &mut model);
    assert_eq!(model.fails_in, None);
    assert_eq!(dropped(&events), [""; 0]);
    let (expected, _) = end(&poisoned(other.path()), &mut odd_model());
    assert_eq!(result.sha256, expected.sha256);
}

#[test]
fn too_many_poisoned_rows_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(recipe(), dir.path());
    input.train.iter_mut().for_each(|row| row.tokens[1] = ODD);
    let mut model = odd_model();
    model.poison = Some(ODD);
    let (outcome, _) = go_with(&TrainPlan::new(input).unwrap(), &mut model, None);
    let error = outcome.unwrap_err();
    insta::assert_snapshot!(error, @"12 of 23 rows were left out by step 3 because the model makes no sense of them; lower `optim.lr`, look at the rows named above, or set `optim.spike_z = 0` to train on all whose loss is a number");
}

#[test]
fn a_validation_row_without_a_loss_is_named_and_left_out() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plan = |out: &Path, odd: bool| {
        let mut input = input(recipe(), out);
        input.recipe.data.valid = Some("valid.jsonl".into());
        if odd {
            input.valid[3].tokens[1] = ODD;
        } else {
            input.valid.remove(3);
        }
        TrainPlan::new(input).unwrap()
    };
    let mut model = odd_model();
    model.poison = Some(ODD);
    let (result, events) = end(&plan(dir.path(), true), &mut model);
    assert_eq!(dropped(&events), ["valid.jsonl:4 its loss is not a number"]);
    assert_eq!(result.dropped, ["valid.jsonl:4"]);
    let (expected, _) = end(&plan(other.path(), false), &mut odd_model());
    assert_eq!(result.sha256, expected.sha256);
    assert_eq!(result.valid_loss, expected.valid_loss);
}

#[test]
fn lines_to_skip_must_be_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(recipe(), dir.path());
    input.recipe.data.skip_lines = Some(vec![24]);
    insta::assert_snapshot!(TrainPlan::new(input).unwrap_err(), @"`data.skip_lines` names line 24, on which there is no row to train on");
}

#[test]
fn another_machine_is_refused_unless_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |isa: &str, allow: bool| {
        let mut input = input(recipe(), dir.path());
        input.machine = MachineSettings {
            version: "0.1.0".into(),
            isa: isa.into(),
        };
        input.allow_other_machine = allow;
        TrainPlan::new(input).unwrap()
    };
    go(&plan("avx2", false), Some(3)).0.unwrap();
    let error = go(&plan("avx512", false), None).0.unwrap_err();
    let words = error
        .to_string()
        .replace(&dir.path().display().to_string(), "RUN");
    insta::assert_snapshot!(words, @"RUN: this run was begun by bantam 0.1.0 with avx2 and this is 0.1.0 with avx512: the bits would differ; go on there, choose another `--out`, or accept another result of the same quality with `--allow-other-machine`");
    let (outcome, events) = go(&plan("avx512", true), None);
    let Outcome::Finished(result) = outcome.unwrap() else {
        panic!("it goes on");
    };
    assert!(events.iter().any(
        |e| matches!(e, RunEvent::Warning { message } if message.ends_with("it was accepted"))
    ));
    // What is finished is told anywhere.
    let again = go(&plan("avx2", false), None).0.unwrap();
    assert_eq!(again, Outcome::AlreadyFinished(result));
}
