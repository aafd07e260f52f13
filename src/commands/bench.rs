//! The command `bench`: how fast the operations and a whole step are on this machine.
//!
//! Times are medians of repetitions that each end with a wait for the device; the first calls,
//! which compile kernels, are not counted.

mod decode;

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::{Args, Subcommand, ValueEnum};
use mambabyte_kernels::linear::{Product, product};
use mambabyte_kernels::selective_scan::Scan;
use mambabyte_kernels::selective_scan::measure::passes;
use serde::Serialize;

use super::{ConfigArgs, print, print_json};
use crate::config::DeviceConfig;
use crate::device::{self, budget::Budget, exhausted};
use crate::error::{Error, Result};
use crate::memory::size;
use crate::train::Learner;
use crate::train::fit::{fit, meaningless_batch};

/// What to measure.
#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// The selective scan, forward and backward, and on a GPU each of its kernels
    Scan(ScanArgs),
    /// The model's matrix products, with their error against f64
    Gemm(GemmArgs),
    /// Optimizer steps of a config, on random bytes
    Step(StepArgs),
    /// Writing bytes: a prompt, then one byte after the other
    Decode(decode::DecodeArgs),
    /// Reading a prompt
    Prefill(decode::DecodeArgs),
}

/// How often to measure, and in which form to report.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Repetitions that are counted
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = super::positive)]
    pub repeat: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Storage of activations.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Storage {
    /// 32-bit floating point
    F32,
    /// bfloat16
    Bf16,
}

impl Storage {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// Where an operation runs, and how its tensors are stored.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// Storage of activations and matrices
    #[arg(long, value_enum, default_value_t = Storage::F32)]
    pub dtype: Storage,
    /// Where to compute: auto, cpu, cuda, wgpu, with an index as in cuda:1
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = super::device)]
    pub device: DeviceConfig,
}

/// Arguments of `bench scan`.
#[derive(Clone, Debug, Args)]
pub struct ScanArgs {
    /// Sequences, B
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = super::positive)]
    pub batch: usize,
    /// Positions, L
    #[arg(long, value_name = "L", default_value_t = 8192, value_parser = super::positive)]
    pub length: usize,
    /// Channels, E
    #[arg(long, value_name = "E", default_value_t = 2048, value_parser = super::positive)]
    pub inner: usize,
    /// States a channel, N
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = super::positive)]
    pub state: usize,
    /// Where and in which storage.
    #[command(flatten)]
    pub place: Place,
    /// How to measure.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `bench gemm`.
#[derive(Clone, Debug, Args)]
pub struct GemmArgs {
    /// Rows of the left matrix: B · L
    #[arg(long, value_name = "M", default_value_t = 8192, value_parser = super::positive)]
    pub rows: usize,
    /// Let products of f32 matrices round them to TF32
    #[arg(long)]
    pub tf32: bool,
    /// Measure Burn's own products too
    #[arg(long)]
    pub burn: bool,
    /// Where and in which storage.
    #[command(flatten)]
    pub place: Place,
    /// How to measure.
    #[command(flatten)]
    pub common: Common,
}

/// Arguments of `bench step`.
#[derive(Clone, Debug, Args)]
pub struct StepArgs {
    /// The config whose step is measured.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// How to measure.
    #[command(flatten)]
    pub common: Common,
}

/// One line of a report.
#[derive(Clone, Debug, Serialize)]
struct Line {
    name: String,
    /// Median time of one repetition.
    milliseconds: f64,
    /// Rate in the unit that `unit` names.
    rate: f64,
    unit: &'static str,
    /// ‖result - f64 result‖ / ‖f64 result‖, where it was computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    relative_error: Option<f64>,
}

/// Runs the command.
pub fn run(command: &BenchCommand) -> Result<()> {
    let (lines, json) = match command {
        BenchCommand::Scan(args) => (exhausted::guard(|| scan(args))?, args.common.json),
        BenchCommand::Gemm(args) => (exhausted::guard(|| gemm(args))?, args.common.json),
        BenchCommand::Step(args) => (step(args)?, args.common.json),
        BenchCommand::Decode(args) => return exhausted::guard(|| decode::run(args, true)),
        BenchCommand::Prefill(args) => return exhausted::guard(|| decode::run(args, false)),
    };
    if json {
        return print_json(&lines);
    }
    let mut text = String::new();
    for line in lines {
        text += &format!(
            "{:<34} {:>10.3} ms {:>10.2} {}",
            line.name, line.milliseconds, line.rate, line.unit
        );
        if let Some(error) = line.relative_error {
            text += &format!("   relative error {error:.1e}");
        }
        text.push('\n');
    }
    print(&text)
}

