//! What happens between steps: data, metrics, validation, samples, checkpoints, signals, and going
//! back where it went wrong.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use mambabyte_datasets::progress::Silent;
use mambabyte_datasets::{Batch, Loader, Sampler, Shards};

use super::checkpoint::{Checkpoint, Manifest, Progress, Snapshot};
use super::guard::Verdict;
use super::inspect::inspect;
use super::interrupt;
use super::launch::put_back;
use super::learner::{Learner, StepReport};
use super::metrics::{BadStep, MetricRecord, MetricsWriter, bits};
use super::progress::Display;
use super::run_dir::{self, RunDir};
use super::saver::{Saved, Saver};
use super::schedule::learning_rate;
use super::telemetry::{Machine, StepTimes, gib};
use crate::config::Config;
use crate::device::budget::Budget;
use crate::error::{Error, Result};
use crate::eval::{self, Context, EvalOptions, Lanes};
use crate::generate::{Generator, GeneratorOptions, Request};
use crate::terminal::say;

/// Batches that the loader prepares ahead.
const QUEUE: usize = 4;

/// A run at work.
pub(super) struct Run<'a> {
    config: Config,
    /// Before the folder, whose lock goes with it: fields are dropped in their order, and this one waits
    /// for the save at work.
    saver: Saver,
    dir: RunDir,
    learner: Learner,
    budget: &'a Budget,
    metrics: MetricsWriter,
    sampler: Arc<Sampler>,
    validation: Option<Shards>,
    progress: Progress,
    /// Step of the newest save that was begun, or from which the run goes on.
    begun: Option<u64>,
    machine: Machine,
    /// Seconds that training stood still for checkpoints since the last line of metrics.
    paused: f64,
}

impl<'a> Run<'a> {
    /// A run at the place `progress`, to which `learner` has been brought. `data` are its batches,
    /// and the validation split where it is used.
    pub(super) fn new(
        config: &Config,
        dir: RunDir,
        learner: Learner,
        budget: &'a Budget,
        metrics: MetricsWriter,
        data: (Arc<Sampler>, Option<Shards>),
        progress: Progress,
    ) -> Self {
        Self {
            config: config.clone(),
            learner,
            budget,
            metrics,
            saver: Saver::new(dir.path().to_owned(), config.checkpoint.clone()),
            dir,
            sampler: data.0,
            validation: data.1,
            begun: Some(progress.step),
            progress,
            machine: Machine::watch(config, budget.on_gpu()),
            paused: 0.0,
        }
    }

    /// Steps until the end of the run, `stop_after` more steps, or a signal.
    pub(super) fn go(mut self, stop_after: Option<u64>) -> Result<()> {
        interrupt::watch();
        let total = self.config.train.steps;
        let first = self.progress.step;
        let last = stop_after.map_or(total, |n| total.min(first.saturating_add(n)));
        let mut loader = self.loader()?;
        let compiles = self.budget.on_gpu();
        let mut display = Display::new(total, first, compiles);
        while self.progress.step < last && !interrupt::requested() {
            let started = Instant::now();
            let batch = match loader.next() {
                Ok(batch) => batch,
                Err(error) => return Err(self.without_data(error.into())),
            };
            if self.advance(&batch, started, &mut display)? {
                loader = self.loader()?;
            }
        }
        display.finish();
        self.finish(last)?;
        if last < total {
            say(&format!(
                "stopped at step {last} of {total}, and saved; go on with `mambabyte resume {}`",
                self.dir.path().display()
            ));
        }
        Ok(())
    }

    /// One step and what follows it. Returns whether the run went back, so that other batches come
    /// next.
    fn advance(&mut self, batch: &Batch, started: Instant, display: &mut Display) -> Result<bool> {
        let step = self.progress.step + 1;
        let verdict = self.train_step(step, batch, started, display)?;
        if let Verdict::RollBack(bad) = verdict {
            self.roll_back(bad, display)?;
        } else {
            self.between_steps(step, display)?;
            if self.checkpoint_due(step) {
                self.save()?;
            }
        }
        if let Some(saved) = self.saver.ended() {
            self.note_saved(&saved)?;
        }
        Ok(matches!(verdict, Verdict::RollBack(_)))
    }

