//! The scan on the CPU: one channel a vector lane, time in sequence, the states in cache.
//!
//! Work is divided over sequences and groups of channels. Backward walks [`CHUNK`] positions at a
//! time from right to left: it recomputes the chunk's states and decays from the state saved at its
//! start (one exponential an element), then runs the adjoint over them. The division depends on the
//! shapes alone, so results do not depend on the number of threads.

mod backward;
mod forward;

use burn_flex::FlexTensor;

pub(crate) use backward::backward;
pub(crate) use forward::forward;

use super::ScanInputs;
use crate::flex::math::softplus;
use crate::flex::tensor::{contiguous, dims, values};
use crate::flex::{LANES, Lanes, add, load, map};

/// Positions between saved states. Backward holds 2 · CHUNK · N · LANES floats: 64 KiB at N = 16.
const CHUNK: usize = 32;
/// Most groups of channels a sequence is divided into.
const MAX_GROUPS: usize = 16;
/// Fewest blocks of [`LANES`] channels worth a task of their own.
const MIN_BLOCKS: usize = 4;

/// Sizes of one scan.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
}

impl Sizes {
    fn of(inputs: &ScanInputs<FlexTensor>) -> Self {
        let [batch, length, inner] = dims(&inputs.u);
        let [_, state] = dims(&inputs.a);
        Self {
            batch,
            length,
            inner,
            state,
        }
    }

    fn chunks(self) -> usize {
        self.length.div_ceil(CHUNK)
    }

    /// Blocks of [`LANES`] channels in one group.
    fn blocks_a_group(self) -> usize {
        self.inner
            .div_ceil(LANES)
            .div_ceil(MAX_GROUPS)
            .max(MIN_BLOCKS)
    }

    fn groups(self) -> usize {
        self.inner.div_ceil(self.blocks_a_group() * LANES)
    }

    /// The blocks of group `g`: (first channel, number of channels).
    fn blocks(self, g: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
        let width = self.blocks_a_group() * LANES;
        let end = ((g + 1) * width).min(self.inner);
        (g * width..end)
            .step_by(LANES)
            .map(move |e| (e, LANES.min(end - e)))
    }
}

/// Every input as a slice.
struct Slices<'a> {
    u: &'a [f32],
    delta: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// `[N, E]`: one state's rates of neighbouring channels side by side.
    a: Vec<f32>,
    d: Option<&'a [f32]>,
    z: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    initial: Option<&'a [f32]>,
    resets: Option<&'a [f32]>,
    softplus: bool,
}

impl<'a> Slices<'a> {
    fn of(inputs: &'a ScanInputs<FlexTensor>, sizes: Sizes) -> Self {
        Self {
            u: values(&inputs.u),
            delta: values(&inputs.delta),
            b: values(&inputs.b),
            c: values(&inputs.c),
            a: transposed(values(&inputs.a), sizes.inner, sizes.state),
            d: inputs.d.as_ref().map(values),
            z: inputs.z.as_ref().map(values),
            bias: inputs.delta_bias.as_ref().map(values),
            initial: inputs.initial_state.as_ref().map(values),
            resets: inputs.resets.as_ref().map(values),
            softplus: inputs.delta_softplus,
        }
    }

    /// The step size before softplus.
    #[inline(always)]
    fn raw_step(&self, at: usize, bias: Lanes, count: usize) -> Lanes {
        add(load(self.delta, at, count), bias)
    }

    #[inline(always)]
    fn step(&self, raw: Lanes) -> Lanes {
        if self.softplus {
            map(raw, softplus)
        } else {
            raw
        }
    }

    #[inline(always)]
    fn reset_at(&self, row: usize) -> bool {
        self.resets.is_some_and(|resets| resets[row] > 0.5)
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for r in 0..rows {
        for c in 0..columns {
            out[c * rows + r] = x[r * columns + c];
        }
    }
    out
}

#[inline(always)]
fn load_opt(src: Option<&[f32]>, at: usize, count: usize) -> Lanes {
    match src {
        Some(src) => load(src, at, count),
        None => [0.0; LANES],
    }
}

fn all_contiguous(inputs: ScanInputs<FlexTensor>) -> ScanInputs<FlexTensor> {
    ScanInputs {
        u: contiguous(inputs.u),
        delta: contiguous(inputs.delta),
        a: contiguous(inputs.a),
        b: contiguous(inputs.b),
        c: contiguous(inputs.c),
        d: inputs.d.map(contiguous),
        z: inputs.z.map(contiguous),
        delta_bias: inputs.delta_bias.map(contiguous),
        initial_state: inputs.initial_state.map(contiguous),
        resets: inputs.resets.map(contiguous),
        delta_softplus: inputs.delta_softplus,
    }
}
