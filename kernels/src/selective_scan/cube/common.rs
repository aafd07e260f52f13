//! What all kernels of the scan share.
//!
//! A kernel goes through its positions in *stages* of [`SweepConfig::tile`] positions. Its units
//! work in two arrangements, exchanging through shared memory:
//!
//! - *element-wise* (softplus, gates, activations in and out): a unit has a few neighbouring
//!   channels ([`Elements`]) and every few-th position of the stage;
//! - *state-wise* (the recurrences): a unit has [`SweepConfig::per_lane`] states of a channel
//!   ([`Place`]).

use cubecl::prelude::*;

use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::LOG2E;
use crate::cube::reduce::tree_sum;

/// Four neighbouring states, or four numbers of one position and channel.
pub(super) type V4 = Vector<f32, Const<4>>;
/// Two numbers of one position and channel.
pub(super) type V2 = Vector<f32, Const<2>>;

/// The step at which a state is cleared: its decay is 0 whatever the rate ([`load_rates`] sees to
/// that). Finite, because not every target has infinities.
pub(super) const CLEARED: f32 = 1.0e30;

/// States whose products with C are added one after the other; more are added in pairs, so that
/// the sum over states has the same bits however the states are spread over lanes.
const LEAF: usize = 2;

/// The cube's sequence and chunk, and the unit's channel and lane, state-wise.
#[derive(CubeType)]
pub(super) struct Place {
    pub batch: usize,
    pub chunk: usize,
    /// The cube's first channel.
    pub channel0: usize,
    /// The lane's first state is `lane · per_lane`.
    pub lane: usize,
    /// The unit's channel within the cube.
    pub column: usize,
    /// The unit's channel, or the last one for units beyond it: they compute, but write nothing.
    pub channel: usize,
    pub inside: bool,
}

/// The place in a grid of (sequence, chunk, channels): neighbouring units are neighbouring lanes of
/// a channel.
#[cube]
pub(super) fn place(inner: usize, chunks: usize, #[comptime] config: SweepConfig) -> Place {
    let cubes = inner.div_ceil(comptime!(config.channels()));
    let cube = CUBE_POS % cubes;
    let row = CUBE_POS / cubes;
    let unit = UNIT_POS as usize;
    let channel0 = cube * comptime!(config.channels());
    let column = unit / comptime!(config.lanes);
    Place {
        batch: row / chunks,
        chunk: row % chunks,
        channel0,
        lane: unit % comptime!(config.lanes),
        column,
        channel: min(channel0 + column, inner - 1),
        inside: channel0 + column < inner,
    }
}

/// The unit's channels and positions, element-wise.
#[derive(CubeType)]
pub(super) struct Elements {
    /// The unit's first position; the others follow at `config.stride()`.
    pub turn: usize,
    /// Its first channel within the cube.
    pub column: usize,
    /// Its first channel, or the last ones for units beyond them.
    pub channel: usize,
    pub inside: bool,
}

