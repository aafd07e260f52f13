//! What a person who watches a run should not miss.

use serde::Serialize;

use super::table::Place;

/// Alarms kept of a run, the newest.
const KEPT: usize = 200;

/// Rows before spikes, growth and waiting are judged.
const WARM_UP: u32 = 50;

/// Weight of a row in running means.
const WEIGHT: f64 = 1.0 / 64.0;

/// A value so many mean deviations above the mean is a spike.
const SPIKE: f64 = 8.0;

/// So many spikes in a row are a new level.
const NEW_LEVEL: u32 = 16;

/// Rows of a window over which the least memory in use is taken: more may be in use between
/// validations and samples than without.
const WINDOW: u32 = 100;

/// A share of the time above which waiting for data is an alarm, and one below which it ends.
const WAITING: (f64, f64) = (0.1, 0.05);

/// Records further apart than so many times their usual distance, and than this many seconds, are
/// a stall.
const STALL: (f64, f64) = (20.0, 10.0);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum AlarmKind {
    /// Loss or gradient is not a number.
    NotANumber,
    /// Loss or gradient norm far above what they were.
    Spike,
    /// No step for long, and the trainer is at work.
    Stall,
    /// More and more memory in use.
    Memory,
    /// The device waits for data.
    DataWait,
    /// A checkpoint could not be written.
    Save,
}

/// One alarm; neighbouring ones of a kind are one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Alarm {
    pub(super) kind: AlarmKind,
    /// First and last step that it is about.
    pub(super) step: f64,
    pub(super) last_step: f64,
    /// When it began, seconds since 1970.
    pub(super) time: f64,
    /// How often.
    pub(super) count: u32,
    pub(super) text: String,
}

/// The numbers of a row that alarms are about.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Vital {
    pub(super) bpb: Option<f32>,
    pub(super) grad_norm: Option<f32>,
    pub(super) seconds: Option<f32>,
    pub(super) wait: Option<f32>,
    pub(super) memory: Option<f32>,
    pub(super) host_memory: Option<f32>,
}

/// Watches the rows of a run as they come.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    alarms: Vec<Alarm>,
    bpb: Level,
    grad_norm: Level,
    memory: Growth,
    host_memory: Growth,
    rows: u32,
    wait: f64,
    seconds: f64,
    waiting: bool,
    /// Mean distance of two records in seconds, and the newest.
    distance: f64,
    last: Option<Place>,
}

impl Watch {
    /// One more row.
    pub(super) fn row(&mut self, place: Place, vital: Vital) {
        self.rows = self.rows.saturating_add(1);
        if let Some(last) = self.last {
            let distance = (place.time - last.time).max(0.0);
            // A mean that long pauses do not carry away.
            let usual = match self.distance > 0.0 {
                true => distance.min(4.0 * self.distance),
                false => distance,
            };
            self.distance += (usual - self.distance) * WEIGHT.max(1.0 / f64::from(self.rows));
        }
        self.last = Some(place);
        let named = [("loss", vital.bpb), ("gradient norm", vital.grad_norm)];
        for (name, value) in named {
            if value.is_some_and(|it| !it.is_finite()) {
                self.raise(
                    AlarmKind::NotANumber,
                    place,
                    200.0,
                    format!("{name} is not a number"),
                );
            }
        }
        if let Some(bpb) = vital.bpb.map(f64::from)
            && let Some(usual) = self.bpb.spike(bpb, 0.05 * self.bpb.mean)
        {
            let text = format!("loss {bpb:.3} bpb, usually {usual:.3}");
            self.raise(AlarmKind::Spike, place, 50.0, text);
        }
        if let Some(norm) = vital.grad_norm.map(f64::from)
            && let Some(usual) = self.grad_norm.spike(norm.max(1e-30).ln(), 3f64.ln())
        {
            let text = format!("gradient norm {norm:.3}, usually {:.3}", usual.exp());
            self.raise(AlarmKind::Spike, place, 50.0, text);
        }
        if let Some((before, now)) = self.memory.row(vital.memory, 0.02, 1.0 / 64.0) {
            let text = format!("device memory in use grew from {before:.2} to {now:.2} GiB");
            self.raise(AlarmKind::Memory, place, f64::INFINITY, text);
        }
        if let Some((before, now)) = self.host_memory.row(vital.host_memory, 0.5, 0.5) {
            let text = format!("memory of the process grew from {before:.2} to {now:.2} GiB");
            self.raise(AlarmKind::Memory, place, f64::INFINITY, text);
        }
        self.data_wait(place, vital);
    }

