//! Memory of the device that a run trains on: the limit, what is in use, and what happens past it.
//!
//! On CUDA `train.memory_limit` is enforced by the driver. Once the context exists, all that is
//! free above the limit is taken and held until the program ends; an allocation past the limit then
//! fails as it would on a smaller card. That is the one way that covers everything (the context,
//! kernels loaded later, cuBLASLt, CubeCL's pools) and lets CubeCL give its unused pages back and
//! try again before it gives up. The price: another program cannot have that memory either.
//!
//! CubeCL reports a failed allocation to whoever reads what would have been computed, and Burn
//! panics there; on Vulkan the device's own thread panics first. [`Budget::guard`] turns both into
//! [`Error::OutOfMemory`].

use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::exhausted::{self, Failure};
use super::host_memory;
use crate::config::{Config, DeviceKind, Recompute};
use crate::error::{Error, Result};
use crate::memory::{self, CUDA_CONTEXT, size};
use crate::nvidia::{self, Gpu};

/// Memory above the limit is taken in pieces of this size, in bytes.
const PIECE: u64 = 4 << 30;

/// Memory that CubeCL holds on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Tensors that exist now.
    pub in_use: u64,
    /// Pages that those and earlier ones were cut from: as good as never given back, so this is
    /// close to the peak so far.
    pub reserved: u64,
}

/// What CubeCL holds on the device; none on the CPU.
///
/// Waits until the device's own thread has handed everything so far to the GPU: free of charge just
/// after a tensor was read, a stall elsewhere.
pub fn device_memory(device: &Device) -> Option<MemoryUse> {
    let usage = device.memory_pool_usage()?;
    Some(MemoryUse {
        in_use: usage.bytes_in_use,
        reserved: usage.bytes_reserved,
    })
}

/// How much memory a run may use.
pub struct Budget {
    /// The device as in a config, `cuda:0`.
    device: String,
    /// All that this program may use, context included; none where nobody said and the device does
    /// not tell.
    limit: Option<u64>,
    /// The GPU, if it is one of NVIDIA's, with the bytes in use there that are not this run's:
    /// other programs' and those held back.
    gpu: Option<(Arc<Gpu>, u64)>,
}

impl Budget {
    /// Opens the config's device for a run, within `train.memory_limit`. Returns the config with
    /// `train.recompute = "auto"` settled for the memory there is.
    ///
    /// # Errors
    ///
    /// As [`open`](super::open), and [`Error::OutOfMemory`] where by the estimate the run is far
    /// from fitting.
    pub fn open(config: &Config) -> Result<(Device, Self, Config)> {
        let (device, budget) = Self::limited(config)?;
        let config = budget.settle(config)?;
        set_page_size(&device, memory::page_bytes(&config));
        Ok((device, budget, config))
    }

    /// Whether the run is on a GPU.
    pub fn on_gpu(&self) -> bool {
        !self.device.starts_with(DeviceKind::Cpu.name())
    }

    /// Whether the run is on a GPU of which it may not use more than a limit.
    pub fn is_limited(&self) -> bool {
        self.on_gpu() && self.limit.is_some()
    }

    /// The device with its limit, enforced as far as that is possible.
    pub(crate) fn limited(config: &Config) -> Result<(Device, Self)> {
        let index = config.device.index;
        let before = cfg!(feature = "cuda")
            .then(|| nvidia::memory_before_use(index))
            .flatten();
        let (device, kind) = super::open_any(&config.device)?;
        let mut budget = Self {
            device: format!("{}:{index}", kind.name()),
            limit: config.train.memory_limit.bytes(),
            gpu: None,
        };
        if kind == DeviceKind::Cuda
            && let Some(gpu) = Gpu::open(index)
        {
            budget.hold_back(gpu, before);
        }
        Ok((device, budget))
    }

    /// Takes what is above the limit. `before` is (free, total) before the context was made.
    fn hold_back(&mut self, gpu: Gpu, before: Option<(u64, u64)>) {
        let Some((free, total)) = gpu.memory() else {
            return;
        };
        let plan = Plan::new(free, total, before, self.limit);
        let held = gpu.take(plan.hold_back, PIECE);
        if held < plan.hold_back {
            tracing::warn!(
                "`train.memory_limit` is not enforced: {} above it could not be held back",
                size(plan.hold_back - held)
            );
        }
        tracing::debug!(
            "device memory: {} for this run, of which {} are the context's; {} held back",
            size(plan.limit),
            size(plan.own),
            size(held)
        );
        self.limit = Some(plan.limit);
        self.gpu = Some((Arc::new(gpu), total.saturating_sub(free + plan.own) + held));
    }

