//! Carries states over the chunks of a sequence, left to right in forward, adjoints right to left
//! in backward: `carried = exp(A · Σ steps) · carried + own end`.

use cubecl::prelude::*;

use super::common::CLEARED;
use crate::cube::OptionalInput;
use crate::cube::math::{LOG2E, exp2};

/// Chunks loaded at once: their latencies overlap.
const GROUP: usize = 16;

/// Replaces the end of every chunk of `ends` (`[B, chunks, N, E]`) by what enters the chunk.
///
/// One unit for each sequence, state and channel. `start` (`[B, E, N]`) enters the first chunk,
/// `finish` receives what leaves the last one.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn carry(
    ends: &mut [f32],
    steps: &[f32],
    a: &[f32],
    start: &OptionalInput,
    finish: &mut [f32],
    batch: usize,
    chunks: usize,
    inner: usize,
    state: usize,
    #[comptime] reverse: bool,
    #[comptime] ptx: bool,
) {
    let row = state * inner;
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if unit >= batch * row {
        terminate!();
    }
    let sequence = unit / row;
    let at = unit % row;
    let n = at / inner;
    let channel = at % inner;
    let outer = (sequence * inner + channel) * state + n;
    let rate = a[channel * state + n] * LOG2E;
    let mut carried = 0.0f32;
    #[comptime]
    match start {
        ComptimeOption::Some(start) => carried = start[outer],
        ComptimeOption::None => {}
    }
    for group in 0..chunks.div_ceil(GROUP) {
        let mut own = Array::<f32>::new(GROUP);
        let mut decay = Array::<f32>::new(GROUP);
        #[unroll]
        for i in 0..GROUP {
            let chunk = chunk_of(group * GROUP + i, chunks, reverse);
            own[i] = ends[(sequence * chunks + chunk) * row + at];
            let sum = steps[(sequence * chunks + chunk) * inner + channel];
            decay[i] = select(sum < CLEARED, exp2(rate * sum, ptx), 0.0f32);
        }
        #[unroll]
        for i in 0..GROUP {
            if group * GROUP + i < chunks {
                let chunk = chunk_of(group * GROUP + i, chunks, reverse);
                ends[(sequence * chunks + chunk) * row + at] = carried;
                carried = fma(decay[i], carried, own[i]);
            }
        }
    }
    finish[outer] = carried;
}

/// The chunk that comes as number `turn`; the last one for numbers beyond.
#[cube]
fn chunk_of(turn: usize, chunks: usize, #[comptime] reverse: bool) -> usize {
    let turn = min(turn, chunks - 1);
    if reverse { chunks - 1 - turn } else { turn }
}
