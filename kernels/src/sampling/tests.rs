use super::*;
use crate::testing::Rng;

const PLAIN: Sampling = Sampling {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
};

fn logits(set: &[(u8, f32)]) -> Vec<f32> {
    let mut logits = vec![-1e9; BYTES];
    for (byte, logit) in set {
        logits[usize::from(*byte)] = *logit;
    }
    logits
}

/// How often each byte comes in draws spread evenly over [0, 1).
fn shares(sampling: &Sampling, logits: &[f32], seen: &[u8]) -> [f64; BYTES] {
    let mut counts = [0.0; BYTES];
    let draws = 4096;
    for i in 0..draws {
        let mut flags = [false; BYTES];
        seen.iter()
            .for_each(|byte| flags[usize::from(*byte)] = true);
        let draw = (i as f32 + 0.5) / draws as f32;
        let choice = choose(logits, &mut flags, sampling, draw, None);
        assert!(flags[usize::from(choice.byte)], "the byte counts as seen");
        counts[usize::from(choice.byte)] += 1.0 / f64::from(draws);
    }
    counts
}

#[track_caller]
fn assert_shares(sampling: Sampling, set: &[(u8, f32)], seen: &[u8], expected: &[(u8, f64)]) {
    let shares = shares(&sampling, &logits(set), seen);
    for (byte, share) in expected {
        let got = shares[usize::from(*byte)];
        assert!(
            (got - share).abs() < 1e-3,
            "{byte}: {got}, expected {share}"
        );
    }
    let named: f64 = expected
        .iter()
        .map(|(byte, _)| shares[usize::from(*byte)])
        .sum();
    assert!(
        (named - 1.0).abs() < 1e-3,
        "other bytes have {}",
        1.0 - named
    );
}

/// ln of each share.
fn log_shares<const N: usize>(set: [(u8, f32); N]) -> [(u8, f32); N] {
    set.map(|(byte, share)| (byte, share.ln()))
}

#[test]
fn draws_have_the_softmax_distribution() {
    let set = [(7, 0.0), (200, 3f32.ln())];
    assert_shares(PLAIN, &set, &[], &[(7, 0.25), (200, 0.75)]);
}

#[test]
fn temperature_sharpens_and_zero_is_greedy() {
    let set = [(1, 0.0), (2, 3f32.ln())];
    let at = |temperature| Sampling {
        temperature,
        ..PLAIN
    };
    assert_shares(at(0.5), &set, &[], &[(1, 0.1), (2, 0.9)]);
    assert_shares(at(0.0), &set, &[], &[(2, 1.0)]);
    assert_shares(at(1e4), &[(1, 0.0), (2, 3.0)], &[], &[(1, 0.5), (2, 0.5)]);
}

#[test]
fn limits_cut_the_tail() {
    let set = log_shares([(1, 0.5), (2, 0.3), (3, 0.2)]);
    let top_k = |top_k| Sampling { top_k, ..PLAIN };
    assert_shares(top_k(2), &set, &[], &[(1, 0.625), (2, 0.375)]);
    assert_shares(top_k(1), &set, &[], &[(1, 1.0)]);
    assert_shares(top_k(256), &set, &[], &[(1, 0.5), (2, 0.3), (3, 0.2)]);
    let top_p = |top_p| Sampling { top_p, ..PLAIN };
    assert_shares(top_p(0.7), &set, &[], &[(1, 0.625), (2, 0.375)]);
    assert_shares(top_p(0.81), &set, &[], &[(1, 0.5), (2, 0.3), (3, 0.2)]);
    assert_shares(top_p(1e-9), &set, &[], &[(1, 1.0)]);
    assert_shares(top_p(0.0), &set, &[], &[(1, 0.5), (2, 0.3), (3, 0.2)]);
    let min_p = |min_p| Sampling { min_p, ..PLAIN };
    assert_shares(min_p(0.5), &set, &[], &[(1, 0.625), (2, 0.375)]);
    assert_shares(min_p(1.0), &set, &[], &[(1, 1.0)]);
    assert_shares(min_p(0.39), &set, &[], &[(1, 0.5), (2, 0.3), (3, 0.2)]);
}

