//! Reading the shards of a split as one byte stream.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn_dataset::{Dataset, DatasetError};
use xxhash_rust::xxh3::Xxh3;

use super::file::ShardFile;
use super::format::VERSION;
use super::info::{DocumentInfo, ShardInfo, ShardsInfo, VerifyReport};
use super::writer::file_name;
use crate::document::Document;
use crate::error::{DataError, Result};
use crate::fsutil;
use crate::progress::Progress;

/// Settings of [`Shards::open_with`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Compare each data block (4 MiB) with its checksum before it is first read.
    pub check_on_read: bool,
}

impl OpenOptions {
    /// All data is checked before its first use.
    pub const CHECKED: Self = Self {
        check_on_read: true,
    };
}

/// The shards of one split, presented as one byte stream with document boundaries.
///
/// Opening checks headers and indexes, which stay in memory (some 50 bytes a document); the data is
/// read when it is asked for, and checked by [`verify`](Self::verify), or on first touch with
/// [`OpenOptions::check_on_read`].
///
/// As a [`Dataset`], a split is its documents.
#[derive(Debug)]
pub struct Shards {
    dir: PathBuf,
    shards: Vec<ShardFile>,
    /// Where in the stream each shard begins, and, last, where the stream ends.
    byte_starts: Vec<u64>,
    /// The number of each shard's first document, and, last, the number of documents.
    document_starts: Vec<u64>,
    words: u64,
    identity: String,
}

