//! The command `eval`.

use std::fmt::Write as _;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use mambabyte_datasets::progress::{Bar, Silent};
use mambabyte_datasets::shards::OpenOptions;
use mambabyte_datasets::{DataError, Document, Progress, Shards, Split};
use serde::Serialize;

use super::{checkpoint_folder, grouped, print, print_json, read_named, warn_unless_bytes};
use crate::config::{DeviceConfig, DeviceKind, Precision};
use crate::device;
use crate::error::{Error, Result};
use crate::eval::npy::{Array, Number};
use crate::eval::perplexity::Counts;
use crate::eval::plot::{self, Series};
use crate::eval::{
    Context, Corpus, EvalOptions, Lanes, Measurement, PositionScore, Report, Texts, evaluate,
    evaluate_each,
};
use crate::heap;
use crate::model::MambaLm;
use crate::new_file::NewFile;
use crate::terminal::visible;
use crate::train::Checkpoint;

/// Positions computed at once: enough to fill a GPU; on the CPU fewer would stay in its caches, and
/// more would not be faster.
pub(crate) const POSITIONS: usize = 16 * 1024;

/// Lanes that carry states through documents: few, so that each reads long pieces.
const CARRIED: usize = 4;

/// What a byte is predicted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Windows of --length bytes, each read from zero memory
    Windows,
    /// Windows that overlap: only the last --stride bytes of each are scored
    Sliding,
    /// All of the document so far, with one state carried through it
    Carried,
}

/// Whose count of words a perplexity is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Words {
    /// Those in the data, as `wc -w` counts
    Counted,
    /// PG-19's own published count of the split, for comparison with papers
    Pg19,
}

/// A checkpoint, and how to compute with it.
#[derive(Clone, Debug, Args)]
pub struct CheckpointArgs {
    /// Folder of the checkpoint, or of a run, whose newest is taken; or hf:OWNER/NAME
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// Where to compute: auto, cpu, cuda, wgpu, with an index as in cuda:1
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = super::device)]
    pub device: DeviceConfig,
    /// Number format: fp32, or on CUDA devices tf32 and bf16; there that of the training if left out
    #[arg(long, value_name = "FORMAT")]
    pub precision: Option<Precision>,
}

/// A checkpoint that has been found and checked.
pub(crate) struct Found {
    /// Its folder.
    pub folder: PathBuf,
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    device: DeviceConfig,
    precision: Option<Precision>,
}

impl CheckpointArgs {
    /// Opens the checkpoint; nothing is loaded yet.
    pub(crate) fn find(&self) -> Result<Found> {
        let folder = checkpoint_folder(&self.checkpoint)?;
        let checkpoint = Checkpoint::open_for_model(&folder)?;
        warn_unless_bytes(&checkpoint.config().model);
        Ok(Found {
            checkpoint,
            folder,
            device: self.device.clone(),
            precision: self.precision,
        })
    }
}

impl Found {
    /// Bytes of a sequence in training.
    pub fn trained_length(&self) -> usize {
        self.checkpoint.config().train.length
    }

    /// The model on its device, and the format it computes in.
    pub fn load(&self) -> Result<(MambaLm, Device, Precision)> {
        heap::keep_pages();
        let (device, kind) = device::open_any(&self.device)?;
        let cuda = kind == DeviceKind::Cuda;
        let precision = match self.precision {
            Some(precision) if precision != Precision::Fp32 && !cuda => {
                return Err(Error::Usage {
                    message: format!("--precision {precision} on {}", kind.name()),
                    hint: "tf32 and bf16 are for CUDA devices: leave --precision out".to_owned(),
                });
            }
            Some(precision) => precision,
            None if cuda => self.checkpoint.config().train.precision,
            None => Precision::Fp32,
        };
        let model = self.checkpoint.model(&device)?;
        Ok((model.with_compute(precision.into()), device, precision))
    }
}

