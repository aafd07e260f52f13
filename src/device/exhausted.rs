//! What a failed allocation of a device says, and how its panic becomes an error.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use crate::error::{Error, Result};
use crate::memory::size;
use crate::nvidia::Gpu;

/// What an out-of-memory failure says, in lower case: CubeCL's two errors and what it says of work that
/// followed a failed allocation, CUDA's, cuBLASLt's, and what graphics drivers say.
const SIGNS: [&str; 7] = [
    "out of device memory",
    "memory location was never initialized",
    "can't allocate buffer of size",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "out-of-memory",
    "out of memory",
];

/// What stands before the number of bytes that could not be had.
const SIZE_FOLLOWS: [&str; 2] = [
    "out of device memory allocating ",
    "can't allocate buffer of size: ",
];

/// A failed allocation.
#[derive(Clone)]
pub(super) struct Failure {
    /// What its panic says.
    text: String,
    /// Bytes that the run used then, where known: when the panic is caught, much has been given
    /// back.
    in_use: Option<u64>,
}

impl Failure {
    /// The failure that `text` speaks of, if it is about memory.
    pub(super) fn of(text: &str) -> Option<Self> {
        let lower = text.to_lowercase();
        let found = SIGNS.iter().any(|sign| lower.contains(sign));
        found.then(|| Self {
            text: text.to_owned(),
            in_use: None,
        })
    }

    /// One line.
    pub(super) fn describe(&self) -> String {
        let mut reason = match requested(&self.text) {
            Some(bytes) => format!("{} more could not be had", size(bytes)),
            None => "an allocation failed".to_owned(),
        };
        if let Some(in_use) = self.in_use {
            reason += &format!(", {} are in use", size(in_use));
        }
        reason
    }
}

/// Runs `work`. Where the device's memory does not suffice, its panic is not shown, and what
/// happened is the error that `explain` makes of it. May be called inside itself, and by several
/// threads.
///
/// # Errors
///
/// What `work` and `explain` say. Any other panic goes on.
pub(super) fn caught<T>(
    gpu: Option<(Arc<Gpu>, u64)>,
    work: impl FnOnce() -> Result<T>,
    explain: impl FnOnce(&Failure) -> Error,
) -> Result<T> {
    let watch = Watch::begin(gpu);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    let noted = watch.end();
    let failure = match &result {
        Ok(Err(Error::Other(error))) => Failure::of(&format!("{error:#}")),
        Ok(_) => None,
        Err(_) => noted,
    };
    match (failure, result) {
        (Some(failure), _) => {
            tracing::debug!("{}", failure.text);
            Err(explain(&failure))
        }
        (None, Ok(result)) => result,
        (None, Err(payload)) => panic::resume_unwind(payload),
    }
}

/// Runs `work`, which reads or writes text with a model: [`caught`], where nobody planned how much
/// memory it takes.
///
/// # Errors
///
/// What `work` says, and [`Error::OutOfMemory`].
pub(crate) fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(None, work, |failure| Error::OutOfMemory {
        device: "the device".to_owned(),
        reason: failure.describe(),
        hint: "fewer texts at a time (`--batch`, `--num-samples`), shorter pieces \
               (`--piece`, `--length`) or `--precision bf16` take less"
            .to_owned(),
    })
}

/// All work that is watched now. A panic may come from the device's thread, so every watch notes it.
static WATCHES: Mutex<Vec<Noted>> = Mutex::new(Vec::new());

/// What a watch has noted.
struct Noted {
    watch: u64,
    /// The GPU in use and the bytes there that are not this run's.
    gpu: Option<(Arc<Gpu>, u64)>,
    /// The first failure.
    failure: Option<Failure>,
}

/// The first out-of-memory panic of any thread since it began. Its message and those of what
/// follows from it are not printed.
struct Watch(u64);

