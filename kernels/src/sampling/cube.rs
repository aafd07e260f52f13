//! The choice on a GPU: a cube a sequence, a unit a byte.
//!
//! A byte's rank is the number of bytes before it, counted; weights are put in the order of their
//! ranks, and sums along that order say what the limits leave and where the draw falls.

use cubecl::prelude::*;

use super::BYTES;
use crate::cube::reduce::cube_sum;

/// Numbers of a sequence's settings: temperature, top-k, top-p, min-p, penalty.
pub(crate) const SETTINGS: usize = 5;
/// Numbers of a choice: byte, log-probability, likeliest byte, its log-probability.
pub(crate) const CHOICE: usize = 4;

/// Below every logit.
const LOWEST: f32 = -3.0e38;

/// The place of the value `own` of byte `unit` among `values`, largest first; of equal values the
/// smaller byte comes first.
#[cube]
fn rank_of(values: &Shared<[f32]>, own: f32, unit: usize) -> usize {
    let mut rank = 0u32;
    for other in 0..BYTES {
        let value = values[other];
        let before = value > own || (value == own && other < unit);
        rank += select(before, 1u32, 0u32);
    }
    rank as usize
}

/// Chooses the byte of `sequence`; every unit gets it. All units of a cube of at least 256 take
/// part.
///
/// - logits: `[B, rows]`; seen: `[B, 256]`, 1 for bytes that the sequence has
/// - limits: `[B, 5]`; draws: `[steps, B]`, a number in [0, 1), or `-1 - byte` for a forced byte
/// - choices: `[steps, B, 4]`
#[cube]
pub(crate) fn choose(
    logits: &mut [f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    step: usize,
    sequence: usize,
    batch: usize,
    #[comptime] rows: usize,
    #[comptime] units: usize,
    #[comptime] plane: usize,
) -> usize {
    let unit = UNIT_POS as usize;
    let is_byte = unit < BYTES;
    let bytes = comptime!(if rows < BYTES { rows } else { BYTES });
    let temperature = limits[sequence * SETTINGS];
    let top_k = limits[sequence * SETTINGS + 1];
    let top_p = limits[sequence * SETTINGS + 2];
    let min_p = limits[sequence * SETTINGS + 3];
    let penalty = limits[sequence * SETTINGS + 4];
    let draw = draws[step * batch + sequence];

    let mut values = Shared::<[f32]>::new_slice(BYTES);
    let mut sorted = Shared::<[f32]>::new_slice(BYTES);
    let mut order = Shared::<[f32]>::new_slice(BYTES);
    let mut sums = Shared::<[f32]>::new_slice(BYTES);
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units / plane));
    let mut found = Shared::<[f32]>::new_slice(2usize);

    // The model's own distribution.
    let mut raw = LOWEST.runtime();
    if unit < bytes {
        raw = logits[sequence * rows + unit];
    }
    sync_cube();
    if is_byte {
        values[unit] = raw;
    }
    sync_cube();
    let raw_rank = rank_of(&values, raw, unit);
    if is_byte && raw_rank == 0 {
        found[0] = raw;
        found[1] = f32::cast_from(unit as u32);
    }
    sync_cube();
    let highest = found[0];
    let top = usize::cast_from(found[1] as u32);
    let share = select(unit < bytes, (raw - highest).exp(), 0.0f32);
    let log_sum = cube_sum(share, &mut scratch, units, plane).ln();

    // What is chosen among.
    let had = is_byte && seen[sequence * BYTES + min(unit, BYTES - 1)] > 0.5f32;
    let penalised = select(raw > 0.0f32, raw / penalty, raw * penalty);
    let logit = select(had && unit < bytes, penalised, raw);
    sync_cube();
    if is_byte {
        values[unit] = logit;
        sorted[unit] = 0.0f32;
        order[unit] = 0.0f32;
    }
    sync_cube();
    let rank = rank_of(&values, logit, unit);
    if is_byte && rank == 0 {
        found[0] = logit;
    }
    sync_cube();
    let greedy = temperature == 0.0f32 || top_k == 1.0f32;
    let best = found[0];
    let limit = select(top_k < 0.5f32, 256.0f32, top_k);
    let within = unit < bytes && f32::cast_from(rank as u32) < limit;
    let divisor = select(greedy, 1.0f32, temperature);
    let mut weight = select(within, ((logit - best) / divisor).exp(), 0.0f32);
    if greedy && rank > 0 {
        weight = 0.0f32;
    }
    if is_byte && rank < BYTES {
        sorted[rank] = weight;
        order[rank] = f32::cast_from(unit as u32);
        sums[rank] = weight;
    }
    sync_cube();
    // From here on a unit stands for a rank.
    #[unroll]
    for step in 0..8usize {
        let stride = comptime!(1usize << step);
        let mut sum = 0.0f32;
        if is_byte {
            sum = sums[unit];
            if unit >= stride {
                sum += sums[unit - stride];
            }
        }
        sync_cube();
        if is_byte {
            sums[unit] = sum;
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
    let count = cube_sum(kept, &mut scratch, units, plane);
    let last = usize::cast_from(count as u32) - 1;
    let target = draw * sums[last];
    let mut passed = 0.0f32;
    if is_byte {
        passed = select(kept > 0.5f32 && sums[unit] <= target, 1.0f32, 0.0f32);
    }
    let place = cube_sum(passed, &mut scratch, units, plane);
    let place = min(usize::cast_from(place as u32), last);
    let chosen = select(draw < 0.0f32, -1.0f32 - draw, order[place]);
    let byte = usize::cast_from(chosen as u32);

    let at = (step * batch + sequence) * CHOICE;
    let logprob = raw - highest - log_sum;
    if unit == byte {
        seen[sequence * BYTES + byte] = 1.0f32;
        choices[at] = chosen;
        choices[at + 1] = select(unit < bytes, logprob, LOWEST);
    }
    if unit == top {
        choices[at + 2] = f32::cast_from(unit as u32);
        choices[at + 3] = logprob;
    }
    byte
}
