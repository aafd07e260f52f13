//! How the work of a step is divided.

use crate::cube::{DeviceTraits, power_of_two_below};
use crate::sampling::cube::Chooser;

/// Units of a cube at most.
const UNITS: usize = 512;
/// Vectors of weights that a lane has in flight: of one row, and of each of two.
const AHEAD: usize = 8;
const EACH_AHEAD: usize = 4;
/// Most sequences whose sums a plane holds at once.
const GROUP: usize = 8;
/// Most channels of a cube: their rows of `x_proj` are held in registers.
const CHANNELS: usize = 32;
/// Lanes that share the states of a channel.
const LANES: usize = 4;

/// Compile-time sizes of all kernels of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepConfig {
    pub ptx: bool,
    pub plane: usize,
    pub units: usize,
    /// D.
    pub width: usize,
    /// E.
    pub inner: usize,
    /// N.
    pub states: usize,
    /// R.
    pub rank: usize,
    /// K.
    pub taps: usize,
    /// Rows of the head that are looked at.
    pub rows: usize,
    /// Whether norms subtract the mean.
    pub centred: bool,
    /// Whether a norm follows the last layer.
    pub norm_f: bool,
    /// Whether a word has two weights (bf16), not one.
    pub halves: bool,
    /// Sequences together, where their normalised inputs are in shared memory.
    pub group: usize,
    /// Channels of a cube of the first phase.
    pub channels: usize,
    /// Parts of the low-rank product that the second phase adds up: the cubes of the first, unless
    /// it is another kernel that leaves them.
    pub parts: usize,
    /// Channels of a cube of the second.
    pub block: usize,
    /// Rows of `out_proj` of a cube of the third, and planes that share a row.
    pub out_rows: usize,
    pub out_slices: usize,
    /// Rows of the head of a cube.
    pub head_rows: usize,
    /// Elements of a vector: of weights along D, of `out_proj` along E, of `dt_proj` along R, of
    /// states, of the small products' sums.
    pub vector: usize,
    pub out_vector: usize,
    pub rank_vector: usize,
    pub state_vector: usize,
    pub low_vector: usize,
}

/// Sizes of a model as [`StepConfig`] has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub width: usize,
    pub inner: usize,
    pub states: usize,
    pub rank: usize,
    pub taps: usize,
    pub rows: usize,
    pub centred: bool,
    pub norm_f: bool,
    /// Bytes of a weight.
    pub weight_bytes: usize,
}

impl StepConfig {
    /// The division for `batch` sequences; `None` where the kernels do not fit the device.
    pub fn new(sizes: Sizes, batch: usize, device: &DeviceTraits) -> Option<Self> {
        let processors = device.busy_units / 1024;
        let plane = device.plane;
        let units = UNITS.min(device.max_units) / plane * plane;
        let planes = units / plane;
        let widest = |most: usize, sizes: &[usize]| {
            let fits = |vector: &usize| sizes.iter().all(|size| size.is_multiple_of(*vector));
            std::iter::successors(Some(most), |vector| (*vector > 1).then_some(vector / 2))
                .find(fits)
                .unwrap_or(1)
        };
        let vector = widest(16 / sizes.weight_bytes, &[sizes.width, sizes.inner]);
        // So short that every plane has a slice of a row: it needs the fewest numbers of y then.
        let mut out_vector = vector;
        while out_vector * sizes.weight_bytes > 4 && sizes.inner / out_vector / plane < planes {
            out_vector /= 2;
        }
        let rank_vector = widest(vector, &[sizes.rank]);
        let halves = sizes.weight_bytes == 2;
        let low = sizes.rank + 2 * sizes.states;
        // Half of the shared memory for the inputs of a product.
        let fitting = device.shared_bytes / 2 / (4 * sizes.width.next_multiple_of(vector * plane));
        let most_together = power_of_two_below(fitting.min(GROUP).min(plane).min(planes))
            .min(batch.next_power_of_two());
        // One cube for each processor, in as few rounds as there have to be.
        let share = |count: usize, most: usize| {
            let rounds = count.div_ceil(processors).div_ceil(most);
            count.div_ceil(processors * rounds)
        };
        let lanes = LANES.min(plane);
        let most = units / lanes;
        let block = share(sizes.inner * batch, most);
        let channels = share(sizes.inner, CHANNELS);
        let of_group = |group: usize| Self {
            ptx: device.ptx,
            plane,
            units,
            width: sizes.width,
            inner: sizes.inner,
            states: sizes.states,
            rank: sizes.rank,
            taps: sizes.taps,
            rows: sizes.rows,
            centred: sizes.centred,
            norm_f: sizes.norm_f,
            halves,
            group,
            channels,
            parts: sizes.inner.div_ceil(channels),
            // A cube has channels of one sequence only.
            block: sizes.inner.div_ceil(sizes.inner.div_ceil(block)),
            out_rows: share(sizes.width, units / group),
            out_slices: power_of_two_below(planes.min(sizes.inner / out_vector / plane).max(1)),
            head_rows: share(sizes.rows, planes),
            vector,
            out_vector,
            rank_vector,
            state_vector: widest(4, &[sizes.states]),
            low_vector: widest(4, &[low]),
        };
        // Weights are read as words of four bytes.
        let per_word = 4 / sizes.weight_bytes;
        let words = [vector, out_vector, rank_vector, low]
            .iter()
            .all(|it| it.is_multiple_of(per_word));
        let possible = fitting > 0
            && words
            && units >= 256
            && low <= units
            && sizes.taps <= 8
            && sizes.states <= 256;
        // Where planes are small, sums of many sequences take more than their inputs do.
        let fits = |config: &Self| {
            let mut bytes = config.shared_bytes().into_iter();
            bytes.all(|it| it <= device.shared_bytes)
        };
        let groups = std::iter::successors(possible.then_some(most_together), |group| {
            (*group > 1).then_some(group / 2)
        });
        groups.map(of_group).find(fits)
    }