impl Watch {
    fn begin(gpu: Option<(Arc<Gpu>, u64)>) -> Self {
        static HOOK: Once = Once::new();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if !is_noted(info) {
                    previous(info);
                }
            }));
        });
        let watch = NEXT.fetch_add(1, Ordering::Relaxed);
        watches().push(Noted {
            watch,
            gpu,
            failure: None,
        });
        Self(watch)
    }

    /// What was noted. Watches around this one forget it: it is dealt with.
    fn end(self) -> Option<Failure> {
        let mut watches = watches();
        let at = watches.iter().position(|it| it.watch == self.0)?;
        let failure = watches.remove(at).failure?;
        for outer in watches.iter_mut() {
            outer.failure.take_if(|it| it.text == failure.text);
        }
        Some(failure)
    }
}

fn watches() -> MutexGuard<'static, Vec<Noted>> {
    WATCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a panic is for lack of memory, or comes after one that was, and somebody watches.
fn is_noted(info: &PanicHookInfo<'_>) -> bool {
    let mut watches = watches();
    if watches.iter().any(|it| it.failure.is_some()) {
        return true;
    }
    let Some(failure) = panic_text(info.payload()).and_then(Failure::of) else {
        return false;
    };
    for noted in watches.iter_mut() {
        let in_use = noted.gpu.as_ref().and_then(|(gpu, foreign)| {
            let (free, total) = gpu.memory()?;
            Some(total.saturating_sub(free + foreign))
        });
        noted.failure = Some(Failure {
            in_use,
            ..failure.clone()
        });
    }
    !watches.is_empty()
}

/// What a panic says.
fn panic_text(payload: &(dyn Any + Send)) -> Option<&str> {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
}

/// The number of bytes that a failure speaks of.
fn requested(failure: &str) -> Option<u64> {
    SIZE_FOLLOWS.iter().find_map(|before| {
        let (_, rest) = failure.split_once(before)?;
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        rest[..end].parse().ok()
    })
}

/// Every watch notes every failure: tests that fail so take turns.
#[cfg(test)]
pub(super) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUBECL: &str =
        "WithContext { reason: \"out of device memory allocating 402653184 bytes\" }";

    #[test]
    fn reading_and_writing_without_memory_is_an_error() {
        let _turn = turn();
        let error = guard::<()>(|| panic!("{CUBECL}")).expect_err("out of memory");
        assert_eq!(error.exit_code(), 6);
        let report = error.report();
        for part in ["384.0 MiB more", "`--batch`", "`--piece`"] {
            assert!(report.contains(part), "{part}: {report}");
        }
        assert_eq!(guard(|| Ok(3)).expect("fine"), 3);
    }

    #[test]
    fn a_failure_inside_is_none_of_the_work_around_it() {
        let _turn = turn();
        let device_fails = || -> Result<()> {
            // On a thread of its own, as a device has, which takes the caller's with it.
            let device = std::thread::spawn(|| panic!("{CUBECL}"));
            assert!(device.join().is_err());
            panic!("the device is gone")
        };
        let outer = guard(|| {
            for _ in 0..2 {
                let error = guard(device_fails).expect_err("out of memory");
                assert_eq!(error.exit_code(), 6);
                assert_eq!(guard(|| Ok(3)).expect("fine"), 3);
            }
            Ok(4)
        });
        assert_eq!(outer.expect("fine"), 4);
        let other = panic::catch_unwind(|| guard::<()>(|| panic!("index 7")));
        assert!(other.is_err());
        assert!(watches().is_empty());
    }

    #[test]
    fn the_signs_of_every_source_are_known() {
        for text in [
            CUBECL,
            "can't allocate buffer of size: 7000000000\n",
            "product: Several failures at once\n  skipped `AdjointEnds`: it needed memory which \
             carried the failure\n  couldn't find resource for that handle: Memory location was \
             never initialized",
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "CublasError(CUBLAS_STATUS_ALLOC_FAILED)",
            "An out-of-memory error happened during launch",
        ] {
            assert!(Failure::of(text).is_some(), "{text}");
        }
        assert!(Failure::of("index out of bounds").is_none());
        assert_eq!(panic_text(&"text".to_owned()), Some("text"));
        assert_eq!(panic_text(&7u8), None);
        assert_eq!(requested(CUBECL), Some(402_653_184));
        assert_eq!(requested("can't allocate buffer of size: 70\n"), Some(70));
        assert_eq!(requested("CUDA_ERROR_OUT_OF_MEMORY"), None);
    }
}
