//! `generate` writes the bytes it was asked for, and the same ones again for the same seed.

mod common;

use std::io::Read as _;

use common::Workspace;

/// A folder with a run that has learnt a little.
fn trained() -> Workspace {
    let workspace = Workspace::new();
    workspace.train("run", &[], "");
    workspace
}

fn generate(workspace: &Workspace, arguments: &str) -> Vec<u8> {
    let line = format!("generate --checkpoint checkpoints/run --device cpu {arguments}");
    workspace.ok(&line)
}

#[test]
fn exactly_so_many_bytes_are_written() {
    let workspace = trained();
    for count in [1, 37, 300] {
        let bytes = generate(&workspace, &format!("--prompt the --max-new-bytes {count}"));
        assert_eq!(bytes.len(), count);
    }
    assert_eq!(generate(&workspace, "").len(), 256, "the default");
}

#[test]
fn a_seed_gives_the_same_bytes() {
    let workspace = trained();
    let with_seed = |seed: u64| {
        let arguments = format!("--prompt the --max-new-bytes 80 --seed {seed}");
        generate(&workspace, &arguments)
    };
    assert_eq!(with_seed(1), with_seed(1));
    assert_ne!(with_seed(1), with_seed(2));
}

#[test]
fn a_shorter_text_is_the_beginning_of_a_longer_one() {
    let workspace = trained();
    let short = generate(&workspace, "--prompt the --max-new-bytes 20");
    let long = generate(&workspace, "--prompt the --max-new-bytes 60");
    assert_eq!(short, long[..20]);
}

#[test]
fn an_empty_prompt_works() {
    let workspace = trained();
    let bytes = generate(&workspace, "--prompt= --max-new-bytes 10");
    assert_eq!(bytes.len(), 10);
    assert_eq!(bytes, generate(&workspace, "--max-new-bytes 10"));
}

#[test]
fn temperature_zero_and_top_k_one_are_greedy() {
    let workspace = trained();
    let greedy = generate(
        &workspace,
        "--prompt the --max-new-bytes 60 --temperature 0",
    );
    for same in [
        "--temperature 0 --seed 9",
        "--top-k 1",
        "--top-k 1 --seed 9 --temperature 2",
        "--top-p 1e-9",
    ] {
        let arguments = format!("--prompt the --max-new-bytes 60 {same}");
        assert_eq!(generate(&workspace, &arguments), greedy, "{same}");
    }
    assert_ne!(
        generate(&workspace, "--prompt the --max-new-bytes 60"),
        greedy
    );
}

/// A prompt longer than the pieces it is read in is as good as any.
#[test]
fn a_long_prompt_works() {
    let workspace = trained();
    let prompt = "river_stone_".repeat(1500);
    let arguments = format!("--prompt {prompt} --max-new-bytes 5 --temperature 0");
    assert_eq!(generate(&workspace, &arguments).len(), 5);
}

/// A prompt need not be ASCII, nor the output text.
#[test]
fn any_prompt_works() {
    let workspace = trained();
    for prompt in ["é", "日本語", "\u{1f9ac}"] {
        let bytes = generate(&workspace, &format!("--prompt {prompt} --max-new-bytes 10"));
        assert_eq!(bytes.len(), 10, "{prompt}");
    }
}

#[test]
fn a_checkpoint_by_name_of_its_folder_works() {
    let workspace = trained();
    let line = "generate --checkpoint checkpoints/run/step-20 --device cpu --max-new-bytes 10";
    assert_eq!(
        workspace.ok(line),
        generate(&workspace, "--max-new-bytes 10")
    );
}

/// `mambabyte generate | head -c 10` is no failure.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let workspace = trained();
    let mut child = workspace
        .command("generate --checkpoint checkpoints/run --device cpu --max-new-bytes 1000000")
        .spawn()
        .expect("the program starts");
    let mut stdout = child.stdout.take().expect("caught");
    stdout.read_exact(&mut [0; 10]).expect("ten bytes");
    drop(stdout);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", output.status);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
