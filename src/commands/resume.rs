//! The command `resume`.

use super::ResumeArgs;
use super::dash::run_path;
use crate::device;
use crate::error::Result;
use crate::train::{self, RunDir};

/// Runs the command.
pub fn run(args: &ResumeArgs) -> Result<()> {
    let path = run_path(&args.run);
    device::set_threads(RunDir::open(&path)?.config()?.train.threads);
    eprintln!("run: {}", path.display());
    train::resume(&path, args.stop_after)
}
