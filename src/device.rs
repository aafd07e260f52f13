//! From a config's `[device]` to a Burn device, and the memory there.

pub mod budget;
pub(crate) mod exhausted;
pub(crate) mod host_memory;

use std::panic;

use burn::tensor::{Device, Tensor};

use crate::config::{DeviceConfig, DeviceKind};
use crate::error::{Error, Result};

/// Sets the number of CPU threads for the rest of the process; 0 leaves one for each core.
pub fn set_threads(threads: usize) {
    if threads > 0 {
        // Fails only where the pool is already at work, as in tests: its size then stays.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global();
    }
}

/// The device, after a first computation on it has succeeded.
///
/// # Errors
///
/// [`Error::Device`] if this build has no such backend or the machine no such device.
pub fn open(config: &DeviceConfig) -> Result<Device> {
    open_any(config).map(|(device, _)| device)
}

/// The device and what kind it is, `auto` resolved.
pub(crate) fn open_any(config: &DeviceConfig) -> Result<(Device, DeviceKind)> {
    match config.kind {
        DeviceKind::Auto => auto(config.index),
        kind => Ok((open_kind(kind, config.index)?, kind)),
    }
}

/// CUDA, if this build knows it and it is there, else the CPU; another GPU only where the build has no CPU.
/// Graphics drivers come with processors that are slower than the CPU, and with software ones.
fn auto(index: usize) -> Result<(Device, DeviceKind)> {
    #[cfg(feature = "cuda")]
    if let Ok(device) = open_kind(DeviceKind::Cuda, index) {
        return Ok((device, DeviceKind::Cuda));
    }
    let kind = match cfg!(feature = "flex") {
        true => DeviceKind::Cpu,
        false => DeviceKind::Wgpu,
    };
    Ok((open_kind(kind, index)?, kind))
}

fn open_kind(kind: DeviceKind, index: usize) -> Result<Device> {
    let name = format!("{}:{index}", kind.name());
    let missing = |feature: &str| Error::Device {
        device: name.clone(),
        reason: "this program was built without it".to_owned(),
        hint: format!("build with `cargo build --release --features {feature}`"),
    };
    let device: fn(usize) -> Device = match kind {
        #[cfg(feature = "flex")]
        DeviceKind::Cpu | DeviceKind::Auto => |_| Device::flex(),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => |index| Device::cuda(index),
        #[cfg(feature = "wgpu")]
        DeviceKind::Wgpu => |index| match index {
            0 => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
            index => Device::wgpu(burn::tensor::DeviceKind::DiscreteGpu(index)),
        },
        #[allow(unreachable_patterns, reason = "depends on the build's features")]
        DeviceKind::Cuda => return Err(missing("cuda")),
        #[allow(unreachable_patterns, reason = "depends on the build's features")]
        DeviceKind::Wgpu => return Err(missing("wgpu")),
        #[allow(unreachable_patterns, reason = "depends on the build's features")]
        DeviceKind::Cpu | DeviceKind::Auto => return Err(missing("flex")),
    };
    probe(device, index).map_err(|reason| Error::Device {
        device: name.clone(),
        reason,
        hint: "`mambabyte doctor` says what this machine has and what is missing".to_owned(),
    })
}

/// A computation on the device. Drivers that are missing make their libraries panic: the panic is
/// caught and its message kept.
fn probe(device: fn(usize) -> Device, index: usize) -> std::result::Result<Device, String> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(|| {
        let device = device(index);
        let one = Tensor::<1>::ones([1], &device).into_data();
        (device, one)
    });
    panic::set_hook(hook);
    match result {
        Ok((device, _)) => Ok(device),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .and_then(|text| text.lines().next().map(str::to_owned))
            // Of another thread's end, and not of its reason.
            .filter(|text| !text.contains("RecvError"))
            .unwrap_or_else(|| "there is no such device, or it could not be started".to_owned())),
    }
}
