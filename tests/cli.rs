//! Bad input: one message that says what to do, the documented exit code, nothing lost.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{Workspace, contents, train_line};

const UNEXPECTED: i32 = 1;
const CONFIG: i32 = 2;
const DATA: i32 = 3;
const CHECKPOINT: i32 = 4;
const DEVICE: i32 = 5;
const OUT_OF_MEMORY: i32 = 6;
const DIVERGED: i32 = 7;

/// The file of a split of the corpus.
fn shard(workspace: &Workspace, split: &str) -> PathBuf {
    workspace.path(format!("data/{split}/shard-00000.mbs"))
}

/// Changes a file's bytes.
fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("a file");
    change(&mut bytes);
    fs::write(path, bytes).expect("writable");
}

/// The complete checkpoints of a run with all they consist of.
fn checkpoints(workspace: &Workspace, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = contents(&workspace.run(run));
    files.retain(|path, _| {
        let folder = path.parent().unwrap_or(path).to_string_lossy();
        folder.contains("/step-") && !folder.ends_with(".tmp")
    });
    files
}

mod config {
    use super::*;

    #[test]
    fn one_that_is_not_there() {
        let workspace = Workspace::new();
        let line = "train --config missing.toml --run run";
        workspace.fails(line, CONFIG, &["missing.toml", "could not read", "hint:"]);
        assert!(!workspace.run("run").exists());
    }

    #[test]
    fn one_that_is_not_toml() {
        let workspace = Workspace::new();
        fs::write(workspace.path("bad.toml"), "[train\nsteps = = 3\n").expect("writable");
        workspace.fails(
            "train --config bad.toml",
            CONFIG,
            &["bad.toml", "line 1", "TOML"],
        );
    }

    #[test]
    fn an_unknown_key_a_wrong_type_and_a_negative_size_are_told_at_once() {
        let workspace = Workspace::new();
        let settings = ["train.stpes=3", "train.steps=many", "model.dim=-16"];
        workspace.fails(
            &train_line("run", &settings, ""),
            CONFIG,
            &[
                "3 problems",
                "`train.stpes`",
                "did you mean `train.steps`?",
                "`train.steps`",
                "\"many\"",
                "`model.dim`",
                "`-16`",
                "cannot be negative",
            ],
        );
        assert!(!workspace.run("run").exists());
    }

    #[test]
    fn each_problem_alone() {
        let workspace = Workspace::new();
        for (setting, words) in [
            ("train.lenght=64", ["`train.lenght`", "`train.length`"]),
            ("trian.steps=64", ["trian", "train"]),
            ("optimizer.lr=fast", ["`optimizer.lr`", "\"fast\""]),
            ("train.batch=-1", ["`train.batch`", "cannot be negative"]),
            ("train.batch=0", ["`train.batch`", "`0`"]),
            ("train.precision=fp64", ["`train.precision`", "\"fp32\""]),
            ("optimizer.beta1=1.5", ["`optimizer.beta1`", "`1.5`"]),
            ("model.preset=huge", ["`model.preset`", "\"tiny\""]),
        ] {
            workspace.fails(&train_line("run", &[setting], ""), CONFIG, &words);
        }
        assert!(!workspace.run("run").exists());
    }

    #[test]
    fn arguments_that_do_not_exist() {
        let workspace = Workspace::new();
        for line in [
            "fly",
            "train",
            "train --config config.toml --run ../elsewhere",
            "train --config config.toml --stop-after 0",
            "generate --checkpoint c --top-p 2",
            "eval --checkpoint c --data data --split dev",
        ] {
            workspace.fails(line, CONFIG, &[]);
        }
    }
}

mod data {
    use super::*;

    #[test]
    fn an_empty_folder() {
        let workspace = Workspace::new();
        fs::create_dir(workspace.path("nothing")).expect("a folder");
        for folder in ["nothing", "not-even-a-folder"] {
            let setting = format!("data.path={folder}");
            let line = train_line("run", &[&setting], "");
            workspace.fails(&line, DATA, &[folder, "mambabyte data prepare"]);
        }
        workspace.fails("data info nothing", DATA, &["nothing"]);
        workspace.fails(
            "data prepare --source text --path nothing --out other",
            DATA,
            &["nothing"],
        );
        assert!(
            !workspace.run("run").exists(),
            "no folder of a run that has no data"
        );
    }

