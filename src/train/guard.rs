//! Bad numbers: which steps are not applied, and when a run goes back.
//!
//! A step is bad if its loss or gradient norm is not a finite number, or if its loss is a spike:
//! above the mean of the last good losses by [`GuardConfig::spike`](crate::config::GuardConfig)
//! standard deviations, and by half the mean, and by a quarter of a nat. Losses of bad steps do not enter that window, so a
//! run that has gone wrong does not become the measure of what is right. Both are decided on the
//! device, before the update, which for a bad step changes nothing.
//!
//! So many bad steps in a row say that it is the weights: the run goes back to its last good
//! checkpoint and on with the batches behind the bad ones. A run that goes back to the same
//! checkpoint again and again has diverged.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::learner::StepReport;
use super::metrics::BadStep;
use crate::config::GuardConfig;

/// Losses that a spike is measured by.
const WINDOW: usize = 128;
/// Fewest of them: with fewer no finite loss is a spike.
const FEWEST: usize = 32;
/// A spike is above the mean by at least this share of it. Over 4,640 recorded steps of runs on real
/// text, the highest loss of a good step was 1.51 times the mean of those before it.
const SHARE: f64 = 0.5;
/// And by so many nats, for models that know their text by heart.
const LEAST: f64 = 0.25;

/// What the guard remembers; part of every checkpoint, since it decides the future.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuardState {
    /// The last good losses in nats, oldest first.
    losses: VecDeque<f32>,
    /// Bad steps since the last good one.
    in_a_row: u32,
    /// Times that the run went back to the checkpoint of step `back_to`, to that one each time.
    rollbacks: u32,
    /// See `rollbacks`.
    back_to: u64,
}

/// What is to be done after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// Nothing.
    Good,
    /// The step was not applied.
    Skipped(BadStep),
    /// Nor was this one, and it was one too many.
    RollBack(BadStep),
}

impl GuardState {
    /// Loss in nats above which the next step is a spike, none where there is no such.
    pub(super) fn limit(&self, config: &GuardConfig) -> Option<f32> {
        if config.spike == 0.0 || self.losses.len() < FEWEST {
            return None;
        }
        let count = self.losses.len() as f64;
        let mean = self.losses.iter().map(|it| f64::from(*it)).sum::<f64>() / count;
        let squares = self.losses.iter().map(|it| (f64::from(*it) - mean).powi(2));
        let deviation = (squares.sum::<f64>() / count).sqrt();
        let above = (config.spike * deviation).max(SHARE * mean).max(LEAST);
        Some((mean + above) as f32)
    }

    /// Judges a step that was made with that limit.
    pub(super) fn judge(
        &mut self,
        report: &StepReport,
        limit: Option<f32>,
        config: &GuardConfig,
    ) -> Verdict {
        let bad = match (report.applied, limit) {
            (true, _) => {
                self.in_a_row = 0;
                self.losses.push_back(report.loss_nats);
                if self.losses.len() > WINDOW {
                    self.losses.pop_front();
                }
                return Verdict::Good;
            }
            (false, Some(limit)) if report.is_finite() => {
                debug_assert!(report.loss_nats > limit);
                BadStep::Spike
            }
            (false, _) => BadStep::NonFinite,
        };
        self.in_a_row += 1;
        match self.in_a_row >= config.bad_steps {
            true => Verdict::RollBack(bad),
            false => Verdict::Skipped(bad),
        }
    }

    /// Bad steps since the last good one.
    pub(super) fn in_a_row(&self) -> u32 {
        self.in_a_row
    }

