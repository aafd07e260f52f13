//! What CubeCL's wgpu backend needs on Linux and Windows: the Vulkan loader and a driver.

use std::ffi::{c_char, c_void};
use std::ptr;

use super::{Check, Device};
use crate::library::{Shared, text};

/// A physical device of Vulkan.
struct Gpu {
    name: String,
    kind: &'static str,
    api: (u32, u32),
}

/// The devices; or what is wrong.
pub(super) struct Vulkan(Result<Vec<Gpu>, String>);

/// Looks for devices.
pub(super) fn look() -> Vulkan {
    if cfg!(target_vendor = "apple") {
        return Vulkan(Err("not used on this system, which has Metal".to_owned()));
    }
    Vulkan(physical_devices())
}

impl Vulkan {
    pub(super) fn devices(&self, compiled: bool) -> Vec<Device> {
        let gpus = self.0.as_deref().unwrap_or_default();
        gpus.iter()
            .enumerate()
            .map(|(index, gpu)| Device {
                device: format!("wgpu:{index}"),
                name: format!(
                    "{} ({}, Vulkan {}.{})",
                    gpu.name, gpu.kind, gpu.api.0, gpu.api.1
                ),
                memory_total: None,
                memory_free: None,
                unusable: (!compiled)
                    .then(|| "this program was built without the feature `wgpu`".to_owned()),
            })
            .collect()
    }

    /// The check; a failure matters where the backend is in this program.
    pub(super) fn check(&self, needed: bool) -> Check {
        let hint = "install the Vulkan loader and a driver, on Debian and Ubuntu the packages \
                    `libvulkan1` and `mesa-vulkan-drivers`";
        match &self.0 {
            Ok(gpus) if gpus.is_empty() => Check::failed(
                needed,
                "Vulkan",
                "the loader is there, a driver is not",
                hint,
            ),
            Ok(gpus) => Check::ok("Vulkan", format!("{} device(s)", gpus.len())),
            Err(problem) => Check::failed(
                needed && !cfg!(target_vendor = "apple"),
                "Vulkan",
                problem,
                hint,
            ),
        }
    }
}

/// `VkInstanceCreateInfo`.
#[repr(C)]
struct InstanceInfo {
    kind: u32,
    next: *const c_void,
    flags: u32,
    application: *const c_void,
    layer_count: u32,
    layers: *const *const c_char,
    extension_count: u32,
    extensions: *const *const c_char,
}

/// `VkPhysicalDeviceProperties`: its first fields, and room for the rest, which has about 800 bytes.
#[repr(C, align(8))]
struct Properties {
    api_version: u32,
    driver_version: u32,
    vendor: u32,
    device: u32,
    kind: u32,
    name: [u8; 256],
    rest: [u8; 4096],
}

type Instance = *mut c_void;
type PhysicalDevice = *mut c_void;

fn physical_devices() -> Result<Vec<Gpu>, String> {
    type Create =
        unsafe extern "system" fn(*const InstanceInfo, *const c_void, *mut Instance) -> i32;
    type Destroy = unsafe extern "system" fn(Instance, *const c_void);
    type Enumerate = unsafe extern "system" fn(Instance, *mut u32, *mut PhysicalDevice) -> i32;
    type Describe = unsafe extern "system" fn(PhysicalDevice, *mut Properties);
    /// `VK_INCOMPLETE`, for more devices than there was room for.
    const INCOMPLETE: i32 = 5;
    const MOST: usize = 32;

    let names = ["libvulkan.so.1", "libvulkan.so", "vulkan-1.dll"];
    let library = Shared::open(&names).ok_or_else(|| format!("{} was not found", names[0]))?;
    let info = InstanceInfo {
        // VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO
        kind: 1,
        next: ptr::null(),
        flags: 0,
        application: ptr::null(),
        layer_count: 0,
        layers: ptr::null(),
        extension_count: 0,
        extensions: ptr::null(),
    };
    // SAFETY: these are the functions' types in vulkan_core.h. The instance lives from its creation
    // to its destruction below; `devices` has room for as many handles as `count` says; and
    // `Properties` is larger than the structure that the loader fills in.
    unsafe {
        let functions = (
            library.function::<Create>("vkCreateInstance"),
            library.function::<Destroy>("vkDestroyInstance"),
            library.function::<Enumerate>("vkEnumeratePhysicalDevices"),
            library.function::<Describe>("vkGetPhysicalDeviceProperties"),
        );
        let (Some(create), Some(destroy), Some(enumerate), Some(describe)) = functions else {
            return Err(format!("{} lacks Vulkan's functions", library.name));
        };
        let mut instance = ptr::null_mut();
        match create(&info, ptr::null(), &mut instance) {
            0 => {}
            // VK_ERROR_INCOMPATIBLE_DRIVER: the loader found no driver at all.
            -9 => return Ok(Vec::new()),
            status => return Err(format!("Vulkan does not start (error {status})")),
        }
        let mut devices = [ptr::null_mut(); MOST];
        let mut count = MOST as u32;
        let status = enumerate(instance, &mut count, devices.as_mut_ptr());
        let gpus = if status == 0 || status == INCOMPLETE {
            devices[..MOST.min(count as usize)]
                .iter()
                .map(|&device| {
                    let mut properties = Properties {
                        api_version: 0,
                        driver_version: 0,
                        vendor: 0,
                        device: 0,
                        kind: 0,
                        name: [0; 256],
                        rest: [0; 4096],
                    };
                    describe(device, &mut properties);
                    Gpu::new(&properties)
                })
                .collect()
        } else {
            Vec::new()
        };
        destroy(instance, ptr::null());
        Ok(gpus)
    }
}

impl Gpu {
    fn new(properties: &Properties) -> Self {
        Self {
            name: text(&properties.name),
            kind: match properties.kind {
                1 => "integrated GPU",
                2 => "GPU",
                3 => "virtual GPU",
                4 => "CPU, slow: for tests",
                _ => "other",
            },
            api: (
                properties.api_version >> 22 & 0x7f,
                properties.api_version >> 12 & 0x3ff,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn failures_matter_only_where_the_backend_is_there() {
        for found in [Vulkan(Err("not found".to_owned())), Vulkan(Ok(Vec::new()))] {
            assert!(found.devices(true).is_empty());
            assert_eq!(found.check(false).state, State::Absent);
        }
        assert_eq!(Vulkan(Ok(Vec::new())).check(true).state, State::Problem);
    }

    #[test]
    fn properties_are_decoded() {
        let mut properties = Properties {
            api_version: 1 << 22 | 3 << 12 | 280,
            driver_version: 0,
            vendor: 0,
            device: 0,
            kind: 4,
            name: [0; 256],
            rest: [0; 4096],
        };
        properties.name[..4].copy_from_slice(b"lava");
        let found = Vulkan(Ok(vec![Gpu::new(&properties)]));
        let devices = found.devices(true);
        assert_eq!(devices[0].device, "wgpu:0");
        assert_eq!(devices[0].name, "lava (CPU, slow: for tests, Vulkan 1.3)");
        assert_eq!(found.check(true).state, State::Ok);
    }
}
