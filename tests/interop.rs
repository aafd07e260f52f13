//! Checkpoints of other programs: what they predict, every form they come in, and what is said of
//! those that cannot be used.
//!
//! The checkpoints in `tests/fixtures` were saved by PyTorch, with the logits of a plain model there.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{PROGRAM, Workspace, assert_failed, train_line};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

const USAGE: i32 = 2;
const CHECKPOINT: i32 = 4;

const FIXTURES: [&str; 3] = ["layer_norm", "rms_tied", "bf16_wrapped"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A folder in which the program runs.
struct Room {
    folder: TempDir,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { folder }
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.path().join(inside)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs the program, which must succeed; returns what it said.
    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}\n{said}");
        said
    }

    #[track_caller]
    fn fails(&self, arguments: &[&str], code: i32, words: &[&str]) -> String {
        let output = self.command(arguments).output().expect("it starts");
        assert_failed(&output, &arguments.join(" "), code, words)
    }

    #[track_caller]
    fn import(&self, from: &str, out: &str) -> String {
        self.ok(&["import", "--from", from, "--out", out])
    }

    /// An import that must fail and leave nothing behind.
    #[track_caller]
    fn import_fails(&self, from: &str, words: &[&str]) -> String {
        let said = self.fails(
            &["import", "--from", from, "--out", "none"],
            CHECKPOINT,
            words,
        );
        assert!(!self.path("none").exists() && !self.path("none.tmp").exists());
        said
    }

    /// Our weights of an imported checkpoint.
    fn weights(&self, checkpoint: &str) -> Vec<u8> {
        fs::read(self.path(checkpoint).join("model.safetensors")).expect("a checkpoint")
    }

    fn model(&self, checkpoint: &str) -> Value {
        let output = self
            .command(&["params", "--checkpoint", checkpoint, "--json"])
            .output()
            .expect("it starts");
        let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        json["model"].clone()
    }
}

/// Tensors by name, with shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A model as mamba_ssm names it, with values that every float format can hold.
fn tensors(width: usize, layers: usize, rows: usize, layer_norm: bool) -> Tensors {
    let inner = 2 * width;
    let rank = width.div_ceil(16);
    let mut all = Tensors::new();
    let mut put = |name: String, shape: &[usize]| {
        let salt = name.len();
        let count = shape.iter().product::<usize>();
        let value = |i: usize| ((i * 7 + salt * 13) % 31) as f32 / 16.0 - 1.0;
        all.insert(name, (shape.to_vec(), (0..count).map(value).collect()));
    };
    let norm = |put: &mut dyn FnMut(String, &[usize]), at: &str| {
        put(format!("{at}.weight"), &[width]);
        if layer_norm {
            put(format!("{at}.bias"), &[width]);
        }
    };
    put("backbone.embedding.weight".to_owned(), &[rows, width]);
    for layer in 0..layers {
        norm(&mut put, &format!("backbone.layers.{layer}.norm"));
        let shapes: [(&str, &[usize]); 9] = [
            ("A_log", &[inner, 16]),
            ("D", &[inner]),
            ("in_proj.weight", &[2 * inner, width]),
            ("conv1d.weight", &[inner, 1, 4]),
            ("conv1d.bias", &[inner]),
            ("x_proj.weight", &[rank + 32, inner]),
            ("dt_proj.weight", &[inner, rank]),
            ("dt_proj.bias", &[inner]),
            ("out_proj.weight", &[width, inner]),
        ];
        for (name, shape) in shapes {
            put(format!("backbone.layers.{layer}.mixer.{name}"), shape);
        }
    }
    norm(&mut put, "backbone.norm_f");
    put("lm_head.weight".to_owned(), &[rows, width]);
    all
}

/// The tensors in a number format.
fn serialized(tensors: &Tensors, dtype: Dtype) -> Vec<u8> {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let encoded = values.iter().flat_map(|value| match dtype {
                Dtype::BF16 => value.to_bits().to_le_bytes()[2..].to_vec(),
                Dtype::F16 => half_bits(*value).to_le_bytes().to_vec(),
                Dtype::I32 => (*value as i32).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            });
            (name, shape, encoded.collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(dtype, shape.to_vec(), bytes).expect("a whole tensor");
        (name.as_str(), view)
    });
    safetensors::serialize(views, None).expect("writable")
}

