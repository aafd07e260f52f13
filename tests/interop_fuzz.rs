//! Damaged checkpoints: an error or a model, never a panic, and memory bounded by the file.
//!
//! `MAMBABYTE_FUZZ=1000000 cargo test --release --test interop_fuzz -- --nocapture` runs so many
//! inputs; a usual run has two thousand. `MAMBABYTE_FUZZ_SEED` chooses others.

#[path = "common/fuzzing.rs"]
mod fuzzing;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fuzzing::{Random, attempt, damage, number};
use mambabyte::interop::Import;

/// Memory that reading a damaged checkpoint of some ten kB may take: messages, lists of names, and
/// the table of a model of as many layers as a config can name.
const MOST_MEMORY: usize = 24 << 20;

type Checkpoint = BTreeMap<PathBuf, Vec<u8>>;

fn read_folder(folder: &Path) -> Checkpoint {
    fs::read_dir(folder)
        .expect("a readable folder")
        .map(|entry| entry.expect("a readable entry").path())
        .filter(|path| path.is_file() && path.extension().is_none_or(|it| it != "npy"))
        .map(|path| {
            let name = PathBuf::from(path.file_name().expect("a file has a name"));
            (name, fs::read(&path).expect("a readable file"))
        })
        .collect()
}

/// Checkpoints of every format: those by PyTorch, and one of them as safetensors in one file, in
/// two files with an index, and with the config in YAML.
fn checkpoints() -> Vec<Checkpoint> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut all: Vec<Checkpoint> = ["layer_norm", "rms_tied", "bf16_wrapped"]
        .iter()
        .map(|name| read_folder(&fixtures.join(name)))
        .collect();
    let config = fs::read(fixtures.join("layer_norm/config.json")).expect("a config");
    let weights = foreign_safetensors(&fixtures.join("layer_norm"));
    let yaml =
        b"model:\n  common:\n    vocab_size: 256\n    d_state: 3\n  tiny:\n    d_model: 4\n    \
        num_layers: 2\n    expand: 2\n";
    all.push(BTreeMap::from([
        ("model.safetensors".into(), weights.clone()),
        ("config.json".into(), config.clone()),
    ]));
    all.push(BTreeMap::from([
        ("model.safetensors".into(), weights.clone()),
        ("model.yml".into(), yaml.to_vec()),
    ]));
    let tensors = safetensors::SafeTensors::deserialize(&weights).expect("a file of ours");
    let (mut index, mut files) = (BTreeMap::new(), Checkpoint::new());
    for (i, file) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let part = || tensors.iter().filter(|(name, _)| name.len() % 2 == i);
        index.extend(part().map(|(name, _)| (name.to_owned(), file)));
        let bytes = safetensors::serialize(part(), None).expect("writable");
        files.insert(file.into(), bytes);
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": index}).to_string();
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    files.insert("config.json".into(), config);
    all.push(files);
    all
}

/// The weights of a checkpoint with mamba_ssm's names, as safetensors.
fn foreign_safetensors(folder: &Path) -> Vec<u8> {
    let work = tempfile::tempdir().expect("a temporary folder");
    let program = env!("CARGO_BIN_EXE_mambabyte");
    let run = |arguments: &[&std::ffi::OsStr]| {
        let status = std::process::Command::new(program)
            .args(arguments)
            .stderr(std::process::Stdio::null())
            .status()
            .expect("the program starts");
        assert!(status.success(), "{arguments:?}");
    };
    let (ours, theirs) = (work.path().join("ours"), work.path().join("theirs"));
    run(&[
        "import".as_ref(),
        "--from".as_ref(),
        folder.as_ref(),
        "--out".as_ref(),
        ours.as_ref(),
    ]);
    run(&[
        "export".as_ref(),
        "--checkpoint".as_ref(),
        ours.as_ref(),
        "--format".as_ref(),
        "mamba-ssm".as_ref(),
        "--out".as_ref(),
        theirs.as_ref(),
    ]);
    fs::read(theirs.join("model.safetensors")).expect("what was written")
}

/// Opens the checkpoint in `folder` and, if it is one, reads all of it.
fn open(folder: &Path) -> Result<(), String> {
    let import = Import::open(folder, None).map_err(|e| e.report())?;
    import
        .write(
            &folder.join("out.tmp"),
            &mambabyte_datasets::progress::Silent,
        )
        .map_err(|e| e.report())
}

#[test]
fn damaged_checkpoints_are_errors() {
    let count = number("MAMBABYTE_FUZZ", 2000);
    let mut random = Random(number("MAMBABYTE_FUZZ_SEED", 4740) | 1);
    let originals = checkpoints();
    // In memory where the system has such a folder.
    let shared = Path::new("/dev/shm");
    let base = match shared.is_dir() {
        true => shared.to_owned(),
        false => std::env::temp_dir(),
    };
    let work = tempfile::tempdir_in(base).expect("a temporary folder");
    let folders: Vec<PathBuf> = (0..originals.len())
        .map(|i| work.path().join(i.to_string()))
        .collect();
    for (folder, files) in folders.iter().zip(&originals) {
        fs::create_dir(folder).expect("a folder");
        for (name, bytes) in files {
            fs::write(folder.join(name), bytes).expect("writable");
        }
        open(folder).unwrap_or_else(|e| panic!("{files:?} is whole: {e}", files = files.keys()));
    }
    let (mut refused, mut highest) = (0u64, 0);
    for i in 0..count {
        let which = random.below(originals.len());
        let names: Vec<&PathBuf> = originals[which].keys().collect();
        let name = random.of(&names);
        let original = &originals[which][name];
        let mut bytes = original.clone();
        damage(&mut random, &mut bytes);
        let path = folders[which].join(name);
        fs::write(&path, &bytes).expect("writable");

        match attempt(MOST_MEMORY, || open(&folders[which])) {
            Ok(outcome) => {
                refused += u64::from(outcome.refused);
                highest = highest.max(outcome.memory);
            }
            Err(problem) => {
                let kept = std::env::temp_dir().join(format!("mambabyte-fuzz-{i}"));
                fs::write(&kept, &bytes).expect("writable");
                panic!(
                    "input {i}, {}: {problem}; kept as {}",
                    path.display(),
                    kept.display()
                );
            }
        }
        fs::write(&path, original).expect("writable");
    }
    eprintln!(
        "{count} damaged checkpoints: {refused} refused, {} read as another model; at most {} kB of \
         memory",
        count - refused,
        highest / 1000
    );
}
