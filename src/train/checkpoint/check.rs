//! That the files of a checkpoint are those that were written.

use std::fs;
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::install::describe;
use super::manifest::FileEntry;
use crate::error::{Error, Result};

/// What is said where a checkpoint cannot be used and others of its run may be.
pub(super) const ANOTHER: &str = "use another checkpoint of the run";

/// An error about a file of a checkpoint.
fn damaged(folder: &Path, name: &str, reason: String) -> Error {
    Error::Checkpoint {
        path: folder.join(name),
        reason,
        hint: ANOTHER.to_owned(),
    }
}

/// That a file has the length it was written with.
pub(super) fn check_length(folder: &Path, entry: &FileEntry) -> Result<()> {
    let unreadable = |e| format!("is part of the checkpoint but unreadable: {e}");
    let bytes = fs::metadata(folder.join(&entry.name))
        .map_err(|e| damaged(folder, &entry.name, unreadable(e)))?
        .len();
    match bytes == entry.bytes {
        true => Ok(()),
        false => Err(damaged(
            folder,
            &entry.name,
            format!("has {bytes} bytes, and was written with {}", entry.bytes),
        )),
    }
}

/// That a file has the content it was written with; reads all of it.
pub(super) fn check_content(folder: &Path, entry: &FileEntry) -> Result<()> {
    let unreadable = |e| format!("is part of the checkpoint but unreadable: {e}");
    let actual =
        describe(folder, &entry.name).map_err(|e| damaged(folder, &entry.name, unreadable(e)))?;
    compare_hash(folder, entry, actual.xxh3)
}

/// That what was read has the hash of what was written.
pub(super) fn compare_hash(folder: &Path, entry: &FileEntry, actual: String) -> Result<()> {
    match actual == entry.xxh3 {
        true => Ok(()),
        false => Err(damaged(
            folder,
            &entry.name,
            format!("was altered: its hash is {actual}, and was {}", entry.xxh3),
        )),
    }
}

/// The form of a hash in manifests.
pub(super) fn hash_text(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}
