//! The safetensors files of a checkpoint: tensors of several data types, by name.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use crate::error::{Error, Result};
use crate::train::parameters::Named;

/// A tensor in host memory: what the device held when it was taken.
pub(super) struct Held {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    data: TensorData,
}

impl Held {
    /// Reads a tensor from its device.
    pub(super) fn take(tensor: Named) -> Self {
        Self {
            data: (tensor.read)(),
            name: tensor.name,
            shape: tensor.shape,
            dtype: tensor.dtype,
        }
    }

    /// Bytes of the values.
    pub(super) fn bytes(&self) -> usize {
        self.data.as_bytes().len()
    }
}

/// Writes `tensors` in the order of their names, larger data types first, as readers that map the
/// file expect.
pub(super) fn write(file: &mut dyn Write, tensors: &[Held]) -> io::Result<()> {
    let mut tensors: Vec<&Held> = tensors.iter().collect();
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then(a.name.cmp(&b.name)));
    let mut offset = 0;
    let entries = tensors.iter().map(|tensor| {
        let from = offset;
        offset += tensor.bytes();
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (from, offset),
        };
        (tensor.name.clone(), info)
    });
    let notes = [("format".to_owned(), "pt".to_owned())].into();
    let metadata = Metadata::new(Some(notes), entries.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    // Data begin at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    tensors
        .iter()
        .try_for_each(|tensor| file.write_all(tensor.data.as_bytes()))
}

/// A safetensors file in memory.
pub(super) struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl TensorFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            bytes: fs::read(path).map_err(Error::io("read", path))?,
        })
    }

    pub(super) fn tensors(&self) -> Result<SafeTensors<'_>> {
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
    pub(super) fn check(&self, problems: Vec<String>) -> Result<()> {
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
pub(super) fn read_tensor(
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
