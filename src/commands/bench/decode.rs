//! How fast a model reads prompts and writes bytes; options and report of mamba_ssm's
//! `benchmark_generation_mamba_simple.py`.

use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use serde::Serialize;

use crate::commands::generate::SamplingArgs;
use crate::commands::model_args::{ModelArgs, Opened};
use crate::commands::{grouped, positive, print, print_json};
use crate::config::{DeviceKind, Precision};
use crate::error::{Error, Result};
use crate::generate::{Request, Timing};

/// Arguments of `bench decode` and `bench prefill`.
#[derive(Clone, Debug, Args)]
pub struct DecodeArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt of every sequence; random bytes if left out
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Bytes of a random prompt
    #[arg(long, value_name = "N", default_value_t = 100, alias = "promptlen", value_parser = positive)]
    pub prompt_len: usize,
    /// Bytes to write
    #[arg(long, value_name = "N", default_value_t = 100, alias = "genlen", value_parser = positive)]
    pub gen_len: usize,
    /// Sequences side by side
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = positive)]
    pub batch: usize,
    /// Repetitions that are counted
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub repeat: usize,
    /// How bytes are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was measured: medians.
#[derive(Clone, Debug, Serialize)]
struct Report {
    parameters: u64,
    precision: String,
    decoder: String,
    batch: usize,
    prompt_length: usize,
    generation_length: usize,
    /// Prompt and bytes together.
    total_ms: f64,
    prefill_ms: f64,
    prefill_bytes_per_second: f64,
    /// None where only the prompt is read.
    #[serde(flatten)]
    decode: Option<Decode>,
}

/// What was measured of writing.
#[derive(Clone, Debug, Serialize)]
struct Decode {
    /// Of all new bytes.
    decode_ms: f64,
    decode_ms_per_byte: f64,
    decode_bytes_per_second: f64,
    /// How fast a step reads the parameters that all of it needs, in their own format.
    weights_gigabytes_per_second: f64,
    /// How fast this machine's cores read memory that is not in a cache; CPU only.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_gigabytes_per_second: Option<f64>,
    /// Hash of all bytes written, to compare runs.
    bytes_crc32: u32,
}

/// Runs the command; without `decodes` only the prompt is read.
pub fn run(args: &DecodeArgs, decodes: bool) -> Result<()> {
    let mut opened = args.model.open()?;
    let requests = requests(args, if decodes { args.gen_len } else { 1 });
    let mut timings = Vec::new();
    let mut hash = 0;
    // Twice for kernels that are compiled and graphs that are recorded.
    for turn in 0..args.repeat + 2 {
        let mut session = opened.generator.start(&requests)?;
        let mut hasher = crc32fast::Hasher::new();
        while decodes && !session.is_finished() {
            for piece in session.advance_ahead(64)? {
                hasher.update(&piece.bytes);
            }
        }
        let timing = session.timing();
        let bytes = hasher.finalize();
        if turn > 0 && bytes != hash {
            return Err(Error::Other(anyhow::anyhow!(
                "repetition {turn} wrote other bytes than the one before: a fault of this program"
            )));
        }
        hash = bytes;
        if turn >= 2 {
            timings.push(timing);
        }
    }
    let mut report = report(args, &opened, &timings, decodes.then_some(hash));
    if let (Some(decode), DeviceKind::Cpu) = (&mut report.decode, opened.kind) {
        decode.memory_gigabytes_per_second = Some(memory_speed(args.repeat));
    }
    if args.json {
        return print_json(&[report]);
    }
    let mut text = format!(
        "parameters: {}, {}, {}\nprompt length: {}, generation length: {}, batch: {}\n",
        grouped(report.parameters),
        report.precision,
        report.decoder,
        report.prompt_length,
        report.generation_length,
        report.batch
    );
    text += &format!(
        "prompt processing: {:.2} ms, {:.0} bytes/s\n",
        report.prefill_ms, report.prefill_bytes_per_second
    );
    if let Some(decode) = &report.decode {
        if let Some(memory) = decode.memory_gigabytes_per_second {
            text += &format!(
                "weights are read at {:.1} GB/s, memory at {memory:.1} GB/s: {:.0} %\n",
                decode.weights_gigabytes_per_second,
                100.0 * decode.weights_gigabytes_per_second / memory
            );
        }
        text += &format!(
            "decoding: {:.2} ms, {:.4} ms a byte, {:.0} bytes/s\n\
             prompt processing + decoding time: {:.2} ms\n",
            decode.decode_ms,
            decode.decode_ms_per_byte,
            decode.decode_bytes_per_second,
            report.total_ms
        );
    }
    print(&text)
}