    fn data_wait(&mut self, place: Place, vital: Vital) {
        let (Some(wait), Some(seconds)) = (vital.wait, vital.seconds) else {
            return;
        };
        self.wait += (f64::from(wait) - self.wait) * WEIGHT;
        self.seconds += (f64::from(seconds) - self.seconds) * WEIGHT;
        let share = self.wait / self.seconds.max(1e-9);
        self.waiting = match self.waiting {
            true => share > WAITING.1,
            false => share > WAITING.0 && self.rows > WARM_UP,
        };
        if self.waiting {
            let text = format!(
                "{:.0} % of the time goes into waiting for data",
                100.0 * share
            );
            self.raise(AlarmKind::DataWait, place, 200.0, text);
        }
    }

    /// Adds an alarm, or makes the last one of its kind longer if it is at most `gap` steps ago.
    fn raise(&mut self, kind: AlarmKind, place: Place, gap: f64, text: String) {
        let same = self.alarms.iter_mut().rev().find(|it| it.kind == kind);
        if let Some(alarm) = same
            && place.step - alarm.last_step <= gap
        {
            alarm.last_step = place.step;
            alarm.count += 1;
            alarm.text = text;
            return;
        }
        if self.alarms.len() == KEPT {
            self.alarms.remove(0);
        }
        self.alarms.push(Alarm {
            kind,
            step: place.step,
            last_step: place.step,
            time: place.time,
            count: 1,
            text,
        });
    }

    /// An alarm that a record of its own reports.
    pub(super) fn report(&mut self, kind: AlarmKind, place: Place, text: String) {
        self.raise(kind, place, 0.0, text);
    }

    /// The run goes on from `step`: what came later does not count any more, and memory is that of
    /// another process.
    pub(super) fn go_back(&mut self, step: f64) {
        // Why a run was taken back is worth knowing afterwards.
        let kept = [AlarmKind::NotANumber, AlarmKind::Save];
        self.alarms
            .retain(|it| it.step <= step || kept.contains(&it.kind));
        *self = Self {
            alarms: std::mem::take(&mut self.alarms),
            distance: self.distance,
            ..Self::default()
        };
    }

    /// All alarms, oldest first, with that of a stall if a trainer is `at_work` at the time `now`.
    pub(super) fn alarms(&self, at_work: bool, now: f64) -> Vec<Alarm> {
        let mut alarms = self.alarms.clone();
        if let Some(last) = self.last
            && at_work
        {
            let silence = now - last.time;
            if self.rows > 3 && silence > (STALL.0 * self.distance).max(STALL.1) {
                alarms.push(Alarm {
                    kind: AlarmKind::Stall,
                    step: last.step,
                    last_step: last.step,
                    time: last.time,
                    count: 1,
                    text: format!(
                        "no step for {silence:.0} s, usually one every {:.2} s",
                        self.distance
                    ),
                });
            }
        }
        alarms
    }

    /// Usual seconds between two records.
    pub(super) fn distance(&self) -> f64 {
        self.distance
    }
}

/// A running mean with the mean deviation from it. Spikes do not feed it.
#[derive(Clone, Debug, Default)]
struct Level {
    rows: u32,
    mean: f64,
    deviation: f64,
    in_a_row: u32,
}

impl Level {
    /// The usual value where this one is a spike: far above it, and by `least` at least.
    fn spike(&mut self, value: f64, least: f64) -> Option<f64> {
        if !value.is_finite() {
            return None;
        }
        let above = value - self.mean;
        if self.rows > WARM_UP && above > (SPIKE * self.deviation).max(least) {
            self.in_a_row += 1;
            if self.in_a_row < NEW_LEVEL {
                return Some(self.mean);
            }
            // It stays there: that is how it is now.
            *self = Self::default();
        }
        self.in_a_row = 0;
        self.rows = self.rows.saturating_add(1);
        let weight = WEIGHT.max(1.0 / f64::from(self.rows));
        let before = self.mean;
        self.mean += (value - self.mean) * weight;
        if self.rows > 1 {
            self.deviation += ((value - before).abs() - self.deviation) * weight;
        }
        None
    }
}

/// Compares the least memory of a window with that of the first one.
#[derive(Clone, Debug, Default)]
struct Growth {
    rows: u32,
    least: f32,
    first: Option<f32>,
}

