//! What happens between steps: data, metrics, validation, samples, checkpoints, signals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mambabyte_datasets::progress::Silent;
use mambabyte_datasets::{Batch, Loader, Sampler, SamplerConfig, SamplingMode, Shards};

use super::checkpoint::{Checkpoint, Progress};
use super::fit::fit;
use super::interrupt;
use super::learner::Learner;
use super::metrics::{MetricRecord, MetricsWriter, bits};
use super::progress::Display;
use super::run_dir::{RunDir, resolve_checkpoint};
use super::schedule::learning_rate;
use crate::config::{Config, Mode};
use crate::device::budget::Budget;
use crate::error::{Error, Result};
use crate::eval::{self, EvalOptions};
use crate::generate::{Generator, SampleOptions};

/// Batches that the loader prepares ahead.
const QUEUE: usize = 4;

/// A run at work.
struct Run<'a> {
    config: Config,
    dir: RunDir,
    learner: Learner,
    budget: &'a Budget,
    metrics: MetricsWriter,
    sampler: Arc<Sampler>,
    validation: Option<Shards>,
    progress: Progress,
}

/// Starts a new run in `path`, from the weights of the checkpoint `init` if there is one; stops after `stop_after` steps as if it had been interrupted there.
pub fn start(
    config: &Config,
    path: &Path,
    init: Option<&Path>,
    stop_after: Option<u64>,
) -> Result<()> {
    let init = open_init(config, init)?;
    let (device, budget, settled) = Budget::open(config)?;
    // Data first: a run that cannot read any leaves no folder behind.
    let (sampler, validation) = open_data(&settled)?;
    let config = fit(config, settled, &budget, &device)?;
    let dir = RunDir::create(path, &config)?;
    let progress = Progress {
        step: 0,
        bytes_seen: 0,
        data: Some(sampler.shards().identity().to_owned()),
        valid_bpb: None,
    };
    budget.guard(&config, || {
        let mut learner = Learner::new(&config, &device);
        if let Some(checkpoint) = &init {
            load_weights(checkpoint, &mut learner)?;
        }
        Run {
            config: config.clone(),
            metrics: MetricsWriter::append(&dir.metrics())?,
            dir,
            learner,
            budget: &budget,
            sampler,
            validation,
            progress,
        }
        .go(stop_after)
    })
}

/// Goes on with the run in `path` from its newest checkpoint that is whole.
pub fn resume(path: &Path, stop_after: Option<u64>) -> Result<()> {
    let dir = RunDir::open(path)?;
    let asked = dir.config()?;
    let (device, budget, settled) = Budget::open(&asked)?;
    let (sampler, validation) = open_data(&settled)?;
    let config = fit(&asked, settled, &budget, &device)?;
    budget.guard(&config, || {
        let mut learner = Learner::new(&config, &device);
        let progress = restore(&dir, &mut learner, &sampler, &config)?;
        if progress.step >= config.train.steps {
            eprintln!(
                "the run is finished: all {} steps of `train.steps` are done",
                config.train.steps
            );
            return Ok(());
        }
        let mut metrics = MetricsWriter::append(&dir.metrics())?;
        metrics.write(&MetricRecord::Resume {
            step: progress.step,
        })?;
        Run {
            config: config.clone(),
            dir,
            learner,
            budget: &budget,
            metrics,
            sampler,
            validation,
            progress,
        }
        .go(stop_after)
    })
}

/// The checkpoint that a run starts from, which has a model of the config's shapes.
fn open_init(config: &Config, init: Option<&Path>) -> Result<Option<Checkpoint>> {
    let Some(path) = init else {
        return Ok(None);
    };
    let folder = resolve_checkpoint(path)?;
    let checkpoint = Checkpoint::open(&folder)?;
    let model = &checkpoint.config().model;
    if !model.same_shapes(&config.model) {
        return Err(Error::Checkpoint {
            path: folder.clone(),
            reason: format!(
                "has a model of {} parameters ({} wide, {} layers, {} norm) and other shapes than \
                 the config's, which has {} ({} wide, {} layers, {} norm)",
                model.num_params(),
                model.dim,
                model.depth,
                model.norm,
                config.model.num_params(),
                config.model.dim,
                config.model.depth,
                config.model.norm,
            ),
            hint: format!(
                "copy the section `[model]` of `{}` into the run's config",
                folder.join("config.toml").display()
            ),
        });
    }
    Ok(Some(checkpoint))
}

/// Puts a checkpoint's weights, and nothing else of it, into `learner`.
fn load_weights(checkpoint: &Checkpoint, learner: &mut Learner) -> Result<()> {
    let device = learner.inner_device();
    device.memory_persistent_allocations((checkpoint, learner), |(checkpoint, learner)| {
        checkpoint.restore_weights(learner)
    })?;
    // The initial weights are gone; the allocator keeps their memory until it is asked.
    device.memory_cleanup();
    Ok(())
}

