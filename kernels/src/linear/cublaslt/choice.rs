//! The fastest of the algorithms that cuBLASLt proposes for a shape.
//!
//! Its first proposal is up to a tenth slower than the best of its first eight (H200, shapes of the
//! 353M model). All are run on the operands of the first call, which takes some milliseconds a shape.
//! Only algorithms that return the bits of the first are kept, so that results do not hang on what a
//! clock said: those whose tiles differ but who add up in the same order.

use std::ffi::c_void;

use cudarc::cublaslt::sys as lts;
use cudarc::driver::{result as driver, sys as cu};

use super::{Call, Shape};

/// Additions below which a trial takes longer than its result saves: texts to be continued come in every
/// length, and each is a shape.
const LEAST: usize = 1 << 32;

/// Times that each algorithm is timed, and calls that are timed together.
const ROUNDS: usize = 3;
const CALLS: usize = 4;

/// How much of the result is compared, in bytes, from its end.
const COMPARED: usize = 1 << 20;

/// The fastest of `algorithms`, the first where nothing can be told. Waits for the device.
pub(super) fn fastest(
    call: Call,
    shape: &Shape,
    algorithms: &[lts::cublasLtMatmulAlgo_t],
) -> lts::cublasLtMatmulAlgo_t {
    let [rows, columns] = shape.result();
    let worth = rows * columns * shape.depth() >= LEAST && algorithms.len() > 1;
    let chosen = worth.then(|| Trial::new(call, shape)?.fastest(algorithms));
    chosen.flatten().unwrap_or(algorithms[0])
}

/// A product that may be repeated, and the events to time it.
struct Trial {
    call: Call,
    /// Bytes of the result, from its first to its last.
    bytes: usize,
    /// Memory of our own for the result, where it would change what is added to it.
    scratch: Option<cu::CUdeviceptr>,
    events: [cu::CUevent; 2],
}

impl Trial {
    /// None where there is no memory for it.
    fn new(call: Call, shape: &Shape) -> Option<Self> {
        let [rows, columns] = shape.result();
        let number = match shape.types[2] {
            lts::cudaDataType::CUDA_R_32F => 4,
            _ => 2,
        };
        let bytes = ((rows - 1) * shape.out_stride + columns) * number;
        let event = || driver::event::create(cu::CUevent_flags::CU_EVENT_DEFAULT).ok();
        let events = [event()?, event()?];
        let [_, _, add, out] = call.pointers;
        let mut trial = Self {
            call,
            bytes,
            scratch: None,
            events,
        };
        if shape.adds && add == out {
            // SAFETY: it is freed when the trial is dropped.
            let scratch = unsafe { driver::malloc_sync(bytes) }.ok()?;
            trial.scratch = Some(scratch);
            trial.call.pointers[3] = scratch;
        }
        Some(trial)
    }

    fn fastest(
        &mut self,
        algorithms: &[lts::cublasLtMatmulAlgo_t],
    ) -> Option<lts::cublasLtMatmulAlgo_t> {
        let mut expected = None;
        let mut best: Option<(f32, lts::cublasLtMatmulAlgo_t)> = None;
        for &algorithm in algorithms {
            self.call.plan.algorithm = algorithm;
            let Some(sample) = self.sample() else {
                continue;
            };
            if expected.get_or_insert_with(|| sample.clone()) != &sample {
                continue;
            }
            let Some(time) = self.time() else {
                continue;
            };
            if best.is_none_or(|(least, _)| time < least) {
                best = Some((time, algorithm));
            }
        }
        best.map(|(_, algorithm)| algorithm)
    }

    /// The end of the result.
    fn sample(&self) -> Option<Vec<u8>> {
        let count = self.bytes.min(COMPARED);
        let mut sample = vec![0u8; count];
        let from = self.call.pointers[3] + (self.bytes - count) as u64;
        // SAFETY: the caller of `fastest` holds the buffers, and the stream waits for what was issued
        // before; the bytes copied are the last of the result, and as many as the vector has.
        unsafe {
            self.call.issue()?;
            driver::stream::synchronize(self.call.stream).ok()?;
            let to = sample.as_mut_ptr().cast::<c_void>();
            cu::cuMemcpyDtoH_v2(to, from, count).result().ok()?;
        }
        Some(sample)
    }

    /// The least time of a call, in milliseconds.
    fn time(&self) -> Option<f32> {
        let mut call = self.call;
        // As in the call proper, what is added is what is written over.
        if let Some(scratch) = self.scratch {
            call.pointers[2] = scratch;
        }
        let [begin, end] = self.events;
        let mut least = f32::INFINITY;
        for _ in 0..ROUNDS {
            // SAFETY: as in `sample`; the events are alive.
            let time = unsafe {
                driver::event::record(begin, call.stream).ok()?;
                for _ in 0..CALLS {
                    call.issue()?;
                }
                driver::event::record(end, call.stream).ok()?;
                driver::stream::synchronize(call.stream).ok()?;
                driver::event::elapsed(begin, end).ok()?
            };
            least = least.min(time / CALLS as f32);
        }
        Some(least)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // SAFETY: nothing uses them any more: the stream was waited for. What cannot be freed is lost
        // until the process ends, which is all that could be done about it.
        unsafe {
            let _ = driver::stream::synchronize(self.call.stream);
            for event in self.events {
                let _ = driver::event::destroy(event);
            }
            if let Some(scratch) = self.scratch {
                let _ = driver::free_sync(scratch);
            }
        }
    }
}
