//! One trainer at a time: the file `lock` in a run's folder.
//!
//! The lock is the system's (`flock`), which ends with the process that holds it, however that ends:
//! a file that is left behind locks nothing. Its text, who holds it, is for people.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::telemetry::machine_name;
use crate::clock::since_1970;
use crate::error::{Error, Result};

/// A run that is locked while the value lives.
pub(super) struct Lock {
    file: File,
}

/// Who holds a lock.
#[derive(Serialize, Deserialize)]
struct Holder {
    process: u32,
    host: String,
    /// Seconds since 1970.
    since: u64,
}

impl Lock {
    /// Locks the run in the folder `run`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] naming who holds it.
    pub(super) fn take(run: &Path) -> Result<Self> {
        let path = run.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        let before = Holder::read(&mut file);
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(run, before)),
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                tracing::warn!(
                    "the file system of `{}` has no locks: nothing keeps a second trainer out",
                    run.display()
                );
            }
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
        }
        if let Some(Holder { process, host, .. }) = before {
            tracing::info!(
                "the trainer before (process {process} on {host}) was killed, or lost power: its \
                 lock is stale"
            );
        }
        let mut lock = Self { file };
        // On a full disk the text stays empty, and the lock holds all the same.
        let _ = lock.sign();
        Ok(lock)
    }

    /// Writes down who holds it.
    fn sign(&mut self) -> std::io::Result<()> {
        let holder = Holder {
            process: std::process::id(),
            host: machine_name().unwrap_or_else(|| "this machine".to_owned()),
            since: since_1970().as_secs(),
        };
        let text = serde_json::to_string(&holder)? + "\n";
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // An empty file says that its holder ended in good order.
        let _ = self.file.set_len(0);
    }
}

impl Holder {
    /// Who has signed the file last; none where that trainer ended in good order.
    fn read(file: &mut File) -> Option<Self> {
        let mut text = String::new();
        file.take(1000).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

fn held(run: &Path, holder: Option<Holder>) -> Error {
    let who = holder.map_or_else(String::new, |it| {
        let minutes = since_1970().as_secs().saturating_sub(it.since) / 60;
        format!(
            ": process {} on {}, for {minutes} minutes",
            it.process, it.host
        )
    });
    Error::Usage {
        message: format!("another trainer is at work in `{}`{who}", run.display()),
        hint: "wait for it, stop it, or start a run of another name".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_holds_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = Lock::take(folder.path()).expect("free");
        let error = Lock::take(folder.path()).err().expect("held").to_string();
        let process = format!("process {}", std::process::id());
        assert!(
            error.contains("another trainer") && error.contains(&process),
            "{error}"
        );
        drop(lock);
        Lock::take(folder.path()).expect("free again");
    }

    #[test]
    fn what_a_killed_process_leaves_locks_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("lock");
        for text in [
            r#"{"process": 1, "host": "here", "since": 0}"#,
            "",
            "\0\u{1}{",
            "{}",
        ] {
            std::fs::write(&file, text).expect("writable");
            drop(Lock::take(folder.path()).expect("stale"));
            let left = std::fs::read_to_string(&file).expect("readable");
            assert_eq!(left, "", "ended in good order");
        }
    }
}
