//! The shard file format, version 1.
//!
//! All numbers are little-endian. A file is a header and then the data: the bytes of its
//! documents back to back, with nothing inserted.
//!
//! | offset | bytes | content |
//! | --- | --- | --- |
//! | 0 | 8 | magic `MBSHARD\0` |
//! | 8 | 4 | format version |
//! | 12 | 4 | flags, none defined: 0 |
//! | 16 | 8 | H, length of the whole header: where the data begins |
//! | 24 | 8 | D, length of the data |
//! | 32 | 8 | N, number of documents |
//! | 40 | 8 | words in the data: runs of non-whitespace, counted per document |
//! | 48 | 8 | block length of the data checksums |
//! | 56 | 8 | K, number of blocks: D over the block length, rounded up |
//! | 64 | 8 | M, length of the name table |
//! | 72 | 4 | number of this shard in its split, from 0 |
//! | 76 | 4 | number of shards in the split |
//! | 80 | 32 N | documents: start in the data, length, words, end of its name in the name table |
//! | | M | name table: the documents' names in UTF-8, back to back |
//! | | 8 K | XXH3-64 of each block |
//! | H - 8 | 8 | XXH3-64 of all header bytes before |
//!
//! The file's length is exactly H + D.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{DataError, Result};

/// First bytes of every shard.
pub(crate) const MAGIC: [u8; 8] = *b"MBSHARD\0";
/// The format version written and read.
pub(crate) const VERSION: u32 = 1;
/// Length of the part of the header that is the same for every shard.
pub(crate) const FIXED: usize = 80;
/// Length of a document's record in the index.
pub(crate) const RECORD: usize = 32;
/// Length of the data blocks that have checksums of their own.
pub(crate) const BLOCK: u64 = 4 << 20;

/// The fixed part of a shard's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Length of the whole header (H).
    pub header_bytes: u64,
    /// Length of the data (D).
    pub data_bytes: u64,
    /// Number of documents (N).
    pub documents: u64,
    /// Words in the data.
    pub words: u64,
    /// Block length of the data checksums.
    pub block_bytes: u64,
    /// Number of blocks (K).
    pub blocks: u64,
    /// Length of the name table (M).
    pub name_bytes: u64,
    /// Number of this shard in its split.
    pub shard: u32,
    /// Number of shards in the split.
    pub shards: u32,
}

/// A document's place in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Where in the data it begins.
    pub start: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its words.
    pub words: u64,
    /// Where in the name table its name ends.
    pub name_end: u64,
}

impl Header {
    /// The total length of header parts with these counts; none when it overflows.
    pub fn length(documents: u64, name_bytes: u64, blocks: u64) -> Option<u64> {
        let records = documents.checked_mul(RECORD as u64)?;
        let hashes = blocks.checked_mul(8)?;
        (FIXED as u64 + 8)
            .checked_add(records)?
            .checked_add(name_bytes)?
            .checked_add(hashes)
    }

    /// Where the name table begins.
    pub fn names_at(&self) -> usize {
        FIXED + self.documents as usize * RECORD
    }

    /// Where the block hashes begin.
    pub fn hashes_at(&self) -> usize {
        self.names_at() + self.name_bytes as usize
    }

    /// The fixed part as bytes.
    pub fn encode(&self) -> [u8; FIXED] {
        let mut bytes = [0; FIXED];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let numbers = [
            self.header_bytes,
            self.data_bytes,
            self.documents,
            self.words,
            self.block_bytes,
            self.blocks,
            self.name_bytes,
        ];
        for (slot, number) in bytes[16..72].chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        bytes[72..76].copy_from_slice(&self.shard.to_le_bytes());
        bytes[76..80].copy_from_slice(&self.shards.to_le_bytes());
        bytes
    }

    /// Reads the fixed part from a file's first bytes (all of a file shorter than it) and checks
    /// it against the file's length.
    ///
    /// What passes describes a layout that fits the file, so that the rest of the header can be
    /// addressed without further bounds checks on untrusted numbers.
    pub fn decode(path: &Path, bytes: &[u8], file_bytes: u64) -> Result<Self> {
        check_kind(path, bytes)?;
        if bytes.len() < FIXED {
            return Err(length_error(path, file_bytes, FIXED as u64));
        }
        let header = Self {
            header_bytes: u64_at(bytes, 16),
            data_bytes: u64_at(bytes, 24),
            documents: u64_at(bytes, 32),
            words: u64_at(bytes, 40),
            block_bytes: u64_at(bytes, 48),
            blocks: u64_at(bytes, 56),
            name_bytes: u64_at(bytes, 64),
            shard: u32_at(bytes, 72),
            shards: u32_at(bytes, 76),
        };
        header.check_layout(path, u32_at(bytes, 12), file_bytes)?;
        Ok(header)
    }

