//! The command `perplexity`: one loss in all units.

use clap::{Args, ValueEnum};
use mambabyte_datasets::{Shards, Split};

use super::{print, print_json};
use crate::error::{Error, Result};
use crate::eval::perplexity::{Counts, Loss};

/// Arguments of `perplexity`.
#[derive(Clone, Debug, Args)]
pub struct PerplexityArgs {
    /// The loss that is known
    #[command(flatten)]
    loss: LossArgs,
    /// The text it is of: a split of PG-19 as MambaByte's authors count it
    #[arg(long, value_enum, default_value = "pg19-test", conflicts_with = "data")]
    pub corpus: CorpusName,
    /// Or a split in a folder written by `data prepare`, such as data/pg19/test
    #[arg(long, value_name = "DIR")]
    pub data: Option<std::path::PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The loss, in one of its units.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct LossArgs {
    /// Bits per byte
    #[arg(long, value_name = "BITS", value_parser = number)]
    pub bpb: Option<f64>,
    /// Cross-entropy of a byte, in nats
    #[arg(long, value_name = "NATS", value_parser = number)]
    pub byte_ce: Option<f64>,
    /// Perplexity of a word
    #[arg(long, value_name = "PPL", value_parser = perplexity)]
    pub word_ppl: Option<f64>,
    /// Cross-entropy of a subword token, in nats
    #[arg(long, value_name = "NATS", value_parser = number)]
    pub subword_ce: Option<f64>,
}

/// A corpus whose counts are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum CorpusName {
    /// 11,677,824,216 bytes, 1,973,048,393 words, 2,914,600,562 subwords
    #[value(name = "pg19-train")]
    Train,
    /// 17,733,002 bytes, 3,007,061 words, 4,357,506 subwords
    #[value(name = "pg19-validation")]
    Validation,
    /// 41,289,101 bytes, 6,965,511 words, 10,282,006 subwords
    #[value(name = "pg19-test")]
    Test,
}

/// Runs the command.
pub fn run(args: &PerplexityArgs) -> Result<()> {
    let counts = counts(args)?;
    let losses = loss(&args.loss).and_then(|loss| loss.on(&counts));
    let Some(losses) = losses else {
        return Err(Error::Usage {
            message: "--subword-ce needs a count of subwords, and prepared data has none"
                .to_owned(),
            hint: "leave --data out, and name one of PG-19's splits with --corpus".to_owned(),
        });
    };
    if args.json {
        return print_json(&losses);
    }
    let subword = losses.subword_cross_entropy;
    print(&format!(
        "bits per byte          {:.6}\nbyte cross-entropy     {:.6} nats\nword perplexity        \
         {:.4}\n{}",
        losses.bits_per_byte,
        losses.byte_cross_entropy,
        losses.word_perplexity,
        subword
            .map(|it| format!("subword cross-entropy  {it:.6} nats\n"))
            .unwrap_or_default()
    ))
}

fn loss(args: &LossArgs) -> Option<Loss> {
    args.bpb
        .map(Loss::BitsPerByte)
        .or(args.byte_ce.map(Loss::ByteCrossEntropy))
        .or(args.word_ppl.map(Loss::WordPerplexity))
        .or(args.subword_ce.map(Loss::SubwordCrossEntropy))
}

fn counts(args: &PerplexityArgs) -> Result<Counts> {
    let Some(data) = &args.data else {
        return Ok(Counts::pg19(match args.corpus {
            CorpusName::Train => Split::Train,
            CorpusName::Validation => Split::Validation,
            CorpusName::Test => Split::Test,
        }));
    };
    let shards = Shards::open(data)?;
    Ok(Counts {
        bytes: shards.byte_count().max(1),
        words: shards.word_count().max(1),
        subwords: None,
    })
}

fn number(text: &str) -> Result<f64, String> {
    super::number_where(
        text,
        |it| (0.0..1e6).contains(&it),
        "expected a number from 0",
    )
}

fn perplexity(text: &str) -> Result<f64, String> {
    super::number_where(
        text,
        |it| it >= 1.0 && it.is_finite(),
        "expected a number from 1",
    )
}
