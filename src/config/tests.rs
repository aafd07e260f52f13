//! Tests of the whole way from text to a checked config.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

const SMALLEST: &str = "
[model]
preset = \"tiny\"
[train]
steps = 1000
[data]
path = \"data/pg19\"
";

fn parse(text: &str, overrides: &[&str]) -> Result<Config, ConfigErrors> {
    let overrides: Vec<String> = overrides.iter().map(|it| (*it).to_owned()).collect();
    Config::parse("test.toml", text, &overrides)
}

/// The only error of a text, as shown.
fn only_error(text: &str, overrides: &[&str]) -> String {
    let errors = parse(text, overrides).expect_err("one error");
    assert_eq!(errors.errors.len(), 1, "{errors}");
    errors.errors[0].to_string()
}

/// The only error of the smallest config with one more override.
fn error_of(assignment: &str) -> String {
    only_error(SMALLEST, &[assignment])
}

#[test]
fn the_smallest_config_has_the_papers_defaults() {
    let config = parse(SMALLEST, &[]).expect("valid");
    assert_eq!(
        config.model,
        MambaConfig::from_preset(Preset::Tiny).expect("sizes")
    );
    assert_eq!(config.train.length, 8192);
    assert_eq!(config.train.seed, 4740);
    assert_eq!(config.optimizer.lr, 4e-4);
    assert_eq!(config.optimizer.clip, 0.1);
    assert_eq!(
        (config.optimizer.beta1, config.optimizer.beta2),
        (0.9, 0.95)
    );
    assert_eq!(config.data.path, PathBuf::from("data/pg19"));
    assert_eq!(config.warnings(), Vec::<String>::new());
}

#[test]
fn everything_required_is_missing_from_an_empty_text() {
    let errors = parse("", &[]).expect_err("nothing there");
    let keys: Vec<&str> = errors.errors.iter().map(|it| it.key.as_str()).collect();
    assert_eq!(
        keys,
        ["model.dim", "model.depth", "train.steps", "data.path"]
    );
    let text = errors.to_string();
    assert!(text.starts_with("test.toml has 4 problems"), "{text}");
    assert!(
        text.contains("`train.steps`: missing, expected an integer from 1"),
        "{text}"
    );
}

#[test]
fn all_problems_are_reported_at_once_with_their_lines() {
    let text = "
[model]
preset = \"tiny\"
d_state = \"16\"
dt_min = 0.5
dt_max = 0.1
[train]
steps = -5
lenght = 100
batch = 1e3
precision = \"fp8\"
[optimiser]
lr = 1
[data]
path = 7
";
    let errors = parse(text, &[]).expect_err("many problems");
    let shown: Vec<String> = errors.errors.iter().map(ToString::to_string).collect();
    let expected = [
        "`model.d_state` (line 4): got `\"16\"`, expected an integer from 1 to 256\n\
         hint: write it without quotes",
        "`model.dt_min` (line 5): got `0.5`, expected a number below `model.dt_max`, which is 0.1\n\
         hint: swap the two, or leave both out for 0.001 and 0.1",
        "`train.steps` (line 8): got `-5`, expected an integer from 1 to 1000000000\n\
         hint: it cannot be negative",
        "`train.batch` (line 10): got `1000.0`, expected an integer from 1 to 1048576\n\
         hint: write `1000`, without a decimal point or an exponent",
        "`train.precision` (line 11): got `\"fp8\"`, expected one of \"fp32\", \"tf32\", \"bf16\"\n\
         hint: bf16 is for NVIDIA GPUs; the CPU is fastest in fp32",
        "`data.path` (line 15): got `7`, expected text that is not empty\n\
         hint: write it in double quotes",
        "`optimiser` (line 13): no such section\nhint: did you mean `[optimizer]`?",
        "`train.lenght` (line 9): no such key\nhint: did you mean `train.length`?",
    ];
    assert_eq!(shown, expected);
}

#[test]
fn unknown_keys_are_explained() {
    for (assignment, hint) in [
        ("train.stpes=1", "did you mean `train.steps`?"),
        ("train.lr=1", "it belongs to `[optimizer]`"),
        ("model.n_layers=4", "did you mean `model.depth`?"),
        (
            "train.zzzzzzzz=4",
            "the keys of `[train]` are steps, batch,",
        ),
        ("modell.dim=4", "did you mean `[model]`?"),
        ("nonsense.dim=4", "the sections are model, train,"),
    ] {
        let error = error_of(assignment);
        assert!(error.contains("(--set): no such"), "{error}");
        assert!(error.contains(hint), "{error}");
    }
    let error = only_error(&format!("batch_size = 4\n{SMALLEST}"), &[]);
    assert!(error.contains("did you mean `train.batch`?"), "{error}");
}

