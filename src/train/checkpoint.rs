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
//! A checkpoint is written into a folder of another name, flushed to disk, and then renamed: a
//! `step-<n>` folder is complete or not there. Batches are a pure function of seed and step, so
//! the step is all there is to know of the data's position.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use tracing::debug;
use xxhash_rust::xxh3::Xxh3;

use super::learner::Learner;
use super::parameters::{self, Named, named};
use crate::config::{Config, MambaConfig};
use crate::error::{Error, Result};
use crate::interop::WeightsFile;
use crate::model::{LayerState, MambaLm, State};

/// The file whose presence makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// Version of the layout; another version is refused.
const FORMAT: u32 = 1;

const CONFIG: &str = "config.toml";
const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.safetensors";

/// A file of a checkpoint, as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in the folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// xxh3-128 of the content, in hexadecimal.
    pub xxh3: String,
}

/// The last file of a checkpoint: what it consists of and where training is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Bytes learnt from.
    pub bytes_seen: u64,
    /// Identity of the training data (a hash); another corpus is refused on resume.
    pub data: Option<String>,
    /// Bits a byte of the newest validation, if there was one.
    pub valid_bpb: Option<f64>,
    /// Where imported weights are from, with the commit: `hf:OWNER/NAME@COMMIT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// All other files.
    pub files: Vec<FileEntry>,
}

impl Manifest {
    /// Reads the manifest of a checkpoint folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let damaged = |reason: String| Error::Checkpoint {
            path: path.clone(),
            reason,
            hint: "use another checkpoint of the run".to_owned(),
        };
        // The version first: another layout need not have the same keys.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version =
            serde_json::from_str(&text).map_err(|e| damaged(format!("is not a manifest: {e}")))?;
        if version.format != FORMAT {
            return Err(damaged(format!(
                "has format version {}, and this program reads version {FORMAT}",
                version.format
            )));
        }
        serde_json::from_str(&text).map_err(|e| damaged(format!("is not a manifest: {e}")))
    }
}

/// What a checkpoint records besides tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Bytes learnt from.
    pub bytes_seen: u64,
    /// Identity of the training data.
    pub data: Option<String>,
    /// Bits a byte of the newest validation.
    pub valid_bpb: Option<f64>,
}

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
    pub fn progress(&self) -> Progress {
        Progress {
            step: self.manifest.step,
            bytes_seen: self.manifest.bytes_seen,
            data: self.manifest.data.clone(),
            valid_bpb: self.manifest.valid_bpb,
        }
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
        let started = Instant::now();
        // Weights stay, so they do not belong between activations, where they would keep pages from
        // being used whole.
        let model = device.memory_persistent_allocations(model, |model| {
            self.load_weights(model, &self.config.model, device)
        })?;
        debug!(
            "read the weights in {:.2} s",
            started.elapsed().as_secs_f64()
        );
        Ok(model)
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
        self.check_optimizer(learner.config())?;
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
        learner.optimizer.updates = self.manifest.step;
        file.check(problems)
    }

    /// That `config` has the moments in the form in which they are here: one is not made of the
    /// other, so that a resumed run has the bits of one that never stopped.
    fn check_optimizer(&self, config: &Config) -> Result<()> {
        let (here, wanted) = (self.config.optimizer.state, config.optimizer.state);
        if here == wanted {
            return Ok(());
        }
        Err(Error::Checkpoint {
            path: self.folder.clone(),
            reason: format!(
                "was saved with `optimizer.state` = \"{here}\", and the run's config has \
                 \"{wanted}\""
            ),
            hint: format!(
                "set it back to \"{here}\" in the run's `config.toml`, or start a new run"
            ),
        })
    }

    fn restore_states(&self, learner: &mut Learner) -> Result<()> {
        let path = self.folder.join(STATE);
        if !path.exists() {
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
        let folder = run.join(format!("step-{}", progress.step));
        install(&folder, |building| write_files(building, learner, progress))?;
        Ok(folder)
    }

    /// Writes a checkpoint of weights alone into `folder`, which `write` puts into the file it is
    /// given: something to start from, not to go on with. `source` is where they are from.
    pub fn save_weights(
        folder: &Path,
        config: &Config,
        source: Option<&str>,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let progress = Progress {
            step: 0,
            bytes_seen: 0,
            data: None,
            valid_bpb: None,
        };
        install(folder, |building| {
            write_config(building, config)?;
            write(&building.join(WEIGHTS))?;
            write_manifest(building, &[CONFIG, WEIGHTS], &progress, source)
        })
    }
}

