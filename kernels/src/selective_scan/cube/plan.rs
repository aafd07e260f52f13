//! Every size the scan's kernels are cut by, decided once from the shape and the device.

use std::cell::Cell;

use burn_cubecl::tensor::CubeTensor;

use super::copies;
use super::walk_layout::{Layout, STATES};
use crate::cube::{DeviceTraits, dims, power_of_two_below};
use crate::selective_scan::BACKWARD_TRANSIENT_BYTES;
use crate::selective_scan::ScanInputs;

/// Bounds of the positions in a chunk. Short chunks make the pass over chunk ends long, long ones
/// leave the device idle.
const CHUNK: [usize; 2] = [32, 512];

/// Positions between the states that backward recomputes from. All of a sub-chunk's states and
/// decays are in registers: with 8 the kernel spills or loses occupancy.
pub(super) const SUB: usize = 4;

/// Transient memory that backward may use at a time, in bytes. Tests have little, so that they run
/// through several segments.
const TRANSIENT_BYTES: usize = if cfg!(test) {
    1 << 18
} else {
    BACKWARD_TRANSIENT_BYTES
};

/// States of a lane: all of a channel's, for the usual number of states.
const LANE_STATES: usize = 16;

/// How forward goes through time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Every chunk on its own, twice: its end from a zero state, then its outputs from the state
    /// that enters it.
    Cut,
    /// Once through all positions, a channel in one unit or plane: for one chunk, or very many
    /// channels.
    Walk,
    /// Once through all positions, so many states of a channel (four or two) a unit of a cube: for
    /// channels of 16 states, if rows of the inputs are aligned; else the plan's own choice.
    Share(usize),
}

/// Choices in the place of the plan's own, for tests and measurements.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice {
    /// How forward goes through time.
    pub forward: Option<Forward>,
}

thread_local! {
    static CHOICE: Cell<Choice> = const { Cell::new(Choice { forward: None }) };
}

/// Sets the choices for what this thread runs from now on.
pub fn choose(choice: Choice) {
    CHOICE.set(choice);
}

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
    pub forward: Forward,
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
        // Cutting costs two exponentials an element, but a walk waits at every position for the one
        // before: it takes many units to hide that.
        let own = match count == 1 || 2 * channels >= device.busy_units {
            true => Forward::Walk,
            false => Forward::Cut,
        };
        Self {
            size,
            count,
            forward: match CHOICE.get().forward {
                Some(Forward::Share(_)) | None => own,
                Some(chosen) => chosen,
            },
        }
    }

    /// The same chunks, each on its own, as backward always has them.
    pub fn cut(&self) -> Self {
        Self {
            forward: Forward::Cut,
            ..*self
        }
    }

    /// Parts that a sequence is cut into.
    pub fn parts(&self) -> usize {
        match self.forward {
            Forward::Cut => self.count,
            Forward::Walk | Forward::Share(_) => 1,
        }
    }
}

/// How cubes' units share states ([`Forward::Share`]), given inputs whose rows are aligned; none where
/// forward goes another way.
///
/// However few its channels, a walk takes as long as one cube does, and two cubes beside each other on a
/// processor take half as long again: two states a unit are faster as long as all their cubes run at once
/// (H200, 353M: 0.21 ms for one sequence and 0.30 for two, with four states 0.35 and 0.35). With cubes for fewer than
/// about three quarters of the processors, cutting time is as fast (0.23 ms for one sequence, and less in
/// proportion for fewer channels).
pub(super) fn shares(shape: &ScanShape, device: &DeviceTraits) -> Option<Layout> {
    let cubes = |layout: &Layout| shape.batch * shape.inner.div_ceil(layout.channels());
    let processors = device.busy_units / 1024;
    let (twos, fours) = (layout(2, device), layout(4, device));
    let enough = |layout: &Layout| 4 * cubes(layout) >= 3 * processors;
    let at_once = |layout: &Layout| {
        let beside = (device.processor_shared_bytes / layout.shared_bytes()).min(2);
        cubes(layout) <= beside * processors
    };
    let wanted = match CHOICE.get().forward {
        None if shape.length <= CHUNK[0] => None,
        // Smaller cubes, for less shared memory, have not been measured.
        None => twos
            .filter(|layout| layout.half == HALF && at_once(layout))
            .or(fours)
            .filter(enough),
        Some(Forward::Share(2)) => twos,
        Some(Forward::Share(_)) => fours,
        Some(_) => None,
    };
    let fits =
        shape.state == STATES && shape.inner.is_multiple_of(4) && device.max_units >= 2 * HALF;
    wanted.filter(|_| fits)
}

/// Walkers of a cube.
const HALF: usize = 128;

/// How so many states a unit are laid out, if there is room for them.
fn layout(own: usize, device: &DeviceTraits) -> Option<Layout> {
    let room = match own {
        2 => device.processor_shared_bytes,
        _ => device.shared_bytes,
    };
    [(HALF, true), (HALF, false), (HALF / 2, false)]
        .map(|(half, spaced)| Layout { own, half, spaced })
        .into_iter()
        .find(|layout| layout.shared_bytes() <= room)
}

/// A position's numbers of the channels in shared memory: after every `run` of them `gap` places are
/// empty, so that neither units with one channel each nor those with several neighbouring ones meet in
/// a bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Spaced {
    pub run: usize,
    pub gap: usize,
}

/// Four numbers a channel, and two.
pub(super) const FOURS: Spaced = Spaced { run: 8, gap: 1 };
pub(super) const PAIRS: Spaced = Spaced { run: 16, gap: 2 };

