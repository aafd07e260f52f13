//! Selective scan: the recurrence at the heart of Mamba (arXiv 2312.00752, Algorithm 2).
//!
//! For every sequence, channel e and state n, with `Δ = softplus(delta + delta_bias)`:
//!
//! ```text
//! h_t = exp(Δ_t · A) · h_{t-1} + Δ_t · B_t · u_t
//! y_t = (Σ_n C_t · h_t + D · u_t) · silu(z_t)
//! ```
//!
//! The state is carried: `h_{-1}` is `initial_state`, the last `h` is returned, so a long sequence
//! may be processed in pieces with the same result. Where `resets` is 1 the state is cleared before
//! that position, so documents packed into one row do not see each other. The gradient stops at
//! `initial_state` (truncated back-propagation through time).
//!
//! The `[B, L, E, N]` states are never materialised: forward keeps one state every chunk, backward
//! recomputes the rest.

pub(crate) mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod measure;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::{MambaOps, optional};

/// Largest supported state size N (as the CUDA kernels of mamba_ssm).
pub const MAX_STATE: usize = 256;

/// Memory in bytes that backward on a GPU uses beside its inputs and outputs, at most: it goes
/// through long sequences in segments. A single chunk of every sequence is the least it takes at a
/// time, whatever that needs.
///
/// Half as much was tried: training steps took 3 % to 9 % longer on an H200, since processors are idle
/// at the end of every segment.
pub const BACKWARD_TRANSIENT_BYTES: usize = 640 << 20;

/// Inputs of the scan; `T` is a raw tensor of some backend.
#[derive(Clone, Debug)]
pub struct ScanInputs<T> {
    /// Input after convolution, `[B, L, E]`.
    pub u: T,
    /// Step size before bias and softplus, `[B, L, E]`.
    pub delta: T,
    /// Negative decay rates, `[E, N]`, f32.
    pub a: T,
    /// Input projection of every position, `[B, L, N]`.
    pub b: T,
    /// Output projection of every position, `[B, L, N]`.
    pub c: T,
    /// Skip connection, `[E]`, f32.
    pub d: Option<T>,
    /// Gate: `y` is multiplied by `silu(z)`, `[B, L, E]`.
    pub z: Option<T>,
    /// Added to `delta` before the softplus, `[E]`, f32.
    pub delta_bias: Option<T>,
    /// State before the first position, `[B, E, N]`, f32; zero if absent.
    pub initial_state: Option<T>,
    /// `[B, L]`, f32: 1 where the state is cleared before the position, else 0.
    pub resets: Option<T>,
    /// Whether the step size is `softplus(delta + delta_bias)` rather than the sum itself.
    pub delta_softplus: bool,
}

/// Outputs of the forward scan.
#[derive(Clone, Debug)]
pub struct ScanOutputs<T> {
    /// `[B, L, E]`, the data type of `u`.
    pub y: T,
    /// State after the last position, `[B, E, N]`, f32.
    pub last_state: T,
    /// States that backward starts from, in the backend's own layout.
    pub saved: T,
}

/// Gradients of the scan; an optional input that was absent has none.
#[derive(Clone, Debug)]
pub struct ScanGrads<T> {
    /// `[B, L, E]`.
    pub u: T,
    /// `[B, L, E]`.
    pub delta: T,
    /// `[E, N]`, f32.
    pub a: T,
    /// `[B, L, N]`.
    pub b: T,
    /// `[B, L, N]`.
    pub c: T,
    /// `[E]`, f32.
    pub d: Option<T>,
    /// `[B, L, E]`.
    pub z: Option<T>,
    /// `[E]`, f32.
    pub delta_bias: Option<T>,
    /// The forward pass's output, `[B, L, E]`, if it was asked for: the same bits.
    pub y: Option<T>,
}

/// What the backward pass is asked for beyond the gradients.
#[derive(Clone, Debug)]
pub struct ScanRequest<T> {
    /// View to write the gradient of `z` into, where the backend can write in place; others return
    /// a new tensor.
    pub z: Option<T>,
    /// The same for `b`.
    pub b: Option<T>,
    /// The same for `c`.
    pub c: Option<T>,
    /// Whether to return the forward pass's output too.
    pub y: bool,
    /// The same as `z` for that output.
    pub y_into: Option<T>,
}

impl<T> ScanRequest<T> {
    /// New tensors, and no output.
    pub fn none() -> Self {
        Self {
            z: None,
            b: None,
            c: None,
            y: false,
            y_into: None,
        }
    }
}

