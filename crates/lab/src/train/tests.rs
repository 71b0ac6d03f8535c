//! The loop's laws, on a model small enough to train a thousand times.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::toy::{Bigram, rows};
use super::*;
use crate::events::read_events;
use crate::recipe::{
    CheckpointRecipe, DataRecipe, MachineSettings, OptimRecipe, Recipe, ValidRecipe,
};

mod poison;
mod preference;

const VOCAB: u32 = 11;
const STEPS: usize = 12;

/// Two epochs of six updates, validated every third, saved every second.
fn recipe() -> Recipe {
    Recipe {
        seed: Some(5),
        micro_tokens: Some(20),
        data: DataRecipe {
            train: Some("train.jsonl".into()),
            ..Default::default()
        },
        optim: OptimRecipe {
            lr: Some(0.05),
            batch_rows: Some(4),
            epochs: Some(2),
            weight_decay: Some(0.01),
            ..Default::default()
        },
        valid: ValidRecipe {
            every: Some(3),
            ..Default::default()
        },
        checkpoint: CheckpointRecipe {
            every_steps: Some(2),
            every_s: Some(0.0),
            each_epoch: None,
        },
        ..Default::default()
    }
}

fn input(recipe: Recipe, out: &Path) -> PlanInput {
    PlanInput {
        recipe,
        train: rows(23, VOCAB, 1),
        valid: rows(6, VOCAB, 2),
        base_name: "bigram".into(),
        base_sha256: "0".into(),
        max_context: 64,
        model: None,
        order: BatchOrder::Seeded,
        init: None,
        machine: MachineSettings::default(),
        allow_other_machine: false,
        out: out.to_path_buf(),
    }
}

fn plan(recipe: Recipe, out: &Path) -> TrainPlan {
    TrainPlan::new(input(recipe, out)).unwrap()
}

/// Trains with a clock that ticks once a look, and asks for a stop after step `stop`.
fn go(plan: &TrainPlan, stop: Option<usize>) -> (Result<Outcome, TrainError>, Vec<RunEvent>) {
    go_with(plan, &mut Bigram::new(VOCAB as usize), stop)
}

fn go_with(
    plan: &TrainPlan,
    model: &mut Bigram,
    stop: Option<usize>,
) -> (Result<Outcome, TrainError>, Vec<RunEvent>) {
    let ticks = Cell::new(0);
    let clock = || {
        ticks.set(ticks.get() + 1);
        Duration::from_secs(ticks.get())
    };
    let cancel = AtomicBool::new(stop == Some(0));
    let mut events = Vec::new();
    let mut on_event = |event: &RunEvent| {
        if matches!(event, RunEvent::Step { step, .. } if Some(*step) == stop) {
            cancel.store(true, Ordering::Relaxed);
        }
        events.push(event.clone());
    };
    let outcome = train(plan, model, &clock, &mut on_event, &cancel);
    (outcome, events)
}

fn finish(plan: &TrainPlan) -> TrainResult {
    match go(plan, None).0.unwrap() {
        Outcome::Finished(result) => result,
        other => panic!("{other:?}"),
    }
}

/// What a log says, without what only the clock and the sessions decide.
fn story(out: &Path) -> Vec<RunEvent> {
    let events = read_events(&out.join("events.jsonl")).unwrap();
    let timeless = |event| match event {
        RunEvent::Step {
            step,
            total,
            loss,
            lr,
            tokens,
            grad_norm,
            computed,
            preference,
            ..
        } => Some(RunEvent::Step {
            step,
            total,
            loss,
            lr,
            tokens,
            grad_norm,
            computed,
            elapsed_s: 0.0,
            tok_per_s: 0.0,
            preference,
        }),
        RunEvent::Valid { .. } | RunEvent::EarlyStop { .. } => Some(event),
        _ => None,
    };
    events.into_iter().filter_map(timeless).collect()
}

fn adapter(out: &Path) -> Vec<u8> {
    fs::read(out.join("adapter/table.bin")).unwrap()
}