/// Top-k comes before top-p, whose share is that of what top-k left; temperature comes between.
#[test]
fn the_order_of_the_limits_is_the_contracts() {
    let set = log_shares([(1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1)]);
    // Of the two left the first has 4/7 = 0.571: enough for 0.55, not for 0.6.
    let both = |top_p| Sampling {
        top_k: 2,
        top_p,
        ..PLAIN
    };
    assert_shares(both(0.55), &set, &[], &[(1, 1.0)]);
    assert_shares(both(0.6), &set, &[], &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
    // At temperature 1/2 the shares are 16:9:4:1, and the first has 0.533.
    let sharp = Sampling {
        temperature: 0.5,
        top_p: 0.53,
        ..PLAIN
    };
    assert_shares(sharp, &set, &[], &[(1, 1.0)]);
    let flat = Sampling {
        temperature: 1.0,
        ..sharp
    };
    assert_shares(flat, &set, &[], &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
}

#[test]
fn the_penalty_acts_on_seen_bytes_before_everything() {
    let penalty = Sampling {
        repetition_penalty: 2.0,
        ..PLAIN
    };
    // Positive logits are divided, negative ones multiplied.
    let set = [(1, 2.0), (2, 1.0), (3, -0.5)];
    let share = |logits: [f64; 3]| {
        let sum: f64 = logits.iter().map(|it| it.exp()).sum();
        [1, 2, 3].map(|i: u8| (i, logits[usize::from(i) - 1].exp() / sum))
    };
    assert_shares(penalty, &set, &[1, 3], &share([1.0, 1.0, -1.0]));
    assert_shares(penalty, &set, &[], &share([2.0, 1.0, -0.5]));
    let greedy = Sampling {
        top_k: 1,
        repetition_penalty: 3.0,
        ..PLAIN
    };
    assert_shares(greedy, &set, &[1], &[(2, 1.0)]);
}

#[test]
fn of_equal_logits_the_smaller_byte_is_the_likelier() {
    let greedy = Sampling { top_k: 1, ..PLAIN };
    assert_shares(greedy, &[(9, 1.0), (4, 1.0), (200, 1.0)], &[], &[(4, 1.0)]);
    let two = Sampling { top_k: 2, ..PLAIN };
    assert_shares(
        two,
        &[(9, 1.0), (4, 1.0), (200, 1.0)],
        &[],
        &[(4, 0.5), (9, 0.5)],
    );
}

#[test]
fn probabilities_are_the_models_own() {
    let set = logits(&log_shares([(1, 0.5), (2, 0.3), (3, 0.2)]));
    let odd = Sampling {
        temperature: 3.0,
        top_k: 2,
        ..PLAIN
    };
    let choice = choose(&set, &mut [false; BYTES], &odd, 0.999, None);
    assert_eq!((choice.byte, choice.top), (2, 1));
    assert!((choice.logprob - 0.3f32.ln()).abs() < 1e-6);
    assert!((choice.top_logprob - 0.5f32.ln()).abs() < 1e-6);
    let top = choose(&set, &mut [false; BYTES], &odd, 0.0, None);
    assert_eq!(top.logprob.to_bits(), top.top_logprob.to_bits());
}

#[test]
fn a_forced_byte_is_taken() {
    let set = logits(&log_shares([(1, 0.5), (2, 0.5)]));
    let mut seen = [false; BYTES];
    let choice = choose(&set, &mut seen, &PLAIN, 0.0, Some(2));
    assert!(choice.byte == 2 && seen[2] && !seen[1]);
    assert!((choice.logprob - 0.5f32.ln()).abs() < 1e-6);
    // A vocabulary without the byte.
    let short = choose(&[0.0, 0.0], &mut seen, &PLAIN, 0.7, Some(9));
    assert_eq!((short.byte, short.logprob), (9, f32::NEG_INFINITY));
}

#[test]
fn a_short_vocabulary_has_no_other_bytes() {
    let mut rng = Rng::new(3);
    for _ in 0..100 {
        let draw = rng.uniform();
        let choice = choose(&[0.1, 0.2, 0.3], &mut [false; BYTES], &PLAIN, draw, None);
        assert!(choice.byte < 3);
    }
    let more = vec![0.0; 300];
    let last = choose(&more, &mut [false; BYTES], &PLAIN, 0.999_999, None);
    assert_eq!(last.byte, 255, "rows beyond the bytes are not looked at");
}
