//! Elementary functions for kernels.
//!
//! With `ptx` they are the special-function unit's own instructions (relative error about 2⁻²²):
//! the runtime compiler has no fast-math switch, and its accurate forms are several times slower.
//! Without, they are the portable forms.

use cubecl::prelude::*;

/// log₂ e.
pub(crate) const LOG2E: f32 = std::f32::consts::LOG2_E;
/// ln 2.
pub(crate) const LN2: f32 = std::f32::consts::LN_2;

/// Beyond this argument softplus(x) = x in f32 (the threshold of PyTorch).
const SOFTPLUS_LINEAR: f32 = 20.0;

/// 2ˣ. `x` must be an expression, not a mutable variable (assembly takes those by address).
#[cube]
pub(crate) fn exp2(x: f32, #[comptime] ptx: bool) -> f32 {
    if ptx {
        let out: f32;
        gpu_asm!("ex2.approx.ftz.f32 {}, {};", out(_) out, in(_) x, options(pure, nomem));
        out
    } else {
        (x * LN2).exp()
    }
}

/// log₂ x; see [`exp2`] for `x`.
#[cube]
pub(crate) fn log2(x: f32, #[comptime] ptx: bool) -> f32 {
    if ptx {
        let out: f32;
        gpu_asm!("lg2.approx.ftz.f32 {}, {};", out(_) out, in(_) x, options(pure, nomem));
        out
    } else {
        x.ln() * LOG2E
    }
}

/// 1 / x; see [`exp2`] for `x`.
#[cube]
pub(crate) fn recip(x: f32, #[comptime] ptx: bool) -> f32 {
    if ptx {
        let out: f32;
        gpu_asm!("rcp.approx.ftz.f32 {}, {};", out(_) out, in(_) x, options(pure, nomem));
        out
    } else {
        1.0f32 / x
    }
}

/// 1 / (1 + e⁻ˣ).
#[cube]
pub(crate) fn sigmoid(x: f32, #[comptime] ptx: bool) -> f32 {
    // The bound keeps the exponential finite: not every target defines arithmetic on infinities.
    let e = exp2(min(x * (-LOG2E), 126.0f32), ptx);
    recip(1.0f32 + e, ptx)
}

/// e^min(x, 20): what [`softplus_of`] and [`softplus_slope_of`] are computed from.
#[cube]
pub(crate) fn softplus_exp(x: f32, #[comptime] ptx: bool) -> f32 {
    exp2(min(x, SOFTPLUS_LINEAR) * LOG2E, ptx)
}

/// ln(1 + eˣ) from `e = softplus_exp(x)`; x itself beyond 20.
#[cube]
pub(crate) fn softplus_of(x: f32, e: f32, #[comptime] ptx: bool) -> f32 {
    // Adding a small e to 1 rounds it off, and the logarithm near 1 has an absolute error only:
    // there five terms of the series are exact to f32.
    let tail = fma(-e, fma(-e, 0.2f32, 0.25f32), 0.333_333_34f32);
    let series = e * fma(-e, fma(-e, tail, 0.5f32), 1.0f32);
    let full = log2(1.0f32 + e, ptx) * LN2;
    let value = select(e < 0.06f32, series, full);
    select(x > SOFTPLUS_LINEAR, x, value)
}

/// The derivative of softplus from `e = softplus_exp(x)`.
#[cube]
pub(crate) fn softplus_slope_of(x: f32, e: f32, #[comptime] ptx: bool) -> f32 {
    select(x > SOFTPLUS_LINEAR, 1.0f32, e * recip(1.0f32 + e, ptx))
}

/// The scan's step size from its raw value (bias included).
#[cube]
pub(crate) fn step_size(x: f32, #[comptime] softplus: bool, #[comptime] ptx: bool) -> f32 {
    if softplus {
        softplus_of(x, softplus_exp(x, ptx), ptx)
    } else {
        x
    }
}