    /// Bytes of shared memory of each phase: the choice, the three of a layer, the head.
    fn shared_bytes(&self) -> [usize; 5] {
        let sums = 2 * self.planes() * self.group;
        let hat = self.group * self.padded() + sums;
        [
            self.chooser().shared_numbers(),
            hat + 2 * self.group * self.channels,
            self.low() * (self.slices() + self.group),
            self.out_slices * self.out_rows * self.group,
            hat,
        ]
        .map(|numbers| 4 * numbers)
    }

    /// A cube that chooses a byte.
    pub const fn chooser(&self) -> Chooser {
        Chooser {
            units: self.units,
            plane: self.plane,
            rows: self.rows,
            ptx: self.ptx,
        }
    }

    /// R + 2N.
    pub const fn low(&self) -> usize {
        self.rank + 2 * self.states
    }

    pub const fn planes(&self) -> usize {
        self.units / self.plane
    }

    /// D, rounded up to whole planes of vectors.
    pub const fn padded(&self) -> usize {
        (self.width / self.vector).next_multiple_of(self.plane) * self.vector
    }

    /// Columns of D of a unit that normalises.
    pub const fn columns(&self) -> usize {
        self.padded().div_ceil(self.units)
    }

    /// Weights of a word.
    pub const fn per_word(&self) -> usize {
        if self.halves { 2 } else { 1 }
    }

    /// Words of a vector of weights along D, of `out_proj` along E, and of `dt_proj` along R.
    pub const fn words(&self) -> [usize; 3] {
        [
            self.vector / self.per_word(),
            self.out_vector / self.per_word(),
            self.rank_vector / self.per_word(),
        ]
    }

    /// Words of a row of `x_proj`.
    pub const fn low_words(&self) -> usize {
        self.low() / self.per_word()
    }

    /// Units that share the sums of a word's columns of `x_proj`.
    pub const fn low_slices(&self) -> usize {
        let most = self.units / self.low_words();
        let most = if most < self.plane { most } else { self.plane };
        let most = if most < 8 { most } else { 8 };
        1 << most.ilog2()
    }

    /// Rows of `x_proj` of one of them.
    pub const fn low_rows(&self) -> usize {
        self.channels.div_ceil(self.low_slices())
    }

    /// Lanes that share the states of a channel.
    pub const fn lanes(&self) -> usize {
        let vectors = self.states / self.state_vector;
        let mut lanes = if LANES < self.plane {
            LANES
        } else {
            self.plane
        };
        while lanes > vectors {
            lanes /= 2;
        }
        lanes
    }

    /// Vectors of a row of `dt_proj` of a lane.
    pub const fn ranks(&self) -> usize {
        (self.rank / self.rank_vector).div_ceil(self.lanes())
    }

    /// Vectors of a row of `out_proj` of a lane.
    pub const fn out_loads(&self) -> usize {
        (self.inner / self.out_vector).div_ceil(self.out_slices * self.plane)
    }

    /// Rows of `out_proj` of a plane, at a time, and how often.
    pub const fn out_held(&self) -> usize {
        let most = if self.out_loads() < AHEAD {
            AHEAD / self.out_loads()
        } else {
            1
        };
        let rows = self.out_plane_rows();
        let rows = if rows < most { rows } else { most };
        if rows < self.plane { rows } else { self.plane }
    }

    pub const fn out_turns(&self) -> usize {
        self.out_plane_rows().div_ceil(self.out_held())
    }

    const fn out_plane_rows(&self) -> usize {
        self.out_rows.div_ceil(self.planes() / self.out_slices)
    }

    /// Whether one kernel can have all phases: their shared memory together is no more than `bytes`.
    pub fn fits_together(&self, bytes: usize) -> bool {
        self.shared_bytes().into_iter().sum::<usize>() <= bytes
    }

