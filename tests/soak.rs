//! A long run does not grow: memory, open files, threads and the time of a step stay what they were.
//!
//! `MAMBABYTE_SOAK=10000 cargo test --release --test soak -- --nocapture` does so many steps; a usual
//! run of the tests 600.

#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::time::Duration;

use common::random::number;
use common::{Workspace, train_line};

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    step: u64,
    kib: u64,
    threads: u64,
    files: u64,
}

/// None once the process has ended.
fn held(process: u32, step: u64) -> Option<Held> {
    let folder = format!("/proc/{process}");
    let status = fs::read_to_string(format!("{folder}/status")).ok()?;
    let of = |key: &str| {
        let line = status.lines().find_map(|it| it.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(Held {
        step,
        kib: of("VmRSS:")?,
        threads: of("Threads:")?,
        files: fs::read_dir(format!("{folder}/fd")).ok()?.count() as u64,
    })
}

/// The one in the middle.
fn median<T: PartialOrd + Copy>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort_by(|a, b| a.partial_cmp(b).expect("no NaN"));
    values[values.len() / 2]
}

#[test]
fn a_long_run_does_not_grow() {
    let steps = number("MAMBABYTE_SOAK", 600);
    let workspace = Workspace::new();
    let total = format!("train.steps={steps}");
    let settings = [
        total.as_str(),
        "train.mode=contiguous",
        "checkpoint.every_steps=50",
        "train.validate_every=100",
        "train.validate_bytes=500",
        "train.sample_every=100",
        "train.sample_bytes=20",
    ];
    let running = workspace.start(&train_line("run", &settings, ""));
    let mut samples = Vec::new();
    let done = || {
        // The file is long: only its length matters until the end.
        let metrics = workspace.run("run").join("metrics.jsonl");
        fs::metadata(metrics).map_or(0, |it| it.len())
    };
    while let Some(sample) = held(running.id(), done()) {
        samples.push(sample);
        std::thread::sleep(Duration::from_millis(20));
    }
    let records = workspace.all_records("run");
    let of_kind = |kind| records.iter().filter(move |it| it["kind"] == kind);
    let seconds: Vec<f64> = of_kind("train")
        .filter_map(|it| it["seconds"].as_f64())
        .collect();
    let skipped = of_kind("skip").count();
    assert_eq!(
        (seconds.len() + skipped) as u64,
        steps,
        "the run has ended well"
    );

    // Without the start, in which caches fill, and the end.
    let length = samples.last().map_or(0, |it| it.step);
    samples.retain(|it| (length / 10..length - length / 20).contains(&it.step));
    assert!(samples.len() >= 10, "{} samples", samples.len());
    let part = samples.len() / 5;
    let (first, last) = (&samples[..part], &samples[samples.len() - part..]);
    let kib = [first, last].map(|it| median(it.iter().map(|it| it.kib)));
    // The fewest of each: a save has a thread and files of its own while it lasts.
    let fewest = |part: &[Held], of: fn(&Held) -> u64| part.iter().map(of).min().unwrap_or(0);
    let threads = [first, last].map(|it| fewest(it, |it| it.threads));
    let files = [first, last].map(|it| fewest(it, |it| it.files));
    let part = seconds.len() / 5;
    let [early, late] = [&seconds[part / 2..3 * part / 2], &seconds[4 * part..]]
        .map(|it| 1e3 * median(it.iter().copied()));
    eprintln!(
        "{steps} steps ({skipped} not applied), {} saves; first and last fifth: {kib:?} KiB of memory, \
         {threads:?} threads, {files:?} open files, {early:.2} and {late:.2} ms a step",
        of_kind("save").count(),
    );
    assert!(
        kib[1] <= kib[0] + kib[0] / 50 + 1024,
        "memory grows: {kib:?} KiB"
    );
    // In a short run there may be a save in every look. Were something left of each, it would be
    // there a dozen times.
    assert!(threads[1] <= threads[0] + 1, "threads: {threads:?}");
    assert!(files[1] <= files[0] + 2, "open files: {files:?}");
    // Other programs disturb a short run.
    if steps >= 5000 {
        assert!(
            late < 1.3 * early,
            "steps get slower: {early} and {late} ms"
        );
    }
}
