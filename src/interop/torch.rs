//! State dicts saved by PyTorch: a zip file with a pickle that says what is where, and one entry
//! of plain bytes for each storage.

use super::file::RandomAccess;
use super::pickle::{self, Pickled};
use super::shown;
use super::tensor::{Stored, byte_count};
use super::zip::Zip;

/// The tensors of the file, which is the `index`-th of a checkpoint.
pub(super) fn tensors(file: &impl RandomAccess, index: usize) -> Result<Vec<Stored>, String> {
    let zip = Zip::open(file)?;
    let pickles: Vec<&str> = zip
        .names()
        .filter(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
        .collect();
    let [pickle_name] = pickles[..] else {
        return Err(format!(
            "is a zip file with {} entries `data.pkl`, and one by `torch.save` has one",
            pickles.len()
        ));
    };
    let folder = pickle_name.trim_end_matches("data.pkl");
    check_byte_order(file, &zip, folder)?;
    let place = zip.find(file, pickle_name)?;
    if place.length > pickle::MOST_BYTES {
        return Err(format!(
            "has a pickle of {} bytes, more than {}",
            place.length,
            pickle::MOST_BYTES
        ));
    }
    pickle::state_dict(&file.read(place.offset, place.length)?)?
        .into_iter()
        .map(|(name, tensor)| {
            locate(file, &zip, folder, index, &name, &tensor)
                .map_err(|problem| format!("has a tensor `{}` that {problem}", shown(&name)))
        })
        .collect()
}

fn check_byte_order(file: &impl RandomAccess, zip: &Zip, folder: &str) -> Result<(), String> {
    let name = format!("{folder}byteorder");
    if !zip.names().any(|known| known == name) {
        return Ok(());
    }
    let place = zip.find(file, &name)?;
    match file.read(place.offset, place.length.min(16))?.as_slice() {
        b"little" => Ok(()),
        other => Err(format!(
            "has the byte order {:?}, and only \"little\" is read",
            String::from_utf8_lossy(other)
        )),
    }
}

/// Finds a tensor's bytes in the file.
fn locate(
    file: &impl RandomAccess,
    zip: &Zip,
    folder: &str,
    index: usize,
    name: &str,
    tensor: &Pickled,
) -> Result<Stored, String> {
    let place = zip.find(file, &format!("{folder}data/{}", tensor.key))?;
    if !contiguous(&tensor.shape, &tensor.strides) {
        return Err(format!(
            "has the strides {:?} for the shape {:?}: save it after `.contiguous()`",
            tensor.strides, tensor.shape
        ));
    }
    // A format that is not read is reported with the tensor's name, by whoever wants the tensor.
    let size = tensor.format.size().unwrap_or(1);
    let begin = tensor.offset.checked_mul(size);
    let bytes = byte_count(&tensor.shape, size);
    let end = begin.zip(bytes).and_then(|(a, b)| a.checked_add(b));
    match (begin, end) {
        (Some(begin), Some(end)) if end <= place.length => Ok(Stored {
            name: name.to_owned(),
            format: tensor.format,
            shape: tensor.shape.iter().map(|length| *length as usize).collect(),
            file: index,
            // Inside the file, as the whole entry is.
            offset: place.offset + begin,
        }),
        _ => Err(format!(
            "has the shape {:?} from element {}, in a storage of {} bytes",
            tensor.shape, tensor.offset, place.length
        )),
    }
}

/// Whether elements follow each other as in the shape.
fn contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1u64;
    for (length, stride) in shape.iter().zip(strides).rev() {
        if *length > 1 && *stride != expected {
            return false;
        }
        expected = expected.saturating_mul(*length);
    }
    shape.len() == strides.len()
}
