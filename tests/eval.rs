//! `eval` scores every byte once, and its numbers agree with each other.

mod common;

use common::Workspace;
use serde_json::Value;

/// What `eval --json` says of a checkpoint on the test split, or on another that `more` names.
#[track_caller]
fn score(workspace: &Workspace, checkpoint: &str, more: &str) -> Value {
    let line = format!("eval --checkpoint {checkpoint} --data data --device cpu --json {more}");
    workspace.json(&line)
}

fn number(report: &Value, key: &str) -> f64 {
    report[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key} in {report}"))
}

#[test]
fn a_report_agrees_with_the_data_and_with_itself() {
    let workspace = Workspace::new();
    workspace.train("run", &[], "");
    let info = workspace.json("data info data --json");
    for split in ["train", "validation", "test"] {
        let report = score(&workspace, "checkpoints/run", &format!("--split {split}"));
        let keys: Vec<&str> = report
            .as_object()
            .expect("an object")
            .keys()
            .map(String::as_str)
            .collect();
        let mut expected = [
            "bits_per_byte",
            "bytes",
            "nats_per_byte",
            "word_perplexity",
            "words",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);

        assert_eq!(report["bytes"], info[split]["bytes"], "{split}");
        assert_eq!(report["words"], info[split]["words"], "{split}");
        let (nats, bits) = (
            number(&report, "nats_per_byte"),
            number(&report, "bits_per_byte"),
        );
        assert!((bits - nats / 2f64.ln()).abs() < 1e-9, "{report}");
        let words = number(&report, "words");
        let perplexity = (nats * number(&report, "bytes") / words).exp();
        let relative = number(&report, "word_perplexity") / perplexity - 1.0;
        assert!(relative.abs() < 1e-9, "{report}");
    }
}

#[test]
fn words_are_what_lies_between_white_space() {
    let workspace = Workspace::new();
    let info = workspace.json("data info data --json");
    let words: u64 = ["train", "validation", "test"]
        .iter()
        .filter_map(|split| info[split]["words"].as_u64())
        .sum();
    let mut expected = 0;
    for entry in std::fs::read_dir(workspace.path("text")).expect("the text") {
        let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a document");
        expected += text.split_ascii_whitespace().count() as u64;
    }
    assert_eq!(words, expected);
}

#[test]
fn an_untrained_model_is_near_eight_bits() {
    let workspace = Workspace::new();
    workspace.train(
        "run",
        &["optimizer.lr=1e-9", "optimizer.min_lr=0"],
        "--stop-after 1",
    );
    let report = score(&workspace, "checkpoints/run", "");
    let bits = number(&report, "bits_per_byte");
    assert!((bits - 8.0).abs() < 1.0, "{bits}");
}

/// A run stands for its newest checkpoint.
#[test]
fn a_run_and_its_newest_checkpoint_score_alike() {
    let workspace = Workspace::new();
    workspace.train("run", &["checkpoint.every_steps=10"], "");
    let run = score(&workspace, "checkpoints/run", "");
    assert_eq!(run, score(&workspace, "checkpoints/run/step-20", ""));
    assert_ne!(run, score(&workspace, "checkpoints/run/step-10", ""));
}

/// Validation during training is the same measurement.
#[test]
fn validation_and_eval_agree() {
    let workspace = Workspace::new();
    let settings = ["train.validate_every=20", "train.validate_bytes=1000000"];
    workspace.train("run", &settings, "");
    let report = score(&workspace, "checkpoints/run", "--split validation");
    let records = workspace.records("run");
    let valid = records
        .iter()
        .find(|it| it["kind"] == "valid")
        .expect("a validation");
    assert_eq!(valid["bytes"], report["bytes"]);
    let difference = number(valid, "bpb") - number(&report, "bits_per_byte");
    assert!(difference.abs() < 1e-6, "{valid} and {report}");
}