    /// The config with `"auto"` settled, if by the estimate it fits.
    fn settle(&self, config: &Config) -> Result<Config> {
        let mut settled = config.clone();
        memory::settle(&mut settled, self.limit);
        let Some(limit) = self.limit else {
            if !self.on_gpu()
                && let Some(memory) = host_memory::read()
            {
                fits_host(&settled, memory.free)?;
            }
            return Ok(settled);
        };
        if let Some(reason) = memory::excess(&settled, limit) {
            return Err(self.out_of_memory(reason, &settled));
        }
        if config.train.recompute == Recompute::Auto {
            tracing::info!(
                "`train.recompute` is {} for this run, which needs about {} of {}",
                settled.train.recompute,
                size(memory::estimate(&settled).total()),
                size(limit)
            );
        }
        Ok(settled)
    }

    /// What this run uses on `device`; none on the CPU. On CUDA `reserved` is all of it, context and
    /// libraries included.
    ///
    /// Waits as [`device_memory`] does.
    pub fn used(&self, device: &Device) -> Option<MemoryUse> {
        let pools = device_memory(device)?;
        let all = self.gpu.as_ref().and_then(|(gpu, foreign)| {
            let (free, total) = gpu.memory()?;
            Some(total.saturating_sub(free + foreign))
        });
        Some(MemoryUse {
            reserved: all.unwrap_or(pools.reserved),
            ..pools
        })
    }

    /// That a limit which the driver does not enforce has been kept.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if not.
    pub fn check(&self, used: Option<MemoryUse>, config: &Config) -> Result<()> {
        match (used, self.limit) {
            (Some(used), Some(limit)) if self.gpu.is_none() && used.reserved > limit => {
                let reason = format!(
                    "{} are in use, and the limit is {}",
                    size(used.reserved),
                    size(limit)
                );
                Err(self.out_of_memory(reason, config))
            }
            _ => Ok(()),
        }
    }

    /// [`Error::OutOfMemory`] for a run by `config` on this device.
    pub fn out_of_memory(&self, reason: String, config: &Config) -> Error {
        let recompute = match config.train.recompute {
            Recompute::First(layers) if layers >= config.model.depth => Recompute::All,
            recompute => recompute,
        };
        let train = &config.train;
        Error::OutOfMemory {
            device: format!("`{}`", self.device),
            reason,
            hint: memory_hint(
                train.batch,
                train.length,
                &recompute.to_string(),
                train.checkpoint_every,
            ),
        }
    }

    /// Runs `work` for a run by `config`. Where the device's memory does not suffice, its panic is
    /// not shown.
    ///
    /// # Errors
    ///
    /// What `work` says, and [`Error::OutOfMemory`]. Any other panic goes on.
    pub fn guard<T>(&self, config: &Config, work: impl FnOnce() -> Result<T>) -> Result<T> {
        exhausted::caught(self.gpu.clone(), work, |failure| {
            self.out_of_memory(self.describe(failure), config)
        })
    }

    /// One line for a failed allocation.
    fn describe(&self, failure: &Failure) -> String {
        let mut reason = failure.describe();
        if let Some(limit) = self.limit {
            reason += &format!(", and the limit is {}", size(limit));
        }
        reason
    }
}

/// Makes the device's allocator cut tensors from pages of `bytes` from now on.
///
/// By itself it makes pages as large as the largest tensor so far, and how many others fit beside
/// that one is luck: up to a third of the memory is lost. It never makes pages smaller, so one large
/// allocation at the start decides.
///
/// A device that does not have pages of that size gets the largest half, quarter, … it has.
fn set_page_size(device: &Device, bytes: u64) {
    /// What CubeCL adds to an allocation to get the size of its page.
    const SLACK: u64 = 1 << 20;
    /// Smaller pages are not worth setting.
    const LEAST: u64 = 16 << 20;
    let pages = || device.memory_pool_report().unwrap_or_default();
    let mut wanted = bytes;
    while wanted >= LEAST && device_memory(device).is_some() {
        // A failure stays with this tensor, which nobody reads.
        let elements = ((wanted - SLACK) / 4) as usize;
        drop(Tensor::<1>::empty([elements], device));
        if pages().iter().any(|pool| pool.page_size + SLACK >= wanted) {
            return;
        }
        wanted /= 2;
    }
}