    /// The batches that come next.
    fn loader(&self) -> Result<Loader> {
        let next = self.progress.batch_of(self.progress.step + 1);
        Ok(Loader::spawn(Arc::clone(&self.sampler), next, QUEUE)?)
    }

    /// The last checkpoint, and the error of a run that was asked to stop before its `last` step.
    fn finish(&mut self, last: u64) -> Result<()> {
        if self.progress.step != self.begun.unwrap_or(0) {
            self.save()?;
        }
        if let Some(saved) = self.saver.wait() {
            self.metrics.write(&saved.record())?;
            saved.result?;
        }
        self.metrics.finish()?;
        match self.progress.step < last {
            true => Err(Error::Interrupted {
                state: match self.progress.step {
                    0 => "no step was done yet".to_owned(),
                    step => format!(
                        "saved step {step}; go on with `mambabyte resume {}`",
                        self.dir.path().display()
                    ),
                },
            }),
            false => Ok(()),
        }
    }

    /// Saves what was done since the last save, before a run without data ends; returns `error`.
    fn without_data(&mut self, error: Error) -> Error {
        if self.progress.step != self.begun.unwrap_or(0) {
            match self.finish(self.progress.step) {
                Ok(()) => say(&format!("saved step {}", self.progress.step)),
                Err(unsaved) => tracing::warn!("step {}: {unsaved}", self.progress.step),
            }
        }
        error
    }

    /// One optimizer step and its record.
    fn train_step(
        &mut self,
        step: u64,
        batch: &Batch,
        started: Instant,
        display: &mut Display,
    ) -> Result<Verdict> {
        let lr = learning_rate(step, &self.config.optimizer, &self.config.train);
        let limit = self.progress.guard.limit(&self.config.guard);
        let waited = started.elapsed().as_secs_f64();
        let every = self.config.train.inspect_every;
        let look = every > 0 && step.is_multiple_of(every);
        self.learner.look(look);
        let report = self.learner.step(batch, lr, limit);
        let seconds = started.elapsed().as_secs_f64();
        let guard = &mut self.progress.guard;
        let verdict = guard.judge(&report, limit, &self.config.guard);
        self.progress.step = step;
        if let Verdict::Skipped(bad) | Verdict::RollBack(bad) = verdict {
            self.skipped(bad, &report, limit, display)?;
            return Ok(verdict);
        }
        let bytes = self.config.train.bytes_per_step();
        let bytes_per_second = bytes as f64 / seconds;
        self.progress.bytes_seen += bytes;
        let bpb = bits(report.loss_nats.into()) as f32;
        if step.is_multiple_of(self.config.train.log_every) {
            let memory = self.budget.used(&self.learner.inner_device());
            self.budget.check(memory, &self.config)?;
            self.metrics.write(&MetricRecord::Train {
                step,
                loss_nats: report.loss_nats,
                bpb,
                lr,
                grad_norm: report.grad_norm,
                bytes_per_second,
                bytes_seen: self.progress.bytes_seen,
                seconds,
                memory_gib: memory.map(|it| gib(it.reserved)),
                memory_in_use_gib: memory.map(|it| gib(it.in_use)),
                times: StepTimes {
                    wait_seconds: waited,
                    save_seconds: (self.paused > 0.0).then_some(self.paused),
                    ..self.learner.times()
                },
                machine: self.machine.read(seconds),
            })?;
            self.paused = 0.0;
        }
        if look {
            self.inspect(step, batch)?;
        }
        display.step(step, bpb, lr, bytes_per_second);
        Ok(verdict)
    }

    /// Looks into the model and records what is there.
    fn inspect(&mut self, step: u64, batch: &Batch) -> Result<()> {
        let started = Instant::now();
        let sketch = self.learner.sketch();
        let device = self.learner.inner_device();
        let bytes = &batch.inputs[batch.row(0)];
        let inspection = inspect(&self.learner.model(), sketch, bytes, &device);
        self.metrics.write(&MetricRecord::Inspect {
            step,
            seconds: started.elapsed().as_secs_f64(),
            inspection,
        })
    }

