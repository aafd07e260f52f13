//! Disks and data that fail: training goes on where it can, loses nothing that was saved, says what is
//! wrong, and goes on to the same end when it is put right.

#![cfg(unix)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{
    PROGRAM, Running, Workspace, assert_failed, contents, skipped, train_line, wait_until,
};
use mambabyte::train::Checkpoint;
use serde_json::Value;

const UNEXPECTED: i32 = 1;
const DATA: i32 = 3;
const CHECKPOINT: i32 = 4;
const INTERRUPTED: i32 = 130;

const SETTINGS: [&str; 1] = ["checkpoint.every_steps=5"];

/// More steps than any of these tests does.
const ENDLESS: &str = "train.steps=1000000";

/// Every file of a run's checkpoints.
fn checkpoints(workspace: &Workspace, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = contents(&workspace.run(run));
    files.retain(|path, _| {
        path.components()
            .any(|it| it.as_os_str().to_string_lossy().starts_with("step-"))
    });
    files
}

/// Records of a kind.
fn of_kind(workspace: &Workspace, run: &str, kind: &str) -> Vec<Value> {
    let mut records = workspace.all_records(run);
    records.retain(|it| it["kind"] == kind);
    records
}

/// What a program that ended well said.
#[track_caller]
fn well(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{said}", output.status);
    assert!(!said.contains("panicked at"), "{said}");
    said
}

/// A run that goes on from step 5 on a disk with these faults, to step 20.
fn resumed(workspace: &Workspace, faults: &[(&str, &str)]) -> Output {
    workspace.train("whole", &SETTINGS, "");
    workspace.train("run", &SETTINGS, "--stop-after 5");
    workspace.faulty("resume run", faults)
}

mod disk {
    use super::*;

    /// Full for a while: saves and metrics fail, training goes on, and nothing is missing after.
    #[test]
    fn a_disk_that_is_full_for_a_while() {
        if !common::can_inject_faults("a disk that is full for a while") {
            return;
        }
        let workspace = Workspace::new();
        let faults = [
            ("FAULT_PATH", "checkpoints/run"),
            ("FAULT_CALLS", "write"),
            ("FAULT_AT", "4"),
            ("FAULT_COUNT", "12"),
            ("FAULT_DO", "ENOSPC"),
        ];
        let said = well(&resumed(&workspace, &faults));
        assert!(said.contains("metrics wait in memory"), "{said}");
        assert!(said.contains("could not be saved"), "{said}");
        let saves = of_kind(&workspace, "run", "save");
        let failed: Vec<_> = saves
            .iter()
            .filter(|it| it.get("error").is_some())
            .collect();
        assert!(
            !failed.is_empty() && failed.len() < saves.len(),
            "{saves:?}"
        );
        assert!(
            failed[0]["error"]
                .as_str()
                .is_some_and(|it| it.contains("No space left"))
        );
        workspace.assert_same_runs("whole", "run", 20);
    }

    /// Full to the end: what was saved before is whole, and with room the run goes on.
    #[test]
    fn a_write_that_fails() {
        let workspace = Workspace::new();
        workspace.train("whole", &SETTINGS, "");
        workspace.train("run", &SETTINGS, "--stop-after 5");
        let before = checkpoints(&workspace, "run");

        // No file may have more than 100 blocks, of 512 or of 1024 bytes: less than AdamW's moments.
        let mut limited = Command::new("sh");
        let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" resume run";
        limited.args(["-c", script, PROGRAM]);
        let output = workspace.prepared(limited).output().expect("sh is there");
        let words = [
            "step 10 could not be saved",
            "step 15 could not be saved",
            "training goes on",
            "error: could not write",
            "step-20",
            "safetensors",
            "hint:",
        ];
        assert_failed(
            &output,
            "resume run, with limited files",
            UNEXPECTED,
            &words,
        );
        assert_eq!(checkpoints(&workspace, "run"), before);
        let left = fs::read_dir(workspace.run("run")).expect("a folder");
        let left: Vec<_> = left.filter_map(|it| Some(it.ok()?.file_name())).collect();
        assert!(
            !left.iter().any(|it| it.to_string_lossy().ends_with(".tmp")),
            "{left:?}"
        );

        workspace.ok("resume run");
        workspace.assert_same_runs("whole", "run", 20);
    }

    /// The same with a small file system that is really full.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_small_disk_that_is_full() {
        let workspace = Workspace::new();
        let settings = ["checkpoint.every_steps=1", "checkpoint.keep_last=100"];
        workspace.train("whole", &settings, "");

