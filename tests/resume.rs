//! A run that was stopped and resumed is the run that was not: the same digits in every step, the
//! same bytes in the last checkpoint.

mod common;

use common::Workspace;

/// Exit code where what was asked for cannot be done.
const USAGE: i32 = 2;
/// Exit code where a checkpoint cannot be used.
const CHECKPOINT: i32 = 4;

/// Runs 20 steps at once, and 10 with 10 more by `resume`.
#[track_caller]
fn split_run_equals_whole(settings: &[&str]) {
    let workspace = Workspace::new();
    workspace.train("whole", settings, "");
    workspace.train("parts", settings, "--stop-after 10");
    workspace.ok("resume checkpoints/parts");
    workspace.assert_same_runs("whole", "parts", 20);
}

#[test]
fn independent_windows() {
    split_run_equals_whole(&["train.mode=independent"]);
}

#[test]
fn contiguous_lanes_with_carried_states() {
    split_run_equals_whole(&["train.mode=contiguous"]);
}

#[test]
fn accumulated_batches() {
    split_run_equals_whole(&["train.accumulation=2"]);
}

#[test]
fn accumulated_batches_of_contiguous_lanes() {
    split_run_equals_whole(&["train.mode=contiguous", "train.accumulation=2"]);
}

#[test]
fn recomputed_layers() {
    split_run_equals_whole(&["train.recompute=all"]);
}

#[test]
fn one_recomputed_layer_of_contiguous_lanes() {
    split_run_equals_whole(&["train.mode=contiguous", "train.recompute=1"]);
}

#[test]
fn rms_norm_and_a_tied_head() {
    split_run_equals_whole(&["model.norm=rms", "model.tie_embeddings=true"]);
}

/// Large enough for matrices in 8 bits, whose last blocks are not full, beside vectors in fp32.
const INT8: [&str; 2] = ["model.dim=50", "optimizer.state=int8"];

#[test]
fn moments_in_8_bits() {
    split_run_equals_whole(&INT8);
}

#[test]
fn moments_in_8_bits_with_accumulated_batches_of_contiguous_lanes() {
    let more = ["train.mode=contiguous", "train.accumulation=2"];
    split_run_equals_whole(&[&INT8[..], &more].concat());
}

/// Moments in one form are not made of those in the other.
#[test]
fn moments_in_the_other_form_are_refused() {
    let workspace = Workspace::new();
    for (here, other) in [("fp32", "int8"), ("int8", "fp32")] {
        let setting = format!("optimizer.state={here}");
        workspace.train(here, &["model.dim=50", &setting], "--stop-after 3");
        let file = workspace.run(here).join("config.toml");
        let config = std::fs::read_to_string(&file).expect("the run's config");
        let line = |state| format!("state = \"{state}\"");
        let edited = config.replace(&line(here), &line(other));
        assert_ne!(edited, config);
        std::fs::write(&file, edited).expect("writable");
        let saved = "the run's config is not that of its newest checkpoint, step 3".to_owned();
        let wanted = format!("`optimizer.state` was \"{here}\", and is \"{other}\"");
        let resume = format!("resume {here}");
        workspace.fails(&resume, CHECKPOINT, &[&saved, &wanted, "hint:"]);
        assert_eq!(workspace.newest(here), 3);
        std::fs::write(&file, config).expect("writable");
        workspace.ok(&format!("resume {here} --stop-after 1"));
        assert_eq!(workspace.newest(here), 4);
    }
}

#[test]
fn many_short_parts_equal_the_whole() {
    let settings = &["train.mode=contiguous"];
    let workspace = Workspace::new();
    workspace.train("whole", settings, "");
    workspace.train("parts", settings, "--stop-after 1");
    for steps in [1, 2, 7, 4] {
        workspace.ok(&format!("resume checkpoints/parts --stop-after {steps}"));
    }
    // More than there are.
    workspace.ok(&format!("resume parts --stop-after {}", u64::MAX));
    workspace.assert_same_runs("whole", "parts", 20);
}

#[test]
fn recomputation_changes_nothing() {
    let workspace = Workspace::new();
    for mode in ["independent", "contiguous"] {
        let mode_setting = format!("train.mode={mode}");
        let plain = format!("{mode}-none");
        workspace.train(&plain, &[&mode_setting, "train.accumulation=2"], "");
        for layers in ["all", "1"] {
            let run = format!("{mode}-{layers}");
            let recompute = format!("train.recompute={layers}");
            workspace.train(
                &run,
                &[&mode_setting, "train.accumulation=2", &recompute],
                "",
            );
            workspace.assert_same_runs(&plain, &run, 20);
        }
    }
}

/// Groups of layers change memory and time: not the losses, the weights or the moments.
#[test]
fn groups_of_layers_change_nothing() {
    let workspace = Workspace::new();
    for (name, settings) in [
        ("plain", &["model.norm=rms"][..]),
        ("contiguous", &["train.mode=contiguous"]),
        ("accumulated", &["train.accumulation=2"]),
        (
            "all",
            &[
                "train.mode=contiguous",
                "train.accumulation=2",
                "train.recompute=1",
            ],
        ),
        // Head and embedding are one weight: its gradient has a part from either end.
        (
            "tied",
            &["model.tie_embeddings=true", "train.accumulation=3"],
        ),
        ("int8", &INT8),
        ("unfused", &["model.use_fast_path=false"]),
    ] {
        let depth = "model.depth=3";
        let without = format!("{name}-0");
        workspace.train(&without, &[settings, &[depth]].concat(), "");
        for every in 1..=3 {
            let run = format!("{name}-{every}");
            let setting = format!("train.checkpoint_every={every}");
            workspace.train(&run, &[settings, &[depth, &setting]].concat(), "");
            workspace.assert_same_runs(&without, &run, 20);
        }
    }
}

