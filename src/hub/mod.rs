//! Checkpoints by their names on Hugging Face's hub.
//!
//! `hf:OWNER/NAME@REVISION` becomes a folder with a config and weights, as `hf download` makes it, in
//! the cache that the hub's other programs share. The hub's list of a revision's files gives the
//! commit, the lengths and the hashes; every file is fetched from that commit and checked against
//! them. `crate::interop` reads the folder.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod listing;
mod name;
#[cfg(feature = "hub")]
mod snapshot;

use std::path::PathBuf;

pub use name::Name;

#[cfg(feature = "hub")]
pub use snapshot::Hub;

/// A repository's files as they were at one commit, on this disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where they are.
    pub folder: PathBuf,
    /// Where a checkpoint of this program that is made of them should be put, beside them.
    pub converted: PathBuf,
    /// `hf:OWNER/NAME@COMMIT`.
    pub source: String,
}

/// What stands for the hub in a build without it.
#[cfg(not(feature = "hub"))]
#[derive(Debug)]
pub struct Hub {}

#[cfg(not(feature = "hub"))]
impl Hub {
    /// # Errors
    ///
    /// Always: nothing can be downloaded.
    pub fn from_env(_offline: bool) -> crate::error::Result<Self> {
        Err(crate::error::Error::Usage {
            message: "a name that begins with `hf:` is one on Hugging Face, and this program was \
                      built without downloads from there"
                .to_owned(),
            hint: "build it with `--features hub`; or fetch the checkpoint with `hf download \
                   OWNER/NAME --local-dir FOLDER`, and import that folder"
                .to_owned(),
        })
    }

    /// Not reached: there is no hub to ask.
    pub fn newest(&self, _name: &Name) -> crate::error::Result<Snapshot> {
        Err(Self::from_env(false).unwrap_err())
    }

    /// Not reached: there is no hub to ask.
    pub fn present(&self, name: &Name) -> crate::error::Result<Snapshot> {
        self.newest(name)
    }

    /// Not reached: there is no hub to ask.
    pub fn converted(&self, _name: &Name) -> Option<PathBuf> {
        None
    }
}
