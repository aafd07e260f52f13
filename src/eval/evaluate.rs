//! One measurement: every byte of a corpus scored once.

use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte_datasets::shards::WordCounter;
use mambabyte_datasets::{DocumentInfo, Progress};
use mambabyte_kernels::cross_entropy::cross_entropy;

use super::context::Context;
use super::corpus::Corpus;
use super::lanes::{self, Job, Lanes, Step};
use super::positions::Positions;
use super::score::Score;
use crate::error::{Error, Result};
use crate::model::MambaLm;

/// How to measure.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// What a byte is predicted from.
    pub context: Context,
    /// What is computed at once.
    pub lanes: Lanes,
    /// Measure so many bytes from the beginning; all without.
    pub max_bytes: Option<u64>,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurement {
    /// The documents' scores, in stream order; of the last one maybe only its beginning.
    pub documents: Vec<DocumentScore>,
    /// Scores by position in a document.
    pub positions: Positions,
}

/// The score of one document.
#[derive(Clone, Debug, PartialEq)]
pub struct DocumentScore {
    /// Its name.
    pub name: String,
    /// Its words, as far as it was measured.
    pub words: u64,
    /// What its bytes cost.
    pub score: Score,
}

impl Measurement {
    /// The measurement itself, where it is one. Training goes on without: it has weights to go back to.
    ///
    /// # Errors
    ///
    /// Where the scores of a document are no numbers.
    pub fn checked(self) -> Result<Self> {
        let bad = self.documents.iter().find(|it| !it.score.nats.is_finite());
        match bad {
            Some(document) => Err(Error::NotNumbers {
                text: format!("`{}`", document.name),
            }),
            None => Ok(self),
        }
    }

    /// All documents together.
    pub fn total(&self) -> Score {
        self.documents.iter().map(|it| it.score).sum()
    }

    /// Words of all documents.
    pub fn words(&self) -> u64 {
        self.documents.iter().map(|it| it.words).sum()
    }
}

/// What a model says of one byte.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Natural logarithm of the byte's probability.
    pub log_prob: f32,
    /// How many bytes have a strictly higher probability: 0 is the likeliest.
    pub rank: u32,
}

/// Receives the prediction of every byte, by its position in the stream, in no certain order.
pub type PerByte<'a> = &'a mut dyn FnMut(u64, &[Prediction]) -> Result<()>;

/// Scores `corpus` with `model` (without gradients) on `device`.
///
/// A document's first byte has no context: it costs log 256 nats, as with a uniform guess.
pub fn evaluate(
    model: &MambaLm,
    device: &Device,
    corpus: &dyn Corpus,
    options: &EvalOptions,
    progress: &dyn Progress,
) -> Result<Measurement> {
    measure(model, device, corpus, options, progress, None)
}

/// [`evaluate`], with every byte's prediction given to `per_byte`.
pub fn evaluate_each(
    model: &MambaLm,
    device: &Device,
    corpus: &dyn Corpus,
    options: &EvalOptions,
    progress: &dyn Progress,
    per_byte: PerByte<'_>,
) -> Result<Measurement> {
    measure(model, device, corpus, options, progress, Some(per_byte))
}