/// A multiple of 1/16 within ±1 as float16.
fn half_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    match bits >> 23 & 0xff {
        0 => sign,
        exponent => sign | ((exponent + 15 - 127) << 10) as u16 | (bits >> 13 & 0x3ff) as u16,
    }
}

fn config(width: usize, layers: usize) -> Value {
    json!({
        "d_model": width, "n_layer": layers, "vocab_size": 256, "ssm_cfg": {"expand": 2},
        "rms_norm": false, "residual_in_fp32": true, "fused_add_norm": true,
        "pad_vocab_size_multiple": 8, "tie_embeddings": false,
    })
}

fn write(folder: &Path, weights: &[u8], config: &Value) {
    fs::create_dir_all(folder).expect("a folder");
    fs::write(folder.join("model.safetensors"), weights).expect("writable");
    fs::write(folder.join("config.json"), config.to_string()).expect("writable");
}

/// The shape and values of a NumPy file.
fn npy(path: &Path) -> (String, Vec<f32>) {
    let bytes = fs::read(path).expect("a NumPy file");
    let data = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..data]).into_owned();
    let shape = header
        .split_once('(')
        .and_then(|(_, it)| it.split_once(')'));
    let values = bytes[data..].chunks_exact(4);
    (
        shape.expect("a shape").0.to_owned(),
        values
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
    )
}

#[test]
fn checkpoints_by_pytorch_predict_what_they_do_there() {
    let room = Room::new();
    let text = fixture("text.bin");
    for name in FIXTURES {
        room.import(&fixture(name).to_string_lossy(), name);
        let (shape, expected) = npy(&fixture(name).join("logits.npy"));
        // In one pass, and byte after byte as in generation.
        for piece in ["4096", "1"] {
            room.ok(&[
                "logits",
                "--checkpoint",
                name,
                "--bytes",
                &text.to_string_lossy(),
                "--out",
                "logits.npy",
                "--piece",
                piece,
                "--device",
                "cpu",
            ]);
            let (got_shape, got) = npy(&room.path("logits.npy"));
            assert_eq!(got_shape, shape, "{name}");
            let difference = got.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let highest = difference.fold(0.0, f32::max);
            assert!(highest < 1e-5, "{name} in pieces of {piece}: {highest}");
        }
        let generated = room
            .command(&["generate", "--max-new-bytes", "3", "--checkpoint", name])
            .output()
            .expect("it starts");
        assert_eq!(generated.stdout.len(), 3, "{name}");
    }
}

#[test]
fn what_goes_out_comes_back_bit_for_bit() {
    let room = Room::new();
    for name in FIXTURES {
        room.import(&fixture(name).to_string_lossy(), name);
        let out = format!("{name}-ssm");
        let export = |format: &'static str, out: &str| {
            vec!["export", "--checkpoint", name, "--format", format, "--out"]
                .into_iter()
                .map(str::to_owned)
                .chain([out.to_owned()])
                .collect::<Vec<_>>()
        };
        let run = |arguments: Vec<String>| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            room.ok(&arguments)
        };
        run(export("mamba-ssm", &out));
        for file in ["pytorch_model.bin", "model.safetensors"] {
            let back = format!("{name}-{file}");
            room.import(&format!("{out}/{file}"), &back);
            assert!(room.weights(&back) == room.weights(name), "{name}: {file}");
            assert_eq!(room.model(&back), room.model(name), "{name}: {file}");
        }
        if name == "rms_tied" {
            run(export("transformers", "hf"));
            room.import("hf", "hf-back");
            assert!(room.weights("hf-back") == room.weights(name));
        } else {
            let arguments = export("transformers", "hf-none");
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            room.fails(&arguments, USAGE, &["LayerNorm", "mamba-ssm"]);
            assert!(!room.path("hf-none").exists());
        }
    }
}