#[test]
fn a_misspelt_preset_is_one_error() {
    let error = error_of("model.preset=tinny");
    assert!(error.contains("did you mean \"tiny\"?"), "{error}");
    let error = error_of("model.preset=huge");
    assert!(error.contains("one of \"custom\", \"tiny\""), "{error}");
}

#[test]
fn values_out_of_range_are_refused() {
    for assignment in [
        "model.dim=0",
        "model.dim=-1",
        "model.dim=65537",
        "model.dim=9223372036854775808",
        "model.dim=1.5",
        "model.dt_rank=0",
        "model.dt_rank=257",
        "model.dt_rank=many",
        "model.vocab_size=255",
        "model.d_conv=1",
        "model.norm_eps=0",
        "model.dt_max=nan",
        "model.dt_max=inf",
        "model.dt_init_floor=0.2",
        "model.bias=1",
        "model.norm=batch",
        "train.steps=0",
        "train.length=0",
        "train.batch=0",
        "train.accumulation=0",
        "train.seed=-1",
        "train.log_every=0",
        "train.recompute=-1",
        "train.recompute=some",
        "train.memory_limit=24",
        "train.memory_limit=24 gibibytes",
        "train.memory_limit=1MiB",
        "train.mode=random",
        "optimizer.lr=0",
        "optimizer.lr=-1e-3",
        "optimizer.min_lr=1",
        "optimizer.beta1=1",
        "optimizer.clip=-1",
        "optimizer.state=fp16",
        "train.checkpoint_every=-1",
        "optimizer.decay_steps=499",
        "data.path=",
        "checkpoint.keep_last=0",
        "checkpoint.dir=\"\"",
        "device.kind=tpu",
        "device.index=-1",
        "train.batch=262144",
        "train=3",
        "train.steps",
        "=3",
        ".steps=3",
        "train.=3",
    ] {
        let error = error_of(assignment);
        assert!(error.contains("got `"), "{assignment}: {error}");
        assert!(error.contains("expected"), "{assignment}: {error}");
    }
}

#[test]
fn overrides_win_in_their_order_and_need_no_quotes() {
    let config = parse(
        SMALLEST,
        &[
            "train.steps=2000",
            "train.steps = 3000",
            "model.dim=64",
            "model.dt_rank=auto",
            "data.path=2024",
            "train.sample_prompt=a = b",
            "train.memory_limit=24 GiB",
            "train.recompute=2",
            "device.kind=vulkan",
            "optimizer.lr=1",
            "optimizer.state=int8",
        ],
    )
    .expect("valid");
    assert_eq!(config.train.steps, 3000);
    assert_eq!((config.model.dim, config.model.depth), (64, 4));
    assert_eq!(config.data.path, PathBuf::from("2024"));
    assert_eq!(config.train.sample_prompt, "a = b");
    assert_eq!(config.train.memory_limit, MemoryLimit::Bytes(24 << 30));
    assert_eq!(config.train.recompute, Recompute::First(2));
    assert_eq!(config.device.kind, DeviceKind::Wgpu);
    assert_eq!(config.optimizer.lr, 1.0);
    assert_eq!(config.optimizer.state, OptimizerState::Int8);
}

#[test]
fn an_override_mends_a_file() {
    let broken = SMALLEST.replace("1000", "\"many\"");
    assert!(parse(&broken, &[]).is_err());
    assert!(parse(&broken, &["train.steps=1000"]).is_ok());
    let unreadable = SMALLEST.replace("1000", "99999999999999999999999");
    assert!(parse(&unreadable, &[]).is_err());
}

