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

/// What was measured, without how long it took and of which folder.
fn measured(mut report: Value) -> Value {
    let object = report.as_object_mut().expect("an object");
    for key in ["seconds", "bytes_per_second", "checkpoint"] {
        assert!(object.remove(key).is_some(), "{key}");
    }
    report
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
        let expected = [
            "bits_per_byte",
            "buckets",
            "bytes",
            "bytes_per_second",
            "checkpoint",
            "context",
            "curve",
            "data",
            "documents",
            "nats_per_byte",
            "precision",
            "seconds",
            "split",
            "word_counts",
            "word_perplexity",
            "words",
            "words_per_byte",
        ];
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
    let of = |checkpoint| measured(score(&workspace, checkpoint, ""));
    let run = of("checkpoints/run");
    assert_eq!(run, of("checkpoints/run/step-20"));
    assert_ne!(run, of("checkpoints/run/step-10"));
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

/// A corpus whose test split has several documents, and a run.
fn with_documents() -> Workspace {
    let documents = (0..40).map(|i| common::pseudo_words(i, 60 + 37 * i as usize));
    let workspace = Workspace::with_documents(documents);
    workspace.train("run", &[], "");
    workspace
}

/// The same numbers, computed in pieces of every kind: how work is cut up is nobody's business.
#[test]
fn pieces_and_lanes_change_nothing() {
    let workspace = with_documents();
    for mode in [
        "windows --length 100",
        "sliding --length 100 --stride 30",
        "carried",
    ] {
        let with = |piece: usize| {
            let more = format!("--split validation --mode {mode} --piece {piece}");
            score(&workspace, "checkpoints/run", &more)
        };
        let whole = with(100_000);
        for piece in [1, 37, 500] {
            let other = with(piece);
            assert_eq!(whole["bytes"], other["bytes"]);
            let bits = |report: &Value| number(report, "bits_per_byte");
            let difference = bits(&whole) - bits(&other);
            assert!(
                difference.abs() < 1e-6,
                "{mode}, pieces of {piece}: {difference}"
            );
            let documents =
                |report: &Value| report["documents"].as_array().expect("a list").clone();
            for (a, b) in documents(&whole).iter().zip(documents(&other)) {
                assert_eq!((&a["name"], &a["bytes"]), (&b["name"], &b["bytes"]));
                assert!((bits(a) - bits(&b)).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}

/// Where they have to, the ways to measure agree with each other.
#[test]
fn modes_meet_at_their_ends() {
    let workspace = with_documents();
    let bits = |more: &str| {
        let more = format!("--split validation {more}");
        number(
            &score(&workspace, "checkpoints/run", &more),
            "bits_per_byte",
        )
    };
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
    let carried = bits("--mode carried");
    close(carried, bits("--mode windows --length 100000"));
    close(carried, bits("--mode sliding --length 100000 --stride 7"));
    let windows = bits("--mode windows --length 50");
    close(windows, bits("--mode sliding --length 50 --stride 50"));
    assert!((windows - carried).abs() > 1e-4, "the context matters");
}

/// The arrays of `--save` are what the report sums up.
#[test]
fn arrays_have_a_number_for_every_byte() {
    let workspace = with_documents();
    let report = score(&workspace, "checkpoints/run", "--mode carried --save out");
    let bytes = report["bytes"].as_u64().expect("a number") as usize;
    let numbers = |name: &str| -> Vec<[u8; 4]> {
        let file = std::fs::read(workspace.path("out").join(name)).expect(name);
        let shape = format!("'shape': ({bytes},)");
        assert!(
            String::from_utf8_lossy(&file[..128]).contains(&shape),
            "{name}"
        );
        let data = &file[file.len() - 4 * bytes..];
        data.chunks_exact(4)
            .map(|it| [it[0], it[1], it[2], it[3]])
            .collect()
    };
    let floats = |name| {
        numbers(name)
            .into_iter()
            .map(|it| f64::from(f32::from_le_bytes(it)))
    };
    let log_probs: Vec<f64> = floats("log_probs.npy").collect();
    let nats = -log_probs.iter().sum::<f64>() / bytes as f64;
    assert!((nats - number(&report, "nats_per_byte")).abs() < 1e-6);
    for (prob, log_prob) in floats("probs.npy").zip(&log_probs) {
        assert!((prob - log_prob.exp()).abs() < 1e-6);
    }
    let ranks: Vec<i32> = numbers("ranks.npy")
        .into_iter()
        .map(i32::from_le_bytes)
        .collect();
    assert!(ranks.iter().all(|rank| (0..256).contains(rank)));
    // The likeliest byte is at least as likely as one of 256.
    for (rank, log_prob) in ranks.iter().zip(&log_probs) {
        assert!(*rank > 0 || *log_prob >= -256f64.ln() - 1e-6);
        assert!(
            *log_prob <= -f64::from(*rank).max(1.0).ln() + 1e-6,
            "{rank} {log_prob}"
        );
    }
    let text = std::fs::read(workspace.path("out/documents.json")).expect("a list");
    let documents: Value = serde_json::from_slice(&text).expect("JSON");
    let mut at = 0;
    for (place, document) in documents
        .as_array()
        .expect("a list")
        .iter()
        .zip(report["documents"].as_array().expect("a list"))
    {
        assert_eq!(place["start"].as_u64(), Some(at));
        assert_eq!(
            (&place["name"], &place["bytes"]),
            (&document["name"], &document["bytes"])
        );
        let length = place["bytes"].as_u64().expect("a number");
        let own = &log_probs[at as usize..(at + length) as usize];
        let bits = -own.iter().sum::<f64>() / length as f64 / 2f64.ln();
        assert!((bits - number(document, "bits_per_byte")).abs() < 1e-5);
        at += length;
    }
    assert_eq!(at, bytes as u64);
}

#[test]
fn files_are_documents_and_plots_are_drawn() {
    let workspace = with_documents();
    std::fs::write(workspace.path("one.txt"), "the river walks slowly").expect("written");
    std::fs::write(workspace.path("two.txt"), [0xff, 0, b'a', 0xe2]).expect("written");
    std::fs::write(workspace.path("empty.txt"), "").expect("written");
    let line = "eval --checkpoint checkpoints/run --device cpu --mode carried --plot plot.svg \
                --text one.txt two.txt empty.txt";
    let report = workspace.json(&format!("{line} --json"));
    assert_eq!(report["bytes"], 26);
    assert_eq!(report["words"], 5);
    assert_eq!(report["documents"][1]["name"], "two.txt");
    assert_eq!(report["documents"][2]["bytes"], 0);
    let svg = std::fs::read_to_string(workspace.path("plot.svg")).expect("a plot");
    assert!(svg.starts_with("<svg") && svg.contains("bits per byte"));
    let text = workspace.ok(&format!("{line} --documents"));
    let text = String::from_utf8(text).expect("text");
    assert!(
        text.contains("over 26 bytes") && text.contains("one.txt"),
        "{text}"
    );
    let limited = workspace.json(&format!("{line} --json --max-bytes 9"));
    assert_eq!(
        (&limited["bytes"], &limited["words"]),
        (&9.into(), &2.into())
    );
}

#[test]
fn published_words_stand_in_for_counted_ones() {
    let workspace = with_documents();
    let report = score(&workspace, "checkpoints/run", "--words pg19");
    let ratio = 6_966_499.0 / 41_289_101.0;
    assert!((number(&report, "words_per_byte") - ratio).abs() < 1e-12);
    let perplexity = (number(&report, "nats_per_byte") / ratio).exp();
    assert!((number(&report, "word_perplexity") / perplexity - 1.0).abs() < 1e-9);
    assert_eq!(report["word_counts"], "pg19");
    std::fs::write(workspace.path("one.txt"), "the river walks slowly").expect("written");
    let line = "eval --checkpoint checkpoints/run --device cpu --words pg19 --text one.txt";
    workspace.fails(line, 2, &["--words pg19", "--text"]);
}

/// What cannot be written is said before the work, not after it.
#[test]
fn files_that_cannot_be_written_or_read_are_refused_first() {
    let workspace = with_documents();
    std::fs::write(workspace.path("one.txt"), "the river walks slowly").expect("written");
    let line = "eval --checkpoint checkpoints/run --device cpu --text";
    workspace.fails(&format!("{line} one.txt --plot no/a.svg"), 1, &["no/a.svg"]);
    workspace.fails(
        &format!("{line} one.txt --plot a.png"),
        2,
        &["a.png", "SVG"],
    );
    workspace.fails(&format!("{line} none.txt"), 2, &["nothing at `none.txt`"]);
}

/// A bit that has changed in the data is found before it is scored.
#[test]
fn damaged_data_is_not_scored() {
    let workspace = with_documents();
    let shard = std::fs::read_dir(workspace.path("data/test"))
        .expect("a folder")
        .map(|it| it.expect("an entry").path())
        .find(|it| it.extension().is_some_and(|it| it != "json"))
        .expect("a shard");
    let mut bytes = std::fs::read(&shard).expect("a shard");
    *bytes.last_mut().expect("data") ^= 1;
    std::fs::write(&shard, bytes).expect("written");
    let line = "eval --checkpoint checkpoints/run --data data --device cpu";
    workspace.fails(line, 3, &["checksum"]);
}

#[test]
fn lengths_and_noise_are_measured_on_the_same_text() {
    let workspace = with_documents();
    let more = "--checkpoint checkpoints/run --data data --split validation --device cpu --json";
    let lengths = workspace.json(&format!(
        "eval-lengths {more} --from 16 --to 128 --plot l.svg"
    ));
    let rows = lengths["lengths"].as_array().expect("a list");
    let named: Vec<u64> = rows
        .iter()
        .filter_map(|row| row["length"].as_u64())
        .collect();
    assert_eq!(named, [16, 32, 64, 128]);
    assert!(
        lengths["bytes"]
            .as_u64()
            .is_some_and(|it| it > 0 && it % 128 == 0)
    );
    assert!(number(&rows[0], "bits_per_byte") > number(&rows[3], "bits_per_byte"));
    assert!(workspace.path("l.svg").is_file());
    // Words are counted in the bytes that are measured.
    let carried = &lengths["carried"];
    let long = workspace.path("long.txt");
    std::fs::write(&long, "river stone\n".repeat(16)).expect("written");
    let own = "--checkpoint checkpoints/run --text long.txt --device cpu --json";
    let cut = workspace.json(&format!("eval-lengths {own} --from 64 --to 128"));
    let whole = workspace.json(&format!("eval {own} --mode carried --max-bytes 128"));
    assert_eq!(cut["bytes"], whole["bytes"]);
    assert_eq!(cut["carried"]["bits_per_byte"], whole["bits_per_byte"]);
    assert_eq!(cut["carried"]["word_perplexity"], whole["word_perplexity"]);
    assert!(number(carried, "word_perplexity") > 1.0);
    let sliding = workspace.json(&format!("eval-lengths {more} --from 16 --to 128 --sliding"));
    assert_eq!(sliding["bytes"], lengths["bytes"]);
    assert_ne!(sliding["lengths"][0], lengths["lengths"][0]);
    assert_eq!(sliding["carried"], lengths["carried"]);

    let noise = workspace.json(&format!("eval-noise {more} --mode carried"));
    let rows = noise["rows"].as_array().expect("a list");
    assert_eq!(rows.len(), 11);
    assert_eq!(noise["split"], "validation");
    let clean = score(
        &workspace,
        "checkpoints/run",
        "--split validation --mode carried",
    );
    assert_eq!(rows[0]["bits_per_byte"], clean["bits_per_byte"]);
    assert_eq!(rows[0]["rise"], 0.0);
    let antspeak = rows
        .iter()
        .find(|row| row["noise"] == "antspeak")
        .expect("a row");
    assert_eq!(
        antspeak["bytes"].as_u64(),
        clean["bytes"].as_u64().map(|it| 3 * it)
    );
    let again = workspace.json(&format!("eval-noise {more} --mode carried"));
    assert_eq!(noise, again);
    let other = workspace.json(&format!("eval-noise {more} --mode carried --seed 1"));
    assert_ne!(other["rows"][1], rows[1]);
}

#[test]
fn tasks_are_scored() {
    let workspace = with_documents();
    let write = |name: &str, lines: &[&str]| {
        std::fs::write(workspace.path(name), lines.join("\n")).expect("written");
    };
    let choice = r#"{"query": "the", "choices": ["river", "qqqqq"], "gold": 0}"#;
    let wrong = r#"{"query": "the", "choices": ["river", "qqqqq"], "gold": 1}"#;
    write("choice.jsonl", &[choice, wrong, choice, choice]);
    write(
        "word.jsonl",
        &[r#"{"context": "the river walks", "continuation": "zq"}"#],
    );
    let line = "eval-tasks --checkpoint checkpoints/run --device cpu --json";
    let tasks = "--tasks choice.jsonl word.jsonl";
    let scores = workspace.json(&format!("{line} {tasks} --samples samples.jsonl"));
    assert_eq!(scores[0]["name"], "choice");
    assert_eq!(scores[0]["acc"]["value"], 0.75);
    assert_eq!(scores[0]["acc_norm"]["value"], 0.75);
    assert_eq!(scores[1]["acc"]["value"], 0.0);
    assert!(number(&scores[1], "perplexity") > 100.0);
    let samples = std::fs::read_to_string(workspace.path("samples.jsonl")).expect("written");
    assert_eq!(samples.lines().count(), 5);
    let limited = workspace.json(&format!("{line} {tasks} --limit 2"));
    assert_eq!(limited[0]["acc"]["value"], 0.5);
    write("bad.jsonl", &["{}"]);
    workspace.fails(
        &format!("{line} --tasks bad.jsonl"),
        2,
        &["bad.jsonl", "line 1"],
    );
}

#[test]
fn losses_are_converted() {
    let workspace = Workspace::new();
    let losses = workspace.json("perplexity --byte-ce 0.5901387288495581 --json");
    assert!((number(&losses, "bits_per_byte") - 0.8514).abs() < 5e-5);
    assert!((number(&losses, "word_perplexity") - 33.05).abs() < 5e-3);
    let losses = workspace.json("perplexity --subword-ce 2.399497291852516 --json");
    assert!((number(&losses, "word_perplexity") - 34.53).abs() < 5e-3);
    let line = "perplexity --word-ppl 39.6 --corpus pg19-validation";
    let text = String::from_utf8(workspace.ok(line)).expect("text");
    assert!(text.contains("bits per byte          0.900"), "{text}");
    let own = workspace.json("perplexity --bpb 2 --data data/test --json");
    assert_eq!(own["subword_cross_entropy"], Value::Null);
    workspace.fails(
        "perplexity --subword-ce 2 --data data/test",
        2,
        &["--subword-ce"],
    );
    for line in [
        "perplexity",
        "perplexity --bpb 1 --word-ppl 2",
        "perplexity --word-ppl 0.5",
    ] {
        let output = workspace
            .command(line)
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(2), "{line}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let workspace = Workspace::new();
    workspace.train("run", &[], "--stop-after 1");
    let line = "--checkpoint checkpoints/run --device cpu";
    for (more, words) in [
        ("eval --data data --mode carried --length 10", "--length"),
        ("eval --data data --stride 10", "--stride"),
        (
            "eval --data data --mode sliding --length 10 --stride 11",
            "--stride 11",
        ),
        ("eval-lengths --data data", "no document has 524288"),
        ("eval-lengths --data data --from 100 --to 300", "doubled"),
    ] {
        workspace.fails(&format!("{more} {line}"), 2, &[words]);
    }
    std::fs::write(workspace.path("empty.txt"), "").expect("writable");
    let data = 3;
    for (text, words) in [
        ("--text empty.txt", "looked for bytes to score in empty.txt"),
        ("--data none", "writes them, into DIR/train"),
    ] {
        let line = format!("eval {text} {line}");
        workspace.fails(&line, data, &[words]);
    }
    std::fs::write(workspace.path("bad.jsonl"), "{\"query\": \"x\"}").expect("writable");
    for (tasks, words) in [
        ("none.jsonl", "nothing at `none.jsonl`"),
        ("bad.jsonl", "no `choices` and `gold`"),
    ] {
        let line = format!("eval-tasks --tasks {tasks} {line}");
        workspace.fails(&line, 2, &[words]);
    }
}

/// Every byte of real books once, whichever way they are cut. `MAMBABYTE_PG19` is a copy of PG-19.
#[test]
fn real_books_are_counted_to_the_byte() {
    let Some(books) = std::env::var_os("MAMBABYTE_PG19") else {
        let why = "set MAMBABYTE_PG19 to a PG-19 copy";
        common::skipped("real_books_are_counted_to_the_byte", why);
        return;
    };
    let workspace = Workspace::new();
    workspace.train("run", &[], "");
    let books = books.to_string_lossy();
    let prepare = "data prepare --source pg19 --splits test --max-bytes 2000000 --out books --json";
    workspace.ok(&format!("{prepare} --path {books}"));
    let info = workspace.json("data info books --json");
    let line = "eval --checkpoint checkpoints/run --data books --device cpu --json --mode";
    let carried = workspace.json(&format!("{line} carried"));
    let windows = workspace.json(&format!("{line} windows --length 100000000 --piece 777"));
    for report in [&carried, &windows] {
        assert_eq!(report["bytes"], info["test"]["bytes"]);
        assert_eq!(report["words"], info["test"]["words"]);
    }
    let difference = number(&carried, "bits_per_byte") - number(&windows, "bits_per_byte");
    assert!(difference.abs() < 1e-5, "{difference}");
}
