//! Any folder of text, or a single file.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use super::held_out::MIN_KEYS;
use super::{DocumentEntry, HeldOut, Source};
use crate::document::Split;
use crate::error::{DataError, Result};

/// How far past the exact position a cut may move to reach a line's end, in bytes.
const CUT_REACH: u64 = 4096;

/// Settings of [`TextFolder`].
#[derive(Clone, Debug, PartialEq)]
pub struct TextOptions {
    /// File name extensions to take, without the dot, in any case; empty takes every file.
    pub extensions: Vec<String>,
    /// Fractions of the files held out, by a hash of their paths within the folder.
    pub held_out: HeldOut,
    /// Fractions of the bytes held out where there are too few files to hold out whole ones.
    pub cut: HeldOut,
}

impl Default for TextOptions {
    /// Every file; 2 % of files, or 5 % of a file's bytes, for validation and for test each.
    fn default() -> Self {
        Self {
            extensions: Vec::new(),
            held_out: HeldOut::each(0.02),
            cut: HeldOut::each(0.05),
        }
    }
}

/// A folder of text, read recursively, or a single file; each file is one document.
///
/// Bytes are taken as they are, in any encoding. Hidden files and folders (names beginning with
/// a dot), symbolic links and empty files are left out. Documents are ordered by path.
///
/// With three files or more, whole files are held out: a file's split follows from a hash of its
/// path within the folder, so it stays the same when other files come or go. Only where no file's
/// hash is in a split (there are few files) do those with the lowest hashes stand in, until others
/// come ([`stand_ins`](Self::stand_ins)). With one or two,
/// each file is cut by position: first the training part, then validation, then, at its end,
/// test. Cuts fall behind a line's end (or at least between characters) close to the exact place.
#[derive(Clone, Debug)]
pub struct TextFolder {
    path: PathBuf,
    options: TextOptions,
}

impl TextFolder {
    /// A source over `path`. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for fractions that are none or leave nothing to train on.
    pub fn new(path: impl Into<PathBuf>, options: TextOptions) -> Result<Self> {
        options.held_out.validate()?;
        options.cut.validate()?;
        Ok(Self {
            path: path.into(),
            options,
        })
    }

    /// How many files are not in the split that the hash of their path gives them: with files that
    /// come later, they may go from a held-out split to training.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`] when the files cannot be listed.
    pub fn stand_ins(&self) -> Result<usize> {
        let names: Vec<String> = self.files()?.into_iter().map(|file| file.name).collect();
        Ok(match names.len() < MIN_KEYS {
            true => 0,
            false => self.options.held_out.stand_ins(&names),
        })
    }

    /// All files with their names (paths within the folder, with `/`) and lengths, sorted.
    fn files(&self) -> Result<Vec<DocumentEntry>> {
        let metadata = fs::metadata(&self.path).map_err(DataError::io("open", &self.path))?;
        let mut files = BTreeSet::new();
        if metadata.is_file() {
            let name = self.path.file_name().unwrap_or_default();
            let name = name.to_string_lossy().into_owned();
            files.insert((name, self.path.clone(), metadata.len()));
        } else {
            files = self.walk()?;
        }
        let entry = |(name, path, bytes)| DocumentEntry {
            name,
            path,
            start: 0,
            bytes,
        };
        let filled = files.into_iter().filter(|(_, _, bytes)| *bytes > 0);
        Ok(filled.map(entry).collect())
    }

    fn walk(&self) -> Result<BTreeSet<(String, PathBuf, u64)>> {
        let visible = |entry: &walkdir::DirEntry| {
            entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
        };
        let mut files = BTreeSet::new();
        for entry in WalkDir::new(&self.path).into_iter().filter_entry(visible) {
            let entry = entry.map_err(|error| walk_error(error, &self.path))?;
            if !entry.file_type().is_file() || !self.wanted(entry.path()) {
                continue;
            }
            let metadata = entry
                .metadata()
                .map_err(|error| walk_error(error, entry.path()))?;
            let name = relative_name(&self.path, entry.path());
            files.insert((name, entry.into_path(), metadata.len()));
        }
        Ok(files)
    }

