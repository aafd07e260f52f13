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