fn measure(
    model: &MambaLm,
    device: &Device,
    corpus: &dyn Corpus,
    options: &EvalOptions,
    progress: &dyn Progress,
    mut per_byte: Option<PerByte<'_>>,
) -> Result<Measurement> {
    let documents = beginning(corpus, options.max_bytes)?;
    progress.start("evaluate", documents.iter().map(|it| it.bytes).sum());
    let mut sheet = Sheet::new(&documents);
    for document in documents.iter().filter(|it| it.bytes > 0) {
        if let Some(per_byte) = &mut per_byte {
            per_byte(document.start, &[UNIFORM])?;
        }
        progress.advance(1);
    }
    lanes::run(
        model,
        device,
        options.lanes,
        jobs(&documents, options.context),
        |owner, at, out| corpus.read(documents[owner].start + at, out),
        |step, logits| {
            let predictions = Predictions::new(step, logits, device, per_byte.is_some());
            for span in &step.spans {
                let mut found = Vec::new();
                let mut scored = 0;
                for (position, index) in span.predictions() {
                    let nats = predictions.losses[index];
                    sheet.add(span.owner, position, nats.into());
                    scored += 1;
                    if per_byte.is_some() {
                        found.push(Prediction {
                            log_prob: -nats,
                            rank: predictions.ranks[index] as u32,
                        });
                    }
                }
                if let (Some(per_byte), Some((first, _))) =
                    (&mut per_byte, span.predictions().next())
                {
                    per_byte(documents[span.owner].start + first, &found)?;
                }
                progress.advance(scored);
            }
            Ok(())
        },
    )?;
    progress.finish();
    sheet.finish(documents)
}

/// The prediction of a byte without context.
const UNIFORM: Prediction = Prediction {
    // -ln 256.
    log_prob: -8.0 * std::f32::consts::LN_2,
    rank: 0,
};

/// The documents in the first `limit` bytes, the last one cut off there.
pub(super) fn beginning(corpus: &dyn Corpus, limit: Option<u64>) -> Result<Vec<DocumentInfo>> {
    let mut documents = corpus.documents();
    let mut left = limit.unwrap_or(u64::MAX);
    let mut kept = 0;
    for document in &mut documents {
        if left == 0 {
            break;
        }
        cut(corpus, document, left)?;
        left -= document.bytes;
        kept += 1;
    }
    documents.truncate(kept);
    Ok(documents)
}

/// Bytes that are read at once to count words.
const BLOCK: u64 = 1 << 20;

/// Leaves at most `bytes` bytes of a document, with the words in them.
pub(super) fn cut(corpus: &dyn Corpus, document: &mut DocumentInfo, bytes: u64) -> Result<()> {
    if document.bytes > bytes {
        let mut words = WordCounter::default();
        let mut block = vec![0; bytes.min(BLOCK) as usize];
        for first in (0..bytes).step_by(BLOCK as usize) {
            let block = &mut block[..(bytes - first).min(BLOCK) as usize];
            corpus.read(document.start + first, block)?;
            words.push(block);
        }
        document.bytes = bytes;
        document.words = words.words();
    }
    Ok(())
}

/// The segments of all documents. Where each is a whole document the longest come first, so that
/// the lanes end together.
fn jobs(documents: &[DocumentInfo], context: Context) -> impl Iterator<Item = Job> + '_ {
    let mut order: Vec<usize> = (0..documents.len()).collect();
    if context == Context::Carried {
        order.sort_by_key(|index| std::cmp::Reverse(documents[*index].bytes));
    }
    order.into_iter().flat_map(move |owner| {
        let segments = context.segments(documents[owner].bytes);
        segments.map(move |segment| Job { owner, segment })
    })
}

/// What a step's positions say of the byte after each.
struct Predictions {
    /// Nats, `[B · L]`.
    losses: Vec<f32>,
    /// `[B · L]`; empty where nobody asks for them.
    ranks: Vec<i32>,
}

impl Predictions {
    fn new(step: &Step, logits: Tensor<3>, device: &Device, with_ranks: bool) -> Self {
        let [batch, length, vocabulary] = logits.dims();
        let rows = batch * length;
        let logits = logits.reshape([rows, vocabulary]);
        let targets = TensorData::new(step.targets.clone(), [rows]);
        let targets = Tensor::<1, Int>::from_data(targets, device);
        let ranks = match with_ranks {
            true => {
                let own = logits.clone().gather(1, targets.clone().unsqueeze_dim(1));
                let higher = logits.clone().greater(own).int().sum_dim(1);
                higher.into_data().iter::<i32>().collect()
            }
            false => Vec::new(),
        };
        let losses = cross_entropy(logits, targets).into_data();
        Self {
            losses: losses.iter::<f32>().collect(),
            ranks,
        }
    }
}

