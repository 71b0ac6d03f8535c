//! One update, and what follows when it goes wrong.
//!
//! A batch whose loss or gradient is no number, or whose loss lies far above the recent ones ([`super::guard`]), changes
//! nothing. If the update before it did the damage, the run goes back before that update and leaves it out. Otherwise
//! the batch's rows are looked at one by one; the guilty ones are named and trained on no more, and the batch is done
//! again without them. A row so dropped keeps its place in the order of the batches, so from here on the run is the one
//! that would have left the row out from the start (`data.skip_lines`): the same bytes.

use super::adamw::{AdamWConfig, clip_scale};
use super::batch::rows_of;
use super::guard::{MAX_UNDONE, Trouble, max_dropped};
use super::looper::{Session, rate};
use super::objective::{BatchLoss, Side};
use super::schedule::lr_at;
use super::{TrainError, TrainRow, Trainable};
use crate::events::{DroppedRow, RunEvent};
use bantam_kernels::optim;

/// How the run goes on after a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Next {
    /// With the next one.
    Go,
    /// From before an earlier one, which is left out.
    Undo {
        /// The step, from 0.
        step: usize,
        /// Why.
        trouble: Trouble,
    },
}

/// A batch's gradient is in the caller's buffer; this is the rest.
struct Gradient {
    of: BatchLoss,
    norm: f64,
}

