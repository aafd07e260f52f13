//! Files and folders that are whole or not there.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read as _, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::check::hash_text;
use super::manifest::FileEntry;
use crate::error::{Error, Result};
use crate::new_file::{folder_of, sync};

/// Bytes that are read or written at a time.
const CHUNK: usize = 1 << 20;

/// Lets `write` fill a folder of another name and then gives it the name `folder`, which so is
/// complete or not there.
pub(crate) fn install(folder: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let building = beside(folder, ".tmp");
    // Left behind by a crash.
    remove_if_there(&building)?;
    fs::create_dir_all(&building).map_err(Error::io("create", &building))?;
    if let Err(error) = write(&building) {
        // The disk may be full: give back what a checkpoint that failed takes.
        let _ = fs::remove_dir_all(&building);
        return Err(error);
    }
    replace(&building, folder)
}

/// Gives `building` the name `folder`. Where there is a folder of that name already the two change
/// places first, so that at no moment neither is there.
fn replace(building: &Path, folder: &Path) -> Result<()> {
    let failed = || Error::io("rename", building);
    match fs::symlink_metadata(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::rename(building, folder).map_err(failed())?;
            return sync(folder_of(folder));
        }
        Err(error) => return Err(failed()(error)),
        Ok(_) => {}
    }
    if exchange(building, folder).is_err() {
        // A file system without exchange: a kill between the two renames loses the name, not the
        // content, of the older one.
        let aside = beside(folder, ".old");
        remove_if_there(&aside)?;
        fs::rename(folder, &aside).map_err(failed())?;
        fs::rename(building, folder).map_err(failed())?;
        sync(folder_of(folder))?;
        return remove_if_there(&aside);
    }
    // On disk the new one has the name before anything of the old one goes.
    sync(folder_of(folder))?;
    remove_if_there(building)
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// The name of `folder` with `suffix`.
pub(crate) fn beside(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Deletes a folder, if it is there.
pub(crate) fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

/// Writes the file `name` in `folder` by `write`, flushes it to disk and reads it back: what is
/// there is what was meant.
pub(super) fn write_file(
    folder: &Path,
    name: &str,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<FileEntry> {
    let path = folder.join(name);
    let failed = || Error::io("write", &path);
    let file = File::create(&path).map_err(failed())?;
    let mut hashing = Hashing {
        file: BufWriter::with_capacity(CHUNK, file),
        hash: Xxh3::new(),
        bytes: 0,
    };
    write(&mut hashing).map_err(failed())?;
    let file = hashing
        .file
        .into_inner()
        .map_err(|e| failed()(e.into_error()))?;
    file.sync_all().map_err(failed())?;
    forget(&file);
    drop(file);
    let meant = FileEntry {
        name: name.to_owned(),
        bytes: hashing.bytes,
        xxh3: hash_text(&hashing.hash),
    };
    let found = describe(folder, name).map_err(Error::io("read back", &path))?;
    if found != meant {
        let text = format!(
            "the disk does not hold what was written: {} bytes with the hash {}, instead of {} \
             with {}",
            found.bytes, found.xxh3, meant.bytes, meant.xxh3
        );
        return Err(failed()(io::Error::new(ErrorKind::InvalidData, text)));
    }
    Ok(meant)
}

/// Asks the system to forget the file's pages, so that reading it back reads the disk. A hint.
#[cfg(target_os = "linux")]
fn forget(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &File) {}

/// A file with the hash of what is written to it.
struct Hashing {
    file: BufWriter<File>,
    hash: Xxh3,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Length and hash of a file.
pub(super) fn describe(folder: &Path, name: &str) -> io::Result<FileEntry> {
    let mut file = File::open(folder.join(name))?;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(FileEntry {
        name: name.to_owned(),
        bytes,
        xxh3: hash_text(&hash),
    })
}