    #[test]
    fn no_validation_split() {
        let workspace = Workspace::new();
        fs::remove_dir_all(workspace.path("data/validation")).expect("removed");
        let line = train_line("run", &["train.validate_every=5"], "");
        workspace.fails(&line, DATA, &["data/validation"]);
        assert!(!workspace.run("run").exists());
        workspace.train("run", &[], "");
    }

    #[test]
    fn a_truncated_shard() {
        let workspace = Workspace::new();
        edit(&shard(&workspace, "train"), |bytes| {
            bytes.truncate(bytes.len() - 1)
        });
        workspace.fails(
            &train_line("run", &[], ""),
            DATA,
            &["shard-00000.mbs", "cut off"],
        );
        workspace.fails("data verify data", DATA, &["shard-00000.mbs", "cut off"]);
        edit(&shard(&workspace, "train"), |bytes| bytes.truncate(9));
        workspace.fails(&train_line("run", &[], ""), DATA, &["shard-00000.mbs"]);
    }

    #[test]
    fn a_shard_of_another_version() {
        let workspace = Workspace::new();
        edit(&shard(&workspace, "train"), |bytes| bytes[8] = 99);
        let words = [
            "shard-00000.mbs",
            "another version",
            "format 99",
            "data prepare",
        ];
        workspace.fails(&train_line("run", &[], ""), DATA, &words);
    }

    #[test]
    fn a_file_that_is_no_shard() {
        let workspace = Workspace::new();
        fs::write(shard(&workspace, "train"), "once upon a time").expect("writable");
        let words = ["shard-00000.mbs", "not a byte shard"];
        workspace.fails(&train_line("run", &[], ""), DATA, &words);
    }

    #[test]
    fn a_damaged_index_and_damaged_bytes() {
        let workspace = Workspace::new();
        let train = shard(&workspace, "train");
        // A byte of the first document's record.
        edit(&train, |bytes| bytes[80] ^= 1);
        let words = ["shard-00000.mbs", "damaged", "checksum"];
        workspace.fails(&train_line("run", &[], ""), DATA, &words);
        edit(&train, |bytes| bytes[80] ^= 1);
        edit(&train, |bytes| *bytes.last_mut().expect("bytes") ^= 1);
        workspace.fails("data verify data", DATA, &["shard-00000.mbs", "damaged"]);
    }

    #[test]
    fn too_little_for_one_batch() {
        let workspace = Workspace::new();
        let line = train_line("run", &["train.length=100000"], "");
        workspace.fails(&line, DATA, &["too short", "200001"]);
        assert!(
            !workspace.run("run").exists(),
            "no folder of a run that cannot begin"
        );
    }

    #[test]
    fn other_data_than_the_run_has_learnt_from() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 10");
        let before = checkpoints(&workspace, "run");
        fs::write(workspace.path("text/new.txt"), "something else ".repeat(20)).expect("writable");
        workspace.ok("data prepare --source text --path text --out data --overwrite");
        let words = [
            "learnt from other data: 9 documents of 2580 bytes",
            "`data/train` now holds 11 documents of 3220 bytes",
            "hint:",
        ];
        workspace.fails("resume run", CONFIG, &words);
        assert_eq!(checkpoints(&workspace, "run"), before);
    }

    #[test]
    fn a_share_held_out_that_leaves_nothing() {
        let workspace = Workspace::new();
        let line = "data prepare --source text --path text --out other --held-out 0.9";
        workspace.fails(line, CONFIG, &["--held-out", "below 0.5"]);
    }

    #[test]
    fn shards_are_not_written_where_text_is_read() {
        let workspace = Workspace::new();
        let words = ["--out", "--path", "outside"];
        for (path, out) in [
            (".", "other"),
            ("text", "text/../text/a/b"),
            ("text", "text"),
        ] {
            let line = format!("data prepare --source text --path {path} --out {out}");
            workspace.fails(&line, CONFIG, &words);
        }
        workspace.ok("data prepare --source text --path text --out text-2");
    }

    #[test]
    fn a_folder_that_holds_data() {
        let workspace = Workspace::new();
        let before = contents(&workspace.path("data"));
        let line = "data prepare --source text --path text --out data";
        workspace.fails(line, CONFIG, &["already holds data", "--overwrite"]);
        assert_eq!(contents(&workspace.path("data")), before);
    }
}