#[test]
fn broken_toml_is_reported_beside_other_problems() {
    let text = "
[model]
preset = tiny
[train]
steps = 0
[data
path = \"x\"
";
    let errors = parse(text, &[]).expect_err("broken");
    let lines: Vec<_> = errors
        .errors
        .iter()
        .filter_map(|it| it.place.clone())
        .collect();
    assert!(lines.contains(&Place::Line(3)), "{errors}");
    assert!(lines.contains(&Place::Line(5)), "{errors}");
    assert!(
        errors
            .errors
            .iter()
            .any(|it| it.expected.contains("not valid TOML")),
        "{errors}"
    );
    assert!(!errors.to_string().contains("missing"), "{errors}");
}

#[test]
fn a_bracket_that_is_not_closed_is_one_problem() {
    for text in [
        "[model\npreset=\"tiny\"\n",
        "[train]\nsteps = 1\n[data\npath = \"x\"\n",
    ] {
        let errors = parse(text, &[]).expect_err("broken");
        assert_eq!(errors.errors.len(), 1, "{errors}");
    }
    let errors = parse("[model\n[modle]\ndim = 3\n", &[]).expect_err("broken");
    assert!(errors.to_string().contains("`[model]`"), "{errors}");
}

#[test]
fn sections_that_are_no_tables_are_explained() {
    for text in ["train = 5", "[[train]]\nsteps = 1"] {
        let errors = parse(text, &[]).expect_err("not a table").to_string();
        assert!(
            errors.contains("write `[train]` on a line of its own"),
            "{errors}"
        );
    }
}

#[test]
fn warnings_name_settings_without_effect() {
    for (assignments, key) in [
        (
            &["train.validate_every=0", "train.validate_bytes=9"][..],
            "train.validate_bytes",
        ),
        (
            &["train.sample_every=0", "train.sample_bytes=9"],
            "train.sample_bytes",
        ),
        (&["train.validate_every=2000"], "train.validate_every"),
        (&["train.recompute=5"], "train.recompute"),
        (&["train.checkpoint_every=4"], "train.checkpoint_every"),
        (&["optimizer.decay_steps=2000"], "optimizer.decay_steps"),
        (&["optimizer.decay_steps=800"], "optimizer.decay_steps"),
        (
            &["checkpoint.every_steps=0", "checkpoint.keep_every=2"],
            "checkpoint.keep_every",
        ),
        (&["device.kind=cpu", "device.index=1"], "device.index"),
        (&["model.pscan=false"], "model.pscan"),
        (&["model.residual_in_fp32=false"], "model.residual_in_fp32"),
        (
            &["checkpoint.every_steps=0", "guard.rollbacks=2"],
            "guard.rollbacks",
        ),
    ] {
        let warnings = parse(SMALLEST, assignments).expect("valid").warnings();
        assert_eq!(warnings.len(), 1, "{assignments:?}: {warnings:?}");
        assert!(warnings[0].contains(key), "{warnings:?}");
    }
    // A stop saves as well, and then old checkpoints are deleted.
    let settings = ["checkpoint.every_steps=0", "checkpoint.keep_last=1"];
    let config = parse(SMALLEST, &settings).expect("valid");
    assert_eq!(config.warnings(), Vec::<String>::new());
}

#[test]
fn a_config_by_hand_is_checked_too() {
    let mut config = parse(SMALLEST, &[]).expect("valid");
    assert!(config.validate().is_ok());
    config.train.length = 0;
    config.optimizer.beta2 = 2.0;
    assert_eq!(config.validate().expect_err("two problems").errors.len(), 2);
}

#[test]
fn a_config_goes_through_json_and_refuses_unknown_fields() {
    let config = parse(SMALLEST, &["train.recompute=3", "train.memory_limit=8GB"]).expect("valid");
    let mut json = serde_json::to_value(&config).expect("json");
    assert_eq!(
        serde_json::from_value::<Config>(json.clone()).expect("back"),
        config
    );
    json["model"]["extra"] = 1.into();
    assert!(serde_json::from_value::<Config>(json).is_err());
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load("no/such/file.toml", &[])
        .expect_err("absent")
        .to_string();
    assert!(
        error.starts_with("no/such/file.toml: could not read the config"),
        "{error}"
    );
    assert!(error.contains("\nhint: "), "{error}");
}

/// Every example config loads, without warnings, and names every key so that it documents it.
#[test]
fn the_example_configs_are_valid_and_complete() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).expect("the folder of configs") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|it| it != "toml") {
            continue;
        }
        count += 1;
        let config = Config::load(&path, &[]).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(
            config.warnings(),
            Vec::<String>::new(),
            "{}",
            path.display()
        );
        let text = std::fs::read_to_string(&path).expect("text");
        let named: toml::Table = text.parse().expect("TOML");
        let all: toml::Table = config.to_toml().parse().expect("TOML");
        for (section, keys) in &all {
            // A preset stands for the keys of the model.
            if section == "model" {
                continue;
            }
            for key in keys.as_table().expect("a table").keys() {
                assert!(
                    named.get(section).and_then(|it| it.get(key)).is_some(),
                    "{}: {section}.{key} is not there",
                    path.display()
                );
            }
        }
    }
    assert!(count >= 5, "{count} configs in {}", folder.display());
}