fn checkpoints(out: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(out.join("checkpoints")).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn learning_happens() {
    let dir = tempfile::tempdir().unwrap();
    let result = finish(&plan(recipe(), dir.path()));
    let losses: Vec<f64> = story(dir.path())
        .iter()
        .filter_map(|e| {
            if let RunEvent::Valid { loss, .. } = e {
                Some(*loss)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(losses.len(), 4);
    assert!(losses[3] < losses[0], "{losses:?}");
    assert_eq!(result.valid_loss, Some(losses[3]));
    assert_eq!(result.rows, 46);
    assert_eq!(result.sha256, checkpoint::sha256(&adapter(dir.path())));
}

#[test]
fn the_end_of_each_epoch_is_kept_and_changes_nothing() {
    let (plain, kept) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let without = finish(&plan(recipe(), plain.path()));
    let mut each = recipe();
    each.checkpoint.each_epoch = Some(true);
    let plan = plan(each, kept.path());
    let with = finish(&plan);
    assert_eq!(with.sha256, without.sha256);
    assert!(!plain.path().join("epochs").exists());
    let optim = &plan.settings.optim;
    let per_epoch = plan.settings.data.rows.div_ceil(optim.batch_rows);
    for epoch in 1..=optim.steps / per_epoch {
        let folder = kept
            .path()
            .join(format!("epochs/step-{}", epoch * per_epoch));
        assert!(folder.join("adapter/table.bin").is_file(), "epoch {epoch}");
    }
    let ends = fs::read_dir(kept.path().join("epochs")).unwrap().count();
    assert_eq!(ends, optim.steps / per_epoch);
}

#[test]
fn a_multiplier_scales_the_rate_that_is_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    recipe.optim.lr = None;
    let chosen = plan(recipe.clone(), dir.path()).settings.optim.lr;
    recipe.optim.lr_multiplier = Some(0.5);
    assert_eq!(plan(recipe, dir.path()).settings.optim.lr, chosen * 0.5);
}

#[test]
fn resumed_equals_uninterrupted_to_the_bit_wherever_it_stops() {
    let whole = tempfile::tempdir().unwrap();
    let expected = finish(&plan(recipe(), whole.path()));
    for stop in 0..STEPS {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(recipe(), dir.path());
        assert_eq!(
            go(&plan, Some(stop)).0.unwrap(),
            Outcome::Interrupted { step: stop }
        );
        let result = finish(&plan);
        assert_eq!(
            adapter(dir.path()),
            adapter(whole.path()),
            "stopped after {stop}"
        );
        assert_eq!(
            story(dir.path()),
            story(whole.path()),
            "stopped after {stop}"
        );
        let counts = |r: &TrainResult| {
            (
                r.rows,
                r.tokens,
                r.last_loss.to_bits(),
                r.valid_loss,
                r.sha256.clone(),
            )
        };
        assert_eq!(counts(&result), counts(&expected));
    }
}

#[test]
fn stopping_at_every_step_of_one_run_changes_nothing() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    finish(&plan(recipe(), whole.path()));
    let plan = plan(recipe(), dir.path());
    for stop in 1..STEPS {
        assert_eq!(
            go(&plan, Some(stop)).0.unwrap(),
            Outcome::Interrupted { step: stop }
        );
    }
    finish(&plan);
    assert_eq!(adapter(dir.path()), adapter(whole.path()));
    assert_eq!(story(dir.path()), story(whole.path()));
}

#[test]
fn how_often_it_saves_changes_nothing() {
    let whole = tempfile::tempdir().unwrap();
    finish(&plan(recipe(), whole.path()));
    for (every_steps, every_s) in [(0, 0.0), (1, 0.0), (0, 5.0), (5, 3.0)] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = CheckpointRecipe {
            every_steps: Some(every_steps),
            every_s: Some(every_s),
            each_epoch: None,
        };
        finish(&plan(
            Recipe {
                checkpoint,
                ..recipe()
            },
            dir.path(),
        ));
        assert_eq!(adapter(dir.path()), adapter(whole.path()));
        assert_eq!(story(dir.path()), story(whole.path()));
    }
}

/// Leaves a run as a power cut would: events after the last checkpoint, a torn line, a half-made checkpoint.
fn cut_off(dir: &Path, stop: usize) -> TrainPlan {
    let plan = plan(recipe(), dir);
    go(&plan, Some(stop)).0.unwrap();
    let mut log = fs::File::options()
        .append(true)
        .open(dir.join("events.jsonl"))
        .unwrap();
    let late = RunEvent::Valid {
        step: stop + 1,
        loss: 9.0,
        best: false,
        preference: None,
    };
    write!(
        log,
        "{}\n{{\"event\":\"st",
        serde_json::to_string(&late).unwrap()
    )
    .unwrap();
    let half = dir.join(format!("checkpoints/.tmp-step-{}", stop + 1));
    fs::create_dir_all(half.join("adapter")).unwrap();
    fs::write(half.join("adapter/table.bin"), b"half of it").unwrap();
    fs::write(dir.join(".tmp-result.json"), b"{").unwrap();
    plan
}

#[test]
fn what_a_killed_process_leaves_is_swept_away() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    finish(&plan(recipe(), whole.path()));
    let plan = cut_off(dir.path(), 7);
    let (outcome, events) = go(&plan, None);
    assert!(matches!(outcome.unwrap(), Outcome::Finished(_)));
    assert_eq!(
        events[0],
        RunEvent::Resumed {
            step: 7,
            total: STEPS
        }
    );
    assert_eq!(story(dir.path()), story(whole.path()));
    assert_eq!(adapter(dir.path()), adapter(whole.path()));
    assert!(!dir.path().join(".tmp-result.json").exists());
    assert_eq!(
        checkpoints(dir.path()),
        BTreeSet::from(["step-12".to_string()])
    );
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_one_before_is_used() {
    let whole = tempfile::tempdir().unwrap();
    finish(&plan(recipe(), whole.path()));
    for file in [
        "adapter/table.bin",
        "best/table.bin",
        "optimizer.bin",
        "state.json",
        "manifest.json",
        "COMPLETE",
    ] {
        for cut in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let plan = plan(recipe(), dir.path());
            go(&plan, Some(7)).0.unwrap();
            assert_eq!(
                checkpoints(dir.path()),
                BTreeSet::from(["step-6".into(), "step-7".into()])
            );
            let path = dir.path().join("checkpoints/step-7").join(file);
            let mut bytes = fs::read(&path).unwrap();
            if cut {
                bytes.truncate(bytes.len() / 2)
            } else {
                bytes[3] ^= 4
            }
            fs::write(&path, bytes).unwrap();
            let (outcome, events) = go(&plan, None);
            assert!(matches!(outcome.unwrap(), Outcome::Finished(_)));
            assert_eq!(
                events[0],
                RunEvent::Resumed {
                    step: 6,
                    total: STEPS
                }
            );
            let RunEvent::Warning { message } = &events[1] else {
                panic!("{:?}", events[1])
            };
            assert!(
                message.starts_with("checkpoint step-7 is damaged and is not used: "),
                "{message}"
            );
            assert_eq!(adapter(dir.path()), adapter(whole.path()), "{file}");
            assert_eq!(story(dir.path()), story(whole.path()));
        }
    }
}