impl<T: Trainable + ?Sized> Session<'_, T> {
    /// One update with a batch, or with what is left of it.
    pub(super) fn step(&mut self, batch: &[usize], grads: &mut [f32]) -> Result<Next, TrainError> {
        let began = self.now();
        let z = self.plan.settings.optim.spike_z;
        let step = self.snapshot.state.step;
        let mut is_again = false;
        loop {
            let guard = &self.snapshot.state.guard;
            let is_trained =
                |row: &usize| !self.plan.skipped.contains(row) && !guard.dropped.contains(row);
            let rows: Vec<usize> = batch.iter().copied().filter(is_trained).collect();
            if rows.is_empty() || guard.left_out.contains(&step) {
                self.snapshot.state.step += 1;
                let total = self.plan.settings.optim.steps;
                self.tell(RunEvent::StepSkipped {
                    step: step + 1,
                    total,
                })?;
                return Ok(Next::Go);
            }
            let gradient = self.gradient(&rows, grads)?;
            let guard = &self.snapshot.state.guard;
            let Some(trouble) = guard.judge(gradient.of.loss, gradient.norm, z) else {
                return self.update(&rows, grads, &gradient, began);
            };
            if let Some(step) = self.ruined_by()? {
                return Ok(Next::Undo { step, trouble });
            }
            let guilty = self.guilty(&rows, trouble, grads)?;
            if !guilty.is_empty() {
                self.drop_rows(step, guilty)?;
            } else if matches!(trouble, Trouble::Spike { .. }) {
                // No row stands out and the parameters are sound: the batch is just hard.
                return self.update(&rows, grads, &gradient, began);
            } else if is_again {
                self.leave_out(step, trouble)?;
                let reason = format!(
                    "the {} of this batch is not a number, though of no single row",
                    trouble.what()
                );
                let rows = self.named(&self.plan.train, &rows, &reason);
                self.tell(RunEvent::RowsDropped {
                    step: step + 1,
                    rows,
                    for_good: false,
                })?;
            }
            is_again = true;
        }
    }

    /// Adds up the gradient of some examples.
    fn gradient(&mut self, batch: &[usize], grads: &mut [f32]) -> Result<Gradient, TrainError> {
        let params = &self.snapshot.params;
        let of = self.objective.gradient(self.model, params, batch, grads)?;
        Ok(Gradient {
            norm: optim::norm(self.model.compute(), grads),
            of,
        })
    }

    /// The loss of some examples.
    pub(super) fn loss(&mut self, side: Side, examples: &[usize]) -> Result<BatchLoss, TrainError> {
        let params = &self.snapshot.params;
        self.objective.loss(self.model, params, side, examples)
    }

    /// Moves the parameters, unless that would leave some that are no numbers.
    fn update(
        &mut self,
        batch: &[usize],
        grads: &[f32],
        gradient: &Gradient,
        began: std::time::Duration,
    ) -> Result<Next, TrainError> {
        let (optim, rows) = (&self.plan.settings.optim, &self.plan.train);
        let done = self.snapshot.state.step;
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
        let grads = (grads, clip_scale(gradient.norm, optim.clip_norm));
        let (params, opt) = (&mut self.snapshot.params, &mut self.snapshot.opt);
        if !opt.step(self.model.compute(), params, grads, lr, &config) {
            self.snapshot.state.last_update = Some((done, batch.to_vec()));
            return Ok(Next::Undo {
                step: done,
                trouble: Trouble::Update,
            });
        }
        self.model.set_params(&self.snapshot.params);

        let rows_of_batch = rows_of(batch, self.plan.settings.rows_per_example());
        let lens = rows_of_batch
            .iter()
            .map(|&row| rows[row].tokens.len() as u64);
        let tokens: u64 = lens.sum();
        let seconds = self.since(began);
        let state = &mut self.snapshot.state;
        state.step += 1;
        state.rows += batch.len() as u64;
        state.tokens += tokens;
        state.computed += gradient.of.computed;
        state.train_s += seconds;
        state.last_loss = gradient.of.loss.to_bits();
        state.last_update = Some((done, batch.to_vec()));
        state.guard.remember(gradient.of.loss);
        let event = RunEvent::Step {
            step: state.step,
            total: optim.steps,
            loss: gradient.of.loss,
            lr,
            tokens,
            computed: gradient.of.computed,
            grad_norm: gradient.norm,
            elapsed_s: state.train_s,
            tok_per_s: rate(state.tokens, state.train_s),
            preference: gradient.of.preference,
        };
        self.tell(event)?;
        Ok(Next::Go)
    }

    /// The last update, if the rows it learnt from now have a loss that is no number, or far above what it was.
    fn ruined_by(&mut self) -> Result<Option<usize>, TrainError> {
        let Some((step, rows)) = self.snapshot.state.last_update.clone() else {
            return Ok(None);
        };
        let settings = &self.plan.settings;
        let loss = self.loss(Side::Train, &rows)?.loss;
        let was = f64::from_bits(self.snapshot.state.last_loss);
        let limit = self.snapshot.state.guard.limit(settings.optim.spike_z);
        let is_ruined = !loss.is_finite() || limit.is_some_and(|limit| loss > was + limit.rise);
        Ok(is_ruined.then_some(step))
    }

    /// The rows that, taken alone, show the trouble; each with its reason.
    fn guilty(
        &mut self,
        batch: &[usize],
        trouble: Trouble,
        grads: &mut [f32],
    ) -> Result<Vec<(usize, String)>, TrainError> {
        let mut guilty = Vec::new();
        for &row in batch {
            let reason = match trouble {
                Trouble::Gradient => {
                    let norm = self.gradient(&[row], grads)?.norm;
                    (!norm.is_finite()).then(|| "its gradient is not a number".to_string())
                }
                _ => {
                    let loss = self.loss(Side::Train, &[row])?.loss;
                    match trouble {
                        _ if !loss.is_finite() => Some("its loss is not a number".to_string()),
                        Trouble::Spike { limit, .. }
                            if limit.is_passed_by_row(loss, batch.len()) =>
                        {
                            let usual = limit.median;
                            Some(format!("its loss is {loss:.2}, where {usual:.2} is usual"))
                        }
                        _ => None,
                    }
                }
            };
            guilty.extend(reason.map(|reason| (row, reason)));
        }
        Ok(guilty)
    }

    /// Trains on these rows no more, and says so.
    fn drop_rows(&mut self, step: usize, guilty: Vec<(usize, String)>) -> Result<(), TrainError> {
        let mut rows = Vec::new();
        for (row, reason) in guilty {
            self.snapshot.state.guard.dropped.insert(row);
            rows.extend(self.named(&self.plan.train, &[row], &reason));
        }
        self.tell(RunEvent::RowsDropped {
            step: step + 1,
            rows,
            for_good: true,
        })?;
        let n = self.snapshot.state.guard.dropped.len();
        if n > max_dropped(self.plan.n_train()) {
            return Err(TrainError::TooManyDropped {
                count: n,
                rows: self.plan.n_train(),
                step: step + 1,
            });
        }
        Ok(())
    }

    /// Makes no update at `step`; too many of those are the end.
    fn leave_out(&mut self, step: usize, trouble: Trouble) -> Result<(), TrainError> {
        let left_out = &mut self.snapshot.state.guard.left_out;
        left_out.insert(step);
        if left_out.len() > MAX_UNDONE {
            return Err(TrainError::Diverged {
                what: trouble.what(),
                step: step + 1,
                undone: MAX_UNDONE,
            });
        }
        Ok(())
    }

    /// Goes back before the update of `step` and leaves it out.
    pub(super) fn undo(&mut self, step: usize, trouble: Trouble) -> Result<(), TrainError> {
        let rows = match &self.snapshot.state.last_update {
            Some((last, rows)) if *last == step => rows.clone(),
            _ => Vec::new(),
        };
        self.leave_out(step, trouble)?;
        self.go_back(step)?;
        let event = RunEvent::RolledBack {
            step: step + 1,
            to: self.snapshot.state.step,
            reason: match trouble {
                Trouble::Update => "its update left parameters that are not numbers".to_string(),
                Trouble::Spike { loss, limit } => {
                    let usual = limit.median;
                    format!("after its update the loss was {loss:.2}, where {usual:.2} is usual")
                }
                _ => format!("after its update the {} was not a number", trouble.what()),
            },
            rows: self
                .named(&self.plan.train, &rows, "")
                .into_iter()
                .map(|row| row.place)
                .collect(),
        };
        self.tell(event)
    }

    /// Rows to validate on.
    pub(super) fn valid_rows(&self) -> Vec<usize> {
        let dropped = &self.snapshot.state.guard.dropped_valid;
        let all = 0..self.plan.n_valid();
        all.filter(|row| !dropped.contains(row)).collect()
    }

    /// What follows a validation loss that is no number: an update to take back, or fewer rows.
    pub(super) fn validation_trouble(
        &mut self,
        rows: &[usize],
    ) -> Result<Option<Next>, TrainError> {
        if let Some(step) = self.ruined_by()? {
            let trouble = Trouble::Loss;
            return Ok(Some(Next::Undo { step, trouble }));
        }
        let mut guilty = Vec::new();
        for &row in rows {
            if !self.loss(Side::Valid, &[row])?.loss.is_finite() {
                guilty.push(row);
            }
        }
        let step = self.snapshot.state.step;
        if guilty.is_empty() || guilty.len() == rows.len() {
            return Err(TrainError::Diverged {
                what: "validation loss",
                step,
                undone: 0,
            });
        }
        let rows = self.named(&self.plan.valid, &guilty, "its loss is not a number");
        self.snapshot.state.guard.dropped_valid.extend(guilty);
        self.tell(RunEvent::RowsDropped {
            step,
            rows,
            for_good: true,
        })?;
        Ok(None)
    }

    /// Where the dropped rows of this run stand.
    pub(super) fn places(&self) -> Vec<String> {
        let guard = &self.snapshot.state.guard;
        let place = |rows: &[TrainRow], dropped: Vec<usize>| {
            let named = self.named(rows, &dropped, "");
            named.into_iter().map(|row| row.place).collect::<Vec<_>>()
        };
        let mut places = place(&self.plan.train, guard.dropped.iter().copied().collect());
        places.extend(place(
            &self.plan.valid,
            guard.dropped_valid.iter().copied().collect(),
        ));
        places
    }

    /// Rows by file and line.
    fn named(&self, of: &[TrainRow], rows: &[usize], reason: &str) -> Vec<DroppedRow> {
        let data = &self.plan.settings.data;
        let is_valid = std::ptr::eq(of, self.plan.valid.as_slice());
        let path = if is_valid && data.valid_fraction == 0.0 {
            &data.valid
        } else {
            &data.train
        };
        let per_example = self.plan.settings.rows_per_example();
        let named = |row: &usize| DroppedRow {
            place: format!("{}:{}", path.display(), of[*row * per_example].line),
            reason: reason.to_string(),
        };
        rows.iter().map(named).collect()
    }
}
