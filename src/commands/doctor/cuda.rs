//! What CubeCL's CUDA backend needs: NVIDIA's driver, NVRTC, and the toolkit's headers.

use std::env;
use std::ffi::{c_char, c_int, c_uint};
use std::fs;
use std::path::{Path, PathBuf};

use super::{Check, Device};
use crate::library::{Shared, pointer, text};
use crate::nvidia::{self, Nvml};

/// Headers that the generated code includes.
const HEADERS: [&str; 3] = ["cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"];

/// A version of CUDA: 13.0 is (13, 0).
type Version = (i32, i32);

/// A GPU as the driver lists it.
struct Gpu {
    name: String,
    compute: Version,
    total: Option<u64>,
    free: Option<u64>,
}

/// Everything found.
pub(super) struct Cuda {
    /// Newest CUDA that the driver supports, and the driver's own version; or what is wrong.
    driver: Result<(Version, Option<String>), String>,
    gpus: Vec<Gpu>,
    /// NVRTC's version and where it was found; or what is wrong.
    nvrtc: Result<(Version, String), String>,
    /// The toolkit's folder.
    toolkit: Option<PathBuf>,
    /// The version in the headers; or what is missing.
    headers: Result<Option<Version>, String>,
}

impl Cuda {
    pub(super) fn look() -> Self {
        let toolkit = toolkit();
        let nvml = Nvml::start();
        let (driver, gpus) = match driver() {
            Ok((version, library)) => {
                let name = nvml.as_ref().and_then(Nvml::driver_version);
                (Ok((version, name)), gpus(&library, nvml.as_ref()))
            }
            Err(problem) => (Err(problem), Vec::new()),
        };
        Self {
            driver,
            gpus,
            nvrtc: nvrtc(toolkit.as_deref()),
            headers: headers(toolkit.as_deref()),
            toolkit,
        }
    }

    /// Why no GPU can be used, if so.
    fn unusable(&self, compiled: bool) -> Option<String> {
        if !compiled {
            return Some("this program was built without the feature `cuda`".to_owned());
        }
        if let Err(problem) = &self.nvrtc {
            return Some(format!("NVRTC: {problem}"));
        }
        self.headers.clone().err()
    }

    pub(super) fn devices(&self, compiled: bool) -> Vec<Device> {
        let unusable = self.unusable(compiled);
        self.gpus
            .iter()
            .enumerate()
            .map(|(index, gpu)| Device {
                device: format!("cuda:{index}"),
                name: format!("{} (compute {})", gpu.name, dotted(gpu.compute)),
                memory_total: gpu.total,
                memory_free: gpu.free,
                unusable: unusable.clone(),
            })
            .collect()
    }

    /// The checks; failures matter where the backend is in this program.
    pub(super) fn checks(&self, needed: bool) -> Vec<Check> {
        let mut checks = vec![
            match &self.driver {
                Ok((version, name)) => {
                    let name = name.as_deref().unwrap_or("of unknown version");
                    let found = format!("{name}, for CUDA up to {}", dotted(*version));
                    Check::ok("NVIDIA driver", found)
                }
                Err(problem) => Check::failed(
                    needed,
                    "NVIDIA driver",
                    problem,
                    "install NVIDIA's driver; start a container with `--gpus all`; unset CUDA_VISIBLE_DEVICES",
                ),
            },
            match &self.nvrtc {
                Ok((version, name)) => {
                    Check::ok("NVRTC", format!("{} in {name}", dotted(*version)))
                }
                Err(problem) => Check::failed(
                    needed,
                    "NVRTC",
                    problem,
                    "install the CUDA toolkit, and add its folder `lib64` to LD_LIBRARY_PATH",
                ),
            },
            match (&self.headers, &self.toolkit) {
                (Ok(version), Some(toolkit)) => {
                    let version = version.map_or("of unknown version".to_owned(), dotted);
                    let found = format!("{version} in {}", toolkit.join("include").display());
                    Check::ok("CUDA headers", found)
                }
                (headers, _) => Check::failed(
                    needed,
                    "CUDA headers",
                    headers.clone().err().unwrap_or_default(),
                    "install the CUDA toolkit, and set CUDA_PATH if it is not /usr/local/cuda",
                ),
            },
        ];
        checks.extend(self.agreement(needed));
        #[cfg(feature = "cuda")]
        checks.push(match mambabyte_kernels::linear::has_cublaslt() {
            true => Check::ok("cuBLASLt", "found: matrix products go there"),
            // Slow, not broken.
            false => Check::failed(
                false,
                "cuBLASLt",
                "not found, or the driver is older than CUDA 12.5: matrix products are several times slower",
                "install the CUDA toolkit's libcublasLt, and NVIDIA driver 555 or newer",
            ),
        });
        checks
    }