/// The sums of a measurement on their way.
struct Sheet {
    scores: Vec<Score>,
    positions: Positions,
}

impl Sheet {
    /// With the first bytes of all documents, which nothing predicts.
    fn new(documents: &[DocumentInfo]) -> Self {
        let mut sheet = Self {
            scores: vec![Score::default(); documents.len()],
            positions: Positions::default(),
        };
        for (owner, document) in documents.iter().enumerate() {
            if document.bytes > 0 {
                sheet.add(owner, 0, 256f64.ln());
            }
        }
        sheet
    }

    /// In f64: a million f32 terms would lose digits.
    fn add(&mut self, owner: usize, position: u64, nats: f64) {
        self.scores[owner].add(nats);
        self.positions.add(position, nats);
    }

    /// The measurement, after a count: every byte of every document, once.
    fn finish(self, documents: Vec<DocumentInfo>) -> Result<Measurement> {
        let mut scores = Vec::with_capacity(documents.len());
        for (document, score) in documents.into_iter().zip(self.scores) {
            if score.bytes != document.bytes {
                return Err(anyhow::anyhow!(
                    "{} bytes of `{}` were scored, and it has {}",
                    score.bytes,
                    document.name,
                    document.bytes
                )
                .into());
            }
            scores.push(DocumentScore {
                name: document.name,
                words: document.words,
                score,
            });
        }
        Ok(Measurement {
            documents: scores,
            positions: self.positions,
        })
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use mambabyte_datasets::Document;
    use mambabyte_datasets::progress::Silent;

    use super::*;
    use crate::config::MambaConfig;
    use crate::eval::Texts;

    /// A model whose predictions depend on all it has read.
    fn model(device: &Device) -> MambaLm {
        let mut config = MambaConfig::new(16, 2);
        config.initializer_range = 1.0;
        config.init_lm(7, device)
    }

    fn corpus(lengths: &[usize]) -> Texts {
        let mut state = 1u32;
        let documents = lengths.iter().enumerate().map(|(i, length)| Document {
            name: format!("document {i}"),
            bytes: (0..*length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"abcdefgh the"[(state >> 24) as usize % 12]
                })
                .collect(),
        });
        Texts::new(documents)
    }

    /// Loss of the byte after `context`, computed with nothing but the model's plain forward pass.
    fn plain(model: &MambaLm, device: &Device, context: &[u8], next: u8) -> f64 {
        let values: Vec<i32> = context.iter().map(|b| i32::from(*b)).collect();
        let input = TensorData::new(values, [1, context.len()]);
        let (logits, _) = model.forward_last(Tensor::from_data(input, device), None, 1);
        let logits: Vec<f64> = logits.into_data().iter::<f32>().map(f64::from).collect();
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        max + sum.ln() - logits[next as usize]
    }

    #[test]
    fn losses_that_are_no_numbers_are_an_error() {
        let device = Device::flex();
        let mut config = MambaConfig::new(16, 2);
        config.initializer_range = f64::NAN;
        let model = config.init_lm(7, &device);
        let error = evaluate(
            &model,
            &device,
            &corpus(&[0, 20]),
            &EvalOptions {
                context: Context::Carried,
                lanes: Lanes {
                    count: 2,
                    positions: 8,
                },
                max_bytes: None,
            },
            &Silent,
        );
        let error = error.and_then(Measurement::checked);
        let error = error.expect_err("no numbers").to_string();
        assert!(error.contains("`document 1` are not numbers"), "{error}");
    }