/// Arguments of [`selective_scan`]. The optional ones default to absent:
///
/// ```ignore
/// let (y, state) = selective_scan(Scan { d: Some(d), z: Some(z), ..Scan::new(u, delta, a, b, c) });
/// ```
#[derive(Clone, Debug)]
pub struct Scan {
    /// Input after convolution, `[B, L, E]`.
    pub u: Tensor<3>,
    /// Step size before bias and softplus, `[B, L, E]`.
    pub delta: Tensor<3>,
    /// Negative decay rates, `[E, N]`.
    pub a: Tensor<2>,
    /// `[B, L, N]`.
    pub b: Tensor<3>,
    /// `[B, L, N]`.
    pub c: Tensor<3>,
    /// Skip connection, `[E]`.
    pub d: Option<Tensor<1>>,
    /// Gate, `[B, L, E]`.
    pub z: Option<Tensor<3>>,
    /// Added to `delta` before the softplus, `[E]`.
    pub delta_bias: Option<Tensor<1>>,
    /// State before the first position, `[B, E, N]`; zero if absent. No gradient flows into it.
    pub initial_state: Option<Tensor<3>>,
    /// `[B, L]`: 1 where a document begins, else 0.
    pub resets: Option<Tensor<2>>,
    /// Apply softplus to the step size.
    pub delta_softplus: bool,
}

impl Scan {
    /// The scan's required inputs, with every optional one absent and softplus on.
    pub fn new(u: Tensor<3>, delta: Tensor<3>, a: Tensor<2>, b: Tensor<3>, c: Tensor<3>) -> Self {
        Self {
            u,
            delta,
            a,
            b,
            c,
            d: None,
            z: None,
            delta_bias: None,
            initial_state: None,
            resets: None,
            delta_softplus: true,
        }
    }

    /// Panics, naming the axis, unless all shapes agree.
    pub(crate) fn check(&self) {
        let [batch, length, inner] = self.u.dims();
        let [rows, state] = self.a.dims();
        assert!(
            length > 0 && batch > 0,
            "selective_scan: u must have at least one position, got [B, L, E] = {:?}",
            self.u.dims()
        );
        assert!(
            state > 0 && state <= MAX_STATE,
            "selective_scan: state size N must be 1 to {MAX_STATE}, got {state}"
        );
        let same = |name: &str, got: &[usize], expected: &[usize]| {
            assert_eq!(got, expected, "selective_scan: shape of {name}");
        };
        same("a [E, N]", &[rows, state], &[inner, state]);
        same(
            "delta [B, L, E]",
            &self.delta.dims(),
            &[batch, length, inner],
        );
        same("b [B, L, N]", &self.b.dims(), &[batch, length, state]);
        same("c [B, L, N]", &self.c.dims(), &[batch, length, state]);
        if let Some(d) = &self.d {
            same("d [E]", &d.dims(), &[inner]);
        }
        if let Some(z) = &self.z {
            same("z [B, L, E]", &z.dims(), &[batch, length, inner]);
        }
        if let Some(bias) = &self.delta_bias {
            same("delta_bias [E]", &bias.dims(), &[inner]);
        }
        if let Some(h) = &self.initial_state {
            same("initial_state [B, E, N]", &h.dims(), &[batch, inner, state]);
        }
        if let Some(resets) = &self.resets {
            same("resets [B, L]", &resets.dims(), &[batch, length]);
        }
    }
}

/// Runs the scan: `(y, last_state)`.
///
/// # Shapes
///
/// - y: `[B, L, E]`
/// - last_state: `[B, E, N]`, untracked by autodiff
///
/// # Panics
///
/// If shapes disagree or N is above [`MAX_STATE`].
pub fn selective_scan(scan: Scan) -> (Tensor<3>, Tensor<3>) {
    scan.check();
    let (y, last_state) = <Dispatch as MambaOps>::scan_op(
        scan.u.into_dispatch(),
        scan.delta.into_dispatch(),
        scan.a.into_dispatch(),
        scan.b.into_dispatch(),
        scan.c.into_dispatch(),
        optional(scan.d),
        optional(scan.z),
        optional(scan.delta_bias),
        optional(scan.initial_state),
        optional(scan.resets),
        scan.delta_softplus,
    );
    (Tensor::from_dispatch(y), Tensor::from_dispatch(last_state))
}

/// One position of the scan, for step-by-step generation: `(y [B, E], state [B, E, N])`.
///
/// The same arithmetic as [`selective_scan`] at L = 1, so stepping equals scanning.
pub fn selective_state_update(scan: Scan) -> (Tensor<2>, Tensor<3>) {
    let [batch, length, inner] = scan.u.dims();
    assert_eq!(length, 1, "selective_state_update: one position at a time");
    let (y, state) = selective_scan(scan);
    (y.reshape([batch, inner]), state)
}
