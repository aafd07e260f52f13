//! `train.recompute = "auto"`, tried out.
//!
//! The estimate that it is settled by ([`crate::memory`]) is within some percent of what a GPU's
//! allocator makes of a step, and a limit is a limit. So before a run begins, two steps are made with
//! weights that are thrown away; where they run out of memory, more layers are recomputed.

use burn::tensor::{Device, Tensor};
use mambabyte_datasets::Batch;

use super::learner::Learner;
use crate::config::{Config, Mode, Recompute};
use crate::device::budget::Budget;
use crate::error::{Error, Result};

/// A failed attempt adds this part of all layers, one at least.
const PART: usize = 12;

/// Steps of an attempt: the second finds the allocator's pages as the first left them.
const STEPS: usize = 2;

/// `settled` with as many layers recomputed as it takes, if `asked` leaves that open and there is a
/// limit.
///
/// # Errors
///
/// [`Error::OutOfMemory`] where recomputing all layers is not enough.
pub fn fit(asked: &Config, settled: Config, budget: &Budget, device: &Device) -> Result<Config> {
    if asked.train.recompute != Recompute::Auto || !budget.is_limited() {
        return Ok(settled);
    }
    let mut config = settled;
    loop {
        let error = match budget.guard(&config, || attempt(&config, budget, device)) {
            Err(error @ Error::OutOfMemory { .. }) => error,
            other => return other.map(|()| config),
        };
        let Some(more) = next(&config) else {
            return Err(error);
        };
        tracing::info!(
            "`train.recompute` = {} does not fit: now {more}",
            config.train.recompute
        );
        config.train.recompute = more;
        // Room for the next attempt.
        device.memory_cleanup();
    }
}

/// What to try after `config` did not fit; none after all layers.
fn next(config: &Config) -> Option<Recompute> {
    let depth = config.model.depth;
    let layers = config.train.recompute.layers(depth);
    let more = layers + depth.div_ceil(PART);
    match more {
        _ if layers >= depth => None,
        more if more >= depth => Some(Recompute::All),
        more => Some(Recompute::First(more)),
    }
}

/// Micro-batches of an attempt: a third one needs no more memory than the second, but for the states
/// that its lanes carry.
const MICRO_BATCHES: usize = 2;

/// Makes the steps; an error where they do not fit.
fn attempt(config: &Config, budget: &Budget, device: &Device) -> Result<()> {
    let mut config = config.clone();
    let _held = other_states(&config, device);
    config.train.accumulation = config.train.accumulation.min(MICRO_BATCHES);
    let batch = meaningless_batch(&config);
    let mut learner = Learner::new(&config, device);
    for _ in 0..STEPS {
        // What the numbers are does not matter here.
        learner.step(&batch, 0.0, None);
    }
    budget.check(budget.used(device), &config)
}

/// As much memory as the states of the micro-batches that an attempt leaves out, layer by layer.
fn other_states(config: &Config, device: &Device) -> Vec<Tensor<1>> {
    let left_out = match config.train.mode {
        Mode::Independent => 0,
        Mode::Contiguous => config.train.accumulation.saturating_sub(MICRO_BATCHES),
    };
    let depth = config.model.depth;
    let bytes = config.train.batch as u64 * config.model.state_bytes() / depth as u64;
    (0..left_out * depth)
        .map(|_| Tensor::zeros([bytes as usize / 4], device))
        .collect()
}

/// A batch of the config's size, of bytes without order: their values do not change the work.
pub fn meaningless_batch(config: &Config) -> Batch {
    let train = &config.train;
    let lanes = train.batch * train.accumulation;
    let count = lanes * train.length;
    let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
    Batch {
        batch: lanes,
        length: train.length,
        inputs: (0..count).map(byte).collect(),
        targets: (1..=count).map(byte).collect(),
        resets: vec![false; count],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "wgpu")]
    use crate::config::MemoryLimit;

    fn config(recompute: &str) -> Config {
        let text = "model.dim = 16\nmodel.depth = 30\ntrain.steps = 1\ntrain.batch = 2\n\
                    train.accumulation = 3\ntrain.length = 8\ndata.path = \"x\"";
        let settings = [
            format!("train.recompute={recompute}"),
            "device.kind=cpu".to_owned(),
        ];
        Config::parse("config", text, &settings).expect("valid")
    }

    #[test]
    fn attempts_go_up_to_all_layers() {
        let after = |recompute| next(&config(recompute));
        assert_eq!(after("none"), Some(Recompute::First(3)));
        assert_eq!(after("3"), Some(Recompute::First(6)));
        assert_eq!(after("27"), Some(Recompute::All));
        assert_eq!(after("29"), Some(Recompute::All));
        assert_eq!(after("all"), None);
    }

    #[test]
    fn an_attempt_is_two_steps_of_at_most_two_micro_batches() {
        let config = config("none");
        let batch = meaningless_batch(&config);
        assert_eq!((batch.batch, batch.inputs.len()), (6, 48));
        assert_eq!(batch.inputs[1..], batch.targets[..47]);
        let (device, budget) = Budget::limited(&config).expect("the CPU");
        attempt(&config, &budget, &device).expect("fits");
    }

    #[test]
    fn an_attempt_holds_the_states_of_all_micro_batches() {
        let device = Device::flex();
        let held = |mode, accumulation| -> u64 {
            let mut config = config("none");
            config.train.mode = mode;
            config.train.accumulation = accumulation;
            let held = other_states(&config, &device).into_iter();
            held.map(|it| it.into_data().as_bytes().len() as u64).sum()
        };
        let of_one = 2 * config("none").model.state_bytes();
        for (accumulation, others) in [(1, 0), (2, 0), (3, 1), (7, 5)] {
            assert_eq!(held(Mode::Contiguous, accumulation), others * of_one);
            assert_eq!(held(Mode::Independent, accumulation), 0);
        }
    }

    /// Nothing but the attempt itself can notice there.
    #[cfg(feature = "wgpu")]
    #[test]
    fn a_limit_that_no_driver_enforces_ends_an_attempt() {
        let mut config = config("none");
        config.device.kind = crate::config::DeviceKind::Wgpu;
        for (limit, fits) in [(1, false), (u64::MAX, true)] {
            config.train.memory_limit = MemoryLimit::Bytes(limit);
            let (device, budget) = match Budget::limited(&config) {
                Ok(opened) => opened,
                Err(error) => return eprintln!("SKIPPED: {error}"),
            };
            let tried = attempt(&config, &budget, &device);
            assert_eq!(tried.is_ok(), fits, "{limit}");
            let exit_code = tried.map_or_else(|error| error.exit_code(), |()| 0);
            assert_eq!(exit_code, if fits { 0 } else { 6 });
        }
    }
}
