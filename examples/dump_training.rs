//! All that another program needs to train as this one would: the config with every key, the initial
//! weights, and the bytes of every step. `tests/parity/train.py` reads them.
//!
//! ```text
//! cargo run --release --example dump_training CONFIG OUT [SECTION.KEY=VALUE]…
//! ```
//!
//! `OUT/step-0` is a checkpoint like any other. `OUT/batches.npy` is u8, `[steps, B, L + 1]`: a
//! row's first L bytes are inputs, and its last L are their targets. B counts the rows of all
//! micro-batches of a step.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use mambabyte::Config;
use mambabyte::config::Mode;
use mambabyte::train::checkpoint::Progress;
use mambabyte::train::{Checkpoint, Learner};
use mambabyte_datasets::{Sampler, SamplerConfig, SamplingMode, Shards};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(config), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: dump_training CONFIG OUT [SECTION.KEY=VALUE]…".into());
    };
    let config = Config::load(config, &arguments.collect::<Vec<_>>())?;
    let out = Path::new(&out);
    fs::create_dir_all(out)?;

    let train = &config.train;
    if train.mode != Mode::Independent {
        return Err("only independent windows: no state goes from one step to the next".into());
    }
    let shards = Arc::new(Shards::open(config.data.path.join("train"))?);
    let sampler = Sampler::new(
        Arc::clone(&shards),
        SamplerConfig {
            batch: train.batch * train.accumulation,
            length: train.length,
            seed: train.seed,
            mode: SamplingMode::Independent,
        },
    )?;

    let progress = Progress {
        data: Some(shards.identity().to_owned()),
        ..Progress::default()
    };
    Checkpoint::save(out, &Learner::new(&config, &Device::default()), &progress)?;

    let shape = format!(
        "{}, {}, {}",
        train.steps,
        sampler.config().batch,
        train.length + 1
    );
    let mut file = BufWriter::new(File::create(out.join("batches.npy"))?);
    file.write_all(&npy_header(&shape))?;
    for step in 0..train.steps {
        let batch = sampler.batch(step)?;
        for lane in 0..batch.batch {
            let row = batch.row(lane);
            // A state that is cleared inside a window is more than most programs can do.
            if batch.resets[row.start + 1..row.end].contains(&true) {
                return Err(format!("a document begins inside row {lane} of step {step}").into());
            }
            file.write_all(&batch.inputs[row.clone()])?;
            file.write_all(&batch.targets[row.end - 1..row.end])?;
        }
    }
    file.flush()?;
    println!("{} steps in {}", train.steps, out.display());
    Ok(())
}

/// Magic, version, and the dictionary, padded to a multiple of 64 bytes (NEP 1).
fn npy_header(shape: &str) -> Vec<u8> {
    let dictionary = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape}), }}");
    let length = (10 + dictionary.len() + 1).next_multiple_of(64) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((length as u16).to_le_bytes());
    header.extend(format!("{dictionary:<width$}\n", width = length - 1).into_bytes());
    header
}
