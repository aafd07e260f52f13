//! Runs that go wrong on purpose: weights, moments, memories and batches are spoilt between steps,
//! and the run ends where the clean one does.

use burn::tensor::Device;
use mambabyte_datasets::sources::InMemory;
use mambabyte_datasets::{Document, PrepareOptions, Split, prepare};
use tempfile::TempDir;

use super::*;
use crate::config::Config;
use crate::train::launch::open_data;
use crate::train::metrics;
use crate::train::parameters;

const CONFIG: &str = "
[model]
dim = 16
depth = 1
[train]
steps = 1200
batch = 4
length = 64
validate_every = 1200
validate_bytes = 8000
sample_every = 3
sample_bytes = 2
[optimizer]
lr = 1e-2
min_lr = 1e-4
warmup_steps = 5
clip = 1.0
[checkpoint]
every_steps = 20
[device]
kind = \"cpu\"
";

/// How far from the clean run's bits per byte a spoilt one may end.
const NEAR: f64 = 0.01;

/// Prepared text, a config, and a place for runs.
struct World {
    folder: TempDir,
    config: Config,
}

/// A run that has ended.
struct Ended {
    result: Result<()>,
    records: Vec<MetricRecord>,
    /// Bits a byte of the validation at the end.
    bpb: Option<f64>,
}

impl World {
    fn new(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let text = |i: usize| {
            let mut random = xorshift(i as u64 + 1);
            let mut word = || {
                let words = ["river ", "stone ", "a ", "walks ", "under ", "bird\n"];
                words[random() as usize % words.len()]
            };
            Document {
                name: i.to_string(),
                bytes: (0..900).flat_map(|_| word().bytes()).collect(),
            }
        };
        let source = InMemory::new()
            .with(Split::Train, (0..60).map(text))
            .with(Split::Validation, vec![text(40), text(41), text(42)]);
        let options = PrepareOptions {
            splits: vec![Split::Train, Split::Validation],
            ..PrepareOptions::default()
        };
        prepare(&source, folder.path(), &options, &Silent).expect("data");
        let path = format!("data.path={}", folder.path().display());
        let settings: Vec<String> = settings
            .iter()
            .map(|it| (*it).to_owned())
            .chain([path])
            .collect();
        let config = Config::parse("config", CONFIG, &settings).expect("valid");
        Self { folder, config }
    }

    /// Trains to the end; before each step `spoil` may change what it likes. It hears how many steps
    /// were begun, those before a rollback included.
    fn train(&self, name: &str, mut spoil: impl FnMut(u64, &mut Learner, &mut Batch)) -> Ended {
        let path = self.folder.path().join(name);
        let (device, budget, config) = Budget::open(&self.config).expect("a device");
        let data = open_data(&config).expect("data");
        let sampler = Arc::clone(&data.0);
        let dir = RunDir::create(&path, false).expect("a new run");
        dir.begin(&config).expect("writable");
        let metrics = MetricsWriter::append(&dir.metrics()).expect("writable");
        let learner = Learner::new(&config, &device);
        let progress = Progress::default();
        let mut run = Run::new(&config, dir, learner, &budget, metrics, data, progress);
        let mut display = Display::new(config.train.steps, 0, false);
        let mut begun = 0;
        let mut result = Ok(());
        while result.is_ok() && run.progress.step < config.train.steps {
            begun += 1;
            let number = run.progress.batch_of(run.progress.step + 1);
            let mut batch = sampler.batch(number).expect("a batch");
            spoil(begun, &mut run.learner, &mut batch);
            result = run
                .advance(&batch, Instant::now(), &mut display)
                .map(|_| ());
        }
        let result = result.and_then(|()| run.finish(config.train.steps));
        drop(run);
        let records = metrics::read(&path.join("metrics.jsonl")).expect("metrics");
        let bpb = records.iter().rev().find_map(|it| match it {
            MetricRecord::Valid { bpb, .. } => Some(*bpb),
            _ => None,
        });
        Ended {
            result,
            records,
            bpb,
        }
    }
}

