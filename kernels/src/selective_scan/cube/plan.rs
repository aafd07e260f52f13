//! Every size the scan's kernels are cut by, decided once from the shape and the device.

use burn_cubecl::tensor::CubeTensor;

use crate::cube::{DeviceTraits, dims, power_of_two_below};
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
        let size = knob("CHUNK", size);
        let count = shape.length.div_ceil(size);
        Self {
            size,
            count,
            // Two passes cost two exponentials an element, so one pass pays before it fills the
            // device completely.
            walk: knob(
                "WALK",
                (count == 1 || 2 * channels >= device.busy_units) as usize,
            ) == 1,
        }
    }
}

/// How a kernel spreads channels and states over lanes, and its compile-time switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SweepConfig {
    /// Units of a cube.
    pub units: usize,
    /// States of one lane, a power of two.
    pub per_lane: usize,
    /// Lanes that share a channel, a power of two.
    pub lanes: usize,
    /// Channels of one lane (main backward kernel only; else 1).
    pub per_unit: usize,
    /// Lanes that can exchange registers.
    pub plane: usize,
    /// Positions of a chunk.
    pub chunk: usize,
    /// Positions of a stage.
    pub tile: usize,
    /// Neighbouring channels that are loaded at once.
    pub vector: usize,
    /// Neighbouring numbers of B and C that are loaded at once: `width()` or 1.
    pub source: usize,
    /// Whether a stage's recurrence is one piece of code without a loop.
    pub unroll: bool,
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

    /// From one channel of a unit to the next.
    pub const fn spacing(&self) -> usize {
        self.units / self.lanes
    }

    /// States that are read from shared memory at once.
    pub const fn width(&self) -> usize {
        if self.per_lane < 4 { self.per_lane } else { 4 }
    }

    /// From one position of a unit to the next, element-wise.
    pub const fn stride(&self) -> usize {
        self.units / (self.channels() / self.vector)
    }

    /// Positions of a unit in a stage, element-wise.
    pub const fn passes(&self) -> usize {
        self.tile.div_ceil(self.stride())
    }

    /// Whether all of them are in the stage.
    pub const fn exact(&self) -> bool {
        self.stride() <= self.tile
    }

    /// Vectors of a unit in a stage's B or C.
    pub const fn tile_passes(&self) -> usize {
        (self.tile * self.states() / self.width()).div_ceil(self.units)
    }

    /// Loads of a unit for them.
    pub const fn tile_loads(&self) -> usize {
        self.tile_passes() * self.width() / self.source
    }

    /// Positions whose sums over states are exchanged between lanes together.
    pub const fn group(&self) -> usize {
        let wanted = if self.lanes > SUB { self.lanes } else { SUB };
        if wanted < self.tile {
            wanted
        } else {
            self.tile
        }
    }

    /// Shared memory of a sweep left to right that keeps `bytes` a position and channel.
    const fn sweep_bytes(&self, bytes: usize) -> usize {
        self.tile * (2 * 4 * self.states() + 4 + bytes * self.channels())
    }
}

/// How wide the inputs can be loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    /// Neighbouring channels.
    pub channels: usize,
    /// Neighbouring numbers of B and C.
    pub states: usize,
}

