//! Downloading PG-19 from DeepMind's public bucket.
//!
//! The bucket holds `{train,validation,test}/{id}.txt` and `metadata.csv`; lengths and SHA-256
//! hashes come from the official listing in Hugging Face's repository, pinned to one commit.
//! A file appears under its name only after both agree, so an interrupted download can be run
//! again at any time: finished files are skipped, an unfinished one goes on where it stopped.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::document::Split;
use crate::error::{DataError, Result};
use crate::fetch::{Expected, Fetcher, sha256_of};
use crate::progress::Progress;

mod listing;

pub use listing::{Listing, RemoteFile, RemoteName};

/// DeepMind's bucket.
pub const PG19_BUCKET: &str = "https://storage.googleapis.com/deepmind-gutenberg";

/// The official listing of lengths and hashes.
pub const PG19_LISTING: &str = "https://raw.githubusercontent.com/huggingface/datasets/6ce73f6263f9fc3df0db84ae7f937d27a5c208f7/datasets/pg19/dataset_infos.json";

/// Longest listing accepted; the official one has 4.2 MB.
const MAX_LISTING: u64 = 64 << 20;

/// Settings of [`download_pg19`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadOptions {
    /// Address under which the files lie, without a slash at its end.
    pub bucket: String,
    /// Address (`http://` or `https://`) or local path of the listing, a `dataset_infos.json`.
    pub listing: String,
    /// Splits to fetch.
    pub splits: BTreeSet<Split>,
    /// Most books of each split, lowest numbers first.
    pub max_books: Option<usize>,
    /// Check the hash, not only the length, of files that are already there.
    pub verify: bool,
    /// Attempts per file, at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles each time, up to a minute.
    pub backoff: Duration,
    /// Longest silence of the server.
    pub timeout: Duration,
    /// Files fetched at the same time, at least 1.
    pub parallel: usize,
}

impl Default for DownloadOptions {
    /// All of PG-19 (11.7 GB) from the official places, 4 files at a time.
    fn default() -> Self {
        Self {
            bucket: PG19_BUCKET.to_owned(),
            listing: PG19_LISTING.to_owned(),
            splits: Split::ALL.into(),
            max_books: None,
            verify: false,
            attempts: 5,
            backoff: Duration::from_secs(1),
            timeout: Duration::from_secs(60),
            parallel: 4,
        }
    }
}

/// What [`download_pg19`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DownloadReport {
    /// Files fetched.
    pub fetched: usize,
    /// Bytes of the files fetched, resumed parts included.
    pub fetched_bytes: u64,
    /// Files that were there already.
    pub present: usize,
    /// Bytes of those.
    pub present_bytes: u64,
}

/// Downloads PG-19 to `dir`, as [`Pg19`](crate::sources::Pg19) reads it.
///
/// # Errors
///
/// [`DataError::Listing`], [`DataError::Fetch`] after all attempts, [`DataError::HttpStatus`],
/// [`DataError::DownloadLength`], [`DataError::DownloadHash`], [`DataError::Io`]. The first
/// error ends the download; files that are finished stay.
pub fn download_pg19(
    dir: &Path,
    options: &DownloadOptions,
    progress: &dyn Progress,
) -> Result<DownloadReport> {
    let mut fetcher = Fetcher::with_timeout(options.timeout, progress);
    fetcher.attempts = options.attempts;
    fetcher.backoff = options.backoff;
    let listing = read_listing(&fetcher, &options.listing)?;
    let files = listing.select(&options.splits, options.max_books);
    for split in &options.splits {
        let folder = dir.join(split.as_str());
        fs::create_dir_all(&folder).map_err(DataError::io("create", &folder))?;
    }
    fs::create_dir_all(dir).map_err(DataError::io("create", dir))?;

    progress.start("downloading PG-19", files.iter().map(|f| f.bytes).sum());
    let job = Job {
        fetcher: &fetcher,
        dir,
        options,
        files: &files,
        next: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
        outcome: Mutex::new((DownloadReport::default(), None)),
    };
    thread::scope(|scope| {
        for _ in 0..options.parallel.clamp(1, files.len().max(1)) {
            scope.spawn(|| job.work());
        }
    });
    progress.finish();
    let (report, error) = match job.outcome.into_inner() {
        Ok(outcome) => outcome,
        Err(poisoned) => poisoned.into_inner(),
    };
    error.map_or(Ok(report), Err)
}

fn read_listing(fetcher: &Fetcher<'_>, place: &str) -> Result<Listing> {
    let json = if place.starts_with("http://") || place.starts_with("https://") {
        fetcher.fetch_small(place, MAX_LISTING)?
    } else {
        fs::read(place).map_err(DataError::io("read", Path::new(place)))?
    };
    Listing::parse(&json, place)
}

/// The files to fetch, shared by the threads that fetch them.
struct Job<'a> {
    fetcher: &'a Fetcher<'a>,
    dir: &'a Path,
    options: &'a DownloadOptions,
    files: &'a [RemoteFile],
    next: AtomicUsize,
    stopped: AtomicBool,
    outcome: Mutex<(DownloadReport, Option<DataError>)>,
}

impl Job<'_> {
    /// Takes files until there are none left or one has failed.
    fn work(&self) {
        while !self.stopped.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(file) = self.files.get(index) else {
                return;
            };
            let done = self.file(file);
            let mut outcome = match self.outcome.lock() {
                Ok(outcome) => outcome,
                Err(poisoned) => poisoned.into_inner(),
            };
            let (report, error) = &mut *outcome;
            match done {
                Ok(true) => {
                    report.fetched += 1;
                    report.fetched_bytes += file.bytes;
                }
                Ok(false) => {
                    report.present += 1;
                    report.present_bytes += file.bytes;
                }
                Err(failure) => {
                    self.stopped.store(true, Ordering::Relaxed);
                    error.get_or_insert(failure);
                }
            }
        }
    }

    /// Makes one file right; true when it had to be fetched.
    fn file(&self, file: &RemoteFile) -> Result<bool> {
        let name = file.name.to_string();
        let path = self.dir.join(&name);
        let present = is_present(file, &path, self.options.verify)?;
        if !present {
            let url = format!("{}/{name}", self.options.bucket.trim_end_matches('/'));
            let expected = Expected {
                bytes: file.bytes,
                sha256: Some(&file.sha256),
            };
            // Books are small: the bar moves when one is there.
            self.fetcher
                .fetch_file(&url, expected, &path, &mut |_| {})?;
        }
        self.fetcher.progress.advance(file.bytes);
        Ok(!present)
    }
}

/// Whether the right file is there. A wrong one stays until the right one replaces it.
fn is_present(file: &RemoteFile, path: &Path, verify: bool) -> Result<bool> {
    let bytes = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(DataError::io("inspect", path)(error)),
    };
    Ok(bytes == file.bytes && (!verify || sha256_of(path)? == file.sha256))
}

#[cfg(test)]
mod tests;
