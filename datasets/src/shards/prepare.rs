//! Turning a source into the shards of its splits.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Shards;
use super::writer::{ShardPlan, write_shard};
use crate::document::Split;
use crate::error::{DataError, Result};
use crate::fsutil;
use crate::progress::Progress;
use crate::sources::{DocumentEntry, Source};

/// Settings of [`prepare`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrepareOptions {
    /// Splits to write.
    pub splits: Vec<Split>,
    /// Data bytes at which a shard is closed. Documents are never divided between shards, so a
    /// longer document makes a longer shard.
    pub max_shard_bytes: u64,
    /// Most data bytes of a split; documents past it are left out, the one across it is cut.
    pub max_bytes: Option<u64>,
    /// Whether to replace splits that exist.
    pub overwrite: bool,
}

impl Default for PrepareOptions {
    /// All splits, shards of 1 GiB, no cap, no overwriting.
    fn default() -> Self {
        Self {
            splits: Split::ALL.to_vec(),
            max_shard_bytes: 1 << 30,
            max_bytes: None,
            overwrite: false,
        }
    }
}

/// What [`prepare`] has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// What the source was.
    pub source: String,
    /// The splits, in the order of the options.
    pub splits: Vec<SplitSummary>,
}

/// One prepared split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SplitSummary {
    /// Which split.
    pub split: Split,
    /// Its folder.
    pub dir: PathBuf,
    /// Number of shard files.
    pub shards: usize,
    /// Number of documents.
    pub documents: u64,
    /// Data bytes.
    pub bytes: u64,
    /// Words, as `wc -w` counts them in each document.
    pub words: u64,
    /// Identity of the data, see [`Shards::identity`].
    pub identity: String,
}

/// Writes the splits of a source as shards: `out_dir/{split}/shard-00000.mbs` and so on.
///
/// A split appears under its name only when it is complete and on the disk; a crash leaves at
/// most a hidden folder, which the next call removes. All splits are listed and checked before
/// the first is written.
///
/// # Errors
///
/// [`DataError::SplitExists`] for a split that has files, unless overwriting;
/// [`DataError::Locked`] while another process prepares in `out_dir`; [`DataError::NoData`] for
/// an empty split; [`DataError::Config`], [`DataError::DocumentChanged`], [`DataError::Io`].
pub fn prepare(
    source: &dyn Source,
    out_dir: &Path,
    options: &PrepareOptions,
    progress: &dyn Progress,
) -> Result<Summary> {
    check_options(options)?;
    fs::create_dir_all(out_dir).map_err(DataError::io("create", out_dir))?;
    let _lock = lock(out_dir)?;
    let mut plans = Vec::new();
    for &split in &options.splits {
        if !options.overwrite {
            check_absent(&out_dir.join(split.as_str()))?;
        }
        plans.push((split, SplitPlan::new(source.entries(split)?, options)?));
    }
    let mut splits = Vec::new();
    for (split, plan) in &plans {
        splits.push(write_split(source, out_dir, *split, plan, progress)?);
    }
    Ok(Summary {
        source: source.describe(),
        splits,
    })
}

fn check_options(options: &PrepareOptions) -> Result<()> {
    let bad = |setting, got: String, expected: &str| {
        let expected = expected.to_owned();
        Err(DataError::Config {
            setting,
            got,
            expected,
        })
    };
    if options.splits.is_empty() {
        return bad("splits", "none".to_owned(), "at least one split");
    }
    for (index, split) in options.splits.iter().enumerate() {
        if options.splits[..index].contains(split) {
            return bad("splits", format!("{split} twice"), "each split once");
        }
    }
    if options.max_shard_bytes == 0 || options.max_bytes == Some(0) {
        return bad("largest number of bytes", "0".to_owned(), "at least 1");
    }
    Ok(())
}

/// Holds a folder against other processes for as long as the returned file is open.
fn lock(out_dir: &Path) -> Result<File> {
    let path = out_dir.join(".prepare.lock");
    let file = File::create(&path).map_err(DataError::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(DataError::Locked { path }),
        // Some network file systems have no locks; that is no reason to refuse them.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(DataError::io("lock", &path)(error)),
    }
}

