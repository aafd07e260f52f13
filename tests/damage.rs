//! Checkpoints, data and numbers that are not what they were: found, named, and passed over or waited
//! for; the run ends where it would have.

#![cfg(unix)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Running, Workspace, assert_failed, contents, train_line, wait_until, well};

const DATA: i32 = 3;
const CHECKPOINT: i32 = 4;
const INTERRUPTED: i32 = 130;

const SETTINGS: [&str; 1] = ["checkpoint.every_steps=5"];

/// More steps than any of these tests does.
const ENDLESS: &str = "train.steps=1000000";

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
    /// A damaged checkpoint that is passed over is later than those of the run that goes on: these are not
    /// the old ones that make place.
    #[test]
    fn what_is_saved_before_a_damaged_one_stays() {
        let workspace = Workspace::new();
        let settings = ["checkpoint.every_steps=5", "checkpoint.keep_last=2"];
        workspace.train("run", &settings, "--stop-after 10");
        let weights = workspace.step("run", 10).join("model.safetensors");
        let mut bytes = fs::read(&weights).expect("a file");
        bytes[3000] ^= 4;
        fs::write(&weights, bytes).expect("writable");
        let config = workspace.run("run").join("config.toml");
        let text = fs::read_to_string(&config).expect("a config");
        assert!(text.contains("keep_last = 2"), "{text}");
        fs::write(&config, text.replace("keep_last = 2", "keep_last = 1")).expect("writable");
        workspace.ok("resume run --stop-after 2");
        workspace.ok("resume run --stop-after 1");
        // The last one, and the one that a rollback would go to.
        assert!(workspace.step("run", 8).is_dir() && workspace.step("run", 5).is_dir());
        workspace.ok("resume run --stop-after 2");
        workspace.train("whole", &settings, "--stop-after 10");
        workspace.assert_same_runs("whole", "run", 10);
    }

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
        let before = workspace.checkpoints("run");
        let mut random = common::random::Random(4740);
        for _ in 0..6 {
            let mut bytes = whole.clone();
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            fs::write(shard(&workspace), bytes).expect("writable");
            workspace.fails("resume run", DATA, &["shard-00000.mbs"]);
            assert_eq!(workspace.checkpoints("run"), before);
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
        let rollbacks = workspace.of_kind("whole", "rollback");
        let skips = workspace.of_kind("whole", "skip");
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