/// Lets `write` fill a folder of another name and then gives it the name `folder`, which so is
/// complete or not there.
pub(crate) fn install(folder: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut building = folder.as_os_str().to_owned();
    building.push(".tmp");
    let building = PathBuf::from(building);
    if building.exists() {
        // Left behind by a crash.
        fs::remove_dir_all(&building).map_err(Error::io("remove", &building))?;
    }
    fs::create_dir_all(&building).map_err(Error::io("create", &building))?;
    if let Err(error) = write(&building) {
        // The disk may be full: give back what a checkpoint that failed takes.
        let _ = fs::remove_dir_all(&building);
        return Err(error);
    }
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(Error::io("remove", folder))?;
    }
    fs::rename(&building, folder).map_err(Error::io("rename", &building))?;
    match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => sync(Path::new(".")),
    }
}

fn write_config(folder: &Path, config: &Config) -> Result<()> {
    let path = folder.join(CONFIG);
    fs::write(&path, config.to_toml()).map_err(Error::io("write", &path))
}

/// Writes all files into `folder`, the manifest last, each flushed to disk.
fn write_files(folder: &Path, learner: &Learner, progress: &Progress) -> Result<()> {
    write_config(folder, learner.config())?;
    write_tensors(&folder.join(WEIGHTS), parameters::collect(&learner.model()))?;
    write_tensors(&folder.join(OPTIMIZER), learner.optimizer.tensors())?;
    let mut names = vec![CONFIG, WEIGHTS, OPTIMIZER];
    let states = state_tensors(learner);
    if !states.is_empty() {
        write_tensors(&folder.join(STATE), states)?;
        names.push(STATE);
    }
    write_manifest(folder, &names, progress, None)
}

/// Flushes the files `names` to disk and writes the manifest of them.
fn write_manifest(
    folder: &Path,
    names: &[&str],
    progress: &Progress,
    source: Option<&str>,
) -> Result<()> {
    let config = folder.join(CONFIG);
    // The tensor writer makes files that only their owner may read; a checkpoint is as public as
    // its folder's other files.
    let permissions = fs::metadata(&config).map_err(Error::io("read", &config))?;
    let files = names.iter().map(|name| {
        let path = folder.join(name);
        fs::set_permissions(&path, permissions.permissions()).map_err(Error::io("write", &path))?;
        sync(&folder.join(name))?;
        // Read back: the hash is of what the disk holds.
        describe(folder, name).map_err(Error::io("read", folder.join(name)))
    });
    let manifest = Manifest {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        step: progress.step,
        bytes_seen: progress.bytes_seen,
        data: progress.data.clone(),
        valid_bpb: progress.valid_bpb,
        source: source.map(str::to_owned),
        files: files.collect::<Result<_>>()?,
    };
    let path = folder.join(MANIFEST);
    let text = serde_json::to_string_pretty(&manifest).map_err(anyhow::Error::from)?;
    fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
    sync(&path)?;
    sync(folder)
}

/// Flushes a file or folder to disk.
fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("write", path))
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

/// What is said where a checkpoint cannot be used and others of its run may be.
const ANOTHER: &str = "use another checkpoint of the run";

/// An error about a file of a checkpoint.
fn damaged(folder: &Path, name: &str, reason: String) -> Error {
    Error::Checkpoint {
        path: folder.join(name),
        reason,
        hint: ANOTHER.to_owned(),
    }
}

