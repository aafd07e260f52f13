//! A run's folder: its config, metrics and checkpoints.
//!
//! ```text
//! checkpoints/<run>/
//!     config.toml      resolved configuration
//!     metrics.jsonl    one record a line
//!     lock             held while a trainer works here
//!     step-<n>/        a checkpoint; complete if it has a manifest.json
//! ```

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use super::checkpoint::{MANIFEST, Manifest, beside, remove_if_there};
use super::lock::Lock;
use super::metrics::MetricRecord;
use crate::config::{CheckpointConfig, Config};
use crate::error::{Error, Result};
use crate::new_file::NewFile;

/// A run's folder. While the value lives no other trainer can open the run.
pub struct RunDir {
    path: PathBuf,
    _lock: Lock,
}

impl RunDir {
    /// Makes the folder of a new run, which [`begin`](Self::begin) makes a run. If the run is to
    /// begin with a checkpoint of step 0, `with_start`, one that a killed start left may be there.
    ///
    /// # Errors
    ///
    /// If a run of that name exists already, or checkpoints that the new one would take for its own.
    pub fn create(path: &Path, with_start: bool) -> Result<Self> {
        if path.join("config.toml").exists() {
            return Err(Error::Usage {
                message: format!("a run is already in `{}`", path.display()),
                hint: format!(
                    "go on with it by `mambabyte resume {}`, or choose another `--run`",
                    path.display()
                ),
            });
        }
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let dir = Self::locked(path)?;
        match dir.checkpoints()?.pop() {
            Some((step, _)) if step > 0 || !with_start => Err(Error::Usage {
                message: format!(
                    "`{}` has a checkpoint of step {step} and no `config.toml`",
                    path.display()
                ),
                hint: "choose another `--run`, or move the folder away".to_owned(),
            }),
            _ => Ok(dir),
        }
    }

    /// Stores the configuration: from now on there is a run that can be resumed.
    pub fn begin(&self, config: &Config) -> Result<()> {
        NewFile::create(&self.path.join("config.toml"))?.put(config.to_toml().as_bytes())
    }

    /// Opens the folder of a run to go on with it.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] where there is none, also for a folder that is a checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        if path.join(MANIFEST).is_file() {
            return Err(no_run_but_a_checkpoint(path));
        }
        if !path.exists() {
            return Err(no_run(path));
        }
        if !path.join("config.toml").is_file() {
            return Err(Error::Checkpoint {
                path: path.to_owned(),
                reason: "is not the folder of a run: it has no `config.toml`".to_owned(),
                hint: "name a folder in `checkpoints/`, for instance with `ls checkpoints`"
                    .to_owned(),
            });
        }
        let dir = Self::locked(path)?;
        if let Err(error) = tidy(path) {
            tracing::warn!("left over by a kill, and still there: {error}");
        }
        Ok(dir)
    }

    fn locked(path: &Path) -> Result<Self> {
        let lock = Lock::take(path)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run's metrics.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The configuration stored with the run.
    pub fn config(&self) -> Result<Config> {
        Ok(Config::load(self.path.join("config.toml"), &[])?)
    }

    /// Step of the newest save that the run's metrics know of.
    pub(super) fn last_saved(&self) -> Option<u64> {
        let file = BufReader::new(File::open(self.metrics()).ok()?);
        let lines = file.split(b'\n').map_while(std::io::Result::ok);
        let records = lines.filter_map(|line| serde_json::from_slice(&line).ok());
        let saves = records.filter_map(|record| match record {
            MetricRecord::Save {
                step, error: None, ..
            } => Some(step),
            _ => None,
        });
        saves.last()
    }

    /// The run's complete checkpoints, oldest first.
    pub fn checkpoints(&self) -> Result<Vec<(u64, PathBuf)>> {
        checkpoints(&self.path)
    }
}

/// The error of a run that is not there.
pub(crate) fn no_run(path: &Path) -> Error {
    Error::Checkpoint {
        path: path.to_owned(),
        reason: "does not exist".to_owned(),
        hint: "name a run, or a folder that holds runs, such as `checkpoints/`; `mambabyte runs` lists \
               them"
            .to_owned(),
    }
}

/// The error of who takes a checkpoint for a run.
fn no_run_but_a_checkpoint(path: &Path) -> Error {
    let whole = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let parents = [path.parent(), whole.parent()].into_iter().flatten();
    let run = parents
        .filter(|it| *it != Path::new(""))
        .find(|it| it.join("config.toml").is_file());
    let anew = format!(
        "a new run from its weights: `mambabyte train --init {}`",
        path.display()
    );
    Error::Checkpoint {
        path: path.to_owned(),
        reason: "is a checkpoint, not a run".to_owned(),
        hint: match run {
            Some(run) => format!(
                "go on with its run, from the newest checkpoint: `mambabyte resume {}`; or begin {anew}",
                run.display()
            ),
            None => format!("begin {anew}"),
        },
    }
}

