//! Every size the scan's kernels are cut by, decided once from the shape and the device.

use burn_cubecl::tensor::CubeTensor;

use crate::cube::{DeviceTraits, SHARED_BYTES, dims, power_of_two_below};
use crate::selective_scan::ScanInputs;

/// Bounds of the positions in a chunk. Short chunks make the pass over chunk ends long, long ones
/// leave the device idle.
const CHUNK: [usize; 2] = [32, 256];

/// Positions between the states that backward recomputes from. All of a sub-chunk's states and
/// decays are in registers: with 8 the kernel spills or loses occupancy.
pub(super) const SUB: usize = 4;

/// Transient memory that backward may use at a time, in bytes; at least one chunk of every
/// sequence is processed at once. Tests have little, so that they run through several segments.
const TRANSIENT_BYTES: usize = if cfg!(test) { 1 << 18 } else { 256 << 20 };

/// The sizes of the problem.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScanShape {
    pub batch: usize,
    pub length: usize,
    pub inner: usize,
    pub state: usize,
}

impl ScanShape {
    pub fn of(inputs: &ScanInputs<CubeTensor>) -> Self {
        let [batch, length, inner] = dims(&inputs.u);
        let [_, state] = dims(&inputs.a);
        Self {
            batch,
            length,
            inner,
            state,
        }
    }
}

/// What forward and backward agree on: where the chunks begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    /// Positions of a chunk (a power of two); the last may be shorter.
    pub size: usize,
    /// Chunks of a sequence.
    pub count: usize,
    /// Whether one pass over all positions keeps the device busy without cutting time.
    pub walk: bool,
}

impl Chunks {
    pub fn new(shape: &ScanShape, device: &DeviceTraits) -> Self {
        let channels = shape.batch * shape.inner;
        let elements = channels.saturating_mul(shape.length);
        let size = elements
            .div_ceil(device.busy_units)
            .next_power_of_two()
            .clamp(CHUNK[0], CHUNK[1]);
        let count = shape.length.div_ceil(size);
        Self {
            size,
            count,
            // Two passes cost two exponentials an element, so one pass pays before it fills the
            // device completely.
            walk: count == 1 || 2 * channels >= device.busy_units,
        }
    }

    /// The same chunks, each on its own, as backward always has them.
    pub fn cut(&self) -> Self {
        Self {
            walk: false,
            ..*self
        }
    }
}

/// How a kernel spreads states over lanes, and its compile-time switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SweepConfig {
    /// Units of a cube.
    pub units: usize,
    /// States of one lane, a multiple of 4 (the width of shared memory's vectors).
    pub per_lane: usize,
    /// Lanes that share a channel, a power of two.
    pub lanes: usize,
    /// Channels of one lane (main backward kernel only; else 1).
    pub per_unit: usize,
    /// Lanes that can exchange registers.
    pub plane: usize,
    /// Positions of a chunk.
    pub chunk: usize,
    /// Positions of B and C in shared memory at a time.
    pub tile: usize,
    /// Positions loaded ahead.
    pub ahead: usize,
    /// Whether the step size goes through softplus.
    pub softplus: bool,
    /// Whether kernels may hold PTX.
    pub ptx: bool,
}

impl SweepConfig {
    /// States of a channel, padded to full lanes.
    pub const fn states(&self) -> usize {
        self.per_lane * self.lanes
    }

    /// Channels of a cube.
    pub const fn channels(&self) -> usize {
        self.units / self.lanes * self.per_unit
    }

    /// Cubes that cover all channels.
    pub fn cubes(&self, inner: usize) -> usize {
        inner.div_ceil(self.channels())
    }
}

/// States of one lane and lanes of a channel for about `wanted` states a lane.
fn spread_states(state: usize, wanted: usize, plane: usize) -> (usize, usize) {
    let mut per_lane = wanted.min(state.next_power_of_two()).max(4);
    let mut lanes = state.div_ceil(per_lane).next_power_of_two();
    while lanes > plane {
        lanes /= 2;
        per_lane *= 2;
    }
    (per_lane, lanes)
}