#[test]
fn without_any_good_checkpoint_it_starts_again_and_says_so() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    finish(&plan(recipe(), whole.path()));
    let plan = plan(recipe(), dir.path());
    go(&plan, Some(5)).0.unwrap();
    for step in checkpoints(dir.path()) {
        fs::remove_file(dir.path().join("checkpoints").join(step).join("COMPLETE")).unwrap();
    }
    let (_, events) = go(&plan, None);
    assert!(matches!(events[0], RunEvent::RunStarted { .. }));
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e, RunEvent::Warning { .. }))
            .count(),
        2
    );
    assert_eq!(adapter(dir.path()), adapter(whole.path()));
    assert_eq!(story(dir.path()), story(whole.path()));
}

#[test]
fn other_settings_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    go(&plan(recipe(), dir.path()), Some(3)).0.unwrap();
    let refused = |change: &dyn Fn(&mut PlanInput)| {
        let mut input = input(recipe(), dir.path());
        change(&mut input);
        match go(&TrainPlan::new(input).unwrap(), None).0 {
            Err(TrainError::Differs {
                field, was, now, ..
            }) => format!("{field}: {was} -> {now}"),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        refused(&|i| i.recipe.optim.lr = Some(0.1)),
        "optim.lr: 0.05 -> 0.1"
    );
    assert_eq!(refused(&|i| i.recipe.seed = Some(6)), "seed: 5 -> 6");
    assert_eq!(
        refused(&|i| i.recipe.lora.rank = Some(4)),
        "lora.rank: 16 -> 4"
    );
    assert_eq!(
        refused(&|i| i.base_sha256 = "1".into()),
        "base.sha256: \"0\" -> \"1\""
    );
    assert_eq!(refused(&|i| drop(i.train.pop())), "data.rows: 23 -> 22");
    assert!(refused(&|i| i.train[4].tokens[2] ^= 1).starts_with("data.train_sha256: "));
    assert!(refused(&|i| i.valid[0].trained[2] = false).starts_with("data.valid_sha256: "));
    assert!(
        refused(&|i| i.order = BatchOrder::Given(vec![vec![0]; STEPS]))
            .starts_with("data.order: \"seeded\" -> ")
    );
    // Names and pace are free.
    let mut input = input(recipe(), dir.path());
    input.base_name = "the same, moved".into();
    input.recipe.data.train = Some("moved.jsonl".into());
    input.recipe.checkpoint.every_steps = Some(1);
    finish(&TrainPlan::new(input).unwrap());
}

