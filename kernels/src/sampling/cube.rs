//! The choice on a GPU: a cube a sequence.
//!
//! A byte's rank is the number of bytes before it, counted; weights are put in the order of their
//! ranks, and sums along that order say what the limits leave and where the draw falls. What the
//! model's own probabilities are nobody waits for, so that is a function of its own.

use cubecl::prelude::*;

use super::BYTES;
use crate::cube::reduce::{cube_sum, cube_top, lane_sum};
use crate::cube::wide::{One, wide_at};

/// Numbers of a sequence's settings: temperature, top-k, top-p, min-p, penalty.
pub(crate) const SETTINGS: usize = 5;
/// Numbers of a choice: byte, log-probability, likeliest byte, its log-probability.
pub(crate) const CHOICE: usize = 4;

/// Below every logit.
const LOWEST: f32 = -3.0e38;

/// A cube that chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Chooser {
    /// Units of the cube: at least 256.
    pub units: usize,
    /// Lanes that exchange registers.
    pub plane: usize,
    /// Logits of a sequence: those of bytes come first.
    pub rows: usize,
    pub ptx: bool,
}

impl Chooser {
    /// Bytes that have a logit.
    pub const fn bytes(&self) -> usize {
        if self.rows < BYTES { self.rows } else { BYTES }
    }

    /// Neighbouring units that count a byte's rank together.
    const fn sharers(&self) -> usize {
        let most = self.units / BYTES;
        let most = if most < self.plane { most } else { self.plane };
        1 << most.ilog2()
    }

    /// Numbers of shared memory.
    pub const fn shared_numbers(&self) -> usize {
        5 * BYTES + 4 * (self.units / self.plane)
    }
}

/// What stands for the logit of a unit that has none.
#[cube]
pub(crate) fn no_logit() -> f32 {
    LOWEST.runtime()
}

/// The place of the value `own` of byte `byte` among `values`, largest first; of equal values the
/// smaller byte comes first. Of the units that share the counting this is number `part`, and the count
/// is of its share alone.
#[cube]
fn count_before(
    values: &mut Shared<[One]>,
    own: f32,
    byte: usize,
    part: usize,
    #[comptime] c: Chooser,
) -> u32 {
    let sharers = comptime!(c.sharers());
    let mut count = 0u32;
    for i in 0..comptime!(BYTES / 4 / sharers) {
        let vector = i * sharers + part;
        let four = wide_at::<Const<4>>(values, vector, c.ptx);
        #[unroll]
        for k in 0..4usize {
            let value = four.extract(k);
            let before = value > own || (value == own && vector * 4 + k < byte);
            count += select(before, 1u32, 0u32);
        }
    }
    count
}

