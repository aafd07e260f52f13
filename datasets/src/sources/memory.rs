//! Documents in memory: for tests, examples and small generated corpora.

use std::io::Read;
use std::path::PathBuf;

use super::{DocumentEntry, Source};
use crate::document::{Document, Split};
use crate::error::{DataError, Result};

/// A source of documents that are already in memory. Unlike the sources on disk it may hold
/// empty documents.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    documents: [Vec<Document>; 3],
}

impl InMemory {
    /// A source with no documents.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds documents to a split, after those it has.
    pub fn with(mut self, split: Split, documents: impl IntoIterator<Item = Document>) -> Self {
        self.documents[split as usize].extend(documents);
        self
    }

    /// The path that stands for a document: `{split}/{index}`.
    fn path(split: Split, index: usize) -> PathBuf {
        PathBuf::from(split.as_str()).join(index.to_string())
    }

    fn find(&self, entry: &DocumentEntry) -> Option<&Document> {
        let split: Split = entry.path.parent()?.to_str()?.parse().ok()?;
        let index: usize = entry.path.file_name()?.to_str()?.parse().ok()?;
        self.documents[split as usize].get(index)
    }
}

impl Source for InMemory {
    fn describe(&self) -> String {
        "documents in memory".to_owned()
    }

    fn entries(&self, split: Split) -> Result<Vec<DocumentEntry>> {
        let documents = &self.documents[split as usize];
        if documents.is_empty() {
            return Err(DataError::NoData {
                what: format!("documents of the {split} split"),
                place: PathBuf::from("memory"),
                hint: "add documents to that split, or leave it out".to_owned(),
            });
        }
        let entry = |(index, document): (usize, &Document)| DocumentEntry {
            name: document.name.clone(),
            path: Self::path(split, index),
            start: 0,
            bytes: document.bytes.len() as u64,
        };
        Ok(documents.iter().enumerate().map(entry).collect())
    }

    fn open(&self, entry: &DocumentEntry) -> Result<Box<dyn Read + '_>> {
        let document = self.find(entry).ok_or_else(|| DataError::NoData {
            what: format!("the document {}", entry.name),
            place: entry.path.clone(),
            hint: "pass an entry that this source has listed".to_owned(),
        })?;
        Ok(Box::new(document.bytes.as_slice()))
    }
}
