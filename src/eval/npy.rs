//! NumPy's file format, version 1.0: a header and the numbers behind it, in C's order.

use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use crate::error::{Error, Result};
use crate::new_file::NewFile;

/// Type of the numbers, as NumPy writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// float32, little-endian.
    F32,
    /// int32, little-endian.
    I32,
}

impl Number {
    fn descr(self) -> &'static str {
        match self {
            Self::F32 => "<f4",
            Self::I32 => "<i4",
        }
    }
}

/// The header of an array of this shape.
pub fn header(number: Number, shape: &[u64]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|size| format!("{size}, ")).collect();
    // A tuple of one has its comma; longer ones go without the last.
    let sizes = match shape {
        [_] => sizes.trim_end(),
        _ => sizes.trim_end_matches(", "),
    };
    let mut text = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': ({sizes}), }}",
        number.descr()
    );
    // Data begin at a multiple of 64; before them is a line's end.
    let start = 10;
    let padded = (start + text.len() + 1).next_multiple_of(64) - start;
    while text.len() + 1 < padded {
        text.push(' ');
    }
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header
}

/// An array of one axis on disk, whose parts may come in any order. The file has its name when it is
/// finished.
pub struct Array {
    new: NewFile,
    begin: u64,
}

impl Array {
    /// A file for `length` numbers; those never written are zero.
    pub fn create(path: &Path, number: Number, length: u64) -> Result<Self> {
        let mut new = NewFile::create(path)?;
        let header = header(number, &[length]);
        let begin = header.len() as u64;
        let file = new.file();
        file.write_all(&header)
            .and_then(|()| file.set_len(begin + 4 * length))
            .map_err(Error::io("write", path))?;
        Ok(Self { new, begin })
    }

    /// Writes numbers of 4 bytes from index `at` on.
    pub fn write<T: bytemuck::NoUninit>(&mut self, at: u64, numbers: &[T]) -> Result<()> {
        debug_assert_eq!(size_of::<T>(), 4);
        let file = self.new.file();
        file.seek(SeekFrom::Start(self.begin + 4 * at))
            .and_then(|_| file.write_all(bytemuck::cast_slice(numbers)))
            .map_err(|error| Error::io("write", self.new.path())(error))
    }

    /// Makes the file safe on disk.
    pub fn finish(self) -> Result<()> {
        self.new.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_as_numpy_writes_it() {
        for (shape, text) in [(&[3, 256][..], "(3, 256)"), (&[7], "(7,)")] {
            let header = header(Number::F32, shape);
            assert_eq!(&header[..8], b"\x93NUMPY\x01\x00");
            assert_eq!(header.len() % 64, 0);
            assert_eq!(header.last(), Some(&b'\n'));
            let length = u16::from_le_bytes([header[8], header[9]]);
            assert_eq!(usize::from(length), header.len() - 10);
            let expected = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {text}, }}");
            assert!(String::from_utf8_lossy(&header[10..]).starts_with(&expected));
        }
    }

    #[test]
    fn parts_come_in_any_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.npy");
        let mut array = Array::create(&path, Number::I32, 5).expect("created");
        array.write(3, &[4i32, 5]).expect("written");
        array.write(0, &[1i32, 2]).expect("written");
        array.finish().expect("on disk");
        let bytes = std::fs::read(&path).expect("readable");
        let numbers: Vec<i32> = bytes[bytes.len() - 20..]
            .chunks_exact(4)
            .map(|it| i32::from_le_bytes([it[0], it[1], it[2], it[3]]))
            .collect();
        assert_eq!(numbers, [1, 2, 0, 4, 5]);
    }
}
