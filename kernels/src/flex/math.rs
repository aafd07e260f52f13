//! Elementary functions without branches or tables, so that loops over lanes become vector code.
//!
//! The standard library's `exp` and `ln` are calls the compiler cannot vectorise. Errors against
//! f64 are tested below.

use std::f32::consts::{LN_2, LOG2_E};

/// Adding and subtracting 1.5 · 2²³ rounds to the nearest integer.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts: the first has few digits, so its multiples are exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

/// e^x with a relative error under 2e-7; inputs are clamped to the range of normal f32 results.
#[inline(always)]
pub(crate) fn exp(given: f32) -> f32 {
    let x = given.clamp(-87.3, 88.0);
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let e = (p * r).mul_add(r, r) + 1.0;
    // The low bits of `shifted` are n; n << 23 adds n to the exponent.
    let power = f32::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 23));
    // Of what is not a number the shift would make one.
    if given.is_nan() { given } else { power }
}

/// ln(1 + e) for e in [0, 1], relative error under 3e-7 down to the smallest e.
#[inline(always)]
fn ln_1p(e: f32) -> f32 {
    let u = 1.0 + e;
    // u = 2^k · m with m in [√½, √2): k is 0 or 1 here.
    let big = u > std::f32::consts::SQRT_2;
    let m = if big { u * 0.5 } else { u } - 1.0;
    let k: f32 = if big { 1.0 } else { 0.0 };
    let p = 7.037_683_6e-2f32;
    let p = p.mul_add(m, -1.151_461e-1);
    let p = p.mul_add(m, 1.167_699_9e-1);
    let p = p.mul_add(m, -1.242_014_1e-1);
    let p = p.mul_add(m, 1.424_932_3e-1);
    let p = p.mul_add(m, -1.666_805_8e-1);
    let p = p.mul_add(m, 2.000_071_5e-1);
    let p = p.mul_add(m, -2.499_999_4e-1);
    let p = p.mul_add(m, 1.0 / 3.0);
    let m2 = m * m;
    let ln = (p * m).mul_add(m2, m2.mul_add(-0.5, m));
    // What 1 + e rounded away, to first order.
    let lost = (e - (u - 1.0)) / u;
    k.mul_add(LN_2, ln) + lost
}

/// ln(1 + e^x).
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    x.max(0.0) + ln_1p(exp(-x.abs()))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(
        range: std::ops::Range<i32>,
        scale: f64,
        f: fn(f32) -> f32,
        truth: fn(f64) -> f64,
    ) -> f64 {
        range
            .map(|i| {
                let x = (i as f64 * scale) as f32;
                let expected = truth(x as f64);
                ((f(x) as f64 - expected) / expected).abs()
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_accurate_to_two_ulp() {
        assert!(worst(-870_000..870_000, 1e-4, exp, f64::exp) < 2e-7);
    }

    #[test]
    fn softplus_is_accurate_everywhere() {
        assert!(worst(-800_000..800_000, 1e-4, softplus, |x| x.exp().ln_1p()) < 4e-7);
        assert_eq!(softplus(1000.0), 1000.0);
    }

    #[test]
    fn sigmoid_is_accurate_and_bounded() {
        assert!(
            worst(-800_000..800_000, 1e-4, sigmoid, |x| 1.0
                / (1.0 + (-x).exp()))
                < 4e-7
        );
        assert_eq!(sigmoid(1e9), 1.0);
        assert!(sigmoid(-1e9) >= 0.0);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bits in [0x7fc0_0000, 0x7fc0_0001, 0x7f8c_cccd, 0xffff_ffff] {
            let x = f32::from_bits(bits);
            for f in [exp, softplus, sigmoid] {
                assert!(f(x).is_nan(), "{bits:x}: {}", f(x));
            }
        }
    }

    #[test]
    fn exp_of_extremes_is_finite() {
        for x in [f32::MIN, -1e3, 1e3, f32::MAX] {
            assert!(exp(x).is_finite());
        }
    }
}
