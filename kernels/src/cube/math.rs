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
    if ptx {
        recip(1.0f32 + exp2(x * (-LOG2E), ptx), ptx)
    } else {
        // The bound keeps the exponential finite: not every target defines arithmetic on infinities.
        recip(1.0f32 + exp2(min(x * (-LOG2E), 126.0f32), ptx), ptx)
    }
}

/// e^-|x|: what [`softplus_of`] and [`softplus_slope_of`] are computed from.
#[cube]
pub(crate) fn softplus_exp(x: f32, #[comptime] ptx: bool) -> f32 {
    exp2(x.abs() * (-LOG2E), ptx)
}

/// ln(1 + eˣ) from `e = softplus_exp(x)`, to a relative error of 4e-7.
#[cube]
pub(crate) fn softplus_of(x: f32, e: f32) -> f32 {
    // ln(1 + eˣ) = max(x, 0) + ln(1 + e), and ln(1 + e) / e for e up to 1 is this polynomial to 2e-7.
    // The logarithm of the special-function unit has an absolute error only near 1, and that unit is
    // what the scan waits for.
    let mut p = fma(e, -0.008_539_206f32, 0.044_089_623f32);
    p = fma(e, p, -0.107_681_71f32);
    p = fma(e, p, 0.177_452_4f32);
    p = fma(e, p, -0.244_954_63f32);
    p = fma(e, p, 0.332_754_8f32);
    p = fma(e, p, -0.499_974_04f32);
    p = fma(e, p, 0.999_999_8f32);
    fma(e, p, max(x, 0.0f32))
}

/// The derivative of softplus from `e = softplus_exp(x)`.
#[cube]
pub(crate) fn softplus_slope_of(x: f32, e: f32, #[comptime] ptx: bool) -> f32 {
    let up = recip(1.0f32 + e, ptx);
    select(x < 0.0f32, e * up, up)
}

/// The scan's step size from its raw value (bias included).
#[cube]
pub(crate) fn step_size(x: f32, #[comptime] softplus: bool, #[comptime] ptx: bool) -> f32 {
    if softplus {
        softplus_of(x, softplus_exp(x, ptx))
    } else {
        x
    }
}
