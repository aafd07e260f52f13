//! NVIDIA's driver, asked directly for what CubeCL does not offer: how much memory a GPU has left,
//! and to take some of it.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libloading::Symbol;

use crate::library::{Shared, pointer, text};

/// NVIDIA's management library, which knows free memory without taking any.
pub(crate) struct Nvml(Shared);

/// `nvmlMemory_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct NvmlMemory {
    pub(crate) total: u64,
    pub(crate) free: u64,
    used: u64,
}

impl Nvml {
    pub(crate) fn start() -> Option<Self> {
        let library = Shared::open(&["libnvidia-ml.so.1", "nvml.dll"])?;
        // SAFETY: this is the function's type in nvml.h.
        let started = unsafe {
            let start = library.function::<unsafe extern "C" fn() -> c_int>("nvmlInit_v2")?;
            start() == 0
        };
        started.then_some(Self(library))
    }

    pub(crate) fn driver_version(&self) -> Option<String> {
        type Get = unsafe extern "C" fn(*mut c_char, c_uint) -> c_int;
        let mut buffer = [0u8; 96];
        // SAFETY: this is the function's type in nvml.h; the buffer has the length given.
        unsafe {
            let get = self.0.function::<Get>("nvmlSystemGetDriverVersion")?;
            (get(pointer(&mut buffer), 96) == 0).then(|| text(&buffer))
        }
    }

    /// Memory of the GPU at a bus address, which ends with a zero.
    pub(crate) fn memory(&self, address: &mut [u8]) -> Option<NvmlMemory> {
        type Find = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_int;
        type Get = unsafe extern "C" fn(*mut c_void, *mut NvmlMemory) -> c_int;
        let mut handle = std::ptr::null_mut();
        let mut memory = NvmlMemory::default();
        // SAFETY: these are the functions' types in nvml.h; `handle` is used only after the library
        // has filled it in.
        let good = unsafe {
            let find = self
                .0
                .function::<Find>("nvmlDeviceGetHandleByPciBusId_v2")?;
            let get = self.0.function::<Get>("nvmlDeviceGetMemoryInfo")?;
            find(pointer(address), &mut handle) == 0 && get(handle, &mut memory) == 0
        };
        good.then_some(memory)
    }
}

/// Names of the driver's library.
pub(crate) const DRIVER: [&str; 2] = if cfg!(windows) {
    ["nvcuda.dll", "nvcuda64.dll"]
} else {
    ["libcuda.so.1", "libcuda.so"]
};

/// Address of a CUDA device on the PCI bus, by which NVML knows it; makes no context.
pub(crate) fn bus_address(index: usize) -> Option<String> {
    type Start = unsafe extern "C" fn(c_uint) -> c_int;
    type BusId = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    let library = Shared::open(&DRIVER)?;
    let mut address = [0u8; 32];
    // SAFETY: these are the functions' types in cuda.h; CUDA's device handles are the indexes, and
    // the buffer has the length given.
    let found = unsafe {
        let start = library.function::<Start>("cuInit")?;
        let bus_id = library.function::<BusId>("cuDeviceGetPCIBusId")?;
        start(0) == 0 && bus_id(pointer(&mut address), 32, c_int::try_from(index).ok()?) == 0
    };
    found.then(|| text(&address))
}

/// Free and total memory of a GPU, in bytes, without making a context on it, which takes some
/// hundred MiB itself. None without NVML.
pub(crate) fn memory_before_use(index: usize) -> Option<(u64, u64)> {
    let mut address = bus_address(index)?.into_bytes();
    address.push(0);
    let memory = Nvml::start()?.memory(&mut address)?;
    Some((memory.free, memory.total))
}

/// A GPU's primary context, which CubeCL uses as well. Its functions may be called from any thread.
pub(crate) struct Gpu {
    library: Shared,
    /// A `CUcontext`; as a number, because it belongs to no thread.
    context: usize,
}

impl Gpu {
    /// The GPU of this index, if the driver starts and knows it. It stays in use until the program
    /// ends.
    pub(crate) fn open(index: usize) -> Option<Self> {
        type Start = unsafe extern "C" fn(c_uint) -> c_int;
        type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
        let library = Shared::open(&DRIVER)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: these are the functions' types in cuda.h; CUDA's device handles are the indexes,
        // and `context` outlives the call.
        let started = unsafe {
            let start = library.function::<Start>("cuInit")?;
            let retain = library.function::<Retain>("cuDevicePrimaryCtxRetain")?;
            start(0) == 0 && retain(&mut context, c_int::try_from(index).ok()?) == 0
        };
        started.then_some(Self {
            library,
            context: context as usize,
        })
    }

    /// Free and total memory in bytes.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        type Info = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;
        let (mut free, mut total) = (0, 0);
        // SAFETY: this is the function's type in cuda.h, and both numbers outlive the call.
        let known = self.inside(|| unsafe {
            let info: Symbol<'_, Info> = self.library.function("cuMemGetInfo_v2")?;
            Some(info(&mut free, &mut total))
        });
        (known == Some(0)).then_some((free as u64, total as u64))
    }

    /// Takes `bytes` of memory until the program ends, in pieces of at most `piece`; how many bytes
    /// it got.
    pub(crate) fn take(&self, bytes: u64, piece: u64) -> u64 {
        type Allocate = unsafe extern "C" fn(*mut u64, usize) -> c_int;
        let mut taken = 0;
        while taken < bytes {
            let size = piece.min(bytes - taken);
            let mut address = 0;
            // SAFETY: this is the function's type in cuda.h, and `address` outlives the call. What
            // it points to is never used.
            let status = self.inside(|| unsafe {
                let allocate: Symbol<'_, Allocate> = self.library.function("cuMemAlloc_v2")?;
                Some(allocate(&mut address, size as usize))
            });
            if status != Some(0) {
                break;
            }
            taken += size;
        }
        taken
    }

    /// Runs `task` with this context the thread's current one.
    fn inside(&self, task: impl FnOnce() -> Option<c_int>) -> Option<c_int> {
        type Push = unsafe extern "C" fn(*mut c_void) -> c_int;
        type Pop = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
        // SAFETY: these are the functions' types in cuda.h; the context was retained in `open` and
        // is never released; what was pushed is popped.
        unsafe {
            let push = self.library.function::<Push>("cuCtxPushCurrent_v2")?;
            let pop = self.library.function::<Pop>("cuCtxPopCurrent_v2")?;
            if push(self.context as *mut c_void) != 0 {
                return None;
            }
            let result = task();
            let mut popped = std::ptr::null_mut();
            pop(&mut popped);
            result
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_driver_or_that_gpu_has_no_answer() {
        // No machine has a GPU of this number.
        assert!(Gpu::open(4000).is_none());
        assert_eq!(memory_before_use(4000), None);
    }
}
