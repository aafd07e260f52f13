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

#[test]
fn samples_have_draws_of_their_own() {
    let workspace = trained();
    let text = String::from_utf8_lossy(&generate(
        &workspace,
        "--prompt the --max-new-bytes 40 --num-samples 3 --json",
    ))
    .into_owned();
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let bytes = |i: usize| report["texts"][i]["bytes"].clone();
    assert!(bytes(0) != bytes(1) && bytes(1) != bytes(2));
    assert_eq!(
        report["texts"][2]["logprobs"].as_array().map(Vec::len),
        Some(40)
    );
    // The first is what a single one would be.
    let single = generate(&workspace, "--prompt the --max-new-bytes 40");
    let first: Vec<u8> = serde_json::from_value(bytes(0)).expect("bytes");
    assert_eq!(single, first);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let workspace = trained();
    let whole = generate(
        &workspace,
        "--prompt the --max-new-bytes 80 --temperature 0",
    );
    let whole = String::from_utf8(whole).expect("the corpus is ASCII");
    let stop = &whole[30..33];
    let expected = &whole[..whole.find(stop).expect("it is there")];
    let stop = stop.replace(' ', "_SPACE_");
    if stop.contains("_SPACE_") || stop.trim().is_empty() {
        // A command line of a test is cut at spaces: another place has none.
        return;
    }
    let arguments = format!("--prompt the --max-new-bytes 80 --temperature 0 --stop {stop}");
    assert_eq!(generate(&workspace, &arguments), expected.as_bytes());
}

#[test]
fn settings_and_the_authors_names_for_them_are_known() {
    let workspace = trained();
    let ours = "--prompt the --max-new-bytes 30 --top-k 5 --top-p 0.9 --min-p 0.01 \
                --repetition-penalty 1.3 --num-samples 2 --json";
    let theirs = "--prompt the --max_new_tokens 30 --top_k 5 --top_p 0.9 --min_p 0.01 \
                  --repetition_penalty 1.3 --num_samples 2 --json";
    assert_eq!(generate(&workspace, ours), generate(&workspace, theirs));
    let echoed = generate(&workspace, "--prompt the --max-new-bytes 5 --echo");
    assert!(echoed.starts_with(b"the") && echoed.len() == 8);
}

/// The kernels for single bytes and the model's own step write the same.
#[test]
fn the_models_own_step_gives_the_same_bytes() {
    let workspace = trained();
    let arguments = "--prompt the --max-new-bytes 100 --temperature 0";
    let plain = generate(&workspace, &format!("{arguments} --plain"));
    assert_eq!(generate(&workspace, arguments), plain);
}

#[test]
fn timing_goes_to_standard_error() {
    let workspace = trained();
    let line = "generate --checkpoint checkpoints/run --device cpu --max-new-bytes 7 --timing";
    let output = workspace.command(line).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.stdout.len() == 7 && said.contains("written: 7 bytes"),
        "{said}"
    );
}

#[test]
fn the_benchmark_reports_what_was_asked_for() {
    let workspace = trained();
    let line = "bench decode --checkpoint checkpoints/run --device cpu --promptlen 20 --genlen 12 \
                --batch 3 --repeat 1 --json";
    let report: serde_json::Value = serde_json::from_slice(&workspace.ok(line)).expect("JSON");
    let report = &report[0];
    assert_eq!(report["batch"], 3);
    assert_eq!(
        (&report["prompt_length"], &report["generation_length"]),
        (&20.into(), &12.into())
    );
    assert!(report["decode_bytes_per_second"].as_f64() > Some(0.0));
    let text = workspace.ok("bench prefill --preset tiny --device cpu --prompt-len 50 --repeat 1");
    assert!(String::from_utf8_lossy(&text).contains("prompt length: 50"));
    let line = "bench prefill --preset tiny --device cpu --prompt-len 50 --repeat 1 --json";
    let report = workspace.json(line);
    assert!(report[0]["prefill_ms"].as_f64() > Some(0.0));
    assert_eq!(report[0].get("decode_ms"), None);
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

#[test]
fn a_prompt_may_come_from_standard_input() {
    let workspace = trained();
    let prompt = workspace.path("prompt");
    std::fs::write(&prompt, b"any \xff bytes").expect("writable");
    let from = |file: &str| {
        let line = format!(
            "generate --checkpoint run --device cpu --max-new-bytes 9 --prompt-file {file}"
        );
        let mut command = workspace.command(&line);
        command.stdin(std::fs::File::open(&prompt).expect("a file"));
        let output = command.output().expect("the program starts");
        assert!(output.status.success(), "{file}: {output:?}");
        output.stdout
    };
    assert_eq!(from("-"), from("prompt"));
    let line = "generate --checkpoint run --prompt-file none";
    workspace.fails(line, 2, &["nothing at `none`"]);
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