#[test]
fn a_folder_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("adapter")).unwrap();
    assert!(matches!(
        go(&plan(recipe(), dir.path()), None).0,
        Err(TrainError::NotARun { .. })
    ));
}

#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(recipe(), dir.path());
    let held = run_dir::RunDir::open(&plan).unwrap().0;
    assert!(matches!(go(&plan, None).0, Err(TrainError::Locked { .. })));
    drop(held);
    finish(&plan);
}

#[test]
fn a_finished_run_says_so_and_a_damaged_adapter_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(recipe(), dir.path());
    let result = finish(&plan);
    let (log, bytes) = (
        fs::read(dir.path().join("events.jsonl")).unwrap(),
        adapter(dir.path()),
    );
    assert_eq!(go(&plan, None).0.unwrap(), Outcome::AlreadyFinished(result));
    assert_eq!(fs::read(dir.path().join("events.jsonl")).unwrap(), log);
    for damage in [Some(&b"nonsense"[..]), None] {
        match damage {
            Some(bytes) => fs::write(dir.path().join("adapter/table.bin"), bytes).unwrap(),
            None => fs::remove_dir_all(dir.path().join("adapter")).unwrap(),
        }
        let (outcome, events) = go(&plan, None);
        assert!(matches!(outcome.unwrap(), Outcome::Finished(_)));
        assert_eq!(
            events[0],
            RunEvent::Resumed {
                step: STEPS,
                total: STEPS
            }
        );
        assert!(
            matches!(&events[1], RunEvent::Warning { message } if message.contains("made again"))
        );
        assert_eq!(adapter(dir.path()), bytes);
    }
}

