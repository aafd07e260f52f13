//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file on its way: it has another name until it is whole, and what was there before stays until
/// then. Dropped before that it leaves nothing behind.
pub(crate) struct NewFile {
    path: PathBuf,
    /// Its name until then; none for a device or a pipe, which cannot be renamed.
    building: Option<PathBuf>,
    file: File,
}

impl NewFile {
    /// Begins the file `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        // A link stays one.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let other = fs::metadata(&path).is_ok_and(|it| !it.is_file());
        let building = (!other).then(|| {
            let mut name = path.clone().into_os_string();
            name.push(".tmp");
            PathBuf::from(name)
        });
        let file = File::create(building.as_ref().unwrap_or(&path));
        Ok(Self {
            file: file.map_err(Error::io("create", &path))?,
            building,
            path,
        })
    }

    /// Writes all of it.
    pub(crate) fn put(mut self, bytes: &[u8]) -> Result<()> {
        self.file
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
        &mut self.file
    }

    /// Makes the file safe on disk and gives it its name.
    pub(crate) fn finish(mut self) -> Result<()> {
        let Some(building) = &self.building else {
            return Ok(());
        };
        self.file
            .sync_all()
            .and_then(|()| fs::rename(building, &self.path))
            .map_err(Error::io("write", &self.path))?;
        self.building = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(building) = &self.building {
            let _ = fs::remove_file(building);
        }
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
    fn a_device_stays_one() {
        let mut file = NewFile::create(Path::new("/dev/null")).expect("opened");
        file.file().write_all(b"gone").expect("written");
        file.finish().expect("finished");
    }
}
