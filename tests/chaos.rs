//! Killed anywhere, any number of times, a run has lost nothing that was saved and ends as the run
//! that nobody touched: the same digits in every step, the same bytes in the last checkpoint.
//!
//! `make chaos SECONDS=600` goes on for so long; a usual run of the tests does a few rounds.
//! `MAMBABYTE_CHAOS_SEED` chooses other moments.

#![cfg(unix)]

mod common;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use common::random::{Random, number};
use common::{Workspace, train_line};
use mambabyte::train::Checkpoint;

const SIGKILL: i32 = 9;

/// Enough steps for some saves, of which old ones are deleted again.
const SETTINGS: [&str; 4] = [
    "train.mode=contiguous",
    "train.steps=12",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=2",
];

/// Repeats a round `usual` times, or for the time that the environment gives.
fn rounds(usual: u64, mut round: impl FnMut(u64)) -> u64 {
    let seconds = number("MAMBABYTE_CHAOS_SECONDS", 0);
    let started = Instant::now();
    let mut done = 0;
    while done < usual || started.elapsed() < Duration::from_secs(seconds) {
        round(done);
        done += 1;
    }
    done
}

fn greatest_divisor(a: u64, b: u64) -> u64 {
    match b {
        0 => a,
        b => greatest_divisor(b, a % b),
    }
}

fn random() -> Random {
    Random(number("MAMBABYTE_CHAOS_SEED", 4740).wrapping_mul(2) | 1)
}

/// Fails unless every checkpoint of the run is whole; returns the newest step, or 0.
#[track_caller]
fn newest_whole(workspace: &Workspace, run: &str) -> u64 {
    let Ok(entries) = fs::read_dir(workspace.run(run)) else {
        return 0;
    };
    let folders: Vec<PathBuf> = entries.filter_map(|it| Some(it.ok()?.path())).collect();
    let mut newest = 0;
    for folder in folders {
        let name = folder.file_name().and_then(|it| it.to_str());
        let step = name.and_then(|it| it.strip_prefix("step-"));
        let Some(Ok(step)) = step.map(str::parse::<u64>) else {
            continue;
        };
        if folder.join("manifest.json").exists() {
            Checkpoint::open(&folder).unwrap_or_else(|e| panic!("{}", e.report()));
            newest = newest.max(step);
        }
    }
    newest
}

/// What brings the run on: `resume`, or `train` where it had not begun.
fn go_on(workspace: &Workspace, run: &str) -> String {
    match workspace.run(run).join("config.toml").exists() {
        true => format!("resume {run}"),
        false => train_line(run, &SETTINGS, ""),
    }
}

/// Whether the program was killed; it may else only have ended well.
#[track_caller]
fn was_killed(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("panicked at"), "{said}");
    if output.status.signal() == Some(SIGKILL) {
        return true;
    }
    assert!(output.status.success(), "{}\n{said}", output.status);
    false
}

/// Every call by which a run changes its folder is a moment at which it may be killed: when it is
/// created, in each save, while old checkpoints are deleted, in the middle of a line.
#[test]
fn killed_at_any_call_that_changes_a_file() {
    if !common::can_inject_faults("killed at any call that changes a file") {
        return;
    }
    let workspace = Workspace::new();
    workspace.train("whole", &SETTINGS, "");
    let all = workspace.path("calls");
    let path = all.to_str().expect("UTF-8");
    let faults = [("FAULT_PATH", "checkpoints/counted"), ("FAULT_LOG", path)];
    let counted = workspace.faulty(&train_line("counted", &SETTINGS, ""), &faults);
    assert!(counted.status.success());
    let calls = fs::read_to_string(&all).expect("the number of calls");
    let calls: u64 = calls.trim().parse().expect("a number");
    assert!(calls > 80, "{calls}");

    // A stride without a common factor: over so many rounds as there are calls, all are met.
    let stride = (13..).find(|stride| greatest_divisor(*stride, calls) == 1);
    let stride = stride.expect("a prime, at the latest");
    let kills = rounds(calls.div_ceil(stride), |round| {
        let run = format!("run-{round}");
        let at = (1 + round * stride % calls).to_string();
        for how in ["kill", "torn"] {
            let path = format!("checkpoints/{run}");
            let faults = [
                ("FAULT_PATH", path.as_str()),
                ("FAULT_AT", &at),
                ("FAULT_DO", how),
            ];
            let output = workspace.faulty(&train_line(&run, &SETTINGS, ""), &faults);
            assert!(was_killed(&output), "{how} at call {at} of {calls}");
            newest_whole(&workspace, &run);
            workspace.ok(&go_on(&workspace, &run));
            workspace.assert_same_runs("whole", &run, 12);
            fs::remove_dir_all(workspace.run(&run)).expect("removed");
        }
    });
    eprintln!(
        "killed at {} of {calls} calls, in {} runs",
        kills.min(calls),
        2 * kills
    );
}