    #[test]
    fn every_context_scores_each_byte_as_the_plain_model_does() {
        let device = Device::flex();
        let model = model(&device);
        let lengths = [23, 0, 1, 40, 2];
        let corpus = corpus(&lengths);
        for (context, lanes) in [
            (Context::Windows { length: 8 }, (3, 20)),
            (Context::Windows { length: 1 }, (2, 7)),
            (
                Context::Sliding {
                    length: 9,
                    stride: 4,
                },
                (2, 16),
            ),
            (Context::Carried, (2, 10)),
            (Context::Carried, (7, 1000)),
        ] {
            let options = EvalOptions {
                context,
                lanes: Lanes {
                    count: lanes.0,
                    positions: lanes.1,
                },
                max_bytes: None,
            };
            let mut seen = vec![None; lengths.iter().sum()];
            let measurement = evaluate_each(
                &model,
                &device,
                &corpus,
                &options,
                &Silent,
                &mut |at, found| {
                    for (i, prediction) in found.iter().enumerate() {
                        let slot = &mut seen[at as usize + i];
                        assert!(slot.is_none(), "a byte is scored twice");
                        *slot = Some(*prediction);
                    }
                    Ok(())
                },
            )
            .expect("a measurement");
            let (mut total, mut start) = (0.0, 0);
            for (length, document) in lengths.iter().zip(&measurement.documents) {
                let mut bytes = vec![0; *length];
                corpus.read(start as u64, &mut bytes).expect("there");
                let mut nats = if bytes.is_empty() { 0.0 } else { 256f64.ln() };
                for segment in context.segments(*length as u64) {
                    for target in segment.scored {
                        let from = segment.inputs.start as usize;
                        let target = target as usize;
                        let own = plain(&model, &device, &bytes[from..target], bytes[target]);
                        let given = seen[start + target].expect("scored").log_prob;
                        assert!(
                            (f64::from(-given) - own).abs() < 1e-4,
                            "{context:?}, byte {target}: {given} and {own}"
                        );
                        nats += own;
                    }
                }
                assert_eq!(document.score.bytes, *length as u64);
                assert!((document.score.nats - nats).abs() < 1e-3, "{context:?}");
                total += nats;
                start += length;
            }
            assert!(seen.iter().all(Option::is_some));
            assert!((measurement.total().nats - total).abs() < 1e-3);
            let binned: u64 = measurement
                .positions
                .curve()
                .iter()
                .map(|it| it.bytes)
                .sum();
            assert_eq!(binned, measurement.total().bytes);
        }
    }

    #[test]
    fn ranks_count_the_likelier_bytes() {
        let device = Device::flex();
        let model = model(&device);
        let corpus = corpus(&[12]);
        let options = EvalOptions {
            context: Context::Carried,
            lanes: Lanes {
                count: 1,
                positions: 5,
            },
            max_bytes: None,
        };
        let mut bytes = vec![0; 12];
        corpus.read(0, &mut bytes).expect("there");
        let mut ranks = [u32::MAX; 12];
        let mut take = |at: u64, found: &[Prediction]| {
            for (i, prediction) in found.iter().enumerate() {
                ranks[at as usize + i] = prediction.rank;
            }
            Ok(())
        };
        evaluate_each(&model, &device, &corpus, &options, &Silent, &mut take).expect("measured");
        assert_eq!(ranks[0], 0);
        for target in 1..12 {
            let own = plain(&model, &device, &bytes[..target], bytes[target]);
            let likelier = (0..=u8::MAX)
                .filter(|other| plain(&model, &device, &bytes[..target], *other) < own)
                .count();
            assert_eq!(ranks[target] as usize, likelier, "byte {target}");
        }
    }

    #[test]
    fn a_limit_cuts_the_stream_off() {
        let device = Device::flex();
        let model = model(&device);
        let corpus = corpus(&[10, 10, 10]);
        let measure = |max_bytes| {
            let options = EvalOptions {
                context: Context::Carried,
                lanes: Lanes {
                    count: 2,
                    positions: 16,
                },
                max_bytes,
            };
            evaluate(&model, &device, &corpus, &options, &Silent).expect("measured")
        };
        assert_eq!(measure(Some(13)).total().bytes, 13);
        assert_eq!(measure(Some(13)).documents.len(), 2);
        assert_eq!(measure(Some(1000)), measure(None));
        assert_eq!(measure(None), measure(None));
    }
}
