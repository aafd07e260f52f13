//! What `eval` reports.

use serde::Serialize;

use super::context::Context;
use super::evaluate::Measurement;
use super::perplexity::{Counts, ppl_from_byte_ce};
use super::positions::PositionScore;

/// A measurement in numbers: what `eval --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Mean loss in bits.
    pub bits_per_byte: f64,
    /// Mean loss in nats.
    pub nats_per_byte: f64,
    /// Bytes scored: all there are, each once.
    pub bytes: u64,
    /// Words in them (runs of bytes between white space).
    pub words: u64,
    /// `exp(nats per byte · bytes / words)`.
    pub word_perplexity: f64,
    /// Words a byte that the perplexity is computed with.
    pub words_per_byte: f64,
    /// What a byte was predicted from.
    pub context: Context,
    /// Scores by position in a document, in five steps.
    pub buckets: Vec<PositionScore>,
    /// The same in steps that double.
    pub curve: Vec<PositionScore>,
    /// Every document.
    pub documents: Vec<DocumentReport>,
}

/// One document in a [`Report`].
#[derive(Clone, Debug, Serialize)]
pub struct DocumentReport {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// Its words.
    pub words: u64,
    /// Mean loss in bits.
    pub bits_per_byte: f64,
    /// `exp(nats / words)`, with its own words.
    pub word_perplexity: f64,
}

impl Report {
    /// The report of a measurement. `counts` stands in for the words counted in the data.
    pub fn new(measurement: &Measurement, context: Context, counts: Option<Counts>) -> Self {
        let total = measurement.total();
        let words = measurement.words();
        let counts = counts.unwrap_or(Counts {
            bytes: total.bytes.max(1),
            words: words.max(1),
            subwords: None,
        });
        let documents = measurement.documents.iter().map(|it| DocumentReport {
            name: it.name.clone(),
            bytes: it.score.bytes,
            words: it.words,
            bits_per_byte: it.score.bits_per_byte(),
            word_perplexity: it.score.word_perplexity(it.words),
        });
        let words_per_byte = counts.words_per_byte();
        Self {
            bits_per_byte: total.bits_per_byte(),
            nats_per_byte: total.nats_per_byte(),
            bytes: total.bytes,
            words,
            word_perplexity: ppl_from_byte_ce(total.nats_per_byte(), words_per_byte),
            words_per_byte,
            context,
            buckets: measurement.positions.buckets(),
            curve: measurement.positions.curve(),
            documents: documents.collect(),
        }
    }
}
