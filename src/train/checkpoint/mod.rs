//! Checkpoints: everything that decides a run's future, on disk.
//!
//! ```text
//! step-<n>/
//!     config.toml               the model's and the run's configuration
//!     model.safetensors         weights, by name
//!     optimizer.safetensors     moment1.NAME and moment2.NAME; in 8 bits NAME.codes and NAME.scales
//!     state.safetensors         memories of the lanes (contiguous mode)
//!     manifest.json             written last: sizes and hashes of the others, and where training is
//! ```
//!
//! A checkpoint is copied from the device, written by another thread into a folder of
//! another name, flushed to disk, read back, and then renamed: a `step-<n>` folder is complete or
//! not there. Batches are a pure function of seed and step, so the step, and how many batches
//! rollbacks went past, is all there is to know of the data's position.

mod check;
mod install;
mod manifest;
mod snapshot;
mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use safetensors::tensor::Dtype;
use xxhash_rust::xxh3::Xxh3;

pub(crate) use install::install;
pub(super) use install::{beside, remove_if_there};
pub use manifest::{DataIdentity, FileEntry, MANIFEST, Manifest, Progress};
pub(crate) use snapshot::Snapshot;

use check::{ANOTHER, check_content, check_length, compare_hash, hash_text};
use tensors::{TensorFile, read_tensor};

use super::learner::Learner;
use super::parameters::{self, Named, named};
use crate::config::{Config, MambaConfig};
use crate::error::{Error, Result};
use crate::interop::WeightsFile;
use crate::model::{LayerState, MambaLm, State};

const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.safetensors";

/// A complete checkpoint on disk, its files checked against their hashes.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    manifest: Manifest,
    config: Config,
}

impl Checkpoint {
    /// Opens a checkpoint and checks every file's length and hash.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] naming the file that is missing, truncated or altered.
    pub fn open(folder: &Path) -> Result<Self> {
        let checkpoint = Self::open_for_model(folder)?;
        for entry in &checkpoint.manifest.files {
            check_content(folder, entry)?;
        }
        Ok(checkpoint)
    }

