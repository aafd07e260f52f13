//! What the tests of the program share: a small corpus with a config, runs of the program in a
//! folder of their own, and a look at what they leave behind.

#![allow(dead_code, reason = "each file of tests uses its own part")]

pub mod random;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_mambabyte");

/// A model of some 15,000 parameters: a step takes milliseconds.
const CONFIG: &str = r#"
[model]
dim = 16
depth = 2

[train]
steps = 20
batch = 2
length = 64
validate_every = 0
sample_every = 0

[optimizer]
lr = 5e-3
min_lr = 5e-4
warmup_steps = 5
clip = 1.0

[data]
path = "data"

[checkpoint]
every_steps = 0

[device]
kind = "cpu"
"#;

/// A folder with a corpus in `data/`, a config in `config.toml`, and room for runs. The program
/// runs inside it.
pub struct Workspace {
    folder: TempDir,
}

impl Workspace {
    /// A corpus of pseudo-random words in a dozen documents. The training split is shorter than 20
    /// steps of the config's batch, so that runs go into a second epoch.
    pub fn new() -> Self {
        let documents = (0..12).map(|i| pseudo_words(i, 230 + 11 * i as usize));
        Self::with_documents(documents)
    }

    /// A corpus of these documents.
    pub fn with_documents(documents: impl IntoIterator<Item = String>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = folder.path().join("text");
        fs::create_dir(&text).expect("a folder for the text");
        for (i, document) in documents.into_iter().enumerate() {
            fs::write(text.join(format!("{i:02}.txt")), document).expect("a document");
        }
        fs::write(folder.path().join("config.toml"), CONFIG).expect("the config");
        let workspace = Self { folder };
        workspace.ok("data prepare --source text --path text --out data --held-out 0.1");
        workspace
    }

    /// A path inside the folder.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(inside)
    }

    /// The program with the words of `line` as arguments, to be run in the folder.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(line.split_whitespace());
        self.prepared(command)
    }

    /// A command in the folder, without standard input, with its output caught.
    pub fn prepared(&self, mut command: Command) -> Command {
        command
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the program, which must succeed; returns its standard output.
    #[track_caller]
    pub fn ok(&self, line: &str) -> Vec<u8> {
        let output = self.command(line).output().expect("the program starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "`{line}`: {}\n{said}",
            output.status
        );
        assert!(!said.contains("panicked at"), "`{line}`\n{said}");
        output.stdout
    }

    /// Runs the program, which must print JSON.
    #[track_caller]
    pub fn json(&self, line: &str) -> Value {
        let text = self.ok(line);
        serde_json::from_slice(&text).unwrap_or_else(|e| panic!("`{line}` prints JSON: {e}"))
    }

    /// Runs the program, which must fail as [`assert_failed`] says; returns what it said.
    #[track_caller]
    pub fn fails(&self, line: &str, code: i32, words: &[&str]) -> String {
        let output = self.command(line).output().expect("the program starts");
        assert_failed(&output, line, code, words)
    }

    /// Starts a new run called `run`, with `settings` of the form `section.key=value`.
    #[track_caller]
    pub fn train(&self, run: &str, settings: &[&str], arguments: &str) {
        self.ok(&train_line(run, settings, arguments));
    }

    /// Starts the program and leaves it running; it is killed when the value is dropped.
    pub fn start(&self, line: &str) -> Running {
        Running::of(self.command(line))
    }

    /// Runs the program on a disk with faults, see `faults.c`.
    pub fn faulty(&self, line: &str, faults: &[(&str, &str)]) -> Output {
        let mut command = self.command(line);
        let library = fault_library().expect("asked for with `can_inject_faults`");
        command.env("LD_PRELOAD", library);
        command.envs(faults.iter().copied());
        command.output().expect("the program starts")
    }

    /// The folder of a run.
    pub fn run(&self, run: &str) -> PathBuf {
        self.path("checkpoints").join(run)
    }

    /// The folder of a run's checkpoint.
    pub fn step(&self, run: &str, step: u64) -> PathBuf {
        self.run(run).join(format!("step-{step}"))
    }

    /// Every file of a run's checkpoints with its content.
    pub fn checkpoints(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = contents(&self.run(run));
        let of_step = |part: &std::path::Component<'_>| {
            let name = part.as_os_str().to_string_lossy();
            name.starts_with("step-")
        };
        files.retain(|path, _| path.components().any(|part| of_step(&part)));
        files
    }

    /// The step of a run's newest checkpoint.
    #[track_caller]
    pub fn newest(&self, run: &str) -> u64 {
        let entries = fs::read_dir(self.run(run)).expect("the folder of the run");
        let steps = entries.filter_map(|entry| {
            let path = entry.ok()?.path();
            let step = path
                .file_name()?
                .to_str()?
                .strip_prefix("step-")?
                .parse()
                .ok()?;
            path.join("manifest.json").is_file().then_some(step)
        });
        steps.max().expect("a checkpoint")
    }

    /// Every complete line of a run's metrics.
    pub fn all_records(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.run(run).join("metrics.jsonl")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Every line of one kind.
    pub fn of_kind(&self, run: &str, kind: &str) -> Vec<Value> {
        let mut records = self.all_records(run);
        records.retain(|it| it["kind"] == kind);
        records
    }

    /// The lines in effect: without those that a later `resume` or `rollback` line supersedes, and
    /// without it.
    pub fn records(&self, run: &str) -> Vec<Value> {
        let mut records: Vec<Value> = Vec::new();
        for record in self.all_records(run) {
            if record["kind"] == "resume" || record["kind"] == "rollback" {
                let from = record["step"].as_u64();
                records.retain(|it| it["step"].as_u64() <= from);
            } else {
                records.push(record);
            }
        }
        records
    }

    /// What each step has measured, digit for digit, those that were not applied included.
    pub fn measured(&self, run: &str) -> Vec<String> {
        let train = self
            .records(run)
            .into_iter()
            .filter(|it| it["kind"] == "train" || it["kind"] == "skip");
        train
            .map(|it| {
                let [kind, step, loss, bpb, lr, norm] =
                    ["kind", "step", "loss_nats", "bpb", "lr", "grad_norm"].map(|key| &it[key]);
                format!("{kind} {step} loss {loss} bpb {bpb} lr {lr} norm {norm}")
            })
            .collect()
    }

    /// Fails unless two runs have measured the same in every step, and have the same weights and
    /// moments after the last, byte for byte.
    #[track_caller]
    pub fn assert_same_runs(&self, a: &str, b: &str, steps: u64) {
        let (measured_a, measured_b) = (self.measured(a), self.measured(b));
        assert_eq!(measured_a.len() as u64, steps, "steps recorded by {a}");
        assert_eq!(measured_a, measured_b, "{a} and {b}");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let read = |run| fs::read(self.step(run, steps).join(file)).expect("a checkpoint");
            assert!(read(a) == read(b), "{file} of {a} and {b} differ");
        }
    }
}

