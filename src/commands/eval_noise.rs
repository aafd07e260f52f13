//! The command `eval-noise`.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::eval::{About, CheckpointArgs, ContextArgs, TextArgs, bar, lanes};
use super::{print, print_json};
use crate::error::Result;
use crate::eval::noise::Noise;
use crate::eval::{Context, EvalOptions, Score, Texts, evaluate};

/// Arguments of `eval-noise`.
#[derive(Clone, Debug, Args)]
pub struct EvalNoiseArgs {
    #[command(flatten)]
    model: CheckpointArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// Measure so many bytes from the beginning, before noise; all if left out
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_bytes: Option<u64>,
    /// Seed of the noise
    #[arg(long, value_name = "SEED", default_value_t = 4740)]
    pub seed: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    about: About,
    context: Context,
    seed: u64,
    rows: Vec<Row>,
}

/// A line of the table.
#[derive(Serialize)]
struct Row {
    noise: &'static str,
    probability: Option<f64>,
    bytes: u64,
    bits_per_byte: f64,
    /// Of the words before noise.
    word_perplexity: f64,
    /// Above the perplexity of the clean text.
    rise: f64,
}

impl Row {
    fn new(noise: (&'static str, Option<f64>), score: Score, words: u64, clean: f64) -> Self {
        let word_perplexity = score.word_perplexity(words);
        Self {
            noise: noise.0,
            probability: noise.1,
            bytes: score.bytes,
            bits_per_byte: score.bits_per_byte(),
            word_perplexity,
            rise: word_perplexity - clean,
        }
    }
}

/// Runs the command.
pub fn run(args: &EvalNoiseArgs) -> Result<()> {
    let found = args.model.find()?;
    let context = args.context.context(found.trained_length())?;
    let texts = Texts::of(args.text.open()?.as_ref(), args.max_bytes)?;
    let (model, device, precision) = found.load()?;
    let options = EvalOptions {
        context,
        lanes: lanes(context, args.context.piece),
        max_bytes: None,
    };
    let progress = bar();
    let clean = evaluate(&model, &device, &texts, &options, progress.as_ref())?.checked()?;
    let words = clean.words();
    let perplexity = clean.total().word_perplexity(words);
    let mut rows = vec![Row::new(("none", None), clean.total(), words, perplexity)];
    for noise in Noise::TABLE {
        let noised = texts.map(|number, text| noise.apply(text, args.seed, number));
        let score = evaluate(&model, &device, &noised, &options, progress.as_ref())?;
        let score = score.checked()?.total();
        rows.push(Row::new(noise.describe(), score, words, perplexity));
    }
    match args.json {
        true => print_json(&Output {
            about: About::new(&found, &args.text, precision),
            context,
            seed: args.seed,
            rows,
        }),
        false => print(&table(&rows)),
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:>12} {:>5} {:>12}  bits per byte  {:>15}  {:>12}\n",
        "noise", "p", "bytes", "word perplexity", "rise"
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{:>12} {:>5} {:>12}  {:>13.4}  {:>15.2}  {:>+12.2}",
            row.noise,
            row.probability.map(|p| p.to_string()).unwrap_or_default(),
            row.bytes,
            row.bits_per_byte,
            row.word_perplexity,
            row.rise
        );
    }
    text
}
