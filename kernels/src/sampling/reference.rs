//! The choice in plain Rust, in f64 where sums are taken: the oracle of the GPU form, and what runs
//! where logits are on the host.

use super::{BYTES, Choice, Sampling};

/// Chooses one byte and marks it as seen.
///
/// - logits: the first 256 are those of the byte values; a shorter vocabulary has fewer
/// - seen: for each byte whether the sequence has it
/// - draw: a number in [0, 1), equally likely anywhere there
/// - forced: the byte to take whatever its logit
///
/// # Panics
///
/// If there are no logits.
pub fn choose(
    logits: &[f32],
    seen: &mut [bool; BYTES],
    sampling: &Sampling,
    draw: f32,
    forced: Option<u8>,
) -> Choice {
    let logits = &logits[..logits.len().min(BYTES)];
    assert!(!logits.is_empty(), "choose: no logits");
    let ranked = ranked(logits.iter().copied().enumerate());
    let (top, highest) = ranked[0];
    let sum: f64 = logits.iter().map(|l| f64::from(l - highest).exp()).sum();
    let logprob = |byte: u8| match logits.get(usize::from(byte)) {
        Some(logit) => (f64::from(logit - highest) - sum.ln()) as f32,
        None => f32::NEG_INFINITY,
    };
    let byte = forced.unwrap_or_else(|| pick(logits, seen, sampling, draw));
    seen[usize::from(byte)] = true;
    Choice {
        byte,
        logprob: logprob(byte),
        top,
        top_logprob: logprob(top),
    }
}

/// Bytes with their values, largest first; equal ones in the order of the bytes.
fn ranked(values: impl Iterator<Item = (usize, f32)>) -> Vec<(u8, f32)> {
    let mut ranked: Vec<(u8, f32)> = values.map(|(byte, value)| (byte as u8, value)).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked
}

fn pick(logits: &[f32], seen: &[bool; BYTES], sampling: &Sampling, draw: f32) -> u8 {
    let penalty = sampling.repetition_penalty;
    let penalised = logits.iter().enumerate().map(|(byte, logit)| {
        let logit = match (seen[byte], *logit > 0.0) {
            (false, _) => *logit,
            (true, true) => logit / penalty,
            (true, false) => logit * penalty,
        };
        (byte, logit)
    });
    let mut ranked = ranked(penalised);
    if sampling.top_k == 1 || sampling.temperature == 0.0 {
        return ranked[0].0;
    }
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k as usize);
    }
    let highest = ranked[0].1;
    let weights: Vec<f64> = ranked
        .iter()
        .map(|(_, logit)| (f64::from(logit - highest) / f64::from(sampling.temperature)).exp())
        .collect();
    let kept = kept(&weights, sampling);
    let total: f64 = weights[..kept].iter().sum();
    let mut left = f64::from(draw) * total;
    for ((byte, _), weight) in ranked[..kept].iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *byte;
        }
    }
    // Rounding may leave a little: the last byte takes it.
    ranked[kept - 1].0
}

/// How many of the weights, largest first and the first of them 1, top-p and min-p leave.
fn kept(weights: &[f64], sampling: &Sampling) -> usize {
    let total: f64 = weights.iter().sum();
    let limit = match sampling.top_p {
        p if p > 0.0 && p < 1.0 => f64::from(p) * total,
        _ => f64::INFINITY,
    };
    let mut before = 0.0;
    let mut kept = 0;
    for weight in weights {
        // The first one stays whatever the limits.
        if kept > 0 && (before >= limit || *weight < f64::from(sampling.min_p)) {
            break;
        }
        before += weight;
        kept += 1;
    }
    kept
}
