//! Saves off the training thread.
//!
//! Training waits for the copy of the tensors into host memory; another thread writes it to disk,
//! tries again where that may help, and deletes old checkpoints. There is one save at a time: the
//! next one waits for the one before, so that which checkpoints there are does not depend on how
//! fast the disk is.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::checkpoint::Snapshot;
use super::metrics::MetricRecord;
use super::run_dir::prune;
use crate::config::CheckpointConfig;
use crate::error::{Error, Result};

/// Before a save is tried a second and a third time.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// Writes checkpoints of one run.
pub(super) struct Saver {
    run: PathBuf,
    keep: CheckpointConfig,
    at_work: Option<JoinHandle<Saved>>,
}

/// A save that has ended.
pub(super) struct Saved {
    /// Optimizer steps done.
    pub(super) step: u64,
    /// Bytes of its tensors.
    bytes: u64,
    /// Time that training stood still.
    pause: Duration,
    /// Time from then to the end of the save.
    time: Duration,
    attempts: u32,
    pub(super) result: Result<()>,
}

impl Saved {
    /// The line of `metrics.jsonl`.
    pub(super) fn record(&self) -> MetricRecord {
        MetricRecord::Save {
            step: self.step,
            pause_seconds: self.pause.as_secs_f64(),
            seconds: self.time.as_secs_f64(),
            bytes: self.bytes,
            attempts: self.attempts,
            error: self.result.as_ref().err().map(ToString::to_string),
        }
    }

    /// Says that a save failed, and what that means.
    pub(super) fn warn(&self) {
        if let Err(error) = &self.result {
            tracing::warn!(
                "step {} could not be saved: {error}; training goes on, the checkpoints before are \
                 whole, the next save comes as planned",
                self.step
            );
        }
    }
}

impl Saver {
    /// A saver into the folder `run`.
    pub(super) fn new(run: PathBuf, keep: CheckpointConfig) -> Self {
        Self {
            run,
            keep,
            at_work: None,
        }
    }

    /// The save that has ended since this was last asked.
    pub(super) fn ended(&mut self) -> Option<Saved> {
        match self.at_work.as_ref()?.is_finished() {
            true => self.wait(),
            false => None,
        }
    }

    /// Waits for the save that is at work, if there is one.
    pub(super) fn wait(&mut self) -> Option<Saved> {
        let thread = self.at_work.take()?;
        match thread.join() {
            Ok(saved) => Some(saved),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Begins to write `snapshot`, after the save before has been waited for. `pause` is what
    /// training has stood still for it, `metrics` the file whose lines are to be on disk first.
    pub(super) fn begin(
        &mut self,
        snapshot: Snapshot,
        pause: Duration,
        metrics: Option<File>,
    ) -> Result<()> {
        debug_assert!(self.at_work.is_none());
        let (run, keep) = (self.run.clone(), self.keep.clone());
        let work = move || {
            let started = Instant::now();
            let (attempts, result) = write(&snapshot, &run, metrics.as_ref());
            if result.is_ok()
                && let Err(error) = prune(&run, &keep, snapshot.step())
            {
                tracing::warn!("old checkpoints stay: {error}");
            }
            Saved {
                step: snapshot.step(),
                bytes: snapshot.bytes(),
                pause,
                time: started.elapsed(),
                attempts,
                result,
            }
        };
        let thread = thread::Builder::new().name("saver".to_owned()).spawn(work);
        self.at_work = Some(thread.map_err(Error::io("start a thread to write", &self.run))?);
        Ok(())
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // A run that ends with an error still gets the checkpoint that it had begun.
        if let Some(saved) = self.at_work.take().and_then(|thread| thread.join().ok()) {
            saved.warn();
        }
    }
}

/// Writes a checkpoint, three times at most; returns how often it was tried.
fn write(snapshot: &Snapshot, run: &std::path::Path, metrics: Option<&File>) -> (u32, Result<()>) {
    let mut pauses = PAUSES.iter();
    let mut attempts = 0;
    loop {
        attempts += 1;
        // A disk that refuses this refuses what follows.
        let _ = metrics.map(File::sync_data);
        let result = snapshot.write(run).map(drop);
        match (&result, pauses.next()) {
            (Err(error), Some(pause)) if may_pass(error) => {
                tracing::warn!("saving step {} is tried again: {error}", snapshot.step());
                thread::sleep(*pause);
            }
            _ => return (attempts, result),
        }
    }
}

/// Whether an error may be gone in a few seconds. A disk that is full or may not be written is not
/// asked again: training would wait for it.
fn may_pass(error: &Error) -> bool {
    let Error::Io { source, .. } = error else {
        return false;
    };
    !matches!(
        source.kind(),
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::FileTooLarge
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::PermissionDenied
            | ErrorKind::NotFound
            | ErrorKind::NotADirectory
    )
}
