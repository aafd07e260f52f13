//! The sections besides `[model]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::model::MambaConfig;
use super::section::{Bounds, MAX, Section};
use super::values::{DeviceKind, MemoryLimit, Mode, OptimizerState, Precision, Recompute};

/// More than any run takes, and far from where step counts times byte counts overflow.
const MOST_STEPS: u64 = 1_000_000_000;

/// Parameters of fewer numbers keep their moments in fp32 whatever `optimizer.state` says: norms,
/// biases and the like are sensitive, and together they are next to nothing.
const INT8_LEAST: u64 = 4096;

/// Numbers that share a scale; as `BLOCK` in `kernels/src/adamw/int8/mod.rs`.
const INT8_BLOCK: u64 = 256;

/// Section `[train]`: how long, how much at a time, and what happens in between.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run. From 1. Required.
    pub steps: u64,
    /// Sequences computed at once. From 1, default 1: raise it until memory is full.
    pub batch: usize,
    /// Bytes of a sequence, L. From 1, default 8192 as in the paper.
    pub length: usize,
    /// Batches whose gradients are summed into one optimizer step. From 1, default 1.
    pub accumulation: usize,
    /// Seed of weights, data order and samples. From 0, default 4740.
    pub seed: u64,
    /// `"independent"` windows, or `"contiguous"` lanes with carried states.
    pub mode: Mode,
    /// Steps between validations; 0 is never. Default 500.
    pub validate_every: u64,
    /// Held-out bytes that a validation reads. From 1, default 1048576.
    pub validate_bytes: u64,
    /// Steps between samples of generated text; 0 is never. Default 500.
    pub sample_every: u64,
    /// Bytes of such a sample. From 1 to 1048576, default 256.
    pub sample_bytes: usize,
    /// Text that a sample goes on from; may be empty. Default `"The "`.
    pub sample_prompt: String,
    /// Steps between lines of metrics. From 1, default 1.
    pub log_every: u64,
    /// Steps between looks into the model (norms, step sizes, histograms) and, on GPUs, between
    /// measurements of a step's parts; 0 is never. Default 100.
    pub inspect_every: u64,
    /// Whether metrics are also written as TensorBoard's event files. Default false.
    pub tensorboard: bool,
    /// Layers whose input projection is computed again in the backward pass: `"auto"` (the default, as
    /// few as fit the memory), `"none"`, `"all"`, or how many of the first.
    pub recompute: Recompute,
    /// For very long sequences: layers of a group of which only the input is kept, and which is run
    /// a second time in the backward pass. From 1; 0 (the default) is no groups.
    pub checkpoint_every: usize,
    /// Number format of the computation: `"fp32"` (the default), `"tf32"` or `"bf16"`; the last two on
    /// NVIDIA GPUs. Weights are fp32 always.
    pub precision: Precision,
    /// Device memory that training may use, for instance `"24GiB"`, with the driver's context and
    /// libraries; `"none"` for all there is.
    pub memory_limit: MemoryLimit,
    /// CPU threads; 0 (the default) is one for each core.
    pub threads: usize,
}