    /// The state after going back to the checkpoint of `step`, which had the state `there`; none
    /// where the run went back to that one `config.rollbacks` times already.
    pub(super) fn back_to(&self, step: u64, there: &Self, config: &GuardConfig) -> Option<Self> {
        let before = match self.back_to == step {
            true => self.rollbacks,
            false => 0,
        };
        (before < config.rollbacks).then(|| Self {
            rollbacks: before + 1,
            back_to: step,
            ..there.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: GuardConfig = GuardConfig {
        bad_steps: 3,
        spike: 6.0,
        rollbacks: 2,
    };

    /// A step as the device would do it.
    fn step(guard: &mut GuardState, loss: f32) -> Verdict {
        let limit = guard.limit(&CONFIG);
        let report = StepReport {
            loss_nats: loss,
            grad_norm: 1.0,
            applied: loss.is_finite() && limit.is_none_or(|limit| loss <= limit),
        };
        guard.judge(&report, limit, &CONFIG)
    }

    /// After `count` losses around 1.
    fn settled(count: usize) -> GuardState {
        let mut guard = GuardState::default();
        for i in 0..count {
            let loss = 1.0 + 0.1 * (i as f32).sin();
            assert_eq!(step(&mut guard, loss), Verdict::Good, "{i}");
        }
        guard
    }

    #[test]
    fn a_few_losses_are_no_measure() {
        let mut guard = settled(FEWEST - 1);
        assert_eq!(guard.limit(&CONFIG), None);
        assert_eq!(step(&mut guard, 50.0), Verdict::Good);
        assert!(guard.limit(&CONFIG).is_some());
    }

    #[test]
    fn spikes_are_high_by_both_measures() {
        // Deviation 0.07: half the mean is the higher bar.
        let limit = settled(200).limit(&CONFIG).expect("a limit");
        assert!((limit - 1.5).abs() < 0.02, "{limit}");
        // Losses that vary: six deviations are.
        let mut guard = GuardState::default();
        for i in 0..WINDOW {
            step(&mut guard, if i % 2 == 0 { 0.8 } else { 1.2 });
        }
        let limit = guard.limit(&CONFIG).expect("a limit");
        assert!((limit - 2.2).abs() < 1e-3, "{limit}");
        // A text known by heart.
        let mut guard = GuardState::default();
        for _ in 0..WINDOW {
            step(&mut guard, 0.001);
        }
        assert_eq!(guard.limit(&CONFIG), Some(0.251));
        let off = GuardConfig {
            spike: 0.0,
            ..CONFIG
        };
        assert_eq!(guard.limit(&off), None);
    }

    #[test]
    fn outliers_do_not_feed_the_window() {
        let mut guard = settled(200);
        let limit = guard.limit(&CONFIG);
        assert_eq!(step(&mut guard, 9.0), Verdict::Skipped(BadStep::Spike));
        assert_eq!(
            step(&mut guard, f32::NAN),
            Verdict::Skipped(BadStep::NonFinite)
        );
        assert_eq!(guard.limit(&CONFIG), limit);
        assert_eq!(
            step(&mut guard, f32::INFINITY),
            Verdict::RollBack(BadStep::NonFinite)
        );
    }

    #[test]
    fn a_good_step_between_ends_the_row() {
        let mut guard = settled(200);
        for _ in 0..10 {
            assert_eq!(step(&mut guard, 9.0), Verdict::Skipped(BadStep::Spike));
            assert_eq!(step(&mut guard, 9.0), Verdict::Skipped(BadStep::Spike));
            assert_eq!(step(&mut guard, 1.0), Verdict::Good);
        }
    }

    #[test]
    fn the_window_is_bounded_and_survives_a_checkpoint_to_the_bit() {
        let guard = settled(1000);
        assert_eq!(guard.losses.len(), WINDOW);
        let text = serde_json::to_string(&guard).expect("written");
        let back: GuardState = serde_json::from_str(&text).expect("read");
        assert_eq!(back, guard);
        assert_eq!(back.limit(&CONFIG), guard.limit(&CONFIG));
    }

    #[test]
    fn the_same_checkpoint_is_gone_back_to_so_often_and_a_newer_one_again() {
        let there = settled(40);
        let mut guard = settled(50);
        for _ in 0..2 {
            guard = guard.back_to(10, &there, &CONFIG).expect("allowed");
            assert_eq!(guard.losses, there.losses);
            assert_eq!(guard.in_a_row(), 0);
        }
        assert_eq!(guard.back_to(10, &there, &CONFIG), None);
        let guard = guard.back_to(20, &there, &CONFIG).expect("it got further");
        assert_eq!((guard.rollbacks, guard.back_to), (1, 20));
    }
}
