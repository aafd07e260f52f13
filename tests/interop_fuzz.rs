//! Damaged checkpoints: an error or a model, never a panic, and memory bounded by the file.
//!
//! `MAMBABYTE_FUZZ=1000000 cargo test --release --test interop_fuzz -- --nocapture` runs so many
//! inputs; a usual run has two thousand. `MAMBABYTE_FUZZ_SEED` chooses others.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use mambabyte::interop::Import;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a note of how much is taken.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting does not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises about both are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Memory that reading a damaged checkpoint of some ten kB may take: messages, lists of names, and
/// the table of a model of as many layers as a config can name.
const MOST_MEMORY: usize = 24 << 20;

/// A stream of numbers (xorshift): the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit.max(1)
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    255,
    256,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    u64::MAX,
];

/// Text that is read, or has a meaning, in one of the formats.
const WORDS: [&[u8]; 22] = [
    b"-1",
    b"18446744073709551615",
    b"1e999",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"\"\"",
    b"\"F64\"",
    b"\"BF16\"",
    b"\"F32\"",
    b"../",
    b"layers.4095.",
    b"layers.18446744073709551615.",
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"tR",
    b"h\x00",
    b"PK\x05\x06",
    b"PK\x06\x07",
    b"PK\x01\x02",
];

/// A place in `bytes`: near its ends, where headers and directories are, nine times of ten.
fn place(random: &mut Random, bytes: &[u8]) -> usize {
    const NEAR: usize = 3000;
    match random.below(20) {
        0 | 1 => random.below(bytes.len()),
        2..=10 => random.below(bytes.len().min(NEAR)),
        _ => bytes.len() - 1 - random.below(bytes.len().min(NEAR)),
    }
}

/// Changes `bytes` a little.
fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..1 + random.below(3) {
        if bytes.is_empty() {
            return;
        }
        let at = place(random, bytes);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => {
                let number = random.of(&EDGES).to_le_bytes();
                let width = random.of(&[1, 2, 4, 8]).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            4 => {
                let word = random.of(&WORDS);
                bytes.splice(at..at, word.iter().copied());
            }
            5 => {
                let word = random.of(&WORDS);
                let end = (at + word.len()).min(bytes.len());
                bytes.splice(at..end, word.iter().copied());
            }
            6 => {
                let end = (at + 1 + random.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
            _ => {
                let end = (at + 1 + random.below(200)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = place(random, bytes);
                bytes.splice(to..to, copy);
            }
        }
    }
}

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
        .write(&folder.join("out.tmp"))
        .map_err(|e| e.report())
}

fn number(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text}")),
        Err(_) => usual,
    }
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

        let before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let outcome = catch_unwind(|| open(&folders[which]));
        let memory = PEAK.load(Ordering::Relaxed) - before;
        highest = highest.max(memory);
        let problem = match outcome {
            Err(_) => Some("panicked".to_owned()),
            Ok(_) if memory > MOST_MEMORY => Some(format!("took {memory} bytes")),
            Ok(Err(report)) if report.len() > 20_000 => Some("has an endless message".to_owned()),
            Ok(Err(_)) => {
                refused += 1;
                None
            }
            Ok(Ok(())) => None,
        };
        if let Some(problem) = problem {
            let kept = std::env::temp_dir().join(format!("mambabyte-fuzz-{i}"));
            fs::write(&kept, &bytes).expect("writable");
            panic!(
                "input {i}, {}: {problem}; kept as {}",
                path.display(),
                kept.display()
            );
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
