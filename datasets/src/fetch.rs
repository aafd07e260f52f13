//! Fetching files over HTTP: ranges, retries, verification.
//!
//! A file appears under its name only when its length, and its hash where one is known, are right.
//! What a broken transfer leaves beside it is gone on with.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::HeaderMap;
use ureq::typestate::WithoutBody;
use ureq::{Agent, RequestBuilder};

use crate::error::{DataError, Result};
use crate::fsutil;
use crate::hashing::hex;
use crate::progress::Progress;

const CHUNK: usize = 64 << 10;

/// Longest pause between attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// How to fetch.
pub struct Fetcher<'a> {
    agent: Agent,
    /// Attempts per file, at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles each time, up to a minute. A server that asks for
    /// a longer one gets it, up to a minute.
    pub backoff: Duration,
    /// Sent as `Authorization: Bearer` to the address asked for, and on to no other host.
    pub token: Option<String>,
    /// Hears of attempts that failed.
    pub progress: &'a dyn Progress,
}

/// What a file has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected<'a> {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, as 64 lower-case hexadecimal digits, where it is known.
    pub sha256: Option<&'a str>,
}

/// Why one attempt did not succeed.
enum Failure {
    /// Worth another attempt, after this time if the server names one.
    Passing(String, Option<Duration>),
    /// The same would happen again.
    Lasting(DataError),
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        Failure::Lasting(error)
    }
}

/// A failure worth another attempt.
fn passing(problem: impl ToString) -> Failure {
    Failure::Passing(problem.to_string(), None)
}

/// The agent for all requests. Timeouts are per stage, not for a whole file: a slow line is no
/// error, a silent one is.
fn agent(timeout: Duration) -> Agent {
    Agent::config_builder()
        .http_status_as_error(false)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        // Lengths and ranges refer to the file itself, so it must not come compressed.
        .accept_encoding("identity")
        .timeout_resolve(Some(timeout))
        .timeout_connect(Some(timeout))
        .timeout_recv_response(Some(timeout))
        .timeout_per_read(Some(timeout))
        .build()
        .new_agent()
}

impl<'a> Fetcher<'a> {
    /// Five attempts, a second before the second of them, a minute of silence at most.
    pub fn new(progress: &'a dyn Progress) -> Self {
        let quiet = Duration::from_secs(60);
        Self::with_timeout(quiet, progress)
    }

    /// The same with another longest silence of the server.
    pub fn with_timeout(timeout: Duration, progress: &'a dyn Progress) -> Self {
        Self {
            agent: agent(timeout),
            attempts: 5,
            backoff: Duration::from_secs(1),
            token: None,
            progress,
        }
    }

    /// Fetches a small file whole into memory, at most `limit` bytes of it.
    ///
    /// # Errors
    ///
    /// [`DataError::Fetch`] after all attempts, [`DataError::HttpStatus`].
    pub fn fetch_small(&self, url: &str, limit: u64) -> Result<Vec<u8>> {
        self.retrying(url, || {
            let mut response = self.get(url).call().map_err(passing)?;
            check_status(url, response.status().as_u16(), response.headers())?;
            let body = response.body_mut().with_config().limit(limit);
            body.read_to_vec().map_err(passing)
        })
    }

    /// Fetches a file to `path`, going on with what an earlier run left in `path` + `.part`.
    ///
    /// The file gets its name only when its length and hash are right. `arrived` hears how many of
    /// its bytes are there; a transfer that begins again goes back to 0.
    ///
    /// # Errors
    ///
    /// [`DataError::Fetch`] after all attempts, [`DataError::HttpStatus`],
    /// [`DataError::DownloadLength`], [`DataError::DownloadHash`], [`DataError::Io`].
    pub fn fetch_file(
        &self,
        url: &str,
        expected: Expected<'_>,
        path: &Path,
        arrived: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut transfer = Transfer {
            fetcher: self,
            url,
            expected,
            part: part_path(path),
            arrived,
        };
        self.retrying(url, || transfer.attempt())?;
        fsutil::rename_durably(&transfer.part, path)
    }

    fn get(&self, url: &str) -> RequestBuilder<WithoutBody> {
        let request = self.agent.get(url);
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
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
                Err(Failure::Passing(problem, _)) if number >= attempts => {
                    return Err(DataError::Fetch {
                        url: url.to_owned(),
                        attempts,
                        problem,
                    });
                }
                Err(Failure::Passing(problem, asked)) => {
                    let note = format!("{url}: {problem}; attempt {} of {attempts}", number + 1);
                    self.progress.note(&note);
                    thread::sleep(pause.max(asked.unwrap_or_default()).min(MAX_BACKOFF));
                    pause = pause.saturating_mul(2).min(MAX_BACKOFF);
                    number += 1;
                }
            }
        }
    }
}

