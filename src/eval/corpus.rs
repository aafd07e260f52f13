//! Documents to measure on: prepared shards, or text in memory.

use mambabyte_datasets::shards::count_words;
use mambabyte_datasets::{DataError, Document, DocumentInfo, Shards};

use super::evaluate::beginning;
use crate::error::{Error, Result};

/// Documents that lie one behind the other in a stream of bytes.
pub trait Corpus {
    /// All documents in stream order.
    fn documents(&self) -> Vec<DocumentInfo>;

    /// Copies the bytes of the stream from `start` on.
    ///
    /// # Errors
    ///
    /// Past the end, and where the data cannot be read.
    fn read(&self, start: u64, out: &mut [u8]) -> Result<()>;
}

impl Corpus for Shards {
    fn documents(&self) -> Vec<DocumentInfo> {
        self.documents().collect()
    }

    fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        Ok(self.read(start, out)?)
    }
}

/// Documents in memory.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    documents: Vec<DocumentInfo>,
    bytes: Vec<u8>,
}

impl Texts {
    /// These documents, in this order.
    pub fn new(documents: impl IntoIterator<Item = Document>) -> Self {
        let mut texts = Self::default();
        for document in documents {
            texts.push(&document.name, &document.bytes);
        }
        texts
    }

    /// The documents of another corpus in its first `limit` bytes, the last one cut off there.
    ///
    /// # Errors
    ///
    /// As [`Corpus::read`].
    pub fn of(corpus: &dyn Corpus, limit: Option<u64>) -> Result<Self> {
        let mut texts = Self::default();
        for document in beginning(corpus, limit)? {
            let mut bytes = vec![0; document.bytes as usize];
            corpus.read(document.start, &mut bytes)?;
            texts.push(&document.name, &bytes);
        }
        Ok(texts)
    }

    /// The same documents, each through `f`, which gets its number and its bytes.
    pub fn map(&self, f: impl Fn(u64, &[u8]) -> Vec<u8>) -> Self {
        let mut texts = Self::default();
        for (number, document) in self.documents.iter().enumerate() {
            let bytes = &self.bytes[document.start as usize..][..document.bytes as usize];
            texts.push(&document.name, &f(number as u64, bytes));
        }
        texts
    }

    /// Adds a document.
    pub fn push(&mut self, name: &str, bytes: &[u8]) {
        self.documents.push(DocumentInfo {
            name: name.to_owned(),
            start: self.bytes.len() as u64,
            bytes: bytes.len() as u64,
            words: count_words(bytes),
        });
        self.bytes.extend_from_slice(bytes);
    }
}

impl Corpus for Texts {
    fn documents(&self) -> Vec<DocumentInfo> {
        self.documents.clone()
    }

    fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let end = start.saturating_add(out.len() as u64);
        let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
        match range.and_then(|(start, end)| self.bytes.get(start..end)) {
            Some(bytes) => out.copy_from_slice(bytes),
            None => {
                return Err(Error::Data(DataError::OutOfRange {
                    dir: "memory".into(),
                    start,
                    end,
                    len: self.bytes.len() as u64,
                }));
            }
        }
        Ok(())
    }
}
