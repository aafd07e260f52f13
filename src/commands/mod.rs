//! The command line: its arguments, and one file for each command.
//!
//! Standard output carries results; everything else goes to standard error.

pub mod bench;
pub mod dash;
pub mod data;
pub mod doctor;
pub mod estimate;
pub mod eval;
pub mod eval_lengths;
pub mod eval_noise;
pub mod eval_tasks;
pub mod export;
pub mod export_metrics;
pub mod generate;
pub mod import;
pub mod logits;
pub mod model_args;
pub mod params;
pub mod perplexity;
pub mod resume;
pub mod runs;
pub mod serve;
pub mod train;

use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use mambabyte_datasets::Split;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, DeviceConfig, DeviceKind, MambaConfig};
use crate::device::exhausted;
use crate::error::{Error, Result, print_warning};
use crate::hub::Name;
use crate::interop::ExportFormat;
use crate::train::run_dir::resolve_checkpoint;

/// Train, evaluate and run byte-level Mamba language models on one GPU.
#[derive(Debug, Parser)]
#[command(
    name = "mambabyte",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 unexpected, 2 command line or config, 3 data, \
                  4 checkpoint, 5 device, 6 out of memory, 7 training diverged, 130 interrupted."
)]
pub struct Cli {
    /// Log more; twice for everything. The variable RUST_LOG has the last word
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a new training run
    Train(TrainArgs),
    /// Go on with a training run where its last checkpoint is
    Resume(ResumeArgs),
    /// Write text that goes on from a prompt
    Generate(generate::GenerateArgs),
    /// Measure bits per byte of a checkpoint on held-out data
    Eval(eval::EvalArgs),
    /// Measure what longer contexts are worth: length extrapolation
    EvalLengths(eval_lengths::EvalLengthsArgs),
    /// Measure how much errors in the text cost: robustness against noise
    EvalNoise(eval_noise::EvalNoiseArgs),
    /// Score a checkpoint on zero-shot tasks, as lm-evaluation-harness does
    EvalTasks(eval_tasks::EvalTasksArgs),
    /// Convert between bits per byte, cross-entropies and word perplexity
    Perplexity(perplexity::PerplexityArgs),
    /// Answer requests over HTTP, in the form of OpenAI's completions
    Serve(serve::ServeArgs),
    /// Write the logits at every byte of a file, as a NumPy array
    Logits(LogitsArgs),
    /// Make a checkpoint of one of another program: mamba_ssm, transformers, MambaByte
    Import(ImportArgs),
    /// Write a checkpoint in the form of another program
    Export(ExportArgs),
    /// Show runs in a browser while they train
    Dash(dash::DashArgs),
    /// List runs with their step, bits per byte, speed and state
    Runs(runs::RunsArgs),
    /// Write a run's metrics as CSV or for TensorBoard
    ExportMetrics(export_metrics::ExportMetricsArgs),
    /// Fetch, prepare, check and describe data
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Show the parameters, memory and arithmetic of a config's model
    Params(ParamsArgs),
    /// Show how much device memory training by a config takes, and what fits
    Estimate(estimate::EstimateArgs),
    /// Check what this machine has and what is missing
    Doctor(doctor::DoctorArgs),
    /// Measure how fast operations and steps are here
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Which config, and what to change in it.
#[derive(Clone, Debug, Args)]
pub struct ConfigArgs {
    /// Config file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Change one key of the config; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
}

impl ConfigArgs {
    /// Loads the config, and warns about settings without effect.
    pub fn load(&self) -> Result<Config> {
        let config = Config::load(&self.config, &self.overrides)?;
        for warning in config.warnings() {
            print_warning(&warning);
        }
        Ok(config)
    }
}

/// Arguments of `train`.
#[derive(Clone, Debug, Args)]
pub struct TrainArgs {
    /// The config of the run.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Name of the run, which is its folder in `checkpoint.dir`; made from the time if left out
    #[arg(long, value_name = "NAME", value_parser = run_name)]
    pub run: Option<String>,
    /// Start from the weights of this checkpoint, or of a run, whose newest is taken
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,
    /// Stop with a checkpoint after so many optimizer steps; the schedule stays that of the config
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,
}

/// Arguments of `resume`.
#[derive(Clone, Debug, Args)]
pub struct ResumeArgs {
    /// The run's folder, or its name in `checkpoints/`
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Stop with a checkpoint after so many more optimizer steps
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,
}

/// Arguments of `logits`.
#[derive(Clone, Debug, Args)]
pub struct LogitsArgs {
    /// Folder of the checkpoint, or of a run, whose newest is taken; or hf:OWNER/NAME
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// File whose bytes are read
    #[arg(long, value_name = "FILE")]
    pub bytes: PathBuf,
    /// File to write: float32, one row of logits for each byte
    #[arg(long, value_name = "FILE.npy")]
    pub out: PathBuf,
    /// Bytes computed at once; the state is carried from piece to piece
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive)]
    pub piece: usize,
    /// Where to compute: auto, cpu, cuda, wgpu, with an index as in cuda:1
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub device: DeviceConfig,
}