fn check_length(folder: &Path, entry: &FileEntry) -> Result<()> {
    let unreadable = |e| format!("is part of the checkpoint but unreadable: {e}");
    let bytes = fs::metadata(folder.join(&entry.name))
        .map_err(|e| damaged(folder, &entry.name, unreadable(e)))?
        .len();
    match bytes == entry.bytes {
        true => Ok(()),
        false => Err(damaged(
            folder,
            &entry.name,
            format!("has {bytes} bytes, and was written with {}", entry.bytes),
        )),
    }
}

fn check_content(folder: &Path, entry: &FileEntry) -> Result<()> {
    let unreadable = |e| format!("is part of the checkpoint but unreadable: {e}");
    let actual =
        describe(folder, &entry.name).map_err(|e| damaged(folder, &entry.name, unreadable(e)))?;
    compare_hash(folder, entry, actual.xxh3)
}

fn compare_hash(folder: &Path, entry: &FileEntry, actual: String) -> Result<()> {
    match actual == entry.xxh3 {
        true => Ok(()),
        false => Err(damaged(
            folder,
            &entry.name,
            format!("was altered: its hash is {actual}, and was {}", entry.xxh3),
        )),
    }
}

fn hash_text(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}

/// Length and hash of a file.
fn describe(folder: &Path, name: &str) -> std::io::Result<FileEntry> {
    let mut file = File::open(folder.join(name))?;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(FileEntry {
        name: name.to_owned(),
        bytes,
        xxh3: hash_text(&hash),
    })
}

/// A tensor that is read from the device when its turn to be written has come.
struct Lazy(Named);

impl View for Lazy {
    fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned((self.0.read)().as_bytes().to_vec())
    }

    fn data_len(&self) -> usize {
        self.0.dtype.bitsize() / 8 * self.0.shape.iter().product::<usize>()
    }
}

fn write_tensors(path: &Path, tensors: Vec<Named>) -> Result<()> {
    let views: BTreeMap<String, Lazy> = tensors
        .into_iter()
        .map(|tensor| (tensor.name.clone(), Lazy(tensor)))
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => Error::io("write", path)(source),
        other => Error::Other(anyhow::Error::from(other)),
    })
}

/// A safetensors file in memory.
struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl TensorFile {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            bytes: fs::read(path).map_err(Error::io("read", path))?,
        })
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| self.error(e.to_string()))
    }

    fn error(&self, reason: String) -> Error {
        Error::Checkpoint {
            path: self.path.clone(),
            reason,
            hint:
                "the checkpoint is of another model: use the one that its `config.toml` describes"
                    .to_owned(),
        }
    }

    /// One error for all problems, if there are any.
    fn check(&self, problems: Vec<String>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        let shown = 20;
        let mut text = format!("does not fit the model:\n  {}", {
            let lines: Vec<_> = problems.iter().take(shown).cloned().collect();
            lines.join("\n  ")
        });
        if problems.len() > shown {
            text += &format!("\n  and {} more", problems.len() - shown);
        }
        Err(self.error(text))
    }
}

/// The tensor `name`, which must be of `shape` and `dtype`; otherwise what is wrong. Bytes come as
/// i32, four a word, as [`Named::read`] gives them.
fn read_tensor(
    tensors: &SafeTensors<'_>,
    name: &str,
    shape: &[usize],
    dtype: Dtype,
) -> std::result::Result<TensorData, String> {
    let view = tensors
        .tensor(name)
        .map_err(|_| format!("`{name}` is missing"))?;
    if view.shape() != shape || view.dtype() != dtype {
        return Err(format!(
            "`{name}` is {:?} of shape {:?}, expected {dtype:?} of shape {shape:?}",
            view.dtype(),
            view.shape()
        ));
    }
    let words = view.data().chunks_exact(4);
    let words = words.map(|b| [b[0], b[1], b[2], b[3]]);
    Ok(match dtype {
        Dtype::F32 => TensorData::new(words.map(f32::from_le_bytes).collect(), shape),
        _ => {
            let words: Vec<i32> = words.map(i32::from_le_bytes).collect();
            let count = words.len();
            TensorData::new(words, [count])
        }
    })
}
