//! The command `eval-lengths`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::eval::{About, CheckpointArgs, POSITIONS, TextArgs, bar, lanes, plot_file, put_plot};
use super::{grouped, print, print_json};
use crate::error::Result;
use crate::eval::lengths::{LongDocuments, doubling};
use crate::eval::plot::Series;
use crate::eval::{Context, Corpus as _, EvalOptions, evaluate};

/// Arguments of `eval-lengths`.
#[derive(Clone, Debug, Args)]
pub struct EvalLengthsArgs {
    #[command(flatten)]
    model: CheckpointArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Shortest context in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 8192, value_parser = super::positive)]
    pub from: usize,
    /// Longest context in bytes, --from times a power of two
    #[arg(long, value_name = "BYTES", default_value_t = 524_288, value_parser = super::positive)]
    pub to: usize,
    /// Windows that overlap by half: every byte but those of a document's first half-window then has
    /// at least half the context
    #[arg(long)]
    pub sliding: bool,
    /// Measure so many bytes at most; all documents that are long enough if left out
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: Option<u64>,
    /// Bytes computed at once; memory grows with it
    #[arg(long, value_name = "N", default_value_t = POSITIONS, value_parser = super::positive)]
    pub piece: usize,
    /// Draw bits per byte against the length of the context
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    about: About,
    /// Bytes of a sequence in training.
    trained: usize,
    /// Documents measured.
    documents: usize,
    /// Bytes measured, the same at every length.
    bytes: u64,
    sliding: bool,
    lengths: Vec<Row>,
    /// One state carried through each document.
    carried: Row,
}

#[derive(Serialize)]
struct Row {
    /// Bytes of context; none where it is all of the document.
    length: Option<usize>,
    bits_per_byte: f64,
    word_perplexity: f64,
}

/// Runs the command.
pub fn run(args: &EvalLengthsArgs) -> Result<()> {
    let lengths = doubling(args.from, args.to)?;
    let found = args.model.find()?;
    let corpus = args.text.open()?;
    let long = LongDocuments::new(corpus.as_ref(), args.to as u64, args.max_bytes)?;
    let plot = args.plot.as_deref().map(plot_file).transpose()?;
    let (model, device, precision) = found.load()?;
    let progress = bar();
    let measure = |context: Context, length| {
        let options = EvalOptions {
            context,
            lanes: lanes(context, args.piece),
            max_bytes: None,
        };
        let measurement =
            evaluate(&model, &device, &long, &options, progress.as_ref())?.checked()?;
        let score = measurement.total();
        Ok(Row {
            length,
            bits_per_byte: score.bits_per_byte(),
            word_perplexity: score.word_perplexity(measurement.words()),
        })
    };
    let rows = lengths.iter().map(|length| {
        let length = *length;
        let stride = length.div_ceil(2);
        let context = match args.sliding {
            true => Context::Sliding { length, stride },
            false => Context::Windows { length },
        };
        measure(context, Some(length))
    });
    let output = Output {
        about: About::new(&found, &args.text, precision),
        trained: found.trained_length(),
        documents: long.documents().len(),
        bytes: long.documents().iter().map(|it| it.bytes).sum(),
        sliding: args.sliding,
        lengths: rows.collect::<Result<_>>()?,
        carried: measure(Context::Carried, None)?,
    };
    if let Some(file) = plot {
        let point = |row: &Row| Some((row.length? as f64, row.bits_per_byte));
        let series = [Series {
            name: "model".to_owned(),
            points: output.lengths.iter().filter_map(point).collect(),
        }];
        let title = format!("trained with {} bytes", grouped(output.trained as u64));
        put_plot(file, &title, "length of the context", &series)?;
    }
    match args.json {
        true => print_json(&output),
        false => print(&table(&output)),
    }
}

fn table(output: &Output) -> String {
    let mut text = format!(
        "{} bytes of {} documents, trained with {} bytes\n\n{:>12}  bits per byte  word perplexity\n",
        grouped(output.bytes),
        output.documents,
        grouped(output.trained as u64),
        "context"
    );
    for row in output.lengths.iter().chain([&output.carried]) {
        let length = row
            .length
            .map_or("carried".to_owned(), |it| grouped(it as u64));
        let _ = writeln!(
            text,
            "{length:>12}  {:>13.4}  {:>15.2}",
            row.bits_per_byte, row.word_perplexity
        );
    }
    text
}
