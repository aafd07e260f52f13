//! What all kernels of the scan share: a unit's place, a channel's rates and states in registers,
//! and tiles of B and C in shared memory.

use cubecl::prelude::*;

use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::LOG2E;

/// Four neighbouring states.
pub(super) type V4 = Vector<f32, Const<4>>;

/// Stands for the sum of a chunk's steps where the chunk clears the state: its decay is 0 whatever
/// the rates. Finite, because not every target has infinities.
pub(super) const CLEARED: f32 = 1.0e38;

/// The cube's sequence and chunk, and the unit's channel and lane.
#[derive(CubeType)]
pub(super) struct Place {
    pub batch: usize,
    pub chunk: usize,
    /// The lane's first state is `lane · per_lane`.
    pub lane: usize,
    /// The unit's channel, or the last one for units beyond it: they compute, but write nothing.
    pub channel: usize,
    pub inside: bool,
}

/// The place in a grid of (sequence, chunk, channels), for sweeps: neighbouring units are
/// neighbouring lanes of a channel.
#[cube]
pub(super) fn place(inner: usize, chunks: usize, #[comptime] config: SweepConfig) -> Place {
    let cubes = inner.div_ceil(comptime!(config.channels()));
    let cube = CUBE_POS % cubes;
    let row = CUBE_POS / cubes;
    let unit = UNIT_POS as usize;
    let channel = cube * comptime!(config.channels()) + unit / comptime!(config.lanes);
    Place {
        batch: row / chunks,
        chunk: row % chunks,
        lane: unit % comptime!(config.lanes),
        channel: min(channel, inner - 1),
        inside: channel < inner,
    }
}

/// The lane's decay rates times log₂ e, zero for states beyond the last.
#[cube]
pub(super) fn load_rates(
    a: &[f32],
    rates: &mut Array<f32>,
    channel: usize,
    lane: usize,
    state: usize,
    #[comptime] at: usize,
    #[comptime] per_lane: usize,
) {
    #[unroll]
    for k in 0..per_lane {
        let n = lane * per_lane + k;
        let value = a[channel * state + min(n, state - 1)] * LOG2E;
        rates[comptime!(at + k)] = select(n < state, value, 0.0f32);
    }
}

/// The lane's states from row `row` of a buffer of `[N, E]` rows, zero beyond the last state.
#[cube]
pub(super) fn load_states(
    rows: &[f32],
    states: &mut Array<f32>,
    row: usize,
    channel: usize,
    lane: usize,
    state: usize,
    inner: usize,
    #[comptime] at: usize,
    #[comptime] per_lane: usize,
) {
    #[unroll]
    for k in 0..per_lane {
        let n = lane * per_lane + k;
        let value = rows[(row * state + min(n, state - 1)) * inner + channel];
        states[comptime!(at + k)] = select(n < state, value, 0.0f32);
    }
}

/// Writes the lane's states to row `row` of a buffer of `[N, E]` rows.
#[cube]
pub(super) fn store_states(
    rows: &mut [f32],
    states: &Array<f32>,
    row: usize,
    place: &Place,
    state: usize,
    inner: usize,
    #[comptime] per_lane: usize,
) {
    #[unroll]
    for k in 0..per_lane {
        let n = place.lane * per_lane + k;
        if place.inside && n < state {
            rows[(row * state + n) * inner + place.channel] = states[k];
        }
    }
}

/// The lane's states from `[B, E, N]`, zero where the buffer is absent.
#[cube]
pub(super) fn load_initial(
    initial: &OptionalInput,
    states: &mut Array<f32>,
    place: &Place,
    state: usize,
    inner: usize,
    #[comptime] per_lane: usize,
) {
    #[comptime]
    match initial {
        ComptimeOption::Some(initial) =>
        {
            #[unroll]
            for k in 0..per_lane {
                let n = place.lane * per_lane + k;
                let row = place.batch * inner + place.channel;
                let value = initial[row * state + min(n, state - 1)];
                states[k] = select(n < state, value, 0.0f32);
            }
        }
        ComptimeOption::None =>
        {
            #[unroll]
            for k in 0..per_lane {
                states[k] = 0.0f32;
            }
        }
    }
}

/// Writes the lane's states to `[B, E, N]`.
#[cube]
pub(super) fn store_last(
    last: &mut [f32],
    states: &Array<f32>,
    place: &Place,
    state: usize,
    inner: usize,
    #[comptime] per_lane: usize,
) {
    #[unroll]
    for k in 0..per_lane {
        let n = place.lane * per_lane + k;
        if place.inside && n < state {
            last[(place.batch * inner + place.channel) * state + n] = states[k];
        }
    }
}

/// Positions `first..first + rows` of B or C (rows of `state` numbers, `stride` apart) into shared memory as f32;
/// zero beyond the last state and for the tile's other positions.
#[cube]
pub(super) fn load_tile<P: Float>(
    source: &[P],
    tile: &mut Shared<[V4]>,
    first: usize,
    rows: usize,
    stride: usize,
    state: usize,
    #[comptime] config: SweepConfig,
) {
    let vectors = comptime!(config.tile * config.states() / 4);
    let passes = comptime!(vectors.div_ceil(config.units));
    for pass in 0..passes {
        let at = pass * comptime!(config.units) + UNIT_POS as usize;
        if at < vectors {
            let row = at / comptime!(config.states() / 4);
            let n0 = at % comptime!(config.states() / 4) * 4;
            let mut value = V4::new(0.0f32);
            if row < rows {
                #[unroll]
                for k in 0..4usize {
                    let n = n0 + k;
                    if n < state {
                        value.insert(k, f32::cast_from(source[(first + row) * stride + n]));
                    }
                }
            }
            tile[at] = value;
        }
    }
}

/// The channel's entry of an optional `[E]` input, or `absent`.
#[cube]
pub(super) fn entry(input: &OptionalInput, channel: usize, absent: f32) -> f32 {
    #[comptime]
    match input {
        ComptimeOption::Some(input) => input[channel],
        ComptimeOption::None => absent,
    }
}

/// Whether the state is cleared before position `at` of the `[B · L]` resets.
#[cube]
pub(super) fn is_reset(resets: &OptionalInput, at: usize) -> bool {
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => resets[at] > 0.5f32,
        ComptimeOption::None => false.runtime(),
    }
}

/// The gate's entry, 0 where there is no gate.
#[cube]
pub(super) fn gate_at<Z: Float>(z: &ComptimeOption<Box<[Z]>>, at: usize) -> f32 {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => f32::cast_from(z[at]),
        ComptimeOption::None => 0.0f32.runtime(),
    }
}