        let disk = workspace.path("disk");
        fs::create_dir(&disk).expect("a folder");
        let Some(mounted) = TinyDisk::mount(&disk, "1m") else {
            skipped(
                "a small disk that is full",
                "this user may not mount a tmpfs",
            );
            return;
        };
        let settings = [&settings[..], &["checkpoint.dir=disk"]].concat();
        let line = train_line("run", &settings, "");
        let words = [
            "could not be saved",
            "training goes on",
            "error: could not",
            "hint:",
        ];
        workspace.fails(&line, UNEXPECTED, &words);
        let steps = |folder: &Path| -> Vec<PathBuf> {
            let entries = fs::read_dir(folder).expect("a folder");
            let paths = entries.filter_map(|it| Some(it.ok()?.path()));
            let mut steps: Vec<_> = paths
                .filter(|it| it.join("manifest.json").is_file())
                .collect();
            steps.sort();
            steps
        };
        let saved = steps(&disk.join("run"));
        assert!((2..20).contains(&saved.len()), "{saved:?}");
        for folder in &saved {
            Checkpoint::open(folder).expect("whole");
        }

        mounted.resize("20m");
        workspace.ok("resume disk/run");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let there = fs::read(disk.join("run/step-20").join(file)).expect("a checkpoint");
            let whole = fs::read(workspace.step("whole", 20).join(file)).expect("a checkpoint");
            assert!(there == whole, "{file}");
        }
    }

    /// A small file system, gone when dropped.
    #[cfg(target_os = "linux")]
    struct TinyDisk<'a>(&'a Path);

    #[cfg(target_os = "linux")]
    impl<'a> TinyDisk<'a> {
        fn mount(at: &'a Path, size: &str) -> Option<Self> {
            let size = format!("size={size}");
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at);
            mount.output().ok()?.status.success().then_some(Self(at))
        }

        fn resize(&self, size: &str) {
            let options = format!("remount,size={size}");
            let mut mount = Command::new("mount");
            mount.args(["-o", &options]).arg(self.0);
            assert!(mount.status().expect("mount is there").success());
        }
    }

    #[cfg(target_os = "linux")]
    impl Drop for TinyDisk<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }

    /// Read-only from some moment on, as a disk is after errors: training goes on to its end, and the
    /// end says that it is not saved.
    #[test]
    fn a_disk_that_becomes_read_only() {
        if !common::can_inject_faults("a disk that becomes read-only") {
            return;
        }
        let workspace = Workspace::new();
        let faults = [
            ("FAULT_PATH", "checkpoints/run"),
            ("FAULT_AT", "10"),
            ("FAULT_COUNT", "0"),
            ("FAULT_DO", "EROFS"),
        ];
        let output = resumed(&workspace, &faults);
        let words = [
            "step 10 could not be saved",
            "error: could not",
            "step-20",
            "hint:",
        ];
        assert_failed(&output, "resume run", UNEXPECTED, &words);
        assert_eq!(workspace.newest("run"), 5);
        Checkpoint::open(&workspace.step("run", 5)).expect("whole");
        workspace.ok("resume run");
        workspace.assert_same_runs("whole", "run", 20);
    }

    /// A folder that may not be written at all is an error before any step.
    #[test]
    fn a_folder_that_may_not_be_written() {
        let workspace = Workspace::new();
        let folder = workspace.path("locked");
        fs::create_dir(&folder).expect("a folder");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).expect("changed");
        let line = train_line("run", &["checkpoint.dir=locked"], "");
        let mut command = workspace.command(&line);
        if fs::write(folder.join("probe"), "").is_ok() {
            // Root may write everywhere: another user tries.
            use std::os::unix::process::CommandExt as _;
            let open = fs::Permissions::from_mode(0o755);
            fs::set_permissions(workspace.path("."), open).expect("changed");
            command.uid(65_534);
        }
        let Ok(output) = command.output() else {
            skipped(
                "a folder that may not be written",
                "this user may write everywhere",
            );
            return;
        };
        let words = ["could not create", "locked/run", "hint:"];
        assert_failed(&output, &line, UNEXPECTED, &words);
    }

    /// Errors that pass are tried again.
    #[test]
    fn an_error_that_passes() {
        if !common::can_inject_faults("an error that passes") {
            return;
        }
        let workspace = Workspace::new();
        let faults = [
            ("FAULT_PATH", "step-10.tmp"),
            ("FAULT_CALLS", "sync"),
            ("FAULT_AT", "2"),
            ("FAULT_DO", "EIO"),
        ];
        let said = well(&resumed(&workspace, &faults));
        assert!(said.contains("saving step 10 is tried again"), "{said}");
        workspace.assert_same_runs("whole", "run", 20);
        let saves = of_kind(&workspace, "run", "save");
        let of_10 = saves.iter().find(|it| it["step"] == 10).expect("a record");
        assert_eq!(of_10["attempts"], 2);
        assert!(of_10.get("error").is_none(), "{of_10}");
    }

    /// Writes that do less than they were asked, and say so, are no fault at all.
    #[test]
    fn short_writes() {
        if !common::can_inject_faults("short writes") {
            return;
        }
        let workspace = Workspace::new();
        let faults = [
            ("FAULT_PATH", "checkpoints/run"),
            ("FAULT_CALLS", "write"),
            ("FAULT_AT", "1"),
            ("FAULT_COUNT", "0"),
            ("FAULT_DO", "short"),
        ];
        let said = well(&resumed(&workspace, &faults));
        assert!(!said.contains("could not"), "{said}");
        workspace.assert_same_runs("whole", "run", 20);
    }

    /// A disk that says it wrote and did not, or wrote something else: reading back finds it.
    #[test]
    fn writes_that_lie() {
        if !common::can_inject_faults("writes that lie") {
            return;
        }
        for fault in ["lose", "flip"] {
            for call in ["1", "2", "3", "4"] {
                let workspace = Workspace::new();
                let faults = [
                    ("FAULT_PATH", "step-10.tmp"),
                    ("FAULT_CALLS", "write"),
                    ("FAULT_AT", call),
                    ("FAULT_DO", fault),
                ];
                let said = well(&resumed(&workspace, &faults));
                let words = ["saving step 10 is tried again", "the disk does not hold"];
                assert!(
                    words.iter().all(|it| said.contains(it)),
                    "{fault} {call}: {said}"
                );
                workspace.assert_same_runs("whole", "run", 20);
            }
        }
    }

    /// A slow disk costs training the copy in memory, not the writing.
    #[test]
    fn slow_writes() {
        if !common::can_inject_faults("slow writes") {
            return;
        }
        let workspace = Workspace::new();
        let faults = [
            ("FAULT_PATH", "step-10.tmp"),
            ("FAULT_AT", "1"),
            ("FAULT_COUNT", "0"),
            ("FAULT_DO", "slow"),
            ("FAULT_MS", "150"),
        ];
        well(&resumed(&workspace, &faults));
        workspace.assert_same_runs("whole", "run", 20);
        let saves = of_kind(&workspace, "run", "save");
        let save = saves.iter().find(|it| it["step"] == 10).expect("a record");
        let [pause, seconds] = ["pause_seconds", "seconds"].map(|key| save[key].as_f64());
        let (pause, seconds) = (pause.expect("a pause"), seconds.expect("a time"));
        assert!(seconds > 1.0, "ten calls and more are slow: {seconds}");
        assert!(
            pause < seconds / 5.0,
            "training waited {pause} of {seconds} s"
        );
    }

    /// A second signal does not wait for a save, and a save that is cut off costs nothing.
    #[test]
    fn a_second_signal_stops_at_once() {
        if !common::can_inject_faults("a second signal stops at once") {
            return;
        }
        let workspace = Workspace::new();
        let settings = [ENDLESS, "checkpoint.every_steps=5"];
        workspace.train("run", &settings, "--stop-after 5");
        let mut command = workspace.command("resume run");
        let faults = [
            (
                "LD_PRELOAD",
                common::fault_library()
                    .expect("built")
                    .to_str()
                    .expect("UTF-8"),
            ),
            ("FAULT_PATH", ".tmp"),
            ("FAULT_AT", "1"),
            ("FAULT_COUNT", "0"),
            ("FAULT_DO", "slow"),
            ("FAULT_MS", "60000"),
        ];
        command.envs(faults);
        let running = Running::of(command);
        wait_until("a save has begun", || {
            workspace.run("run").join("step-10.tmp").exists()
                || workspace
                    .all_records("run")
                    .iter()
                    .any(|it| it["step"].as_u64() >= Some(10))
        });
        running.send("TERM");
        std::thread::sleep(Duration::from_millis(300));
        let sent = Instant::now();
        assert_eq!(running.signal("TERM"), Some(INTERRUPTED));
        assert!(
            sent.elapsed() < Duration::from_secs(5),
            "{:?}",
            sent.elapsed()
        );
        assert_eq!(workspace.newest("run"), 5);
        workspace.ok("resume run --stop-after 10");
        workspace.train("whole", &settings, "--stop-after 15");
        workspace.assert_same_runs("whole", "run", 15);
    }
}

