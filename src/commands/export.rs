//! The command `export`: a checkpoint of ours as one of another program.

use super::import::refuse_existing;
use super::{ExportArgs, checkpoint_folder};
use crate::error::Result;
use crate::interop::{self, Learnt};
use crate::train::checkpoint::{self, Checkpoint};

/// Runs the command.
pub fn run(args: &ExportArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let checkpoint = Checkpoint::open_for_model(&checkpoint_folder(&args.checkpoint)?)?;
    let progress = checkpoint.progress();
    let learnt = Learnt {
        bytes: progress.bytes_seen,
        valid_bpb: progress.valid_bpb,
    };
    let weights = checkpoint.weights()?;
    let model = &checkpoint.config().model;
    checkpoint::install(&args.out, |folder| {
        interop::export(model, &weights, learnt, args.format, folder)
    })
}