    /// Whether the versions fit each other, where they are known.
    fn agreement(&self, needed: bool) -> Option<Check> {
        const NAME: &str = "CUDA versions";
        let (Ok((driver, _)), Ok((nvrtc, _))) = (&self.driver, &self.nvrtc) else {
            return None;
        };
        if nvrtc > driver {
            return Some(Check::failed(
                needed,
                NAME,
                format!(
                    "NVRTC {} writes code that this driver, for CUDA up to {}, may refuse",
                    dotted(*nvrtc),
                    dotted(*driver)
                ),
                format!(
                    "update the driver, or use a CUDA toolkit up to {}",
                    dotted(*driver)
                ),
            ));
        }
        match &self.headers {
            Ok(Some(headers)) if headers.0 != nvrtc.0 => Some(Check::failed(
                needed,
                NAME,
                format!(
                    "headers are of CUDA {}, NVRTC is of {}",
                    dotted(*headers),
                    dotted(*nvrtc)
                ),
                "set CUDA_PATH and LD_LIBRARY_PATH to the same toolkit",
            )),
            _ => Some(Check::ok(NAME, "driver, NVRTC and headers agree")),
        }
    }
}

fn dotted((major, minor): Version) -> String {
    format!("{major}.{minor}")
}

/// `13010` is 13.1.
fn version_from(number: c_int) -> Version {
    (number / 1000, number % 1000 / 10)
}

/// Starts the driver and asks which CUDA it supports.
fn driver() -> Result<(Version, Shared), String> {
    let library = Shared::open(&nvidia::DRIVER)
        .ok_or_else(|| format!("{} was not found", nvidia::DRIVER[0]))?;
    // SAFETY: these are the functions' types in cuda.h, and `version` outlives the call.
    let (status, version) = unsafe {
        let get =
            library.function::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDriverGetVersion");
        let start = library.function::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit");
        let (Some(get), Some(start)) = (get, start) else {
            return Err(format!("{} lacks `cuInit`", library.name));
        };
        let mut version = 0;
        get(&mut version);
        (start(0), version)
    };
    match status {
        0 => Ok((version_from(version), library)),
        100 => Err("the driver is there, a GPU is not".to_owned()),
        802 | 803 => Err(format!(
            "the driver's parts do not fit each other (CUDA error {status}); restart the machine"
        )),
        _ => Err(format!("the driver does not start (CUDA error {status})")),
    }
}

/// The GPUs in the order of CUDA's indexes. The driver has to be started.
fn gpus(library: &Shared, nvml: Option<&Nvml>) -> Vec<Gpu> {
    type Count = unsafe extern "C" fn(*mut c_int) -> c_int;
    type Name = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
    type Attribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;
    type Memory = unsafe extern "C" fn(*mut usize, c_int) -> c_int;
    const COMPUTE_MAJOR: c_int = 75;
    const COMPUTE_MINOR: c_int = 76;
    // SAFETY: these are the functions' types in cuda.h. CUDA's own device handles are the indexes
    // 0, 1, …; every pointer is to a local that outlives the call, with its true length.
    unsafe {
        let functions = (
            library.function::<Count>("cuDeviceGetCount"),
            library.function::<Name>("cuDeviceGetName"),
            library.function::<Name>("cuDeviceGetPCIBusId"),
            library.function::<Attribute>("cuDeviceGetAttribute"),
            library.function::<Memory>("cuDeviceTotalMem_v2"),
        );
        let (Some(count), Some(name), Some(bus), Some(attribute), Some(memory)) = functions else {
            return Vec::new();
        };
        let mut number = 0;
        if count(&mut number) != 0 {
            return Vec::new();
        }
        (0..number)
            .map(|index| {
                let mut buffer = [0u8; 256];
                let label = match name(pointer(&mut buffer), 256, index) {
                    0 => text(&buffer),
                    _ => "unknown GPU".to_owned(),
                };
                let mut compute = (0, 0);
                attribute(&mut compute.0, COMPUTE_MAJOR, index);
                attribute(&mut compute.1, COMPUTE_MINOR, index);
                let mut total = 0;
                let total = (memory(&mut total, index) == 0).then_some(total as u64);
                // NVML counts all GPUs, CUDA those that CUDA_VISIBLE_DEVICES leaves, in its order:
                // only the bus address means the same to both.
                let mut address = [0u8; 32];
                let used = match bus(pointer(&mut address), 32, index) {
                    0 => nvml.and_then(|it| it.memory(&mut address)),
                    _ => None,
                };
                Gpu {
                    name: label,
                    compute,
                    total: used.map(|it| it.total).or(total),
                    free: used.map(|it| it.free),
                }
            })
            .collect()
    }
}

/// Where CubeCL looks for the toolkit.
fn toolkit() -> Option<PathBuf> {
    if let Some(path) = env::var_os("CUDA_PATH") {
        return Some(path.into());
    }
    let places = ["/usr/local/cuda", "/opt/cuda"];
    match places.iter().map(Path::new).find(|place| place.exists()) {
        Some(place) => Some(place.to_path_buf()),
        None => Path::new("/usr/bin/nvcc").exists().then(|| "/usr".into()),
    }
}

