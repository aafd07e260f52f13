//! Documents and splits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// One of the three parts of a corpus. Splits never share documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Bytes the model learns from.
    Train,
    /// Bytes used to choose between models and settings.
    Validation,
    /// Bytes used once, for the reported number.
    Test,
}

impl Split {
    /// All splits, in the order in which they are written.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// The split's folder name: `train`, `validation` or `test`.
    pub fn as_str(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Split {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        Split::ALL
            .into_iter()
            .find(|split| split.as_str() == text)
            .ok_or_else(|| DataError::Config {
                setting: "split",
                got: text.to_owned(),
                expected: "train, validation or test".to_owned(),
            })
    }
}

/// A named run of bytes: a book, a file of source code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Name within its source, for people: a book's id, a file's path.
    pub name: String,
    /// The document's bytes, exactly as stored.
    pub bytes: Vec<u8>,
}
