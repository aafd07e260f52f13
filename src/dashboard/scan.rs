//! Where runs are, and whether a trainer is at work on one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::Value;

/// The file that makes a folder a run.
pub(super) const METRICS: &str = "metrics.jsonl";

/// Folders below a given one that are looked into.
const DEPTH: usize = 3;

/// Runs shown at most, the newest.
pub(super) const MOST_RUNS: usize = 1000;

/// Folders looked into at most: a home folder given by mistake must not take for ever.
const MOST_FOLDERS: usize = 20_000;

/// Longest config and evaluation that is read, in bytes.
const LONGEST_FILE: u64 = 4 << 20;

/// Evaluations shown of a run, and their bytes.
const MOST_EVALUATIONS: (usize, u64) = (32, 16 << 20);

/// A run that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its name, made unique: what requests call it.
    pub(super) id: String,
    /// `metrics.jsonl`.
    pub(super) metrics: PathBuf,
    /// When that was last written, in seconds since 1970.
    pub(super) modified: u64,
}

impl Found {
    pub(super) fn folder(&self) -> &Path {
        self.metrics.parent().unwrap_or(Path::new("."))
    }
}

/// All runs at and below `roots`.
pub(super) fn runs(roots: &[PathBuf]) -> Vec<Found> {
    let mut files = Vec::new();
    let mut left = MOST_FOLDERS;
    for root in roots {
        match root.is_file() {
            true => files.push(root.clone()),
            false => collect(root, DEPTH, &mut left, &mut files),
        }
    }
    files.sort();
    files.dedup();
    let mut found: Vec<Found> = files
        .into_iter()
        .filter_map(|metrics| {
            let modified = modified(&metrics)?;
            Some(Found {
                id: String::new(),
                metrics,
                modified,
            })
        })
        .collect();
    if found.len() > MOST_RUNS {
        found.sort_by_key(|it| std::cmp::Reverse(it.modified));
        found.truncate(MOST_RUNS);
        found.sort_by(|a, b| a.metrics.cmp(&b.metrics));
    }
    name(&mut found);
    found
}

/// Seconds since 1970 at which a file was last written.
fn modified(path: &Path) -> Option<u64> {
    let time = fs::metadata(path).ok()?.modified().ok()?;
    Some(time.duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs()))
}

fn collect(folder: &Path, depth: usize, left: &mut usize, files: &mut Vec<PathBuf>) {
    if *left == 0 {
        return;
    }
    *left -= 1;
    let metrics = folder.join(METRICS);
    if metrics.is_file() {
        files.push(metrics);
        // Below a run there are its checkpoints.
        return;
    }
    if depth == 0 {
        return;
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        // Links to folders are not followed: they may lead in circles.
        if entry.file_type().is_ok_and(|it| it.is_dir()) {
            collect(&entry.path(), depth - 1, left, files);
        }
    }
}

/// Names runs by their folders; with as many of the folders above as it takes to tell them apart.
fn name(found: &mut [Found]) {
    let parts: Vec<Vec<String>> = found
        .iter()
        .map(|it| {
            let folder = fs::canonicalize(it.folder()).unwrap_or_else(|_| it.folder().to_owned());
            let names = folder.components().rev();
            names
                .map(|part| part.as_os_str().to_string_lossy().into_owned())
                .collect()
        })
        .collect();
    let at = |i: usize, depth: usize| {
        let mut names: Vec<&str> = parts[i].iter().take(depth).map(String::as_str).collect();
        names.reverse();
        names.join("/")
    };
    for (i, run) in found.iter_mut().enumerate() {
        let longest = parts[i].len();
        let depth = (1..=longest)
            .find(|&depth| {
                (0..parts.len()).all(|other| other == i || at(other, depth) != at(i, depth))
            })
            .unwrap_or(longest);
        run.id = at(i, depth);
    }
}

/// A run's config, flat: `train.steps` and so on. Empty where there is none.
pub(super) fn config(folder: &Path) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    let text = read(&folder.join("config.toml")).unwrap_or_default();
    let Ok(table) = text.parse::<toml::Table>() else {
        return flat;
    };
    for (section, keys) in table {
        let Ok(keys) = serde_json::to_value(keys) else {
            continue;
        };
        match keys {
            Value::Object(keys) => {
                for (key, value) in keys {
                    flat.insert(format!("{section}.{key}"), value);
                }
            }
            other => {
                flat.insert(section, other);
            }
        }
    }
    flat
}

/// A file with an evaluation, and what changes when it is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EvaluationFile {
    name: String,
    path: PathBuf,
    modified: u64,
    bytes: u64,
}

