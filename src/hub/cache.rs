//! The cache that programs of the hub share, in the layout of huggingface_hub.
//!
//! ```text
//! models--OWNER--NAME/
//!     blobs/HASH                 contents; HASH.part where a download goes on
//!     snapshots/COMMIT/FILE      links to them
//!     refs/REVISION              the commit that a branch or tag was last seen at
//!     mambabyte/COMMIT/          the same as a checkpoint of this program
//! ```

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

use super::listing::{RemoteFile, sha256_in};
use super::name::{Name, is_commit};
use crate::error::{Error, Result};

/// A repository's place in the cache.
#[derive(Debug)]
pub(super) struct CachedRepository {
    cache: Cache,
    folder: PathBuf,
    repository: String,
}

impl CachedRepository {
    pub(super) fn new(cache: &Path, repository: &str) -> Self {
        let cache = Cache::new(cache.to_owned());
        let name = Repo::new(repository.to_owned(), RepoType::Model).folder_name();
        Self {
            folder: cache.path().join(name),
            cache,
            repository: repository.to_owned(),
        }
    }

    /// The commit that `name` means, as far as this disk knows.
    pub(super) fn commit(&self, name: &Name) -> Option<String> {
        if name.is_pinned() {
            return Some(name.revision.clone());
        }
        let text = fs::read_to_string(self.folder.join("refs").join(&name.revision)).ok()?;
        Some(text.trim().to_owned()).filter(|text| is_commit(text))
    }

    /// Remembers the commit that `name` means.
    pub(super) fn remember(&self, name: &Name, commit: &str) -> Result<()> {
        let repo = Repo::with_revision(
            self.repository.clone(),
            RepoType::Model,
            name.revision.clone(),
        );
        let place = self.folder.join("refs").join(&name.revision);
        let made = self.cache.repo(repo).create_ref(commit);
        made.map_err(Error::io("write", place))
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The folder of a commit as a checkpoint of this program.
    pub(super) fn converted(&self, commit: &str) -> PathBuf {
        self.folder.join("mambabyte").join(commit)
    }

    /// Where a file's content is, or will be.
    pub(super) fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.folder.join("blobs").join(&file.blob)
    }

    /// Makes the folders that a commit's files go into.
    pub(super) fn create(&self, commit: &str) -> Result<()> {
        for folder in [self.folder.join("blobs"), self.snapshot(commit)] {
            fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        }
        Ok(())
    }

    /// Waits until no other program works on this content, and keeps others out while it lives.
    pub(super) fn lock(&self, file: &RemoteFile) -> Result<File> {
        let path = self.blob(file).with_extension("lock");
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        lock.lock().map_err(Error::io("lock", &path))?;
        Ok(lock)
    }

    /// Lets a commit's folder have the file.
    pub(super) fn link(&self, commit: &str, file: &RemoteFile) -> Result<()> {
        let place = self.snapshot(commit).join(&file.name);
        let content = Path::new("../../blobs").join(&file.blob);
        if fs::read_link(&place).is_ok_and(|target| target == content) {
            return Ok(());
        }
        match fs::remove_file(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &place)(error));
            }
            _ => {}
        }
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(&content, &place);
        #[cfg(not(unix))]
        let linked = fs::hard_link(self.blob(file), &place);
        linked.map_err(Error::io("create", &place))
    }
}

/// The SHA-256 of a file in a commit's folder, if the cache knows it: the name of its content.
pub(super) fn known_sha256(file: &Path) -> Option<String> {
    let content = fs::canonicalize(file).ok()?;
    let name = content.file_name()?.to_str()?;
    sha256_in(name).map(str::to_owned)
}

/// The cache's folder: `HF_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`, or
/// `~/.cache/huggingface/hub`.
pub(super) fn folder() -> Result<PathBuf> {
    match set("HF_HUB_CACHE") {
        Some(folder) => Ok(folder.into()),
        None => Ok(home()?.join("hub")),
    }
}

/// The token of the hub's user, if there is one: `HF_TOKEN`, or the file that `hf auth login` writes.
pub(super) fn token() -> Option<String> {
    let text = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN"));
    let text = text.or_else(|| {
        let file = set("HF_TOKEN_PATH").map(PathBuf::from);
        let file = file.or_else(|| Some(home().ok()?.join("token")))?;
        fs::read_to_string(file).ok()
    })?;
    Some(text.trim().to_owned()).filter(|token| !token.is_empty())
}

fn home() -> Result<PathBuf> {
    if let Some(home) = set("HF_HOME") {
        return Ok(home.into());
    }
    let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| Some(env::home_dir()?.join(".cache")));
    match caches {
        Some(caches) => Ok(caches.join("huggingface")),
        None => Err(Error::Usage {
            message: "there is no home folder to keep downloads in".to_owned(),
            hint: "set HF_HOME to a folder".to_owned(),
        }),
    }
}

/// A variable of the environment that is there and not empty.
pub(super) fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
