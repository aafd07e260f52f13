//! A model learns.

mod common;

use common::Workspace;

/// A dozen documents of one sentence, repeated.
fn repetitive() -> Workspace {
    Workspace::with_documents((0..12).map(|i| {
        let sentence = "The cat sat on the mat, and the dog lay by the door. ";
        sentence.repeat(8 + i)
    }))
}

const SETTINGS: [&str; 5] = [
    "train.steps=60",
    "train.batch=4",
    "optimizer.lr=2e-2",
    "train.validate_every=60",
    "train.validate_bytes=100000",
];

/// From eight bits a byte, which is knowing nothing, to below three on text that was not learnt.
#[test]
fn a_repetitive_text_is_learnt_in_sixty_steps() {
    let workspace = repetitive();
    workspace.train("run", &SETTINGS, "");
    let records = workspace.records("run");
    let bpb = |kind: &str| -> Vec<f64> {
        let of_kind = records.iter().filter(|it| it["kind"] == kind);
        of_kind.filter_map(|it| it["bpb"].as_f64()).collect()
    };
    let (train, valid) = (bpb("train"), bpb("valid"));
    assert!(
        (train[0] - 8.0).abs() < 1.0,
        "before learning: {}",
        train[0]
    );
    assert!(train[59] < 3.0, "after learning: {}", train[59]);
    assert_eq!(valid.len(), 1);
    assert!(valid[0] < 3.0, "on held-out text: {}", valid[0]);
}

/// Moments in 8 bits end within a fiftieth of a bit of where those in fp32 do, on held-out text.
#[test]
fn moments_in_8_bits_learn_as_well() {
    let workspace = repetitive();
    let learnt = |state: &str| -> f64 {
        let setting = format!("optimizer.state={state}");
        // Wide enough that most parameters are in blocks.
        let extra = ["model.dim=48", &setting];
        workspace.train(state, &[&SETTINGS[..], &extra].concat(), "");
        let records = workspace.records(state);
        let valid = records.iter().find(|it| it["kind"] == "valid");
        valid.and_then(|it| it["bpb"].as_f64()).expect("a score")
    };
    let (fp32, int8) = (learnt("fp32"), learnt("int8"));
    assert!(fp32 < 3.0, "fp32: {fp32}");
    assert_ne!(fp32, int8, "the setting has an effect");
    assert!((int8 - fp32).abs() < 0.02, "fp32 {fp32}, int8 {int8}");
}

/// The other ways through a step learn as well.
#[test]
fn every_mode_learns() {
    let workspace = repetitive();
    for (run, extra) in [
        ("contiguous", vec!["train.mode=contiguous"]),
        ("recomputed", vec!["train.recompute=all"]),
        ("accumulated", vec!["train.accumulation=2", "train.batch=2"]),
        ("rms", vec!["model.norm=rms", "model.tie_embeddings=true"]),
        ("unfused", vec!["model.use_fast_path=false"]),
    ] {
        workspace.train(run, &[&SETTINGS[..], &extra].concat(), "");
        let last = workspace
            .records(run)
            .into_iter()
            .rfind(|it| it["kind"] == "train");
        let bpb = last.and_then(|it| it["bpb"].as_f64()).expect("a last step");
        assert!(bpb < 3.0, "{run}: {bpb}");
    }
}