    /// Opens a checkpoint whose weights alone are wanted: only lengths are checked here, and the
    /// weights' hash while [`model`](Self::model) reads them.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] naming the file that is missing or truncated.
    pub fn open_for_model(folder: &Path) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        for entry in &manifest.files {
            check_length(folder, entry)?;
            if entry.name == CONFIG {
                check_content(folder, entry)?;
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            config: Config::load(folder.join(CONFIG), &[])?,
            manifest,
        })
    }

    /// The configuration stored with it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where training is.
    pub fn progress(&self) -> &Progress {
        &self.manifest.progress
    }

    /// The model with the checkpoint's weights, on `device`. The file of weights is read once.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] where the weights were altered or do not fit the config.
    pub fn model(&self, device: &Device) -> Result<MambaLm> {
        let model = self
            .config
            .model
            .empty_lm(device)
            .with_compute(self.config.train.precision.into());
        // Weights stay, so they do not belong between activations, where they would keep pages from
        // being used whole.
        device.memory_persistent_allocations(model, |model| {
            self.load_weights(model, &self.config.model, device)
        })
    }

    /// Puts the weights into `model`, which is one of `config`: one tensor after the other goes to
    /// the device, and the hash is taken on the way.
    fn load_weights(
        &self,
        model: MambaLm,
        config: &MambaConfig,
        device: &Device,
    ) -> Result<MambaLm> {
        let file = self.weights_of(config)?;
        let mut hash = Xxh3::new();
        let mut tensors = BTreeMap::new();
        file.read_through(
            |bytes| hash.update(bytes),
            |name, values| {
                tensors.insert(name.to_owned(), parameters::row(values, device));
                Ok(())
            },
        )?;
        self.check_weights_hash(&hash)?;
        parameters::replace(model, |name| {
            let missing = || Error::Checkpoint {
                path: self.folder.join(WEIGHTS),
                reason: format!("has no `{name}`"),
                hint: ANOTHER.to_owned(),
            };
            tensors.remove(name).ok_or_else(missing)
        })
    }

    fn check_weights_hash(&self, hash: &Xxh3) -> Result<()> {
        let entry = self.manifest.files.iter().find(|it| it.name == WEIGHTS);
        match entry {
            Some(entry) => compare_hash(&self.folder, entry, hash_text(hash)),
            None => Ok(()),
        }
    }

    /// The file of weights, checked.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] where it was altered, or does not fit the config, with every tensor that
    /// does not.
    pub fn weights(&self) -> Result<WeightsFile> {
        self.check_weights()?;
        self.weights_of(&self.config.model)
    }

    fn check_weights(&self) -> Result<()> {
        let entry = self.manifest.files.iter().find(|it| it.name == WEIGHTS);
        entry.map_or(Ok(()), |entry| check_content(&self.folder, entry))
    }

    fn weights_of(&self, config: &MambaConfig) -> Result<WeightsFile> {
        let opened = WeightsFile::open(&self.folder.join(WEIGHTS));
        let checked = opened.and_then(|file| file.check(config).map(|()| file));
        // A damaged header looks like another model's.
        checked.or_else(|error| self.check_weights().and(Err(error)))
    }

    /// Puts weights, optimizer and carried states into `learner`.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] where something does not fit the learner's config.
    pub fn restore(&self, learner: &mut Learner) -> Result<()> {
        self.restore_weights(learner)?;
        self.restore_optimizer(learner)?;
        self.restore_states(learner)
    }

    /// Puts the weights alone into `learner`.
    pub(super) fn restore_weights(&self, learner: &mut Learner) -> Result<()> {
        let config = learner.config().model.clone();
        let device = learner.device().clone();
        let mut loaded = Ok(());
        learner.map_model(
            |model| match self.load_weights(model.clone(), &config, &device) {
                Ok(model) => model,
                Err(error) => {
                    loaded = Err(error);
                    model
                }
            },
        );
        loaded
    }

    fn restore_optimizer(&self, learner: &mut Learner) -> Result<()> {
        if self.manifest.progress.updates() == 0 {
            // Before the first update all moments are zero, whether they were made already or not.
            learner.optimizer.restart();
            return Ok(());
        }
        let file = TensorFile::open(&self.folder.join(OPTIMIZER))?;
        let tensors = file.tensors()?;
        let device = learner.inner_device();
        let mut problems = Vec::new();
        let mut read = |name: &str, length: usize, dtype: Dtype| {
            read_tensor(&tensors, name, &[length], dtype)
                .map_err(|problem| problems.push(problem))
                .ok()
        };
        for Named { name, shape, .. } in parameters::collect(&learner.model()) {
            let count = shape.iter().product();
            learner.optimizer.restore(&name, count, &device, &mut read);
        }
        learner.optimizer.updates = self.manifest.progress.updates();
        file.check(problems)
    }

    fn restore_states(&self, learner: &mut Learner) -> Result<()> {
        learner.carried.fill(None);
        let path = self.folder.join(STATE);
        if !self.manifest.files.iter().any(|file| file.name == STATE) {
            return Ok(());
        }
        let file = TensorFile::open(&path)?;
        let tensors = file.tensors()?;
        let device = learner.inner_device();
        let model = &learner.config().model;
        let batch = learner.config().train.batch;
        let h = [batch, model.d_inner(), model.d_state];
        let window = [batch, model.d_inner(), model.d_conv - 1];
        let depth = model.depth;
        let mut problems = Vec::new();
        for (micro, carried) in learner.carried.iter_mut().enumerate() {
            let mut layers = Vec::with_capacity(depth);
            for layer in 0..depth {
                let read = |part: &str, dims: [usize; 3]| {
                    let name = state_name(micro, layer, part);
                    read_tensor(&tensors, &name, &dims, Dtype::F32)
                        .map(|data| Tensor::<3>::from_data(data, &device))
                };
                match (read("h", h), read("window", window)) {
                    (Ok(h), Ok(window)) => layers.push(LayerState { h, window }),
                    (h, window) => problems.extend([h.err(), window.err()].into_iter().flatten()),
                }
            }
            *carried = Some(State { layers });
        }
        file.check(problems)
    }

    /// Writes a checkpoint of `learner` into `run`; returns its folder.
    pub fn save(run: &Path, learner: &Learner, progress: &Progress) -> Result<PathBuf> {
        Snapshot::take(learner, progress).write(run)
    }

    /// Writes a checkpoint of weights alone into `folder`, which `write` puts into the file it is
    /// given: something to start from, not to go on with. `source` is where they are from.
    pub fn save_weights(
        folder: &Path,
        config: &Config,
        source: Option<&str>,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        snapshot::save_weights(folder, config, source, write)
    }
}

fn state_name(micro: usize, layer: usize, part: &str) -> String {
    format!("lanes.{micro}.layers.{layer}.{part}")
}

fn state_tensors(learner: &Learner) -> Vec<Named> {
    let mut tensors = Vec::new();
    for (micro, state) in learner.carried.iter().enumerate() {
        for (layer, state) in state.iter().flat_map(|s| s.layers.iter().enumerate()) {
            tensors.push(named(state_name(micro, layer, "h"), state.h.clone()));
            tensors.push(named(
                state_name(micro, layer, "window"),
                state.window.clone(),
            ));
        }
    }
    tensors
}
