//! The command `resume`.

use super::ResumeArgs;
use crate::device;
use crate::error::Result;
use crate::terminal::say;
use crate::train::run_dir::run_path;
use crate::train::{self, RunDir};

/// Runs the command.
pub fn run(args: &ResumeArgs) -> Result<()> {
    let path = run_path(&args.run);
    device::set_threads(RunDir::open(&path)?.config()?.train.threads);
    say(&format!("run: {}", path.display()));
    train::resume(&path, args.stop_after)
}