impl Ended {
    /// Steps that were not applied, with the reason.
    fn skips(&self) -> Vec<(u64, BadStep)> {
        let skips = self.records.iter().filter_map(|it| match it {
            MetricRecord::Skip { step, reason, .. } => Some((*step, *reason)),
            _ => None,
        });
        skips.collect()
    }

    /// Rollbacks: from, to, and batches left out.
    fn rollbacks(&self) -> Vec<(u64, u64, u64)> {
        let rollbacks = self.records.iter().filter_map(|it| match it {
            MetricRecord::Rollback {
                step,
                from,
                skipped_batches,
                ..
            } => Some((*from, *step, *skipped_batches)),
            _ => None,
        });
        rollbacks.collect()
    }

    /// That the run has ended well, near where `clean` has.
    #[track_caller]
    fn assert_near(&self, clean: &Self) {
        self.result.as_ref().expect("the run ends well");
        let (bpb, clean) = (self.bpb.expect("a score"), clean.bpb.expect("a score"));
        eprintln!("bits per byte: {bpb:.5}, clean {clean:.5}");
        assert!(clean < 1.2, "the clean run has learnt: {clean}");
        assert!((bpb - clean).abs() <= NEAR, "{bpb} and {clean}");
    }
}

/// Changes the values of every parameter by name.
fn change(learner: &mut Learner, change: impl Fn(&str, &mut [f32])) {
    let model = learner.model();
    let mut values: std::collections::BTreeMap<String, Vec<f32>> = parameters::collect(&model)
        .into_iter()
        .map(|it| (it.name.clone(), (it.read)().iter::<f32>().collect()))
        .collect();
    for (name, values) in &mut values {
        change(name, values);
    }
    let device = learner.device().clone();
    learner.map_model(|model| {
        let row = |name: &str| Ok(parameters::row(values[name].clone(), &device));
        parameters::replace(model, row).expect("the same shapes")
    });
}

/// Bytes without any order.
fn noise(batch: &mut Batch) {
    let mut random = xorshift(7);
    let bytes = batch.inputs.iter_mut().chain(&mut batch.targets);
    bytes.for_each(|byte| *byte = random() as u8);
}

/// A stream of numbers.
fn xorshift(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 33
    }
}

#[test]
fn poisoned_weights_end_where_the_clean_run_does() {
    for mode in ["independent", "contiguous"] {
        let mode = format!("train.mode={mode}");
        let world = World::new(&[&mode]);
        let clean = world.train("clean", |_, _, _| {});
        assert_eq!(clean.skips(), []);

        // One weight that is no number, as after a bad memory cell.
        let spoilt = world.train("nan", |begun, learner, _| {
            if begun == 130 {
                change(learner, |name, values| {
                    if name.ends_with("layers.0.mixer.in_proj.weight") {
                        values[77] = f32::NAN;
                    }
                });
            }
        });
        let bad: Vec<_> = (130..135).map(|step| (step, BadStep::NonFinite)).collect();
        assert_eq!(spoilt.skips(), bad);
        assert_eq!(spoilt.rollbacks(), [(134, 120, 14)]);
        spoilt.assert_near(&clean);

        // Weights that are numbers and make no sense.
        let spoilt = world.train("scaled", |begun, learner, _| {
            if begun == 118 {
                change(learner, |_, values| {
                    values.iter_mut().for_each(|it| *it *= -8.0);
                });
            }
        });
        let bad: Vec<_> = (118..123).map(|step| (step, BadStep::Spike)).collect();
        assert_eq!(spoilt.skips(), bad);
        // The checkpoint of step 120 was made between bad steps: it is not a good one.
        assert_eq!(spoilt.rollbacks(), [(122, 100, 22)]);
        spoilt.assert_near(&clean);
    }
}

