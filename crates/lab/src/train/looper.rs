//! The loop itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::adamw::{AdamW, AdamWConfig, clip_grad_norm};
use super::batch::{Batches, mean_loss, micro_batches, pack};
use super::checkpoint::{Checkpoints, LoopState, Snapshot, sha256, write_folder};
use super::run_dir::RunDir;
use super::schedule::lr_at;
use super::{LossReport, Outcome, TrainError, TrainPlan, TrainResult, Trainable, peak_rss_mb};
use crate::events::{EventLog, RunEvent};

/// One session of a run: from its start or a checkpoint to its end or an interruption.
struct Session<'a, T> {
    plan: &'a TrainPlan,
    model: &'a mut T,
    clock: &'a dyn Fn() -> Duration,
    on_event: &'a mut dyn FnMut(&RunEvent),
    dir: RunDir,
    checkpoints: Checkpoints,
    log: EventLog,
    snapshot: Snapshot,
    /// Step and time of the newest checkpoint.
    saved: (usize, Duration),
    /// When this session began, and the seconds the run had then.
    began: (Duration, f64),
}

pub(super) fn run<T: Trainable>(
    plan: &TrainPlan,
    model: &mut T,
    clock: &dyn Fn() -> Duration,
    on_event: &mut dyn FnMut(&RunEvent),
    cancel: &AtomicBool,
) -> Result<Outcome, TrainError> {
    let dir = RunDir::open(plan)?;
    let mut damage = None;
    if let Some(result) = dir.result()? {
        match adapter_damage(&dir, &result) {
            None => return Ok(Outcome::AlreadyFinished(result)),
            found => damage = found,
        }
    }
    let checkpoints = Checkpoints::open(dir.path())?;
    let (found, mut warnings) = checkpoints.load(model)?;
    warnings.extend(damage);
    let resumed = found.is_some();
    let snapshot = found.unwrap_or_else(|| {
        let params = match &plan.init {
            Some(params) => params.clone(),
            None => model.initial_params(plan.settings.seed),
        };
        assert_eq!(params.len(), model.n_params(), "an adapter of this shape");
        let opt = AdamW::new(params.len());
        Snapshot {
            state: LoopState::default(),
            params,
            best_params: None,
            opt,
        }
    });
    let (log, whole) = EventLog::open(&dir.events_path(), snapshot.state.events_len)?;
    if !whole {
        warnings.push(
            "events.jsonl is shorter than its checkpoint says: some events of this run are lost"
                .to_string(),
        );
    }
    let now = clock();
    let (step, began) = (snapshot.state.step, (now, snapshot.state.elapsed_s));
    let saved = (if resumed { step } else { 0 }, now);
    let mut session = Session {
        plan,
        model,
        clock,
        on_event,
        dir,
        checkpoints,
        log,
        snapshot,
        saved,
        began,
    };
    let total = plan.settings.optim.steps;
    session.tell(if resumed {
        RunEvent::Resumed { step, total }
    } else {
        warnings.extend(plan.warnings.iter().cloned());
        let data = &plan.settings.data;
        RunEvent::RunStarted {
            rows: data.rows,
            tokens: data.tokens,
            trained_tokens: data.trained_tokens,
            valid_rows: data.valid_rows,
            params: session.snapshot.params.len(),
            total,
        }
    })?;
    for message in warnings {
        session.tell(RunEvent::Warning { message })?;
    }
    session.run(cancel)
}

/// Why a finished run's adapter cannot be believed, if it cannot.
fn adapter_damage(dir: &RunDir, result: &TrainResult) -> Option<String> {
    let adapter = dir.adapter_path();
    let intact = std::fs::read_dir(&adapter).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            std::fs::read(entry.path()).is_ok_and(|bytes| sha256(&bytes) == result.sha256)
        })
    });
    (!intact).then(|| {
        format!(
            "{}: not the adapter this run ended with; it is made again",
            adapter.display()
        )
    })
}