/// Which text.
#[derive(Clone, Debug, Args)]
pub struct TextArgs {
    /// Folder written by `data prepare`
    #[arg(long, value_name = "DIR", required_unless_present = "text")]
    pub data: Option<PathBuf>,
    /// Which part of it: train, validation or test
    #[arg(long, value_name = "SPLIT", default_value = "test", value_parser = super::split)]
    pub split: Split,
    /// Files to read instead, each a document
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "data")]
    pub text: Vec<PathBuf>,
}

impl TextArgs {
    /// Opens it.
    pub fn open(&self) -> Result<Box<dyn Corpus>> {
        if let Some(data) = &self.data {
            let folder = data.join(self.split.as_str());
            return Ok(Box::new(Shards::open_with(folder, OpenOptions::CHECKED)?));
        }
        let mut documents = Vec::with_capacity(self.text.len());
        for path in &self.text {
            documents.push(Document {
                name: path.display().to_string(),
                bytes: read_named(path)?,
            });
        }
        if documents.iter().all(|it| it.bytes.is_empty()) {
            return Err(Error::Data(DataError::NoData {
                what: "bytes to score".to_owned(),
                place: self.text.first().cloned().unwrap_or_default(),
                hint: "give files that are not empty".to_owned(),
            }));
        }
        Ok(Box::new(Texts::new(documents)))
    }
}

/// What was measured, in `--json`.
#[derive(Serialize)]
pub(crate) struct About {
    checkpoint: PathBuf,
    precision: Precision,
    /// The folder of data and its part, or files.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    text: Vec<PathBuf>,
}

impl About {
    pub fn new(found: &Found, text: &TextArgs, precision: Precision) -> Self {
        Self {
            checkpoint: found.folder.clone(),
            precision,
            data: text.data.clone(),
            split: text.data.is_some().then(|| text.split.as_str()),
            text: text.text.clone(),
        }
    }
}

/// The file of a plot, before the work that it is to show.
pub(crate) fn plot_file(path: &Path) -> Result<NewFile> {
    match path.extension().and_then(|it| it.to_str()) {
        Some(other) if !other.eq_ignore_ascii_case("svg") => Err(Error::Usage {
            message: format!("`{}` is not called .svg", path.display()),
            hint: "plots are SVG files: every browser shows and converts them".to_owned(),
        }),
        _ => NewFile::create(path),
    }
}

/// Draws a plot of bits per byte into its file.
pub(crate) fn put_plot(file: NewFile, title: &str, x_name: &str, series: &[Series]) -> Result<()> {
    file.put(plot::svg(title, x_name, series)?.as_bytes())
}

/// What a byte is predicted from.
#[derive(Clone, Debug, Args)]
pub struct ContextArgs {
    /// What a byte is predicted from, never beyond its document
    #[arg(long, value_enum, default_value = "windows")]
    pub mode: Mode,
    /// Bytes of a window; the length the model was trained with if left out
    #[arg(long, value_name = "BYTES", value_parser = super::positive)]
    pub length: Option<usize>,
    /// Bytes by which windows are apart (sliding); half of --length if left out
    #[arg(long, value_name = "BYTES", value_parser = super::positive)]
    pub stride: Option<usize>,
    /// Bytes computed at once; memory grows with it
    #[arg(long, value_name = "N", default_value_t = POSITIONS, value_parser = super::positive)]
    pub piece: usize,
}