/// Arguments of `import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// Folder or file of the checkpoint: pytorch_model.bin or safetensors; or its name on Hugging
    /// Face, as in hf:JunxiongWang/MambaByte_PG19_972M, with @REVISION behind it if not the newest
    #[arg(long, value_name = "PATH|hf:OWNER/NAME")]
    pub from: PathBuf,
    /// Its config, JSON or YAML, where it is not the `config.json` beside the weights
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder to make, which then is a checkpoint
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Take a name on Hugging Face from what was downloaded before; as HF_HUB_OFFLINE=1
    #[arg(long)]
    pub offline: bool,
}

/// Arguments of `export`.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// Folder of the checkpoint, or of a run, whose newest is taken; or hf:OWNER/NAME
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// What it is for: mamba-ssm or transformers
    #[arg(long, value_name = "FORMAT")]
    pub format: ExportFormat,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Arguments of `params`.
#[derive(Clone, Debug, Args)]
pub struct ParamsArgs {
    /// Config file (TOML)
    #[arg(long, value_name = "FILE", required_unless_present = "checkpoint")]
    pub config: Option<PathBuf>,
    /// Folder of a checkpoint, or of a run, in place of a config
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "overrides"])]
    pub checkpoint: Option<PathBuf>,
    /// Change one key of the config; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Print JSON, with every tensor
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
///
/// Whatever the command says; [`Error::exit_code`] is the process's.
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Train(args) => train::run(args),
        Command::Resume(args) => resume::run(args),
        Command::Generate(args) => exhausted::guard(|| generate::run(args)),
        Command::Eval(args) => exhausted::guard(|| eval::run(args)),
        Command::EvalLengths(args) => exhausted::guard(|| eval_lengths::run(args)),
        Command::EvalNoise(args) => exhausted::guard(|| eval_noise::run(args)),
        Command::EvalTasks(args) => exhausted::guard(|| eval_tasks::run(args)),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Logits(args) => exhausted::guard(|| logits::run(args)),
        Command::Import(args) => import::run(args),
        Command::Export(args) => export::run(args),
        Command::Dash(args) => dash::run(args),
        Command::Runs(args) => runs::run(args),
        Command::ExportMetrics(args) => export_metrics::run(args),
        Command::Data(command) => data::run(command),
        Command::Params(args) => params::run(args),
        Command::Estimate(args) => estimate::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(command) => bench::run(command),
    }
}

/// The checkpoint folder that an argument means: one, or a run's newest, or what a name on Hugging
/// Face (`hf:OWNER/NAME`) stands for.
///
/// # Errors
///
/// [`Error::Checkpoint`] where there is none; for a name also what downloading it says.
pub(crate) fn checkpoint_folder(path: &Path) -> Result<PathBuf> {
    match Name::of(path) {
        Some(name) => import::of_hub(&name?),
        None => resolve_checkpoint(path),
    }
}

/// Says what the numbers of a model mean whose tokens are not the byte values.
pub(crate) fn warn_unless_bytes(model: &MambaConfig) {
    if model.vocab_size != 256 {
        print_warning(&format!(
            "the model has {} tokens, and no tokenizer is here: every byte is taken for the token of \
             its number, which only a model of bytes has learnt",
            grouped(model.vocab_size as u64)
        ));
    }
}

/// Sends log lines to standard error: information of this program and warnings of others, more
/// with each `-v`.
pub fn start_logging(verbose: u8) {
    let default = match verbose {
        // CubeCL says of every failed allocation that it is tried again, and of everything that
        // needed it that it failed: the error at the end says it once.
        0 => {
            "warn,cubecl_common=error,cubecl_server=error,cubecl_runtime=error,\
             mambabyte=info,mambabyte_datasets=info,mambabyte_kernels=info"
        }
        1 => "info,mambabyte=debug,mambabyte_datasets=debug,mambabyte_kernels=debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // A second call, as in tests, leaves the first one's logging in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(crate::error::colored(io::stderr().is_terminal()))
        .with_target(false)
        // A line that cannot be written is lost; to say so on standard error would panic.
        .log_internal_errors(false)
        .try_init();
}

/// Writes `text` to standard output.
///
/// # Errors
///
/// [`Error::Stdout`], which is a success where the reader has gone away: `mambabyte … | head` is
/// not a failure. The macro `println!` would panic there.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Error::Stdout)
}

/// Writes `value` to standard output as indented JSON.
///
/// # Errors
///
/// As [`print()`].
pub fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<()> {
    print(&json_text(value)?)
}

