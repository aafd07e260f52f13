//! PG-19 in its own layout.
//!
//! PG-19 (Rae et al. 2019, arXiv:1911.05507) is a set of Project Gutenberg books from before
//! 1919. Its bucket holds `{train,validation,test}/{id}.txt` and `metadata.csv`. Books are read
//! as binary: lines end in CR LF, and the byte totals that published bits-per-byte numbers rest
//! on count both.

use std::fs;
use std::path::{Path, PathBuf};

use super::{DocumentEntry, Source};
use crate::document::Split;
use crate::error::{DataError, Result};
use crate::fsutil;

/// A local copy of PG-19: `DIR/{train,validation,test}/{id}.txt` and `DIR/metadata.csv`.
#[derive(Clone, Debug)]
pub struct Pg19 {
    dir: PathBuf,
}

/// A line of `metadata.csv`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BookMetadata {
    /// Project Gutenberg's number of the book.
    pub id: u64,
    /// Short title, as in the file (some are cut, some have `?` for accented letters).
    pub title: String,
    /// Year of publication, as in the file (some are wrong).
    pub year: String,
    /// The book's page at Project Gutenberg.
    pub url: String,
}

impl Pg19 {
    /// A copy in `dir`. Nothing is read yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder of the copy.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads `metadata.csv` (columns id, title, year, url; no header line, no quoting).
    ///
    /// # Errors
    ///
    /// [`DataError::Io`] when it cannot be read, [`DataError::Metadata`] naming the first line
    /// that has another shape.
    pub fn metadata(&self) -> Result<Vec<BookMetadata>> {
        let path = self.dir.join("metadata.csv");
        let bytes = fs::read(&path).map_err(DataError::io("read", &path))?;
        let text = crate::text::lossy_text(&bytes);
        let numbered = text.lines().enumerate();
        numbered
            .filter(|(_, line)| !line.is_empty())
            .map(|(index, line)| {
                parse_book(line).ok_or_else(|| DataError::Metadata {
                    path: path.clone(),
                    line: index + 1,
                    got: line.to_owned(),
                    expected: "id,title,year,url",
                })
            })
            .collect()
    }
}

/// Parses one line. The title takes any commas that are too many.
fn parse_book(line: &str) -> Option<BookMetadata> {
    let (id, rest) = line.split_once(',')?;
    let (rest, url) = rest.rsplit_once(',')?;
    let (title, year) = rest.rsplit_once(',')?;
    Some(BookMetadata {
        id: parse_id(id)?,
        title: title.to_owned(),
        year: year.to_owned(),
        url: url.to_owned(),
    })
}

/// Parses a book's id: up to nine decimal digits without leading zeros.
///
/// Names of files are made from ids, so nothing but digits may pass.
pub(crate) fn parse_id(text: &str) -> Option<u64> {
    let digits = (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let plain = text == "0" || !text.starts_with('0');
    (digits && plain).then(|| text.parse().ok()).flatten()
}

impl Source for Pg19 {
    fn describe(&self) -> String {
        format!("PG-19 in {}", self.dir.display())
    }

    /// The books of a split in the order of their ids; named by id.
    fn entries(&self, split: Split) -> Result<Vec<DocumentEntry>> {
        let dir = self.dir.join(split.as_str());
        let mut books = Vec::new();
        for path in fsutil::list_dir(&dir)? {
            if path.extension().is_none_or(|extension| extension != "txt") {
                continue;
            }
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let id = parse_id(&stem).ok_or_else(|| DataError::Layout {
                path: path.clone(),
                got: format!("the name {stem}.txt"),
                expected: "{id}.txt with a number as id".to_owned(),
                hint: "PG-19 holds nothing else; read other folders as text",
            })?;
            let metadata = fs::metadata(&path).map_err(DataError::io("inspect", &path))?;
            books.push((id, path, metadata.len()));
        }
        if books.is_empty() {
            return Err(DataError::NoData {
                what: "PG-19 books, files named {id}.txt,".to_owned(),
                place: dir,
                hint: "download PG-19 there, point to the folder above train/, validation/ and \
                       test/, or leave this split out"
                    .to_owned(),
            });
        }
        books.sort_by_key(|(id, ..)| *id);
        let entry = |(id, path, bytes): (u64, PathBuf, u64)| DocumentEntry {
            name: id.to_string(),
            path,
            start: 0,
            bytes,
        };
        Ok(books.into_iter().map(entry).collect())
    }
}