impl<T: Trainable> Session<'_, T> {
    fn run(mut self, cancel: &AtomicBool) -> Result<Outcome, TrainError> {
        let settings = &self.plan.settings;
        let total = settings.optim.steps;
        let mut batches = Batches::new(
            &self.plan.order,
            &self.plan.train,
            settings.optim.batch_rows,
            settings.seed,
        );
        let mut grads = vec![0f32; self.snapshot.params.len()];
        self.model.set_params(&self.snapshot.params);
        while self.snapshot.state.step < total && !self.snapshot.state.stopped {
            if cancel.load(Ordering::Relaxed) {
                self.save()?;
                return Ok(Outcome::Interrupted {
                    step: self.snapshot.state.step,
                });
            }
            self.step(batches.at(self.snapshot.state.step), &mut grads)?;
            let step = self.snapshot.state.step;
            if !self.plan.valid.is_empty()
                && (step.is_multiple_of(settings.valid.every) || step == total)
            {
                self.validate()?;
            }
            if self.checkpoint_due() {
                self.save()?;
            }
        }
        self.finish()
    }

    /// One update.
    fn step(&mut self, batch: &[usize], grads: &mut [f32]) -> Result<(), TrainError> {
        let (settings, rows) = (&self.plan.settings, &self.plan.train);
        let optim = &settings.optim;
        let done = self.snapshot.state.step;
        let weight: usize = batch.iter().map(|&row| rows[row].n_trained()).sum();
        grads.fill(0.0);
        let mut report = LossReport::default();
        for micro in micro_batches(rows, batch, settings.micro_tokens) {
            let part =
                self.model
                    .loss_and_grads(&pack(rows, &micro), 1.0 / weight as f64, grads)?;
            report.loss_sum += part.loss_sum;
            report.weight_sum += part.weight_sum;
        }
        let loss = report.loss_sum / report.weight_sum;
        if !loss.is_finite() {
            return Err(TrainError::Diverged {
                what: "loss",
                step: done + 1,
            });
        }
        let grad_norm = clip_grad_norm(grads, optim.clip_norm);
        if !grad_norm.is_finite() {
            return Err(TrainError::Diverged {
                what: "gradient",
                step: done + 1,
            });
        }
        let lr = lr_at(
            optim.schedule,
            optim.lr,
            optim.warmup_steps,
            done,
            optim.steps,
        );
        let [beta1, beta2] = optim.betas;
        let config = AdamWConfig {
            beta1,
            beta2,
            eps: optim.eps,
            weight_decay: optim.weight_decay,
        };
        self.snapshot
            .opt
            .step(&mut self.snapshot.params, grads, lr, &config);
        self.model.set_params(&self.snapshot.params);

        let tokens: u64 = batch.iter().map(|&row| rows[row].tokens.len() as u64).sum();
        let elapsed_s = self.began.1 + ((self.clock)() - self.began.0).as_secs_f64();
        let state = &mut self.snapshot.state;
        state.step += 1;
        state.rows += batch.len() as u64;
        state.tokens += tokens;
        state.last_loss = loss.to_bits();
        state.elapsed_s = elapsed_s;
        let tok_per_s = rate(state.tokens, elapsed_s);
        let (step, total) = (state.step, optim.steps);
        self.tell(RunEvent::Step {
            step,
            total,
            loss,
            lr,
            tokens,
            grad_norm,
            elapsed_s,
            tok_per_s,
        })
    }

    /// Scores the validation rows, keeps the best parameters, and stops the run when they stay the best too long.
    fn validate(&mut self) -> Result<(), TrainError> {
        let settings = &self.plan.settings;
        let loss = mean_loss(self.model, &self.plan.valid, settings.micro_tokens)?;
        let step = self.snapshot.state.step;
        if !loss.is_finite() {
            return Err(TrainError::Diverged {
                what: "validation loss",
                step,
            });
        }
        let state = &mut self.snapshot.state;
        let best = state
            .best
            .is_none_or(|(_, bits)| loss < f64::from_bits(bits));
        if best {
            state.best = Some((step, loss.to_bits()));
            state.stale = 0;
            self.snapshot.best_params = Some(self.snapshot.params.clone());
        } else {
            state.stale += 1;
        }
        self.tell(RunEvent::Valid { step, loss, best })?;
        let state = &mut self.snapshot.state;
        let patience = settings.valid.patience;
        if patience > 0 && state.stale >= patience && step < settings.optim.steps {
            state.stopped = true;
            let (best_step, bits) = state.best.expect("a stale validation follows a best one");
            self.tell(RunEvent::EarlyStop {
                step,
                best_step,
                best_loss: f64::from_bits(bits),
            })?;
        }
        Ok(())
    }

    fn checkpoint_due(&self) -> bool {
        let pace = &self.plan.settings.checkpoint;
        let (step, time) = self.saved;
        let by_steps = pace.every_steps > 0 && self.snapshot.state.step - step >= pace.every_steps;
        let by_time = pace.every_s > 0.0 && ((self.clock)() - time).as_secs_f64() >= pace.every_s;
        by_steps || by_time
    }

    /// Saves a checkpoint, unless the newest one is of this step.
    fn save(&mut self) -> Result<(), TrainError> {
        let step = self.snapshot.state.step;
        if step == self.saved.0 {
            return Ok(());
        }
        self.snapshot.state.events_len = self.log.sync()?;
        self.checkpoints.save(self.model, &self.snapshot)?;
        self.saved = (step, (self.clock)());
        self.tell(RunEvent::Checkpoint { step })
    }

    /// Writes the adapter and the result.
    fn finish(mut self) -> Result<Outcome, TrainError> {
        self.save()?;
        let params = self
            .snapshot
            .best_params
            .as_ref()
            .unwrap_or(&self.snapshot.params);
        let files = self.model.adapter_files(params)?;
        let adapter = self.dir.adapter_path();
        write_folder(&adapter, &files)?;
        let state = &self.snapshot.state;
        let result = TrainResult {
            rows: state.rows,
            tokens: state.tokens,
            train_s: state.elapsed_s,
            tok_per_s: rate(state.tokens, state.elapsed_s),
            rows_per_s: rate(state.rows, state.elapsed_s),
            last_loss: f64::from_bits(state.last_loss),
            valid_loss: state.best.map(|(_, bits)| f64::from_bits(bits)),
            peak_rss_mb: peak_rss_mb(),
            adapter,
            sha256: files
                .first()
                .map(|file| sha256(&file.bytes))
                .unwrap_or_default(),
        };
        self.tell(RunEvent::Finished {
            step: self.snapshot.state.step,
            result: result.clone(),
        })?;
        self.log.sync()?;
        self.dir.finish(&result)?;
        self.checkpoints.keep_last(1)?;
        Ok(Outcome::Finished(result))
    }

    fn tell(&mut self, event: RunEvent) -> Result<(), TrainError> {
        self.log.append(&event)?;
        (self.on_event)(&event);
        Ok(())
    }
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}
