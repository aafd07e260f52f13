//! Damaged files of our own formats: shards, checkpoints, manifests, configs, metrics, and the lists
//! that come with PG-19. An error or other numbers, never a panic, and memory bounded by the file.
//!
//! `MAMBABYTE_FUZZ=1000000 cargo test --release --test fuzz -- --nocapture` reads so many inputs of
//! each kind; a usual run one thousand. `MAMBABYTE_FUZZ_SEED` chooses others.

#[path = "common/fuzzing.rs"]
mod fuzzing;

use std::fs;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::tensor::Device;
use fuzzing::{Random, attempt, damage, number};
use mambabyte::config::Config;
use mambabyte::train::checkpoint::{Manifest, Progress};
use mambabyte::train::{Checkpoint, Learner, metrics};
use mambabyte_datasets::progress::Silent;
use mambabyte_datasets::shards::OpenOptions;
use mambabyte_datasets::sources::{InMemory, Pg19};
use mambabyte_datasets::{Document, PrepareOptions, Shards, Split, prepare};
use tempfile::TempDir;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Memory that reading a damaged file of some kB may take: messages, lists, and the table of a model
/// of as many layers as a config can name.
const MOST_MEMORY: usize = 24 << 20;

/// Memory is counted for the whole process: one kind at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Reads damaged copies of `original` as `read` does; `mend` may put hashes right again, so that what
/// is behind them is met.
fn fuzz(
    kind: &str,
    originals: &[Vec<u8>],
    mend: impl Fn(&mut Random, &mut Vec<u8>),
    read: impl Fn(usize, &[u8]) -> Result<(), String>,
) {
    let _alone = ALONE.lock();
    let count = number("MAMBABYTE_FUZZ", 1000);
    let mut random = Random(number("MAMBABYTE_FUZZ_SEED", 4740) | 1);
    for (which, original) in originals.iter().enumerate() {
        read(which, original).unwrap_or_else(|e| panic!("{kind} {which} is whole: {e}"));
    }
    let (mut refused, mut highest) = (0u64, 0);
    for i in 0..count {
        let which = random.below(originals.len());
        let mut bytes = originals[which].clone();
        damage(&mut random, &mut bytes);
        mend(&mut random, &mut bytes);
        let outcome = attempt(MOST_MEMORY, AssertUnwindSafe(|| read(which, &bytes)));
        match outcome {
            Ok(outcome) => {
                refused += u64::from(outcome.refused);
                highest = highest.max(outcome.memory);
            }
            Err(problem) => {
                let kept = std::env::temp_dir().join(format!("mambabyte-fuzz-{kind}-{i}"));
                fs::write(&kept, &bytes).expect("writable");
                panic!(
                    "{kind} {which}, input {i}: {problem}; kept as {}",
                    kept.display()
                );
            }
        }
    }
    eprintln!(
        "{count} damaged inputs, {kind}: {refused} refused, {} read; at most {} kB of memory",
        count - refused,
        highest / 1000
    );
}

/// A folder in memory, where the system has one.
fn folder() -> TempDir {
    let shared = Path::new("/dev/shm");
    match shared.is_dir() {
        true => tempfile::tempdir_in(shared),
        false => tempfile::tempdir(),
    }
    .expect("a folder")
}

fn as_it_is(_: &mut Random, _: &mut Vec<u8>) {}

#[test]
fn shards() {
    let root = folder();
    let documents = (0..7).map(|i| Document {
        name: format!("é{i}"),
        bytes: vec![b'a' + i as u8; 40 * i],
    });
    let source = InMemory::new().with(Split::Train, documents);
    let options = PrepareOptions {
        splits: vec![Split::Train],
        max_shard_bytes: 400,
        ..PrepareOptions::default()
    };
    prepare(&source, root.path(), &options, &Silent).expect("written");
    let dir = root.path().join("train");
    let paths: Vec<PathBuf> = (0..3)
        .map(|i| dir.join(format!("shard-0000{i}.mbs")))
        .collect();
    let originals: Vec<Vec<u8>> = paths.iter().map_while(|it| fs::read(it).ok()).collect();
    assert!(originals.len() > 1, "several shards");
    let mend = |random: &mut Random, bytes: &mut Vec<u8>| {
        // Two times of three the header's hash is right.
        let length = bytes.get(16..24).and_then(|it| it.try_into().ok());
        let length = length.map_or(usize::MAX, |it| u64::from_le_bytes(it) as usize);
        if random.below(3) > 0 && (96..=bytes.len()).contains(&length) {
            let hash = xxh3_64(&bytes[..length - 8]);
            bytes[length - 8..length].copy_from_slice(&hash.to_le_bytes());
        }
    };
    let read = |which: usize, bytes: &[u8]| {
        fs::write(&paths[which], bytes).expect("writable");
        let outcome = read_split(&dir);
        fs::write(&paths[which], &originals[which]).expect("writable");
        outcome
    };
    fuzz("shards", &originals, mend, read);
}

