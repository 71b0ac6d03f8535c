//! The loop itself: steps, validation, checkpoints, the end. What one step is, and what follows when it goes wrong,
//! is in [`super::step`].

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::adamw::AdamW;
use super::batch::Batches;
use super::checkpoint::{Checkpoints, LoopState, Snapshot, file_sha256};
use super::objective::{BatchLoss, Objective, Side};
use super::run_dir::RunDir;
use super::step::Next;
use super::{Outcome, PreferenceStats, TrainError, TrainPlan, TrainResult, Trainable, peak_rss_mb};
use crate::events::{EventLog, RunEvent};

/// One session of a run: from its start or a checkpoint to its end or an interruption.
pub(super) struct Session<'a, T: ?Sized> {
    pub(super) plan: &'a TrainPlan,
    pub(super) model: &'a mut T,
    clock: &'a dyn Fn() -> Duration,
    on_event: &'a mut dyn FnMut(&RunEvent),
    dir: RunDir,
    checkpoints: Checkpoints,
    log: EventLog,
    pub(super) snapshot: Snapshot,
    pub(super) objective: Objective<'a>,
    /// Step and time of the newest checkpoint.
    saved: (usize, Duration),
}

pub(super) fn run<T: Trainable + ?Sized>(
    plan: &TrainPlan,
    model: &mut T,
    clock: &dyn Fn() -> Duration,
    on_event: &mut dyn FnMut(&RunEvent),
    cancel: &AtomicBool,
) -> Result<Outcome, TrainError> {
    let (dir, mut warnings) = RunDir::open(plan)?;
    if let Some(result) = dir.result()? {
        match damage(&dir.path().join(model.form().name()), &result) {
            None => return Ok(Outcome::AlreadyFinished(result)),
            found => warnings.extend(found),
        }
    }
    let checkpoints = Checkpoints::open(dir.path())?;
    let (found, broken) = checkpoints.load(model, usize::MAX)?;
    warnings.extend(broken);
    let resumed = found.is_some();
    let snapshot = found.unwrap_or_else(|| start(plan, model));
    let (log, whole) = EventLog::open(&dir.events_path(), snapshot.state.events_len)?;
    if !whole {
        warnings.push(
            "events.jsonl is shorter than its checkpoint says: some events of this run are lost"
                .to_string(),
        );
    }
    let step = snapshot.state.step;
    let objective = Objective::new(plan, || start(plan, model).params);
    let mut session = Session {
        plan,
        objective,
        model,
        clock,
        on_event,
        dir,
        checkpoints,
        log,
        snapshot,
        saved: (step, clock()),
    };
    if resumed {
        let total = plan.settings.optim.steps;
        session.tell(RunEvent::Resumed { step, total })?;
    } else {
        session.tell_start()?;
    }
    for message in warnings {
        session.tell(RunEvent::Warning { message })?;
    }
    session.run(cancel)
}

/// Where a run begins.
fn start<T: Trainable + ?Sized>(plan: &TrainPlan, model: &T) -> Snapshot {
    let params = match &plan.init {
        Some(params) => params.clone(),
        None => model.initial_params(plan.settings.seed),
    };
    assert_eq!(params.len(), model.n_params(), "parameters of this shape");
    let opt = AdamW::new(params.len());
    Snapshot {
        state: LoopState::default(),
        params,
        best_params: None,
        opt,
    }
}

/// Why a finished run's result cannot be believed, if it cannot.
fn damage(folder: &Path, result: &TrainResult) -> Option<String> {
    let intact = std::fs::read_dir(folder).is_ok_and(|entries| {
        let mut files = entries.flatten().map(|entry| entry.path());
        files.any(|file| file_sha256(&file).is_ok_and(|sum| sum == result.sha256))
    });
    (!intact).then(|| {
        format!(
            "{}: not what this run ended with; it is made again",
            folder.display()
        )
    })
}

