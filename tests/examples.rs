//! The examples run.

mod common;

use std::path::Path;
use std::process::Command;

/// What an example prints. Cargo builds examples together with all tests, next to the program.
fn run(example: &str, arguments: &[&str]) -> Option<String> {
    let folder = Path::new(common::PROGRAM).parent()?.join("examples");
    let program = folder.join(format!("{example}{}", std::env::consts::EXE_SUFFIX));
    if !program.exists() {
        let why = format!(
            "{} was not built: run `cargo test` for all",
            program.display()
        );
        common::skipped(&format!("example {example}"), &why);
        return None;
    }
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{example}: {}\n{said}",
        output.status
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn op() {
    if let Some(text) = run("op", &[]) {
        assert!(
            text.contains("y [2, 10, 4], last state [2, 4, 3]"),
            "{text}"
        );
    }
}

#[test]
fn block() {
    if let Some(text) = run("block", &[]) {
        assert!(text.contains("[2, 3, 4] to [2, 3, 4]"), "{text}");
        assert!(text.contains("[2, 64, 16] to [2, 64, 16]"), "{text}");
    }
}

#[test]
fn language_model() {
    let workspace = common::Workspace::new();
    workspace.train("run", &[], "");
    let checkpoint = workspace.run("run").display().to_string();
    for arguments in [&[][..], &[&checkpoint, "the river"]] {
        if let Some(text) = run("language_model", arguments) {
            assert!(text.contains("bits per byte"), "{text}");
        }
    }
}

/// A checkpoint by PyTorch, and one of ours in the form of transformers.
#[test]
fn released_checkpoint() {
    let workspace = common::Workspace::new();
    workspace.train("run", &["model.norm=rms", "model.tie_embeddings=true"], "");
    workspace.ok("export --checkpoint checkpoints/run --format transformers --out hub");
    let hub = workspace.path("hub").display().to_string();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/layer_norm");
    for folder in [hub.as_str(), fixture] {
        let arguments = [folder, "the river", "40"];
        if let Some(text) = run("released_checkpoint", &arguments) {
            assert!(text.contains("the river"), "{text}");
            assert!(text.contains("40 bytes in"), "{text}");
            // The seed decides.
            assert_eq!(
                Some(lines(&text, 2)),
                run("released_checkpoint", &arguments).map(|it| lines(&it, 2))
            );
        }
    }
}

#[test]
fn dump_training() {
    let workspace = common::Workspace::with_documents([common::pseudo_words(1, 6000)]);
    let config = workspace.path("config.toml").display().to_string();
    let out = workspace.path("dump").display().to_string();
    let data = format!("data.path={}", workspace.path("data").display());
    if run("dump_training", &[&config, &out, &data, "train.steps=3"]).is_none() {
        return;
    }
    let file = std::fs::read(workspace.path("dump/batches.npy")).expect("the batches");
    let (header, rows) = file.split_at(file.len() - 3 * 2 * 65);
    assert!(header.starts_with(b"\x93NUMPY\x01\x00") && header.len() % 64 == 0);
    assert!(String::from_utf8_lossy(header).contains("'shape': (3, 2, 65)"));
    assert!(
        rows.iter()
            .all(|byte| byte.is_ascii_lowercase() || b" \n".contains(byte))
    );
    // The weights are those that a run begins with: its first loss is theirs.
    workspace.train("run", &["train.steps=1"], "");
    workspace.train("again", &["train.steps=1"], "--init dump/step-0");
    assert_eq!(workspace.measured("run"), workspace.measured("again"));
}

/// The last so many lines.
fn lines(text: &str, skipped: usize) -> Vec<String> {
    text.lines().skip(skipped).map(str::to_owned).collect()
}