/// How a GPU's memory is divided, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// What this program uses already: its context.
    own: u64,
    /// What it may use, that included.
    limit: u64,
    /// What to take so that it cannot use more.
    hold_back: u64,
}

impl Plan {
    /// `free` and `total` are now, `before` was before the context; `limit` is the user's.
    fn new(free: u64, total: u64, before: Option<(u64, u64)>, limit: Option<u64>) -> Self {
        let own = match before {
            // On a part of a GPU the two interfaces speak of different things.
            Some((free_before, total_before)) if total_before.abs_diff(total) <= total / 16 => {
                free_before.saturating_sub(free)
            }
            _ => CUDA_CONTEXT,
        };
        let available = free + own;
        let limit = limit.map_or(available, |limit| limit.min(available));
        Self {
            own,
            limit,
            hold_back: (available - limit).min(free),
        }
    }
}

/// Refuses a model whose weights, gradients and moments alone are more than the `free` bytes of the
/// machine: the system would end some process, without a word. The rest of the estimate is a GPU's.
fn fits_host(config: &Config, free: u64) -> Result<()> {
    let needed = memory::estimate(config);
    let state = needed.weights + needed.gradients + needed.optimizer;
    if state <= free {
        return Ok(());
    }
    Err(Error::OutOfMemory {
        device: "`cpu`".to_owned(),
        reason: format!(
            "the model's weights, gradients and moments take {}, and {} are free",
            size(state),
            size(free)
        ),
        hint:
            "choose a smaller `model.dim` or `model.depth`, or a GPU; `mambabyte estimate` shows \
               what a model takes"
                .to_owned(),
    })
}

/// The settings that decide about memory, each with what it is now. Groups of layers are for those
/// who have little else left.
fn memory_hint(batch: usize, length: usize, recompute: &str, checkpoint_every: usize) -> String {
    let recompute = match (recompute, checkpoint_every) {
        ("all", 0) => "`train.recompute` is already \"all\": set `train.checkpoint_every`, for \
                       instance to 8 (now 0; a second forward pass)"
            .to_owned(),
        ("all", now) => {
            format!("`train.recompute` is already \"all\", `train.checkpoint_every` is {now}")
        }
        (now, _) => format!("set `train.recompute` to \"all\" (now {now}; a tenth more time)"),
    };
    let batch = match batch {
        0 | 1 => "`train.batch` is already 1".to_owned(),
        now => format!("lower `train.batch` (now {now}), raise `train.accumulation` to match"),
    };
    format!(
        "{recompute}; {batch}; shorten `train.length` (now {length}); `mambabyte estimate` shows \
         what fits"
    )
}

#[cfg(test)]
mod tests {
    use std::panic;

    use super::*;

    const GIB: u64 = 1 << 30;

    /// As `Tensor::into_scalar` panics after a failed allocation.
    const CUBECL: &str = "Error while reading data: use `try_into_data` instead to catch the error \
                          at runtime: WithContext { reason: \"out of device memory allocating \
                          402653184 bytes\\nbacktrace\" }";

    fn config(settings: &[&str]) -> Config {
        let text = "model.preset = \"tiny\"\ntrain.steps = 1\ndata.path = \"x\"";
        let settings: Vec<String> = settings.iter().map(|it| (*it).to_owned()).collect();
        Config::parse("config", text, &settings).expect("valid")
    }

    /// As [`Budget::guard`], alone.
    fn guarded<T>(
        limit: Option<u64>,
        config: &Config,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _turn = exhausted::turn();
        budget(limit).guard(config, work)
    }

    fn budget(limit: Option<u64>) -> Budget {
        Budget {
            device: "cuda:0".to_owned(),
            limit,
            gpu: None,
        }
    }

    #[test]
    fn a_model_larger_than_the_machine_is_refused() {
        let large = config(&["model.depth=400"]);
        let needed = memory::estimate(&large);
        let state = needed.weights + needed.gradients + needed.optimizer;
        fits_host(&large, state).expect("just enough");
        let error = fits_host(&large, state - 1).expect_err("too little");
        assert_eq!(error.exit_code(), 6);
        assert!(error.to_string().contains("weights, gradients and moments"));
    }

