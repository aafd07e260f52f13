//! The system's allocator, with an end of its own for a machine without memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write as _;

/// Exit code of [`mambabyte::error::Error::OutOfMemory`].
const OUT_OF_MEMORY: i32 = 6;

/// The system's allocator; where it has no memory, the program ends with a message and the documented
/// exit code. Rust's own way is an abort, which looks like a defect of the program.
pub struct OrEnd;

// SAFETY: every call goes to the system's allocator as it came, and what comes back is returned
// unchanged, unless the program ends.
unsafe impl GlobalAlloc for OrEnd {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises about `layout` are passed on.
        had(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises about `layout` are passed on.
        had(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises about all three are passed on.
        had(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises about both are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[inline(always)]
fn had(pointer: *mut u8, size: usize) -> *mut u8 {
    if pointer.is_null() {
        end(size);
    }
    pointer
}

/// Says what could not be had, and ends the program. Nothing here allocates, takes a lock or runs
/// destructors: any thread may be in any state.
#[cold]
#[inline(never)]
fn end(size: usize) -> ! {
    let mut text = [0; 512];
    let mut rest = text.as_mut_slice();
    let _ = writeln!(
        rest,
        "error: out of memory: the system has no {size} bytes more for this program\n\
         hint: use a smaller model, a smaller batch, shorter sequences or pieces, or end other \
         programs; checkpoints stay as they are"
    );
    let left = rest.len();
    let length = text.len() - left;
    leave(&text[..length])
}

#[cfg(unix)]
fn leave(text: &[u8]) -> ! {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn write(file: c_int, bytes: *const c_void, count: usize) -> isize;
        fn _exit(code: c_int) -> !;
    }
    /// Standard error.
    const STDERR: c_int = 2;
    // SAFETY: both are the C library's and have these signatures; the bytes are there for the whole
    // call.
    unsafe {
        write(STDERR, text.as_ptr().cast(), text.len());
        _exit(OUT_OF_MEMORY)
    }
}

#[cfg(not(unix))]
fn leave(text: &[u8]) -> ! {
    let _ = std::io::stderr().write_all(text);
    std::process::exit(OUT_OF_MEMORY)
}