#[test]
fn groups_of_layers_of_contiguous_lanes() {
    split_run_equals_whole(&["train.mode=contiguous", "train.checkpoint_every=1"]);
}

#[test]
fn two_fresh_runs_are_identical() {
    let workspace = Workspace::new();
    for run in ["first", "second"] {
        workspace.train(run, &[], "");
    }
    workspace.assert_same_runs("first", "second", 20);
}

#[test]
fn another_seed_is_another_run() {
    let workspace = Workspace::new();
    workspace.train("first", &[], "");
    workspace.train("second", &["train.seed=1"], "");
    assert_ne!(workspace.measured("first"), workspace.measured("second"));
}

/// Validation, samples and checkpoints look at a run and leave it alone.
#[test]
fn what_happens_between_steps_changes_nothing() {
    let workspace = Workspace::new();
    workspace.train("quiet", &[], "");
    let settings = [
        "train.validate_every=3",
        "train.validate_bytes=100",
        "train.sample_every=4",
        "train.sample_bytes=5",
        "checkpoint.every_steps=2",
    ];
    workspace.train("busy", &settings, "");
    workspace.assert_same_runs("quiet", "busy", 20);
}

/// More steps than any of these tests does: a run that is stopped from outside has not ended.
const ENDLESS: &str = "train.steps=1000000";

/// Power that fails, or a process that is killed, costs the steps since the last checkpoint.
#[test]
fn a_killed_run_can_be_resumed() {
    for mode in ["independent", "contiguous"] {
        let workspace = Workspace::new();
        let mode = format!("train.mode={mode}");
        let settings = [ENDLESS, "checkpoint.every_steps=20", &mode];
        let begin = common::train_line("killed", &settings, "");
        for (line, steps) in [(begin.as_str(), 30), ("resume killed", 90)] {
            let running = workspace.start(line);
            common::wait_until("the run is under way", || {
                let last = workspace.all_records("killed").pop();
                last.is_some_and(|it| it["step"].as_u64() >= Some(steps))
            });
            running.kill();
        }
        let end = workspace.newest("killed") + 30;
        workspace.ok("resume killed --stop-after 30");
        workspace.train("whole", &settings, &format!("--stop-after {end}"));
        workspace.assert_same_runs("whole", "killed", end);
    }
}

/// Killed before there is any checkpoint: the run begins again, under the same name.
#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let workspace = Workspace::new();
    let running = workspace.start(&common::train_line("killed", &[ENDLESS], ""));
    common::wait_until("the run is under way", || {
        !workspace.all_records("killed").is_empty()
    });
    running.kill();
    workspace.ok("resume killed --stop-after 30");
    workspace.train("whole", &[ENDLESS], "--stop-after 30");
    workspace.assert_same_runs("whole", "killed", 30);
}

/// The same where the run began with another's weights: it begins with them again, whatever has
/// become of the other run.
#[test]
fn a_run_with_init_killed_before_its_first_checkpoint_begins_again() {
    let workspace = Workspace::new();
    workspace.train("base", &[], "");
    let base = "--init checkpoints/base";
    let settings = [ENDLESS, "train.seed=5"];
    workspace.train("whole", &settings, &format!("{base} --stop-after 30"));
    let running = workspace.start(&common::train_line("killed", &settings, base));
    common::wait_until("the run is under way", || {
        !workspace.of_kind("killed", "train").is_empty()
    });
    running.kill();
    std::fs::remove_dir_all(workspace.run("base")).expect("removed");
    workspace.ok("resume killed --stop-after 30");
    workspace.assert_same_runs("whole", "killed", 30);
    // A checkpoint without a run is nobody's to go on with.
    std::fs::remove_file(workspace.run("killed").join("config.toml")).expect("removed");
    let line = common::train_line("killed", &settings, "--stop-after 1");
    workspace.fails(&line, USAGE, &["step 30", "no `config.toml`", "hint:"]);
}

/// Ctrl-C and SIGTERM save before they stop.
#[test]
fn an_interrupted_run_saves_and_can_be_resumed() {
    let workspace = Workspace::new();
    let settings = [ENDLESS, "train.mode=contiguous"];
    for signal in ["INT", "TERM"] {
        let running = workspace.start(&common::train_line(signal, &settings, ""));
        common::wait_until("the run is under way", || {
            workspace.all_records(signal).len() >= 5
        });
        assert_eq!(
            running.signal(signal),
            Some(130),
            "exit code after SIG{signal}"
        );
        let last = workspace.all_records(signal).pop().expect("records");
        let saved = workspace.newest(signal);
        assert_eq!(
            last["step"], saved,
            "the step it was in is finished and saved"
        );

        let end = saved + 10;
        workspace.ok(&format!("resume {signal} --stop-after 10"));
        let whole = format!("whole-{signal}");
        workspace.train(&whole, &settings, &format!("--stop-after {end}"));
        workspace.assert_same_runs(&whole, signal, end);
    }
}

/// What a crash in the middle of a save leaves is neither used nor in the way.
#[test]
fn an_unfinished_checkpoint_is_passed_over() {
    let workspace = Workspace::new();
    let settings = ["checkpoint.every_steps=5"];
    workspace.train("whole", &settings, "");
    workspace.train("parts", &settings, "--stop-after 10");
    let newest = workspace.step("parts", 10);
    std::fs::rename(&newest, workspace.run("parts").join("step-15.tmp")).expect("renamed");
    std::fs::create_dir(&newest).expect("a folder without a manifest");
    workspace.ok("resume parts");
    workspace.assert_same_runs("whole", "parts", 20);
    assert!(!workspace.run("parts").join("step-15.tmp").exists());
}
