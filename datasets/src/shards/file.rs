//! One shard file: its header and index in memory, its data read where it is wanted.
//!
//! The data is read, not mapped: a file that is cut short, and a disk or network that fails, is then
//! an error that a trainer can act on, where a mapping would end the process with a signal.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::Xxh3;

use super::format::{FIXED, Header, Record, check_header, u64_at};
use crate::error::{DataError, Result};

/// Bytes read at a time while a block is checked.
const CHUNK: usize = 1 << 20;

/// An open shard whose header and index have been checked.
#[derive(Debug)]
pub(crate) struct ShardFile {
    path: PathBuf,
    file: File,
    header: Header,
    /// All bytes before the data: header, documents, names, checksums.
    index: Vec<u8>,
    /// One bit per block that has been checked; none when reading does not check.
    checked: Option<Vec<AtomicU64>>,
}

impl ShardFile {
    /// Opens a shard. With `check_on_read`, each data block is checked before its first use.
    pub fn open(path: &Path, check_on_read: bool) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let bytes = file
            .metadata()
            .map_err(DataError::io("inspect", path))?
            .len();
        let mut fixed = vec![0; FIXED.min(usize::try_from(bytes).unwrap_or(FIXED))];
        read_exact_at(&file, 0, &mut fixed).map_err(DataError::io("read", path))?;
        // What passes has a header no longer than the file.
        let header = Header::decode(path, &fixed, bytes)?;
        let mut index = vec![0; header.header_bytes as usize];
        read_exact_at(&file, 0, &mut index).map_err(DataError::io("read", path))?;
        check_header(path, &header, &index)?;
        let words = header.blocks.div_ceil(64) as usize;
        let bitmap = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            path: path.to_path_buf(),
            file,
            header,
            index,
            checked: check_on_read.then(bitmap),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The record of document `index`, which is below the header's number of documents.
    pub fn record(&self, index: u64) -> Record {
        Record::at(&self.index, index)
    }

    /// The name of document `index`.
    pub fn name(&self, index: u64) -> String {
        let begin = match index {
            0 => 0,
            _ => self.record(index - 1).name_end as usize,
        };
        let end = self.record(index).name_end as usize;
        let at = self.header.names_at();
        String::from_utf8_lossy(&self.index[at + begin..at + end]).into_owned()
    }

    /// The hash that stands for the whole file: it covers the index and all block hashes.
    pub fn header_hash(&self) -> u64 {
        u64_at(&self.index, self.header.header_bytes as usize - 8)
    }

    /// Copies data from `start`; the caller has checked that it lies within the data.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let end = start + out.len() as u64;
        if let Some(checked) = &self.checked {
            let block = self.header.block_bytes;
            for index in start / block..end.div_ceil(block) {
                self.check_once(checked, index)?;
            }
        }
        self.read_data(start, out)
    }

    fn read_data(&self, start: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, self.header.header_bytes + start, out).map_err(|error| {
            let length = self.file.metadata().map(|it| it.len());
            let expected = self.header.header_bytes + self.header.data_bytes;
            match length {
                Ok(got) if got != expected => DataError::ShardLength {
                    path: self.path.clone(),
                    got,
                    expected,
                },
                _ => DataError::io("read", &self.path)(error),
            }
        })
    }

    fn check_once(&self, checked: &[AtomicU64], index: u64) -> Result<()> {
        let (word, bit) = (&checked[index as usize / 64], 1 << (index % 64));
        // Two threads may both check a block for the first time; that is only work done twice.
        if word.load(Ordering::Relaxed) & bit == 0 {
            self.check_block(index)?;
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Compares a data block with its checksum; returns its length in bytes.
    pub fn check_block(&self, index: u64) -> Result<u64> {
        let begin = index * self.header.block_bytes;
        let end = begin
            .saturating_add(self.header.block_bytes)
            .min(self.header.data_bytes);
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; CHUNK.min((end - begin) as usize)];
        let mut at = begin;
        while at < end {
            let count = buffer.len().min((end - at) as usize);
            self.read_data(at, &mut buffer[..count])?;
            hash.update(&buffer[..count]);
            at += count as u64;
        }
        let got = hash.digest();
        let expected = u64_at(&self.index, self.header.hashes_at() + index as usize * 8);
        if got != expected {
            return Err(DataError::ShardDamaged {
                path: self.path.clone(),
                offset: self.header.header_bytes + begin,
                problem: "checksum of the data block that begins there",
                got: format!("{got:016x}"),
                expected: format!("{expected:016x}"),
            });
        }
        Ok(end - begin)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    use std::os::windows::fs::FileExt as _;
    while !out.is_empty() {
        match file.seek_read(out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                offset += count as u64;
                out = &mut out[count..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