/// `value` as indented JSON with a line's end.
pub(crate) fn json_text<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    Ok(text + "\n")
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `number` with the largest of k, M, G, T, P that leaves at least 1, and `unit`.
pub(crate) fn scaled(number: f64, unit: &str) -> String {
    let (factor, prefix) = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]
        .into_iter()
        .find(|(factor, _)| number >= *factor)
        .unwrap_or((1.0, ""));
    let decimals = if factor > 1.0 { 2 } else { 0 };
    format!("{:.decimals$} {prefix}{unit}", number / factor)
}

/// A run's name becomes a folder's name: no separators, nothing hidden, nothing odd.
fn run_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.starts_with(['.', '-']) || !text.chars().all(plain) {
        return Err(
            "use letters, digits, `-`, `_` and `.`, beginning with a letter, a digit or \
                    `_`"
            .to_owned(),
        );
    }
    Ok(text.to_owned())
}

/// `cuda` or `cuda:1`.
pub(crate) fn device(text: &str) -> Result<DeviceConfig, String> {
    let (kind, index) = match text.split_once(':') {
        Some((kind, index)) => (kind, index.parse::<u8>().ok()),
        None => (text, Some(0)),
    };
    let kind: DeviceKind = kind.parse()?;
    match index {
        Some(index) => Ok(DeviceConfig {
            kind,
            index: index.into(),
        }),
        None => Err("the index is an integer from 0 to 255, as in `cuda:1`".to_owned()),
    }
}

/// The bytes of a file that the command line names.
pub(crate) fn read_named(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::unreadable(path))
}

/// A split's name.
pub(crate) fn split(text: &str) -> Result<Split, String> {
    text.parse()
        .map_err(|_| "expected train, validation or test".to_owned())
}

pub(crate) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected an integer of at least 1".to_owned()),
        Ok(number) => Ok(number),
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    number_where(
        text,
        |it| it == 0.0 || (1e-4..=1e4).contains(&it),
        "expected 0, or a number from 0.0001 to 10,000",
    )
}

fn fraction(text: &str) -> Result<f64, String> {
    number_where(
        text,
        |it| (0.0..=1.0).contains(&it),
        "expected a number from 0 to 1",
    )
}

/// A share that may be held out twice.
fn held_out(text: &str) -> Result<f64, String> {
    number_where(
        text,
        |it| (0.0..0.5).contains(&it),
        "expected a number from 0 to below 0.5: so much is held out for validation, and again for \
         testing",
    )
}

fn number_where(text: &str, good: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|&number| good(number))
        .ok_or_else(|| expected.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_declaration_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn generation_has_the_documented_defaults() {
        let cli =
            parse("mambabyte generate --checkpoint c --prompt x --max-new-bytes 9").expect("valid");
        let Command::Generate(args) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(args.max_new_bytes, 9);
        let sampling = args.sampling.config();
        assert_eq!(sampling, crate::generate::SamplingConfig::default());
        assert_eq!((args.seed, args.num_samples), (4740, 1));
        assert_eq!(args.model.device.kind, DeviceKind::Auto);
    }

    #[test]
    fn overrides_repeat_and_verbosity_counts() {
        let cli =
            parse("mambabyte train --config f.toml --set a.b=1 --set c.d=2 -vv").expect("valid");
        assert_eq!(cli.verbose, 2);
        let Command::Train(args) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!(args.config.overrides, ["a.b=1", "c.d=2"]);
    }

    #[test]
    fn impossible_arguments_are_refused() {
        for line in [
            "mambabyte",
            "mambabyte fly",
            "mambabyte train",
            "mambabyte train --config f --run ../x",
            "mambabyte train --config f --run .",
            "mambabyte train --config f --stop-after 0",
            "mambabyte generate --checkpoint c --top-k 257",
            "mambabyte generate --checkpoint c --top-p 1.1",
            "mambabyte generate --checkpoint c --temperature -1",
            "mambabyte generate --checkpoint c --temperature nan",
            "mambabyte generate --checkpoint c --preset 353M",
            "mambabyte generate --prompt x",
            "mambabyte generate --checkpoint c --repetition-penalty 0",
            "mambabyte generate --checkpoint c --max-new-bytes 0",
            "mambabyte eval --checkpoint c --data d --split dev",
            "mambabyte estimate",
            "mambabyte estimate --config c --batch 0",
            "mambabyte doctor --device tpu",
            "mambabyte doctor --device cuda:x",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(353_945_600), "353,945,600");
        assert_eq!(scaled(723_004_416.0, "FLOP"), "723.00 MFLOP");
        assert_eq!(scaled(12.0, "B"), "12 B");
    }

    #[test]
    fn devices_have_an_index() {
        let parsed = device("cuda:1").expect("valid");
        assert_eq!((parsed.kind, parsed.index), (DeviceKind::Cuda, 1));
        assert_eq!(device("vulkan").expect("valid").kind, DeviceKind::Wgpu);
    }
}
