//! Settings that are valid and do nothing.

use super::Config;
use super::values::{DeviceKind, Recompute};

impl Config {
    /// One line for each setting that has no effect beside the others, or a surprising one.
    ///
    /// A setting at its default is never worth a warning: nobody asked for it.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |condition: bool, text: String| {
            if condition {
                warnings.push(text);
            }
        };
        let (train, optimizer, checkpoint) = (&self.train, &self.optimizer, &self.checkpoint);
        warn(
            train.validate_every == 0 && train.validate_bytes != 1 << 20,
            "`train.validate_bytes` has no effect: `train.validate_every` is 0".to_owned(),
        );
        warn(
            train.validate_every > train.steps,
            format!(
                "`train.validate_every` is {}, more than `train.steps`: only the end is validated",
                train.validate_every
            ),
        );
        warn(
            train.sample_every == 0 && (train.sample_bytes != 256 || train.sample_prompt != "The "),
            "`train.sample_bytes` and `train.sample_prompt` have no effect: `train.sample_every` \
             is 0"
                .to_owned(),
        );
        if let Recompute::First(layers) = train.recompute {
            warn(
                layers > self.model.depth,
                format!(
                    "`train.recompute` is {layers}, more than `model.depth`: the same as \"all\""
                ),
            );
        }
        warn(
            train.checkpoint_every >= self.model.depth,
            format!(
                "`train.checkpoint_every` is {}, not less than `model.depth`: one group of all \
                 layers saves nothing",
                train.checkpoint_every
            ),
        );
        warn(
            optimizer.warmup_steps > train.steps,
            format!(
                "`optimizer.warmup_steps` is {}, more than `train.steps`: the learning rate will \
                 not reach `optimizer.lr`",
                optimizer.warmup_steps
            ),
        );
        warn(
            optimizer.decay_steps > train.steps,
            format!(
                "`optimizer.decay_steps` is {}, more than `train.steps`: the learning rate will \
                 not reach `optimizer.min_lr`",
                optimizer.decay_steps
            ),
        );
        warn(
            optimizer.decay_steps != 0 && optimizer.decay_steps < train.steps,
            format!(
                "`optimizer.decay_steps` is {}, less than `train.steps`: the rest of the run \
                 stays at `optimizer.min_lr`",
                optimizer.decay_steps
            ),
        );
        warn(
            checkpoint.every_steps == 0 && checkpoint.keep_every != 0,
            "`checkpoint.keep_every` has no effect: `checkpoint.every_steps` is 0".to_owned(),
        );
        warn(
            checkpoint.every_steps == 0 && ![0, ROLLBACKS].contains(&self.guard.rollbacks),
            "`guard.rollbacks` has no effect: `checkpoint.every_steps` is 0, and a run goes back to \
             planned checkpoints only"
                .to_owned(),
        );
        warn(
            self.device.index != 0 && self.device.kind == DeviceKind::Cpu,
            "`device.index` has no effect on the CPU".to_owned(),
        );
        warn(
            !self.model.pscan,
            "`model.pscan` is false: the sequential scan gives the same numbers, slowly".to_owned(),
        );
        warn(
            !self.model.residual_in_fp32,
            "`model.residual_in_fp32` is false and has no effect here: the residual stream is in \
             fp32 all the same"
                .to_owned(),
        );
        warnings
    }
}

/// Default of `guard.rollbacks`.
const ROLLBACKS: u32 = 3;
