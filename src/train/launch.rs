//! How a run begins: a new one, or one that goes on from its newest whole checkpoint.

use std::path::Path;
use std::sync::Arc;

use mambabyte_datasets::shards::OpenOptions;
use mambabyte_datasets::{Sampler, SamplerConfig, SamplingMode, Shards};

use super::checkpoint::{Checkpoint, DataIdentity, Progress};
use super::fit::fit;
use super::learner::Learner;
use super::metrics::{MetricRecord, MetricsWriter};
use super::run::Run;
use super::run_dir::{RunDir, resolve_checkpoint};
use crate::config::{Config, Mode};
use crate::device::budget::Budget;
use crate::error::{Error, Result};
use crate::terminal::say;

/// Keys of `[model]` that change how fast a model is, or nothing here, and not which one it is.
const SPEED: [&str; 5] = [
    "preset",
    "pscan",
    "fused_add_norm",
    "use_fast_path",
    "residual_in_fp32",
];

/// Starts a new run in `path`, from the weights of the checkpoint `init` if there is one; stops after
/// `stop_after` steps as if it had been interrupted there.
///
/// Initial weights follow from the seed, those of `init` do not: they become the run's checkpoint of
/// step 0, so that a run which is stopped before its first one begins again from them.
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
    let dir = RunDir::create(path, init.is_some())?;
    let progress = Progress::start(&data_identity(sampler.shards()));
    budget.guard(&config, || {
        let mut learner = Learner::new(&config, &device);
        if let Some(checkpoint) = &init {
            load_weights(checkpoint, &mut learner)?;
            Checkpoint::save(dir.path(), &learner, &progress)?;
        }
        dir.begin(&config)?;
        let metrics = open_metrics(&dir, &config, 0)?;
        let data = (sampler, validation);
        Run::new(&config, dir, learner, &budget, metrics, data, progress).go(stop_after)
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
            say(&format!(
                "the run is finished: all {} steps of `train.steps` are done",
                config.train.steps
            ));
            return Ok(());
        }
        let mut metrics = open_metrics(&dir, &config, progress.step)?;
        check_metrics(&metrics, &progress);
        metrics.write(&MetricRecord::Resume {
            step: progress.step,
            offset: progress.metrics_bytes,
        })?;
        let data = (sampler, validation);
        Run::new(&config, dir, learner, &budget, metrics, data, progress).go(stop_after)
    })
}