mod checkpoint {
    use super::*;

    /// One flipped bit, in any file of the newest checkpoint: it is named and passed over, the one
    /// before is used, and the run ends as it would have.
    #[test]
    fn one_flipped_bit_anywhere() {
        let workspace = Workspace::new();
        let settings = ["checkpoint.every_steps=5", "train.mode=contiguous"];
        workspace.train("whole", &settings, "");
        workspace.train("run", &settings, "--stop-after 10");
        let saved = contents(&workspace.run("run"));
        let mut random = common::random::Random(4740);
        let names = [
            "manifest.json",
            "config.toml",
            "model.safetensors",
            "optimizer.safetensors",
            "state.safetensors",
        ];
        for round in 0..2 * names.len() {
            let name = names[round % names.len()];
            let path = workspace.step("run", 10).join(name);
            let mut bytes = fs::read(&path).expect("a file");
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            fs::write(&path, bytes).expect("writable");
            let output = workspace.command("resume run").output().expect("it starts");
            let said = well(&output);
            for word in ["passed over", "step-10", name] {
                assert!(said.contains(word), "{name} at {at}: {said}");
            }
            workspace.assert_same_runs("whole", "run", 20);
            fs::remove_dir_all(workspace.run("run")).expect("removed");
            for (path, bytes) in &saved {
                fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
                fs::write(path, bytes).expect("writable");
            }
        }
    }

