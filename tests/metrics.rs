//! What a run writes about itself: `metrics.jsonl` and the stored config.

mod common;

use std::collections::BTreeSet;
use std::fs;

use common::Workspace;
use serde_json::Value;

const SETTINGS: [&str; 6] = [
    "train.steps=10",
    "train.validate_every=5",
    "train.validate_bytes=200",
    "train.sample_every=10",
    "train.sample_bytes=16",
    "train.sample_prompt=the",
];

fn keys(record: &Value) -> BTreeSet<&str> {
    let record = record.as_object().expect("an object");
    record.keys().map(String::as_str).collect()
}

#[test]
fn every_kind_of_line_has_its_keys() {
    let workspace = Workspace::new();
    workspace.train("run", &SETTINGS, "--stop-after 5");
    workspace.ok("resume run");
    let records = workspace.all_records("run");
    let text = fs::read_to_string(workspace.run("run").join("metrics.jsonl")).expect("metrics");
    assert_eq!(records.len(), text.lines().count(), "every line is JSON");
    for (kind, count, expected) in [
        (
            "train",
            10,
            &[
                "kind",
                "step",
                "loss_nats",
                "bpb",
                "lr",
                "grad_norm",
                "bytes_per_second",
                "bytes_seen",
                "seconds",
            ][..],
        ),
        ("valid", 2, &["kind", "step", "bpb", "bytes", "seconds"]),
        ("sample", 1, &["kind", "step", "prompt", "text"]),
        ("resume", 1, &["kind", "step", "offset"]),
        (
            "save",
            2,
            &[
                "kind",
                "step",
                "pause_seconds",
                "seconds",
                "bytes",
                "attempts",
            ],
        ),
    ] {
        let of_kind: Vec<_> = records.iter().filter(|it| it["kind"] == kind).collect();
        assert_eq!(of_kind.len(), count, "lines of {kind}");
        for record in of_kind {
            assert_eq!(keys(record), expected.iter().copied().collect(), "{record}");
        }
    }
    let kinds: BTreeSet<_> = records
        .iter()
        .filter_map(|it| it["kind"].as_str())
        .collect();
    assert_eq!(kinds.len(), 5, "{kinds:?}");
}

