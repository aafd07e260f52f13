//! The command `resume`.

use std::path::{Path, PathBuf};

use super::ResumeArgs;
use crate::device;
use crate::error::Result;
use crate::train::{self, RunDir};

/// Runs the command.
pub fn run(args: &ResumeArgs) -> Result<()> {
    let path = run_folder(&args.run);
    device::set_threads(RunDir::open(&path)?.config()?.train.threads);
    eprintln!("run: {}", path.display());
    train::resume(&path, args.stop_after)
}

/// A path as it is, or the name of a run in `checkpoints/`.
fn run_folder(run: &Path) -> PathBuf {
    let named = Path::new("checkpoints").join(run);
    match !run.exists() && named.exists() {
        true => named,
        false => run.to_owned(),
    }
}
