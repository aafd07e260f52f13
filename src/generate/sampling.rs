//! Choosing a byte from logits: top-k, then temperature, then top-p, then a draw.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// How bytes are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// Divides the logits; 0 takes the likeliest byte.
    pub temperature: f64,
    /// Choose among so many likeliest bytes: 0 is no limit, 1 takes the likeliest.
    pub top_k: usize,
    /// Choose among the likeliest bytes that have this probability together.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 256,
            top_p: 0.98,
            seed: 4740,
        }
    }
}

/// Chooses bytes by [`SampleOptions`], reproducibly.
pub struct Sampler {
    options: SampleOptions,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    pub fn new(options: SampleOptions) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            options,
        }
    }

    /// The next byte, given the logits of the 256 byte values (a longer vocabulary's rest is not
    /// looked at).
    pub fn choose(&mut self, logits: &[f32]) -> u8 {
        let mut ranked: Vec<(u8, f64)> = (0..=u8::MAX)
            .zip(logits)
            .map(|(byte, logit)| (byte, f64::from(*logit)))
            .collect();
        // Equal logits keep the order of the bytes, so that a choice never depends on the sort.
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        let SampleOptions {
            temperature,
            top_k,
            top_p,
            ..
        } = self.options;
        if top_k == 1 || temperature == 0.0 {
            return ranked[0].0;
        }
        if top_k > 0 {
            ranked.truncate(top_k);
        }
        let highest = ranked[0].1;
        for (_, weight) in &mut ranked {
            *weight = ((*weight - highest) / temperature).exp();
        }
        keep_likeliest(&mut ranked, top_p);
        self.draw(&ranked)
    }

    fn draw(&mut self, weights: &[(u8, f64)]) -> u8 {
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        for (byte, weight) in weights {
            left -= weight;
            if left < 0.0 {
                return *byte;
            }
        }
        // Rounding may leave a little: the last byte takes it.
        weights[weights.len() - 1].0
    }
}

/// Cuts the sorted list where the probabilities so far first reach `top_p`; one byte always stays.
fn keep_likeliest(weights: &mut Vec<(u8, f64)>, top_p: f64) {
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0.0;
    let mut keep = 0;
    for (_, weight) in weights.iter() {
        keep += 1;
        sum += weight;
        if sum >= top_p * total {
            break;
        }
    }
    weights.truncate(keep);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(set: &[(u8, f32)]) -> Vec<f32> {
        let mut logits = vec![-1e9; 256];
        for (byte, logit) in set {
            logits[*byte as usize] = *logit;
        }
        logits
    }

    fn shares(options: SampleOptions, logits: &[f32]) -> [f64; 256] {
        let mut sampler = Sampler::new(options);
        let mut counts = [0.0; 256];
        for _ in 0..20_000 {
            counts[sampler.choose(logits) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn plain() -> SampleOptions {
        SampleOptions {
            top_k: 0,
            top_p: 1.0,
            ..SampleOptions::default()
        }
    }

    #[test]
    fn draws_have_the_softmax_distribution() {
        let shares = shares(plain(), &logits(&[(7, 0.0), (200, 3f32.ln())]));
        assert!((shares[7] - 0.25).abs() < 0.02 && (shares[200] - 0.75).abs() < 0.02);
    }

    #[test]
    fn temperature_sharpens_and_zero_is_greedy() {
        let set = logits(&[(1, 0.0), (2, 3f32.ln())]);
        let half = SampleOptions {
            temperature: 0.5,
            ..plain()
        };
        assert!((shares(half, &set)[2] - 0.9).abs() < 0.02);
        let zero = SampleOptions {
            temperature: 0.0,
            ..plain()
        };
        assert_eq!(shares(zero, &set)[2].round(), 1.0);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let set = logits(&[(1, 0.5f32.ln()), (2, 0.3f32.ln()), (3, 0.2f32.ln())]);
        let top_k = shares(
            SampleOptions {
                top_k: 2,
                ..plain()
            },
            &set,
        );
        assert!(top_k[3] == 0.0 && (top_k[1] - 0.625).abs() < 0.02);
        let top_p = shares(
            SampleOptions {
                top_p: 0.7,
                ..plain()
            },
            &set,
        );
        assert!(top_p[3] == 0.0 && top_p[2] > 0.3);
        let tiny = shares(
            SampleOptions {
                top_p: 1e-9,
                ..plain()
            },
            &set,
        );
        assert_eq!(tiny[1].round(), 1.0);
    }

    #[test]
    fn a_seed_gives_the_same_bytes() {
        let set: Vec<f32> = (0..256).map(|i| (i % 7) as f32).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(SampleOptions { seed, ..plain() });
            (0..50).map(|_| sampler.choose(&set)).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
