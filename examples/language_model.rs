//! The language model: bytes in, logits out, and text from them.
//!
//! ```text
//! cargo run --release --example language_model [CHECKPOINT [PROMPT]]
//! ```
//!
//! `CHECKPOINT` is the folder of a run or of one of its checkpoints. Without one the model has
//! learnt nothing, and what it writes is noise.

use std::error::Error;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte::MambaConfig;
use mambabyte::config::Preset;
use mambabyte::train::Checkpoint;
use mambabyte::train::run_dir::resolve_checkpoint;
use mambabyte_datasets::text::lossy_text;
use mambabyte_kernels::cross_entropy::cross_entropy;

fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::default();
    let mut arguments = std::env::args().skip(1);
    let model = match arguments.next() {
        Some(path) => Checkpoint::open(&resolve_checkpoint(Path::new(&path))?)?.model(&device)?,
        None => {
            let config = MambaConfig::from_preset(Preset::Tiny).ok_or("a preset has sizes")?;
            config.init_lm(0, &device)
        }
    };
    let prompt = arguments
        .next()
        .unwrap_or("The tokens are the bytes. ".to_owned());

    // The whole prompt in one pass: logits of the byte after every position, [1, L, 256], and the
    // memory after the last.
    let bytes: Vec<i32> = prompt.bytes().map(i32::from).collect();
    let length = bytes.len();
    let bytes = Tensor::<2, Int>::from_data(TensorData::new(bytes, [1, length]), &device);
    let (logits, mut state) = model.forward(bytes.clone(), None, None);

    // How well each byte but the first was predicted from those before it.
    if length > 1 {
        let predictions = logits.clone().slice([0..1, 0..length - 1]);
        let targets = bytes.slice([0..1, 1..length]).reshape([length - 1]);
        let losses = cross_entropy(predictions.reshape([length - 1, 256]), targets);
        let bits = losses.mean().into_scalar::<f32>() / std::f32::consts::LN_2;
        println!("prompt: {bits:.3} bits per byte");
    }

    // Then one byte at a time, the likeliest each time.
    let mut next = logits
        .slice([0..1, length - 1..length])
        .reshape([1, 256])
        .argmax(1);
    let mut text = Vec::new();
    for _ in 0..80 {
        let byte = next.reshape([1]);
        text.push(byte.clone().into_scalar::<i32>() as u8);
        let (logits, after) = model.step(byte, state);
        next = logits.argmax(1);
        state = after;
    }
    println!("{prompt}{}", lossy_text(&text));
    Ok(())
}