#[test]
fn early_stopping_keeps_the_best_and_survives_resuming() {
    // A rate this high overshoots, so that validation gets worse again.
    let hot = || {
        let mut recipe = recipe();
        recipe.optim.lr = Some(3.0);
        recipe.optim.epochs = Some(20);
        recipe.optim.schedule = Some(crate::recipe::Schedule::Constant);
        recipe.valid = ValidRecipe {
            every: Some(1),
            patience: Some(4),
        };
        recipe
    };
    let whole = tempfile::tempdir().unwrap();
    let result = finish(&plan(hot(), whole.path()));
    let story_of_whole = story(whole.path());
    let (step, best_step, best_loss) = match story_of_whole.last() {
        Some(RunEvent::EarlyStop {
            step,
            best_step,
            best_loss,
        }) => (*step, *best_step, *best_loss),
        other => panic!("{other:?}"),
    };
    assert_eq!(step, best_step + 4);
    assert_eq!(result.valid_loss, Some(best_loss));
    // The adapter is the one of the best step: training just so far ends with the same validation loss.
    let params: Vec<f32> = adapter(whole.path())
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let mut model = Bigram::new(VOCAB as usize);
    model.set_params(&params);
    assert_eq!(
        batch::mean_loss(
            &mut model,
            &rows(6, VOCAB, 2),
            &[0, 1, 2, 3, 4, 5],
            &plan(hot(), whole.path()).settings
        )
        .unwrap(),
        best_loss
    );
    for stop in [best_step, best_step + 2, step - 1] {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(hot(), dir.path());
        go(&plan, Some(stop)).0.unwrap();
        finish(&plan);
        assert_eq!(adapter(dir.path()), adapter(whole.path()));
        assert_eq!(story(dir.path()), story_of_whole);
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let losses = [1, 1000].map(|micro_tokens| {
        let dir = &dirs[usize::from(micro_tokens == 1)];
        finish(&plan(
            Recipe {
                micro_tokens: Some(micro_tokens),
                ..recipe()
            },
            dir.path(),
        ))
        .last_loss
    });
    assert!((losses[0] - losses[1]).abs() < 1e-6, "{losses:?}");
}

#[test]
fn a_given_order_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(recipe(), dir.path());
    input.valid.clear();
    input.order = BatchOrder::Given(vec![vec![3, 1], vec![0], vec![22, 3, 4]]);
    let lens: Vec<u64> = input.train.iter().map(|r| r.tokens.len() as u64).collect();
    let plan = TrainPlan::new(input).unwrap();
    let result = finish(&plan);
    assert_eq!(result.valid_loss, None);
    let tokens: Vec<u64> = story(dir.path())
        .iter()
        .filter_map(|e| {
            if let RunEvent::Step { tokens, .. } = e {
                Some(*tokens)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(
        tokens,
        [lens[3] + lens[1], lens[0], lens[22] + lens[3] + lens[4]]
    );
}

#[test]
fn divergence_is_an_error_with_its_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    recipe.optim.lr = Some(1e39);
    recipe.optim.warmup_steps = Some(0);
    let error = go(&plan(recipe, dir.path()), None).0.unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::Diverged {
                what: "update",
                step: 4,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn events_have_a_schema() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe();
    recipe.optim.max_steps = Some(2);
    finish(&plan(recipe, dir.path()));
    let text = fs::read_to_string(dir.path().join("events.jsonl")).unwrap();
    let text = text.replace(&dir.path().display().to_string(), "RUN");
    let peak = text
        .find("\"peak_rss_mb\":")
        .map(|at| text[at..].split([',', '}']).next().unwrap().to_string());
    insta::assert_snapshot!(text.replace(&peak.unwrap(), "\"peak_rss_mb\":0"));
    let rare = [
        RunEvent::EarlyStop {
            step: 9,
            best_step: 6,
            best_loss: 0.5,
        },
        RunEvent::Resumed { step: 4, total: 9 },
        RunEvent::StepSkipped { step: 4, total: 9 },
        RunEvent::RowsDropped {
            step: 4,
            rows: vec![crate::events::DroppedRow {
                place: "rows.jsonl:7".into(),
                reason: "why".into(),
            }],
            for_good: true,
        },
        RunEvent::RolledBack {
            step: 4,
            to: 2,
            reason: "why".into(),
            rows: vec!["rows.jsonl:7".into()],
        },
        RunEvent::Warning {
            message: "words".into(),
        },
    ];
    insta::assert_snapshot!(rare.map(|e| serde_json::to_string(&e).unwrap()).join("\n"));
}

/// Set in a child process: where it is to train. Not a test of its own.
const CHILD: &str = "BANTAM_LAB_TEST_CHILD";

/// The long run that children are killed in: it saves at each step.
fn child_plan(out: &Path) -> TrainPlan {
    let mut recipe = recipe();
    recipe.optim.epochs = Some(20);
    recipe.checkpoint = CheckpointRecipe {
        every_steps: Some(1),
        every_s: Some(0.0),
        each_epoch: None,
    };
    plan(recipe, out)
}

#[test]
fn child_process() {
    let Some(out) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    if let Err(error) = go(&child_plan(&out), None).0 {
        println!("{error}");
        std::process::exit(matches!(error, TrainError::DiskFull { .. }).into());
    }
}

/// This test program again, running `child_process` only, behind a line of shell.
fn child(out: &Path, shell: &str) -> Command {
    let mut command = Command::new("bash");
    command.args([
        "-c",
        &format!(
            "{shell} exec \"$0\" --exact train::tests::child_process --nocapture --test-threads=1"
        ),
    ]);
    command
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, out)
        .stdout(std::process::Stdio::piped());
    command
}

#[test]
fn killed_at_any_moment_it_ends_with_the_same_bytes() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    finish(&child_plan(whole.path()));
    for wait_ms in [60, 90, 130, 170] {
        let mut process = child(dir.path(), "").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
        process.kill().ok();
        process.wait().unwrap();
    }
    go(&child_plan(dir.path()), None).0.unwrap();
    assert_eq!(adapter(dir.path()), adapter(whole.path()));
    assert_eq!(story(dir.path()), story(whole.path()));
}

#[test]
fn a_full_disk_is_its_own_error_and_leaves_the_last_checkpoint_whole() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    finish(&child_plan(whole.path()));
    // No file may pass 4 KiB: the event log runs into that after some steps.
    let output = child(dir.path(), "trap '' XFSZ; ulimit -f 4;")
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains(
            "events.jsonl: no space left to write; the last complete checkpoint is whole"
        ),
        "{words}"
    );
    let left = checkpoints(dir.path());
    assert!(
        !left.is_empty() && left.iter().all(|name| name.starts_with("step-")),
        "{left:?}"
    );
    // With room again, it goes on from there.
    let (_, events) = go(&child_plan(dir.path()), None);
    assert!(
        matches!(events[0], RunEvent::Resumed { step: 5.., .. }),
        "{:?}",
        events[0]
    );
    assert_eq!(adapter(dir.path()), adapter(whole.path()));
    // Nor may a checkpoint that does not fit be half there.
    let dir = tempfile::tempdir().unwrap();
    let output = child(dir.path(), "trap '' XFSZ; ulimit -f 1;")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let left = fs::read_dir(dir.path().join("checkpoints")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
}