/// Puts the newest checkpoint that is whole into `learner`; a run stopped before its first one
/// starts again.
fn restore(
    dir: &RunDir,
    learner: &mut Learner,
    sampler: &Sampler,
    config: &Config,
) -> Result<Progress> {
    let Some(checkpoint) = newest_whole(dir)? else {
        return Ok(Progress {
            step: 0,
            bytes_seen: 0,
            data: Some(sampler.shards().identity().to_owned()),
            valid_bpb: None,
        });
    };
    let progress = checkpoint.progress();
    check_data(&progress, sampler.shards(), config)?;
    let device = learner.inner_device();
    // What stays for the whole run does not belong between activations, where it would keep pages
    // from being used whole.
    device.memory_persistent_allocations((checkpoint, learner), |(checkpoint, learner)| {
        checkpoint.restore(learner)
    })?;
    // The initial weights are gone; the allocator keeps their memory until it is asked.
    device.memory_cleanup();
    Ok(progress)
}

/// Batches of the training split, and the validation split where it is used.
fn open_data(config: &Config) -> Result<(Arc<Sampler>, Option<Shards>)> {
    let train = &config.train;
    let sampler = Sampler::new(
        Arc::new(Shards::open(config.data.path.join("train"))?),
        SamplerConfig {
            batch: train.batch * train.accumulation,
            length: train.length,
            seed: train.seed,
            mode: match train.mode {
                Mode::Independent => SamplingMode::Independent,
                Mode::Contiguous => SamplingMode::Contiguous,
            },
        },
    )?;
    let validation = match train.validate_every > 0 {
        true => Some(Shards::open(config.data.path.join("validation"))?),
        false => None,
    };
    Ok((Arc::new(sampler), validation))
}

/// The newest checkpoint whose files are what was written; damaged ones are named and passed over.
fn newest_whole(dir: &RunDir) -> Result<Option<Checkpoint>> {
    let mut last_error = None;
    for (_, folder) in dir.checkpoints()?.into_iter().rev() {
        match Checkpoint::open(&folder) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => {
                tracing::warn!("passed over: {error}");
                last_error = Some(error);
            }
        }
    }
    match last_error {
        // Starting anew where weeks of work are damaged is not for this program to decide.
        Some(error) => Err(error),
        None => Ok(None),
    }
}

fn check_data(progress: &Progress, train: &Shards, config: &Config) -> Result<()> {
    match &progress.data {
        Some(data) if data != train.identity() => Err(Error::Usage {
            message: format!(
                "the run learnt from data `{data}`, and `{}` now holds `{}`",
                config.data.path.join("train").display(),
                train.identity()
            ),
            hint: "put the run's data back, or start a new run with the new data".to_owned(),
        }),
        _ => Ok(()),
    }
}

impl Run<'_> {
    /// Steps until the end of the run, `stop_after` more steps, or a signal.
    fn go(mut self, stop_after: Option<u64>) -> Result<()> {
        interrupt::watch();
        let total = self.config.train.steps;
        let first = self.progress.step;
        let last = stop_after.map_or(total, |n| total.min(first + n));
        let mut loader = Loader::spawn(Arc::clone(&self.sampler), first, QUEUE)?;
        let compiles = self.budget.on_gpu();
        let mut display = Display::new(total, first, compiles);
        for step in first + 1..=last {
            let started = Instant::now();
            let batch = loader.next()?;
            self.train_step(step, &batch, started, &mut display)?;
            self.between_steps(step, &display)?;
            let stopping = interrupt::requested();
            if self.checkpoint_due(step) || step == last || stopping {
                self.save()?;
            }
            if stopping {
                display.finish();
                return Err(Error::Interrupted {
                    state: format!(
                        "saved step {step}; go on with `mambabyte resume {}`",
                        self.dir.path().display()
                    ),
                });
            }
        }
        display.finish();
        Ok(())
    }

    /// One optimizer step and its record.
    fn train_step(
        &mut self,
        step: u64,
        batch: &Batch,
        started: Instant,
        display: &mut Display,
    ) -> Result<()> {
        let lr = learning_rate(step, &self.config.optimizer, &self.config.train);
        let report = self.learner.step(batch, step, lr)?;
        let seconds = started.elapsed().as_secs_f64();
        let bytes = self.config.train.bytes_per_step();
        let bytes_per_second = bytes as f64 / seconds;
        self.progress.step = step;
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
            })?;
        }
        display.step(step, bpb, lr, bytes_per_second);
        Ok(())
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
        let options = EvalOptions {
            length: self.config.train.length,
            batch: self.config.train.batch,
            max_bytes: Some(self.config.train.validate_bytes),
        };
        let device = self.learner.inner_device();
        let score = eval::evaluate(&self.learner.model(), &device, shards, &options, &Silent)?;
        let bpb = score.bits_per_byte();
        self.progress.valid_bpb = Some(bpb);
        self.metrics.write(&MetricRecord::Valid {
            step,
            bpb,
            bytes: score.bytes,
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
        let options = SampleOptions {
            // Another sample at every step, the same one in a run that is resumed.
            seed: train.seed.wrapping_add(step),
            ..SampleOptions::default()
        };
        let model = self.learner.model();
        let device = self.learner.inner_device();
        let mut generator =
            Generator::new(&model, &device, train.sample_prompt.as_bytes(), options);
        let bytes: Vec<u8> = (0..train.sample_bytes)
            .map(|_| generator.next_byte())
            .collect();
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

    fn save(&mut self) -> Result<PathBuf> {
        self.metrics.sync()?;
        let folder = Checkpoint::save(self.dir.path(), &self.learner, &self.progress)?;
        self.dir.prune(&self.config.checkpoint)?;
        Ok(folder)
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
