//! `train.recompute = "auto"`, tried out.
//!
//! The estimate that it is settled by ([`crate::memory`]) is within some percent of what a GPU's
//! allocator makes of a step, and a limit is a limit. So before a run begins, two steps are made with
//! weights that are thrown away; where they run out of memory, more layers are recomputed.

use burn::tensor::Device;
use mambabyte_datasets::Batch;

use super::learner::Learner;
use crate::config::{Config, Recompute};
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
        let error = match budget.guard(&config, || attempt(&config, device)) {
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

fn attempt(config: &Config, device: &Device) -> Result<()> {
    let mut config = config.clone();
    // A third micro-batch needs no more memory than the second.
    config.train.accumulation = config.train.accumulation.min(2);
    let batch = meaningless_batch(&config);
    let mut learner = Learner::new(&config, device);
    for _ in 0..STEPS {
        // What the numbers are does not matter here.
        learner.step(&batch, 0.0, None);
    }
    Ok(())
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
        let device = crate::device::open(&config.device).expect("the CPU");
        attempt(&config, &device).expect("fits");
    }
}
