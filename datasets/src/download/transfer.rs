//! Fetching one file: ranges, retries, verification.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::Agent;

use super::listing::RemoteFile;
use crate::error::{DataError, Result};
use crate::fsutil;
use crate::hashing::hex;
use crate::progress::Progress;

const CHUNK: usize = 64 << 10;

/// Longest pause between attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// How to fetch.
pub(super) struct Fetcher<'a> {
    pub agent: Agent,
    pub attempts: u32,
    pub backoff: Duration,
    pub progress: &'a dyn Progress,
}

/// Why one attempt did not succeed.
enum Failure {
    /// Worth another attempt.
    Passing(String),
    /// The same would happen again.
    Lasting(DataError),
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Failure::Lasting(error)
    }
}

/// The agent for all requests. Timeouts are per stage, not for a whole file: a slow line is no
/// error, a silent one is.
pub(super) fn agent(timeout: Duration) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        // Lengths and ranges refer to the file itself, so it must not come compressed.
        .accept_encoding("identity")
        .timeout_resolve(Some(timeout))
        .timeout_connect(Some(timeout))
        .timeout_recv_response(Some(timeout))
        .timeout_per_read(Some(timeout))
        .build()
        .new_agent()
}

impl Fetcher<'_> {
    /// Fetches a small file whole into memory, at most `limit` bytes of it.
    pub fn fetch_small(&self, url: &str, limit: u64) -> Result<Vec<u8>> {
        self.retrying(url, || {
            let passing = |error: ureq::Error| Failure::Passing(error.to_string());
            let mut response = self.agent.get(url).call().map_err(passing)?;
            check_status(url, response.status().as_u16())?;
            let body = response.body_mut().with_config().limit(limit);
            body.read_to_vec().map_err(passing)
        })
    }

    /// Fetches a file to `path`, going on with what an earlier run left in `path` + `.part`.
    ///
    /// The file gets its name only when its length and hash are right. Progress hears of each
    /// byte of the file once, on success.
    pub fn fetch_file(&self, url: &str, file: &RemoteFile, path: &Path) -> Result<()> {
        let transfer = Transfer {
            fetcher: self,
            url,
            file,
            part: part_path(path),
        };
        self.retrying(url, || transfer.attempt())?;
        fsutil::rename_durably(&transfer.part, path)
    }

    /// Tries until success, a lasting failure, or the last attempt; waits longer each time.
    fn retrying<T>(&self, url: &str, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let attempts = self.attempts.max(1);
        let mut pause = self.backoff;
        let mut number = 1;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Lasting(error)) => return Err(error),
                Err(Failure::Passing(problem)) if number >= attempts => {
                    return Err(DataError::Fetch {
                        url: url.to_owned(),
                        attempts,
                        problem,
                    });
                }
                Err(Failure::Passing(problem)) => {
                    let note = format!("{url}: {problem}; attempt {} of {attempts}", number + 1);
                    self.progress.note(&note);
                    thread::sleep(pause);
                    pause = pause.saturating_mul(2).min(MAX_BACKOFF);
                    number += 1;
                }
            }
        }
    }
}

/// Statuses other than success: those that may pass, and those that stay.
fn check_status(url: &str, status: u16) -> Result<(), Failure> {
    match status {
        200 | 206 => Ok(()),
        408 | 429 | 500..=599 => Err(Failure::Passing(format!("HTTP status {status}"))),
        got => Err(Failure::Lasting(DataError::HttpStatus {
            url: url.to_owned(),
            got,
        })),
    }
}

/// The name under which an unfinished file lies.
pub(super) fn part_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// SHA-256 of a file.
fn hash_file(path: &Path) -> Result<String> {
    let (hash, _) = hash_so_far(path)?;
    Ok(hex(&hash.finalize()))
}

/// The hash of a file before it is finished, to go on with; of nothing when there is no file.
fn hash_so_far(path: &Path) -> Result<(Sha256, u64)> {
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((hash, 0)),
        Err(error) => return Err(DataError::io("open", path)(error)),
    };
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = file
            .read(&mut buffer)
            .map_err(DataError::io("read", path))?;
        if count == 0 {
            return Ok((hash, bytes));
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
}

/// The transfer of one file.
struct Transfer<'a> {
    fetcher: &'a Fetcher<'a>,
    url: &'a str,
    file: &'a RemoteFile,
    part: PathBuf,
}