/// Bytes of the parameters that a step reads whole: all but the embedding's rows of other bytes.
fn weight_bytes(opened: &Opened) -> f64 {
    let config = &opened.config;
    let table = match config.tie_embeddings {
        true => 0,
        false => config.padded_vocab() * config.dim,
    };
    let size = match opened.precision {
        Precision::Bf16 => 2.0,
        Precision::Fp32 | Precision::Tf32 => 4.0,
    };
    size * (config.num_params() as f64 - table as f64)
}

/// Gigabytes a second at which all cores together read a buffer larger than every cache.
fn memory_speed(repeat: usize) -> f64 {
    let buffer = vec![1.0f32; 256 << 20];
    let mut best = f64::INFINITY;
    for _ in 0..repeat + 5 {
        let started = Instant::now();
        let sum: f32 = buffer.par_chunks(1 << 20).map(sum).sum();
        std::hint::black_box(sum);
        best = best.min(started.elapsed().as_secs_f64());
    }
    4.0 * buffer.len() as f64 / best / 1e9
}

/// Sum of the numbers, in independent lanes, so that nothing but memory is waited for.
fn sum(numbers: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 64];
    for chunk in numbers.chunks_exact(lanes.len()) {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane += number;
        }
    }
    lanes.iter().sum()
}

fn requests(args: &DecodeArgs, bytes: usize) -> Vec<Request> {
    let prompt = |sequence: usize| match &args.prompt {
        Some(prompt) => prompt.as_bytes().to_vec(),
        None => {
            // Bytes without order: their values do not change the work.
            let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
            let first = sequence * args.prompt_len;
            (first..first + args.prompt_len).map(byte).collect()
        }
    };
    let request = |sequence: usize| Request {
        max_new_bytes: bytes,
        sampling: args.sampling.config(),
        stream: sequence as u64,
        ..Request::new(prompt(sequence))
    };
    (0..args.batch).map(request).collect()
}

fn report(args: &DecodeArgs, opened: &Opened, timings: &[Timing], hash: Option<u32>) -> Report {
    let median = |time: &dyn Fn(&Timing) -> f64| super::middle(timings.iter().map(time).collect());
    let prompt_bytes = timings[0].prompt_bytes;
    let new_bytes = timings[0].new_bytes;
    let prefill_ms = median(&|timing| timing.prefill.as_secs_f64() * 1e3);
    let decode = hash.map(|bytes_crc32| {
        let decode_ms = median(&|timing| timing.decode.as_secs_f64() * 1e3);
        let steps = (new_bytes / args.batch).max(1) as f64;
        Decode {
            decode_ms,
            decode_ms_per_byte: decode_ms / steps,
            decode_bytes_per_second: new_bytes as f64 / decode_ms.max(1e-9) * 1e3,
            weights_gigabytes_per_second: weight_bytes(opened)
                / (decode_ms / steps).max(1e-9)
                / 1e6,
            memory_gigabytes_per_second: None,
            bytes_crc32,
        }
    });
    Report {
        parameters: opened.config.num_params(),
        precision: opened.precision.name().to_owned(),
        decoder: opened.generator.describe().to_owned(),
        batch: args.batch,
        prompt_length: prompt_bytes / args.batch,
        generation_length: if decode.is_some() { args.gen_len } else { 0 },
        total_ms: median(&|timing| (timing.prefill + timing.decode).as_secs_f64() * 1e3),
        prefill_ms,
        prefill_bytes_per_second: prompt_bytes as f64 / prefill_ms * 1e3,
        decode,
    }
}
