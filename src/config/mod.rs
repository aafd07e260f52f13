//! The configuration of a run: a flat TOML file, checked as a whole before anything is allocated.
//!
//! ```toml
//! [model]
//! preset = "tiny"
//!
//! [train]
//! steps = 1000
//!
//! [data]
//! path = "data/pg19"
//! ```
//!
//! Every key is documented at its field: [`MambaConfig`], [`TrainConfig`], [`OptimizerConfig`],
//! [`DataConfig`], [`CheckpointConfig`], [`GuardConfig`], [`DeviceConfig`]. Unknown keys, wrong types, values out of
//! range and values that contradict each other are all reported at once, each with its place and
//! what to do. This module knows nothing of tensors.

mod model;
mod reader;
mod report;
mod section;
mod sections;
mod suggest;
mod values;
mod warnings;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use model::{MambaConfig, ParameterSpec};
pub use report::{ConfigError, ConfigErrors, Place};
pub use sections::{
    CheckpointConfig, DataConfig, DeviceConfig, GuardConfig, OptimizerConfig, TrainConfig,
};
pub use values::{
    DeviceKind, DtInit, DtRank, MemoryLimit, Mode, Norm, OptimizerState, Precision, Preset,
    Recompute,
};

use reader::Reader;

/// Everything that determines a run.
///
/// A value from [`Config::load`] or [`Config::parse`] is within every range; one changed by hand can
/// be checked again with [`Config::validate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Shape of the model.
    pub model: MambaConfig,
    /// The run: steps, batches, validation, samples.
    pub train: TrainConfig,
    /// AdamW and its schedule.
    pub optimizer: OptimizerConfig,
    /// What is learnt from.
    pub data: DataConfig,
    /// What is saved.
    pub checkpoint: CheckpointConfig,
    /// What happens when numbers go wrong.
    pub guard: GuardConfig,
    /// Where to compute.
    pub device: DeviceConfig,
}

impl Config {
    /// Reads a file and applies overrides of the form `section.key=value` in their order.
    ///
    /// The value of an override is read as TOML, and as plain text where that fails, so that
    /// `data.path=data/pg19` needs no quotes.
    pub fn load(path: impl AsRef<Path>, overrides: &[String]) -> Result<Self, ConfigErrors> {
        let path = path.as_ref();
        let origin = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&origin, &text, overrides),
            Err(error) => Err(ConfigErrors::whole(
                &origin,
                format!("could not read the config: {error}"),
                "the folder `configs/` has examples; paths are relative to the working directory",
            )),
        }
    }

    /// Reads TOML text that came from `origin`, which is only named in errors.
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigErrors> {
        let mut reader = Reader::new(origin, text, overrides);
        let config = Self {
            model: MambaConfig::read(&mut reader.section("model")),
            train: TrainConfig::read(&mut reader.section("train")),
            optimizer: OptimizerConfig::read(&mut reader.section("optimizer")),
            data: DataConfig::read(&mut reader.section("data")),
            checkpoint: CheckpointConfig::read(&mut reader.section("checkpoint")),
            guard: GuardConfig::read(&mut reader.section("guard")),
            device: DeviceConfig::read(&mut reader.section("device")),
        };
        config.check_together(&mut reader);
        reader.finish()?;
        Ok(config)
    }

    /// Checks every value again, after changes by hand.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        Self::parse("config", &self.to_toml(), &[]).map(drop)
    }

    /// Every key with its value, as TOML without comments; reading it gives an equal config.
    ///
    /// # Panics
    ///
    /// If a field was set by hand to what TOML cannot hold: an integer above 2⁶³ - 1, or a path
    /// that is not UTF-8. A config that was read never has one.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a config that was read can be written")
    }

    /// Checks that need more than one section.
    fn check_together(&self, reader: &mut Reader) {
        let warmup = self.optimizer.warmup_steps;
        let decay = self.optimizer.decay_steps;
        if reader.sound(&["optimizer.warmup_steps", "optimizer.decay_steps"])
            && decay != 0
            && decay < warmup
        {
            reader.reject(
                "optimizer.decay_steps",
                decay.to_string(),
                format!("0, or at least `optimizer.warmup_steps`, which is {warmup}"),
                "it counts from the start of the run, warm-up included",
            );
        }
        if reader.sound(&[
            "train.precision",
            "model.fused_add_norm",
            "model.use_fast_path",
        ]) && self.train.precision == Precision::Bf16
            && !self.model.is_fused()
        {
            reader.reject(
                "train.precision",
                "\"bf16\"".to_owned(),
                "\"fp32\" or \"tf32\"".to_owned(),
                "only fused blocks compute in bf16: set `model.use_fast_path`, \
                 `model.fused_add_norm` and `model.pscan` to true",
            );
        }
        let shape = [
            "model.preset",
            "model.dim",
            "model.depth",
            "model.d_state",
            "model.expand_factor",
            "train.memory_limit",
            "optimizer.state",
        ];
        if let Some(limit) = self.train.memory_limit.bytes()
            && reader.sound(&shape)
        {
            // Weights in fp32 and both moments of AdamW are there whatever the batch.
            let least = 4 * self.model.num_params() + self.optimizer.moment_bytes(&self.model);
            if limit < least {
                reader.reject(
                    "train.memory_limit",
                    self.train.memory_limit.to_string(),
                    format!("more than {} MiB", least.div_ceil(1 << 20)),
                    match self.optimizer.state {
                        OptimizerState::Fp32 => {
                            "weights and AdamW's moments alone take that much; set \
                             `optimizer.state` to \"int8\", or use a smaller model"
                        }
                        OptimizerState::Int8 => {
                            "weights and AdamW's moments alone take that much; use a smaller model"
                        }
                    },
                );
            }
        }
    }
}

impl FromStr for Config {
    type Err = ConfigErrors;

    fn from_str(text: &str) -> Result<Self, ConfigErrors> {
        Self::parse("config", text, &[])
    }
}

/// Checks a model's config by itself, through the same reader.
fn validate_model(model: &MambaConfig) -> Result<(), ConfigErrors> {
    #[derive(Serialize)]
    struct Document<'a> {
        model: &'a MambaConfig,
    }
    let text = toml::to_string(&Document { model }).map_err(|error| {
        ConfigErrors::whole("model", error.to_string(), "integers go up to 2^63 - 1")
    })?;
    let mut reader = Reader::new("model", &text, &[]);
    MambaConfig::read(&mut reader.section("model"));
    reader.finish()
}
