//! The learning rate of every step.

use crate::config::{OptimizerConfig, TrainConfig};

/// Linear warm-up to the peak, then half a cosine down to the floor (paper, section 4).
///
/// `step` counts from 1: the first update already moves. After the decay the floor stays.
pub fn learning_rate(step: u64, optimizer: &OptimizerConfig, train: &TrainConfig) -> f64 {
    let warmup = optimizer.warmup_steps;
    if step <= warmup {
        return optimizer.lr * step as f64 / warmup as f64;
    }
    let end = match optimizer.decay_steps {
        0 => train.steps,
        steps => steps,
    };
    let progress = (step - warmup) as f64 / end.saturating_sub(warmup).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos());
    optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * cosine
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(extra: &str) -> Config {
        let text = format!(
            "[model]\npreset = \"tiny\"\n[data]\npath = \"x\"\n[train]\nsteps = 1000\n\
             [optimizer]\nlr = 4e-4\nmin_lr = 1e-5\nwarmup_steps = 100\n{extra}"
        );
        text.parse().expect("valid")
    }

    fn at(step: u64, config: &Config) -> f64 {
        learning_rate(step, &config.optimizer, &config.train)
    }

    #[test]
    fn rises_to_the_peak_and_falls_to_the_floor() {
        let config = config("");
        assert!((at(1, &config) - 4e-6).abs() < 1e-12);
        assert!((at(100, &config) - 4e-4).abs() < 1e-12);
        assert!((at(550, &config) - (1e-5 + 4e-4) / 2.0).abs() < 1e-9);
        assert!((at(1000, &config) - 1e-5).abs() < 1e-12);
        assert!((at(5000, &config) - 1e-5).abs() < 1e-12);
    }

    #[test]
    fn decay_may_end_before_the_run() {
        let config = config("decay_steps = 500\n");
        assert!((at(500, &config) - 1e-5).abs() < 1e-12);
        assert!((at(900, &config) - 1e-5).abs() < 1e-12);
    }

    #[test]
    fn no_warm_up_starts_at_the_peak() {
        let mut config = config("");
        config.optimizer.warmup_steps = 0;
        assert!(at(1, &config) > 3.99e-4);
    }
}
