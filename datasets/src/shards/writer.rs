//! Writing one shard file.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::format::{BLOCK, Header, Record};
use super::words::WordCounter;
use crate::error::{DataError, Result};
use crate::fsutil;
use crate::sources::{DocumentEntry, Source};

/// Bytes read and written at a time.
const CHUNK: usize = 1 << 20;

/// A shard that is to be written: its place in the split and its documents.
pub(crate) struct ShardPlan<'a> {
    /// Number of the shard in its split.
    pub shard: u32,
    /// Number of shards in the split.
    pub shards: u32,
    /// Its documents, in order.
    pub documents: &'a [DocumentEntry],
    /// Most bytes to take of the last document; the rest of it is left out.
    pub cut_last_to: Option<u64>,
}

/// Name of the file of shard `index`.
pub(crate) fn file_name(index: u32) -> String {
    format!("shard-{index:05}.mbs")
}

/// Writes a shard to `dir`, under its own name only once it is complete and on the disk.
///
/// `advance` hears of every chunk of data written, in bytes.
pub(crate) fn write_shard(
    source: &dyn Source,
    dir: &Path,
    plan: &ShardPlan<'_>,
    advance: &mut dyn FnMut(u64),
) -> Result<()> {
    let path = dir.join(file_name(plan.shard));
    let partial = dir.join(format!(".{}.tmp", file_name(plan.shard)));
    let mut body = Body::create(&partial, plan)?;
    for (index, entry) in plan.documents.iter().enumerate() {
        let last = index + 1 == plan.documents.len();
        let cut = plan.cut_last_to.filter(|_| last);
        body.document(source, entry, cut, advance)?;
    }
    body.finish(plan)?;
    fsutil::rename_durably(&partial, &path)
}

/// A shard in the making: space for the header, then the data.
struct Body {
    path: PathBuf,
    file: BufWriter<File>,
    records: Vec<Record>,
    names: Vec<u8>,
    hashes: Vec<u64>,
    block: Xxh3,
    data_bytes: u64,
    words: u64,
    header_bytes: u64,
    buffer: Vec<u8>,
}

impl Body {
    /// Opens the file and skips the header, whose length follows from the plan.
    fn create(path: &Path, plan: &ShardPlan<'_>) -> Result<Self> {
        let names: u64 = plan.documents.iter().map(|e| e.name.len() as u64).sum();
        let mut bytes: u64 = plan.documents.iter().map(|e| e.bytes).sum();
        if let (Some(cut), Some(last)) = (plan.cut_last_to, plan.documents.last()) {
            bytes = bytes - last.bytes + last.bytes.min(cut);
        }
        let count = plan.documents.len() as u64;
        let header_bytes = Header::length(count, names, bytes.div_ceil(BLOCK));
        let header_bytes = header_bytes.ok_or_else(|| DataError::Config {
            setting: "documents of a shard",
            got: format!("{count} documents of {bytes} bytes"),
            expected: "a header below 2^64 bytes".to_owned(),
        })?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .open(path)
            .map_err(DataError::io("create", path))?;
        let mut file = BufWriter::with_capacity(CHUNK, file);
        file.seek(SeekFrom::Start(header_bytes))
            .map_err(DataError::io("write", path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            records: Vec::with_capacity(plan.documents.len()),
            names: Vec::new(),
            hashes: Vec::new(),
            block: Xxh3::new(),
            data_bytes: 0,
            words: 0,
            header_bytes,
            buffer: vec![0; CHUNK],
        })
    }

    /// Copies one document, or its first `cut` bytes.
    fn document(
        &mut self,
        source: &dyn Source,
        entry: &DocumentEntry,
        cut: Option<u64>,
        advance: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let expected = cut.unwrap_or(entry.bytes).min(entry.bytes);
        let start = self.data_bytes;
        let mut words = WordCounter::default();
        let mut input = source.open(entry)?.take(expected);
        let mut buffer = std::mem::take(&mut self.buffer);
        loop {
            let count = match input.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(DataError::io("read", &entry.path)(error)),
            };
            if count == 0 {
                break;
            }
            words.push(&buffer[..count]);
            self.data(&buffer[..count])?;
            advance(count as u64);
        }
        self.buffer = buffer;
        let bytes = self.data_bytes - start;
        if bytes != expected {
            return Err(DataError::DocumentChanged {
                path: entry.path.clone(),
                got: bytes,
                expected,
            });
        }
        self.names.extend_from_slice(entry.name.as_bytes());
        self.words += words.words();
        self.records.push(Record {
            start,
            bytes,
            words: words.words(),
            name_end: self.names.len() as u64,
        });
        Ok(())
    }

    /// Appends data, closing checksum blocks as they fill.
    fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(DataError::io("write", &self.path))?;
        while !bytes.is_empty() {
            let room = BLOCK - self.data_bytes % BLOCK;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.block.update(now);
            self.data_bytes += now.len() as u64;
            if self.data_bytes.is_multiple_of(BLOCK) {
                self.close_block();
            }
            bytes = later;
        }
        Ok(())
    }

    fn close_block(&mut self) {
        self.hashes.push(self.block.digest());
        self.block.reset();
    }

    /// Writes the header and brings all to the disk.
    fn finish(mut self, plan: &ShardPlan<'_>) -> Result<()> {
        if !self.data_bytes.is_multiple_of(BLOCK) {
            self.close_block();
        }
        let header = Header {
            header_bytes: self.header_bytes,
            data_bytes: self.data_bytes,
            documents: self.records.len() as u64,
            words: self.words,
            block_bytes: BLOCK,
            blocks: self.hashes.len() as u64,
            name_bytes: self.names.len() as u64,
            shard: plan.shard,
            shards: plan.shards,
        };
        let mut bytes = header.encode().to_vec();
        for record in &self.records {
            bytes.extend_from_slice(&record.encode());
        }
        bytes.extend_from_slice(&self.names);
        for hash in &self.hashes {
            bytes.extend_from_slice(&hash.to_le_bytes());
        }
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        self.write_header(&bytes)
            .map_err(DataError::io("write", &self.path))
    }

    fn write_header(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.flush()?;
        let file = self.file.get_mut();
        // A shard without data ends with its header; the skipped space must still exist.
        file.seek(SeekFrom::Start(0))?;
        file.write_all(bytes)?;
        file.sync_all()
    }
}
