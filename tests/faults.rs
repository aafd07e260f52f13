//! Disks that fail: training goes on where it can, loses nothing that was saved, says what is wrong,
//! and goes on to the same end when it is put right.

#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{PROGRAM, Running, Workspace, assert_failed, skipped, train_line, wait_until, well};
use mambabyte::train::Checkpoint;

const UNEXPECTED: i32 = 1;
const INTERRUPTED: i32 = 130;

const SETTINGS: [&str; 1] = ["checkpoint.every_steps=5"];

/// More steps than any of these tests does.
const ENDLESS: &str = "train.steps=1000000";

/// A run that goes on from step 5 on a disk with these faults, to step 20.
fn resumed(workspace: &Workspace, faults: &[(&str, &str)]) -> Output {
    workspace.train("whole", &SETTINGS, "");
    workspace.train("run", &SETTINGS, "--stop-after 5");
    workspace.faulty("resume run", faults)
}

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
    let saves = workspace.of_kind("run", "save");
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
    let before = workspace.checkpoints("run");

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
    assert_eq!(workspace.checkpoints("run"), before);
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
    let saves = workspace.of_kind("run", "save");
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
    // The config, weights, moments, and the manifest.
    for (fault, call) in [("lose", "1"), ("flip", "2"), ("lose", "3"), ("flip", "4")] {
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
    let saves = workspace.of_kind("run", "save");
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