pub(super) fn knob(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// States of one lane and lanes of a channel for about `wanted` states a lane.
fn spread_states(state: usize, wanted: usize, least: usize, plane: usize) -> (usize, usize) {
    let mut per_lane = wanted.min(state.next_power_of_two()).max(least);
    let mut lanes = state.div_ceil(per_lane).next_power_of_two();
    while lanes > plane {
        lanes /= 2;
        per_lane *= 2;
    }
    (per_lane, lanes)
}

/// The kernels of forward.
pub(super) fn sweep(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    alignment: Alignment,
    softplus: bool,
) -> SweepConfig {
    let wanted = if chunks.walk {
        knob("FS", 4)
    } else {
        knob("FCS", 4)
    };
    let (per_lane, lanes) = spread_states(shape.state, wanted, 2, device.plane);
    let rows = shape.batch * if chunks.walk { 1 } else { chunks.count };
    let most = knob("FU", 128);
    let units = cube_units(shape.inner * lanes, rows, most, device).max(lanes);
    let mut config = SweepConfig {
        units,
        per_lane,
        lanes,
        per_unit: 1,
        plane: device.plane,
        chunk: chunks.size,
        tile: knob("FT", 32)
            .min(chunks.size)
            .min(shape.length.next_power_of_two()),
        vector: alignment.channels.min(knob("FV", 2)),
        source: 1,
        unroll: knob("FUNROLL", 0) == 1,
        softplus,
        ptx: device.ptx,
    };
    fit(&mut config, alignment, 1, |c| {
        c.sweep_bytes(12) <= device.shared_bytes
    });
    config
}

/// Shortens stages until `fits` holds, and settles what depends on the rest.
fn fit(
    config: &mut SweepConfig,
    alignment: Alignment,
    least: usize,
    fits: impl Fn(&SweepConfig) -> bool,
) {
    while config.tile > least && !fits(config) {
        config.tile /= 2;
    }
    while config.vector > config.channels() || config.vector * config.lanes < config.per_unit {
        if config.vector == 1 {
            break;
        }
        config.vector /= 2;
    }
    config.source = if alignment.states >= config.width() {
        config.width()
    } else {
        1
    };
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

/// The sweep of adjoint ends: it keeps four numbers a state.
pub(super) fn adjoint_sweep(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    alignment: Alignment,
    softplus: bool,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, knob("ES", 8), 4, device.plane);
    let rows = shape.batch * chunks.count;
    let units = cube_units(shape.inner * lanes, rows, knob("EU", 128), device).max(lanes);
    let mut config = SweepConfig {
        units,
        per_lane,
        lanes,
        per_unit: 1,
        plane: device.plane,
        chunk: chunks.size,
        tile: knob("ET", 16).min(chunks.size),
        vector: alignment.channels.min(knob("EV", 2)),
        source: 1,
        unroll: false,
        softplus,
        ptx: device.ptx,
    };
    fit(&mut config, alignment, SUB, |c| {
        c.sweep_bytes(20) <= device.shared_bytes
    });
    config
}

/// The main backward kernel: 4 states a lane, so that a sub-chunk's states stay in registers.
pub(super) fn adjoint(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    alignment: Alignment,
    softplus: bool,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, 4, 4, device.plane);
    // Several channels a lane share the shuffles that sum over channels.
    let per_unit = if lanes > 1 && per_lane == 4 {
        knob("MM", 2).min(lanes)
    } else {
        1
    };
    let mut config = SweepConfig {
        units: knob("MU", 128).min(power_of_two_below(device.max_units)),
        per_lane,
        lanes,
        per_unit,
        plane: device.plane,
        chunk: chunks.size,
        tile: knob("MT", 16).min(chunks.size),
        vector: alignment.channels.min(knob("MV", 2)),
        source: 1,
        unroll: false,
        softplus,
        ptx: device.ptx,
    };
    let least = device.plane.max(lanes);
    while config.units > least
        && (config.channels() >= 2 * shape.inner.max(1)
            || adjoint_shared_bytes(&SweepConfig {
                tile: SUB,
                ..config
            }) > device.shared_bytes)
    {
        config.units /= 2;
    }
    fit(&mut config, alignment, SUB, |c| {
        adjoint_shared_bytes(c) <= device.shared_bytes
    });
    config
}

/// Shared memory of the main backward kernel: tiles of B and C, six numbers for every position and
/// channel of a stage, and the partial sums of dB and dC of every plane.
pub(super) fn adjoint_shared_bytes(config: &SweepConfig) -> usize {
    let states = config.states();
    let planes = config.units.div_ceil(config.plane);
    config.tile * (2 * 4 * states + 4 + 24 * config.channels() + 4 * 2 * states * planes)
}

/// Chunks that backward processes at once, right to left, to stay within its transient memory.
pub(super) fn segment_chunks(shape: &ScanShape, chunks: &Chunks, main: &SweepConfig) -> usize {
    let states = chunks.size / SUB * shape.state.next_multiple_of(4) * shape.inner;
    let partials = chunks.size * 2 * main.states() * main.cubes(shape.inner);
    let bytes = 4 * shape.batch * (states + partials);
    (knob("SEG", TRANSIENT_BYTES >> 10) * 1024 / bytes.max(1)).clamp(1, chunks.count)
}