    fn check_layout(&self, path: &Path, flags: u32, file_bytes: u64) -> Result<()> {
        let damaged = |offset, problem, got: u64, expected: String| DataError::ShardDamaged {
            path: path.to_path_buf(),
            offset,
            problem,
            got: got.to_string(),
            expected,
        };
        if flags != 0 {
            return Err(damaged(12, "flags", flags.into(), "0".to_owned()));
        }
        if self.block_bytes == 0 {
            return Err(damaged(48, "block length", 0, "at least 1".to_owned()));
        }
        let blocks = self.data_bytes.div_ceil(self.block_bytes);
        if self.blocks != blocks {
            return Err(damaged(
                56,
                "number of blocks",
                self.blocks,
                blocks.to_string(),
            ));
        }
        let length = Self::length(self.documents, self.name_bytes, self.blocks);
        if length != Some(self.header_bytes) {
            let expected = length.map_or("a smaller header".to_owned(), |n| n.to_string());
            return Err(damaged(16, "header length", self.header_bytes, expected));
        }
        let total = self.header_bytes.saturating_add(self.data_bytes);
        if total != file_bytes {
            return Err(length_error(path, file_bytes, total));
        }
        Ok(())
    }
}

impl Record {
    /// The record as bytes.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let numbers = [self.start, self.bytes, self.words, self.name_end];
        for (slot, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// The record of document `index` in a whole header.
    pub fn at(header: &[u8], index: u64) -> Self {
        let at = FIXED + index as usize * RECORD;
        Self {
            start: u64_at(header, at),
            bytes: u64_at(header, at + 8),
            words: u64_at(header, at + 16),
            name_end: u64_at(header, at + 24),
        }
    }
}

/// Checks a whole header (all bytes before the data): its hash, then that its index describes
/// exactly the data. `bytes` has the length that [`Header::decode`] has accepted.
pub(crate) fn check_header(path: &Path, header: &Header, bytes: &[u8]) -> Result<()> {
    let damaged = |offset: usize, problem, got: String, expected: String| DataError::ShardDamaged {
        path: path.to_path_buf(),
        offset: offset as u64,
        problem,
        got,
        expected,
    };
    let hashed = bytes.len() - 8;
    let (got, expected) = (xxh3_64(&bytes[..hashed]), u64_at(bytes, hashed));
    if got != expected {
        let (got, expected) = (format!("{got:016x}"), format!("{expected:016x}"));
        return Err(damaged(
            0,
            "checksum of the header and index",
            got,
            expected,
        ));
    }
    let names = &bytes[header.names_at()..header.hashes_at()];
    let names = std::str::from_utf8(names).map_err(|error| {
        let at = header.names_at() + error.valid_up_to();
        damaged(at, "name table", "bytes".to_owned(), "UTF-8".to_owned())
    })?;
    let (mut start, mut words, mut name) = (0u64, 0u64, 0u64);
    for index in 0..header.documents {
        let record = Record::at(bytes, index);
        let at = FIXED + index as usize * RECORD;
        if record.start != start {
            let (got, expected) = (record.start.to_string(), start.to_string());
            return Err(damaged(at, "start of a document", got, expected));
        }
        let name_end = usize::try_from(record.name_end).unwrap_or(usize::MAX);
        if record.name_end < name || !names.is_char_boundary(name_end) {
            let expected = format!("a character's end from {name} to {}", names.len());
            return Err(damaged(
                at + 24,
                "end of a name",
                record.name_end.to_string(),
                expected,
            ));
        }
        start = start.saturating_add(record.bytes);
        words = words.saturating_add(record.words);
        name = record.name_end;
    }
    for (at, problem, got, expected) in [
        (
            24,
            "sum of the documents' lengths",
            start,
            header.data_bytes,
        ),
        (40, "sum of the documents' words", words, header.words),
        (64, "end of the last name", name, header.name_bytes),
    ] {
        if got != expected {
            return Err(damaged(at, problem, got.to_string(), expected.to_string()));
        }
    }
    Ok(())
}

/// Checks magic and version in a file's first bytes.
fn check_kind(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.get(..8) != Some(&MAGIC) {
        return Err(DataError::NotAShard {
            path: path.to_path_buf(),
            got: bytes[..bytes.len().min(8)].to_vec(),
            expected: MAGIC,
        });
    }
    if bytes.len() >= 12 && u32_at(bytes, 8) != VERSION {
        return Err(DataError::ShardVersion {
            path: path.to_path_buf(),
            got: u32_at(bytes, 8),
            expected: VERSION,
        });
    }
    Ok(())
}

fn length_error(path: &Path, got: u64, expected: u64) -> DataError {
    DataError::ShardLength {
        path: path.to_path_buf(),
        got,
        expected,
    }
}

/// The number at an offset that the caller has checked to lie within `bytes`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}
