//! The command `generate`.

use std::io::Write as _;

use super::GenerateArgs;
use crate::device;
use crate::error::{Error, Result};
use crate::generate::{Generator, GeneratorOptions, Request, SamplingConfig};
use crate::train::Checkpoint;
use crate::train::run_dir::resolve_checkpoint;

/// Runs the command: new bytes go to standard output as they are chosen.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&resolve_checkpoint(&args.checkpoint)?)?;
    let device = device::open(&args.device)?;
    let model = checkpoint.model(&device)?;
    let request = Request {
        max_new_bytes: args.max_new_bytes,
        sampling: SamplingConfig {
            temperature: args.temperature,
            top_k: args.top_k.into(),
            top_p: args.top_p,
            ..SamplingConfig::default()
        },
        seed: args.seed,
        ..Request::new(args.prompt.as_bytes())
    };
    let mut generator = Generator::new(model, &device, GeneratorOptions::default());
    let mut session = generator.start(&[request])?;
    let mut stdout = std::io::stdout().lock();
    while !session.is_finished() {
        for piece in session.advance(1)? {
            stdout
                .write_all(&piece.bytes)
                .and_then(|()| stdout.flush())
                .map_err(Error::Stdout)?;
        }
    }
    Ok(())
}
