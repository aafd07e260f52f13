//! The allocator of the C library, told to keep its pages.

/// Keeps memory that tensors have given back for the tensors to come.
///
/// By default glibc takes every block of some size from the system and returns it as soon as it is
/// freed. Where a pass over a batch allocates the same few hundred MB again and again, the system then
/// spends as much time on clearing pages as the program on computing: evaluation of a small model
/// takes half the CPU time with this, and not more memory at its peak. Elsewhere it does nothing.
pub(crate) fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        /// Largest free top of the heap that is kept; from `malloc.h`.
        const M_TRIM_THRESHOLD: c_int = -1;
        /// Blocks that may be taken from the system one by one; from `malloc.h`.
        const M_MMAP_MAX: c_int = -4;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        // SAFETY: `mallopt` is glibc's, has this signature, and takes the allocator's own lock; the
        // parameters change where blocks come from, not those that are in use.
        unsafe {
            mallopt(M_TRIM_THRESHOLD, c_int::MAX);
            mallopt(M_MMAP_MAX, 0);
        }
    }
}