mod checkpoint {
    use super::*;

    #[test]
    fn one_that_is_not_there() {
        let workspace = Workspace::new();
        for line in [
            "generate --checkpoint checkpoints/none",
            "eval --checkpoint checkpoints/none --data data",
            "resume checkpoints/none",
        ] {
            workspace.fails(line, CHECKPOINT, &["checkpoints/none", "hint:"]);
        }
    }

    #[test]
    fn a_run_may_be_named() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 1");
        workspace.ok("generate --checkpoint run --device cpu --max-new-bytes 1");
        workspace.train("second", &[], "--init run --stop-after 1");
    }

    #[test]
    fn one_of_another_model() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 10");
        let before = checkpoints(&workspace, "run");
        let config = workspace.run("run").join("config.toml");
        let text = fs::read_to_string(&config).expect("a stored config");
        fs::write(&config, text.replace("dim = 16\n", "dim = 24\n")).expect("writable");
        let words = [
            "the run's config is not that of its newest checkpoint",
            "`model.dim` was 16, and is 24",
            "hint: set it back",
        ];
        workspace.fails("resume run", CHECKPOINT, &words);
        assert_eq!(checkpoints(&workspace, "run"), before);
    }

    #[test]
    fn altered_files() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "");
        let folder = workspace.step("run", 20);
        for file in ["model.safetensors", "optimizer.safetensors", "config.toml"] {
            let path = folder.join(file);
            let whole = fs::read(&path).expect("a file");
            // In the tensors, and in what says where they are.
            for place in [whole.len() / 2, 20] {
                edit(&path, |bytes| bytes[place] ^= 1);
                workspace.fails("resume run", CHECKPOINT, &[file, "altered"]);
                // The optimizer is not read for this.
                if file != "optimizer.safetensors" {
                    let line = "generate --checkpoint checkpoints/run";
                    workspace.fails(line, CHECKPOINT, &[file, "altered"]);
                }
                fs::write(&path, &whole).expect("writable");
            }
            edit(&path, |bytes| bytes.truncate(whole.len() / 2));
            let line = "generate --checkpoint checkpoints/run";
            workspace.fails(line, CHECKPOINT, &[file, "bytes"]);
            fs::remove_file(&path).expect("removed");
            workspace.fails(line, CHECKPOINT, &[file]);
            fs::write(&path, whole).expect("writable");
        }
        workspace.ok("generate --checkpoint checkpoints/run --device cpu --max-new-bytes 1");
    }

    #[test]
    fn a_manifest_of_another_format_or_of_none() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "");
        let manifest = workspace.step("run", 20).join("manifest.json");
        let text = fs::read_to_string(&manifest).expect("a manifest");
        let line = "generate --checkpoint checkpoints/run";
        let other = text.replace("\"format\": 1", "\"format\": 99");
        fs::write(&manifest, other).expect("writable");
        workspace.fails(line, CHECKPOINT, &["manifest.json", "99"]);
        fs::write(&manifest, &text[..text.len() / 2]).expect("writable");
        workspace.fails(line, CHECKPOINT, &["manifest.json"]);
    }

    /// The newest is damaged: the run goes on from the one before, to the same end.
    #[test]
    fn a_damaged_newest_is_passed_over() {
        let workspace = Workspace::new();
        let settings = ["checkpoint.every_steps=5"];
        workspace.train("whole", &settings, "");
        workspace.train("run", &settings, "--stop-after 10");
        edit(
            &workspace.step("run", 10).join("model.safetensors"),
            |bytes| bytes[2000] ^= 1,
        );
        let output = workspace.command("resume run").output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(
            said.contains("passed over") && said.contains("step-10"),
            "{said}"
        );
        workspace.assert_same_runs("whole", "run", 20);
    }
}