    /// With all of them damaged a run is not begun anew: that is for its owner to decide.
    #[test]
    fn all_of_them_damaged() {
        let workspace = Workspace::new();
        workspace.train("run", &SETTINGS, "--stop-after 10");
        for step in [5, 10] {
            let path = workspace.step("run", step).join("model.safetensors");
            let mut bytes = fs::read(&path).expect("a file");
            bytes[3000] ^= 4;
            fs::write(&path, bytes).expect("writable");
        }
        let before = contents(&workspace.run("run"));
        let words = ["passed over", "step-5", "step-10", "altered", "hint:"];
        workspace.fails("resume run", CHECKPOINT, &words);
        assert_eq!(contents(&workspace.run("run")), before);
    }
}

mod data {
    use super::*;

    fn shard(workspace: &Workspace) -> PathBuf {
        workspace.path("data/train/shard-00000.mbs")
    }

    /// Starts a run without an end and waits until it is under way.
    fn under_way(workspace: &Workspace) -> Running {
        let running = workspace.start(&train_line("run", &[ENDLESS], ""));
        wait_until("the run is under way", || {
            workspace.all_records("run").len() > 20
        });
        running
    }

    /// Deleted while it is read: the run goes on with what it has open, and can be stopped and, with
    /// the data back, resumed.
    #[test]
    fn data_that_is_deleted() {
        let workspace = Workspace::new();
        let running = under_way(&workspace);
        fs::rename(workspace.path("data"), workspace.path("elsewhere")).expect("moved");
        let steps = || workspace.all_records("run").len();
        let before = steps();
        wait_until("it goes on", || steps() > before + 200);
        assert_eq!(running.signal("TERM"), Some(INTERRUPTED));
        let saved = workspace.newest("run");
        workspace.fails("resume run", DATA, &["no data", "data/train"]);
        fs::rename(workspace.path("elsewhere"), workspace.path("data")).expect("moved");
        workspace.ok("resume run --stop-after 10");
        let end = saved + 10;
        workspace.train("whole", &[ENDLESS], &format!("--stop-after {end}"));
        workspace.assert_same_runs("whole", "run", end);
    }

    /// Cut short while it is read: the run saves where it is and says what is wrong.
    #[test]
    fn data_that_is_cut_short() {
        let workspace = Workspace::new();
        let whole = fs::read(shard(&workspace)).expect("a shard");
        let mut command = workspace.command(&train_line("run", &[ENDLESS], ""));
        let running = command.spawn().expect("the program starts");
        wait_until("the run is under way", || {
            workspace.all_records("run").len() > 20
        });
        let file = fs::OpenOptions::new().write(true).open(shard(&workspace));
        file.and_then(|it| it.set_len(whole.len() as u64 / 2))
            .expect("cut");
        let output = running.wait_with_output().expect("it ends");
        let words = ["saved step", "shard-00000.mbs", "cut off"];
        assert_failed(&output, "train", DATA, &words);
        let saved = workspace.newest("run");
        workspace.fails("resume run", DATA, &["shard-00000.mbs", "cut off"]);
        fs::write(shard(&workspace), whole).expect("writable");
        workspace.ok("resume run --stop-after 10");
        let end = saved + 10;
        workspace.train("whole", &[ENDLESS], &format!("--stop-after {end}"));
        workspace.assert_same_runs("whole", "run", end);
    }

