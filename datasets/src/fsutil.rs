//! Small file-system helpers: durable renames and folder listings.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// Makes a folder's entries durable. Only Unix can open folders for this.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        let handle = File::open(dir).map_err(DataError::io("open", dir))?;
        handle.sync_all().map_err(DataError::io("flush", dir))?;
    }
    Ok(())
}

/// Renames within a file system and makes the change durable.
pub(crate) fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(DataError::io("move a finished file to", to))?;
    match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

/// The paths in a folder, sorted; none when the folder does not exist.
pub(crate) fn list_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(DataError::io("list", dir)(error)),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(DataError::io("list", dir))?;
    paths.sort();
    Ok(paths)
}

/// Removes a file that may not be there.
pub(crate) fn remove_file_if_present(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DataError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a folder and all in it; it may not be there.
pub(crate) fn remove_dir_if_present(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DataError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