mod run {
    use super::*;

    #[test]
    fn a_checkpoint_is_not_one() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 2");
        let before = contents(&workspace.run("run"));
        let words = [
            "is a checkpoint, not a run",
            "resume checkpoints/run`",
            "train --init checkpoints/run/step-2",
        ];
        workspace.fails("resume checkpoints/run/step-2", CHECKPOINT, &words);
        fs::rename(workspace.step("run", 2), workspace.path("imported")).expect("renamed");
        let words = ["is a checkpoint, not a run", "train --init imported"];
        workspace.fails("resume imported", CHECKPOINT, &words);
        fs::rename(workspace.path("imported"), workspace.step("run", 2)).expect("renamed");
        assert_eq!(contents(&workspace.run("run")), before);
    }

    #[test]
    fn one_whose_checkpoints_are_gone_says_so() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 2");
        fs::remove_dir_all(workspace.step("run", 2)).expect("removed");
        let output = workspace.command("resume run").output().expect("it starts");
        let said = common::well(&output);
        assert!(
            said.contains("has saved step 2, and has no checkpoint"),
            "{said}"
        );
    }

    #[test]
    fn one_that_was_to_stop_says_how_to_go_on() {
        let workspace = Workspace::new();
        let said = |line: &str| {
            let output = workspace.command(line).output().expect("it starts");
            common::well(&output)
        };
        let words = "stopped at step 2 of 20, and saved; go on with `mambabyte resume";
        let text = said(&train_line("run", &[], "--stop-after 2"));
        assert!(text.contains(words), "{text}");
        let text = said("resume run --stop-after 18");
        assert!(!text.contains("stopped"), "{text}");
    }

    /// Nobody reads what is said, or it cannot be written: the run goes on.
    #[cfg(target_os = "linux")]
    #[test]
    fn one_whose_log_cannot_be_written() {
        let workspace = Workspace::new();
        let line = train_line("full", &[], "--stop-after 10");
        let full = || fs::File::options().write(true).open("/dev/full");
        let mut command = workspace.command(&line);
        command.stderr(full().expect("a device"));
        assert!(command.status().expect("it starts").success());
        // What tracing says goes the same way.
        fs::remove_dir_all(workspace.step("full", 10)).expect("removed");
        let mut command = workspace.command("resume full");
        command.stderr(full().expect("a device"));
        assert!(command.status().expect("it starts").success());
        assert_eq!(workspace.newest("full"), 20);

        let mut child = workspace
            .command(&train_line("unread", &[], ""))
            .spawn()
            .expect("it starts");
        drop(child.stderr.take());
        assert!(child.wait().expect("it ends").success());
        assert_eq!(workspace.newest("unread"), 20);
    }

    #[test]
    fn one_that_exists_already() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "");
        let before = contents(&workspace.run("run"));
        let words = ["a run is already in", "checkpoints/run", "mambabyte resume"];
        workspace.fails(&train_line("run", &[], ""), CONFIG, &words);
        assert_eq!(contents(&workspace.run("run")), before);
    }

    #[test]
    fn a_second_trainer() {
        let workspace = Workspace::new();
        let settings = ["train.steps=1000000", "train.log_every=1000"];
        workspace.train("run", &settings, "--stop-after 2");
        let before = checkpoints(&workspace, "run");
        let first = workspace.start("resume run");
        common::wait_until("the first trainer is at work", || {
            let records = workspace.all_records("run");
            records.iter().any(|it| it["kind"] == "resume")
        });
        workspace.fails(
            "resume run",
            CONFIG,
            &["another trainer", "checkpoints/run"],
        );
        workspace.fails(&train_line("run", &settings, ""), CONFIG, &["already"]);
        first.kill();
        assert_eq!(checkpoints(&workspace, "run"), before);
        workspace.ok("resume run --stop-after 1");
    }

    #[test]
    fn training_that_diverges() {
        let workspace = Workspace::new();
        let settings = [
            "train.steps=3000",
            "optimizer.lr=10",
            "optimizer.min_lr=10",
            "optimizer.warmup_steps=0",
            "optimizer.clip=0",
            "checkpoint.every_steps=10",
        ];
        let said = workspace.fails(
            &train_line("run", &settings, ""),
            DIVERGED,
            &["diverged at step", "optimizer.lr", "hint:"],
        );
        // What was saved before is whole; the same step diverges again.
        let again = workspace.fails("resume run", DIVERGED, &["diverged at step"]);
        let message = |said: &str| {
            said.lines()
                .find(|it| it.starts_with("error:"))
                .map(str::to_owned)
        };
        assert_eq!(message(&said), message(&again));
    }
}