/// Killed at any call with which a run from another's weights begins: it is that run or none.
#[test]
fn killed_at_the_start_of_a_run_with_init() {
    if !common::can_inject_faults("killed at the start of a run with init") {
        return;
    }
    let workspace = Workspace::new();
    workspace.train("base", &SETTINGS, "");
    let begin = |run: &str| train_line(run, &SETTINGS, "--init checkpoints/base");
    workspace.ok(&begin("whole"));
    for at in 1..=24 {
        let run = format!("run-{at}");
        let (path, at) = (format!("checkpoints/{run}"), at.to_string());
        let faults = [
            ("FAULT_PATH", path.as_str()),
            ("FAULT_AT", &at),
            ("FAULT_DO", "kill"),
        ];
        assert!(was_killed(&workspace.faulty(&begin(&run), &faults)), "{at}");
        workspace.ok(&match workspace.run(&run).join("config.toml").exists() {
            true => format!("resume {run}"),
            false => begin(&run),
        });
        workspace.assert_same_runs("whole", &run, 12);
    }
}

/// Killed in the middle of deleting an old checkpoint: the rest of it goes with the next start.
#[test]
fn killed_while_a_checkpoint_is_deleted() {
    if !common::can_inject_faults("killed while a checkpoint is deleted") {
        return;
    }
    let workspace = Workspace::new();
    workspace.train("whole", &SETTINGS, "");
    for at in ["1", "2", "3"] {
        let run = format!("run-{at}");
        let path = format!("checkpoints/{run}");
        let faults = [
            ("FAULT_PATH", path.as_str()),
            ("FAULT_CALLS", "unlink"),
            ("FAULT_AT", at),
            ("FAULT_DO", "kill"),
        ];
        let output = workspace.faulty(&train_line(&run, &SETTINGS, ""), &faults);
        assert!(was_killed(&output), "at deletion {at}");
        workspace.ok(&format!("resume {run}"));
        workspace.assert_same_runs("whole", &run, 12);
        let names = |run: &str| -> BTreeSet<OsString> {
            let entries = fs::read_dir(workspace.run(run)).expect("the folder of the run");
            entries
                .filter_map(|it| Some(it.ok()?.file_name()))
                .collect()
        };
        assert_eq!(names(&run), names("whole"));
    }
}

/// A run that is killed again and again, also while it is being resumed.
#[test]
fn killed_again_and_again() {
    if !common::can_inject_faults("killed again and again") {
        return;
    }
    let workspace = Workspace::new();
    workspace.train("whole", &SETTINGS, "");
    let mut random = random();
    let mut kills = 0u64;
    let runs = rounds(4, |round| {
        let run = format!("run-{round}");
        let path = format!("checkpoints/{run}");
        let mut saved = 0;
        for _ in 0..6 {
            let at = (1 + random.below(90)).to_string();
            let faults = [
                ("FAULT_PATH", path.as_str()),
                ("FAULT_AT", &at),
                ("FAULT_DO", random.of(&["kill", "torn"])),
            ];
            let output = workspace.faulty(&go_on(&workspace, &run), &faults);
            kills += u64::from(was_killed(&output));
            let now = newest_whole(&workspace, &run);
            assert!(now >= saved, "step {saved} was saved, and is lost: {now}");
            saved = now;
        }
        workspace.ok(&go_on(&workspace, &run));
        workspace.assert_same_runs("whole", &run, 12);
        fs::remove_dir_all(workspace.run(&run)).expect("removed");
    });
    eprintln!("{runs} runs, killed {kills} times together");
}