#[test]
fn values_have_their_meaning() {
    let workspace = Workspace::new();
    workspace.train("run", &SETTINGS, "--stop-after 5");
    workspace.ok("resume run");
    let mut steps = Vec::new();
    for record in workspace.all_records("run") {
        let number = |key: &str| record[key].as_f64().unwrap_or(f64::NAN);
        let step = record["step"].as_u64().expect("a step");
        match record["kind"].as_str() {
            Some("train") => {
                steps.push(step);
                let bits = number("loss_nats") / 2f64.ln();
                assert!((number("bpb") - bits).abs() < 1e-5, "{record}");
                // Two sequences of 64 bytes a step.
                assert_eq!(record["bytes_seen"], 128 * step, "{record}");
                let speed = 128.0 / number("seconds");
                assert!(
                    (number("bytes_per_second") / speed - 1.0).abs() < 1e-6,
                    "{record}"
                );
                assert!(number("lr") > 0.0 && number("grad_norm") > 0.0, "{record}");
            }
            Some("valid") => {
                assert!((1.0..9.0).contains(&number("bpb")), "{record}");
                assert!(number("bytes") >= 200.0, "{record}");
            }
            Some("sample") => {
                assert_eq!(record["prompt"], "the");
                assert!(record["text"].as_str().is_some_and(|it| !it.is_empty()));
            }
            Some("resume") => assert_eq!(step, 5),
            Some("save") => assert!([5, 10].contains(&step), "{record}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(steps, (1..=10).collect::<Vec<u64>>());
}

#[test]
fn lines_can_be_rarer_than_steps() {
    let workspace = Workspace::new();
    workspace.train("run", &["train.steps=10", "train.log_every=3"], "");
    let records = workspace.records("run");
    let train = records.iter().filter(|it| it["kind"] == "train");
    let steps: Vec<_> = train.filter_map(|it| it["step"].as_u64()).collect();
    assert_eq!(steps, [3, 6, 9]);
}

/// The learning rate rises to its peak at the end of the warm-up and ends at its minimum.
#[test]
fn the_learning_rate_follows_the_schedule() {
    let workspace = Workspace::new();
    workspace.train("run", &[], "");
    let rates: Vec<f64> = workspace
        .records("run")
        .iter()
        .filter_map(|it| it["lr"].as_f64())
        .collect();
    assert!((rates[0] - 1e-3).abs() < 1e-12, "{rates:?}");
    assert!((rates[4] - 5e-3).abs() < 1e-12, "{rates:?}");
    assert!((rates[19] - 5e-4).abs() < 1e-12, "{rates:?}");
    assert!(rates[4..].is_sorted_by(|a, b| a >= b), "{rates:?}");
}

/// The stored config has every key, with what the command line changed, and gives the same run.
#[test]
fn the_stored_config_repeats_the_run() {
    let workspace = Workspace::new();
    workspace.train("run", &SETTINGS, "");
    let stored = workspace.run("run").join("config.toml");
    let text = fs::read_to_string(&stored).expect("a stored config");
    for line in [
        "[model]",
        "[train]",
        "[optimizer]",
        "[data]",
        "[checkpoint]",
        "[device]",
        "steps = 10",
        "sample_prompt = \"the\"",
        "dt_rank = \"auto\"",
        "d_state = 16",
        "precision = \"fp32\"",
        "weight_decay = 0.1",
        "keep_best = true",
    ] {
        assert!(
            text.lines().any(|it| it == line),
            "{line} is not in\n{text}"
        );
    }
    workspace.ok("params --config checkpoints/run/config.toml");
    workspace.ok("train --config checkpoints/run/config.toml --run again");
    workspace.assert_same_runs("run", "again", 10);
    let again = fs::read_to_string(workspace.run("again").join("config.toml"));
    assert_eq!(again.expect("a stored config"), text);
}

/// A checkpoint says what it consists of.
#[test]
fn a_manifest_lists_every_file_of_a_checkpoint() {
    let workspace = Workspace::new();
    workspace.train("run", &["train.mode=contiguous"], "");
    let folder = workspace.step("run", 20);
    let manifest = fs::read_to_string(folder.join("manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    assert_eq!(manifest["format"], 1);
    assert_eq!(manifest["step"], 20);
    assert_eq!(manifest["bytes_seen"], 20 * 128);
    let mut listed: Vec<(String, u64)> = manifest["files"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|it| {
            (
                it["name"].as_str().unwrap_or_default().to_owned(),
                it["bytes"].as_u64(),
            )
        })
        .map(|(name, bytes)| (name, bytes.expect("a length")))
        .collect();
    listed.sort();
    let mut found: Vec<(String, u64)> = fs::read_dir(&folder)
        .expect("a folder")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let bytes = entry.metadata().expect("metadata").len();
            (entry.file_name().to_string_lossy().into_owned(), bytes)
        })
        .filter(|(name, _)| name != "manifest.json")
        .collect();
    found.sort();
    assert_eq!(listed, found);
    assert_eq!(
        found.len(),
        4,
        "config, weights, moments, carried states: {found:?}"
    );
}

#[test]
fn old_checkpoints_make_room_for_new_ones() {
    let workspace = Workspace::new();
    let settings = [
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=4",
    ];
    workspace.train("run", &settings, "");
    let mut kept: Vec<u64> = fs::read_dir(workspace.run("run"))
        .expect("a folder")
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().to_string_lossy().into_owned();
            name.strip_prefix("step-")?.parse().ok()
        })
        .collect();
    kept.sort_unstable();
    // The two newest, and every fourth: steps 8 and 16.
    assert_eq!(kept, [8, 16, 18, 20]);
}
