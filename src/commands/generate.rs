//! The command `generate`.

use std::io::Write as _;

use super::{GenerateArgs, checkpoint_folder, warn_unless_bytes};
use crate::device;
use crate::error::{Error, Result};
use crate::generate::{Generator, SampleOptions};
use crate::train::Checkpoint;

/// Runs the command: new bytes go to standard output as they are chosen.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let checkpoint = Checkpoint::open_for_model(&checkpoint_folder(&args.checkpoint)?)?;
    warn_unless_bytes(&checkpoint.config().model);
    let device = device::open(&args.device)?;
    let model = checkpoint.model(&device)?;
    let options = SampleOptions {
        temperature: args.temperature,
        top_k: args.top_k.into(),
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut generator = Generator::new(&model, &device, args.prompt.as_bytes(), options);
    let mut stdout = std::io::stdout().lock();
    for _ in 0..args.max_new_bytes {
        stdout
            .write_all(&[generator.next_byte()])
            .and_then(|()| stdout.flush())
            .map_err(Error::Stdout)?;
    }
    Ok(())
}