/// The same without any help of the test's: SIGKILL at random moments of a long run.
#[test]
fn killed_at_random_moments() {
    let workspace = Workspace::new();
    let settings = [
        "train.mode=contiguous",
        "train.steps=1000000",
        "checkpoint.every_steps=5",
        "train.validate_every=7",
        "train.validate_bytes=200",
    ];
    let mut random = random();
    let mut saved = 0;
    let kills = rounds(12, |_| {
        let line = match workspace.run("killed").join("config.toml").exists() {
            true => "resume killed".to_owned(),
            false => train_line("killed", &settings, ""),
        };
        let running = workspace.start(&line);
        thread::sleep(Duration::from_millis(30 + random.below(270) as u64));
        running.kill();
        let now = newest_whole(&workspace, "killed");
        assert!(now >= saved, "step {saved} was saved, and is lost: {now}");
        saved = now;
    });
    workspace.ok(&match saved {
        0 => train_line("other", &settings, "--stop-after 1"),
        _ => "resume killed --stop-after 10".to_owned(),
    });
    assert!(saved > 0, "nothing was saved in {kills} rounds");
    let end = saved + 10;
    workspace.train("whole", &settings, &format!("--stop-after {end}"));
    workspace.assert_same_runs("whole", "killed", end);
    eprintln!("killed {kills} times within {end} steps");
}

/// Signals as early as can be: there may be nothing to save yet, and the run begins again.
#[test]
fn stopped_before_the_first_step() {
    let workspace = Workspace::new();
    let settings = ["train.steps=12"];
    workspace.train("whole", &settings, "");
    let mut random = random();
    let stops = rounds(4, |round| {
        let run = format!("early-{round}");
        let running = workspace.start(&train_line(&run, &settings, ""));
        common::wait_until("the run has begun", || {
            workspace.run(&run).join("metrics.jsonl").exists()
        });
        thread::sleep(Duration::from_micros(random.below(4000) as u64));
        let code = running.signal("TERM");
        // Before the program watches for signals it ends as any other does.
        assert!(matches!(code, Some(130 | 0) | None), "{code:?}");
        newest_whole(&workspace, &run);
        if code != Some(0) {
            workspace.ok(&format!("resume {run}"));
        }
        workspace.assert_same_runs("whole", &run, 12);
        fs::remove_dir_all(workspace.run(&run)).expect("removed");
    });
    eprintln!("stopped {stops} times at the start");
}

/// Signals at random moments: the step is finished and saved, whatever else is going on.
#[test]
fn stopped_at_random_moments() {
    let workspace = Workspace::new();
    let settings = ["train.steps=1000000", "checkpoint.every_steps=4"];
    let mut random = random();
    workspace.train("stopped", &settings, "--stop-after 1");
    let stops = rounds(4, |_| {
        let before = workspace.all_records("stopped").len();
        let running = workspace.start("resume stopped");
        common::wait_until("the run is under way", || {
            workspace.all_records("stopped").len() > before + 1
        });
        thread::sleep(Duration::from_millis(random.below(100) as u64));
        let signal = random.of(&["INT", "TERM", "HUP"]);
        assert_eq!(
            running.signal(signal),
            Some(130),
            "exit code after SIG{signal}"
        );
        let records = workspace.records("stopped");
        let last = records.iter().rfind(|it| it["kind"] == "train");
        let last = last.and_then(|it| it["step"].as_u64());
        assert_eq!(last, Some(newest_whole(&workspace, "stopped")));
    });
    let end = newest_whole(&workspace, "stopped");
    workspace.train("whole", &settings, &format!("--stop-after {end}"));
    workspace.assert_same_runs("whole", "stopped", end);
    eprintln!("stopped {stops} times within {end} steps");
}
