//! From a name to a folder of checked files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::DecimalBytes;
use mambabyte_datasets::DataError;
use mambabyte_datasets::fetch::{Expected, Fetcher, sha256_of};
use mambabyte_datasets::progress::{Bar, Progress as _};
use tracing::info;

use super::cache::{self, CachedRepository};
use super::listing::{self, Listing, RemoteFile};
use super::{Name, Snapshot};
use crate::error::{Error, Result};
use crate::interop;

/// Where the hub is.
const ENDPOINT: &str = "https://huggingface.co";

/// The hub, and this disk's cache of it.
#[derive(Clone)]
pub struct Hub {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// For repositories that not everyone may read. It is sent to the endpoint's host only.
    pub token: Option<String>,
    /// Nothing is asked for: what the cache has is all there is.
    pub offline: bool,
    /// Pause before a request is made a second time; it doubles each time.
    pub backoff: Duration,
}

impl Hub {
    /// As the variables say that all programs of the hub know: `HF_ENDPOINT`, `HF_HOME`,
    /// `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`; `offline` has the same effect
    /// as the last.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] where there is no place for the cache, or the hub's address is none.
    pub fn from_env(offline: bool) -> Result<Self> {
        let endpoint = cache::set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::Usage {
                message: format!("HF_ENDPOINT is `{endpoint}`, expected an address"),
                hint: format!("unset it, or set it as in {ENDPOINT}"),
            });
        }
        let set = cache::set("HF_HUB_OFFLINE").map(|value| value.to_ascii_lowercase());
        let set = set.is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.as_str()));
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: cache::folder()?,
            token: cache::token(),
            offline: offline || set,
            backoff: Duration::from_secs(1),
        })
    }

    /// The files of what the name means on the hub now. A commit that is complete in the cache is
    /// not asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] where the repository does not exist, may not be read, is not of Mamba-1
    /// (before its weights are fetched), or what arrives is not what the hub lists; [`Error::Io`] on
    /// a full disk. What has arrived stays and is gone on with.
    pub fn newest(&self, name: &Name) -> Result<Snapshot> {
        match self.offline || name.is_pinned() {
            true => self.present(name),
            false => self.download(name),
        }
    }

    /// The files that the cache has under this name, or else those on the hub.
    ///
    /// # Errors
    ///
    /// As [`newest`](Self::newest).
    pub fn present(&self, name: &Name) -> Result<Snapshot> {
        let cached = self.cached(name);
        match cached {
            Err(_) if !self.offline => self.download(name),
            cached => cached,
        }
    }

    /// Where a checkpoint of this program that was made of what the cache has under this name would
    /// be.
    pub fn converted(&self, name: &Name) -> Option<PathBuf> {
        let repository = CachedRepository::new(&self.cache, &name.repository);
        let commit = repository.commit(name)?;
        Some(repository.converted(&commit))
    }

    /// The cached files, if all that belongs to a checkpoint is there and unharmed.
    fn cached(&self, name: &Name) -> Result<Snapshot> {
        let repository = CachedRepository::new(&self.cache, &name.repository);
        let absent = |reason: &str| Error::Checkpoint {
            path: name.to_string().into(),
            reason: format!("{reason} in {}", self.cache.display()),
            hint: "run the command once with a network: without `--offline`, and with \
                   HF_HUB_OFFLINE unset"
                .to_owned(),
        };
        let commit = repository
            .commit(name)
            .ok_or_else(|| absent("is not there"))?;
        let folder = repository.snapshot(&commit);
        if !folder.is_dir() {
            return Err(absent("is not there"));
        }
        for file in interop::files(&folder)? {
            let Some(expected) = cache::known_sha256(&file) else {
                continue;
            };
            info!("checking {}", file.display());
            let got = sha256_of(&file).map_err(|error| self.failed(name, error))?;
            if got != expected {
                return Err(Error::Checkpoint {
                    path: file,
                    reason: format!("was altered: its SHA-256 is {got}, and was {expected}"),
                    hint: "run the command with a network, which fetches it again".to_owned(),
                });
            }
        }
        Ok(snapshot(&repository, name, &commit))
    }

    /// The files as the hub has them; of what the cache has only the hash is taken again.
    fn download(&self, name: &Name) -> Result<Snapshot> {
        let bar = Bar::new();
        let mut fetcher = Fetcher::new(&bar);
        fetcher.token = self.token.clone();
        fetcher.backoff = self.backoff;
        let url = format!(
            "{}/api/models/{}/revision/{}?blobs=true",
            self.endpoint,
            name.repository,
            name.revision.replace('/', "%2F"),
        );
        let listing = fetcher
            .fetch_small(&url, listing::MOST_BYTES)
            .map_err(|error| self.failed(name, error))?;
        let listing = Listing::parse(&listing).map_err(|reason| unusable(name, reason))?;
        let download = Download {
            hub: self,
            name,
            repository: CachedRepository::new(&self.cache, &name.repository),
            listing,
            fetcher,
            bar: &bar,
        };
        download.run()
    }

    /// An error of a transfer as one about the checkpoint.
    fn failed(&self, name: &Name, error: DataError) -> Error {
        let again = "run the command again: what has arrived is kept, and what was wrong is \
                     fetched anew";
        let (reason, hint) = match error {
            DataError::Io {
                action,
                path,
                source,
            } => {
                return Error::Io {
                    action,
                    path,
                    source,
                };
            }
            DataError::HttpStatus {
                got: got @ (401 | 403 | 404),
                ..
            } => self.refused(got),
            DataError::HttpStatus { url, got } => (
                format!("cannot be fetched: {url} answered with HTTP status {got}"),
                "check HF_ENDPOINT, if it is set",
            ),
            DataError::Fetch {
                url,
                attempts,
                problem,
            } => (
                format!("cannot be fetched: {url}: {problem}, {attempts} times"),
                "check the network and run the command again: what has arrived is kept; \
                 HF_HUB_OFFLINE=1 takes what was downloaded before",
            ),
            DataError::DownloadLength {
                url, got, expected, ..
            } => (
                format!("is not as listed: {url} has {got} bytes, expected {expected}"),
                again,
            ),
            DataError::DownloadHash {
                url, got, expected, ..
            } => (
                format!("is not as listed: {url} has the SHA-256 {got}, expected {expected}"),
                again,
            ),
            other => return other.into(),
        };
        Error::Checkpoint {
            path: name.to_string().into(),
            reason,
            hint: hint.to_owned(),
        }
    }

    /// What an answer means that says who may not have what. The hub says the same of what does not
    /// exist and of what is private.
    fn refused(&self, status: u16) -> (String, &'static str) {
        let reason = match status {
            404 => "does not exist",
            _ => "does not exist or may not be read",
        };
        let hint = match (status, &self.token) {
            (404, _) => "check owner, name and revision",
            (_, None) => {
                "check owner and name; where a token is needed, set HF_TOKEN or run `hf auth login`"
            }
            (_, Some(_)) => {
                "check owner and name, that the token is valid, and that its user has accepted the \
                 repository's conditions"
            }
        };
        (
            format!("{reason} on {}: HTTP status {status}", self.endpoint),
            hint,
        )
    }
}

