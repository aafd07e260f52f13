//! The command `logits`: what a model predicts at every byte of a file, for other programs.

use std::io::{BufWriter, Write};

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{LogitsArgs, checkpoint_folder, read_named};
use crate::device;
use crate::error::{Error, Result};
use crate::eval::npy::{self, Number};
use crate::model::MambaLm;
use crate::new_file::NewFile;
use crate::train::Checkpoint;

/// Runs the command.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let checkpoint = Checkpoint::open_for_model(&checkpoint_folder(&args.checkpoint)?)?;
    let bytes = read_named(&args.bytes)?;
    let device = device::open(&args.device)?;
    let model = checkpoint.model(&device)?.frozen();
    let vocabulary = checkpoint.config().model.vocab_size;
    let failed = || Error::io("write", &args.out);
    let mut out = NewFile::create(&args.out)?;
    let mut file = BufWriter::new(out.file());
    let shape = [bytes.len() as u64, vocabulary as u64];
    file.write_all(&npy::header(Number::F32, &shape))
        .map_err(failed())?;
    for_each_piece(&model, &device, &bytes, args.piece, |logits| {
        file.write_all(bytemuck::cast_slice(logits))
            .map_err(failed())
    })?;
    file.flush().map_err(failed())?;
    drop(file);
    out.finish()
}

/// Runs the model over `bytes` in pieces of `length`, carrying its state, and gives away the logits
/// of each.
fn for_each_piece(
    model: &MambaLm,
    device: &Device,
    bytes: &[u8],
    length: usize,
    mut take: impl FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let mut state = None;
    for piece in bytes.chunks(length) {
        let values: Vec<i32> = piece.iter().map(|byte| i32::from(*byte)).collect();
        let input = TensorData::new(values, [1, piece.len()]);
        let input = Tensor::<2, Int>::from_data(input, device);
        let (logits, next) = model.forward(input, state, None);
        state = Some(next);
        let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
        take(&logits)?;
    }
    Ok(())
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::config::MambaConfig;

    #[test]
    fn pieces_give_what_the_whole_gives() {
        let device = Device::flex();
        let model = MambaConfig::new(16, 2).init_lm(1, &device);
        let logits = |piece| {
            let mut all = Vec::new();
            for_each_piece(&model, &device, b"twenty bytes of text", piece, |logits| {
                all.extend_from_slice(logits);
                Ok(())
            })
            .expect("nothing fails");
            all
        };
        let whole = logits(1000);
        assert_eq!(whole.len(), 20 * 256);
        for piece in [1, 7] {
            let difference = logits(piece)
                .iter()
                .zip(&whole)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(difference < 1e-5, "pieces of {piece}: {difference}");
        }
    }
}