impl Growth {
    /// What it was at first and is now, in GiB, at the end of a window in which it was more than by
    /// `share` and `gib` larger.
    fn row(&mut self, value: Option<f32>, share: f32, gib: f32) -> Option<(f32, f32)> {
        let value = value.filter(|it| it.is_finite())?;
        self.least = match self.rows.is_multiple_of(WINDOW) {
            true => value,
            false => self.least.min(value),
        };
        self.rows += 1;
        if !self.rows.is_multiple_of(WINDOW) {
            return None;
        }
        match self.first {
            None => {
                // The first steps are not like the others.
                if self.rows > WINDOW {
                    self.first = Some(self.least);
                }
                None
            }
            Some(first) => {
                (self.least > first * (1.0 + share) + gib).then_some((first, self.least))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u32) -> Place {
        Place {
            step: step.into(),
            bytes: 0.0,
            time: 1000.0 + 0.1 * f64::from(step),
        }
    }

    fn healthy(step: u32) -> Vital {
        let noise = (f64::from(step) * 1.7).sin() as f32;
        Vital {
            bpb: Some(2.0 + 0.05 * noise),
            grad_norm: Some(0.3 + 0.05 * noise),
            seconds: Some(0.1),
            wait: Some(0.001),
            memory: Some(10.0 + if step.is_multiple_of(10) { 3.0 } else { 0.0 }),
            host_memory: Some(1.0),
        }
    }

    fn watched(vital: impl Fn(u32) -> Vital, steps: u32) -> Watch {
        let mut watch = Watch::default();
        for step in 1..=steps {
            watch.row(at(step), vital(step));
        }
        watch
    }

    fn kinds(watch: &Watch) -> Vec<(AlarmKind, f64, u32)> {
        let alarms = watch.alarms(false, 0.0);
        alarms
            .iter()
            .map(|it| (it.kind, it.step, it.count))
            .collect()
    }

    #[test]
    fn a_healthy_run_has_none() {
        // A falling loss is none either, nor is one in its first steps.
        let falling = |step: u32| Vital {
            bpb: Some(8.0 / (1.0 + step as f32 * 0.02) + 1.0),
            ..healthy(step)
        };
        assert_eq!(kinds(&watched(falling, 2000)), []);
        assert_eq!(kinds(&watched(healthy, 2000)), []);
    }

    #[test]
    fn a_spike_is_seen_once_and_does_not_feed_the_mean() {
        let spiky = |step: u32| Vital {
            bpb: Some(if (500..503).contains(&step) { 5.0 } else { 2.0 }),
            ..healthy(step)
        };
        assert_eq!(kinds(&watched(spiky, 900)), [(AlarmKind::Spike, 500.0, 3)]);
        let exploding = |step: u32| Vital {
            grad_norm: Some(if step == 300 { 40.0 } else { 0.3 }),
            ..healthy(step)
        };
        assert_eq!(
            kinds(&watched(exploding, 400)),
            [(AlarmKind::Spike, 300.0, 1)]
        );
        // A new level is reported, and then is the level.
        let raised = |step: u32| Vital {
            bpb: Some(if step > 200 { 4.0 } else { 2.0 }),
            ..healthy(step)
        };
        assert_eq!(
            kinds(&watched(raised, 900)),
            [(AlarmKind::Spike, 201.0, 15)]
        );
    }

    #[test]
    fn no_number_is_an_alarm_that_survives_going_back() {
        let mut watch = watched(
            |step| Vital {
                bpb: Some(if step == 70 { f32::NAN } else { 2.0 }),
                ..healthy(step)
            },
            70,
        );
        assert_eq!(kinds(&watch), [(AlarmKind::NotANumber, 70.0, 1)]);
        watch.go_back(60.0);
        assert_eq!(kinds(&watch), [(AlarmKind::NotANumber, 70.0, 1)]);
    }

    #[test]
    fn growing_memory_and_waiting_for_data() {
        let leaking = |step: u32| Vital {
            memory: Some(10.0 + step as f32 * 0.002),
            ..healthy(step)
        };
        let found = kinds(&watched(leaking, 800));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, AlarmKind::Memory);
        let waiting = |step: u32| Vital {
            wait: Some(if step > 300 { 0.03 } else { 0.001 }),
            ..healthy(step)
        };
        let found = kinds(&watched(waiting, 800));
        assert!(
            found.len() == 1 && found[0].0 == AlarmKind::DataWait,
            "{found:?}"
        );
        assert!((300.0..400.0).contains(&found[0].1), "{found:?}");
    }

    #[test]
    fn a_stall_is_one_only_while_the_trainer_is_at_work() {
        let watch = watched(healthy, 100);
        assert!((watch.distance() - 0.1).abs() < 0.01);
        let last = at(100).time;
        let stalled = |at_work, after| {
            let alarms = watch.alarms(at_work, last + after);
            alarms.iter().any(|it| it.kind == AlarmKind::Stall)
        };
        assert!(!stalled(true, 9.0));
        assert!(stalled(true, 11.0));
        assert!(!stalled(false, 11.0));
    }
}