/// NVRTC as CubeCL finds it: by name, in the places where the system looks for libraries.
fn nvrtc(toolkit: Option<&Path>) -> Result<(Version, String), String> {
    let mut names: Vec<String> = ["libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
        .map(str::to_owned)
        .into();
    names.extend(["13", "12", "11"].map(|major| format!("libnvrtc.so.{major}")));
    let Some(library) = Shared::open(&names) else {
        let hidden = toolkit
            .into_iter()
            .flat_map(|it| [it.join("lib64"), it.join("lib")])
            .find(|it| it.join("libnvrtc.so").exists());
        return Err(match hidden {
            Some(place) => format!(
                "it is in {}, where the system does not look for libraries",
                place.display()
            ),
            None => "libnvrtc.so was not found".to_owned(),
        });
    };
    type Get = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
    let mut version = (0, 0);
    // SAFETY: this is the function's type in nvrtc.h; both pointers are to locals.
    let good = unsafe {
        library
            .function::<Get>("nvrtcVersion")
            .is_some_and(|get| get(&mut version.0, &mut version.1) == 0)
    };
    if good {
        Ok((version, library.name))
    } else {
        Err(format!("{} does not tell its version", library.name))
    }
}

/// The version in the toolkit's headers.
fn headers(toolkit: Option<&Path>) -> Result<Option<Version>, String> {
    let Some(toolkit) = toolkit else {
        return Err(
            "no CUDA toolkit: CUDA_PATH is not set, /usr/local/cuda does not exist".to_owned(),
        );
    };
    let folder = toolkit.join("include");
    match HEADERS.iter().find(|name| !folder.join(name).exists()) {
        Some(name) => Err(format!("{} does not exist", folder.join(name).display())),
        None => Ok(fs::read_to_string(folder.join("cuda.h"))
            .ok()
            .and_then(|text| header_version(&text))),
    }
}

/// The number behind `#define CUDA_VERSION`.
fn header_version(text: &str) -> Option<Version> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix("#define CUDA_VERSION"))
        .and_then(|number| number.trim().parse().ok())
        .map(version_from)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn cuda(driver: Version, nvrtc: Version, headers: Version) -> Cuda {
        Cuda {
            driver: Ok((driver, Some("580.1".to_owned()))),
            gpus: vec![Gpu {
                name: "GPU".to_owned(),
                compute: (8, 6),
                total: Some(24 << 30),
                free: None,
            }],
            nvrtc: Ok((nvrtc, "libnvrtc.so".to_owned())),
            toolkit: Some("/usr/local/cuda".into()),
            headers: Ok(Some(headers)),
        }
    }

    #[test]
    fn versions_that_agree_are_good() {
        let found = cuda((13, 0), (12, 8), (12, 8));
        assert!(found.checks(true).iter().all(|it| it.state == State::Ok));
        let devices = found.devices(true);
        assert_eq!(devices[0].device, "cuda:0");
        assert_eq!(devices[0].unusable, None);
    }

    #[test]
    fn versions_that_disagree_are_named() {
        for (found, word) in [
            (cuda((12, 4), (12, 8), (12, 8)), "driver"),
            (cuda((13, 0), (12, 8), (11, 8)), "headers"),
        ] {
            let checks = found.checks(true);
            let last = checks.last().expect("checks");
            assert_eq!(last.state, State::Problem);
            assert!(last.found.contains(word), "{}", last.found);
        }
    }

    #[test]
    fn what_is_missing_matters_only_where_it_is_needed() {
        let found = Cuda {
            driver: Err("libcuda.so.1 was not found".to_owned()),
            nvrtc: Err("libnvrtc.so was not found".to_owned()),
            headers: headers(None),
            toolkit: None,
            ..cuda((0, 0), (0, 0), (0, 0))
        };
        for (needed, state) in [(true, State::Problem), (false, State::Absent)] {
            let checks = found.checks(needed);
            assert_eq!(checks.len(), 3);
            assert!(
                checks
                    .iter()
                    .all(|it| it.state == state && it.hint.is_some())
            );
        }
        let reason = found.devices(true)[0].unusable.clone().expect("a reason");
        assert!(reason.contains("NVRTC"), "{reason}");
        let reason = found.devices(false)[0].unusable.clone().expect("a reason");
        assert!(reason.contains("feature `cuda`"), "{reason}");
    }

    #[test]
    fn headers_tell_their_version() {
        let folder = tempfile::tempdir().expect("a folder");
        let include = folder.path().join("include");
        fs::create_dir(&include).expect("a folder");
        assert!(headers(Some(folder.path())).is_err());
        for name in HEADERS {
            fs::write(include.join(name), "").expect("a header");
        }
        assert_eq!(headers(Some(folder.path())), Ok(None));
        let text = "#define X 1\n#define CUDA_VERSION 12080\n";
        fs::write(include.join("cuda.h"), text).expect("a header");
        assert_eq!(headers(Some(folder.path())), Ok(Some((12, 8))));
    }
}