fn snapshot(repository: &CachedRepository, name: &Name, commit: &str) -> Snapshot {
    Snapshot {
        folder: repository.snapshot(commit),
        converted: repository.converted(commit),
        source: format!("hf:{}@{commit}", name.repository),
    }
}

/// The hub's answer, or the repository, is not what a checkpoint has.
fn unusable(name: &Name, reason: impl Into<String>) -> Error {
    Error::Checkpoint {
        path: name.to_string().into(),
        reason: reason.into(),
        hint: "name the repository of a Mamba-1 checkpoint: `pytorch_model.bin` or safetensors, \
               beside `config.json`"
            .to_owned(),
    }
}

/// A commit on its way into the cache.
struct Download<'a> {
    hub: &'a Hub,
    name: &'a Name,
    repository: CachedRepository,
    listing: Listing,
    fetcher: Fetcher<'a>,
    bar: &'a Bar,
}

impl Download<'_> {
    fn run(&self) -> Result<Snapshot> {
        let commit = &self.listing.commit;
        self.repository.create(commit)?;
        if let Some(config) = self.listing.find(interop::CONFIG) {
            // First: what is no Mamba-1 is refused before gigabytes of it arrive.
            interop::check_config(&self.fetch(config)?)?;
        }
        let names: Vec<&str> = self
            .listing
            .files
            .iter()
            .map(|it| it.name.as_str())
            .collect();
        let weights =
            interop::weights_among(&names).map_err(|reason| unusable(self.name, reason))?;
        let mut wanted = vec![self.listed(weights)?];
        if weights.ends_with(".json") {
            let index = self.fetch(wanted[0])?;
            wanted = interop::indexed(&index)?
                .iter()
                .map(|name| self.listed(name))
                .collect::<Result<_>>()?;
        }
        self.check_space(&wanted)?;
        for file in wanted {
            self.fetch(file)?;
        }
        if !self.name.is_pinned() {
            self.repository.remember(self.name, commit)?;
        }
        Ok(snapshot(&self.repository, self.name, commit))
    }

    fn listed(&self, name: &str) -> Result<&RemoteFile> {
        let missing = || unusable(self.name, format!("has no `{name}`, which its index names"));
        self.listing.find(name).ok_or_else(missing)
    }

    /// Sees to it that the file is in the cache and right; returns where.
    fn fetch(&self, file: &RemoteFile) -> Result<PathBuf> {
        let blob = self.repository.blob(file);
        let _lock = self.repository.lock(file)?;
        if !self.is_right(file, &blob)? {
            let url = format!(
                "{}/{}/resolve/{}/{}",
                self.hub.endpoint, self.name.repository, self.listing.commit, file.name
            );
            info!("fetching {} ({})", file.name, DecimalBytes(file.bytes));
            let expected = Expected {
                bytes: file.bytes,
                sha256: file.sha256(),
            };
            self.bar.start(&file.name, file.bytes);
            let fetched = self
                .fetcher
                .fetch_file(&url, expected, &blob, &mut |bytes| self.bar.reach(bytes));
            self.bar.finish();
            fetched.map_err(|error| self.hub.failed(self.name, error))?;
        }
        self.repository.link(&self.listing.commit, file)?;
        Ok(self
            .repository
            .snapshot(&self.listing.commit)
            .join(&file.name))
    }

    /// Whether the cache has the file as it is listed.
    fn is_right(&self, file: &RemoteFile, blob: &Path) -> Result<bool> {
        if !fs::metadata(blob).is_ok_and(|found| found.len() == file.bytes) {
            return Ok(false);
        }
        let Some(expected) = file.sha256() else {
            return Ok(true);
        };
        info!("checking {}, which is in the cache", file.name);
        let got = sha256_of(blob).map_err(|error| self.hub.failed(self.name, error))?;
        Ok(got == expected)
    }

    /// That the disk has room for what is not there yet.
    fn check_space(&self, files: &[&RemoteFile]) -> Result<()> {
        let missing: u64 = files
            .iter()
            .map(|file| {
                let blob = self.repository.blob(file);
                let part = blob.with_extension("part");
                let there = [blob, part]
                    .into_iter()
                    .filter_map(|it| fs::metadata(it).ok());
                file.bytes
                    .saturating_sub(there.map(|it| it.len()).max().unwrap_or(0))
            })
            .fold(0, u64::saturating_add);
        match free_bytes(&self.hub.cache) {
            Some(free) if free < missing => Err(Error::Io {
                action: "write",
                path: self.hub.cache.clone(),
                source: io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!(
                        "{} are to be fetched, and {} are free; HF_HOME may name a folder on a \
                         larger disk",
                        DecimalBytes(missing),
                        DecimalBytes(free),
                    ),
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// Bytes that are free where a folder is, if the system says so.
fn free_bytes(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let disk = rustix::fs::statvfs(folder).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}