/// A program at work.
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts a command, whose output nobody reads.
    pub fn of(mut command: Command) -> Self {
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        Self { child }
    }

    /// Kills it as `kill -9` does. Panics if it had ended by itself.
    #[track_caller]
    pub fn kill(mut self) {
        let ended = self.child.try_wait().expect("its state can be asked for");
        assert!(ended.is_none(), "it ended before it was killed: {ended:?}");
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, waits for the end, and returns the exit code.
    #[track_caller]
    pub fn signal(mut self, name: &str) -> Option<i32> {
        self.send(name);
        self.child.wait().expect("it ends").code()
    }

    /// Sends a signal by name.
    #[track_caller]
    pub fn send(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(sent.success(), "the program is still at work");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Of a process that has ended, neither is possible.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The arguments that start a run.
pub fn train_line(run: &str, settings: &[&str], arguments: &str) -> String {
    let mut line = format!("train --config config.toml --run {run} {arguments}");
    for setting in settings {
        line += &format!(" --set {setting}");
    }
    line
}

/// What a program said that ended well.
#[track_caller]
pub fn well(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{said}", output.status);
    assert!(!said.contains("panicked at"), "{said}");
    said
}

/// Fails unless the program ended with `code` and with one error message that has all of `words`.
#[track_caller]
pub fn assert_failed(output: &Output, line: &str, code: i32, words: &[&str]) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        output.status.code(),
        Some(code),
        "exit code of `{line}`\n{said}"
    );
    let errors = said
        .lines()
        .filter(|line| line.starts_with("error:"))
        .count();
    assert_eq!(errors, 1, "error messages of `{line}`\n{said}");
    assert!(!said.contains("panicked at"), "`{line}`\n{said}");
    for word in words {
        assert!(
            said.contains(word),
            "`{line}` does not say {word:?}\n{said}"
        );
    }
    said
}

/// The library of `faults.c`; none where it cannot be built or loaded.
pub fn fault_library() -> Option<&'static Path> {
    static LIBRARY: OnceLock<Option<(TempDir, PathBuf)>> = OnceLock::new();
    let built = LIBRARY.get_or_init(|| {
        if !cfg!(target_os = "linux") {
            return None;
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/faults.c");
        let folder = tempfile::tempdir().ok()?;
        let library = folder.path().join("faults.so");
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library);
        let made = compiler.arg(source).arg("-ldl").output().ok()?;
        made.status.success().then_some((folder, library))
    });
    built.as_ref().map(|(_, library)| library.as_path())
}

/// Whether the disk of a program under test can be made to fail; says so if not.
pub fn can_inject_faults(test: &str) -> bool {
    let can = fault_library().is_some();
    if !can {
        skipped(test, "no C compiler, or not Linux");
    }
    can
}

/// Waits until `condition` holds. Panics after a minute.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "waited a minute: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Every file below a folder with its content.
pub fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let content = fs::read(&path).expect("a readable file");
                files.insert(path, content);
            }
        }
    }
    files
}

/// Says that a test could not be done here, past the harness, which hides what tests print.
pub fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "\nSKIPPED: {test}: {why}");
}

/// About `bytes` bytes of words that are drawn from a small list, in lines.
pub fn pseudo_words(seed: u64, bytes: usize) -> String {
    const WORDS: [&str; 12] = [
        "river", "stone", "a", "the", "walks", "under", "light", "and", "slowly", "bird", "of",
        "night",
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = String::new();
    while text.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text += WORDS[(state >> 33) as usize % WORDS.len()];
        text.push(if (state >> 20).is_multiple_of(8) {
            '\n'
        } else {
            ' '
        });
    }
    text
}
