//! A run as it is at one moment, in host memory, from where it is written at leisure.

use std::path::{Path, PathBuf};

use super::install::{describe, install, write_file};
use super::manifest::{FORMAT, FileEntry, MANIFEST, Manifest, Progress};
use super::tensors::{self, Held};
use super::{CONFIG, OPTIMIZER, STATE, WEIGHTS, state_tensors};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::new_file::sync;
use crate::train::learner::Learner;
use crate::train::parameters::{self, Named};

/// Everything that a checkpoint will hold. Taking it is all that training has to wait for.
pub(crate) struct Snapshot {
    config: String,
    progress: Progress,
    /// Each file with its tensors.
    files: Vec<(&'static str, Vec<Held>)>,
}

impl Snapshot {
    /// Copies weights, moments and carried states from the device: 12 bytes a parameter, 6 with
    /// moments in 8 bits, and the states.
    pub(crate) fn take(learner: &Learner, progress: &Progress) -> Self {
        let held = |tensors: Vec<Named>| tensors.into_iter().map(Held::take).collect();
        let mut files: Vec<(_, Vec<Held>)> = vec![
            (WEIGHTS, held(parameters::collect(&learner.model()))),
            (OPTIMIZER, held(learner.optimizer.tensors())),
        ];
        let states: Vec<Held> = held(state_tensors(learner));
        if !states.is_empty() {
            files.push((STATE, states));
        }
        Self {
            config: learner.config().to_toml(),
            progress: progress.clone(),
            files,
        }
    }

    /// Optimizer steps done.
    pub(crate) fn step(&self) -> u64 {
        self.progress.step
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        let tensors = self.files.iter().flat_map(|(_, tensors)| tensors);
        tensors.map(|it| it.bytes() as u64).sum()
    }

    /// Writes the checkpoint into the run's folder; returns its own.
    pub(crate) fn write(&self, run: &Path) -> Result<PathBuf> {
        let folder = run.join(format!("step-{}", self.progress.step));
        install(&folder, |building| {
            let mut files = vec![write_config(building, &self.config)?];
            for (name, held) in &self.files {
                files.push(write_file(building, name, |file| {
                    tensors::write(file, held)
                })?);
            }
            write_manifest(building, files, &self.progress, None)
        })?;
        Ok(folder)
    }
}

/// Writes `config.toml`.
fn write_config(folder: &Path, config: &str) -> Result<FileEntry> {
    write_file(folder, CONFIG, |file| file.write_all(config.as_bytes()))
}

/// Writes the manifest, the last file, and flushes the folder.
fn write_manifest(
    folder: &Path,
    files: Vec<FileEntry>,
    progress: &Progress,
    source: Option<&str>,
) -> Result<()> {
    let manifest = Manifest {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        progress: progress.clone(),
        source: source.map(str::to_owned),
        files,
    };
    let text = manifest.to_text()?;
    write_file(folder, MANIFEST, |file| file.write_all(text.as_bytes()))?;
    sync(folder)
}

/// Writes a checkpoint of weights alone into `folder`, which `write` puts into the file it is
/// given; they are from `source`.
pub(super) fn save_weights(
    folder: &Path,
    config: &Config,
    source: Option<&str>,
    write: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    install(folder, |building| {
        let config = write_config(building, &config.to_toml())?;
        let path = building.join(WEIGHTS);
        write(&path)?;
        sync(&path)?;
        let weights = describe(building, WEIGHTS).map_err(Error::io("read", &path))?;
        write_manifest(
            building,
            vec![config, weights],
            &Progress::default(),
            source,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::train::fit::meaningless_batch;

    const CONFIG: &str = "model.dim = 16\nmodel.depth = 1\ntrain.steps = 9\ntrain.batch = 1\n\
                          train.length = 32\ntrain.mode = \"contiguous\"\ndata.path = \"x\"";

    /// The files of a snapshot after two steps; `later` more steps are made before it is written.
    fn written(config: &Config, later: u64) -> Option<Vec<(String, Vec<u8>)>> {
        let device = device::open(&config.device)
            .map_err(|error| eprintln!("SKIPPED on {:?}: {error}", config.device.kind))
            .ok()?;
        let mut learner = Learner::new(config, &device);
        let batch = meaningless_batch(config);
        let train = |learner: &mut Learner, steps: u64| {
            for _ in 0..steps {
                learner.step(&batch, 1e-2, None);
            }
        };
        train(&mut learner, 2);
        let snapshot = Snapshot::take(&learner, &Progress::default());
        train(&mut learner, later);
        let run = tempfile::tempdir().expect("a folder");
        let folder = snapshot.write(run.path()).expect("written");
        let content = |name: &str| {
            let bytes = std::fs::read(folder.join(name)).expect("there");
            (name.to_owned(), bytes)
        };
        Some([WEIGHTS, OPTIMIZER, STATE].map(content).to_vec())
    }

    /// Burn's GPU backends copy a tensor when its bytes are first looked at: training goes on by then.
    #[test]
    fn a_snapshot_is_of_its_moment() {
        for kind in ["cpu", "wgpu", "cuda"] {
            if kind == "wgpu" && !cfg!(feature = "wgpu")
                || kind == "cuda" && !cfg!(feature = "cuda")
            {
                continue;
            }
            let kind = format!("device.kind={kind}");
            let config = Config::parse("config", CONFIG, &[kind]).expect("valid");
            let Some(at_once) = written(&config, 0) else {
                continue;
            };
            assert!(
                at_once == written(&config, 3).expect("as before"),
                "{config:?}"
            );
        }
    }
}