/// Statuses other than success: those that may pass, and those that stay.
fn check_status(url: &str, status: u16, headers: &HeaderMap) -> Result<(), Failure> {
    match status {
        200 | 206 => Ok(()),
        408 | 429 | 500..=599 => {
            let asked = headers.get("retry-after").and_then(|it| it.to_str().ok());
            let asked = asked.and_then(|seconds| seconds.trim().parse().ok());
            let problem = format!("HTTP status {status}");
            Err(Failure::Passing(problem, asked.map(Duration::from_secs)))
        }
        got => Err(Failure::Lasting(DataError::HttpStatus {
            url: url.to_owned(),
            got,
        })),
    }
}

/// The name under which an unfinished file lies.
pub(crate) fn part_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// SHA-256 of a file, as 64 lower-case hexadecimal digits.
///
/// # Errors
///
/// [`DataError::Io`].
pub fn sha256_of(path: &Path) -> Result<String> {
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
    expected: Expected<'a>,
    part: PathBuf,
    arrived: &'a mut dyn FnMut(u64),
}

impl Transfer<'_> {
    /// One attempt to have the whole, right file in `part`.
    fn attempt(&mut self) -> Result<(), Failure> {
        let (mut hash, mut have) = hash_so_far(&self.part)?;
        if have > self.expected.bytes {
            fsutil::remove_file_if_present(&self.part)?;
            (hash, have) = (Sha256::new(), 0);
        }
        let resumed = have > 0;
        if have < self.expected.bytes || !resumed {
            self.receive(&mut hash, &mut have)?;
        }
        let Some(expected) = self.expected.sha256 else {
            return Ok(());
        };
        let got = hex(&hash.finalize());
        if got == expected {
            return Ok(());
        }
        fsutil::remove_file_if_present(&self.part)?;
        if resumed {
            // The leftover may have been the bad part: it is worth one try from the beginning.
            return Err(passing("the resumed file's SHA-256 is wrong"));
        }
        Err(Failure::Lasting(DataError::DownloadHash {
            url: self.url.to_owned(),
            path: self.part.clone(),
            got,
            expected: expected.to_owned(),
        }))
    }

    /// Receives what is missing and appends it, flushed to the disk.
    fn receive(&mut self, hash: &mut Sha256, have: &mut u64) -> Result<(), Failure> {
        let mut request = self.fetcher.get(self.url);
        if *have > 0 {
            request = request.header("Range", format!("bytes={have}-"));
        }
        let response = request.call().map_err(passing)?;
        let status = response.status().as_u16();
        let begins = content_range_start(response.headers());
        if *have > 0 && (status == 416 || (status == 206 && begins != Some(*have))) {
            fsutil::remove_file_if_present(&self.part)?;
            let problem = format!("the server does not continue at byte {have}");
            return Err(passing(problem));
        }
        check_status(self.url, status, response.headers())?;
        if status == 200 {
            // The server sends the file from its beginning, whatever was asked.
            (*hash, *have) = (Sha256::new(), 0);
        }
        let mut part = self.open_part(*have == 0)?;
        (self.arrived)(*have);
        let (_, body) = response.into_parts();
        let announced = body.content_length().is_some();
        self.copy(body.into_reader(), &mut part, hash, have)?;
        part.sync_all()
            .map_err(DataError::io("flush", &self.part))?;
        if *have == self.expected.bytes {
            return Ok(());
        }
        if *have < self.expected.bytes && !announced {
            return Err(passing(format!("the transfer ended at byte {have}")));
        }
        drop(part);
        fsutil::remove_file_if_present(&self.part)?;
        Err(Failure::Lasting(DataError::DownloadLength {
            url: self.url.to_owned(),
            path: self.part.clone(),
            got: *have,
            expected: self.expected.bytes,
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
        &mut self,
        body: impl Read,
        part: &mut File,
        hash: &mut Sha256,
        have: &mut u64,
    ) -> Result<(), Failure> {
        let mut body = body.take(self.expected.bytes - *have + 1);
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let problem = format!("the transfer broke off at byte {have}: {error}");
                    return Err(passing(problem));
                }
            };
            part.write_all(&buffer[..count])
                .map_err(DataError::io("write", &self.part))?;
            hash.update(&buffer[..count]);
            *have += count as u64;
            (self.arrived)((*have).min(self.expected.bytes));
        }
    }
}

/// The first byte's position in `Content-Range: bytes FIRST-LAST/TOTAL`.
fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get("content-range")?.to_str().ok()?;
    let (first, _) = value.trim().strip_prefix("bytes ")?.split_once('-')?;
    first.trim().parse().ok()
}