impl Transfer<'_> {
    /// One attempt to have the whole, right file in `part`.
    fn attempt(&self) -> Result<(), Failure> {
        let (mut hash, mut have) = hash_so_far(&self.part)?;
        if have > self.file.bytes {
            fsutil::remove_file_if_present(&self.part)?;
            (hash, have) = (Sha256::new(), 0);
        }
        let resumed = have > 0;
        if have < self.file.bytes || !resumed {
            self.receive(&mut hash, &mut have)?;
        }
        let got = hex(&hash.finalize());
        if got == self.file.sha256 {
            return Ok(());
        }
        fsutil::remove_file_if_present(&self.part)?;
        if resumed {
            // The leftover may have been the bad part: it is worth one try from the beginning.
            return Err(Failure::Passing(
                "the resumed file's SHA-256 is wrong".to_owned(),
            ));
        }
        Err(Failure::Lasting(DataError::DownloadHash {
            url: self.url.to_owned(),
            path: self.part.clone(),
            got,
            expected: self.file.sha256.clone(),
        }))
    }

    /// Receives what is missing and appends it, flushed to the disk.
    fn receive(&self, hash: &mut Sha256, have: &mut u64) -> Result<(), Failure> {
        let mut request = self.fetcher.agent.get(self.url);
        if *have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
        }
        let response = request
            .call()
            .map_err(|error| Failure::Passing(error.to_string()))?;
        let status = response.status().as_u16();
        let begins = content_range_start(response.headers());
        if *have > 0 && (status == 416 || (status == 206 && begins != Some(*have))) {
            fsutil::remove_file_if_present(&self.part)?;
            let problem = format!("the server does not continue at byte {have}");
            return Err(Failure::Passing(problem));
        }
        check_status(self.url, status)?;
        if status == 200 {
            // The server sends the file from its beginning, whatever was asked.
            (*hash, *have) = (Sha256::new(), 0);
        }
        let mut part = self.open_part(*have == 0)?;
        let (_, body) = response.into_parts();
        let announced = body.content_length().is_some();
        self.copy(body.into_reader(), &mut part, hash, have)?;
        part.sync_all()
            .map_err(DataError::io("flush", &self.part))?;
        if *have == self.file.bytes {
            return Ok(());
        }
        if *have < self.file.bytes && !announced {
            return Err(Failure::Passing(format!(
                "the transfer ended at byte {have}"
            )));
        }
        drop(part);
        fsutil::remove_file_if_present(&self.part)?;
        Err(Failure::Lasting(DataError::DownloadLength {
            url: self.url.to_owned(),
            path: self.part.clone(),
            got: *have,
            expected: self.file.bytes,
        }))
    }

    fn open_part(&self, fresh: bool) -> Result<File> {
        let mut options = OpenOptions::new();
        match fresh {
            true => options.write(true).create(true).truncate(true),
            false => options.append(true),
        };
        let part = options.open(&self.part);
        part.map_err(DataError::io("write", &self.part))
    }

    /// Copies a body to the part; stops after one byte too many.
    fn copy(
        &self,
        body: impl Read,
        part: &mut File,
        hash: &mut Sha256,
        have: &mut u64,
    ) -> Result<(), Failure> {
        let mut body = body.take(self.file.bytes - *have + 1);
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let problem = format!("the transfer broke off at byte {have}: {error}");
                    return Err(Failure::Passing(problem));
                }
            };
            part.write_all(&buffer[..count])
                .map_err(DataError::io("write", &self.part))?;
            hash.update(&buffer[..count]);
            *have += count as u64;
        }
    }
}

/// The first byte's position in `Content-Range: bytes FIRST-LAST/TOTAL`.
fn content_range_start(headers: &ureq::http::HeaderMap) -> Option<u64> {
    let value = headers.get("content-range")?.to_str().ok()?;
    let (first, _) = value.trim().strip_prefix("bytes ")?.split_once('-')?;
    first.trim().parse().ok()
}

/// Whether the right file is there. A wrong one stays until the right one replaces it.
pub(super) fn is_present(file: &RemoteFile, path: &Path, verify: bool) -> Result<bool> {
    let bytes = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(DataError::io("inspect", path)(error)),
    };
    Ok(bytes == file.bytes && (!verify || hash_file(path)? == file.sha256))
}
