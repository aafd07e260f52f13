//! What tests of readers share: bytes that are damaged a little, and a look at what that costs.

#![allow(dead_code, reason = "each file of tests uses its own part")]

#[path = "random.rs"]
mod random;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{UnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

pub use random::{Random, number};

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a note of how much is taken.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting does not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises about both are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    255,
    256,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX,
];

/// Text that is read, or has a meaning, in one of the formats.
const WORDS: [&[u8]; 22] = [
    b"-1",
    b"18446744073709551615",
    b"1e999",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"\"\"",
    b"\"F64\"",
    b"\"BF16\"",
    b"\"F32\"",
    b"../",
    b"layers.4095.",
    b"layers.18446744073709551615.",
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"tR",
    b"h\x00",
    b"PK\x05\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
];

/// A place in `bytes`: near its ends, where headers and directories are, nine times of ten.
fn place(random: &mut Random, bytes: &[u8]) -> usize {
    const NEAR: usize = 3000;
    match random.below(20) {
        0 | 1 => random.below(bytes.len()),
        2..=10 => random.below(bytes.len().min(NEAR)),
        _ => bytes.len() - 1 - random.below(bytes.len().min(NEAR)),
    }
}

/// Changes `bytes` a little.
pub fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..1 + random.below(3) {
        if bytes.is_empty() {
            return;
        }
        let at = place(random, bytes);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => {
                let number = random.of(&EDGES).to_le_bytes();
                let width = random.of(&[1, 2, 4, 8]).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            4 => {
                let word = random.of(&WORDS);
                bytes.splice(at..at, word.iter().copied());
            }
            5 => {
                let word = random.of(&WORDS);
                let end = (at + word.len()).min(bytes.len());
                bytes.splice(at..end, word.iter().copied());
            }
            6 => {
                let end = (at + 1 + random.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + 1 + random.below(200)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = place(random, bytes);
                bytes.splice(to..to, copy);
            }
        }
    }
}

/// What became of one damaged input.
pub struct Outcome {
    /// Whether it was refused.
    pub refused: bool,
    /// Most memory that was taken meanwhile, in bytes.
    pub memory: usize,
}

/// Runs `read` on damaged bytes: it may refuse them with a message of bounded length, or not. What
/// else may happen is returned as a problem.
pub fn attempt(
    most_memory: usize,
    read: impl FnOnce() -> Result<(), String> + UnwindSafe,
) -> Result<Outcome, String> {
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let outcome = catch_unwind(read);
    let memory = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    match outcome {
        Err(_) => Err("panicked".to_owned()),
        Ok(_) if memory > most_memory => Err(format!("took {memory} bytes")),
        Ok(Err(report)) if report.len() > 20_000 => Err("has an endless message".to_owned()),
        Ok(result) => Ok(Outcome {
            refused: result.is_err(),
            memory,
        }),
    }
}
