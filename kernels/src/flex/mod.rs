//! What the CPU forms of the operations share: vector lanes, elementary functions, and raw tensors
//! as slices.
//!
//! The code is written over fixed arrays of [`LANES`] floats, one channel a lane, which the
//! compiler turns into the widest vectors of the machine. Functions marked `#[multiversion]` exist
//! once for each instruction set and choose at run time; all that they call must be
//! `#[inline(always)]`, or it is compiled for the oldest machine.

pub(crate) mod math;
pub(crate) mod tensor;

/// Channels processed together: one AVX-512 register, two of AVX2, four of NEON.
pub(crate) const LANES: usize = 16;

/// One value for each of [`LANES`] channels.
pub(crate) type Lanes = [f32; LANES];

/// Applies `f` to every lane.
#[inline(always)]
pub(crate) fn map(x: Lanes, f: impl Fn(f32) -> f32) -> Lanes {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(x[i]);
    }
    out
}

/// `a · b + c` in every lane.
#[inline(always)]
pub(crate) fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = a[i].mul_add(b[i], c[i]);
    }
    out
}

/// `a · b` in every lane.
#[inline(always)]
pub(crate) fn mul(a: Lanes, b: Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = a[i] * b[i];
    }
    out
}

/// `a + b` in every lane.
#[inline(always)]
pub(crate) fn add(a: Lanes, b: Lanes) -> Lanes {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = a[i] + b[i];
    }
    out
}

/// Sum over the lanes, always in the same order.
#[inline(always)]
pub(crate) fn sum(x: Lanes) -> f32 {
    let mut half = [0.0f32; 8];
    for i in 0..8 {
        half[i] = x[i] + x[i + 8];
    }
    ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]))
}

/// Reads `count` lanes at `at`; the others are zero.
#[inline(always)]
pub(crate) fn load(src: &[f32], at: usize, count: usize) -> Lanes {
    let mut out = [0.0; LANES];
    if count == LANES {
        out.copy_from_slice(&src[at..at + LANES]);
    } else {
        for (o, x) in out.iter_mut().zip(&src[at..at + count]) {
            *o = *x;
        }
    }
    out
}

/// A buffer that parallel tasks write at places no two of them share.
///
/// Channel blocks of a `[B, L, E]` tensor interleave in memory, so safe slices cannot divide it.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut {
    at: *mut f32,
    len: usize,
}

// SAFETY: only `store` touches the memory, and its callers write disjoint places (its contract).
unsafe impl Send for SharedOut {}
// SAFETY: as above.
unsafe impl Sync for SharedOut {}

impl SharedOut {
    /// Shares `buffer`, which must outlive every use.
    pub(crate) fn new(buffer: &mut [f32]) -> Self {
        Self {
            at: buffer.as_mut_ptr(),
            len: buffer.len(),
        }
    }

    /// Writes `count` lanes at `at`.
    ///
    /// # Safety
    ///
    /// No other task may write or read `at .. at + count` during the buffer's sharing.
    #[inline(always)]
    pub(crate) unsafe fn store(self, at: usize, count: usize, x: Lanes) {
        assert!(at + count <= self.len && count <= LANES);
        // SAFETY: inside the buffer (checked above), and not shared with another task (contract).
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), self.at.add(at), count) }
    }
}