#[test]
fn every_form_is_the_same_model() {
    let room = Room::new();
    let plain = tensors(8, 3, 256, true);
    write(
        &room.path("plain"),
        &serialized(&plain, Dtype::F32),
        &config(8, 3),
    );
    let said = room.import("plain", "expected");
    assert!(said.contains("8 wide, 3 layers, layer norm"), "{said}");
    let same = |form: &str| {
        let out = format!("{form}-out");
        room.import(form, &out);
        assert!(room.weights(&out) == room.weights("expected"), "{form}");
    };
    // Names.
    type Rename = fn(&str) -> String;
    let names: [(&str, Rename); 5] = [
        ("module", |name| format!("module.{name}")),
        ("orig", |name| format!("_orig_mod.module.{name}")),
        ("hf-names", |name| name.replace("embedding", "embeddings")),
        ("authors", |name| {
            name.replace("backbone.embedding", "mambabyte.token_embedding")
                .replace("backbone.norm_f", "mambabyte.final_norm")
                .replace("backbone", "mambabyte")
        }),
        ("bare", |name| name.replace("backbone.", "")),
    ];
    for (form, rename) in names {
        let renamed = plain.iter().map(|(k, v)| (rename(k), v.clone())).collect();
        write(
            &room.path(form),
            &serialized(&renamed, Dtype::F32),
            &config(8, 3),
        );
        same(form);
    }
    // Number formats.
    for (form, dtype) in [("f16", Dtype::F16), ("bf16", Dtype::BF16)] {
        write(&room.path(form), &serialized(&plain, dtype), &config(8, 3));
        same(form);
    }
    // Several files.
    let folder = room.path("sharded");
    fs::create_dir(&folder).expect("a folder");
    let mut map = BTreeMap::new();
    for (i, file) in ["a-1.safetensors", "a-2.safetensors"].iter().enumerate() {
        let part: Tensors = plain
            .clone()
            .into_iter()
            .filter(|(name, _)| name.len() % 2 == i)
            .collect();
        fs::write(folder.join(file), serialized(&part, Dtype::F32)).expect("writable");
        map.extend(part.into_keys().map(|name| (name, file.to_string())));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).expect("writable");
    same("sharded");
    // Configs: none; the authors' YAML, whose number of layers is another; transformers' form.
    let bare = room.path("no-config");
    fs::create_dir(&bare).expect("a folder");
    fs::write(
        bare.join("some.safetensors"),
        serialized(&plain, Dtype::F32),
    )
    .expect("writable");
    same("no-config");
    let yaml = "model:\n  common:\n    vocab_size: 256\n    d_state: 16\n  8M:\n    d_model: 8\n    \
                num_layers: 2\n    expand: 2\n";
    fs::write(bare.join("model.yml"), yaml).expect("writable");
    let said = room.import("no-config", "yaml");
    assert!(said.contains("2 layers and the weights have 3"), "{said}");
    assert!(room.weights("yaml") == room.weights("expected"));
}

#[test]
fn depths_norms_heads_and_vocabularies_of_the_released_ones() {
    let room = Room::new();
    for (name, layers) in [("paper", 53), ("released", 56)] {
        let tensors = tensors(4, layers, 256, true);
        // As in the first uploads: a flag that is wrong, and a key too many.
        let mut config = config(4, layers);
        config["rms_norm"] = json!(true);
        config["pad_id"] = json!(0);
        write(&room.path(name), &serialized(&tensors, Dtype::F32), &config);
        let said = room.import(name, &format!("{name}-out"));
        assert!(
            said.contains("warning:") && said.contains("LayerNorm"),
            "{said}"
        );
        assert_eq!(room.model(&format!("{name}-out"))["depth"], layers);
    }
    // As state-spaces/mamba-*: RMSNorm, a padded vocabulary, a head that is the embedding, stored
    // or not.
    let mut tied = tensors(4, 2, 264, false);
    let embedding = tied["backbone.embedding.weight"].clone();
    tied.insert("lm_head.weight".to_owned(), embedding);
    let mut settings = config(4, 2);
    settings["vocab_size"] = json!(257);
    settings["tie_embeddings"] = json!(true);
    settings["rms_norm"] = json!(true);
    write(
        &room.path("tied"),
        &serialized(&tied, Dtype::F32),
        &settings,
    );
    room.import("tied", "tied-out");
    tied.remove("lm_head.weight");
    write(
        &room.path("lean"),
        &serialized(&tied, Dtype::F32),
        &settings,
    );
    room.import("lean", "lean-out");
    assert!(room.weights("lean-out") == room.weights("tied-out"));
    let model = room.model("tied-out");
    assert_eq!(model["norm"], "rms");
    assert_eq!(model["vocab_size"], 257);
    assert_eq!(model["pad_vocab_size_multiple"], 8);
    assert_eq!(model["tie_embeddings"], true);
}