/// Median time in milliseconds of `work` followed by a wait for `device`.
fn measure(device: &Device, repeat: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    median(repeat, || {
        work()?;
        device.sync().map_err(|e| Error::Device {
            device: format!("{device:?}"),
            reason: e.to_string(),
            hint: "`mambabyte doctor` says what this machine has".to_owned(),
        })
    })
}

/// Median time in milliseconds of `work`, which waits for what it gives to a device.
fn median(repeat: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut once = || -> Result<f64> {
        let started = Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    for _ in 0..3 {
        once()?;
    }
    Ok(middle((0..repeat).map(|_| once()).collect::<Result<_>>()?))
}

/// The middle one of at least one number.
fn middle(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Normal random numbers in `dtype`.
fn random<const D: usize>(dims: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    Tensor::<D>::random(dims, Distribution::Normal(0.0, 1.0), device).cast(dtype)
}

fn scan(args: &ScanArgs) -> Result<Vec<Line>> {
    let device = device::open(&args.place.device)?;
    let (b, l, e, n) = (args.batch, args.length, args.inner, args.state);
    let dtype = args.place.dtype.dtype();
    let wide = || random([b, l, e], dtype, &device);
    let narrow = || random([b, l, n], dtype, &device);
    let scan = Scan {
        d: Some(Tensor::ones([e], &device)),
        z: Some(wide()),
        delta_bias: Some(Tensor::full([e], -3.0, &device)),
        ..Scan::new(
            wide(),
            wide(),
            Tensor::full([e, n], -1.0, &device),
            narrow(),
            narrow(),
        )
    };
    let Some(passes) = passes(scan, wide()) else {
        return Err(Error::Device {
            device: format!("{device:?}"),
            reason: "it has no kernels of ours".to_owned(),
            hint: "`mambabyte doctor` says what this machine has".to_owned(),
        });
    };
    let time = |pass: &dyn Fn()| -> Result<f64> {
        let many = measure(&device, args.common.repeat, || {
            (0..INNER).for_each(|_| pass());
            Ok(())
        })?;
        Ok(many / INNER as f64)
    };
    let forward = time(&passes.forward)?;
    let backward = time(&passes.backward)?;
    let elements = (b * l * e * n) as f64;
    let line = |name: &str, milliseconds: f64| Line {
        name: name.to_owned(),
        milliseconds,
        rate: elements / milliseconds / 1e6,
        unit: "G states/s",
        relative_error: None,
    };
    let mut lines = vec![line("forward", forward), line("backward", backward)];
    for (pass, run) in [("forward", &passes.forward), ("backward", &passes.backward)] {
        for (kernel, milliseconds) in kernel_medians(args.common.repeat, run) {
            lines.push(line(&format!("{pass}: {kernel}"), milliseconds));
        }
    }
    Ok(lines)
}

/// The CPU has no kernels to tell apart.
#[cfg(not(any(feature = "cuda", feature = "wgpu")))]
fn kernel_medians(_repeat: usize, _pass: &dyn Fn()) -> Vec<(String, f64)> {
    Vec::new()
}

/// Median time in milliseconds of each kernel that `pass` launches; those of one name are added up.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn kernel_medians(repeat: usize, pass: &dyn Fn()) -> Vec<(String, f64)> {
    let mut samples: Vec<(String, Vec<f64>)> = Vec::new();
    for turn in 0..repeat {
        for (name, time) in mambabyte_kernels::kernel_times(pass) {
            let at = samples.iter().position(|(known, _)| *known == name);
            let at = at.unwrap_or_else(|| {
                samples.push((name, Vec::new()));
                samples.len() - 1
            });
            let times = &mut samples[at].1;
            times.resize(turn + 1, 0.0);
            times[turn] += time.as_secs_f64() * 1e3;
        }
    }
    samples
        .into_iter()
        .map(|(name, times)| (name, middle(times)))
        .collect()
}

/// Calls between two waits for the device: one alone would measure the wait.
const INNER: usize = 10;

/// The products of a block of MambaByte-353M.
const PRODUCTS: [(&str, usize, usize); 4] = [
    ("in_proj", 1024, 4096),
    ("out_proj", 2048, 1024),
    ("x_proj", 2048, 96),
    ("dt_proj", 64, 2048),
];

fn gemm(args: &GemmArgs) -> Result<Vec<Line>> {
    let device = device::open(&args.place.device)?;
    let dtype = args.place.dtype.dtype();
    let mut lines = Vec::new();
    for (name, k, n) in PRODUCTS {
        let m = args.rows;
        let x = random([m, k], dtype, &device);
        let w = random([k, n], dtype, &device);
        let dy = random([m, n], dtype, &device);
        let error = relative_error(&x, &w);
        let mut add = |pass: &str, error: Option<f64>, work: &dyn Fn()| -> Result<()> {
            let milliseconds = measure(&device, args.common.repeat, || {
                for _ in 0..INNER {
                    work();
                }
                Ok(())
            })? / INNER as f64;
            lines.push(Line {
                name: format!("{name} {m} x {k} x {n} {pass}"),
                milliseconds,
                rate: 2.0 * (m * k * n) as f64 / milliseconds / 1e9,
                unit: "TFLOP/s",
                relative_error: error,
            });
            Ok(())
        };
        let tf32 = args.tf32;
        let plain = Product::plain(dtype, tf32);
        let right = Product::right_transposed(dtype, tf32);
        let left = Product::left_transposed(DType::F32, tf32);
        add("y", Some(error), &|| {
            let _ = product(x.clone(), w.clone(), plain);
        })?;
        add("dX", None, &|| {
            let _ = product(dy.clone(), w.clone(), right);
        })?;
        add("dW", None, &|| {
            let _ = product(x.clone(), dy.clone(), left);
        })?;
        if args.burn {
            add("y (Burn's)", None, &|| {
                let _ = x.clone().matmul(w.clone());
            })?;
            add("dX (Burn's)", None, &|| {
                let _ = dy.clone().matmul(w.clone().transpose());
            })?;
            add("dW (Burn's)", None, &|| {
                let _ = x.clone().transpose().matmul(dy.clone());
            })?;
        }
    }
    Ok(lines)
}

/// Error of the first rows of `x · w` against f64 on the host.
fn relative_error(x: &Tensor<2>, w: &Tensor<2>) -> f64 {
    let [k, n] = w.dims();
    let rows = 8.min(x.dims()[0]);
    let values = |t: Tensor<2>| t.into_data().iter::<f64>().collect::<Vec<_>>();
    let how = Product::plain(x.dtype(), false);
    let got = values(product(x.clone(), w.clone(), how).slice([0..rows, 0..n]));
    let x = values(x.clone().slice([0..rows, 0..k]));
    let w = values(w.clone());
    let (mut difference, mut norm) = (0.0, 0.0);
    for i in 0..rows {
        for j in 0..n {
            let truth: f64 = (0..k).map(|p| x[i * k + p] * w[p * n + j]).sum();
            difference += (got[i * n + j] - truth).powi(2);
            norm += truth * truth;
        }
    }
    (difference / norm).sqrt()
}

fn step(args: &StepArgs) -> Result<Vec<Line>> {
    let config = args.config.load()?;
    device::set_threads(config.train.threads);
    let (device, budget, settled) = Budget::open(&config)?;
    let config = fit(&config, settled, &budget, &device)?;
    let batch = meaningless_batch(&config);
    let count = batch.inputs.len();
    let milliseconds = budget.guard(&config, || {
        let mut learner = Learner::new(&config, &device);
        // A step ends with reading its loss.
        median(args.common.repeat, || {
            learner.step(&batch, 1e-6, None);
            Ok(())
        })
    })?;
    if let Some(used) = budget.used(&device) {
        tracing::info!("the device has given {}", size(used.reserved));
    }
    Ok(vec![Line {
        name: format!("step of {count} bytes"),
        milliseconds,
        rate: count as f64 / milliseconds,
        unit: "kB/s",
        relative_error: None,
    }])
}