/// The highest bit of an exponent: a small number becomes a huge one. Some of it is lost in a norm,
/// the rest is noticed.
#[test]
fn one_flipped_bit_ends_where_the_clean_run_does() {
    let world = World::new(&[]);
    let clean = world.train("clean", |_, _, _| {});
    let mut rollbacks = 0;
    for (i, parameter) in [
        "embedding.weight",
        "layers.0.mixer.out_proj.weight",
        "layers.0.mixer.in_proj.weight",
        "layers.0.mixer.dt_proj.bias",
    ]
    .iter()
    .enumerate()
    {
        let spoilt = world.train(&i.to_string(), |begun, learner, _| {
            if begun == 150 {
                change(learner, |name, values| {
                    if name.ends_with(parameter) {
                        let at = values.len() / 2 - 3;
                        values[at] = f32::from_bits(values[at].to_bits() ^ (1 << 30));
                    }
                });
            }
        });
        eprintln!("{parameter}: rollbacks {:?}", spoilt.rollbacks());
        rollbacks += spoilt.rollbacks().len();
        spoilt.assert_near(&clean);
    }
    assert!(rollbacks > 0);
}

#[test]
fn poisoned_batches_are_left_out() {
    for mode in ["independent", "contiguous"] {
        let mode = format!("train.mode={mode}");
        let world = World::new(&[&mode]);
        let clean = world.train("clean", |_, _, _| {});
        let spoilt = world.train("one", |begun, _, batch| {
            if begun == 130 {
                noise(batch);
            }
        });
        assert_eq!(spoilt.skips(), [(130, BadStep::Spike)]);
        assert_eq!(spoilt.rollbacks(), []);
        spoilt.assert_near(&clean);
        // Where the bytes were is on record.
        let skip = spoilt.records.iter().find_map(|it| match it {
            MetricRecord::Skip { batch, offsets, .. } => Some((*batch, offsets.clone())),
            _ => None,
        });
        let (batch, offsets) = skip.expect("a record");
        let (sampler, _) = open_data(&world.config).expect("data");
        let expected: Vec<u64> = (0..4)
            .map(|row| sampler.coordinates(129, row).offset)
            .collect();
        assert_eq!((batch, offsets), (129, expected));

        // A stretch of them: back to the last checkpoint, and on behind the stretch.
        let spoilt = world.train("many", |begun, _, batch| {
            if (130..135).contains(&begun) {
                noise(batch);
            }
        });
        assert_eq!(spoilt.rollbacks(), [(134, 120, 14)]);
        spoilt.assert_near(&clean);
    }
}

#[test]
fn weights_that_are_bad_again_and_again_have_diverged() {
    let world = World::new(&["guard.rollbacks=2"]);
    let spoilt = world.train("bad", |begun, learner, _| {
        if begun >= 50 {
            change(learner, |_, values| values[0] = f32::NAN);
        }
    });
    assert_eq!(spoilt.rollbacks(), [(54, 40, 14), (45, 40, 19)]);
    let error = spoilt.result.expect_err("no way on");
    assert_eq!(error.exit_code(), 7);
    let text = error.to_string();
    assert!(
        text.contains("step 45") && text.contains("step 40 did not help 2 times"),
        "{text}"
    );
}

#[test]
fn a_run_that_may_not_go_back_says_so() {
    let world = World::new(&["guard.rollbacks=0"]);
    let spoilt = world.train("bad", |begun, learner, _| {
        if begun >= 30 {
            change(learner, |_, values| values[0] = f32::NAN);
        }
    });
    assert_eq!(spoilt.rollbacks(), []);
    let text = spoilt.result.expect_err("no way on").to_string();
    assert!(
        text.contains("step 34") && text.contains("`guard.rollbacks` is 0"),
        "{text}"
    );
}

