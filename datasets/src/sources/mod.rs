//! Where documents come from.
//!
//! A [`Source`] lists the documents of a split with their lengths and opens them one at a time,
//! so that no more than a buffer of a corpus is ever in memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use crate::document::{Document, Split};
use crate::error::{DataError, Result};

mod cargo;
mod held_out;
mod memory;
mod pg19;
mod text;

pub use cargo::{CargoOptions, CargoReport, CargoSources};
pub use held_out::HeldOut;
pub use memory::InMemory;
pub(crate) use pg19::parse_id;
pub use pg19::{BookMetadata, Pg19};
pub use text::{TextFolder, TextOptions};

/// A document that a source has: where it lies and how long it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentEntry {
    /// Name within the source.
    pub name: String,
    /// File that holds the document.
    pub path: PathBuf,
    /// Where in the file it begins, in bytes.
    pub start: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Something that turns files into documents.
pub trait Source: Send + Sync {
    /// What this source is and where, for messages: "PG-19 in /data/pg19".
    fn describe(&self) -> String;

    /// The documents of a split in a fixed order.
    ///
    /// # Errors
    ///
    /// [`DataError::NoData`] when there are none; [`DataError::Io`] when they cannot be listed.
    fn entries(&self, split: Split) -> Result<Vec<DocumentEntry>>;

    /// Opens one document for reading from its first byte.
    ///
    /// The reader may give more bytes than listed when the file has grown; callers compare.
    ///
    /// # Errors
    ///
    /// [`DataError::Io`] when the file cannot be opened.
    fn open(&self, entry: &DocumentEntry) -> Result<Box<dyn Read + '_>> {
        let path = &entry.path;
        let mut file = File::open(path).map_err(DataError::io("open", path))?;
        file.seek(SeekFrom::Start(entry.start))
            .map_err(DataError::io("read", path))?;
        Ok(Box::new(file.take(entry.bytes)))
    }

    /// Reads one whole document.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`DataError::DocumentChanged`] when the file has become shorter.
    fn read(&self, entry: &DocumentEntry) -> Result<Document> {
        let mut bytes = Vec::new();
        self.open(entry)?
            .read_to_end(&mut bytes)
            .map_err(DataError::io("read", &entry.path))?;
        let got = bytes.len() as u64;
        if got != entry.bytes {
            return Err(DataError::DocumentChanged {
                path: entry.path.clone(),
                got,
                expected: entry.bytes,
            });
        }
        let name = entry.name.clone();
        Ok(Document { name, bytes })
    }
}

#[cfg(test)]
mod tests;
