//! The official list of PG-19's files: names, lengths, SHA-256 hashes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;

use crate::document::Split;
use crate::error::{DataError, Result};
use crate::sources::parse_id;

/// A file of PG-19, by its place in the bucket and in a local copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RemoteName {
    /// `metadata.csv`.
    Metadata,
    /// `{split}/{id}.txt`.
    Book(Split, u64),
}

impl fmt::Display for RemoteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RemoteName::Metadata => f.write_str("metadata.csv"),
            RemoteName::Book(split, id) => write!(f, "{split}/{id}.txt"),
        }
    }
}

/// A listed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Which file.
    pub name: RemoteName,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its SHA-256, as 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// The files of PG-19, the metadata first, then books by split and number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    files: Vec<RemoteFile>,
}

/// One configuration in `dataset_infos.json`; other fields are ignored.
#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    download_checksums: BTreeMap<String, Checksum>,
}

#[derive(Deserialize)]
struct Checksum {
    num_bytes: u64,
    checksum: String,
}

impl Listing {
    /// Parses a `dataset_infos.json`: per configuration, whatever its name, the object
    /// `download_checksums` from addresses to `{"num_bytes": N, "checksum": "SHA-256"}`.
    ///
    /// Only the end of an address counts, `{split}/{id}.txt` or `metadata.csv`: the official
    /// file has `gs://` addresses, other copies `https://` ones. Entries for folders
    /// (`.../train`) are left out. `origin` names the listing in errors.
    ///
    /// # Errors
    ///
    /// [`DataError::Listing`] for other JSON, for an address that is none of these (so no name
    /// can lead out of the target folder), for a bad hash and when no book is listed.
    pub fn parse(json: &[u8], origin: &str) -> Result<Self> {
        let bad = |problem, got: String, expected: &str| DataError::Listing {
            origin: origin.to_owned(),
            problem,
            got,
            expected: expected.to_owned(),
        };
        let configurations: BTreeMap<String, Configuration> = serde_json::from_slice(json)
            .map_err(|error| {
                let expected = "{configuration: {\"download_checksums\": {address: {\"num_bytes\", \
                                \"checksum\"}}}}";
                bad(
                    "not the JSON of a dataset_infos.json",
                    error.to_string(),
                    expected,
                )
            })?;
        let mut files = BTreeMap::new();
        for (address, sum) in configurations
            .into_values()
            .flat_map(|configuration| configuration.download_checksums)
        {
            let Some(name) = remote_name(&address) else {
                let folder = address.rsplit('/').next().unwrap_or_default();
                if folder.parse::<Split>().is_ok() {
                    continue;
                }
                let expected = ".../{train,validation,test}/{number}.txt or .../metadata.csv";
                return Err(bad("address of a file", address, expected));
            };
            let sha256 = sum.checksum.to_ascii_lowercase();
            if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                let expected = "64 hexadecimal digits";
                return Err(bad("SHA-256", format!("{sha256:?} for {name}"), expected));
            }
            let bytes = sum.num_bytes;
            files.insert(
                name,
                RemoteFile {
                    name,
                    bytes,
                    sha256,
                },
            );
        }
        let files: Vec<RemoteFile> = files.into_values().collect();
        if !files
            .iter()
            .any(|file| matches!(file.name, RemoteName::Book(..)))
        {
            let got = format!("{} files, no book", files.len());
            return Err(bad("no books", got, "at least one {split}/{id}.txt"));
        }
        Ok(Self { files })
    }

    /// All files.
    pub fn files(&self) -> &[RemoteFile] {
        &self.files
    }

    /// The metadata and the first `max_books` books (by number) of each of the splits.
    pub fn select(&self, splits: &BTreeSet<Split>, max_books: Option<usize>) -> Vec<RemoteFile> {
        let most = max_books.unwrap_or(usize::MAX);
        let mut counts = [0; 3];
        let mut wanted = |file: &&RemoteFile| match file.name {
            RemoteName::Metadata => true,
            RemoteName::Book(split, _) => {
                let count = &mut counts[split as usize];
                *count += 1;
                splits.contains(&split) && *count <= most
            }
        };
        self.files.iter().filter(|f| wanted(f)).cloned().collect()
    }
}

/// The file that an address stands for, judged by its last parts.
fn remote_name(address: &str) -> Option<RemoteName> {
    let mut parts = address.rsplit('/');
    let file = parts.next()?;
    if file == "metadata.csv" {
        return Some(RemoteName::Metadata);
    }
    let split = parts.next()?.parse().ok()?;
    Some(RemoteName::Book(
        split,
        parse_id(file.strip_suffix(".txt")?)?,
    ))
}
