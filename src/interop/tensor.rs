//! Tensors in files: where they are, in which format, and their values in f32.

use burn::tensor::{bf16, f16};
use rayon::prelude::*;

use super::file::RandomAccess;

/// Values that a thread reads at once.
const CHUNK: usize = 1 << 20;

/// Number format of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    F16,
    Bf16,
    /// One that weights do not have, by the file's name for it.
    Other(&'static str),
}

/// Names of formats in safetensors and of their storages in PyTorch.
const FORMATS: [(&str, &str, Format); 11] = [
    ("F32", "FloatStorage", Format::F32),
    ("F16", "HalfStorage", Format::F16),
    ("BF16", "BFloat16Storage", Format::Bf16),
    ("F64", "DoubleStorage", Format::Other("float64")),
    ("I64", "LongStorage", Format::Other("int64")),
    ("I32", "IntStorage", Format::Other("int32")),
    ("I16", "ShortStorage", Format::Other("int16")),
    ("I8", "CharStorage", Format::Other("int8")),
    ("U8", "ByteStorage", Format::Other("uint8")),
    ("BOOL", "BoolStorage", Format::Other("bool")),
    ("", "UntypedStorage", Format::Other("untyped")),
];

impl Format {
    /// By the class of a PyTorch storage.
    pub(super) fn of_storage(class: &str) -> Option<Self> {
        let found = FORMATS.iter().find(|(_, name, _)| *name == class);
        found.map(|(.., format)| *format)
    }

    /// By the name in a safetensors header.
    pub(super) fn of_safetensors(dtype: &str) -> Self {
        let found = FORMATS.iter().find(|(name, ..)| *name == dtype);
        found.map_or(Self::Other("of another format"), |(.., format)| *format)
    }

    /// Bytes of an element; none of a format that is not read.
    pub(super) fn size(self) -> Option<u64> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Other(_) => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::Other(name) => name,
        }
    }
}

/// A tensor in one of a checkpoint's files. Its bytes are inside the file, and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// Its name in the file.
    pub(super) name: String,
    pub(super) format: Format,
    pub(super) shape: Vec<usize>,
    /// Which file.
    pub(super) file: usize,
    pub(super) offset: u64,
}

impl Stored {
    /// Bytes in the file; none where the format is not read.
    pub(super) fn bytes(&self) -> u64 {
        // The product fits: it was compared with the file's length.
        self.format.size().unwrap_or(0) * self.shape.iter().product::<usize>() as u64
    }

    /// Reads the values, as f32.
    pub(super) fn values(&self, file: &(impl RandomAccess + Sync)) -> Result<Vec<f32>, String> {
        let count: usize = self.shape.iter().product();
        let wide = |from: fn(u16) -> f32| {
            let bytes = file.read(self.offset, 2 * count as u64)?;
            let halves = bytes.chunks_exact(2);
            Ok(halves
                .map(|half| from(u16::from_le_bytes([half[0], half[1]])))
                .collect())
        };
        match self.format {
            Format::F32 => {
                let mut values = vec![0.0f32; count];
                // By all threads: more than reading, the system is busy making memory ready. The
                // files are little-endian, as is every machine that this program is built for.
                values
                    .par_chunks_mut(CHUNK)
                    .enumerate()
                    .try_for_each(|(i, chunk)| {
                        let offset = self.offset + 4 * (i * CHUNK) as u64;
                        file.fill(offset, bytemuck::cast_slice_mut(chunk))
                    })?;
                Ok(values)
            }
            Format::F16 => wide(|half| f16::from_bits(half).to_f32()),
            Format::Bf16 => wide(|half| bf16::from_bits(half).to_f32()),
            Format::Other(name) => Err(format!("`{}` is {name}, and no weight is", self.name)),
        }
    }
}

/// Bytes of a tensor of this shape, if it can exist at all.
pub(super) fn byte_count(shape: &[u64], size: u64) -> Option<u64> {
    let bytes = shape
        .iter()
        .try_fold(size, |product, length| product.checked_mul(*length))?;
    // Each length by itself, too: a zero hides the others.
    let fits = |length: &u64| usize::try_from(*length).is_ok_and(|it| it <= isize::MAX as usize);
    (shape.iter().all(fits) && bytes <= isize::MAX as u64).then_some(bytes)
}

/// The rows of `values`, a matrix of `columns` columns, as columns.
pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    // In squares, so that what is read and what is written both stay in the cache.
    const SIDE: usize = 32;
    let rows = values.len() / columns.max(1);
    let mut out = vec![0.0; values.len()];
    // A band of rows of the result, that is of columns of `values`, is written by one thread.
    out.par_chunks_mut(SIDE * rows.max(1))
        .enumerate()
        .for_each(|(band, out)| {
            for row in (0..rows).step_by(SIDE) {
                let end = (row + SIDE).min(rows);
                for (c, out) in out.chunks_exact_mut(rows).enumerate() {
                    let column = band * SIDE + c;
                    for (r, out) in (row..end).zip(&mut out[row..end]) {
                        *out = values[r * columns + column];
                    }
                }
            }
        });
    out
}