/// Noticed before the run's end or at it: a last save that fails is an error.
#[test]
fn a_last_save_that_failed_is_tried_again_and_told() {
    let world = World::new(&[]);
    let (device, budget, config) = Budget::open(&world.config).expect("a device");
    let data = open_data(&config).expect("data");
    let batch = data.0.batch(0).expect("a batch");
    let path = world.folder.path().join("run");
    let dir = RunDir::create(&path, false).expect("a new run");
    let metrics = MetricsWriter::append(&dir.metrics()).expect("writable");
    let learner = Learner::new(&config, &device);
    let progress = Progress::default();
    let mut run = Run::new(&config, dir, learner, &budget, metrics, data, progress);
    let mut display = Display::new(config.train.steps, 0, false);
    run.train_step(1, &batch, Instant::now(), &mut display)
        .expect("a step");
    // In the way of the folder that a save fills.
    let obstacle = path.join("step-1.tmp");
    std::fs::write(&obstacle, "").expect("a file");
    for attempt in 1..=2 {
        run.save().expect("begun");
        let saved = run.saver.wait().expect("a save");
        assert!(saved.result.is_err());
        run.note_saved(&saved).expect("noted");
        run.finish(1).expect_err(&format!("not saved, {attempt}"));
    }
    std::fs::remove_file(obstacle).expect("removed");
    run.save().expect("begun");
    run.finish(1).expect("saved");
}

#[test]
fn without_a_checkpoint_there_is_nothing_to_go_back_to() {
    let world = World::new(&[]);
    let spoilt = world.train("early", |begun, learner, _| {
        if begun == 7 {
            change(learner, |_, values| values[0] = f32::INFINITY);
        }
    });
    let text = spoilt.result.expect_err("no way back").to_string();
    assert!(
        text.contains("step 11") && text.contains("no good checkpoint"),
        "{text}"
    );
}

/// The update of a bad step is refused where it is computed: not a bit of weights or moments moves.
fn a_bad_step_changes_nothing_on(device: &Device) {
    let world = World::new(&[
        "train.mode=contiguous",
        "train.accumulation=2",
        "train.batch=2",
    ]);
    let (sampler, _) = open_data(&world.config).expect("data");
    let batch = sampler.batch(0).expect("a batch");
    let mut learner = Learner::new(&world.config, device);
    assert!(learner.step(&batch, 1e-3, None).applied);
    let held = |learner: &Learner| -> Vec<Vec<u8>> {
        let all = parameters::collect(&learner.model()).into_iter();
        all.chain(learner.optimizer.tensors())
            .map(|it| (it.read)().as_bytes().to_vec())
            .collect()
    };
    let before = held(&learner);
    let report = learner.step(&batch, 1e-3, Some(0.5));
    assert!(!report.applied && report.is_finite(), "{report:?}");
    assert!(held(&learner) == before, "a spike");
    assert!(learner.carried.iter().all(Option::is_some));
    assert_eq!(learner.optimizer.updates, 1);
    change(&mut learner, |name, values| {
        if name == "embedding.weight" {
            values[16 * usize::from(batch.inputs[0])] = f32::NAN;
        }
    });
    let before = held(&learner);
    for limit in [None, Some(100.0)] {
        let report = learner.step(&batch, 1e-3, limit);
        assert!(!report.applied && !report.is_finite(), "{report:?}");
        assert!(held(&learner) == before, "no number");
        assert!(learner.carried.iter().all(Option::is_none));
    }
    assert_eq!(learner.optimizer.updates, 1);
}

#[cfg(feature = "flex")]
#[test]
fn a_bad_step_changes_nothing_on_the_cpu() {
    a_bad_step_changes_nothing_on(&Device::flex());
}

#[cfg(feature = "wgpu")]
#[test]
fn a_bad_step_changes_nothing_on_a_gpu() {
    a_bad_step_changes_nothing_on(&Device::wgpu(burn::tensor::DeviceKind::DefaultDevice));
}