/// The kernels that walk left to right, a channel's states in one lane where they fit.
///
/// `most_units` bounds the cube: the compiler shares 65,536 registers over it, and the cube's size
/// is the only way to ask for fewer.
pub(super) fn sweep(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    softplus: bool,
    ahead: usize,
    most_units: usize,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, 16, device.plane);
    let most_units = if per_lane > 16 { 128 } else { most_units };
    let rows = shape.batch * if chunks.walk { 1 } else { chunks.count };
    let units = cube_units(shape.inner * lanes, rows, most_units, device).max(lanes);
    // B and C of a tile, f32, in half of the shared memory.
    let tile = (SHARED_BYTES / 2) / (2 * 4 * per_lane * lanes);
    let tile = power_of_two_below(tile)
        .min(chunks.size)
        .min(shape.length.next_power_of_two())
        .max(ahead);
    SweepConfig {
        units,
        per_lane,
        lanes,
        per_unit: 1,
        plane: device.plane,
        chunk: chunks.size,
        tile,
        ahead,
        softplus,
        ptx: device.ptx,
    }
}

/// Units of a cube for `rows` rows of `row_units` units: the most that neither leave many idle at
/// a row's end nor leave processors without a cube.
fn cube_units(row_units: usize, rows: usize, most: usize, device: &DeviceTraits) -> usize {
    let processors = device.busy_units / 1024;
    let mut units = power_of_two_below(most.min(device.max_units));
    while units > 2 * device.plane.max(16) {
        let cubes = row_units.div_ceil(units);
        let idle = cubes * units - row_units;
        if idle * 8 <= row_units && 2 * cubes * rows >= processors {
            break;
        }
        units /= 2;
    }
    units
}

/// The main backward kernel: 4 states a lane, so that a sub-chunk's states stay in registers.
pub(super) fn adjoint(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    softplus: bool,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, 4, device.plane);
    // Two channels a lane halve the shuffles; a third would not fit the registers.
    let per_unit = if lanes > 1 && per_lane == 4 { 2 } else { 1 };
    let states = per_lane * lanes;
    let tile = power_of_two_below(SHARED_BYTES / 4 / (2 * 4 * states))
        .min(chunks.size)
        .max(SUB);
    let mut config = SweepConfig {
        units: 128.min(power_of_two_below(device.max_units)),
        per_lane,
        lanes,
        per_unit,
        plane: device.plane,
        chunk: chunks.size,
        tile,
        ahead: SUB,
        softplus,
        ptx: device.ptx,
    };
    let least = device.plane.max(lanes);
    let fits = |c: &SweepConfig| {
        adjoint_shared_bytes(c) <= SHARED_BYTES - 1024 && c.channels() < 2 * shape.inner.max(1)
    };
    while config.units > least && !fits(&config) {
        config.units /= 2;
    }
    config
}

/// Shared memory of the main backward kernel: tiles of B and C, two vectors for every position and
/// channel of a sub-chunk, and the partial sums of dB and dC of every plane.
pub(super) fn adjoint_shared_bytes(config: &SweepConfig) -> usize {
    let states = config.states();
    let tiles = 2 * 4 * config.tile * states;
    let vectors = 2 * 16 * SUB * config.channels();
    let sums = 4 * 2 * states * SUB * config.units.div_ceil(config.plane);
    tiles + vectors + sums
}

/// Chunks that backward processes at once, right to left, to stay within its transient memory.
pub(super) fn segment_chunks(shape: &ScanShape, chunks: &Chunks, main: &SweepConfig) -> usize {
    let states = chunks.size / SUB * shape.state * shape.inner;
    let partials = chunks.size * 2 * main.states() * main.cubes(shape.inner);
    let bytes = 4 * shape.batch * (states + partials);
    (TRANSIENT_BYTES / bytes.max(1)).clamp(1, chunks.count)
}
