//! Descriptions of shards.

use std::path::PathBuf;

use serde::Serialize;

/// A document in a split's byte stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DocumentInfo {
    /// The document's name in its source.
    pub name: String,
    /// Where in the split's stream it begins, in bytes.
    pub start: u64,
    /// Its length in bytes; may be 0.
    pub bytes: u64,
    /// Its words, as `wc -w` counts.
    pub words: u64,
}

/// One shard file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShardInfo {
    /// The file.
    pub path: PathBuf,
    /// Its length on disk.
    pub file_bytes: u64,
    /// Documents in it.
    pub documents: u64,
    /// Data bytes in it.
    pub bytes: u64,
    /// Words in it.
    pub words: u64,
}

/// A split of shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShardsInfo {
    /// The split's folder.
    pub dir: PathBuf,
    /// Format version of the files.
    pub format: u32,
    /// Identity of the data, see [`Shards::identity`](super::Shards::identity).
    pub identity: String,
    /// Documents in all shards.
    pub documents: u64,
    /// Data bytes in all shards.
    pub bytes: u64,
    /// Words in all shards, as `wc -w` counts in each document.
    pub words: u64,
    /// The files, in order.
    pub shards: Vec<ShardInfo>,
}

impl ShardsInfo {
    /// Bytes per word: the factor between nats per byte and per word. None without words.
    pub fn bytes_per_word(&self) -> Option<f64> {
        (self.words > 0).then(|| self.bytes as f64 / self.words as f64)
    }
}

/// What a complete verification has checked, all of it good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shard files.
    pub shards: u64,
    /// Data blocks compared with their checksums.
    pub blocks: u64,
    /// Data bytes in those blocks.
    pub bytes: u64,
}
