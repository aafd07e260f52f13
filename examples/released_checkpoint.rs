//! Text from a released checkpoint: a folder as it was downloaded, `config.json` and all.
//!
//! ```text
//! hf download JunxiongWang/MambaByte_PG19_972M --local-dir mambabyte
//! cargo run --release --example released_checkpoint mambabyte ["PROMPT" [BYTES]]
//! ```
//!
//! Any Mamba-1 checkpoint over bytes that mamba_ssm or transformers has written will do.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;
use mambabyte::generate::{Generator, GeneratorOptions, Request};
use mambabyte::interop::Import;
use mambabyte_datasets::text::lossy_text;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: released_checkpoint FOLDER [PROMPT [BYTES]]")?;
    let prompt = arguments
        .next()
        .unwrap_or("Hyperspectral remote sensing is a powerful technology that".to_owned());
    let count: usize = arguments.next().map_or(Ok(400), |number| number.parse())?;

    let device = Device::default();
    let released = Import::open(Path::new(&folder), None)?;
    let model = released.model(&device)?;
    println!("{} parameters", released.config.num_params());

    // The prompt is read in one pass, and every byte after it in constant time and memory.
    let request = Request {
        max_new_bytes: count,
        seed: 4740,
        ..Request::new(prompt.as_bytes())
    };
    let started = Instant::now();
    let mut generator = Generator::new(model, &device, GeneratorOptions::default());
    let texts = generator.generate(&[request], &mut |_| ControlFlow::Continue(()))?;
    let seconds = started.elapsed().as_secs_f64();
    // A text may end inside a character; what is no UTF-8 is shown as such.
    println!(
        "{count} bytes in {seconds:.2} s\n{prompt}{}",
        lossy_text(&texts[0].bytes)
    );
    Ok(())
}