    /// Records that the step just made was not applied, and which bytes it had.
    fn skipped(
        &mut self,
        reason: BadStep,
        report: &StepReport,
        limit: Option<f32>,
        display: &Display,
    ) -> Result<()> {
        let step = self.progress.step;
        self.progress.skipped_updates += 1;
        let batch = self.progress.batch_of(step);
        let rows = 0..self.sampler.config().batch;
        let places: Vec<_> = rows
            .map(|row| self.sampler.coordinates(batch, row))
            .collect();
        display.note(&format!(
            "step {step}: not applied: {}",
            describe(report, limit)
        ));
        self.metrics.write(&MetricRecord::Skip {
            step,
            reason,
            loss_nats: report.loss_nats.is_finite().then_some(report.loss_nats),
            grad_norm: report.grad_norm.is_finite().then_some(report.grad_norm),
            limit_nats: limit,
            in_a_row: self.progress.guard.in_a_row(),
            batch,
            epoch: places.first().map_or(0, |it| it.epoch),
            offsets: places.iter().map(|it| it.offset).collect(),
        })
    }

    /// Goes back to the last good checkpoint, and on with the batches behind those seen.
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`] where there is none, or where that was done often enough.
    fn roll_back(&mut self, reason: BadStep, display: &Display) -> Result<()> {
        if let Some(saved) = self.saver.wait() {
            self.note_saved(&saved)?;
        }
        let from = self.progress.step;
        let rows = self.config.guard.bad_steps;
        let diverged = |why: String| Error::Diverged {
            step: from,
            reason: format!("{rows} steps in a row could not be applied, and {why}"),
            hint:
                "resume with a lower `optimizer.lr` or a longer `optimizer.warmup_steps`; if the \
                   losses are high because the text is unusual, raise `guard.spike`"
                    .to_owned(),
        };
        if self.config.guard.rollbacks == 0 {
            return Err(diverged(
                "the run does not go back: `guard.rollbacks` is 0".to_owned(),
            ));
        }
        let Some(checkpoint) = self.last_good()? else {
            return Err(diverged(
                "there is no good checkpoint to go back to".to_owned(),
            ));
        };
        let there = checkpoint.progress();
        let guard = &self.progress.guard;
        let guard = guard.back_to(there.step, &there.guard, &self.config.guard);
        let Some(guard) = guard else {
            return Err(diverged(format!(
                "going back to step {} did not help {} times",
                there.step, self.config.guard.rollbacks
            )));
        };
        put_back(&checkpoint, &mut self.learner)?;
        // What comes next does not follow what the lanes remember.
        self.learner.forget();
        self.progress = Progress {
            guard,
            skipped_batches: self.progress.batch_of(from + 1) - there.step,
            ..there.clone()
        };
        self.begun = None;
        self.abandon_after(there.step);
        let (step, skipped_batches) = (self.progress.step, self.progress.skipped_batches);
        display.note(&format!(
            "step {from}: back to step {step}, and on with batch {}",
            step + skipped_batches
        ));
        self.metrics.write(&MetricRecord::Rollback {
            step,
            from,
            reason,
            offset: there.metrics_bytes,
            skipped_batches,
        })
    }

    /// The newest checkpoint that is whole, was planned, and was not made between bad steps.
    fn last_good(&self) -> Result<Option<Checkpoint>> {
        for (_, folder) in self.dir.checkpoints()?.into_iter().rev() {
            match Manifest::read(&folder) {
                Ok(manifest) if !manifest.progress.is_good() => continue,
                Ok(_) => match Checkpoint::open(&folder) {
                    Ok(checkpoint) => return Ok(Some(checkpoint)),
                    Err(error) => tracing::warn!("passed over: {error}"),
                },
                Err(error) => tracing::warn!("passed over: {error}"),
            }
        }
        Ok(None)
    }

    /// Deletes checkpoints of the way that was given up, so that none of them is the newest.
    fn abandon_after(&self, step: u64) {
        let checkpoints = self.dir.checkpoints().unwrap_or_default();
        for (_, folder) in checkpoints.iter().filter(|it| it.0 > step) {
            if let Err(error) = run_dir::remove(folder) {
                tracing::warn!("a checkpoint of the way given up stays: {error}");
            }
        }
    }

    /// Validation and samples, where they are due; both at the end of the run.
    fn between_steps(&mut self, step: u64, display: &Display) -> Result<()> {
        let end = step == self.config.train.steps;
        let due = |every: u64| every > 0 && (step.is_multiple_of(every) || end);
        if due(self.config.train.validate_every) {
            self.validate(step, display)?;
        }
        if due(self.config.train.sample_every) {
            self.sample(step, display)?;
        }
        Ok(())
    }

    fn validate(&mut self, step: u64, display: &Display) -> Result<()> {
        let Some(shards) = &self.validation else {
            return Ok(());
        };
        let started = Instant::now();
        let train = &self.config.train;
        let options = EvalOptions {
            context: Context::Windows {
                length: train.length,
            },
            lanes: Lanes {
                count: train.batch,
                positions: train.batch * train.length,
            },
            max_bytes: Some(train.validate_bytes),
        };
        let device = self.learner.inner_device();
        let model = self.learner.model();
        let score = match eval::evaluate(&model, &device, shards, &options, &Silent) {
            Ok(measured) => measured.total(),
            Err(Error::Data(error)) => {
                tracing::warn!("step {step} is not validated: {error}");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let bpb = score.bits_per_byte();
        if !bpb.is_finite() {
            display.note(&format!("step {step}: the validation is no number"));
            return Ok(());
        }
        self.progress.valid_bpb = Some(bpb);
        self.metrics.write(&MetricRecord::Valid {
            step,
            bpb,
            bytes: score.bytes,
            word_perplexity: shards
                .info()
                .bytes_per_word()
                .map(|bytes| (bpb * bytes).exp2()),
            seconds: started.elapsed().as_secs_f64(),
        })?;
        display.note(&format!(
            "step {step}: {bpb:.4} bits per byte on {} held-out bytes",
            score.bytes
        ));
        Ok(())
    }

    fn sample(&mut self, step: u64, display: &Display) -> Result<()> {
        let train = &self.config.train;
        let request = Request {
            // Another sample at every step, the same one in a run that is resumed.
            seed: train.seed.wrapping_add(step),
            max_new_bytes: train.sample_bytes,
            ..Request::new(train.sample_prompt.as_bytes())
        };
        let options = GeneratorOptions {
            // Training leaves no memory for another copy of the weights.
            plain: true,
            ..GeneratorOptions::default()
        };
        let mut generator =
            Generator::new(self.learner.model(), &self.learner.inner_device(), options);
        let texts = match generator.generate(&[request], &mut |_| ControlFlow::Continue(())) {
            // What to do about such weights the guard decides.
            Err(error @ Error::NotNumbers { .. }) => {
                display.note(&format!("step {step}: no sample: {error}"));
                return Ok(());
            }
            texts => texts?,
        };
        let bytes = texts
            .into_iter()
            .flat_map(|text| text.bytes)
            .collect::<Vec<u8>>();
        let text = mambabyte_datasets::text::lossy_text(&bytes);
        display.note(&format!(
            "step {step}: sample\n{}{text}\n",
            train.sample_prompt
        ));
        self.metrics.write(&MetricRecord::Sample {
            step,
            prompt: train.sample_prompt.clone(),
            text,
        })
    }

    fn checkpoint_due(&self, step: u64) -> bool {
        let every = self.config.checkpoint.every_steps;
        every > 0 && step.is_multiple_of(every)
    }

    /// Begins to save where the run is.
    fn save(&mut self) -> Result<()> {
        let started = Instant::now();
        if let Some(saved) = self.saver.wait() {
            self.note_saved(&saved)?;
        }
        self.begun = Some(self.progress.step);
        self.progress.planned = self.checkpoint_due(self.progress.step);
        self.progress.metrics_bytes = Some(self.metrics.written());
        let snapshot = Snapshot::take(&self.learner, &self.progress);
        self.paused += started.elapsed().as_secs_f64();
        self.saver
            .begin(snapshot, started.elapsed(), self.metrics.file())
    }

    /// Records a save. One that failed does not end the run, which at its end tries again.
    fn note_saved(&mut self, saved: &Saved) -> Result<()> {
        saved.warn();
        if saved.result.is_err() && self.begun == Some(saved.step) {
            self.begun = None;
        }
        self.metrics.write(&saved.record())
    }
}

/// Why a step was not applied.
fn describe(report: &StepReport, limit: Option<f32>) -> String {
    let numbers = format!(
        "loss {} nats, gradient norm {}",
        report.loss_nats, report.grad_norm
    );
    match limit.filter(|_| report.is_finite()) {
        Some(limit) => format!("{numbers}; a loss above {limit} is a spike"),
        None => numbers,
    }
}

#[cfg(test)]
mod tests;