impl Spaced {
    /// Places of so many channels.
    pub const fn places(&self, channels: usize) -> usize {
        channels + channels / self.run * self.gap
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
    /// Neighbouring numbers of B and C that are loaded at once: 4 or 1.
    pub source: usize,
    /// Whether the step size goes through softplus.
    pub softplus: bool,
    /// Whether activations are copied to shared memory ahead of their use (first backward kernel).
    pub copies: bool,
    /// Whether kernels may hold PTX.
    pub ptx: bool,
}

impl SweepConfig {
    /// Has activations copied ahead, where a plane's copies are whole and a cube has room for them.
    /// `eights`: eight neighbouring channels of every activation are 16 bytes that can be copied at once.
    pub fn copy_ahead(mut self, eights: bool, device: &DeviceTraits) -> Self {
        let planes = self.plane == copies::PLANE && self.units.is_multiple_of(copies::PLANE);
        self.copies = self.ptx && eights && self.lanes == 1 && planes;
        while self.tile > SUB && self.shared_bytes() > device.shared_bytes {
            self.tile /= 2;
        }
        self.copies &= self.shared_bytes() <= device.shared_bytes;
        self
    }

    /// Shared memory of a kernel that goes left to right: B and C of a stage, which of its positions
    /// clear the state, and the activations on their way.
    pub const fn shared_bytes(&self) -> usize {
        self.tile * (2 * 4 * self.states() + 4) + 2 * copies::numbers(self)
    }

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

    /// Vectors of a row of the units' contributions to dB and dC: those of every part of the states and
    /// one more, without which sums of the parts would read the same banks of shared memory.
    pub const fn crossing(&self) -> usize {
        self.lanes * (self.spacing() + 1)
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

    /// Vectors of a stage's B or C.
    pub const fn tile_vectors(&self) -> usize {
        self.tile * self.states() / 4
    }

    /// Those of one unit.
    pub const fn tile_passes(&self) -> usize {
        self.tile_vectors().div_ceil(self.units)
    }

    /// Loads of a unit for them.
    pub const fn tile_loads(&self) -> usize {
        self.tile_passes() * 4 / self.source
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

/// The kernels that go left to right, a channel's states in one lane where they fit.
///
/// `most_units` bounds the cube: the compiler shares 65,536 registers over it, and the cube's size
/// is the only way to ask for fewer.
pub(super) fn sweep(
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    alignment: Alignment,
    softplus: bool,
    most_units: usize,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, LANE_STATES, device.plane);
    let most_units = if per_lane > LANE_STATES {
        128
    } else {
        most_units
    };
    let rows = shape.batch * chunks.parts();
    let units = cube_units(shape.inner * lanes, rows, most_units, device).max(lanes);
    let mut config = SweepConfig {
        units,
        per_lane,
        lanes,
        per_unit: 1,
        plane: device.plane,
        chunk: chunks.size,
        tile: 128
            .min(chunks.size)
            .min(shape.length.next_power_of_two())
            .max(SUB),
        vector: 1,
        source: alignment.states,
        softplus,
        copies: false,
        ptx: device.ptx,
    };
    while config.tile > SUB && config.shared_bytes() > device.shared_bytes / 2 {
        config.tile /= 2;
    }
    config
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
    alignment: Alignment,
    softplus: bool,
) -> SweepConfig {
    let (per_lane, lanes) = spread_states(shape.state, 4, device.plane);
    // Several channels a lane share the sums over channels: 4 are faster than 2. More units of a cube,
    // or positions of a stage, wait longer for each other.
    let per_unit = if lanes > 1 && per_lane == 4 {
        4.min(lanes)
    } else {
        1
    };
    let mut config = SweepConfig {
        units: 64.min(power_of_two_below(device.max_units)),
        per_lane,
        lanes,
        per_unit,
        plane: device.plane,
        chunk: chunks.size,
        tile: SUB,
        vector: 1,
        source: alignment.states,
        softplus,
        copies: false,
        ptx: device.ptx,
    };
    let least = device.plane.max(lanes);
    loop {
        let wide = config.units > least && config.channels() >= 2 * shape.inner.max(1);
        let fits = adjoint_shared_bytes(&config) <= device.shared_bytes;
        if !wide && fits {
            break;
        } else if config.units > least {
            config.units /= 2;
        } else if config.per_unit > 1 {
            config.per_unit /= 2;
        } else {
            break;
        }
    }
    config.vector = alignment.channels.min(config.channels());
    config
}

/// Shared memory of the main backward kernel: tiles of B and C, four numbers for every position and
/// channel of a stage, the parts of their two sums over states, and the contributions to dB and dC.
pub(super) fn adjoint_shared_bytes(config: &SweepConfig) -> usize {
    let contributions = 4 * SUB * 2 * config.per_lane * config.crossing();
    let a_position = 2 * 4 * config.states() + 4 + 16 * FOURS.places(config.channels());
    config.tile * a_position
        + SUB * 8 * config.lanes * PAIRS.places(config.channels())
        + contributions
}

/// Chunks that backward processes at once, right to left, to stay within its transient memory.
pub(super) fn segment_chunks(shape: &ScanShape, chunks: &Chunks, main: &SweepConfig) -> usize {
    let states = chunks.size / SUB * shape.state.next_multiple_of(4) * shape.inner;
    let partials = chunks.size * 2 * main.states() * main.cubes(shape.inner);
    let bytes = 4 * shape.batch * (states + partials);
    let most = (TRANSIENT_BYTES / bytes.max(1)).clamp(1, chunks.count);
    // Segments of one size: a shorter last one would leave the device half idle.
    chunks.count.div_ceil(chunks.count.div_ceil(most))
}