#[test]
fn tensors_that_do_not_fit_are_all_in_one_error() {
    let room = Room::new();
    let mut wrong = tensors(8, 2, 256, true);
    wrong.remove("backbone.layers.1.mixer.D");
    wrong.insert("vision.weight".to_owned(), (vec![1], vec![0.0]));
    wrong.insert("lm_head.weight".to_owned(), (vec![8, 256], vec![0.0; 2048]));
    write(
        &room.path("wrong"),
        &serialized(&wrong, Dtype::F32),
        &config(8, 2),
    );
    room.import_fails(
        "wrong",
        &[
            "`backbone.layers.1.mixer.D` is missing",
            "`vision.weight` is not part of the model",
            "`lm_head.weight` has the shape [8, 256], expected [256, 8]",
            "hint:",
        ],
    );
    // A list of bounded length.
    write(
        &room.path("shallow"),
        &serialized(&tensors(8, 2, 256, true), Dtype::F32),
        &config(8, 40),
    );
    let said = room.import_fails("shallow", &["`backbone.layers.2.norm.weight` is missing"]);
    assert!(said.contains("more") && said.lines().count() < 30, "{said}");
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let room = Room::new();
    let good = serialized(&tensors(8, 2, 256, true), Dtype::F32);
    let change = |name: &str, key: &str, value: Value| {
        let mut settings = config(8, 2);
        settings[key] = value;
        write(&room.path(name), &good, &settings);
    };
    change("mamba2", "ssm_cfg", json!({"layer": "Mamba2"}));
    room.import_fails("mamba2", &["Mamba-2"]);
    change("attention", "attn_layer_idx", json!([1]));
    room.import_fails("attention", &["attn_layer_idx", "not supported"]);
    change("tied", "tie_embeddings", json!(true));
    room.import_fails(
        "tied",
        &["head that is not the embedding", "tie_embeddings"],
    );
    change("negative", "n_layer", json!(-3));
    room.import_fails("negative", &["`n_layer` is -3"]);
    change("tiny", "vocab_size", json!(100));
    room.import_fails("tiny", &["vocab_size", "256"]);

    let integers = serialized(&tensors(8, 2, 256, true), Dtype::I32);
    write(&room.path("integers"), &integers, &config(8, 2));
    room.import_fails("integers", &["int32", "expected float32"]);
    write(
        &room.path("words"),
        b"version https://git-lfs.github.com/spec/v1",
        &config(8, 2),
    );
    room.import_fails("words", &["no safetensors file"]);
    let mut long = (17u64 << 20).to_le_bytes().to_vec();
    long.resize(18 << 20, b' ');
    write(&room.path("long"), &long, &config(8, 2));
    room.import_fails("long", &["a header of 17825792 bytes"]);
    write(&room.path("empty"), b"", &config(8, 2));
    room.import_fails("empty", &["truncated"]);

    fs::create_dir(room.path("nothing")).expect("a folder");
    room.import_fails("nothing", &["no weights", "pytorch_model.bin"]);
    room.import_fails("absent", &["does not exist"]);
    room.fails(
        &["import", "--from", "tied", "--out", "tied"],
        USAGE,
        &["exists already"],
    );
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let room = Room::new();
    for name in ["layer_norm", "rms_tied"] {
        let whole = fs::read(fixture(name).join("pytorch_model.bin")).expect("a fixture");
        for part in [0, 3, 4, 100, 1000, whole.len() / 2, whole.len() - 1] {
            fs::write(room.path("cut.bin"), &whole[..part]).expect("writable");
            room.import_fails("cut.bin", &["cut.bin"]);
        }
    }
    let whole = serialized(&tensors(8, 2, 256, true), Dtype::F32);
    for part in [7, 8, 200, whole.len() - 1] {
        fs::write(room.path("cut.safetensors"), &whole[..part]).expect("writable");
        room.import_fails("cut.safetensors", &["cut.safetensors"]);
    }
}

#[test]
fn an_index_names_only_files_beside_it() {
    let room = Room::new();
    let folder = room.path("index");
    fs::create_dir(&folder).expect("a folder");
    let index = |map: Value| {
        let text = json!({ "weight_map": map }).to_string();
        fs::write(folder.join("model.safetensors.index.json"), text).expect("writable");
    };
    for file in ["../plain/model.safetensors", "/etc/passwd", "..", "a/b", ""] {
        index(json!({ "lm_head.weight": file }));
        room.import_fails("index", &["not one beside it"]);
    }
    index(json!({}));
    room.import_fails("index", &["names 0 files"]);
    let part = BTreeMap::from([("lm_head.weight".to_owned(), (vec![1], vec![0.0]))]);
    fs::write(folder.join("a.safetensors"), serialized(&part, Dtype::F32)).expect("writable");
    index(json!({"lm_head.weight": "a.safetensors", "backbone.norm_f.weight": "a.safetensors"}));
    room.import_fails(
        "index",
        &["`backbone.norm_f.weight` is not in `a.safetensors`"],
    );
}