/// Chooses the byte of `sequence`; every unit gets it. All units of the cube take part; those of bytes
/// have their logits, others [`no_logit`].
///
/// - seen: `[B, 256]`, 1 for bytes that the sequence has
/// - limits: `[B, 5]`; draws: `[steps, B]`, a number in [0, 1), or `-1 - byte` for a forced byte
#[cube]
pub(crate) fn choose(
    raw: f32,
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    step: usize,
    sequence: usize,
    batch: usize,
    #[comptime] c: Chooser,
) -> usize {
    let unit = UNIT_POS as usize;
    let is_byte = unit < BYTES;
    let bytes = comptime!(c.bytes());
    let temperature = limits[sequence * SETTINGS];
    let top_k = limits[sequence * SETTINGS + 1];
    let top_p = limits[sequence * SETTINGS + 2];
    let min_p = limits[sequence * SETTINGS + 3];
    let penalty = limits[sequence * SETTINGS + 4];
    let draw = draws[step * batch + sequence];

    let mut values = Shared::<[One]>::new_aligned_slice(BYTES, 16usize);
    let mut sorted = Shared::<[f32]>::new_slice(BYTES);
    let mut order = Shared::<[f32]>::new_slice(BYTES);
    let mut sums = Shared::<[f32]>::new_slice(comptime!(2 * BYTES));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(2 * (c.units / c.plane)));

    // Logits with the penalty.
    let had = is_byte && seen[sequence * BYTES + min(unit, BYTES - 1)] > 0.5f32;
    let penalised = select(raw > 0.0f32, raw / penalty, raw * penalty);
    let logit = select(had && unit < bytes, penalised, raw);
    if is_byte {
        values[unit] = Vector::new(logit);
        sorted[unit] = 0.0f32;
        order[unit] = 0.0f32;
        sums[unit] = 0.0f32;
    }
    let (best, best_unit) = cube_top(logit, &mut scratch, c.units, c.plane);

    // Their ranks and weights.
    let sharers = comptime!(c.sharers());
    let byte = min(unit / sharers, BYTES - 1);
    let part = unit % sharers;
    let own = values[byte].extract(0usize);
    let greedy = temperature == 0.0f32 || top_k == 1.0f32;
    let mut count = select(byte == best_unit, 0u32, 1u32);
    if !greedy {
        count = count_before(&mut values, own, byte, part, c);
    }
    let mut rank = f32::cast_from(count);
    if comptime!(sharers > 1) {
        let together = lane_sum(rank, sharers, 1usize);
        rank = select(greedy, rank, together);
    }
    let limit = select(top_k < 0.5f32, 256.0f32, top_k);
    let divisor = select(greedy, 1.0f32, temperature);
    let stays = byte < bytes && rank < limit && (!greedy || rank == 0.0f32);
    let weight = select(stays, ((own - best) / divisor).exp(), 0.0f32);
    // Without limits every byte has a place; a greedy choice has one.
    let placed = part == 0 && unit < comptime!(BYTES * sharers) && (!greedy || rank == 0.0f32);
    if placed {
        let place = usize::cast_from(rank as u32);
        sorted[place] = weight;
        order[place] = f32::cast_from(byte as u32);
        sums[place] = weight;
    }
    sync_cube();
    // From here on a unit stands for a rank. Sums go from one half of their memory to the other.
    #[unroll]
    for step in 0..8usize {
        let stride = comptime!(1usize << step);
        let from = comptime!(step % 2 * BYTES);
        let to = comptime!(BYTES - step % 2 * BYTES);
        if is_byte {
            let mut sum = sums[from + unit];
            if unit >= stride {
                sum += sums[from + unit - stride];
            }
            sums[to + unit] = sum;
        }
        sync_cube();
    }
    let all = sums[comptime!(BYTES - 1)];
    let limited = top_p > 0.0f32 && top_p < 1.0f32;
    let mut kept = 0.0f32;
    if is_byte {
        let own = sorted[unit];
        let before = sums[unit] - own;
        let likely = own > 0.0f32 && own >= min_p;
        let room = !limited || before < top_p * all;
        kept = select(unit == 0 || (likely && room), 1.0f32, 0.0f32);
    }
    let count = cube_sum(kept, &mut scratch, c.units, c.plane);
    let last = usize::cast_from(count as u32) - 1;
    let target = draw * sums[last];
    let mut passed = 0.0f32;
    if is_byte {
        passed = select(kept > 0.5f32 && sums[unit] <= target, 1.0f32, 0.0f32);
    }
    let place = cube_sum(passed, &mut scratch, c.units, c.plane);
    let place = min(usize::cast_from(place as u32), last);
    let chosen = select(draw < 0.0f32, -1.0f32 - draw, order[place]);
    let byte = usize::cast_from(chosen as u32);
    if unit == byte {
        seen[sequence * BYTES + byte] = 1.0f32;
    }
    byte
}

/// Notes the choice of `byte`: `choices` is `[steps, B, 4]`. Units have what [`choose`] was given.
#[cube]
pub(crate) fn note(
    raw: f32,
    byte: usize,
    choices: &mut [f32],
    step: usize,
    sequence: usize,
    batch: usize,
    #[comptime] c: Chooser,
) {
    let unit = UNIT_POS as usize;
    let bytes = comptime!(c.bytes());
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(2 * (c.units / c.plane)));
    let (highest, top) = cube_top(raw, &mut scratch, c.units, c.plane);
    let share = select(unit < bytes, (raw - highest).exp(), 0.0f32);
    let log_sum = cube_sum(share, &mut scratch, c.units, c.plane).ln();
    let at = (step * batch + sequence) * CHOICE;
    let logprob = raw - highest - log_sum;
    if unit == byte {
        choices[at] = f32::cast_from(byte as u32);
        choices[at + 1] = select(unit < bytes, logprob, LOWEST);
    }
    if unit == top {
        choices[at + 2] = f32::cast_from(unit as u32);
        choices[at + 3] = logprob;
    }
}