fn check_absent(dir: &Path) -> Result<()> {
    match fsutil::list_dir(dir)?.len() {
        0 => Ok(()),
        files => Err(DataError::SplitExists {
            path: dir.to_path_buf(),
            files,
        }),
    }
}

/// The documents of a split, divided into shards.
struct SplitPlan {
    entries: Vec<DocumentEntry>,
    /// For each shard, one past its last document.
    ends: Vec<usize>,
    bytes: u64,
    cut_last_to: Option<u64>,
}

impl SplitPlan {
    fn new(mut entries: Vec<DocumentEntry>, options: &PrepareOptions) -> Result<Self> {
        let (mut bytes, mut cut_last_to) = (0u64, None);
        let cap = options.max_bytes.unwrap_or(u64::MAX);
        let mut taken = 0;
        for entry in &entries {
            if bytes >= cap {
                break;
            }
            taken += 1;
            cut_last_to = (entry.bytes > cap - bytes).then_some(cap - bytes);
            bytes += entry.bytes.min(cap - bytes);
        }
        entries.truncate(taken);

        let (mut ends, mut filled) = (Vec::new(), 0u64);
        for (index, entry) in entries.iter().enumerate() {
            if filled > 0 && filled.saturating_add(entry.bytes) > options.max_shard_bytes {
                ends.push(index);
                filled = 0;
            }
            filled = filled.saturating_add(entry.bytes);
        }
        ends.push(entries.len());
        // The limit keeps shard numbers within the five digits of the file names.
        if ends.len() > 100_000 {
            return Err(DataError::Config {
                setting: "shard size",
                got: format!(
                    "{} bytes, giving {} shards",
                    options.max_shard_bytes,
                    ends.len()
                ),
                expected: "a size that gives at most 100000 shards".to_owned(),
            });
        }
        Ok(Self {
            entries,
            ends,
            bytes,
            cut_last_to,
        })
    }
}

fn write_split(
    source: &dyn Source,
    out_dir: &Path,
    split: Split,
    plan: &SplitPlan,
    progress: &dyn Progress,
) -> Result<SplitSummary> {
    let partial = out_dir.join(format!(".{split}.partial"));
    fsutil::remove_dir_if_present(&partial)?;
    fs::create_dir(&partial).map_err(DataError::io("create", &partial))?;
    progress.start(&format!("preparing {split}"), plan.bytes);
    let written = write_shards(source, &partial, plan, progress);
    progress.finish();
    if let Err(error) = written {
        // The first error is the one to report; the next run clears what cannot be cleared now.
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    let dir = out_dir.join(split.as_str());
    replace_dir(out_dir, split, &partial, &dir)?;
    let shards = Shards::open(&dir)?;
    Ok(SplitSummary {
        split,
        shards: plan.ends.len(),
        documents: shards.document_count(),
        bytes: shards.byte_count(),
        words: shards.word_count(),
        identity: shards.identity().to_owned(),
        dir,
    })
}

fn write_shards(
    source: &dyn Source,
    dir: &Path,
    plan: &SplitPlan,
    progress: &dyn Progress,
) -> Result<()> {
    let mut begin = 0;
    for (index, &end) in plan.ends.iter().enumerate() {
        let shard = ShardPlan {
            shard: index as u32,
            shards: plan.ends.len() as u32,
            documents: &plan.entries[begin..end],
            cut_last_to: plan.cut_last_to.filter(|_| end == plan.entries.len()),
        };
        write_shard(source, dir, &shard, &mut |bytes| progress.advance(bytes))?;
        begin = end;
    }
    Ok(())
}

/// Puts the finished folder in the place of the old one, which is removed.
fn replace_dir(out_dir: &Path, split: Split, partial: &Path, dir: &Path) -> Result<()> {
    let old = out_dir.join(format!(".{split}.old"));
    fsutil::remove_dir_if_present(&old)?;
    if dir.exists() {
        fsutil::rename_durably(dir, &old)?;
    }
    fsutil::rename_durably(partial, dir)?;
    fsutil::remove_dir_if_present(&old)
}