#[test]
fn training_starts_from_imported_weights() {
    let workspace = Workspace::new();
    let tensors = tensors(16, 2, 256, true);
    write(
        &workspace.path("theirs"),
        &serialized(&tensors, Dtype::F32),
        &config(16, 2),
    );
    workspace.ok("import --from theirs --out start");
    // With a learning rate of next to nothing the weights stay what they were.
    let still = [
        "optimizer.lr=1e-30",
        "optimizer.min_lr=1e-30",
        "train.steps=1",
    ];
    workspace.train("run", &still, "--init start");
    let read = |folder: &Path| -> BTreeMap<String, Vec<f32>> {
        let bytes = fs::read(folder.join("model.safetensors")).expect("weights");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let values = |bytes: &[u8]| {
            let words = bytes.chunks_exact(4);
            words
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()
        };
        file.iter()
            .map(|(name, view)| (name.to_owned(), values(view.data())))
            .collect()
    };
    let (before, after) = (
        read(&workspace.path("start")),
        read(&workspace.step("run", 1)),
    );
    assert!(before.keys().eq(after.keys()));
    for (name, values) in &before {
        let difference = values.iter().zip(&after[name]).map(|(a, b)| (a - b).abs());
        assert!(difference.fold(0.0, f32::max) < 1e-20, "{name}");
    }

    let line = train_line("other", &["model.depth=3"], "--init start");
    workspace.fails(
        &line,
        CHECKPOINT,
        &["other shapes", "2 layers", "3 layers", "[model]"],
    );
    assert!(!workspace.run("other").exists());
}

/// Highest resident memory of a run of the program, in bytes, asked for again and again.
#[cfg(target_os = "linux")]
fn peak_memory(room: &Room, arguments: &[&str]) -> u64 {
    let mut child = room
        .command(arguments)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    let status = format!("/proc/{}/status", child.id());
    let mut highest = 0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        highest = highest.max(kib.unwrap_or(0) * 1024);
        if let Some(status) = child.try_wait().expect("its state can be asked for") {
            assert!(status.success(), "{arguments:?}");
            return highest;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A checkpoint of 200 MB: importing takes what its largest tensor takes, and loading at most 1.2
/// times the file. `cargo test --release --test interop -- --ignored --nocapture` says how much.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "writes 800 MB"]
fn loading_takes_little_more_than_the_file() {
    let room = Room::new();
    {
        let tensors = tensors(1024, 7, 256, true);
        write(
            &room.path("large"),
            &serialized(&tensors, Dtype::F32),
            &config(1024, 7),
        );
    }
    let file = fs::metadata(room.path("large/model.safetensors"))
        .expect("a file")
        .len();
    fs::write(room.path("text"), "some text").expect("writable");
    let commands: [(&str, &[&str], f64); 5] = [
        (
            "import",
            &["import", "--from", "large", "--out", "ours"],
            0.5,
        ),
        (
            "export",
            &[
                "export",
                "--checkpoint",
                "ours",
                "--format",
                "mamba-ssm",
                "--out",
                "theirs",
            ],
            0.5,
        ),
        (
            "import of pytorch_model.bin",
            &[
                "import",
                "--from",
                "theirs/pytorch_model.bin",
                "--out",
                "again",
            ],
            0.5,
        ),
        ("params", &["params", "--checkpoint", "ours"], 0.5),
        (
            "logits on the CPU",
            &[
                "logits",
                "--checkpoint",
                "ours",
                "--bytes",
                "text",
                "--out",
                "l.npy",
                "--device",
                "cpu",
            ],
            1.2,
        ),
    ];
    for (name, arguments, most) in commands {
        let started = std::time::Instant::now();
        let share = peak_memory(&room, arguments) as f64 / file as f64;
        eprintln!(
            "{name}: {share:.2} of the file's {} MB, {:.1} s",
            file / 1_000_000,
            started.elapsed().as_secs_f64()
        );
        assert!(
            share <= most,
            "{name} took {share:.2} of the file, at most {most}"
        );
    }
}
