//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::error::{Error, Result};

/// A file on its way: it has another name until it is whole, and what was there before stays until
/// then. Dropped before that it leaves nothing behind.
pub(crate) struct NewFile {
    path: PathBuf,
    place: Place,
}

/// Where the bytes go.
enum Place {
    /// Beside the file.
    Beside(NamedTempFile),
    /// Into a device or a pipe, which cannot be renamed.
    There(File),
}

impl NewFile {
    /// Begins the file `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        // A link stays one, also one to a file that is not there yet.
        let path = fs::canonicalize(path)
            .or_else(|_| fs::read_link(path).map(|to| folder_of(path).join(to)))
            .unwrap_or_else(|_| path.to_owned());
        let failed = || Error::io("create", &path);
        let place = if fs::metadata(&path).is_ok_and(|it| !it.is_file()) {
            Place::There(File::create(&path).map_err(failed())?)
        } else {
            let mut builder = Builder::new();
            builder.prefix(".").suffix(".tmp");
            // As any new file's, less what the user's mask takes; the library's own are for one reader.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            Place::Beside(builder.tempfile_in(folder_of(&path)).map_err(failed())?)
        };
        Ok(Self { path, place })
    }

    /// Writes all of it.
    pub(crate) fn put(mut self, bytes: &[u8]) -> Result<()> {
        self.file()
            .write_all(bytes)
            .map_err(Error::io("write", &self.path))?;
        self.finish()
    }

    /// Name that it will have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What to write to.
    pub(crate) fn file(&mut self) -> &mut File {
        match &mut self.place {
            Place::Beside(file) => file.as_file_mut(),
            Place::There(file) => file,
        }
    }

    /// Makes the file safe on disk and gives it its name.
    pub(crate) fn finish(self) -> Result<()> {
        let Place::Beside(file) = self.place else {
            return Ok(());
        };
        let path = self.path;
        let failed = || Error::io("write", &path);
        file.as_file().sync_all().map_err(failed())?;
        file.persist(&path).map_err(|it| failed()(it.error))?;
        // The name too.
        sync(folder_of(&path))
    }
}

/// Flushes a file or folder to disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("write", path))
}

/// The folder that has what is at `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_stays_until_the_new_is_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, "before").expect("written");
        let begun = |text: &[u8]| {
            let mut file = NewFile::create(&path).expect("created");
            file.file().write_all(text).expect("written");
            file
        };
        drop(begun(b"half"));
        assert_eq!(fs::read(&path).expect("a file"), b"before");
        begun(b"whole").finish().expect("finished");
        assert_eq!(fs::read(&path).expect("a file"), b"whole");
        let file = NewFile::create(&path).expect("created");
        file.put(b"at once").expect("written");
        assert_eq!(fs::read(&path).expect("a file"), b"at once");
        let left = fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(left, 1, "nothing under another name");
    }

    #[test]
    #[cfg(unix)]
    fn links_stay_and_files_beside_are_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let (link, own) = (folder.path().join("link"), folder.path().join("a.tmp"));
        std::os::unix::fs::symlink("a", &link).expect("a link");
        fs::write(&own, "mine").expect("written");
        for text in ["new", "newer"] {
            let file = NewFile::create(&link).expect("created");
            file.put(text.as_bytes()).expect("written");
            let to = fs::read_to_string(folder.path().join("a")).expect("a file");
            assert_eq!(to, text);
            assert!(link.is_symlink());
        }
        assert_eq!(fs::read(&own).expect("a file"), b"mine");
    }

    #[test]
    #[cfg(unix)]
    fn a_device_stays_one() {
        let mut file = NewFile::create(Path::new("/dev/null")).expect("opened");
        file.file().write_all(b"gone").expect("written");
        file.finish().expect("finished");
    }
}
