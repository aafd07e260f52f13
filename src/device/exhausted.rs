//! What a failed allocation of a device says, and how its panic becomes an error.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, PoisonError};

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
/// happened is the error that `explain` makes of it.
///
/// # Errors
///
/// What `work` and `explain` say. Any other panic goes on.
pub(super) fn caught<T>(
    gpu: Option<(Arc<Gpu>, u64)>,
    work: impl FnOnce() -> Result<T>,
    explain: impl FnOnce(&Failure) -> Error,
) -> Result<T> {
    let first = Arc::new(Mutex::new(None));
    let result = {
        let _quiet = QuietHook::install(gpu, Arc::clone(&first));
        panic::catch_unwind(AssertUnwindSafe(work))
    };
    let noted = first.lock().unwrap_or_else(PoisonError::into_inner).take();
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
        hint: "fewer texts at a time (`--batch`, `--num-samples`, `--lanes`), shorter pieces \
               (`--piece`, `--length`) or `--precision bf16` take less"
            .to_owned(),
    })
}

/// Notes the first out-of-memory panic of any thread, and keeps its default message and those of
/// what follows from it from being printed. Ends with the value.
struct QuietHook {
    previous: Arc<Hook>,
}

type Hook = dyn Fn(&PanicHookInfo<'_>) + Send + Sync;

impl QuietHook {
    /// `gpu` is the one in use and the bytes there that are not this run's.
    fn install(gpu: Option<(Arc<Gpu>, u64)>, first: Arc<Mutex<Option<Failure>>>) -> Self {
        let previous: Arc<Hook> = Arc::from(panic::take_hook());
        let others = Arc::clone(&previous);
        panic::set_hook(Box::new(move |info| {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            if first.is_some() {
                return;
            }
            let Some(failure) = panic_text(info.payload()).and_then(Failure::of) else {
                return others(info);
            };
            let in_use = gpu.as_ref().and_then(|(gpu, foreign)| {
                let (free, total) = gpu.memory()?;
                Some(total.saturating_sub(free + foreign))
            });
            *first = Some(Failure { in_use, ..failure });
        }));
        Self { previous }
    }
}

impl Drop for QuietHook {
    fn drop(&mut self) {
        let previous = Arc::clone(&self.previous);
        panic::set_hook(Box::new(move |info| previous(info)));
    }
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

/// The hook of panics is one for all threads: tests that set it take turns.
#[cfg(test)]
pub(super) fn turn() -> std::sync::MutexGuard<'static, ()> {
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
