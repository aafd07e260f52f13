//! Memory: what the program says before a run, and how it refuses one.

mod common;

use std::fs;

use common::Workspace;

const CONFIG: i32 = 2;
const OUT_OF_MEMORY: i32 = 6;

/// What the config of the tests takes at its peak, in bytes: `src/memory.rs` has the same
/// number with its parts.
const PEAK: u64 = 610_176;

mod estimate {
    use super::*;

    #[test]
    fn parts_add_up_to_the_total() {
        let workspace = Workspace::new();
        let json = workspace.json("estimate --config config.toml --json");
        let row = &json["estimates"][0];
        let parts = [
            "weights",
            "gradients",
            "optimizer",
            "activations",
            "workspace",
            "pages",
            "context",
        ];
        let sum: u64 = parts
            .iter()
            .map(|part| row[*part].as_u64().expect(part))
            .sum();
        assert_eq!(row["total"], sum);
        assert_eq!(row["total"], PEAK);
        assert_eq!(row["weights"], 4 * 15_008);
        assert_eq!(row["optimizer"], 8 * 15_008);
        assert_eq!(row["moment"], "head");
        assert_eq!(row["fits"], serde_json::Value::Null);
        assert_eq!(json["memory_limit"], serde_json::Value::Null);
    }

    #[test]
    fn auto_and_the_largest_batch_follow_the_limit() {
        let workspace = Workspace::new();
        // Batch 2 with one layer recomputed is inside, but "auto" leaves a fiftieth unused.
        let json = workspace.json(
            "estimate --config config.toml --set train.memory_limit=585KB --batch 1 2 50 --json",
        );
        let rows = json["estimates"].as_array().expect("rows");
        let column = |name: &str| -> Vec<_> { rows.iter().map(|row| row[name].clone()).collect() };
        assert_eq!(column("batch"), [1, 2, 50]);
        assert_eq!(column("recomputed_layers"), [0, 2, 2]);
        assert_eq!(column("fits"), [true, true, false]);
        assert!(rows[2]["automatic_recompute"].is_null());
        assert_eq!(json["largest_batch"], 2);
        assert_eq!(json["recompute"], "auto");
    }

    #[test]
    fn the_table_has_a_column_for_each_batch_and_says_what_fits() {
        let workspace = Workspace::new();
        let line = "estimate --config config.toml --batch 1 2 --set train.memory_limit=500KiB \
                    --set train.recompute=none";
        let text = String::from_utf8(workspace.ok(line)).expect("text");
        for part in [
            "total              385.9 KiB  595.9 KiB",
            "fullest at            logits     logits",
            "batch 1 fits",
            "batch 2 does not fit",
            "the largest batch with `train.recompute` = none is 1",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }

    #[test]
    fn a_model_can_be_named() {
        let workspace = Workspace::new();
        let json = workspace.json("estimate --config mambabyte_353m --json");
        assert_eq!(json["depth"], 53);
        assert_eq!(json["estimates"][0]["weights"], 4 * 353_945_600u64);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let workspace = Workspace::new();
        let line = "estimate --config nothing";
        workspace.fails(line, CONFIG, &["nothing", "could not read"]);
        let line = "estimate --config config.toml --batch 0";
        workspace.fails(line, CONFIG, &["--batch"]);
        let line = "estimate --config config.toml --batch 1000000000";
        workspace.fails(line, CONFIG, &["`train.batch`"]);
        let line = "estimate --config config.toml --set train.memory_limit=24";
        workspace.fails(line, CONFIG, &["`train.memory_limit`", "unit"]);
    }
}

mod limit {
    use super::*;

    #[test]
    fn a_run_that_cannot_fit_is_refused_before_it_begins() {
        let workspace = Workspace::new();
        let settings = ["train.memory_limit=400KiB"];
        let report = workspace.fails(
            &common::train_line("run", &settings, ""),
            OUT_OF_MEMORY,
            &[
                "out of memory on `cpu:0`",
                "training needs about 531.9 KiB",
                "may use 400.0 KiB",
                "hint:",
                "`train.batch`",
                "`train.recompute` is already \"all\"",
                "`train.length`",
                "mambabyte estimate",
            ],
        );
        assert!(!report.contains("panicked"), "{report}");
        assert!(!workspace.run("run").exists());
    }

    #[test]
    fn auto_is_stored_as_the_number_it_came_to() {
        let workspace = Workspace::new();
        for (run, limit, expected) in [
            ("loose", 650_000, "recompute = \"none\""),
            ("tight", 610_000, "recompute = 1"),
            ("tighter", 570_000, "recompute = \"all\""),
        ] {
            let limit = format!("train.memory_limit={limit}B");
            workspace.train(run, &[&limit, "train.steps=2"], "");
            let stored = fs::read_to_string(workspace.run(run).join("config.toml"));
            let stored = stored.expect("the run's config");
            assert!(stored.contains(expected), "{expected}:\n{stored}");
        }
        // Recomputation changes no bit of the result.
        assert_eq!(workspace.measured("loose"), workspace.measured("tight"));
        assert_eq!(workspace.measured("loose"), workspace.measured("tighter"));
    }

    #[test]
    fn a_run_refused_for_memory_goes_on_where_there_is_more() {
        let workspace = Workspace::new();
        let settings = ["train.memory_limit=1MiB", "train.steps=4"];
        workspace.train("run", &settings, "--stop-after 2");
        let file = workspace.run("run").join("config.toml");
        let roomy = fs::read_to_string(&file).expect("the run's config");
        let tight = roomy.replace("1MiB", "400KiB");
        assert_ne!(tight, roomy);
        fs::write(&file, tight).expect("writable");
        let line = format!("resume {}", workspace.run("run").display());
        workspace.fails(&line, OUT_OF_MEMORY, &["training needs about", "hint:"]);
        assert_eq!(workspace.newest("run"), 2);
        fs::write(&file, roomy).expect("writable");
        workspace.ok(&line);
        assert_eq!(workspace.newest("run"), 4);
    }

    #[test]
    fn the_cpu_reports_no_device_memory() {
        let workspace = Workspace::new();
        workspace.train("run", &["train.steps=1"], "");
        let records = workspace.all_records("run");
        let train = records.iter().find(|it| it["kind"] == "train");
        let train = train.expect("a step's record");
        assert!(train.get("memory_gib").is_none(), "{train}");
    }
}
