//! The command `eval`.

use std::io::IsTerminal;

use mambabyte_datasets::progress::{Bar, Silent};
use mambabyte_datasets::{Progress, Shards};

use super::{EvalArgs, checkpoint_folder, print, print_json, warn_unless_bytes};
use crate::device;
use crate::error::Result;
use crate::eval::{EvalOptions, Report, evaluate};
use crate::train::Checkpoint;

/// Positions computed at once: enough to fill a device, little enough for any.
const POSITIONS: usize = 32 * 1024;

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let checkpoint = Checkpoint::open_for_model(&checkpoint_folder(&args.checkpoint)?)?;
    warn_unless_bytes(&checkpoint.config().model);
    let shards = Shards::open(args.data.join(args.split.as_str()))?;
    let device = device::open(&args.device)?;
    let model = checkpoint.model(&device)?;
    let length = checkpoint.config().train.length;
    let options = EvalOptions {
        length,
        batch: (POSITIONS / length).max(1),
        max_bytes: None,
    };
    let progress: Box<dyn Progress> = match std::io::stderr().is_terminal() {
        true => Box::new(Bar::new()),
        false => Box::new(Silent),
    };
    let score = evaluate(&model, &device, &shards, &options, progress.as_ref())?;
    let words = shards.word_count();
    let report = Report {
        bits_per_byte: score.bits_per_byte(),
        nats_per_byte: score.nats_per_byte(),
        bytes: score.bytes,
        words,
        word_perplexity: score.word_perplexity(words),
    };
    if args.json {
        return print_json(&report);
    }
    print(&format!(
        "{:.4} bits per byte ({:.4} nats) over {} bytes, word perplexity {:.2} over {} words\n",
        report.bits_per_byte,
        report.nats_per_byte,
        report.bytes,
        report.word_perplexity,
        report.words
    ))
}
