//! Which model a command writes with, where, and in which number format.

use std::path::PathBuf;

use clap::Args;

use crate::config::{Config, DeviceConfig, DeviceKind, MambaConfig, Precision, Preset};
use crate::device;
use crate::error::{Error, Result, print_warning};
use crate::generate::{Generator, GeneratorOptions};
use crate::model::MambaLm;
use crate::train::Checkpoint;

/// Seed of random weights.
const SEED: u64 = 4740;

/// A checkpoint, or sizes of a model with random weights.
#[derive(Clone, Debug, Args)]
#[group(id = "model", required = true, multiple = false)]
pub struct Source {
    /// Folder of the checkpoint, or of a run, whose newest is taken; or hf:OWNER/NAME
    #[arg(
        long,
        value_name = "DIR",
        aliases = ["pretrained_model_filepath", "model-name"]
    )]
    pub checkpoint: Option<PathBuf>,
    /// Config file (TOML) whose model gets random weights
    #[arg(long, value_name = "FILE", alias = "config_path")]
    pub config: Option<PathBuf>,
    /// Named sizes of a model that gets random weights: 353M, 972M or a preset of a config
    #[arg(long, value_name = "NAME", aliases = ["model_id", "model-id"], value_parser = preset)]
    pub preset: Option<Preset>,
}

/// Arguments of commands that write.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// The model.
    #[command(flatten)]
    pub source: Source,
    /// Where to compute: auto, cpu, cuda, wgpu, with an index as in cuda:1
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = super::device)]
    pub device: DeviceConfig,
    /// Format of weights in products: fp32, or bf16 (CUDA; the default there)
    #[arg(long, value_name = "FORMAT")]
    pub precision: Option<Precision>,
    /// Use the model's own step in place of the kernels for single bytes: slower, for comparison
    #[arg(long)]
    pub plain: bool,
}

/// A model that is ready to write, and what it is.
pub struct Opened {
    /// The model.
    pub generator: Generator,
    /// Its sizes.
    pub config: MambaConfig,
    /// Its format.
    pub precision: Precision,
    /// What it runs on.
    pub kind: DeviceKind,
}

impl ModelArgs {
    /// Loads the model.
    pub fn open(&self) -> Result<Opened> {
        // What needs no device is checked first.
        let source = self.source.read()?;
        let (device, kind) = device::open_any(&self.device)?;
        let precision = self.precision_on(kind)?;
        let config = match &source {
            Weights::Checkpoint(checkpoint) => checkpoint.config().model.clone(),
            Weights::Random(config) => config.clone(),
        };
        super::warn_unless_bytes(&config);
        let model: MambaLm = match source {
            Weights::Checkpoint(checkpoint) => checkpoint.model(&device)?,
            Weights::Random(config) => {
                print_warning("no checkpoint: the weights are random");
                config.init_lm(SEED, &device)
            }
        };
        let options = GeneratorOptions {
            precision,
            plain: self.plain,
        };
        Ok(Opened {
            generator: Generator::new(model, &device, options),
            config,
            precision,
            kind,
        })
    }

    fn precision_on(&self, kind: DeviceKind) -> Result<Precision> {
        match (self.precision, kind) {
            (None, DeviceKind::Cuda) => Ok(Precision::Bf16),
            (None, _) => Ok(Precision::Fp32),
            (Some(Precision::Fp32), _) => Ok(Precision::Fp32),
            (Some(precision), DeviceKind::Cuda) => Ok(precision),
            (Some(precision), kind) => Err(Error::Usage {
                message: format!("precision {precision} on {}", kind.name()),
                hint: "tf32 and bf16 are for CUDA devices: leave `--precision` out".to_owned(),
            }),
        }
    }
}

enum Weights {
    Checkpoint(Box<Checkpoint>),
    Random(MambaConfig),
}

impl Source {
    fn read(&self) -> Result<Weights> {
        if let Some(checkpoint) = &self.checkpoint {
            let checkpoint = Checkpoint::open_for_model(&super::checkpoint_folder(checkpoint)?)?;
            return Ok(Weights::Checkpoint(Box::new(checkpoint)));
        }
        if let Some(config) = &self.config {
            return Ok(Weights::Random(Config::load(config, &[])?.model));
        }
        let sizes = self.preset.and_then(MambaConfig::from_preset);
        sizes.map(Weights::Random).ok_or_else(|| Error::Usage {
            message: "the preset `custom` has no sizes".to_owned(),
            hint: "name another one, or give `--config`".to_owned(),
        })
    }
}

/// A preset by its name in configs, or by the model's name in the paper.
fn preset(text: &str) -> Result<Preset, String> {
    match text {
        "353M" => Ok(Preset::Mambabyte353m),
        "972M" => Ok(Preset::Mambabyte972m),
        other => other.parse(),
    }
}
