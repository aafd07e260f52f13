//! The command `export`: a checkpoint of ours as one of another program.

use super::ExportArgs;
use super::import::refuse_existing;
use crate::error::Result;
use crate::interop;
use crate::train::checkpoint::{self, Checkpoint};
use crate::train::run_dir::resolve_checkpoint;

/// Runs the command.
pub fn run(args: &ExportArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let checkpoint = Checkpoint::open(&resolve_checkpoint(&args.checkpoint)?)?;
    let weights = checkpoint.weights()?;
    let model = &checkpoint.config().model;
    checkpoint::install(&args.out, |folder| {
        interop::export(model, &weights, args.format, folder)
    })
}