/// The run's metrics from `step` on, with event files where the config says so.
fn open_metrics(dir: &RunDir, config: &Config, step: u64) -> Result<MetricsWriter> {
    let metrics = MetricsWriter::append(&dir.metrics())?;
    Ok(match config.train.tensorboard {
        true => metrics.with_events(step),
        false => metrics,
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
/// starts again from the seed's weights, as it did: one with other weights has one of step 0.
fn restore(
    dir: &RunDir,
    learner: &mut Learner,
    sampler: &Sampler,
    config: &Config,
) -> Result<Progress> {
    let now = data_identity(sampler.shards());
    let Some(checkpoint) = newest_whole(dir)? else {
        if let Some(step) = dir.last_saved() {
            tracing::warn!(
                "the run has saved step {step}, and has no checkpoint any more: it begins again at step 1"
            );
        }
        return Ok(Progress::start(&now));
    };
    let progress = checkpoint.progress().clone();
    check_data(&progress, &now, config)?;
    check_config(&checkpoint, dir, config)?;
    put_back(&checkpoint, learner)?;
    Ok(progress)
}

/// Puts weights, moments and carried states of `checkpoint` into `learner`.
pub(super) fn put_back(checkpoint: &Checkpoint, learner: &mut Learner) -> Result<()> {
    let device = learner.inner_device();
    // What stays for the whole run does not belong between activations, where it would keep pages
    // from being used whole.
    device.memory_persistent_allocations((checkpoint, learner), |(checkpoint, learner)| {
        checkpoint.restore(learner)
    })?;
    // The initial weights are gone; the allocator keeps their memory until it is asked.
    device.memory_cleanup();
    Ok(())
}

/// Batches of the training split, and the validation split where it is used.
pub(super) fn open_data(config: &Config) -> Result<(Arc<Sampler>, Option<Shards>)> {
    let train = &config.train;
    let sampler = Sampler::new(
        Arc::new(Shards::open_with(
            config.data.path.join("train"),
            OpenOptions::CHECKED,
        )?),
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
        true => Some(Shards::open_with(
            config.data.path.join("validation"),
            OpenOptions::CHECKED,
        )?),
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

fn data_identity(train: &Shards) -> DataIdentity {
    DataIdentity {
        hash: train.identity().to_owned(),
        bytes: train.byte_count(),
        documents: train.document_count(),
    }
}

/// That the data is what the run has learnt from.
fn check_data(progress: &Progress, now: &DataIdentity, config: &Config) -> Result<()> {
    let Some(before) = progress.data.as_ref().filter(|hash| **hash != now.hash) else {
        return Ok(());
    };
    // Checkpoints of before this was recorded have no counts.
    let counts = |documents, bytes| match bytes {
        0 => String::new(),
        _ => format!("{documents} documents of {bytes} bytes together, "),
    };
    Err(Error::Usage {
        message: format!(
            "the run learnt from other data: {}identity {before}; `{}` now holds {}identity {}",
            counts(progress.data_documents, progress.data_bytes),
            config.data.path.join("train").display(),
            counts(now.documents, now.bytes),
            now.hash
        ),
        hint: "put the run's data back, or start a new run with the new data".to_owned(),
    })
}

/// That the run's config still describes the run that was saved, as far as a resumed run could not be
/// the same one.
fn check_config(checkpoint: &Checkpoint, dir: &RunDir, config: &Config) -> Result<()> {
    let differences = differences(checkpoint.config(), config);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::Checkpoint {
        path: dir.path().to_owned(),
        reason: format!(
            "the run's config is not that of its newest checkpoint, step {}:\n  {}",
            checkpoint.progress().step,
            differences.join("\n  ")
        ),
        hint: format!(
            "set it back in `{}`, or start a new run; `mambabyte train --init` takes the weights \
             of this one",
            dir.path().join("config.toml").display()
        ),
    })
}

/// What differs between two configs that decides about model, data order or moments: one line each.
fn differences(saved: &Config, now: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let mut compare = |key: &str, saved: String, now: String| {
        if saved != now {
            lines.push(format!("`{key}` was {saved}, and is {now}"));
        }
    };
    let models =
        [saved, now].map(|config| toml::Table::try_from(&config.model).unwrap_or_default());
    for (key, value) in &models[0] {
        if !SPEED.contains(&key.as_str()) {
            let other = models[1]
                .get(key)
                .map_or_else(String::new, ToString::to_string);
            compare(&format!("model.{key}"), value.to_string(), other);
        }
    }
    let (a, b) = (&saved.train, &now.train);
    compare("train.length", a.length.to_string(), b.length.to_string());
    compare("train.seed", a.seed.to_string(), b.seed.to_string());
    let mode = |mode| match mode {
        Mode::Independent => "\"independent\"".to_owned(),
        Mode::Contiguous => "\"contiguous\"".to_owned(),
    };
    compare("train.mode", mode(a.mode), mode(b.mode));
    let rows = |it: &crate::config::TrainConfig| (it.batch * it.accumulation).to_string();
    compare("train.batch` x `train.accumulation", rows(a), rows(b));
    if a.mode == Mode::Contiguous && rows(a) == rows(b) {
        // Carried states are stored in micro-batches.
        compare("train.batch", a.batch.to_string(), b.batch.to_string());
    }
    let state = |it: &Config| format!("\"{}\"", it.optimizer.state);
    compare("optimizer.state", state(saved), state(now));
    lines
}

/// Says so if metrics that the checkpoint knows of are gone. Training does not need them.
fn check_metrics(metrics: &MetricsWriter, progress: &Progress) {
    let missing = progress
        .metrics_bytes
        .unwrap_or(0)
        .saturating_sub(metrics.written());
    if missing > 0 {
        tracing::warn!("{missing} bytes of `metrics.jsonl` from before the checkpoint are gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(settings: &[&str]) -> Config {
        let text = "model.dim = 16\nmodel.depth = 2\ntrain.steps = 9\ndata.path = \"x\"";
        let settings: Vec<String> = settings.iter().map(|it| (*it).to_owned()).collect();
        Config::parse("config", text, &settings).expect("valid")
    }

    #[test]
    fn every_difference_that_decides_is_named() {
        let before = config(&["train.batch=4"]);
        let now = config(&[
            "model.dim=24",
            "model.norm=rms",
            "train.batch=2",
            "train.seed=1",
            "train.length=64",
            "train.mode=contiguous",
            "optimizer.state=int8",
        ]);
        let found = differences(&before, &now).join("\n");
        for line in [
            "`model.dim` was 16, and is 24",
            "`model.norm` was \"layer\", and is \"rms\"",
            "`train.length` was 8192, and is 64",
            "`train.seed` was 4740, and is 1",
            "`train.mode` was \"independent\", and is \"contiguous\"",
            "`train.batch` x `train.accumulation` was 4, and is 2",
            "`optimizer.state` was \"fp32\", and is \"int8\"",
        ] {
            assert!(found.contains(line), "{line}\n{found}");
        }
        assert_eq!(found.lines().count(), 7, "{found}");
    }

    #[test]
    fn what_may_change_may_change() {
        let before = config(&["train.batch=4"]);
        let now = config(&[
            "train.batch=2",
            "train.accumulation=2",
            "train.steps=100",
            "train.recompute=all",
            "optimizer.lr=1e-5",
            "optimizer.min_lr=0",
            "checkpoint.every_steps=7",
            "model.use_fast_path=false",
            "model.residual_in_fp32=false",
        ]);
        assert_eq!(differences(&before, &now), Vec::<String>::new());
        let lanes = |batch| {
            let batch = format!("train.batch={batch}");
            let accumulation = if batch.ends_with('4') { 1 } else { 2 };
            let accumulation = format!("train.accumulation={accumulation}");
            config(&["train.mode=contiguous", &batch, &accumulation])
        };
        let found = differences(&lanes(4), &lanes(2));
        assert_eq!(found, ["`train.batch` was 4, and is 2"]);
    }
}