    /// A flipped bit in the text is found before it is learnt from.
    #[test]
    fn one_flipped_bit() {
        let workspace = Workspace::new();
        workspace.train("run", &SETTINGS, "--stop-after 5");
        let whole = fs::read(shard(&workspace)).expect("a shard");
        let before = checkpoints(&workspace, "run");
        let mut random = common::random::Random(4740);
        for _ in 0..6 {
            let mut bytes = whole.clone();
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            fs::write(shard(&workspace), bytes).expect("writable");
            workspace.fails("resume run", DATA, &["shard-00000.mbs"]);
            assert_eq!(checkpoints(&workspace, "run"), before);
        }
        fs::write(shard(&workspace), whole).expect("writable");
        workspace.ok("resume run");
    }

    /// A validation split that cannot be read costs the validation.
    #[test]
    fn validation_that_is_damaged() {
        let workspace = Workspace::new();
        let shard = workspace.path("data/validation/shard-00000.mbs");
        let mut bytes = fs::read(&shard).expect("a shard");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&shard, bytes).expect("writable");
        let settings = ["train.validate_every=5", "train.validate_bytes=100000"];
        let line = train_line("run", &settings, "");
        let said = well(&workspace.command(&line).output().expect("it starts"));
        assert!(said.contains("step 5 is not validated"), "{said}");
        assert!(said.contains("is damaged at byte"), "{said}");
        assert_eq!(workspace.newest("run"), 20);
    }
}

mod numbers {
    use super::*;

    /// Text with a stretch of bytes without order in it, which a run meets after it has learnt.
    fn spoilt() -> Workspace {
        let mut random = common::random::Random(77);
        let sentence = "The cat sat on the mat, and the dog lay by the door. ";
        let mut text = sentence.repeat(300);
        text.extend((0..450).map(|_| char::from(33 + random.below(90) as u8)));
        text += &sentence.repeat(700);
        Workspace::with_documents([text, sentence.repeat(20), sentence.repeat(20)])
    }

    const LANES: [&str; 7] = [
        "train.mode=contiguous",
        "train.batch=1",
        "train.steps=400",
        "optimizer.lr=2e-2",
        "checkpoint.every_steps=25",
        "train.validate_every=100",
        "train.validate_bytes=1000",
    ];

    /// The run goes back and past that stretch, and does so in the same way however often it is
    /// stopped and resumed meanwhile.
    #[test]
    fn a_rollback_is_the_same_in_parts() {
        let workspace = spoilt();
        workspace.train("whole", &LANES, "");
        let rollbacks = of_kind(&workspace, "whole", "rollback");
        let skips = of_kind(&workspace, "whole", "skip");
        assert!(
            !rollbacks.is_empty() && skips.len() >= 5,
            "{rollbacks:?} {skips:?}"
        );
        let (back, from) = (&rollbacks[0]["step"], rollbacks[0]["from"].as_u64());
        let from = from.expect("a step");
        assert!(
            back.as_u64().is_some_and(|it| it > 0 && it < from),
            "{rollbacks:?}"
        );
        let last = workspace
            .records("whole")
            .into_iter()
            .rfind(|it| it["kind"] == "valid");
        let bpb = last.and_then(|it| it["bpb"].as_f64()).expect("a score");
        assert!(bpb < 1.0, "{bpb}");

        // Stopped before, between the bad steps, and just after.
        for stop in [from - 7, from - 4, from - 1] {
            let run = format!("parts-{stop}");
            workspace.train(&run, &LANES, &format!("--stop-after {stop}"));
            workspace.ok(&format!("resume {run} --stop-after 3"));
            workspace.ok(&format!("resume {run} --stop-after 9"));
            workspace.ok(&format!("resume {run}"));
            let measured = workspace.measured("whole");
            assert_eq!(measured, workspace.measured(&run));
            for file in [
                "model.safetensors",
                "optimizer.safetensors",
                "state.safetensors",
            ] {
                let read =
                    |run: &str| fs::read(workspace.step(run, 400).join(file)).expect("a file");
                assert!(read("whole") == read(&run), "{file}");
            }
        }
    }
}
