//! One shard file in memory: mapped, checked, and kept from filling memory.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;
use xxhash_rust::xxh3::xxh3_64;

use super::format::{FIXED, Header, Record, check_header, u64_at};
use crate::error::{DataError, Result};

/// A mapped shard whose header and index have been checked.
#[derive(Debug)]
pub(crate) struct MappedShard {
    path: PathBuf,
    map: Mmap,
    header: Header,
    /// One bit per block that has been checked; none when reading does not check.
    checked: Option<Vec<AtomicU64>>,
}

impl MappedShard {
    /// Opens a shard. With `check_on_read`, each data block is checked before its first use.
    pub fn open(path: &Path, check_on_read: bool) -> Result<Self> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let metadata = file.metadata().map_err(DataError::io("inspect", path))?;
        let mut fixed = Vec::with_capacity(FIXED);
        (&file)
            .take(FIXED as u64)
            .read_to_end(&mut fixed)
            .map_err(DataError::io("read", path))?;
        let header = Header::decode(path, &fixed, metadata.len())?;
        // SAFETY: the mapping is private to this struct and only ever read. Its length was just
        // compared with the header's, so all offsets below lie within the file. What remains is
        // what every memory map asks of its users: nobody may change or cut a shard while it is
        // open. Shards are written once, under another name, and never changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::io("map", path))?;
        if map.len() as u64 != metadata.len() {
            return Err(DataError::ShardLength {
                path: path.to_path_buf(),
                got: map.len() as u64,
                expected: metadata.len(),
            });
        }
        check_header(path, &header, &map[..header.header_bytes as usize])?;
        // Windows are read from everywhere: read-ahead past them would fetch the disk many
        // times over. Each read asks for exactly its own range instead.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::Random);
        let words = header.blocks.div_ceil(64) as usize;
        let bitmap = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            path: path.to_path_buf(),
            map,
            header,
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
        Record::at(&self.map, index)
    }

    /// The name of document `index`.
    pub fn name(&self, index: u64) -> String {
        let begin = match index {
            0 => 0,
            _ => self.record(index - 1).name_end as usize,
        };
        let end = self.record(index).name_end as usize;
        let at = self.header.names_at();
        String::from_utf8_lossy(&self.map[at + begin..at + end]).into_owned()
    }

    /// The hash that stands for the whole file: it covers the index and all block hashes.
    pub fn header_hash(&self) -> u64 {
        u64_at(&self.map, self.header.header_bytes as usize - 8)
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
        let range = self.file_range(start..end);
        self.prefetch(&range);
        out.copy_from_slice(&self.map[range]);
        Ok(())
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
        let range = self.file_range(begin..end);
        self.prefetch(&range);
        let got = xxh3_64(&self.map[range.clone()]);
        let expected = u64_at(&self.map, self.header.hashes_at() + index as usize * 8);
        if got != expected {
            return Err(DataError::ShardDamaged {
                path: self.path.clone(),
                offset: range.start as u64,
                problem: "checksum of the data block that begins there",
                got: format!("{got:016x}"),
                expected: format!("{expected:016x}"),
            });
        }
        Ok(end - begin)
    }

    fn file_range(&self, data: Range<u64>) -> Range<usize> {
        let at = self.header.header_bytes;
        (at + data.start) as usize..(at + data.end) as usize
    }

    /// Starts reading a range of the file in one go. A hint: failure changes nothing but speed.
    fn prefetch(&self, range: &Range<usize>) {
        #[cfg(unix)]
        let _ = self
            .map
            .advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the mapping's pages back, so that memory in use does not grow to the file's size.
    /// They stay in the system's page cache.
    pub fn release(&self) {
        // SAFETY: the mapping is shared, backed by a file and never written to. On Linux,
        // dropping its pages therefore loses nothing: the next access, also one of another
        // thread at this moment, finds the same bytes through the file.
        #[cfg(target_os = "linux")]
        let _ = unsafe {
            self.map
                .unchecked_advise(memmap2::UncheckedAdvice::DontNeed)
        };
    }
}