impl<T: Trainable + ?Sized> Session<'_, T> {
    fn run(mut self, cancel: &AtomicBool) -> Result<Outcome, TrainError> {
        let settings = &self.plan.settings;
        let total = settings.optim.steps;
        let mut batches = Batches::new(self.plan);
        let mut grads = vec![0f32; self.snapshot.params.len()];
        self.model.set_params(&self.snapshot.params);
        while self.snapshot.state.step < total && !self.snapshot.state.stopped {
            if cancel.load(Ordering::Relaxed) {
                self.save()?;
                return Ok(Outcome::Interrupted {
                    step: self.snapshot.state.step,
                });
            }
            let mut next = self.step(batches.at(self.snapshot.state.step), &mut grads)?;
            let step = self.snapshot.state.step;
            let is_due = step.is_multiple_of(settings.valid.every) || step == total;
            if next == Next::Go && !self.plan.valid.is_empty() && is_due {
                next = self.validate()?;
            }
            match next {
                Next::Go => {
                    self.keep_epoch()?;
                    if self.checkpoint_due() {
                        self.save()?;
                    }
                }
                Next::Undo { step, trouble } => self.undo(step, trouble)?,
            }
        }
        self.finish()
    }

    /// Scores the validation rows, keeps the best parameters, and stops the run when they stay the best too long.
    fn validate(&mut self) -> Result<Next, TrainError> {
        let settings = &self.plan.settings;
        let began = self.now();
        let (loss, preference) = loop {
            let rows = self.valid_rows();
            let BatchLoss {
                loss, preference, ..
            } = self.loss(Side::Valid, &rows)?;
            if loss.is_finite() {
                break (loss, preference.map(PreferenceStats::with_interval));
            }
            if let Some(undo) = self.validation_trouble(&rows)? {
                return Ok(undo);
            }
        };
        let step = self.snapshot.state.step;
        let state = &mut self.snapshot.state;
        let best = state
            .best
            .is_none_or(|(_, bits)| loss < f64::from_bits(bits));
        if best {
            state.best = Some((step, loss.to_bits()));
            state.best_preference = preference;
            state.stale = 0;
            self.snapshot.best_params = Some(self.snapshot.params.clone());
        } else {
            state.stale += 1;
        }
        self.snapshot.state.valid_s += self.since(began);
        self.tell(RunEvent::Valid {
            step,
            loss,
            best,
            preference,
        })?;
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
        Ok(Next::Go)
    }

    fn checkpoint_due(&self) -> bool {
        let pace = &self.plan.settings.checkpoint;
        let (step, time) = self.saved;
        let by_steps = pace.every_steps > 0 && self.snapshot.state.step - step >= pace.every_steps;
        by_steps || pace.every_s > 0.0 && self.since(time) >= pace.every_s
    }

    /// Keeps what is trained as it is at the end of an epoch, if that was asked for.
    fn keep_epoch(&self) -> Result<(), TrainError> {
        let settings = &self.plan.settings;
        let step = self.snapshot.state.step;
        let per_epoch = settings
            .data
            .rows
            .div_ceil(settings.optim.batch_rows)
            .max(1);
        if !settings.checkpoint.each_epoch || !step.is_multiple_of(per_epoch) {
            return Ok(());
        }
        let folder = self.dir.path().join(format!("epochs/step-{step}"));
        std::fs::create_dir_all(&folder).map_err(|e| TrainError::io(&folder, e))?;
        let form = self.model.form();
        form.write(&self.snapshot.params, &folder.join(form.name()))?;
        Ok(())
    }

    /// Saves a checkpoint, unless the newest one is of this step.
    fn save(&mut self) -> Result<(), TrainError> {
        let step = self.snapshot.state.step;
        if step == self.saved.0 {
            return Ok(());
        }
        let began = self.now();
        self.snapshot.state.events_len = self.log.sync()?;
        self.checkpoints.save(self.model, &self.snapshot)?;
        self.snapshot.state.save_s += self.since(began);
        self.saved = (step, self.now());
        self.tell(RunEvent::Checkpoint { step })
    }

    /// Goes back to the newest checkpoint that is not newer than `step`, or to the start. What the run has learnt of
    /// its rows it keeps.
    pub(super) fn go_back(&mut self, step: usize) -> Result<(), TrainError> {
        let (found, broken) = self.checkpoints.load(self.model, step)?;
        let from_start = found.is_none();
        let mut snapshot = found.unwrap_or_else(|| start(self.plan, self.model));
        let (was, now) = (&self.snapshot.state, &mut snapshot.state);
        now.guard.left_out.extend(&was.guard.left_out);
        (now.train_s, now.valid_s, now.save_s) = (was.train_s, was.valid_s, was.save_s);
        self.checkpoints.remove_after(snapshot.state.step)?;
        self.log = EventLog::open(&self.dir.events_path(), snapshot.state.events_len)?.0;
        self.snapshot = snapshot;
        self.saved = (self.snapshot.state.step, self.now());
        self.model.set_params(&self.snapshot.params);
        if from_start {
            self.tell_start()?;
        }
        for message in broken {
            self.tell(RunEvent::Warning { message })?;
        }
        Ok(())
    }

    /// Writes the adapter and the result.
    fn finish(mut self) -> Result<Outcome, TrainError> {
        self.save()?;
        let params = self
            .snapshot
            .best_params
            .as_ref()
            .unwrap_or(&self.snapshot.params);
        let form = self.model.form();
        let adapter = self.dir.path().join(form.name());
        let sha256 = form.write(params, &adapter)?;
        let state = &self.snapshot.state;
        let result = TrainResult {
            rows: state.rows,
            tokens: state.tokens,
            computed_tokens: state.computed,
            train_s: state.train_s,
            valid_s: state.valid_s,
            checkpoint_s: state.save_s,
            tok_per_s: rate(state.tokens, state.train_s),
            computed_tok_per_s: rate(state.computed, state.train_s),
            rows_per_s: rate(state.rows, state.train_s),
            last_loss: f64::from_bits(state.last_loss),
            valid_loss: state.best.map(|(_, bits)| f64::from_bits(bits)),
            valid_preference: state.best_preference,
            dropped: self.places(),
            peak_rss_mb: peak_rss_mb(),
            adapter,
            sha256,
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

    fn tell_start(&mut self) -> Result<(), TrainError> {
        let (plan, data) = (self.plan, &self.plan.settings.data);
        self.tell(RunEvent::RunStarted {
            rows: data.rows,
            tokens: data.tokens,
            trained_tokens: data.trained_tokens,
            valid_rows: data.valid_rows,
            params: self.snapshot.params.len(),
            total: plan.settings.optim.steps,
        })?;
        for message in plan.warnings.iter().cloned() {
            self.tell(RunEvent::Warning { message })?;
        }
        Ok(())
    }

    pub(super) fn tell(&mut self, event: RunEvent) -> Result<(), TrainError> {
        self.log.append(&event)?;
        (self.on_event)(&event);
        Ok(())
    }

    pub(super) fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Seconds since a moment.
    pub(super) fn since(&self, moment: Duration) -> f64 {
        ((self.clock)() - moment).as_secs_f64()
    }
}

/// How many a second; 0 before any time has passed.
pub(super) fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}