    #[test]
    fn a_failed_allocation_becomes_an_error_with_what_was_asked_for() {
        let config = config(&["train.batch=2", "train.recompute=4"]);
        let error = guarded::<()>(Some(24 * GIB), &config, || panic!("{CUBECL}"))
            .expect_err("out of memory");
        assert_eq!(error.exit_code(), 6);
        let report = error.report();
        for part in [
            "`cuda:0`",
            "384.0 MiB more",
            "the limit is 24.00 GiB",
            "`train.batch` (now 2)",
            "`train.recompute` is already \"all\"",
            "`train.length` (now 8192)",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        assert!(!report.contains("backtrace"), "{report}");
    }

    #[test]
    fn other_results_and_panics_pass_through() {
        let config = config(&[]);
        assert_eq!(guarded(None, &config, || Ok(3)).expect("fine"), 3);
        let error = guarded::<()>(None, &config, || Err(anyhow::anyhow!("odd").into()));
        assert_eq!(error.expect_err("given").exit_code(), 1);
        let error = guarded::<()>(None, &config, || Err(anyhow::anyhow!("{CUBECL}").into()));
        assert_eq!(error.expect_err("out of memory").exit_code(), 6);
        let panic = panic::catch_unwind(|| guarded::<()>(None, &config, || panic!("index 7")));
        let payload = panic.expect_err("not about memory");
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"index 7"));
    }

    #[test]
    fn a_failure_of_the_device_s_thread_explains_what_follows_from_it() {
        let error = guarded::<()>(None, &config(&[]), || {
            let device = std::thread::spawn(|| panic!("wgpu error: Out of Memory"));
            assert!(device.join().is_err());
            panic!("couldn't find resource for that handle")
        });
        let report = error.expect_err("out of memory").report();
        assert!(report.contains("an allocation failed"), "{report}");
    }

    #[test]
    fn the_hint_names_the_three_settings() {
        for (batch, recompute) in [(1, "all"), (4, "none"), (2, "10")] {
            let hint = memory_hint(batch, 8192, recompute, 0);
            for key in ["`train.batch`", "`train.length`", "`train.recompute`"] {
                assert!(hint.contains(key), "{hint}");
            }
        }
        assert!(!memory_hint(1, 8192, "all", 0).contains("lower `train.batch`"));
        // Groups of layers are named where recomputation is used up.
        let named = |recompute| memory_hint(1, 8192, recompute, 0).contains("checkpoint_every");
        assert!(named("all") && !named("10"));
    }

    #[test]
    fn the_context_is_inside_the_limit() {
        // A card of 140 GiB, 2 in use by others; the context took half a GiB.
        let before = Some((138 * GIB, 140 * GIB));
        let free = 138 * GIB - GIB / 2;
        let plan = Plan::new(free, 140 * GIB, before, Some(24 * GIB));
        let expected = Plan {
            own: GIB / 2,
            limit: 24 * GIB,
            hold_back: 114 * GIB,
        };
        assert_eq!(plan, expected);
        assert_eq!(free - plan.hold_back, 24 * GIB - GIB / 2);
    }

    #[test]
    fn a_limit_above_what_is_there_holds_nothing_back() {
        let before = Some((20 * GIB, 24 * GIB));
        for limit in [None, Some(24 * GIB)] {
            let plan = Plan::new(19 * GIB, 24 * GIB, before, limit);
            assert_eq!((plan.limit, plan.hold_back), (20 * GIB, 0), "{limit:?}");
        }
    }

    #[test]
    fn without_a_measurement_the_context_is_estimated() {
        // NVML speaks of the whole card, CUDA of a seventh of it.
        for before in [None, Some((140 * GIB, 140 * GIB))] {
            let plan = Plan::new(18 * GIB, 20 * GIB, before, Some(10 * GIB));
            assert_eq!(plan.own, CUDA_CONTEXT);
            assert_eq!(plan.hold_back, 8 * GIB + CUDA_CONTEXT);
        }
    }

    #[test]
    fn a_limit_that_no_driver_enforces_is_checked() {
        let config = config(&[]);
        let used = |reserved| {
            Some(MemoryUse {
                in_use: 0,
                reserved,
            })
        };
        let budget = budget(Some(GIB));
        assert!(budget.check(used(GIB), &config).is_ok());
        assert!(budget.check(None, &config).is_ok());
        let error = budget.check(used(GIB + 1), &config).expect_err("past it");
        assert_eq!(error.exit_code(), 6);
    }
}