/// A valid override for each kind of value.
fn assignment() -> impl Strategy<Value = String> {
    prop_oneof![
        (1..500usize).prop_map(|it| format!("model.dim={it}")),
        (1..9usize).prop_map(|it| format!("model.depth={it}")),
        Just("model.dt_rank=\"auto\"".to_owned()),
        (0.0001..0.09f64).prop_map(|it| format!("model.dt_min={it}")),
        any::<bool>().prop_map(|it| format!("model.tie_embeddings={it}")),
        (1..i64::MAX).prop_map(|it| format!("train.seed={it}")),
        (1..i64::MAX).prop_map(|it| format!("train.validate_bytes={it}")),
        (0..99usize).prop_map(|it| format!("train.recompute={it}")),
        (0..99usize).prop_map(|it| format!("train.checkpoint_every={it}")),
        prop_oneof![Just("auto"), Just("none"), Just("all")]
            .prop_map(|it| format!("train.recompute={it}")),
        ((1u64 << 30)..(1 << 50)).prop_map(|it| format!("train.memory_limit={it}B")),
        "\\PC{0,20}".prop_map(|it| format!("train.sample_prompt={it}")),
        (1e-5..10.0f64).prop_map(|it| format!("optimizer.lr={it:e}")),
        (0.0..0.999f64).prop_map(|it| format!("optimizer.beta2={it}")),
        prop_oneof![Just("fp32"), Just("int8")].prop_map(|it| format!("optimizer.state={it}")),
        "[a-z/ .é\"']{0,9}[a-z]".prop_map(|it| format!("data.path={it}")),
        (0..256usize).prop_map(|it| format!("device.index={it}")),
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}", overrides in prop::collection::vec("\\PC{0,30}", 0..3)) {
        let _ = Config::parse("test", &text, &overrides);
    }

    #[test]
    fn no_text_that_is_almost_a_config_panics(
        parts in prop::collection::vec(
            prop_oneof![
                Just("[train]\n".to_owned()), Just("[model]\n".to_owned()), Just("[[data]]\n".to_owned()),
                Just("steps".to_owned()), Just("dim".to_owned()), Just("preset".to_owned()), Just("path".to_owned()),
                Just(" = ".to_owned()), Just("\"tiny\"\n".to_owned()), Just("{ a.b = 1 }\n".to_owned()),
                Just(".".to_owned()), Just("\n".to_owned()), Just("'''".to_owned()), Just("[1, ".to_owned()),
                Just("1979-05-27T07:32:00Z\n".to_owned()), any::<i64>().prop_map(|it| format!("{it}\n")),
                any::<f64>().prop_map(|it| format!("{it}\n")), "\\PC{0,4}",
            ],
            0..30,
        )
    ) {
        let text: String = parts.concat();
        if let Ok(config) = Config::parse("test", &text, &[]) {
            config.validate().expect("still valid");
        }
    }

    #[test]
    fn a_resolved_config_reads_back_equal(overrides in prop::collection::vec(assignment(), 0..12)) {
        if let Ok(config) = Config::parse("test", SMALLEST, &overrides) {
            let text = config.to_toml();
            prop_assert!(!text.contains('#') || config.train.sample_prompt.contains('#'));
            prop_assert_eq!(&text.parse::<Config>().expect("valid"), &config);
        }
    }

    #[test]
    fn any_memory_limit_reads_back(bytes in 1..i64::MAX as u64) {
        let limit = MemoryLimit::Bytes(bytes);
        prop_assert_eq!(limit.to_string().parse::<MemoryLimit>(), Ok(limit));
    }

    #[test]
    fn no_memory_limit_panics(text in "\\PC{0,20}") {
        let _ = text.parse::<MemoryLimit>();
    }
}