    fn wanted(&self, path: &Path) -> bool {
        let wanted = &self.options.extensions;
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        wanted.is_empty() || wanted.iter().any(|w| w.eq_ignore_ascii_case(&extension))
    }

    fn no_data(&self, split: Split) -> DataError {
        let what = match self.options.extensions.as_slice() {
            [] => format!("files with text for the {split} split"),
            list => format!(
                "non-empty files *.{} for the {split} split",
                list.join(", *.")
            ),
        };
        DataError::NoData {
            what,
            place: self.path.clone(),
            hint: "give a folder or file with text, other extensions, a larger held-out fraction, \
                   or leave this split out"
                .to_owned(),
        }
    }
}

impl Source for TextFolder {
    fn describe(&self) -> String {
        format!("text in {}", self.path.display())
    }

    fn entries(&self, split: Split) -> Result<Vec<DocumentEntry>> {
        let files = self.files()?;
        let entries = if files.len() < MIN_KEYS {
            let cut = |file| cut_part(file, self.options.cut, split);
            let parts: Result<Vec<_>> = files.into_iter().map(cut).collect();
            parts?.into_iter().filter(|part| part.bytes > 0).collect()
        } else {
            let names: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
            let splits = self.options.held_out.assign(&names);
            let chosen = files.into_iter().zip(splits);
            let chosen = chosen.filter(|(_, assigned)| *assigned == split);
            chosen.map(|(file, _)| file).collect::<Vec<_>>()
        };
        if entries.is_empty() {
            return Err(self.no_data(split));
        }
        Ok(entries)
    }
}

/// The part of a file that belongs to a split when it is cut by position.
fn cut_part(file: DocumentEntry, cut: HeldOut, split: Split) -> Result<DocumentEntry> {
    let at = |fraction: f64| (file.bytes as f64 * fraction) as u64;
    let mut source = File::open(&file.path).map_err(DataError::io("open", &file.path))?;
    let mut place = |position| {
        cut_at(&mut source, position, file.bytes).map_err(DataError::io("read", &file.path))
    };
    let validation = place(at(1.0 - cut.validation - cut.test))?;
    let test = match cut.test {
        0.0 => file.bytes,
        fraction => place(at(1.0 - fraction))?.max(validation),
    };
    let (start, end) = match split {
        Split::Train => (0, validation),
        Split::Validation => (validation, test),
        Split::Test => (test, file.bytes),
    };
    Ok(DocumentEntry {
        start,
        bytes: end - start,
        ..file
    })
}

/// A good place to cut at or after `position`: behind a line's end within [`CUT_REACH`], else
/// the next byte that does not continue a UTF-8 character.
fn cut_at(source: &mut File, position: u64, len: u64) -> std::io::Result<u64> {
    if position == 0 || position >= len {
        return Ok(position.min(len));
    }
    source.seek(SeekFrom::Start(position - 1))?;
    let mut ahead = Vec::new();
    source.take(CUT_REACH).read_to_end(&mut ahead)?;
    // `ahead` begins one byte early, so that a line ending exactly at `position` is seen.
    let line = ahead.iter().position(|b| *b == b'\n').map(|i| i + 1);
    let line = line.filter(|&i| position - 1 + (i as u64) < len);
    let character = || {
        let starts = |b: &u8| *b & 0xc0 != 0x80;
        ahead.iter().skip(1).take(4).position(starts).map(|i| i + 1)
    };
    let moved = line.or_else(character).unwrap_or(1);
    Ok((position - 1 + moved as u64).min(len))
}

/// The path of `file` within `root`, with `/` on every system.
pub(super) fn relative_name(root: &Path, file: &Path) -> String {
    let relative = file.strip_prefix(root).unwrap_or(file);
    let parts: Vec<_> = relative
        .components()
        .map(|part| part.as_os_str().to_string_lossy())
        .collect();
    parts.join("/")
}

/// A walk's error with the path it happened on.
pub(super) fn walk_error(error: walkdir::Error, root: &Path) -> DataError {
    let path = error.path().unwrap_or(root).to_path_buf();
    DataError::io("list", &path)(error.into())
}
