//! What all kernels of the scan share.
//!
//! A kernel goes through its positions in *stages* of [`SweepConfig::tile`] positions, whose B and
//! C are in shared memory. State-wise, a unit has [`SweepConfig::per_lane`] states of a channel
//! ([`Place`]); where activations are worked on apart from the states, it has a few neighbouring
//! channels and every few-th position of the stage ([`Elements`]).

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

/// The cube's sequence and chunk, and the unit's channel and lane, state-wise.
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

/// The place in a grid of (sequence, chunk, channels): neighbouring units are neighbouring lanes of
/// a channel.
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
    let loads = comptime!(4 / config.source);
    #[unroll]
    for pass in 0..comptime!(config.tile_passes()) {
        let at = comptime!(pass * config.units) + UNIT_POS as usize;
        let row = min(at / comptime!(config.states() / 4), rows - 1);
        let n0 = at % comptime!(config.states() / 4) * 4;
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
pub(super) fn put_tile<P: Float, S: Size>(
    fetched: &Array<Vector<P, S>>,
    tile: &mut Shared<[V4]>,
    rows: usize,
    state: usize,
    #[comptime] config: SweepConfig,
) {
    let vectors = comptime!(config.tile_vectors());
    let loads = comptime!(4 / config.source);
    #[unroll]
    for pass in 0..comptime!(config.tile_passes()) {
        let at = comptime!(pass * config.units) + UNIT_POS as usize;
        let row = at / comptime!(config.states() / 4);
        let n0 = at % comptime!(config.states() / 4) * 4;
        let mut value = V4::new(0.0f32);
        #[unroll]
        for k in 0..4usize {
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

/// Σ h · c over a lane's states at position `t` of the tile.
#[cube]
pub(super) fn output(
    h: &Array<f32>,
    c_tile: &Shared<[V4]>,
    t: usize,
    lane: usize,
    #[comptime] config: SweepConfig,
) -> f32 {
    let vectors = comptime!(config.per_lane / 4);
    let row = (t * comptime!(config.lanes) + lane) * vectors;
    let mut parts = Array::<f32>::new(vectors);
    #[unroll]
    for q in 0..vectors {
        let cs = c_tile[row + q];
        let mut part = h[comptime!(q * 4)] * cs.extract(0usize);
        #[unroll]
        for k in 1..4usize {
            part = fma(h[comptime!(q * 4 + k)], cs.extract(k), part);
        }
        parts[q] = part;
    }
    tree_sum(&mut parts, vectors)
}

/// Where position `t` of `count` is in a buffer, the last position for those beyond it.
#[cube]
pub(super) fn at_position(base: usize, t: usize, count: usize, stride: usize) -> usize {
    base + min(t, count - 1) * stride
}

/// Positions `first..first + rows` of B or C into shared memory; see [`put_tile`].
#[cube]
pub(super) fn load_tile<P: Float, S: Size>(
    source: &[Vector<P, S>],
    tile: &mut Shared<[V4]>,
    first: usize,
    rows: usize,
    stride: usize,
    state: usize,
    #[comptime] config: SweepConfig,
) {
    let mut fetched = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    fetch_tile(source, &mut fetched, first, rows, stride, state, config);
    put_tile(&fetched, tile, rows, state, config);
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

/// The gate's entry, 0 where there is no gate.
#[cube]
pub(super) fn gate_at<Z: Float>(z: &ComptimeOption<Box<[Z]>>, at: usize) -> Z {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => z[at],
        ComptimeOption::None => Z::from_int(0),
    }
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
pub(super) fn gates_at<Z: Float, V: Size>(
    z: &ComptimeOption<Box<[Vector<Z, V>]>>,
    at: usize,
) -> Vector<Z, V> {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => z[at],
        ComptimeOption::None => Vector::<Z, V>::new(Z::from_int(0)),
    }
}