impl TrainConfig {
    /// Bytes that one optimizer step learns from.
    pub fn bytes_per_step(&self) -> u64 {
        self.batch as u64 * self.accumulation as u64 * self.length as u64
    }

    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let config = Self {
            steps: section.integer(
                "steps",
                1,
                MOST_STEPS,
                None,
                "the number of optimizer steps",
            ),
            batch: section.size("batch", 1, 1 << 20, Some(1), ""),
            length: section.size("length", 1, 1 << 30, Some(8192), "bytes of a sequence"),
            accumulation: section.size("accumulation", 1, 1 << 20, Some(1), "1 means none"),
            seed: section.integer("seed", 0, MAX, Some(4740), ""),
            mode: section.choice("mode", Some(Mode::Independent), ""),
            validate_every: section.integer(
                "validate_every",
                0,
                MOST_STEPS,
                Some(500),
                "0 means never",
            ),
            validate_bytes: section.integer(
                "validate_bytes",
                1,
                MAX,
                Some(1 << 20),
                "for no validation at all, set `train.validate_every` to 0",
            ),
            sample_every: section.integer(
                "sample_every",
                0,
                MOST_STEPS,
                Some(500),
                "0 means never",
            ),
            sample_bytes: section.size(
                "sample_bytes",
                1,
                1 << 20,
                Some(256),
                "for no samples at all, set `train.sample_every` to 0",
            ),
            sample_prompt: section.string("sample_prompt", "The "),
            log_every: section.integer("log_every", 1, MOST_STEPS, Some(1), ""),
            inspect_every: section.integer(
                "inspect_every",
                0,
                MOST_STEPS,
                Some(100),
                "0 means never",
            ),
            tensorboard: section.boolean("tensorboard", false),
            recompute: section.recompute("recompute", Recompute::Auto),
            checkpoint_every: section.size(
                "checkpoint_every",
                0,
                4096,
                Some(0),
                "a number of layers; 0 means no groups",
            ),
            precision: section.choice(
                "precision",
                Some(Precision::Fp32),
                "bf16 is for NVIDIA GPUs; the CPU is fastest in fp32",
            ),
            memory_limit: section.memory("memory_limit", MemoryLimit::None),
            threads: section.size("threads", 0, 4096, Some(0), "0 means one for each core"),
        };
        let positions = config.batch as u64 * config.length as u64;
        let most = i32::MAX as u64;
        if section.sound(&["batch", "length"]) && positions > most {
            section.reject(
                "batch",
                config.batch.to_string(),
                format!(
                    "at most {} sequences of `train.length` = {} bytes",
                    most / config.length as u64,
                    config.length
                ),
                "kernels index positions with 32 bits; use `train.accumulation` for a larger step",
            );
        }
        config
    }
}

/// Section `[optimizer]`: AdamW, its schedule, and clipping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Highest learning rate, reached after the warm-up. Above 0, default 4e-4.
    pub lr: f64,
    /// Learning rate at the end of the decay. From 0 to `lr`, default 1e-5.
    pub min_lr: f64,
    /// Steps over which the learning rate rises from 0. Default 500.
    pub warmup_steps: u64,
    /// Step at which the cosine reaches `min_lr`; 0 (the default) is `train.steps`.
    pub decay_steps: u64,
    /// Decay of the mean of gradients. From 0, below 1, default 0.9.
    pub beta1: f64,
    /// Decay of the mean of squared gradients. From 0, below 1, default 0.95.
    pub beta2: f64,
    /// Added to the root of that mean. Above 0, default 1e-8.
    pub eps: f64,
    /// Share of a weight taken away at learning rate 1; matrices only. From 0, default 0.1.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 is no clipping. Default 0.1.
    pub clip: f64,
    /// How the two moments are stored: `"fp32"` (the default), 8 bytes a parameter, or `"int8"`, 2
    /// bytes. Parameters of fewer than 4096 numbers keep them in fp32.
    pub state: OptimizerState,
}

impl OptimizerConfig {
    /// How the moments of a parameter of `count` numbers are stored.
    pub fn state_of(&self, count: u64) -> OptimizerState {
        match self.state {
            OptimizerState::Int8 if count >= INT8_LEAST => OptimizerState::Int8,
            _ => OptimizerState::Fp32,
        }
    }

