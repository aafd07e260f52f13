//! The files of a checkpoint, whatever their format, as one list of tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::file::{DiskFile, RandomAccess as _};
use super::tensor::Stored;
use super::{listed, safetensors, shown, torch, zip};
use crate::error::{Error, Result};

/// Files that a folder's weights are looked for in, the first that is there.
const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Ends of the names of files with weights.
const ENDINGS: [&str; 4] = ["safetensors", "bin", "pt", "pth"];

/// What is said of a pickle that is not in a zip file.
const OLD_PICKLE: &str = "was saved by PyTorch before 1.6 or with \
                          `_use_new_zipfile_serialization=False`: load it there and save it again";

/// Largest index of a checkpoint in several files.
const MOST_INDEX: u64 = 16 << 20;
/// Most such files.
const MOST_FILES: usize = 512;

/// A checkpoint's tensors, and the files they are in.
#[derive(Debug)]
pub(super) struct Source {
    /// The file or index that was found.
    pub(super) path: PathBuf,
    files: Vec<DiskFile>,
    /// In the order of the files.
    pub(super) tensors: Vec<Stored>,
}

/// An error about `path`.
pub(super) fn unreadable(path: &Path, reason: impl Into<String>) -> Error {
    Error::Checkpoint {
        path: path.to_owned(),
        reason: reason.into(),
        hint: "give the folder or the file of a Mamba-1 checkpoint: `pytorch_model.bin` or \
               safetensors, beside its `config.json`; fetch it again if it may be incomplete"
            .to_owned(),
    }
}

impl Source {
    /// Opens the weights at `path`, a file or a folder.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let found = weights_in(path)?;
        let mut source = Self {
            path: found.clone(),
            files: Vec::new(),
            tensors: Vec::new(),
        };
        match is_index(&found) {
            true => source.add_indexed(&found)?,
            false => source.add(&found)?,
        }
        Ok(source)
    }

    /// Reads a tensor's values, as f32.
    pub(super) fn values(&self, tensor: &Stored) -> Result<Vec<f32>> {
        let file = &self.files[tensor.file];
        tensor
            .values(file)
            .map_err(|problem| unreadable(&file.path, problem))
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.length()).sum()
    }

    /// Adds the tensors of one file.
    fn add(&mut self, path: &Path) -> Result<()> {
        let file = DiskFile::open(path)?;
        let index = self.files.len();
        let mut start = [0; 9];
        let length = file.length().min(9) as usize;
        let tensors = file
            .fill(0, &mut start[..length])
            .and_then(|()| match &start {
                start if start.starts_with(zip::MAGIC) => torch::tensors(&file, index),
                // A bare pickle: PROTO, and a version. The length of a safetensors header may begin
                // with the same bytes, but the header follows it.
                [0x80, 0..=5, .., next] if *next != b'{' => Err(OLD_PICKLE.to_owned()),
                _ => safetensors::tensors(&file, index),
            });
        self.tensors
            .extend(tensors.map_err(|problem| unreadable(path, problem))?);
        self.files.push(file);
        Ok(())
    }

    /// Adds the tensors of all files that an index names.
    fn add_indexed(&mut self, path: &Path) -> Result<()> {
        let map = read_index(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let files: BTreeSet<&str> = map.values().map(String::as_str).collect();
        for file in files {
            self.add(&folder.join(file))?;
        }
        let known: BTreeSet<&str> = self.tensors.iter().map(|it| it.name.as_str()).collect();
        let problems: Vec<String> = map
            .iter()
            .filter(|(name, _)| !known.contains(name.as_str()))
            .map(|(name, file)| format!("`{}` is not in `{}`", shown(name), shown(file)))
            .collect();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(unreadable(
                path,
                format!("names tensors that are not there:{}", listed(&problems)),
            )),
        }
    }
}

fn is_index(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "json")
}

/// Which tensor is in which file, as the index at `path` says.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = DiskFile::open(path)?;
    let length = index.length();
    if length > MOST_INDEX {
        let reason = format!("has {length} bytes, more than an index has");
        return Err(unreadable(path, reason));
    }
    index
        .read(0, length)
        .and_then(|bytes| weight_map(&bytes))
        .map_err(|problem| unreadable(path, problem))
}

/// Which tensor is in which file, as an index says.
pub(super) fn weight_map(bytes: &[u8]) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes)
        .map_err(|e| format!("is not an index of a checkpoint's files: {e}"))?;
    let files: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    if files.is_empty() || files.len() > MOST_FILES {
        return Err(format!(
            "names {} files, expected from 1 to {MOST_FILES}",
            files.len()
        ));
    }
    // Only files beside the index: it must not make the program read from anywhere else.
    let elsewhere = files.iter().find(|file| {
        let path = Path::new(file);
        path.file_name() != Some(path.as_os_str()) || file.contains(['\\', '\0'])
    });
    match elsewhere {
        Some(file) => Err(format!(
            "names the file `{}`, which is not one beside it",
            shown(file)
        )),
        None => Ok(index.weight_map),
    }
}

/// The file of weights, or its index, that `path` means.
fn weights_in(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return match path.exists() {
            true => Ok(path.to_owned()),
            false => Err(unreadable(path, "does not exist")),
        };
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::io("read", path))? {
        let entry = entry.map_err(Error::io("read", path))?;
        if let (true, Ok(name)) = (entry.path().is_file(), entry.file_name().into_string()) {
            names.push(name);
        }
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match weights_among(&names) {
        Ok(name) => Ok(path.join(name)),
        Err(problem) => Err(unreadable(path, problem)),
    }
}

/// Which of a folder's files has the weights, or their index.
pub(crate) fn weights_among<'a>(names: &[&'a str]) -> Result<&'a str, String> {
    let known = WEIGHTS.iter().find_map(|known| {
        let found = names.iter().find(|name| *name == known);
        found.copied()
    });
    if let Some(found) = known {
        return Ok(found);
    }
    let ending = |name: &str| Path::new(name).extension()?.to_str().map(str::to_owned);
    let candidates: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| ending(name).is_some_and(|it| ENDINGS.contains(&it.as_str())))
        .collect();
    match candidates[..] {
        [found] => Ok(found),
        [] => Err(format!("has no weights: none of {}", WEIGHTS.join(", "))),
        _ => Err(format!(
            "has {} files that may be the weights: name one of them",
            candidates.len()
        )),
    }
}

/// The files that an index names.
#[cfg(feature = "hub")]
pub(crate) fn indexed(path: &Path) -> Result<BTreeSet<String>> {
    Ok(read_index(path)?.into_values().collect())
}

/// All files of the checkpoint in `folder`: its config, if there is one, its index and its weights.
#[cfg(feature = "hub")]
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let weights = weights_in(folder)?;
    let mut files = vec![weights.clone()];
    if is_index(&weights) {
        files.extend(indexed(&weights)?.iter().map(|name| folder.join(name)));
    }
    files.extend(super::config::find(folder, None)?);
    match files.iter().find(|file| !file.is_file()) {
        Some(absent) => Err(unreadable(absent, "does not exist")),
        None => Ok(files),
    }
}