impl ContextArgs {
    /// The context that is asked for; `trained` is the length of the model's training.
    pub fn context(&self, trained: usize) -> Result<Context> {
        let refuse = |message: String, hint: &str| {
            Err(Error::Usage {
                message,
                hint: hint.to_owned(),
            })
        };
        let length = self.length.unwrap_or(trained);
        let stride = self.stride.unwrap_or(length.div_ceil(2));
        match self.mode {
            Mode::Carried if self.length.is_some() => refuse(
                "--length is of windows, and --mode carried has none".to_owned(),
                "leave --length out; --piece sets how much is computed at once",
            ),
            Mode::Windows | Mode::Carried if self.stride.is_some() => refuse(
                "--stride is of windows that overlap".to_owned(),
                "add --mode sliding, or leave --stride out",
            ),
            Mode::Sliding if stride > length => refuse(
                format!("--stride {stride} would leave bytes out between windows of {length}"),
                "the stride is at most --length",
            ),
            Mode::Windows => Ok(Context::Windows { length }),
            Mode::Sliding => Ok(Context::Sliding { length, stride }),
            Mode::Carried => Ok(Context::Carried),
        }
    }
}

/// Arguments of `eval`.
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: CheckpointArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// Measure so many bytes from the beginning; all if left out
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: Option<u64>,
    /// Words that the perplexity is of
    #[arg(long, value_enum, default_value = "counted")]
    pub words: Words,
    /// Show every document
    #[arg(long)]
    pub documents: bool,
    /// Draw bits per byte against the position in a document
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Write every byte's probability, its logarithm and its rank into this folder, as NumPy arrays
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    report: Report,
    #[serde(flatten)]
    about: About,
    /// Whose words the perplexity is of.
    word_counts: Words,
    seconds: f64,
    bytes_per_second: f64,
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<()> {
    if args.words == Words::Pg19 && !args.text.text.is_empty() {
        return Err(Error::Usage {
            message: "--words pg19 are those of PG-19's splits, and --text is other text"
                .to_owned(),
            hint: "leave --words out, or measure a split of --data".to_owned(),
        });
    }
    let found = args.model.find()?;
    let corpus = args.text.open()?;
    let context = args.context.context(found.trained_length())?;
    let plot = args.plot.as_deref().map(plot_file).transpose()?;
    let (model, device, precision) = found.load()?;
    let options = EvalOptions {
        context,
        lanes: lanes(context, args.context.piece),
        max_bytes: args.max_bytes,
    };
    let corpus = corpus.as_ref();
    let progress = bar();
    let started = Instant::now();
    let measurement = match &args.save {
        None => evaluate(&model, &device, corpus, &options, progress.as_ref())?.checked()?,
        Some(folder) => {
            let mut saved = Saved::create(folder, corpus, args.max_bytes)?;
            let measurement = evaluate_each(
                &model,
                &device,
                corpus,
                &options,
                progress.as_ref(),
                &mut |at, found| saved.write(at, found),
            )?
            .checked()?;
            saved.finish(&measurement)?;
            measurement
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let counts = match args.words {
        Words::Counted => None,
        Words::Pg19 => Some(Counts::pg19_published(args.text.split)),
    };
    let report = Report::new(&measurement, context, counts);
    if let Some(file) = plot {
        let title = format!("{:.4} bits per byte", report.bits_per_byte);
        let series = [by_position("model", &report.curve)];
        put_plot(file, &title, "position in the document", &series)?;
    }
    let output = Output {
        bytes_per_second: report.bytes as f64 / seconds,
        report,
        about: About::new(&found, &args.text, precision),
        word_counts: args.words,
        seconds,
    };
    match args.json {
        true => print_json(&output),
        false => print(&text(&output, args.documents)),
    }
}

/// How many segments to read beside each other.
pub(crate) fn lanes(context: Context, positions: usize) -> Lanes {
    let count = match context {
        Context::Windows { length } | Context::Sliding { length, .. } => positions / length,
        Context::Carried => CARRIED,
    };
    Lanes {
        count: count.max(1),
        positions,
    }
}

/// A bar on a terminal, nothing elsewhere.
pub(crate) fn bar() -> Box<dyn Progress> {
    match std::io::stderr().is_terminal() {
        true => Box::new(Bar::new()),
        false => Box::new(Silent),
    }
}

/// The line of a plot: every bin at its end.
pub(crate) fn by_position(name: &str, curve: &[PositionScore]) -> Series {
    let points = curve.iter().filter_map(|bin| {
        let end = bin.to? as f64;
        Some((end, bin.bits_per_byte))
    });
    Series {
        name: name.to_owned(),
        points: points.collect(),
    }
}

/// The report for people.
fn text(output: &Output, documents: bool) -> String {
    let report = &output.report;
    let words = match output.word_counts {
        Words::Counted => format!("over {} words", report.words),
        Words::Pg19 => format!(
            "by PG-19's published {:.4} bytes a word",
            1.0 / report.words_per_byte
        ),
    };
    let mut text = format!(
        "{:.4} bits per byte ({:.4} nats) over {} bytes, word perplexity {:.2} {words}\n",
        report.bits_per_byte, report.nats_per_byte, report.bytes, report.word_perplexity,
    );
    let _ = writeln!(text, "\n{:>23} {:>12}  bits per byte", "position", "bytes");
    for bucket in &report.buckets {
        let to = match bucket.to {
            Some(to) => format!("to {}", grouped(to)),
            None => "on".to_owned(),
        };
        let _ = writeln!(
            text,
            "{:>11} {to:>11} {:>12}  {:.4}",
            grouped(bucket.from),
            grouped(bucket.bytes),
            bucket.bits_per_byte
        );
    }
    if documents {
        let _ = writeln!(
            text,
            "\n{:>12} {:>10}  bits per byte  word perplexity  document",
            "bytes", "words"
        );
        for it in &report.documents {
            let _ = writeln!(
                text,
                "{:>12} {:>10}  {:>13.4}  {:>15.2}  {}",
                grouped(it.bytes),
                grouped(it.words),
                it.bits_per_byte,
                it.word_perplexity,
                visible(&it.name)
            );
        }
    }
    let _ = writeln!(
        text,
        "\n{:.1} s, {:.1} kB/s",
        output.seconds,
        output.bytes_per_second / 1e3
    );
    text
}

/// Arrays with one number a byte, in stream order.
struct Saved {
    folder: PathBuf,
    log_probs: Array,
    probs: Array,
    ranks: Array,
}

impl Saved {
    fn create(folder: &Path, corpus: &dyn Corpus, limit: Option<u64>) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let bytes: u64 = corpus.documents().iter().map(|it| it.bytes).sum();
        let bytes = bytes.min(limit.unwrap_or(u64::MAX));
        let array = |name: &str, number| Array::create(&folder.join(name), number, bytes);
        Ok(Self {
            folder: folder.to_owned(),
            log_probs: array("log_probs.npy", Number::F32)?,
            probs: array("probs.npy", Number::F32)?,
            ranks: array("ranks.npy", Number::I32)?,
        })
    }

    fn write(&mut self, at: u64, found: &[crate::eval::Prediction]) -> Result<()> {
        let log_probs: Vec<f32> = found.iter().map(|it| it.log_prob).collect();
        let probs: Vec<f32> = log_probs.iter().map(|it| it.exp()).collect();
        let ranks: Vec<i32> = found.iter().map(|it| it.rank as i32).collect();
        self.log_probs.write(at, &log_probs)?;
        self.probs.write(at, &probs)?;
        self.ranks.write(at, &ranks)
    }

    /// Also writes where each document lies in the arrays.
    fn finish(self, measurement: &Measurement) -> Result<()> {
        self.log_probs.finish()?;
        self.probs.finish()?;
        self.ranks.finish()?;
        let mut start = 0;
        let documents: Vec<_> = measurement
            .documents
            .iter()
            .map(|it| {
                let begin = start;
                start += it.score.bytes;
                serde_json::json!({ "name": it.name, "start": begin, "bytes": it.score.bytes })
            })
            .collect();
        NewFile::create(&self.folder.join("documents.json"))?
            .put(super::json_text(&documents)?.as_bytes())
    }
}