mod device {
    use super::*;

    #[test]
    fn one_that_this_program_does_not_know() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 1");
        for (kind, built) in [
            ("cuda", cfg!(feature = "cuda")),
            ("wgpu", cfg!(feature = "wgpu")),
        ] {
            if built {
                continue;
            }
            let line = format!("generate --checkpoint checkpoints/run --device {kind}");
            let feature = format!("--features {kind}");
            workspace.fails(&line, DEVICE, &[kind, "built without", &feature]);
            let setting = format!("device.kind={kind}");
            workspace.fails(&train_line("other", &[&setting], ""), DEVICE, &[kind]);
            assert!(!workspace.run("other").exists());
        }
    }

    #[test]
    fn doctor_describes_this_machine() {
        let workspace = Workspace::new();
        let report = workspace.json("doctor --device cpu --json");
        let devices = report["devices"].as_array().expect("a list");
        assert!(devices.iter().any(|it| it["device"] == "cpu"), "{report}");
        workspace.fails("doctor --device cuda:200", DEVICE, &["cuda:200"]);
    }
}

mod disk {
    use super::*;

    /// What was there stays, and nothing half written takes its name.
    #[cfg(target_os = "linux")]
    #[test]
    fn results_are_there_whole_or_not_at_all() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 1");
        fs::write(workspace.path("out.npy"), "before").expect("writable");
        let before = contents(&workspace.path("."));
        for line in [
            "logits --checkpoint run --device cpu --bytes text/00.txt --out out.npy",
            "logits --checkpoint run --device cpu --bytes text/00.txt --out new.npy",
            "eval --checkpoint run --device cpu --data data --split train --save .",
        ] {
            // No file may have more than one block, of 512 or of 1024 bytes.
            let mut limited = std::process::Command::new("sh");
            let script = format!("trap '' XFSZ; ulimit -f 1; exec \"$0\" {line}");
            limited.args(["-c", &script, common::PROGRAM]);
            let output = workspace.prepared(limited).output().expect("sh is there");
            common::assert_failed(&output, line, UNEXPECTED, &["could not write", "hint:"]);
            assert_eq!(contents(&workspace.path(".")), before, "{line}");
        }
        workspace.ok("logits --checkpoint run --device cpu --bytes text/00.txt --out out.npy");
        let written = fs::read(workspace.path("out.npy")).expect("a file");
        assert!(written.starts_with(b"\x93NUMPY"));
    }

    #[test]
    fn a_file_where_a_folder_should_be() {
        let workspace = Workspace::new();
        fs::write(workspace.path("file"), "").expect("writable");
        let line = train_line("run", &["checkpoint.dir=file"], "");
        workspace.fails(
            &line,
            UNEXPECTED,
            &["could not create", "file/run", "hint:"],
        );
    }
}

#[cfg(target_os = "linux")]
mod memory {
    use super::*;

    #[test]
    fn more_than_the_system_has() {
        let workspace = Workspace::new();
        workspace.train("run", &[], "--stop-after 1");
        let line = "eval --checkpoint run --device cpu --data data --piece 1000000000000";
        let mut limited = std::process::Command::new("sh");
        let script = format!("ulimit -v 8000000; exec \"$0\" {line}");
        limited.args(["-c", &script, common::PROGRAM]);
        let output = workspace.prepared(limited).output().expect("sh is there");
        let words = ["out of memory", "bytes more", "hint:"];
        common::assert_failed(&output, line, OUT_OF_MEMORY, &words);
    }
}