impl Shards {
    /// Opens the split in a folder that [`prepare`](super::prepare) has written.
    ///
    /// # Errors
    ///
    /// [`DataError::NoData`] without shards; [`DataError::NotAShard`],
    /// [`DataError::ShardVersion`], [`DataError::ShardLength`], [`DataError::ShardDamaged`] for
    /// a file that cannot be used; [`DataError::ShardSet`] when one is missing or foreign.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(dir, OpenOptions::default())
    }

    /// [`open`](Self::open) with settings.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(dir: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let dir = dir.as_ref();
        let shards = open_files(dir, options)?;
        let (mut byte_starts, mut document_starts) = (vec![0u64], vec![0u64]);
        let (mut bytes, mut documents, mut words) = (0u64, 0u64, 0u64);
        let mut hash = Xxh3::new();
        for shard in &shards {
            let header = shard.header();
            bytes += header.data_bytes;
            documents += header.documents;
            words = words.saturating_add(header.words);
            byte_starts.push(bytes);
            document_starts.push(documents);
            hash.update(&shard.header_hash().to_le_bytes());
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            shards,
            byte_starts,
            document_starts,
            words,
            identity: format!("{:032x}", hash.digest128()),
        })
    }

    /// The split's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes in the stream.
    ///
    /// It is not called `len`: as a [`Dataset`], the length of a split is its documents.
    pub fn byte_count(&self) -> u64 {
        self.byte_starts[self.shards.len()]
    }

    /// Number of documents, empty ones included.
    pub fn document_count(&self) -> u64 {
        self.document_starts[self.shards.len()]
    }

    /// Words in all documents, each counted on its own as `wc -w` does.
    pub fn word_count(&self) -> u64 {
        self.words
    }

    /// 32 hexadecimal digits that stand for the data: documents, their order and names, and how
    /// they lie in shards. A checkpoint stores it to refuse being resumed on other data.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Document `index`, in stream order; none past the last.
    pub fn document(&self, index: u64) -> Option<DocumentInfo> {
        let (shard, local) = self.locate_document(index)?;
        let record = self.shards[shard].record(local);
        Some(DocumentInfo {
            name: self.shards[shard].name(local),
            start: self.byte_starts[shard] + record.start,
            bytes: record.bytes,
            words: record.words,
        })
    }

    /// All documents in stream order. Each is read from the index when it is asked for.
    pub fn documents(&self) -> impl Iterator<Item = DocumentInfo> + '_ {
        (0..self.document_count()).filter_map(|index| self.document(index))
    }

    /// Copies the bytes of the stream from `start` on, across documents and shards.
    ///
    /// # Errors
    ///
    /// [`DataError::OutOfRange`] past the end; [`DataError::ShardDamaged`] for a bad block when
    /// reading checks.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let len = out.len() as u64;
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.byte_count());
        if end.is_none() {
            return Err(DataError::OutOfRange {
                dir: self.dir.clone(),
                start,
                end: start.saturating_add(len),
                len: self.byte_count(),
            });
        }
        let mut shard = self.byte_starts.partition_point(|begin| *begin <= start) - 1;
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            let room = self.byte_starts[shard + 1] - at;
            let now = usize::try_from(room).unwrap_or(usize::MAX).min(out.len());
            let (part, rest) = out.split_at_mut(now);
            self.shards[shard].read(at - self.byte_starts[shard], part)?;
            at += now as u64;
            out = rest;
            shard += 1;
        }
        Ok(())
    }

    /// The stream positions in `range` at which documents begin, ascending. Empty documents have
    /// no first byte and are left out.
    pub fn document_starts_in(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let first = self.first_document_from(range.start);
        (first..self.document_count())
            .map_while(move |index| {
                let (start, bytes) = self.document_extent(index)?;
                (start < range.end).then_some((start, bytes))
            })
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(start, _)| start)
    }

    /// Counts of the split and of its files.
    pub fn info(&self) -> ShardsInfo {
        let shard = |shard: &ShardFile| {
            let header = shard.header();
            ShardInfo {
                path: shard.path().to_path_buf(),
                file_bytes: header.header_bytes + header.data_bytes,
                documents: header.documents,
                bytes: header.data_bytes,
                words: header.words,
            }
        };
        ShardsInfo {
            dir: self.dir.clone(),
            format: VERSION,
            identity: self.identity.clone(),
            documents: self.document_count(),
            bytes: self.byte_count(),
            words: self.words,
            shards: self.shards.iter().map(shard).collect(),
        }
    }

    /// Compares all data with its checksums.
    ///
    /// # Errors
    ///
    /// [`DataError::ShardDamaged`] naming the file and the first bad block's offset.
    pub fn verify(&self, progress: &dyn Progress) -> Result<VerifyReport> {
        progress.start("verifying", self.byte_count());
        let mut report = VerifyReport::default();
        for shard in &self.shards {
            for block in 0..shard.header().blocks {
                let bytes = shard.check_block(block)?;
                progress.advance(bytes);
                report.blocks += 1;
                report.bytes += bytes;
            }
            report.shards += 1;
        }
        progress.finish();
        Ok(report)
    }

    /// The shard that holds document `index`, and its number there.
    fn locate_document(&self, index: u64) -> Option<(usize, u64)> {
        if index >= self.document_count() {
            return None;
        }
        let after = self
            .document_starts
            .partition_point(|first| *first <= index);
        Some((after - 1, index - self.document_starts[after - 1]))
    }

    /// Start in the stream and length of a document.
    pub(crate) fn document_extent(&self, index: u64) -> Option<(u64, u64)> {
        let (shard, local) = self.locate_document(index)?;
        let record = self.shards[shard].record(local);
        Some((self.byte_starts[shard] + record.start, record.bytes))
    }

    /// The first document that begins at `position` or later.
    fn first_document_from(&self, position: u64) -> u64 {
        let (mut low, mut high) = (0, self.document_count());
        while low < high {
            let middle = low + (high - low) / 2;
            let begins_before = |(start, _)| start < position;
            if self.document_extent(middle).is_some_and(begins_before) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// Opens all shard files of a folder and checks that they are one set.
fn open_files(dir: &Path, options: OpenOptions) -> Result<Vec<ShardFile>> {
    let mut paths = fsutil::list_dir(dir)?;
    let is_shard = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("shard-") && name.ends_with(".mbs")
    };
    paths.retain(is_shard);
    if paths.is_empty() {
        return Err(DataError::NoData {
            what: "byte shards, files shard-*.mbs,".to_owned(),
            place: dir.to_path_buf(),
            hint: "`mambabyte data prepare --out DIR` writes them, into DIR/train, DIR/validation and \
                   DIR/test"
                .to_owned(),
        });
    }
    let mut shards = Vec::with_capacity(paths.len());
    for (index, path) in paths.iter().enumerate() {
        let shard = ShardFile::open(path, options.check_on_read)?;
        let header = shard.header();
        let expected_name = file_name(index as u32);
        let named = path.file_name().is_some_and(|name| *name == *expected_name);
        let placed = header.shard as usize == index && header.shards as usize == paths.len();
        if !named || !placed {
            let number = u64::from(header.shard) + 1;
            return Err(DataError::ShardSet {
                dir: dir.to_path_buf(),
                file: path.clone(),
                got: format!("shard {number} of {}", header.shards),
                expected: format!("{expected_name}, shard {} of {}", index + 1, paths.len()),
            });
        }
        shards.push(shard);
    }
    Ok(shards)
}

impl Dataset<Document> for Shards {
    /// Document `index`, whole.
    fn get(&self, index: usize) -> Result<Document, DatasetError> {
        let count = self.document_count();
        let Some(info) = self.document(index as u64) else {
            // The trait's contract: an index out of bounds is the caller's mistake.
            panic!("document index out of bounds: the split has {count}, the index is {index}");
        };
        let mut bytes = vec![0; info.bytes as usize];
        self.read(info.start, &mut bytes)
            .map_err(DatasetError::new)?;
        let name = info.name;
        Ok(Document { name, bytes })
    }

    /// Number of documents.
    fn len(&self) -> usize {
        self.document_count() as usize
    }
}
