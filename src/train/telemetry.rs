//! What a step says about the machine: where its time went, and how the device is doing.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use serde::{Deserialize, Serialize};

use crate::config::{Config, DeviceKind, Precision};
use crate::nvidia;

/// Between two readings of the GPU.
const EVERY: Duration = Duration::from_secs(1);

/// Arithmetic of a training step over that of the forward pass: the backward pass costs twice as much.
pub(crate) const TRAINING_OVER_FORWARD: u64 = 3;

/// Where the time of a step went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    /// Waiting for the batch.
    #[serde(default)]
    pub wait_seconds: f64,
    /// Forward passes. On a GPU the parts are measured in the steps that look into the model
    /// (`train.inspect_every`): it has to be waited for between them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_seconds: Option<f64>,
    /// Backward passes, with what they compute again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backward_seconds: Option<f64>,
    /// Gradient norm and update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer_seconds: Option<f64>,
    /// Time that training stood still for checkpoints since the line before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_seconds: Option<f64>,
}

/// How the machine is doing; what is not known is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineReading {
    /// Arithmetic of the model over the time of the step, in TFLOP/s; recomputation does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tflops: Option<f64>,
    /// The same as a share of what the GPU is sold as doing in this precision, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Resident memory of the process, in GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_memory_gib: Option<f64>,
    /// Share of the last second or so in which the GPU was at work (NVML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_util: Option<f64>,
    /// Power draw in watts (NVML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_power_w: Option<f64>,
    /// Temperature of the GPU in degrees Celsius (NVML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_temp_c: Option<f64>,
    /// Memory in use on the card by all programs, in GiB (NVML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_gib: Option<f64>,
}

/// Measures the parts of a step.
pub(super) struct Phases {
    /// Waited for at the end of every part; without one nothing is measured.
    device: Option<Device>,
    since: Instant,
    forward: f64,
    backward: f64,
    optimizer: f64,
}

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Forward,
    Backward,
    Optimizer,
}

impl Phases {
    /// Begins to measure, or does nothing.
    pub(super) fn start(device: Option<Device>) -> Self {
        Self {
            device,
            since: Instant::now(),
            forward: 0.0,
            backward: 0.0,
            optimizer: 0.0,
        }
    }

    /// The time since the last call was this part's.
    pub(super) fn end(&mut self, phase: Phase) {
        let Some(device) = &self.device else {
            return;
        };
        // A device that cannot be waited for says so where its results are read.
        let _ = device.sync();
        let part = match phase {
            Phase::Forward => &mut self.forward,
            Phase::Backward => &mut self.backward,
            Phase::Optimizer => &mut self.optimizer,
        };
        *part += self.since.elapsed().as_secs_f64();
        self.since = Instant::now();
    }

    /// What was measured, with `wait` seconds for the batch.
    pub(super) fn times(&self, wait_seconds: f64) -> StepTimes {
        let measured = |seconds: f64| self.device.is_some().then_some(seconds);
        StepTimes {
            wait_seconds,
            forward_seconds: measured(self.forward),
            backward_seconds: measured(self.backward),
            optimizer_seconds: measured(self.optimizer),
            save_seconds: None,
        }
    }
}

/// Reads the machine while a run is at work.
pub(super) struct Machine {
    /// Arithmetic of a step in TFLOP.
    work: f64,
    gpu: Option<Gpu>,
    precision: Precision,
}

/// The newest reading of a GPU, by a thread of its own: some of its numbers take milliseconds.
struct Gpu {
    reading: Arc<Mutex<MachineReading>>,
    /// TFLOP/s in bf16 and in tf32, where the card is known.
    peak: Option<(f64, f64)>,
}

impl Machine {
    pub(super) fn watch(config: &Config, on_gpu: bool) -> Self {
        let flops = TRAINING_OVER_FORWARD * config.model.flops_per_byte();
        // Through Vulkan a device's number is not the one that NVIDIA's driver gives it.
        let cuda = cfg!(feature = "cuda") && config.device.kind != DeviceKind::Wgpu;
        let gpu = match cuda && on_gpu {
            true => Gpu::watch(config.device.index),
            false => None,
        };
        Self {
            work: flops as f64 * config.train.bytes_per_step() as f64 / 1e12,
            gpu,
            precision: config.train.precision,
        }
    }

    /// The machine after a step that took `seconds`.
    pub(super) fn read(&self, seconds: f64) -> MachineReading {
        let tflops = self.work / seconds;
        let reading = self
            .gpu
            .as_ref()
            .map_or_else(MachineReading::default, |gpu| {
                *gpu.reading.lock().unwrap_or_else(PoisonError::into_inner)
            });
        let peak = self.gpu.as_ref().and_then(|gpu| gpu.peak);
        MachineReading {
            tflops: Some(tflops),
            mfu: peak.and_then(|(bf16, tf32)| match self.precision {
                Precision::Bf16 => Some(tflops / bf16),
                Precision::Tf32 => Some(tflops / tf32),
                Precision::Fp32 => None,
            }),
            host_memory_gib: host_memory_gib(),
            ..reading
        }
    }
}

impl Gpu {
    /// Starts to read the CUDA device of this index; none without NVML.
    fn watch(index: usize) -> Option<Self> {
        let address = nvidia::bus_address(index)?;
        let nvml = Nvml::init().ok()?;
        let peak = nvml
            .device_by_pci_bus_id(address.as_str())
            .and_then(|device| device.name())
            .ok()
            .and_then(|name| peak_tflops(&name));
        let reading = Arc::new(Mutex::new(MachineReading::default()));
        let shared = Arc::downgrade(&reading);
        thread::Builder::new()
            .name("gpu-readings".to_owned())
            .spawn(move || {
                let Ok(device) = nvml.device_by_pci_bus_id(address.as_str()) else {
                    return;
                };
                // Ends with the run.
                while let Some(shared) = shared.upgrade() {
                    let now = read_gpu(&device);
                    *shared.lock().unwrap_or_else(PoisonError::into_inner) = now;
                    drop(shared);
                    thread::sleep(EVERY);
                }
            })
            .ok()?;
        Some(Self { reading, peak })
    }
}

