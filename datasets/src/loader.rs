//! Batches ahead of time, on a background thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{DataError, Result};
use crate::sampling::{Batch, Sampler};

/// Waits between attempts to read a batch: a network disk that does not answer for a while does not
/// end a run of weeks.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// Between two looks whether the loader has been dropped meanwhile.
const LOOK: Duration = Duration::from_millis(50);

/// Produces the batches of consecutive steps while the caller computes.
///
/// At most `queue_depth + 1` batches are ready or in the making. Dropping the loader stops its
/// thread and waits for it.
#[derive(Debug)]
pub struct Loader {
    /// None only while the loader is being dropped.
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
    /// Set when the loader is dropped, so that its thread does not wait for a disk.
    dropped: Arc<AtomicBool>,
    next_step: u64,
}

impl Loader {
    /// Starts producing from `first_step` on.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a queue without room; [`DataError::Io`] when the system gives
    /// no thread.
    pub fn spawn(sampler: Arc<Sampler>, first_step: u64, queue_depth: usize) -> Result<Self> {
        if queue_depth == 0 {
            return Err(DataError::Config {
                setting: "loader queue depth",
                got: "0".to_owned(),
                expected: "at least 1".to_owned(),
            });
        }
        let dir = sampler.shards().dir().to_path_buf();
        let (sender, batches) = sync_channel(queue_depth);
        let dropped = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&dropped);
        let produce = move || {
            for step in first_step..=u64::MAX {
                let batch = patiently(&seen, || sampler.batch(step));
                let failed = batch.is_err();
                // Sending fails once the loader has been dropped.
                if sender.send(batch).is_err() || failed {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("batch-loader".to_owned())
            .spawn(produce)
            .map_err(DataError::io("start a loader thread for", &dir))?;
        Ok(Self {
            batches: Some(batches),
            thread: Some(thread),
            dropped,
            next_step: first_step,
        })
    }

    /// The step whose batch [`next`](Self::next) returns.
    pub fn next_step(&self) -> u64 {
        self.next_step
    }

    /// Waits for the batch of [`next_step`](Self::next_step) and goes on to the one after it.
    ///
    /// # Errors
    ///
    /// Those of [`Sampler::batch`], after some 40 seconds of trying again where the system could not
    /// read; after one, [`DataError::LoaderStopped`].
    #[expect(
        clippy::should_implement_trait,
        reason = "an endless stream of results is no iterator: there is no end to report"
    )]
    pub fn next(&mut self) -> Result<Batch> {
        let stopped = DataError::LoaderStopped {
            step: self.next_step,
        };
        let Some(batches) = &self.batches else {
            return Err(stopped);
        };
        let batch = batches.recv().map_err(|_| stopped)??;
        self.next_step = self.next_step.saturating_add(1);
        Ok(batch)
    }
}

/// What `read` gives, which is asked again where the system could not read; until `dropped`.
fn patiently(dropped: &AtomicBool, mut read: impl FnMut() -> Result<Batch>) -> Result<Batch> {
    for pause in PAUSES {
        match read() {
            Err(DataError::Io { .. }) => {}
            result => return result,
        }
        let mut waited = Duration::ZERO;
        while waited < pause && !dropped.load(Ordering::Relaxed) {
            thread::sleep(LOOK);
            waited += LOOK;
        }
        if dropped.load(Ordering::Relaxed) {
            break;
        }
    }
    read()
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
        // Closing the queue first wakes a thread that waits for room in it.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panicked thread has nothing more to stop, and a drop must not panic again.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::sampling::tests::shards_of;
    use crate::sampling::{SamplerConfig, SamplingMode};
    use crate::shards::{OpenOptions, Shards};

    const CONFIG: SamplerConfig = SamplerConfig {
        batch: 2,
        length: 8,
        seed: 3,
        mode: SamplingMode::Contiguous,
    };

    #[test]
    fn yields_the_sampler_s_batches_from_any_step() {
        let (_root, shards, _) = shards_of(&[70, 0, 130]);
        let sampler = Arc::new(Sampler::new(shards, CONFIG).unwrap());
        let mut loader = Loader::spawn(sampler.clone(), 5, 2).unwrap();
        for step in 5..40 {
            assert_eq!(loader.next_step(), step);
            assert_eq!(loader.next().unwrap(), sampler.batch(step).unwrap());
        }
    }

    #[test]
    fn stops_when_dropped_with_a_full_queue() {
        let (_root, shards, _) = shards_of(&[100]);
        let sampler = Arc::new(Sampler::new(shards, CONFIG).unwrap());
        for taken in 0..3 {
            let mut loader = Loader::spawn(sampler.clone(), 0, 1).unwrap();
            for _ in 0..taken {
                loader.next().unwrap();
            }
            drop(loader);
        }
        assert_eq!(Arc::strong_count(&sampler), 1);
        assert!(Loader::spawn(sampler, 0, 0).is_err());
    }

    #[test]
    fn a_disk_that_comes_back_is_waited_for() {
        let (_root, shards, _) = shards_of(&[100]);
        let sampler = Sampler::new(shards, CONFIG).unwrap();
        let unreadable = || {
            let error = std::io::Error::from(std::io::ErrorKind::StaleNetworkFileHandle);
            Err(DataError::io("read", std::path::Path::new("x"))(error))
        };
        let mut attempts = 0;
        let batch = patiently(&AtomicBool::new(false), || {
            attempts += 1;
            if attempts < 3 {
                unreadable()
            } else {
                sampler.batch(7)
            }
        });
        assert_eq!((batch.unwrap(), attempts), (sampler.batch(7).unwrap(), 3));
        // Nobody waits any more: one more attempt, and that is all.
        let mut attempts = 0;
        let batch = patiently(&AtomicBool::new(true), || {
            attempts += 1;
            unreadable()
        });
        assert!(matches!(batch, Err(DataError::Io { .. })) && attempts == 2);
    }

    #[test]
    fn passes_errors_on_and_then_says_that_it_has_stopped() {
        let (root, shards, _) = shards_of(&[100]);
        let dir = shards.dir().to_path_buf();
        drop(shards);
        let file = dir.join("shard-00000.mbs");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        let options = OpenOptions {
            check_on_read: true,
        };
        let shards = Arc::new(Shards::open_with(&dir, options).unwrap());
        let sampler = Arc::new(Sampler::new(shards, CONFIG).unwrap());
        let mut loader = Loader::spawn(sampler, 0, 4).unwrap();
        assert!(matches!(loader.next(), Err(DataError::ShardDamaged { .. })));
        assert!(matches!(
            loader.next(),
            Err(DataError::LoaderStopped { step: 0 })
        ));
        drop(root);
    }
}
