//! The one error type of the crate.

use std::io;
use std::path::{Path, PathBuf};

/// Result with [`DataError`].
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// What can go wrong between a file on disk and a batch of bytes.
///
/// Every message names the file, setting or address it is about, what was found there, what was
/// expected, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused an operation.
    #[error("could not {action} {}: {source}; check that the path exists, that you may use it and that the disk is not full", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "create".
        action: &'static str,
        /// The file or folder it was attempted on.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },

    /// A source has no documents where some were looked for.
    #[error("no data: looked for {what} in {}, found none; {hint}", place.display())]
    NoData {
        /// What was looked for.
        what: String,
        /// Where.
        place: PathBuf,
        /// What to do.
        hint: String,
    },

    /// A file lies where only files of a source's own layout may lie.
    #[error("unexpected file {}: got {got}, expected {expected}; {hint}", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// What it is.
        got: String,
        /// What belongs there.
        expected: String,
        /// What to do.
        hint: &'static str,
    },

    /// A line of a metadata file has the wrong shape.
    #[error("{}, line {line}: got {got:?}, expected {expected}; fetch the file again", path.display())]
    Metadata {
        /// The metadata file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The line found.
        got: String,
        /// The shape expected.
        expected: &'static str,
    },

    /// A document's length on disk is not the length it was listed with.
    #[error("{} changed while it was being read: got {got} bytes, expected {expected}; run the command again while nothing writes to it", path.display())]
    DocumentChanged {
        /// The document's file.
        path: PathBuf,
        /// Bytes read (a lower bound where the file has grown).
        got: u64,
        /// Bytes listed.
        expected: u64,
    },

    /// A setting has a value that cannot be used.
    #[error("setting {setting}: got {got}, expected {expected}")]
    Config {
        /// Name of the setting.
        setting: &'static str,
        /// Value given.
        got: String,
        /// Values possible.
        expected: String,
    },

    /// A split that would be written already holds files.
    #[error("{} already holds {files} file(s), expected an empty or absent folder; ask for overwriting, or prepare into another folder", path.display())]
    SplitExists {
        /// The split's folder.
        path: PathBuf,
        /// Number of entries in it.
        files: usize,
    },

    /// Another process is preparing data in the same folder.
    #[error("{} is locked by another running `prepare`, expected to be the only one; wait for it to end or use another folder", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },

    /// A file is not a shard.
    #[error("{} is not a byte shard: it begins with {got:02x?}, expected {expected:02x?} (\"MBSHARD\\0\"); point to a folder written by `mambabyte data prepare`", path.display())]
    NotAShard {
        /// The file.
        path: PathBuf,
        /// Its first bytes (fewer than eight in a shorter file).
        got: Vec<u8>,
        /// A shard's first bytes.
        expected: [u8; 8],
    },

    /// A shard was written in another version of the format.
    #[error("{} was written by another version: got format {got}, this program reads {expected}; run `mambabyte data prepare` again", path.display())]
    ShardVersion {
        /// The shard.
        path: PathBuf,
        /// Its version.
        got: u32,
        /// The version this program reads.
        expected: u32,
    },

    /// A shard's length is not the one in its header.
    #[error("{} is cut off or grown: got {got} bytes, expected {expected}; copy it again or run `mambabyte data prepare` again", path.display())]
    ShardLength {
        /// The shard.
        path: PathBuf,
        /// Bytes in the file.
        got: u64,
        /// Bytes expected (at least).
        expected: u64,
    },

    /// A shard's bytes do not match its checksums, or contradict each other.
    #[error("{} is damaged at byte {offset}: {problem}: got {got}, expected {expected}; copy the file again or run `mambabyte data prepare` again", path.display())]
    ShardDamaged {
        /// The shard.
        path: PathBuf,
        /// Where in the file the damaged part begins.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
        /// Value found.
        got: String,
        /// Value expected.
        expected: String,
    },

    /// The shard files of a split do not belong together.
    #[error("the shards in {} do not form one split: {}: got {got}, expected {expected}; copy the whole folder again or run `mambabyte data prepare` again", dir.display(), file.display())]
    ShardSet {
        /// The split's folder.
        dir: PathBuf,
        /// The shard that does not fit.
        file: PathBuf,
        /// What it says of itself.
        got: String,
        /// What it should be.
        expected: String,
    },

    /// Bytes past the end of a split were asked for.
    #[error("byte range out of bounds in {}: got {start}..{end}, expected a range within 0..{len}", dir.display())]
    OutOfRange {
        /// The split's folder.
        dir: PathBuf,
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Bytes in the split.
        len: u64,
    },

    /// A split is too short for the batch shape.
    #[error("{} is too short for {what}: got {got} bytes, expected at least {expected}; use a smaller batch or shorter windows, or prepare more data", dir.display())]
    TooShort {
        /// The split's folder.
        dir: PathBuf,
        /// What needs the bytes.
        what: String,
        /// Bytes in the split.
        got: u64,
        /// Bytes needed.
        expected: u64,
    },

    /// The list of files to download cannot be used.
    #[error(
        "unusable listing {origin}: {problem}: got {got}, expected {expected}; check the listing's address, or give a good copy of dataset_infos.json"
    )]
    Listing {
        /// Address or path of the listing.
        origin: String,
        /// What is wrong.
        problem: &'static str,
        /// What was found.
        got: String,
        /// What was expected.
        expected: String,
    },

    /// A server could not be reached or broke off, also after retries.
    #[error(
        "could not fetch {url} after {attempts} attempt(s): {problem}; check the network and run the command again, what has arrived is kept"
    )]
    Fetch {
        /// Address asked for.
        url: String,
        /// Attempts made.
        attempts: u32,
        /// The last problem.
        problem: String,
    },

    /// A server answered with a status that retrying does not help.
    #[error(
        "could not fetch {url}: got HTTP status {got}, expected 200 or 206; check the bucket's address and whether the file exists there"
    )]
    HttpStatus {
        /// Address asked for.
        url: String,
        /// Status code.
        got: u16,
    },

    /// A downloaded file has the wrong length.
    #[error("{url} has the wrong length: got {got} bytes, expected {expected}; {} was deleted; the server's file differs from the listing, use the official bucket or a true mirror", path.display())]
    DownloadLength {
        /// Address it came from.
        url: String,
        /// The partial file, deleted.
        path: PathBuf,
        /// Bytes sent (a lower bound where there were too many).
        got: u64,
        /// Bytes listed.
        expected: u64,
    },

    /// A downloaded file has the wrong content.
    #[error("{url} has the wrong SHA-256: got {got}, expected {expected}; {} was deleted; run the command again, and if it happens again use another mirror", path.display())]
    DownloadHash {
        /// Address it came from.
        url: String,
        /// The partial file, deleted.
        path: PathBuf,
        /// Hash of what arrived.
        got: String,
        /// Hash listed.
        expected: String,
    },

    /// The loader's thread ended before this batch.
    #[error(
        "the batch loader has stopped at step {step}, expected it to go on; an earlier call returned the reason, start a new loader"
    )]
    LoaderStopped {
        /// The first step that was not produced.
        step: u64,
    },
}

impl DataError {
    /// Maker of [`DataError::Io`] for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataError {
        let path = path.to_path_buf();
        move |source| DataError::Io {
            action,
            path,
            source,
        }
    }
}