/// Deletes what a save or a deletion that was killed has left in the run's folder. Where one was killed between two
/// renames, the checkpoint gets its name back.
fn tidy(run: &Path) -> Result<()> {
    for entry in fs::read_dir(run).map_err(Error::io("read", run))? {
        let path = entry.map_err(Error::io("read", run))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some((folder, state)) = name.rsplit_once('.') else {
            continue;
        };
        let folder = run.join(folder);
        match (name.starts_with("step-"), state) {
            (true, "old") if !folder.exists() => {
                fs::rename(&path, &folder).map_err(Error::io("rename", &path))?;
            }
            (true, "old" | "tmp") => {
                fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Deletes checkpoints of the run in `run` beyond those that `keep` names: the last few, every m-th,
/// the best; and the newest that the run could roll back to.
///
/// Called after the checkpoint of step `written` is complete: an old one never makes place for one that
/// fails. Those that cannot be read are neither counted nor touched, nor are later ones: the run was
/// begun before them because they are damaged.
pub(super) fn prune(run: &Path, keep: &CheckpointConfig, written: u64) -> Result<()> {
    let all: Vec<(u64, PathBuf, Manifest)> = checkpoints(run)?
        .into_iter()
        .filter(|(step, _)| *step <= written)
        .filter_map(|(step, path)| Some((step, Manifest::read(&path).ok()?, path)))
        .map(|(step, manifest, path)| (step, path, manifest))
        .collect();
    let recent = all.len().saturating_sub(keep.keep_last);
    let best = match keep.keep_best {
        true => best(&all),
        false => None,
    };
    let good = all.iter().rfind(|(_, _, it)| it.progress.is_good());
    let good = good.map(|(step, ..)| *step);
    for (step, path, _) in &all[..recent] {
        let nth = keep.every_steps.saturating_mul(keep.keep_every as u64);
        let milestone = nth > 0 && *step > 0 && step % nth == 0;
        if !milestone && best != Some(*step) && good != Some(*step) {
            remove(path)?;
        }
    }
    Ok(())
}

/// Step of the checkpoint with the lowest validation, among those that were validated.
fn best(all: &[(u64, PathBuf, Manifest)]) -> Option<u64> {
    let scores = all.iter().filter_map(|(step, _, manifest)| {
        let bpb = manifest.progress.valid_bpb?;
        bpb.is_finite().then_some((bpb, *step))
    });
    // The first of equals: a checkpoint without a validation of its own carries the last one's.
    scores.min_by(|a, b| a.0.total_cmp(&b.0)).map(|it| it.1)
}

/// Deletes a checkpoint. It gets another name first: what a kill leaves is not a checkpoint, and the
/// next start deletes it.
pub(super) fn remove(path: &Path) -> Result<()> {
    let leaving = beside(path, ".tmp");
    remove_if_there(&leaving)?;
    fs::rename(path, &leaving).map_err(Error::io("rename", path))?;
    fs::remove_dir_all(&leaving).map_err(Error::io("remove", &leaving))
}

/// The complete checkpoints of a run's folder, oldest first.
fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run).map_err(Error::io("read", run))? {
        let path = entry.map_err(Error::io("read", run))?.path();
        let step = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix("step-"))
            .and_then(|step| step.parse().ok());
        if let Some(step) = step
            && path.join(MANIFEST).is_file()
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Where runs are unless the config says otherwise.
pub(crate) const RUNS: &str = "checkpoints";

/// A path as it is, or the name of a run in `checkpoints/`.
pub(crate) fn run_path(run: &Path) -> PathBuf {
    let named = Path::new(RUNS).join(run);
    match !run.exists() && named.exists() {
        true => named,
        false => run.to_owned(),
    }
}

/// The checkpoint folder that a path means: the path itself, or the newest step of a run, which may be
/// given by its name in `checkpoints/`.
///
/// # Errors
///
/// [`Error::Checkpoint`] where there is none.
pub fn resolve_checkpoint(path: &Path) -> Result<PathBuf> {
    let path = &run_path(path);
    if path.join(MANIFEST).is_file() {
        return Ok(path.clone());
    }
    let newest = match path.is_dir() {
        true => checkpoints(path)?.pop(),
        false => None,
    };
    newest
        .map(|(_, path)| path)
        .ok_or_else(|| Error::Checkpoint {
            path: path.clone(),
            reason: match path.exists() {
                true => format!("has neither a `{MANIFEST}` nor a folder `step-…` that has one"),
                false => "does not exist".to_owned(),
            },
            hint: "name a run, or one of its `step-…` folders, in `checkpoints/`".to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_save_leaves_is_tidied_up() {
        let run = tempfile::tempdir().expect("a folder");
        let path = |name: &str| run.path().join(name);
        for name in [
            "step-10",
            "step-10.old",
            "step-15.tmp",
            "step-20.old",
            "mine.tmp",
        ] {
            fs::create_dir(path(name)).expect("a folder");
            fs::write(path(name).join("from"), name).expect("a file");
        }
        fs::write(path("config.toml"), "").expect("a file");
        drop(RunDir::open(run.path()).expect("a run"));
        let mut left: Vec<String> = fs::read_dir(run.path())
            .expect("a folder")
            .map(|it| {
                it.expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        left.sort();
        assert_eq!(
            left,
            ["config.toml", "lock", "mine.tmp", "step-10", "step-20"]
        );
        let from = |name: &str| fs::read_to_string(path(name).join("from")).expect("a file");
        assert_eq!(
            (from("step-10"), from("step-20")),
            ("step-10".into(), "step-20.old".into())
        );
    }
}