/// What `mambabyte eval --json` printed, by the files' names.
pub(super) fn evaluations(files: &[EvaluationFile]) -> Vec<(String, Value)> {
    files
        .iter()
        .filter_map(|it| {
            Some((
                it.name.clone(),
                serde_json::from_str(&read(&it.path)?).ok()?,
            ))
        })
        .collect()
}

/// Files `eval*.json` in the run's folder and in those of its checkpoints.
pub(super) fn evaluation_files(folder: &Path) -> Vec<EvaluationFile> {
    let mut files = json_files(folder, "");
    if let Ok(entries) = fs::read_dir(folder) {
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("step-") && !name.ends_with(".tmp") {
                files.extend(json_files(&entry.path(), &format!("{name}/")));
            }
        }
    }
    files.sort();
    files.truncate(MOST_EVALUATIONS.0);
    let mut bytes = 0;
    files.retain(|it| {
        bytes += it.bytes;
        bytes <= MOST_EVALUATIONS.1
    });
    files
}

fn json_files(folder: &Path, prefix: &str) -> Vec<EvaluationFile> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?.to_owned();
            if !(name.starts_with("eval") && name.ends_with(".json")) {
                return None;
            }
            Some(EvaluationFile {
                name: format!("{prefix}{name}"),
                modified: modified(&path)?,
                bytes: fs::metadata(&path).ok()?.len(),
                path,
            })
        })
        .collect()
}

/// A small text file.
fn read(path: &Path) -> Option<String> {
    let length = fs::metadata(path).ok()?.len();
    (length <= LONGEST_FILE)
        .then(|| fs::read_to_string(path).ok())
        .flatten()
}

/// Whether a process holds the lock of a run's folder; none where this system does not tell.
///
/// Asked by reading the kernel's list: trying the lock would hold it for a moment, in which a
/// trainer could be refused.
#[cfg(target_os = "linux")]
pub(super) fn is_locked(folder: &Path) -> Option<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let inode = fs::metadata(folder.join("lock")).ok()?.ino().to_string();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`
    Some(locks.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.any(|it| it == "FLOCK")
            && words.any(|it| it.rsplit(':').next() == Some(&inode) && it.contains(':'))
    }))
}

/// See above.
#[cfg(not(target_os = "linux"))]
pub(super) fn is_locked(_folder: &Path) -> Option<bool> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join(METRICS), "").expect("a file");
    }

    #[test]
    fn runs_are_found_and_told_apart() {
        let root = tempfile::tempdir().expect("a folder");
        for run in ["a", "b/x", "c/x", "a/step-1"] {
            make(&root.path().join(run));
        }
        let ids = |roots: &[PathBuf]| -> Vec<String> {
            runs(roots).into_iter().map(|it| it.id).collect()
        };
        let all = ids(&[root.path().to_owned()]);
        assert_eq!(all, ["a", "b/x", "c/x"]);
        // A run by itself, and its file.
        assert_eq!(ids(&[root.path().join("b/x")]), ["x"]);
        assert_eq!(ids(&[root.path().join("b/x").join(METRICS)]), ["x"]);
        assert!(ids(&[root.path().join("none")]).is_empty());
    }

    #[test]
    fn a_config_is_flat_and_a_bad_one_is_none() {
        let root = tempfile::tempdir().expect("a folder");
        fs::write(root.path().join("config.toml"), "[train]\nsteps = 5\n").expect("a file");
        assert_eq!(config(root.path())["train.steps"], 5);
        fs::write(root.path().join("config.toml"), "[train").expect("a file");
        assert!(config(root.path()).is_empty());
    }

    #[test]
    fn evaluations_are_found_beside_the_run_and_its_checkpoints() {
        let root = tempfile::tempdir().expect("a folder");
        let step = root.path().join("step-5");
        fs::create_dir(&step).expect("a folder");
        for file in [root.path().join("eval-test.json"), step.join("eval.json")] {
            fs::write(file, "{\"bits_per_byte\":1.5}").expect("a file");
        }
        fs::write(root.path().join("eval-bad.json"), "{").expect("a file");
        let files = evaluation_files(root.path());
        assert_eq!(files.len(), 3);
        let names: Vec<String> = evaluations(&files).into_iter().map(|it| it.0).collect();
        assert_eq!(names, ["eval-test.json", "step-5/eval.json"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_lock_is_seen_without_being_touched() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(is_locked(root.path()), None);
        let lock = fs::File::create(root.path().join("lock")).expect("a file");
        assert_eq!(is_locked(root.path()), Some(false));
        lock.lock().expect("locked");
        assert_eq!(is_locked(root.path()), Some(true));
    }
}