    /// Cubes that one kernel for all phases needs; none where a cube would have more than one piece
    /// of work in a phase, or where a number might be written again before all have it
    /// ([`exchange`](super::exchange)). The second phase's channels are there those of the first.
    pub fn cubes_at_once(&self, batch: usize) -> Option<usize> {
        let cubes = self.in_cubes();
        // Whoever writes to the stream has waited for the cubes of the first phase, or for the logits
        // that the choice is made from.
        let waited = self.out_cubes().max(self.head_cubes()).max(batch) <= cubes
            && self.chooser().bytes() == self.rows;
        let fits = batch <= self.group && self.channels * self.lanes() * batch <= self.units;
        (waited && fits).then_some(cubes)
    }

    /// Vectors of states of a lane.
    pub const fn held(&self) -> usize {
        (self.states / self.state_vector).div_ceil(self.lanes())
    }

    /// Cubes of the first phase.
    pub const fn in_cubes(&self) -> usize {
        self.inner.div_ceil(self.channels)
    }

    /// Parts of the partial sums that are added up at the same time: a power of two, of lanes of a
    /// plane.
    pub const fn slices(&self) -> usize {
        let columns = self.low() / self.low_vector;
        let mut most = self.units / columns;
        // Every slice has parts.
        if most > self.parts / self.part_each() {
            most = self.parts / self.part_each();
        }
        if most > self.plane {
            most = self.plane;
        }
        1 << most.ilog2()
    }

    /// Neighbouring parts that are read together, and how many such groups a slice has.
    pub const fn part_each(&self) -> usize {
        if self.parts.is_multiple_of(2) { 2 } else { 1 }
    }

    pub const fn part_groups(&self) -> usize {
        (self.parts / self.part_each()).div_ceil(self.slices())
    }

    /// Cubes of the second phase for one sequence.
    pub const fn blocks(&self) -> usize {
        self.inner.div_ceil(self.block)
    }

    /// Cubes of the third phase.
    pub const fn out_cubes(&self) -> usize {
        self.width.div_ceil(self.out_rows)
    }

    /// Cubes of the head.
    pub const fn head_cubes(&self) -> usize {
        self.rows.div_ceil(self.head_rows)
    }

    /// Vectors of a row of `count` vectors that a lane reads, and in how many rounds of loads.
    pub const fn loads(&self, count: usize) -> [usize; 2] {
        let all = count.div_ceil(self.plane);
        let rounds = all.div_ceil(EACH_AHEAD);
        [all.div_ceil(rounds), rounds]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTX_3090: DeviceTraits = DeviceTraits {
        ptx: true,
        plane: 32,
        max_units: 1024,
        busy_units: 82 * 1024,
        shared_bytes: 48 << 10,
        processor_shared_bytes: 100 << 10,
    };

    fn sizes(width: usize, weight_bytes: usize) -> Sizes {
        Sizes {
            width,
            inner: 2 * width,
            states: 16,
            rank: width.div_ceil(16).next_multiple_of(2),
            taps: 4,
            rows: 256,
            centred: true,
            norm_f: true,
            weight_bytes,
        }
    }

    /// A device that decodes one sequence decodes any number of them.
    #[test]
    fn more_sequences_always_fit() {
        let small = DeviceTraits {
            ptx: false,
            plane: 8,
            shared_bytes: 32 << 10,
            ..RTX_3090
        };
        for device in [RTX_3090, small] {
            for width in [64, 512, 768, 1024, 1536, 1792, 2304] {
                for batch in [1, 2, 4, 8, 64, 256] {
                    let config = StepConfig::new(sizes(width, 4), batch, &device);
                    assert!(config.is_some(), "{width} {batch} {device:?}");
                }
            }
        }
    }

    /// One sequence of the paper's models goes through one kernel for many bytes, where a processor's
    /// share of the model is one piece of work.
    #[test]
    fn one_kernel_has_the_paper_s_models() {
        for (width, processors) in [(1024, 82), (1024, 108), (1024, 132), (1792, 132)] {
            let device = DeviceTraits {
                busy_units: processors * 1024,
                ..RTX_3090
            };
            let config = StepConfig::new(sizes(width, 2), 1, &device).expect("fits");
            let cubes = config.cubes_at_once(1);
            assert!(
                cubes.is_some_and(|it| it <= processors),
                "{width} {processors}: {cubes:?}"
            );
        }
    }

    /// Cubes that only give to the stream could still wait for numbers that have been written again.
    #[test]
    fn one_kernel_waits_for_all_its_cubes() {
        let many_bytes = Sizes {
            rows: 512,
            ..sizes(1024, 4)
        };
        let narrow = Sizes {
            inner: 64,
            ..sizes(1024, 4)
        };
        for sizes in [many_bytes, narrow] {
            let config = StepConfig::new(sizes, 1, &RTX_3090).expect("fits");
            assert_eq!(config.cubes_at_once(1), None, "{sizes:?}");
        }
    }
}
