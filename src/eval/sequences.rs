//! Log-probabilities of every byte of some sequences: what tasks are scored by, and what the server
//! answers.

use burn::tensor::Device;
use rayon::prelude::*;

use super::context::Segment;
use super::lanes::{self, Job, Lanes};
use crate::error::Result;
use crate::model::MambaLm;

/// Byte values.
const BYTES: usize = 256;

/// A byte and the natural logarithm of its probability.
pub type ByteLogProb = (u8, f32);

/// What a model says of one byte of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ByteScore {
    /// Natural logarithm of its probability. Where it is the likeliest byte, the same number as the
    /// first of `top`.
    pub log_prob: f32,
    /// The likeliest bytes, from the likeliest down.
    pub top: Vec<ByteLogProb>,
}

/// What a model says of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceScore {
    /// Scores of all bytes but the first, which nothing predicts.
    pub bytes: Vec<ByteScore>,
    /// The likeliest bytes to come after the last one.
    pub next: Vec<ByteLogProb>,
}

/// Scores sequences together, each from zero memory, with the `top` likeliest bytes at every place.
/// A score does not depend on the other sequences but for the order of sums, that is in the last of
/// its digits. An empty sequence has no scores.
pub fn score_sequences(
    model: &MambaLm,
    device: &Device,
    lanes: Lanes,
    sequences: &[&[u8]],
    top: usize,
) -> Result<Vec<SequenceScore>> {
    score_sequences_while(model, device, lanes, sequences, top, || Ok(()))
}

/// As [`score_sequences`], and asks after every step whether to go on: an error of `go_on` ends it.
pub(crate) fn score_sequences_while(
    model: &MambaLm,
    device: &Device,
    lanes: Lanes,
    sequences: &[&[u8]],
    top: usize,
    mut go_on: impl FnMut() -> Result<()>,
) -> Result<Vec<SequenceScore>> {
    let mut scores: Vec<SequenceScore> = sequences
        .iter()
        .map(|sequence| SequenceScore {
            bytes: vec![ByteScore::default(); sequence.len().saturating_sub(1)],
            next: Vec::new(),
        })
        .collect();
    let jobs = sequences
        .iter()
        .enumerate()
        .filter_map(|(owner, sequence)| {
            let length = sequence.len() as u64;
            // The prediction behind the last byte is wanted as well.
            let segment = Segment {
                inputs: 0..length,
                scored: 1..length + 1,
            };
            (length > 0).then_some(Job { owner, segment })
        });
    let read = |owner: usize, at: u64, out: &mut [u8]| {
        let rest = &sequences[owner][at as usize..];
        let there = rest.len().min(out.len());
        out[..there].copy_from_slice(&rest[..there]);
        // Behind the end there is no byte to predict.
        out[there..].fill(0);
        Ok(())
    };
    lanes::run(model, device, lanes, jobs, read, |step, logits| {
        let [_, _, vocabulary] = logits.dims();
        let logits: Vec<f32> = logits.into_data().iter().collect();
        let wanted: Vec<(usize, u64, usize)> = step
            .spans
            .iter()
            .flat_map(|span| {
                let owner = span.owner;
                span.predictions()
                    .map(move |(at, index)| (owner, at, index))
            })
            .collect();
        let found: Vec<ByteScore> = wanted
            .par_iter()
            .map(|(_, _, index)| {
                let row = &logits[index * vocabulary..][..vocabulary.min(BYTES)];
                score(row, step.targets[*index] as usize, top)
            })
            .collect();
        for ((owner, at, _), score) in wanted.into_iter().zip(found) {
            let sequence = &mut scores[owner];
            match sequence.bytes.get_mut(at as usize - 1) {
                Some(slot) => *slot = score,
                None => sequence.next = score.top,
            }
        }
        go_on()
    })?;
    Ok(scores)
}

/// The score of byte `target` under the logits of all bytes.
fn score(logits: &[f32], target: usize, top: usize) -> ByteScore {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let log_prob = |byte: usize| (f64::from(logits[byte]) - log_sum) as f32;
    ByteScore {
        log_prob: log_prob(target),
        top: likeliest(logits, top)
            .into_iter()
            .map(|byte| (byte as u8, log_prob(byte)))
            .collect(),
    }
}

/// The indices of the `count` largest logits, from the largest down; of equal ones the first.
fn likeliest(logits: &[f32], count: usize) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(count + 1);
    for (index, logit) in logits.iter().enumerate() {
        if best.len() == count && best.last().is_none_or(|last| logits[*last] >= *logit) {
            continue;
        }
        let place = best.partition_point(|it| logits[*it] >= *logit);
        best.insert(place, index);
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_ties_keep_the_order() {
        let logits = [0.5, 2.0, -1.0, 2.0, 1.0];
        assert_eq!(likeliest(&logits, 3), [1, 3, 4]);
        assert_eq!(likeliest(&logits, 0), [0usize; 0]);
        assert_eq!(likeliest(&logits, 9), [1, 3, 4, 0, 2]);
    }

    #[test]
    fn probabilities_add_up_and_the_best_is_its_own_top() {
        let logits: Vec<f32> = (0..256).map(|i| (i % 17) as f32 / 3.0).collect();
        let total: f64 = (0..256)
            .map(|byte| f64::from(score(&logits, byte, 1).log_prob).exp())
            .sum();
        assert!((total - 1.0).abs() < 1e-6, "{total}");
        let best = score(&logits, 16, 2);
        assert_eq!(best.top[0], (16, best.log_prob));
        assert_eq!(best.top[1], (33, best.log_prob));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn company_changes_nothing() {
        use crate::config::MambaConfig;

        let device = Device::flex();
        let mut config = MambaConfig::new(16, 2);
        config.initializer_range = 1.0;
        let model = config.init_lm(3, &device);
        let sequences: [&[u8]; 5] = [b"a", b"", b"a longer one than the others", b"two", b"four."];
        let lanes = |count, positions| Lanes { count, positions };
        let together =
            score_sequences(&model, &device, lanes(2, 24), &sequences, 2).expect("scored");
        for (sequence, scored) in sequences.iter().zip(&together) {
            let alone =
                score_sequences(&model, &device, lanes(1, 1000), &[sequence], 2).expect("scored");
            assert_eq!(scored.bytes.len(), sequence.len().saturating_sub(1));
            assert_eq!(scored.next.len(), if sequence.is_empty() { 0 } else { 2 });
            for (a, b) in scored.bytes.iter().zip(&alone[0].bytes) {
                assert!((a.log_prob - b.log_prob).abs() < 1e-5);
                assert_eq!(a.top[0].0, b.top[0].0);
            }
            let next = |it: &SequenceScore| it.next.first().map(|it| it.0);
            assert_eq!(next(scored), next(&alone[0]));
        }
    }
}
