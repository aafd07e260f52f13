//! The file of weights in a checkpoint of ours, read and written one tensor at a time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;

use super::file::{DiskFile, RandomAccess as _};
use super::safetensors;
use super::tensor::{Format, Stored};
use super::{listed, shown};
use crate::config::MambaConfig;
use crate::error::{Error, Result};

/// An open file of weights, whose tensors are read when they are asked for.
#[derive(Debug)]
pub struct WeightsFile {
    file: DiskFile,
    tensors: BTreeMap<String, Stored>,
}

impl WeightsFile {
    /// Opens the file and reads its header.
    pub fn open(path: &Path) -> Result<Self> {
        let file = DiskFile::open(path)?;
        let tensors = safetensors::tensors(&file, 0).map_err(|reason| mismatch(path, reason))?;
        Ok(Self {
            file,
            tensors: tensors
                .into_iter()
                .map(|it| (it.name.clone(), it))
                .collect(),
        })
    }

    /// That the file has the tensors of `model`, all of them and no others.
    ///
    /// # Errors
    ///
    /// One that lists every tensor that is missing, of another shape, or surplus.
    pub fn check(&self, model: &MambaConfig) -> Result<()> {
        let table = model.parameter_table();
        let mut problems = Vec::new();
        for parameter in &table {
            let (name, shape) = (&parameter.name, &parameter.shape);
            match self.tensors.get(name) {
                None => problems.push(format!("`{name}` is missing")),
                Some(it) if it.shape != *shape || it.format != Format::F32 => {
                    problems.push(format!(
                        "`{name}` is {} of shape {:?}, expected float32 of shape {shape:?}",
                        it.format.name(),
                        it.shape
                    ));
                }
                Some(_) => {}
            }
        }
        let expected: std::collections::BTreeSet<&str> =
            table.iter().map(|it| it.name.as_str()).collect();
        let surplus = self
            .tensors
            .keys()
            .filter(|name| !expected.contains(name.as_str()));
        problems.extend(surplus.map(|name| format!("`{}` is not part of the model", shown(name))));
        match problems.is_empty() {
            true => Ok(()),
            false => Err(mismatch(
                &self.file.path,
                format!("does not fit the model:{}", listed(&problems)),
            )),
        }
    }

    /// Reads one tensor.
    ///
    /// # Errors
    ///
    /// If the file has none of that name, or cannot be read.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| mismatch(&self.file.path, format!("has no `{}`", shown(name))))?;
        tensor
            .values(&self.file)
            .map_err(|reason| mismatch(&self.file.path, reason))
    }
}

/// What a file is read in: a tensor's values, or the bytes between tensors.
enum Piece<'a> {
    Tensor(&'a str, Vec<f32>),
    Between(Vec<u8>),
}

impl WeightsFile {
    /// Reads the file from front to back, once: `take` gets every tensor, in the order of the file,
    /// and `see` every byte.
    ///
    /// Another thread is one tensor ahead, so that the disk works while values are put to use.
    ///
    /// # Errors
    ///
    /// The first of `take`, or what reading says.
    pub(crate) fn read_through(
        &self,
        mut see: impl FnMut(&[u8]),
        mut take: impl FnMut(&str, Vec<f32>) -> Result<()>,
    ) -> Result<()> {
        thread::scope(|scope| {
            let (send, receive) = sync_channel(1);
            scope.spawn(move || {
                self.pieces(|piece| {
                    // The receiver is gone where `take` has failed.
                    send.send(piece).is_ok()
                });
            });
            for piece in receive {
                match piece.map_err(|reason| mismatch(&self.file.path, reason))? {
                    Piece::Between(bytes) => see(&bytes),
                    Piece::Tensor(name, values) => {
                        see(bytemuck::cast_slice(&values));
                        take(name, values)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Gives the whole file away in pieces, until it ends, cannot be read or nobody wants more.
    fn pieces<'a>(&'a self, mut give: impl FnMut(Result<Piece<'a>, String>) -> bool) {
        let mut tensors: Vec<&Stored> = self.tensors.values().collect();
        tensors.sort_by_key(|tensor| tensor.offset);
        let mut place = 0;
        for tensor in tensors {
            let between = self.between(place, tensor.offset);
            let values = tensor.values(&self.file);
            let values = values.map(|values| Piece::Tensor(&tensor.name, values));
            if !give(between) || !give(values) {
                return;
            }
            place = tensor.offset + tensor.bytes();
        }
        give(self.between(place, self.file.length()));
    }

    fn between(&self, from: u64, to: u64) -> Result<Piece<'static>, String> {
        let length = to.checked_sub(from).ok_or("has tensors that overlap")?;
        Ok(Piece::Between(self.file.read(from, length)?))
    }
}

fn mismatch(path: &Path, reason: String) -> Error {
    Error::Checkpoint {
        path: path.to_owned(),
        reason,
        hint: "the checkpoint is of another model: use the one that its `config.toml` describes"
            .to_owned(),
    }
}
