//! Files of tensors, read at places.
//!
//! A tensor is read when it is wanted, into memory of its own: a checkpoint is never in memory as a
//! whole, and a file that another program cuts short meanwhile is an error, which it would not be
//! if the file were mapped.

use std::fs::File;
use std::io;
#[cfg(unix)]
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes with places.
pub(super) trait RandomAccess {
    /// How many there are.
    fn length(&self) -> u64;

    /// Fills `buffer` with what begins at `offset`.
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<(), String>;

    /// `length` bytes from `offset`; memory is taken only for what is there.
    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, String> {
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.length()) {
            return Err(format!(
                "should have {length} bytes at {offset}, and has only {} in all: it is truncated \
                 or damaged",
                self.length()
            ));
        }
        let mut buffer = vec![0; length as usize];
        self.fill(offset, &mut buffer)?;
        Ok(buffer)
    }
}

/// A file on disk.
#[derive(Debug)]
pub(super) struct DiskFile {
    pub(super) path: PathBuf,
    file: File,
    length: u64,
}

impl DiskFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        // Tensors are read from front to back: the system may read further ahead. It is a wish.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
        })
    }
}

impl RandomAccess for DiskFile {
    fn length(&self) -> u64 {
        self.length
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<(), String> {
        self.read_at(offset, buffer)
            .map_err(|e| format!("could not be read at {offset}: {e}"))
    }
}

impl DiskFile {
    #[cfg(unix)]
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    #[cfg(not(unix))]
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        // The place in an open file is shared by all who read it, and this one has several.
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

impl RandomAccess for &[u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<(), String> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self
            .get(from..)
            .and_then(|bytes| bytes.get(..buffer.len()))
            .ok_or_else(|| format!("ends before {offset}"))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}
