//! The header of a safetensors file, and writing such files one tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::file::RandomAccess;
use super::shown;
use super::tensor::{Format, Stored, byte_count};
use crate::error::{Error, Result};

/// Largest header that is read; that of a 2.8B model has 80 kB.
const MOST_HEADER: u64 = 16 << 20;

/// What the header says of a tensor.
#[derive(Serialize, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header: entries, and notes that are not read.
#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    _metadata: Option<serde::de::IgnoredAny>,
    #[serde(flatten)]
    tensors: BTreeMap<String, Entry>,
}

/// The tensors of the file, which is the `index`-th of a checkpoint.
pub(super) fn tensors(file: &impl RandomAccess, index: usize) -> Result<Vec<Stored>, String> {
    let length = file
        .read(0, 8)?
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if length > file.length() - 8 {
        return Err(format!(
            "is no safetensors file: its first bytes announce a header of {length} bytes, and it \
             has {} in all",
            file.length()
        ));
    }
    if length > MOST_HEADER {
        return Err(format!(
            "has a header of {length} bytes, more than {MOST_HEADER}: a model has some thousand \
             tensors"
        ));
    }
    let bytes = file.read(8, length)?;
    let header: Header =
        serde_json::from_slice(&bytes).map_err(|e| format!("has no safetensors header: {e}"))?;
    let begin = 8 + length;
    let mut tensors = Vec::with_capacity(header.tensors.len());
    for (name, entry) in header.tensors {
        tensors.push(stored(name, &entry, begin, file.length(), index)?);
    }
    check_places(&tensors, begin, file.length())?;
    Ok(tensors)
}

fn stored(
    name: String,
    entry: &Entry,
    begin: u64,
    file_length: u64,
    file: usize,
) -> Result<Stored, String> {
    let format = Format::of_safetensors(&entry.dtype);
    let [from, to] = entry.data_offsets;
    let length = to.checked_sub(from);
    let wanted = match format.size() {
        Some(size) => byte_count(&entry.shape, size),
        // A format that is not read is reported by whoever wants the tensor.
        None => byte_count(&entry.shape, 1).and(length),
    };
    let end = begin.checked_add(to);
    if length.is_none() || length != wanted || end.is_none_or(|end| end > file_length) {
        return Err(format!(
            "has a tensor `{}` of {} with the shape {:?} at the bytes {from} to {to} of {}",
            shown(&name),
            format.name(),
            &entry.shape[..entry.shape.len().min(8)],
            file_length - begin
        ));
    }
    Ok(Stored {
        name,
        format,
        shape: entry.shape.iter().map(|length| *length as usize).collect(),
        file,
        offset: begin + from,
    })
}

/// That no two tensors share bytes, so that a small file cannot stand for a huge model.
fn check_places(tensors: &[Stored], begin: u64, end: u64) -> Result<(), String> {
    let sum: u64 = tensors.iter().map(Stored::bytes).sum();
    if sum > end - begin {
        return Err(format!(
            "has tensors of {sum} bytes in all, in {} bytes",
            end - begin
        ));
    }
    Ok(())
}

/// A tensor to be written, as f32.
pub(super) struct Outgoing<'a> {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// Gives the values when their turn has come.
    pub(super) values: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

impl Outgoing<'_> {
    /// Bytes of the values.
    pub(super) fn bytes(&self) -> u64 {
        4 * self.shape.iter().product::<usize>() as u64
    }
}

/// Writes a file of `tensors`, holding one in memory at a time.
pub(super) fn write(path: &Path, tensors: &[Outgoing<'_>]) -> Result<()> {
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".to_owned(),
        serde_json::json!({"format": "pt"}),
    );
    let mut offset = 0;
    for tensor in tensors {
        let entry = Entry {
            dtype: "F32".to_owned(),
            shape: tensor.shape.iter().map(|length| *length as u64).collect(),
            data_offsets: [offset, offset + tensor.bytes()],
        };
        offset += tensor.bytes();
        let entry = serde_json::to_value(entry).map_err(anyhow::Error::from)?;
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header).map_err(anyhow::Error::from)?;
    // Data begin at a multiple of eight, as readers that map the file expect.
    header.resize(header.len().next_multiple_of(8), b' ');
    let failed = || Error::io("write", path);
    let mut file = BufWriter::new(File::create(path).map_err(failed())?);
    file.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| file.write_all(&header))
        .map_err(failed())?;
    for tensor in tensors {
        let values = (tensor.values)()?;
        debug_assert_eq!(values.len() as u64 * 4, tensor.bytes());
        file.write_all(bytemuck::cast_slice(&values))
            .map_err(failed())?;
    }
    file.into_inner()
        .map_err(|e| e.into_error())
        .and_then(|file| file.sync_all())
        .map_err(failed())
}