fn read_gpu(device: &nvml_wrapper::Device<'_>) -> MachineReading {
    let temperature = device.temperature(TemperatureSensor::Gpu).ok();
    MachineReading {
        gpu_util: device
            .utilization_rates()
            .ok()
            .map(|it| f64::from(it.gpu) / 100.0),
        gpu_power_w: device.power_usage().ok().map(|it| f64::from(it) / 1e3),
        gpu_temp_c: temperature.map(f64::from),
        gpu_memory_gib: device.memory_info().ok().map(|it| gib(it.used)),
        ..MachineReading::default()
    }
}

/// TFLOP/s of matrix products in bf16 and tf32, dense, with f32 sums, from NVIDIA's data sheets and
/// architecture whitepapers.
fn peak_tflops(name: &str) -> Option<(f64, f64)> {
    // Other cards than those they are named after.
    const VARIANTS: [&str; 4] = ["Ti", "SUPER", "D", "NVL"];
    // The longer of two names that begin alike comes first.
    const KNOWN: [(&str, f64, f64); 14] = [
        ("H200", 989.0, 494.0),
        ("H100 PCIe", 756.0, 378.0),
        ("H100", 989.0, 494.0),
        ("A100", 312.0, 156.0),
        ("A40", 150.0, 75.0),
        ("A6000", 155.0, 77.0),
        ("L40S", 362.0, 183.0),
        ("RTX 4090", 165.2, 82.6),
        ("RTX 4080", 97.5, 48.7),
        ("RTX 3090 Ti", 80.0, 40.0),
        ("RTX 3090", 71.0, 35.6),
        ("RTX 3080 Ti", 68.0, 34.0),
        ("RTX 3080", 59.5, 29.8),
        ("RTX 3060", 25.5, 12.7),
    ];
    let words: Vec<&str> = name.split([' ', '-']).collect();
    let is = |known: &str| {
        let known: Vec<&str> = known.split(' ').collect();
        let is_variant = |word: &&str| VARIANTS.iter().any(|it| it.eq_ignore_ascii_case(word));
        words
            .windows(known.len())
            .enumerate()
            .any(|(at, some)| some == known && !words.get(at + known.len()).is_some_and(is_variant))
    };
    let known = KNOWN.iter().find(|it| is(it.0))?;
    // Variants for notebooks and the like share names and not speeds.
    (!name.contains("Laptop") && !name.contains("Max-Q")).then_some((known.1, known.2))
}

/// The machine's name, where the system tells.
pub(super) fn machine_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok())?;
    Some(name.trim().to_owned())
}

/// Resident memory of this process, where the system tells.
fn host_memory_gib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|it| it.starts_with("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(gib(kib << 10))
}

/// `bytes` in GiB.
pub(super) fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_their_names() {
        let bf16 = |name| peak_tflops(name).map(|it| it.0);
        assert_eq!(bf16("NVIDIA GeForce RTX 3090"), Some(71.0));
        assert_eq!(bf16("NVIDIA GeForce RTX 3090 Ti"), Some(80.0));
        assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(bf16("NVIDIA A100 80GB PCIe"), Some(312.0));
        assert_eq!(bf16("NVIDIA A40"), Some(150.0));
        assert_eq!(bf16("NVIDIA RTX A6000"), Some(155.0));
        for unknown in [
            "NVIDIA GeForce RTX 3080 Laptop GPU",
            "NVIDIA GeForce RTX 3060 Ti",
            "NVIDIA GeForce RTX 4080 SUPER",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA H100 NVL",
            "NVIDIA RTX A400",
            "NVIDIA RTX A1000",
            "NVIDIA RTX A4000",
            "NVIDIA RTX A4500",
            "NVIDIA RTX 6000 Ada Generation",
            "Something else",
        ] {
            assert_eq!(bf16(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn parts_of_a_step_are_measured_or_absent() {
        let mut phases = Phases::start(Some(Device::flex()));
        thread::sleep(Duration::from_millis(3));
        phases.end(Phase::Forward);
        thread::sleep(Duration::from_millis(6));
        phases.end(Phase::Backward);
        phases.end(Phase::Optimizer);
        let times = phases.times(0.5);
        let part = |seconds: Option<f64>| seconds.expect("measured");
        assert!(part(times.forward_seconds) >= 0.003);
        assert!(part(times.backward_seconds) >= 0.006);
        assert!(part(times.optimizer_seconds) < 0.003);
        let mut off = Phases::start(None);
        off.end(Phase::Forward);
        assert_eq!(off.times(0.5).forward_seconds, None);
    }

    #[test]
    fn a_machine_without_the_gpu_says_what_it_knows() {
        let text = "model.preset = \"tiny\"\ntrain.steps = 1\ndata.path = \"x\"";
        let config: Config = text.parse().expect("valid");
        let reading = Machine::watch(&config, false).read(2.0);
        assert!(reading.tflops.is_some_and(|it| it > 0.0));
        assert_eq!((reading.mfu, reading.gpu_util), (None, None));
        let memory = reading.host_memory_gib;
        assert_eq!(memory.is_some(), cfg!(target_os = "linux"));
        assert!(memory.is_none_or(|it| it > 0.0 && it < 1024.0));
    }
}