#[cube]
pub(super) fn elements(channel0: usize, inner: usize, #[comptime] config: SweepConfig) -> Elements {
    let width = comptime!(config.vector);
    let groups = comptime!(config.channels() / config.vector);
    let unit = UNIT_POS as usize;
    let column = unit % groups * width;
    Elements {
        turn: unit / groups,
        column,
        channel: min(channel0 + column, inner - width),
        inside: channel0 + column < inner,
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
    #[comptime] resets: bool,
    #[comptime] per_lane: usize,
) {
    #[unroll]
    for k in 0..per_lane {
        let n = lane * per_lane + k;
        let mut value = a[channel * state + min(n, state - 1)] * LOG2E;
        if resets {
            // So small a rate is no decay at any step but CLEARED.
            value = min(value, -1.0e-20f32);
        }
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

/// Loads the unit's part of positions `first..` of B or C, rows of `state` numbers `stride` apart,
/// for [`put_tile`]. Positions beyond the last of `rows` repeat it.
#[cube]
pub(super) fn fetch_tile<P: Float, S: Size>(
    source: &[Vector<P, S>],
    fetched: &mut Array<Vector<P, S>>,
    first: usize,
    rows: usize,
    stride: usize,
    state: usize,
    #[comptime] config: SweepConfig,
) {
    let width = comptime!(config.width());
    let loads = comptime!(config.width() / config.source);
    #[unroll]
    for pass in 0..comptime!(config.tile_passes()) {
        let at = comptime!(pass * config.units) + UNIT_POS as usize;
        let row = min(at / comptime!(config.states() / width), rows - 1);
        let n0 = at % comptime!(config.states() / width) * width;
        #[unroll]
        for k in 0..loads {
            let n = min(
                n0 + comptime!(k * config.source),
                state - comptime!(config.source),
            );
            fetched[comptime!(pass * loads + k)] =
                source[((first + row) * stride + n) / comptime!(config.source)];
        }
    }
}

/// Puts what [`fetch_tile`] loaded into shared memory as f32; zero beyond the last state and
/// position.
#[cube]
pub(super) fn put_tile<P: Float, S: Size, W: Size>(
    fetched: &Array<Vector<P, S>>,
    tile: &mut Shared<[Vector<f32, W>]>,
    rows: usize,
    state: usize,
    #[comptime] config: SweepConfig,
) {
    let width = comptime!(config.width());
    let vectors = comptime!(config.tile * config.states() / config.width());
    let loads = comptime!(config.width() / config.source);
    #[unroll]
    for pass in 0..comptime!(config.tile_passes()) {
        let at = comptime!(pass * config.units) + UNIT_POS as usize;
        let row = at / comptime!(config.states() / width);
        let n0 = at % comptime!(config.states() / width) * width;
        let mut value = Vector::<f32, W>::new(0.0f32);
        #[unroll]
        for k in 0..width {
            let of = fetched[comptime!(pass * loads + k / config.source)];
            let number = f32::cast_from(of.extract(comptime!(k % config.source)));
            value.insert(k, select(row < rows && n0 + k < state, number, 0.0f32));
        }
        if comptime!(vectors % config.units == 0) {
            tile[at] = value;
        } else {
            if at < vectors {
                tile[at] = value;
            }
        }
    }
}

/// Marks the positions of the stage that clear the state: [`CLEARED`], else 0.
#[cube]
pub(super) fn put_clears(
    resets: &OptionalInput,
    clears: &mut Shared<[f32]>,
    first: usize,
    rows: usize,
    #[comptime] config: SweepConfig,
) {
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => {
            let unit = UNIT_POS as usize;
            #[unroll]
            for pass in 0..comptime!(config.tile.div_ceil(config.units)) {
                let t = unit + comptime!(pass * config.units);
                if t < comptime!(config.tile) {
                    let reset = resets[first + min(t, rows - 1)] > 0.5f32 && t < rows;
                    clears[t] = select(reset, CLEARED, 0.0f32);
                }
            }
        }
        ComptimeOption::None => {}
    }
}

/// The step of position `t` as the decays see it.
#[cube]
pub(super) fn decay_step(
    dt: f32,
    clears: &Shared<[f32]>,
    t: usize,
    #[comptime] resets: bool,
) -> f32 {
    if resets { dt + clears[t] } else { dt }
}

/// Σ h · c over a lane's states.
#[cube]
pub(super) fn output<W: Size>(
    h: &Array<f32>,
    c_tile: &Shared<[Vector<f32, W>]>,
    row: usize,
    #[comptime] per_lane: usize,
    #[comptime] width: usize,
) -> f32 {
    let leaf = comptime!(LEAF.min(width));
    let mut parts = Array::<f32>::new(comptime!(per_lane / leaf));
    #[unroll]
    for q in 0..comptime!(per_lane / width) {
        let cs = c_tile[row + q];
        #[unroll]
        for p in 0..comptime!(width / leaf) {
            let k = comptime!(p * leaf);
            let n = comptime!(q * width + p * leaf);
            let mut part = h[n] * cs.extract(k);
            if comptime!(leaf == 2) {
                part = fma(h[comptime!(n + 1)], cs.extract(comptime!(k + 1)), part);
            }
            parts[comptime!(n / leaf)] = part;
        }
    }
    tree_sum(&mut parts, comptime!(per_lane / leaf))
}

/// `width` channels' entries of an optional `[E]` input, or `absent`.
#[cube]
pub(super) fn entries<V: Size>(
    input: &OptionalInput,
    channel: usize,
    #[comptime] width: usize,
) -> Vector<f32, V> {
    let mut out = Vector::<f32, V>::new(0.0f32);
    #[comptime]
    match input {
        ComptimeOption::Some(input) =>
        {
            #[unroll]
            for i in 0..width {
                out.insert(i, input[channel + i]);
            }
        }
        ComptimeOption::None => {}
    }
    out
}

/// The gate's entries, 0 where there is no gate.
#[cube]
pub(super) fn gate_at<Z: Float, V: Size>(
    z: &ComptimeOption<Box<[Vector<Z, V>]>>,
    at: usize,
) -> Vector<Z, V> {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => z[at],
        ComptimeOption::None => Vector::<Z, V>::new(Z::from_int(0)),
    }
}