/// Opens a split and reads all there is.
fn read_split(dir: &Path) -> Result<(), String> {
    let options = OpenOptions {
        check_on_read: true,
    };
    let shards = Shards::open_with(dir, options).map_err(|e| e.to_string())?;
    for document in shards.documents() {
        let mut bytes = vec![0; document.bytes.min(1 << 16) as usize];
        shards
            .read(document.start, &mut bytes)
            .map_err(|e| e.to_string())?;
    }
    let starts = shards.document_starts_in(0..shards.byte_count());
    let _ = (starts.count(), shards.info());
    shards.verify(&Silent).map(drop).map_err(|e| e.to_string())
}

const CONFIG: &str = "
[model]
dim = 4
depth = 1
d_state = 2

[train]
steps = 9
batch = 1
length = 8
mode = \"contiguous\"
memory_limit = \"24GiB\"
recompute = 1

[optimizer]
lr = 1e-3

[data]
path = \"x\"

[guard]
spike = 4.5

[device]
kind = \"cpu\"
";

/// A checkpoint whose files are damaged: as they are, which a hash finds, or with every hash right
/// again, as someone would have it who wants the reader to fall.
#[test]
fn checkpoints() {
    let root = folder();
    let config: Config = CONFIG.parse().expect("valid");
    let device = Device::flex();
    let mut learner = Learner::new(&config, &device);
    let batch = mambabyte_datasets::Batch {
        batch: 1,
        length: 8,
        inputs: b"abcdefgh".to_vec(),
        targets: b"bcdefghi".to_vec(),
        resets: vec![false; 8],
    };
    learner.step(&batch, 1e-3, None);
    let progress = Progress {
        step: 1,
        ..Progress::default()
    };
    let saved = Checkpoint::save(root.path(), &learner, &progress).expect("saved");
    let names = [
        "manifest.json",
        "config.toml",
        "model.safetensors",
        "optimizer.safetensors",
        "state.safetensors",
    ];
    let originals: Vec<Vec<u8>> = names
        .iter()
        .map(|name| fs::read(saved.join(name)).expect("a file"))
        .collect();
    let manifest = String::from_utf8(originals[0].clone()).expect("text");
    let learner = std::cell::RefCell::new(learner);
    let rehash = std::cell::Cell::new(0u64);
    let read = |which: usize, bytes: &[u8]| {
        fs::write(saved.join(names[which]), bytes).expect("writable");
        let turn = rehash.replace(rehash.get() + 1);
        if !turn.is_multiple_of(4) {
            let text = match which {
                0 => with_hash(bytes),
                _ => with_hash(&entry_of(&manifest, names[which], &originals[which], bytes)),
            };
            fs::write(saved.join("manifest.json"), text).expect("writable");
        }
        if turn.is_multiple_of(50) {
            // Whatever the weights are by now, a step ends; and the graph's leaves are let go.
            learner.borrow_mut().step(&batch, 1e-3, None);
        }
        let outcome = Checkpoint::open(&saved).and_then(|checkpoint| {
            checkpoint.model(&device)?;
            checkpoint.restore(&mut learner.borrow_mut())
        });
        for (name, original) in names.iter().zip(&originals) {
            fs::write(saved.join(name), original).expect("writable");
        }
        outcome.map_err(|e| e.report())
    };
    fuzz("checkpoints", &originals, as_it_is, read);
}

/// The manifest with the length and hash of `now` in place of those of `before`.
fn entry_of(manifest: &str, name: &str, before: &[u8], now: &[u8]) -> Vec<u8> {
    let entry = |bytes: &[u8]| {
        format!(
            "\"name\": \"{name}\",\n      \"bytes\": {},\n      \"xxh3\": \"{:032x}\"",
            bytes.len(),
            xxh3_128(bytes)
        )
    };
    assert!(manifest.contains(&entry(before)), "{manifest}");
    manifest.replace(&entry(before), &entry(now)).into_bytes()
}

/// A manifest with the right hash of its own.
fn with_hash(manifest: &[u8]) -> Vec<u8> {
    let (start, end) = ("{\n  \"xxh3\": \"".len(), "\",\n".len());
    let rest = manifest.get(start + 32 + end..).unwrap_or_default();
    let mut text = format!("{{\n  \"xxh3\": \"{:032x}\",\n", xxh3_128(rest)).into_bytes();
    text.extend_from_slice(rest);
    text
}