    /// Bytes of all moments of `model`.
    pub fn moment_bytes(&self, model: &MambaConfig) -> u64 {
        let of = |count: u64| match self.state_of(count) {
            OptimizerState::Fp32 => 2 * 4 * count,
            // A byte a number, and four for the scale of a block.
            OptimizerState::Int8 => 2 * (INT8_BLOCK + 4) * count.div_ceil(INT8_BLOCK),
        };
        model.parameter_table().iter().map(|it| of(it.count)).sum()
    }

    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let config = Self {
            lr: section.float("lr", Bounds::above(0.0).up_to(10.0), 4e-4),
            min_lr: section.float("min_lr", Bounds::from(0.0).up_to(10.0), 1e-5),
            warmup_steps: section.integer(
                "warmup_steps",
                0,
                MOST_STEPS,
                Some(500),
                "0 means no warm-up",
            ),
            decay_steps: section.integer(
                "decay_steps",
                0,
                MOST_STEPS,
                Some(0),
                "0 means as many as `train.steps`",
            ),
            beta1: section.float("beta1", Bounds::from(0.0).below(1.0), 0.9),
            beta2: section.float("beta2", Bounds::from(0.0).below(1.0), 0.95),
            eps: section.float("eps", Bounds::above(0.0).up_to(1.0), 1e-8),
            weight_decay: section.float("weight_decay", Bounds::from(0.0).up_to(100.0), 0.1),
            clip: section.float("clip", Bounds::from(0.0).up_to(1e9), 0.1),
            state: section.choice(
                "state",
                Some(OptimizerState::Fp32),
                "\"int8\" is AdamW's moments in 8 bits",
            ),
        };
        if section.sound(&["lr", "min_lr"]) && config.min_lr > config.lr {
            section.reject(
                "min_lr",
                config.min_lr.to_string(),
                format!("at most `optimizer.lr`, which is {}", config.lr),
                "the learning rate falls from `lr` to `min_lr`",
            );
        }
        config
    }
}

/// Section `[data]`: what is learnt from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Folder written by `mambabyte data prepare`, relative to the working directory. Required.
    pub path: PathBuf,
}

impl DataConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let hint = "a folder written by `mambabyte data prepare`";
        Self {
            path: section.name("path", None, hint).into(),
        }
    }
}

/// Section `[checkpoint]`: what is saved, how often, and what is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Folder that holds one folder for each run. Default `"checkpoints"`.
    pub dir: PathBuf,
    /// Steps between checkpoints; 0 is only at the end. Default 500.
    pub every_steps: u64,
    /// How many of the newest are kept. From 1, default 3.
    pub keep_last: usize,
    /// Every so many-th checkpoint is kept for good; 0 (the default) is none.
    pub keep_every: usize,
    /// Whether the one with the best validation is kept. Default true.
    pub keep_best: bool,
}

impl CheckpointConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            dir: section
                .name("dir", Some("checkpoints"), "\".\" is the working directory")
                .into(),
            every_steps: section.integer(
                "every_steps",
                0,
                MOST_STEPS,
                Some(500),
                "0 means only at the end",
            ),
            keep_last: section.size(
                "keep_last",
                1,
                1 << 20,
                Some(3),
                "a run that keeps none could not be resumed",
            ),
            keep_every: section.size("keep_every", 0, 1 << 20, Some(0), "0 means none"),
            keep_best: section.boolean("keep_best", true),
        }
    }
}

/// Section `[guard]`: what happens when a loss or a gradient goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardConfig {
    /// Steps in a row that could not be applied before the run goes back to its last good
    /// checkpoint. From 1, default 5.
    pub bad_steps: u32,
    /// A step whose loss is so many standard deviations above the mean of the last 128 good ones,
    /// and half the mean above it, is not applied; 0 is no limit. Default 6.
    pub spike: f64,
    /// Times that the run goes back to one and the same checkpoint before it has diverged; 0 is
    /// never back. Default 3.
    pub rollbacks: u32,
}

impl GuardConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let hint = "0 means that a run never goes back";
        Self {
            bad_steps: section.integer("bad_steps", 1, 1 << 20, Some(5), "") as u32,
            spike: section.float("spike", Bounds::from(0.0).up_to(1e6), 6.0),
            rollbacks: section.integer("rollbacks", 0, 1 << 20, Some(3), hint) as u32,
        }
    }
}

/// Section `[device]`: where to compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// `"auto"` (the default), `"cpu"`, `"cuda"`, or `"wgpu"` (also called `"vulkan"`).
    pub kind: DeviceKind,
    /// Which of several devices of that kind, from 0.
    pub index: usize,
}

impl DeviceConfig {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            kind: section.choice("kind", Some(DeviceKind::Auto), ""),
            index: section.size("index", 0, 255, Some(0), "devices are counted from 0"),
        }
    }
}