#[test]
fn manifests() {
    let root = folder();
    let config: Config = CONFIG.parse().expect("valid");
    let learner = Learner::new(&config, &Device::flex());
    let progress = Progress {
        valid_bpb: Some(1.25),
        metrics_bytes: Some(100),
        ..Progress::default()
    };
    let saved = Checkpoint::save(root.path(), &learner, &progress).expect("saved");
    let path = saved.join("manifest.json");
    let original = fs::read(&path).expect("a manifest");
    let mend = |random: &mut Random, bytes: &mut Vec<u8>| {
        if random.below(2) > 0 {
            *bytes = with_hash(bytes);
        }
    };
    let read = |_: usize, bytes: &[u8]| {
        fs::write(&path, bytes).expect("writable");
        Manifest::read(&saved).map(drop).map_err(|e| e.report())
    };
    fuzz("manifests", &[original], mend, read);
}

#[test]
fn configs() {
    let whole: Config = CONFIG.parse().expect("valid");
    let nested = format!("{CONFIG}\n# {}", "[".repeat(2000));
    let originals = [CONFIG.to_owned(), whole.to_toml(), nested].map(String::into_bytes);
    let read = |_: usize, bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let config = Config::parse("fuzz", &text, &[]).map_err(|e| e.to_string())?;
        // What is accepted can be written, and is read as the same.
        let _ = config.warnings();
        let again: Config = config.to_toml().parse().map_err(|e| format!("{e}"))?;
        assert_eq!(again, config);
        Ok(())
    };
    fuzz("configs", &originals, as_it_is, read);
    // Overrides are read as TOML too.
    let original = b"optimizer.lr=1e-3".to_vec();
    let read = |_: usize, bytes: &[u8]| {
        let setting = String::from_utf8_lossy(bytes).into_owned();
        let config = Config::parse("fuzz", CONFIG, &[setting]);
        config.map(drop).map_err(|e| e.to_string())
    };
    fuzz("settings", &[original], as_it_is, read);
}

#[test]
fn metrics_lines() {
    let root = folder();
    let path = root.path().join("metrics.jsonl");
    let lines = r#"{"kind":"train","step":1,"loss_nats":5.5,"bpb":7.9,"lr":0.001,"grad_norm":1.5,"bytes_per_second":1e5,"bytes_seen":128,"seconds":0.01}
{"kind":"skip","step":2,"reason":"spike","loss_nats":9.5,"in_a_row":1,"batch":1,"epoch":0,"offsets":[5,77]}
{"kind":"rollback","step":1,"from":2,"reason":"nonfinite","offset":100,"skipped_batches":1}
{"kind":"valid","step":2,"bpb":2.5,"bytes":1000,"seconds":0.5}
{"kind":"sample","step":2,"prompt":"the","text":" \u0000 \ud83d\ude00 cat"}
{"kind":"save","step":2,"pause_seconds":0.1,"seconds":1.5,"bytes":1000,"attempts":1}
{"kind":"resume","step":2}
"#;
    let read = |_: usize, bytes: &[u8]| {
        fs::write(&path, bytes).expect("writable");
        let records = metrics::read(&path).map_err(|e| e.report())?;
        // No damage costs more lines than it touches.
        match records.len() {
            7 => Ok(()),
            _ => Err("lines are left out".to_owned()),
        }
    };
    fuzz("metrics", &[lines.as_bytes().to_vec()], as_it_is, read);
}

#[test]
fn pg19_metadata() {
    let root = folder();
    let path = root.path().join("metadata.csv");
    let lines = "10,The King James Bible,1611,http://www.gutenberg.org/ebooks/10\n\
                 1104,\"Poems, and \"\"Others\"\"\",1890,http://www.gutenberg.org/ebooks/1104\n";
    let read = |_: usize, bytes: &[u8]| {
        fs::write(&path, bytes).expect("writable");
        let source = Pg19::new(root.path());
        source.metadata().map(drop).map_err(|e| e.to_string())
    };
    fuzz("metadata.csv", &[lines.as_bytes().to_vec()], as_it_is, read);
}

#[test]
fn pg19_listings() {
    let hash = "0123456789abcdef".repeat(4);
    let json = format!(
        r#"{{"default": {{"download_checksums": {{
        "gs://deepmind-gutenberg/metadata.csv": {{"num_bytes": 100, "checksum": "{hash}"}},
        "gs://deepmind-gutenberg/train/10.txt": {{"num_bytes": 7, "checksum": "{hash}"}},
        "https://x/test/11.txt": {{"num_bytes": 8, "checksum": "{hash}"}}}}}}}}"#
    );
    let read = |_: usize, bytes: &[u8]| {
        let listing = mambabyte_datasets::download::Listing::parse(bytes, "fuzz");
        listing.map(drop).map_err(|e| e.to_string())
    };
    fuzz("listings", &[json.into_bytes()], as_it_is, read);
}
